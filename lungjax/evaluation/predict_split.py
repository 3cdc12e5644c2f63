"""Predictions for a split of a data set."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from lungjax.config import Config
from lungjax.data import pipeline, prepared
from lungjax.data.prepared import Prepared
from lungjax.evaluation.predictions import Predictions
from lungjax.models.inputs import prediction_batch_size
from lungjax.runtime import mesh as meshes
from lungjax.runtime.progress_bar import progress_bar
from lungjax.runtime.signals import Watch


def predict(
    predict_step: Callable[..., dict[str, jax.Array]],
    variables: dict[str, Any],
    data: Prepared,
    split: str,
    config: Config,
    mesh: Mesh,
    watch: Watch | None = None,
) -> Predictions:
    """Returns the predictions for every example of a split, in record order. Raises ValueError for an empty split.

    The outputs of `predict_step`, a jitted function of `variables` and a batch, are replicated, so every host has all
    predictions. With `watch`, raises Interrupted between batches after a signal; otherwise shows a progress bar.
    """
    rows = data.rows(split)
    if not len(rows):
        raise ValueError(f"{data.name}: the {split} split is empty; prepare the data set with a {split} part")
    size = prediction_batch_size(config, mesh.size, mesh.devices.flat[0].platform)
    batches = pipeline.eval_batches(data, rows, config, size, host=jax.process_index(), hosts=jax.process_count())
    scores: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def keep(out: dict[str, jax.Array]) -> None:
        batch = jax.device_get(out)
        each = zip(batch["row"], batch["probabilities"], batch["logits"], strict=True)
        scores.update((int(row), (p, z)) for row, p, z in each if row >= 0)  # -1 is padding

    running: list[dict[str, jax.Array]] = []  # computed while the next batch is read and transferred
    total = -(-len(rows) // size)
    for batch in progress_bar(batches, f"predicting {split}", total, disable=watch is not None, leave=False):
        if watch:
            watch.check()
        running.append(predict_step(variables, meshes.to_devices(batch, mesh)))
        if len(running) > 1:
            keep(running.pop(0))
    keep(running.pop())
    probabilities, logits = (np.stack(values) for values in zip(*(scores[int(row)] for row in rows), strict=True))
    columns = {name: values[rows] for name, values in data.columns.items()}
    extra = {name: values for name, values in columns.items() if name not in prepared.COLUMNS}
    ids, groups, sources, labels = (columns[name] for name in ("file", "group", "source", "label"))
    return Predictions(ids, groups, sources, labels, probabilities, data.classes, extra, logits)
