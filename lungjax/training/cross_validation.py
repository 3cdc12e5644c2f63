"""Cross-validation: a run for each part of the data, and one report over all of them, each image tested once."""

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
from lungjax.config import Config
from lungjax.data import folds, pipeline
from lungjax.data.prepared import Prepared
from lungjax.evaluation import bootstrap, metrics, predictions
from lungjax.evaluation.predictions import Predictions
from lungjax.report import write as reporting
from lungjax.runtime import distributed, provenance
from lungjax.training import early_stopping, train
from lungjax.training import workdir as workdirs
from lungjax.weights import load

POOLED = ("test", "no_lungs", "source_only")  # val is left out: its patients are those of another part's test
OWN = ("predictions_", "report.", "plots")  # how the names of our own files begin, besides foldN
SAME = ("parameters", "compute_type", "steps")  # facts of a fold that are told of all, where they are the same
SPREAD = ("accuracy", "balanced_accuracy", "auc_macro", "f1_macro")  # of the slice level, then of the patient level


def run(
    config: Config,
    count: int,
    workdir: Path,
    data_dir: Path,
    mode: str = "train",
    weights_dir: Path | None = None,
) -> Path:
    """Trains and tests `count` runs in WORKDIR/fold0, fold1, ... and reports over all; returns WORKDIR/report.md.

    A fold that is finished is not trained again, an unfinished one goes on. Each ends with a report of its own. The
    pooled files of WORKDIR are `predictions_test.csv` (column `extra_fold`) and those of the controls, `report.json`,
    `report.md` and plots; `facts.folds` of report.json holds mean, least and greatest of the numbers over folds.

    Args:
      config: of the runs; its data.folds and data.fold are set here.
      count: of folds, 3 or more.
      workdir: of all; holds nothing else.
      data_dir: as of `train.run`, and so the others.
      mode: "train", or "evaluate" to test all folds again.
      weights_dir: where files of `model.weights` are looked for first.

    Raises ValueError before anything is trained if the data can't be dealt into so many parts, or if WORKDIR holds
    anything else; then as `train.run` does for the fold at hand, the finished ones staying as they are.
    """
    started = time.time()
    if count < folds.MIN_FOLDS:
        raise ValueError(f"--folds={count}: {folds.MIN_FOLDS} or more (test, val and train take one part each)")
    parts = [replace(config, data=replace(config.data, folds=count, fold=i)) for i in range(count)]
    for part in parts:
        configs.check(part)
    distributed.run_on_all_hosts(lambda: _check_folder(workdir, count))
    data = distributed.run_on_all_hosts(lambda: train.open_data(parts[0], data_dir))
    folders = [workdir / f"fold{i}" for i in range(count)]
    for i, (part, folder) in enumerate(zip(parts, folders, strict=True)):
        if mode == "train" and distributed.run_on_all_hosts(partial(finished, folder, part, data)):
            train.tell(f"fold {i} is finished: {folder}")
            continue
        train.tell(f"fold {i} of 0 to {count - 1}: {folder}")
        try:
            train.run(part, folder, data_dir, mode, weights_dir)
        except (ValueError, OSError):
            done = [f"fold{k}" for k, other in enumerate(folders[:i]) if (other / "report.md").exists()]
            train.tell(
                f"fold {i} failed; finished and kept: {', '.join(done) or 'none'}. The same command goes on with it"
            )
            raise
    distributed.run_on_all_hosts(
        lambda: write(parts[0], workdir, folders, data, data_dir, started) if distributed.is_first_host() else None
    )
    return workdir / "report.md"


def finished(folder: Path, config: Config, data: Prepared) -> bool:
    """Returns whether a fold was trained to its end and reported; ValueError if it is of another configuration or data.

    A report alone says less: --mode=evaluate writes one of an interrupted run.
    """
    if not (folder / "report.md").exists():  # the file that a run writes last
        return False
    steps = json.loads((folder / "report.json").read_text())["facts"]["steps"]
    if not early_stopping.ended(folder, load.resolve(config), steps):
        return False
    workdirs.check(folder, load.resolve(config), "train")
    workdirs.check_same_data(folder, data)
    return True


def write(
    config: Config, workdir: Path, folders: Sequence[Path], data: Prepared, data_dir: Path, started: float
) -> None:
    """Pools the predictions of all folds and writes the report over them; raises ValueError if one doesn't fit."""
    tested = [predictions.read(folder / "predictions_test.csv") for folder in folders]
    results = {"test": pool(tested, data)}
    expected = data.columns["file"][data.columns["split"] != ""]
    if not np.array_equal(results["test"].ids, expected):
        raise ValueError(f"{workdir}: the folds were not tested on the images of {data.name}: delete it and start over")
    for name in POOLED[1:]:
        paths = [folder / f"predictions_{name}.csv" for folder in folders]
        if all(path.exists() for path in paths):
            results[name] = pool([predictions.read(path) for path in paths], data)
    config = load.resolve(config)
    rows, reader = _rows(results["test"], data), pipeline.Reader(data, config.input)
    facts = _facts(folders, tested, data) | {"seconds": round(time.time() - started, 1)}
    told = datasets.describe(data, data_dir)
    reporting.write_report(workdir, config, results, [], facts, lambda i: reader(rows[i]), **told)


def pool(parts: Sequence[Predictions], data: Prepared) -> Predictions:
    """Returns the predictions of all folds as one, in the order of the data set, with the fold as a further column.

    Raises ValueError if an image is in two of them, or not in the data set, or if classes or columns differ.
    """
    first = parts[0]
    if any(p.classes != first.classes or p.extra.keys() != first.extra.keys() for p in parts):
        raise ValueError("the folds' predictions have different classes or columns: they are of different data")
    fold = np.repeat([str(i) for i in range(len(parts))], [len(p) for p in parts])
    together = Predictions(
        **{
            name: np.concatenate([getattr(p, name) for p in parts])
            for name in ("ids", "groups", "sources", "labels", "probabilities")
        },
        classes=first.classes,
        extra={k: np.concatenate([p.extra[k] for p in parts]) for k in first.extra} | {"fold": fold},
        logits=None
        if any(p.logits is None for p in parts)
        else np.concatenate([p.logits for p in parts if p.logits is not None]),
    )
    names, counts = np.unique(together.ids, return_counts=True)
    if (counts > 1).any():
        raise ValueError(f"{names[counts > 1][0]} was tested in two folds: delete the folder and start over")
    order = np.argsort(_rows(together, data), kind="stable")
    return bootstrap.take(together, order)


def spread(tested: Sequence[Predictions]) -> dict[str, dict[str, Any]]:
    """Returns {"slice.accuracy": {mean, low, high, values}, ...}: mean, least and greatest over folds, and each.

    A number that has no definition in some fold is None there and left out of the other three.
    """
    levels = [metrics.flat_levels(p) for p in tested]
    found = {}
    for name in (f"{unit}.{number}" for unit in ("slice", "patient") for number in SPREAD):
        values = [level[name] for level in levels]
        known = [value for value in values if value is not None]
        if known:
            mean = math.fsum(known) / len(known)
            found[name] = {"mean": mean, "low": min(known), "high": max(known), "values": values}
    return found


def _facts(folders: Sequence[Path], tested: Sequence[Predictions], data: Prepared) -> dict[str, Any]:
    each = [json.loads((folder / "report.json").read_text("utf-8"))["facts"] for folder in folders]
    counts = np.bincount(data.columns["label"][data.columns["split"] != ""], minlength=len(data.classes))
    sizes = [len(p) for p in tested]
    many = " to ".join(f"{size:,}" for size in sorted({min(sizes), max(sizes)}))  # uneven where twins join patients
    return {
        **workdirs.data_facts(data),
        "counts": {"test": dict(zip(data.classes, counts.tolist(), strict=True))},
        **{key: each[0][key] for key in SAME if all(key in facts and facts[key] == each[0][key] for facts in each)},
        **provenance.facts(),
        "folds": {"count": len(folders), "images": sizes, "over": spread(tested)},
        "notes": [
            f"Each image was tested once, by one of {len(folders)} networks ({many} images a fold). Numbers over all "
            "images mix the scales of these networks; the mean over folds doesn't."
        ],
    }


def _rows(p: Predictions, data: Prepared) -> np.ndarray:
    """Returns the rows of predicted images in the data set, int64 [N]."""
    files = data.columns["file"]
    order = np.argsort(files)
    place = order[np.minimum(np.searchsorted(files, p.ids, sorter=order), len(files) - 1)]
    strange = files[place] != p.ids
    if strange.any():
        raise ValueError(f"{p.ids[strange][0]} is no image of {data.name}: delete the folder and start over")
    return place


def _check_folder(workdir: Path, count: int) -> None:
    if not workdir.exists():
        return
    known = {f"fold{i}" for i in range(count)}
    strange = [p.name for p in workdir.iterdir() if p.name not in known and not p.name.startswith(OWN)]
    if strange:
        raise ValueError(
            f"{workdir} holds something else than {count} folds, such as {min(strange)}; choose another --workdir"
        )
