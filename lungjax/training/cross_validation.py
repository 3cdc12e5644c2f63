"""Cross-validation: one run per fold, and a report over all folds, in which each image is tested once."""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lungjax import config as configs
from lungjax import datasets
from lungjax.config import Config, overrides
from lungjax.data import folds, pipeline
from lungjax.data.prepared import Prepared
from lungjax.evaluation import metrics, predictions
from lungjax.evaluation.predictions import Predictions
from lungjax.report import write as reporting
from lungjax.runtime import distributed, provenance
from lungjax.training import auto, progress, setup, train
from lungjax.training import workdir as workdirs
from lungjax.weights import load

POOLED = ("test", "no_lungs", "source_only")  # not val, whose patients are tested in another fold
PREFIXES = ("predictions_", "report.", "plots")  # of the files next to the folds
SHARED_FACTS = ("parameters", "compute_type", "steps")  # reported if equal in all folds
SPREAD_METRICS = ("accuracy", "balanced_accuracy", "auc_macro", "f1_macro")  # per slice and per patient
RESTART = "delete the cross-validation folder to start over"


def run(
    config: Config, count: int, workdir: Path, data_dir: Path, mode: str = "train", weights_dir: Path | None = None
) -> Path:
    """Trains and tests one run per fold in WORKDIR/fold0, fold1, ... and writes WORKDIR/report.md on all folds.

    Finished folds are skipped, unfinished ones resumed. WORKDIR receives the pooled predictions (with the column
    `extra_fold`), plots and reports. The other arguments are those of `train.run`. Raises ValueError if the data does
    not allow `count` folds or WORKDIR contains other files, and as `train.run` does.
    """
    started = time.time()
    if count < folds.MIN_FOLDS:
        raise ValueError(f"--folds={count}: expected {folds.MIN_FOLDS} or more, one each for test, val and train")
    parts = [replace(config, data=replace(config.data, folds=count, fold=i)) for i in range(count)]
    for part in parts:
        configs.check(part)
    distributed.run_on_all_hosts(lambda: _check_folder(workdir, count))
    data = distributed.run_on_all_hosts(lambda: setup.open_data(parts[0], data_dir))
    folders = [workdir / f"fold{i}" for i in range(count)]
    # The first fold determines the values of all.
    config = distributed.run_on_all_hosts(lambda: auto.resolve(parts[0], data, folders[0], weights_dir))
    parts = [replace(config, data=part.data) for part in parts]
    for i, (part, folder) in enumerate(zip(parts, folders, strict=True)):
        if mode == "train" and distributed.run_on_all_hosts(partial(is_finished, folder, part, data)):
            distributed.print_once(f"fold {i} is finished: {folder}")
            continue
        distributed.print_once(f"fold {i} of 0 to {count - 1}: {folder}")
        train.run(part, folder, data_dir, mode, weights_dir)
    distributed.on_first_host(lambda: write(parts[0], workdir, folders, data, data_dir, started))
    return workdir / "report.md"


def is_finished(folder: Path, config: Config, data: Prepared) -> bool:
    """Returns whether a fold was trained and reported. Raises ValueError if its configuration or data set differs."""
    if not (folder / "report.md").exists():  # the file that a run writes last
        return False
    steps = json.loads((folder / "report.json").read_text())["facts"]["steps"]
    config = load.resolve(config)
    if not progress.is_complete(folder, config, steps):
        return False
    workdirs.check(folder, config, "train")
    workdirs.check_same_data(folder, data)
    saved = overrides.read(folder / "config.json")
    return not any(line.split(":")[0] in workdirs.LENGTH_FIELDS for line in overrides.difference(saved, config))


def write(
    config: Config, workdir: Path, folders: Sequence[Path], data: Prepared, data_dir: Path, started: float
) -> None:
    """Writes the report on the pooled predictions of all folds. Raises ValueError if they are inconsistent."""
    fold_predictions = [predictions.read(folder / "predictions_test.csv") for folder in folders]
    results = {"test": pool(fold_predictions, data)}
    expected = data.columns["file"][data.columns["split"] != ""]
    if not np.array_equal(results["test"].ids, expected):
        raise ValueError(f"{workdir}: the folds do not match the images of {data.name}; {RESTART}")
    for name in POOLED[1:]:
        paths = [folder / f"predictions_{name}.csv" for folder in folders]
        if all(path.exists() for path in paths):
            results[name] = pool([predictions.read(path) for path in paths], data)
    config = load.resolve(config)
    rows, reader = _rows(results["test"], data), pipeline.Reader(data, config.input)
    facts = _facts(folders, fold_predictions, data) | {"seconds": round(time.time() - started, 1)}
    reporting.write_report(
        workdir, config, results, [], facts, lambda i: reader(rows[i]), **datasets.describe(data, data_dir),
        temperature=None,
    )  # fmt: skip


def pool(parts: Sequence[Predictions], data: Prepared) -> Predictions:
    """Returns the predictions of all folds in the order of the data set, with the fold as an extra column.

    Raises ValueError if an image is in two folds or not in the data set, or if classes or columns differ.
    """
    first = parts[0]
    if any(p.classes != first.classes or p.extra.keys() != first.extra.keys() for p in parts):
        raise ValueError("the folds have different classes or columns; they were trained on different data")
    fold = np.repeat([str(i) for i in range(len(parts))], [len(p) for p in parts])
    names = ["ids", "groups", "sources", "labels", "probabilities"]
    if all(p.logits is not None for p in parts):
        names.append("logits")
    pooled = Predictions(
        **{name: np.concatenate([getattr(p, name) for p in parts]) for name in names},
        classes=first.classes,
        extra={k: np.concatenate([p.extra[k] for p in parts]) for k in first.extra} | {"fold": fold},
    )
    ids, counts = np.unique(pooled.ids, return_counts=True)
    if (counts > 1).any():
        raise ValueError(f"{ids[counts > 1][0]} was tested in two folds; {RESTART}")
    return predictions.take(pooled, np.argsort(_rows(pooled, data)))


def spread(fold_predictions: Sequence[Predictions]) -> dict[str, dict[str, Any]]:
    """Returns {"slice.accuracy": {mean, low, high, values}, ...}; an undefined value is listed as None and ignored."""
    levels = [metrics.flat_levels(p) for p in fold_predictions]
    result = {}
    for name in (f"{unit}.{number}" for unit in ("slice", "patient") for number in SPREAD_METRICS):
        values = [level[name] for level in levels]
        defined = [value for value in values if value is not None]
        if defined:
            mean = math.fsum(defined) / len(defined)
            result[name] = {"mean": mean, "low": min(defined), "high": max(defined), "values": values}
    return result


def _facts(folders: Sequence[Path], fold_predictions: Sequence[Predictions], data: Prepared) -> dict[str, Any]:
    fold_facts = [json.loads((folder / "report.json").read_text("utf-8"))["facts"] for folder in folders]
    items = fold_facts[0].items()
    shared = {k: v for k, v in items if k in SHARED_FACTS and all(facts.get(k) == v for facts in fold_facts)}
    counts = np.bincount(data.columns["label"][data.columns["split"] != ""], minlength=len(data.classes))
    sizes = [len(p) for p in fold_predictions]  # may differ, since near duplicates are in the same fold
    span = " to ".join(f"{size:,}" for size in sorted({min(sizes), max(sizes)}))
    return {
        **workdirs.data_facts(data),
        "counts": {"test": dict(zip(data.classes, counts.tolist(), strict=True))},
        **shared,
        **provenance.facts(),
        "folds": {"count": len(folders), "images": sizes, "over": spread(fold_predictions)},
        "notes": [
            f"Each image was tested once, by one of {len(folders)} networks ({span} images per fold). Metrics over all "
            "images mix the scales of these networks, each calibrated on its own val split; the mean over folds does "
            "not."
        ],
    }


def _rows(p: Predictions, data: Prepared) -> np.ndarray:
    """Returns the rows of the predicted images in the data set, int64 [N]."""
    rows = {name: row for row, name in enumerate(data.columns["file"].tolist())}
    unknown = [name for name in p.ids.tolist() if name not in rows]
    if unknown:
        raise ValueError(f"{unknown[0]} is not an image of {data.name}; {RESTART}")
    return np.asarray([rows[name] for name in p.ids.tolist()])


def _check_folder(workdir: Path, count: int) -> None:
    if not workdir.exists():
        return
    names = {f"fold{i}" for i in range(count)}
    foreign = [p.name for p in workdir.iterdir() if p.name not in names and not p.name.startswith(PREFIXES)]
    if foreign:
        raise ValueError(f"{workdir}: {min(foreign)} does not belong to {count} folds; choose another --workdir")
