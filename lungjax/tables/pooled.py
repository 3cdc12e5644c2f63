"""Test scores of finished runs, pooled over the seeds of each configuration, as Markdown."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lungjax.config import overrides
from lungjax.evaluation import bootstrap, metrics, predictions
from lungjax.evaluation.predictions import Predictions
from lungjax.report.templating import Number, Table, render

SCORES = {
    "AUC, slice": "slice.auc_macro", "AUC, patient": "patient.auc_macro", "accuracy, slice": "slice.accuracy",
    "balanced accuracy, slice": "slice.balanced_accuracy",
}  # fmt: skip


def markdown(folder: Path, draws: int) -> str:
    """Returns the scores of the runs below `folder` by data set and configuration, and those of each source.

    A cross-validation counts as one run. Runs whose config.json differs only in train.seed are pooled by
    `bootstrap.over_runs`. Raises ValueError if there are no tested runs, for damaged files, and for runs of one
    configuration that were tested on different images.
    """
    pools: dict[str, dict[str, list[Path]]] = {}  # folders by data set and configuration
    for path in sorted(folder.rglob("config.json")):
        run, config = path.parent, overrides.read(path)
        data, train = config.data, replace(config.train, seed=0)
        if (data.folds or data.test_source) and (run.parent / "predictions_test.csv").exists():
            run, data = run.parent, replace(data, fold=0, test_source="each" if data.test_source else "")
        if (run / "predictions_test.csv").exists():
            key = overrides.to_json(replace(config, data=data, train=train))
            members = pools.setdefault(data.dataset, {}).setdefault(key, [])
            members += [run] if run not in members else []
    if not pools:
        raise ValueError(f"{folder}: no finished runs (with predictions_test.csv) below this folder")

    tables: dict[str, list[Table]] = {}
    for dataset, configs in pools.items():
        rows, by_source = [], dict[tuple[tuple[str, int], ...], list[list[str]]]()  # by sources and their sizes
        for key, folders in configs.items():
            model, first = overrides.from_json(key).model, str(folders[0].relative_to(folder))
            runs, no_lungs = (_read(folders, split) for split in ("test", "no_lungs"))
            scores = [score(runs, metric, draws) for metric in SCORES.values()]
            scores.append(score(no_lungs, "slice.auc_macro", draws))
            rows.append([first, model.name, model.weights, len(folders), *scores])
            parts = [metrics.subgroups(p).get("source", {}) for p in runs]
            sizes = {name: len(p) for part in parts for name, p in part.items()}
            sources = tuple(sorted(sizes.items(), key=lambda item: item[1], reverse=True))
            pools_by_source = [[part[name] for part in parts if name in part] for name, _ in sources]
            cells = ((score(p, "slice.auc_macro", draws), score(p, "slice.accuracy", draws)) for p in pools_by_source)
            if sources:
                by_source.setdefault(sources, []).append([first, *(f"{auc}; {accuracy}" for auc, accuracy in cells)])
        tables[dataset] = [Table(["first run", "network", "weights", "seeds", *SCORES, "AUC, no lungs"], rows)]
        for sources, cells_by_source in by_source.items():
            head = ["AUC; accuracy per slice", *(f"{name}, {n:,} images" for name, n in sources)]
            tables[dataset].append(Table(head, cells_by_source))
    return render("pooled.md.j2", tables=tables, draws=draws)


def _read(folders: Sequence[Path], split: str) -> list[Predictions]:
    """Returns the predictions of each run, or [] if a run has none for this split."""
    files = [folder / f"predictions_{split}.csv" for folder in folders]
    return [predictions.read(file) for file in files] if all(file.exists() for file in files) else []


def score(runs: Sequence[Predictions], metric: str, draws: int) -> Number:
    """Returns the mean over the runs of a metric such as "slice.auc_macro", with its interval."""
    unit, _, name = metric.partition(".")
    return Number(*bootstrap.over_runs(runs, [name], draws, unit=unit)[name]) if runs else Number(None)
