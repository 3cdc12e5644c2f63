"""Cross-validation: one run per fold or per source, and a report over all, in which each image is tested once."""

import json
import math
import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lungjax import config as configs
from lungjax import datasets
from lungjax.config import Config, overrides
from lungjax.data import folds, pipeline, summary
from lungjax.data.labels import indicators
from lungjax.data.prepared import Prepared
from lungjax.evaluation import bootstrap, metrics, predictions
from lungjax.evaluation.predictions import Predictions
from lungjax.report import write as reporting
from lungjax.report.templating import listed
from lungjax.runtime import distributed, provenance
from lungjax.training import auto, progress, train
from lungjax.training import workdir as workdirs
from lungjax.weights import load

POOLED = ("test", "no_lungs", "source_only")  # not val, whose patients are tested in another fold
PREFIXES = ("predictions_", "report.", "plots")  # of the files next to the folds
SHARED_FACTS = ("parameters", "compute_type", "steps")  # reported if equal in all folds
SPREAD_METRICS = ("accuracy", "balanced_accuracy", "auc_macro", "f1_macro")  # per slice and per patient
DROP_METRICS = ("auc_macro", "balanced_accuracy")  # compared with the ordinary split
ORDINARY = "ordinary"  # folder of the run with the splits of the data set, next to those that leave one source out
RESTART = "delete the cross-validation folder to start over"


def run(
    config: Config, kind: int | str, workdir: Path, data_dir: Path, mode: str = "train", weights_dir: Path | None = None
) -> Path:
    """Trains and tests one run per fold in WORKDIR/fold0, fold1, ... and writes WORKDIR/report.md on all folds.

    `kind` is the number of folds, or "source": fold i then leaves out the i-th source in alphabetical order
    (`folds.leave_out`), and WORKDIR/ordinary, with the splits of the data set, is trained first for comparison.
    Finished runs are skipped, unfinished ones resumed. WORKDIR receives the pooled predictions (with the column
    `extra_fold`), plots and reports. The other arguments are those of `train.run`. Raises ValueError if the data does
    not allow these folds or WORKDIR contains other files, and as `train.run` does.
    """
    started = time.time()
    base = config.data
    data = distributed.run_on_all_hosts(lambda: datasets.open_dataset(base.dataset, str(data_dir), base.protocol))
    if isinstance(kind, int):
        if kind < folds.MIN_FOLDS:
            raise ValueError(f"--folds={kind}: expected {folds.MIN_FOLDS} or more, one each for test, val and train")
        parts = {f"fold{i}": replace(base, folds=kind, fold=i) for i in range(kind)}
    else:
        sources = distributed.run_on_all_hosts(lambda: folds.source_names(data))
        parts = {ORDINARY: replace(base, test_source="")}
        parts |= {f"fold{i}": replace(base, test_source=source) for i, source in enumerate(sources)}
    distributed.run_on_all_hosts(lambda: _check_folder(workdir, parts))
    for part in parts.values():
        configs.check(replace(config, data=part))
    views = distributed.run_on_all_hosts(
        lambda: [folds.apply(data, replace(config, data=part)) for part in parts.values()]
    )
    folders = [workdir / name for name in parts]
    # The first run determines the values of all.
    first = replace(config, data=next(iter(parts.values())))
    config = distributed.run_on_all_hosts(lambda: auto.resolve(first, views[0], folders[0], weights_dir))
    for folder, part in zip(folders, parts.values(), strict=True):
        run_config, test = replace(config, data=part), f" (test: {part.test_source})" if part.test_source else ""
        if mode == "train" and distributed.run_on_all_hosts(partial(is_finished, folder, run_config, data)):
            distributed.print_once(f"{folder.name}{test} is finished: {folder}")
            continue
        distributed.print_once(f"{folder.name}{test}, of {len(parts)} runs: {folder}")
        train.run(run_config, folder, data_dir, mode, weights_dir)
    distributed.on_first_host(lambda: write(config, workdir, folders, data, data_dir, started))
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
    """Writes the report on the pooled predictions of all folds. Raises ValueError if they are inconsistent.

    The run in the folder ORDINARY, if any, is not a fold but compared with the folds.
    """
    ordinary = next((folder for folder in folders if folder.name == ORDINARY), None)
    folders = [folder for folder in folders if folder != ordinary]
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
    if ordinary:
        before = predictions.read(ordinary / "predictions_test.csv")
        facts["folds"] |= by_source(fold_predictions, before, config.eval.draws)
        for folder, source in zip(folders, facts["folds"]["sources"], strict=True):
            counts = json.loads((folder / "report.json").read_text("utf-8"))["facts"]["counts"]["train"]
            if few := [f"{name} ({n})" for name, n in counts.items() if n < reporting.MIN_EXAMPLES]:
                facts["notes"].append(f"Without {source}, the train split has few images of {listed(few)}.")
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


def by_source(left_out: Sequence[Predictions], ordinary: Predictions, draws: int) -> dict[str, Any]:
    """Returns the facts about networks that each were tested on one source, which they had not seen in training.

    `sources` are the names; `patients` has, by name, the level over the patients of the source; `drop` has, by name,
    `n`, the images of the source in the test split of `ordinary`, and by metric, such as "slice.auc_macro", the
    `bootstrap.Difference` of `ordinary` (b) and the network that left the source out (a) on these images.
    """
    names = [str(p.sources[0]) for p in left_out]
    patients, drop = dict[str, Any](), dict[str, Any]()
    for name, p in zip(names, left_out, strict=True):
        intervals = bootstrap.intervals(p, draws, unit="patient")
        patients[name] = metrics.summarize(metrics.by_patient(p)[0]) | {"intervals": intervals}
        before = predictions.take(ordinary, np.flatnonzero(ordinary.sources == name))
        if len(before):
            after = predictions.take(p, np.flatnonzero(np.isin(p.ids, before.ids)))
            drop[name] = {"n": len(before)} | {
                f"{unit}.{metric}": vars(each)
                for unit in bootstrap.UNITS
                for metric, each in bootstrap.paired_difference(after, before, DROP_METRICS, draws, unit).items()
            }
    return {"sources": names, "patients": patients, "drop": drop}


def _facts(folders: Sequence[Path], fold_predictions: Sequence[Predictions], data: Prepared) -> dict[str, Any]:
    fold_facts = [json.loads((folder / "report.json").read_text("utf-8"))["facts"] for folder in folders]
    items = fold_facts[0].items()
    shared = {k: v for k, v in items if k in SHARED_FACTS and all(facts.get(k) == v for facts in fold_facts)}
    rows = np.flatnonzero(data.columns["split"] != "")
    counts = indicators(data.columns["label"][rows], len(data.classes)).sum(axis=0)
    sizes = [len(p) for p in fold_predictions]  # may differ, since near duplicates are in the same fold
    span = " to ".join(f"{size:,}" for size in sorted({min(sizes), max(sizes)}))
    return {
        **workdirs.data_facts(data),
        "counts": {"test": dict(zip(data.classes, counts.tolist(), strict=True))},
        "characteristics": summary.characteristics(data, {"test": rows}),
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


def _check_folder(workdir: Path, names: Collection[str]) -> None:
    if not workdir.exists():
        return
    foreign = [p.name for p in workdir.iterdir() if p.name not in names and not p.name.startswith(PREFIXES)]
    if foreign:
        last = [*names][-1]
        raise ValueError(f"{workdir}: {min(foreign)} does not belong to folds up to {last}; choose another --workdir")
