"""One pass over a split with given weights: each example once, predictions gathered on the host."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from lungjax import metrics, sharding
from lungjax.config import Config
from lungjax.data import pipeline, prepared
from lungjax.data.prepared import Prepared
from lungjax.predictions import Predictions


def predict(
    predict_step: Callable[..., dict[str, jax.Array]],
    variables: dict[str, Any],
    data: Prepared,
    split: str,
    config: Config,
    mesh: Mesh,
    progress: bool = False,
) -> Predictions:
    """Returns the predictions for every example of a split, in record order.

    `predict_step` is jitted with its output on every device (`sharding.replicated`), so each host ends up with
    all predictions. Raises ValueError for an empty split.
    """
    rows = data.rows(split)
    if not len(rows):
        raise ValueError(f"{data.name}: the {split} split is empty; prepare the data set with a {split} part")
    batches = pipeline.eval_batches(data, rows, config, host=jax.process_index(), hosts=jax.process_count())
    scores: dict[int, np.ndarray] = {}
    total = -(-len(rows) // config.eval.batch_size)
    for batch in tqdm(batches, f"predicting {split}", total, disable=not progress, leave=False):
        out = jax.device_get(predict_step(variables, sharding.to_devices(batch, mesh)))
        scores.update((int(r), p) for r, p in zip(out["row"], out["probabilities"], strict=True) if r >= 0)
    columns = {name: values[rows] for name, values in data.columns.items()}
    return Predictions(
        ids=columns["file"],
        groups=columns["group"],
        sources=columns["source"],
        labels=columns["label"],
        probabilities=np.stack([scores[int(r)] for r in rows]),
        classes=data.classes,
        extra={name: values for name, values in columns.items() if name not in prepared.RESERVED},
    )


def flat_levels(predictions: Predictions) -> dict[str, float | None]:
    """Returns the numbers of the slice and patient levels by dotted name, such as "slice.auc_macro"."""
    levels = metrics.report_levels(predictions)
    return {
        f"{level}.{name}": value
        for level in ("slice", "patient")
        for name, value in levels[level].items()
        if value is None or isinstance(value, (int, float))
    }
