"""Trains networks on two real data sets and prints tables of their test scores; finished runs are skipped.

    python -m tests.benchmarks.generalization --source=DIR [--work=FOLDER] [--sets=ct,xray] [--networks=NAME,...]
        [--parts=ordinary,...] [--jobs=2] [--seeds=3]

DIR has the folders `ct` and `xray` with a labels.csv (path, label, split, group), and `covid_xray_study`. Parts:

    ordinary    networks trained with the splits of labels.csv
    ema         the same, with an average of the weights
    source      networks trained without one of the sources, which they are then tested on
    tta         the networks of `ordinary` and `source`, tested with test-time augmentation
    study       the networks of the table covid_xray, five seeds each, also tested on `xray` without talo-cohen, whose
                COVID-19 images come from the same collection as the study's

Runs are in FOLDER/runs/VARIANT/SET/NETWORK-SEED/ordinary, fold0, ..., and the output of the commands in FOLDER/logs.
Two runs on one core each finish sooner than one after the other on two cores. An interrupted command continues where
it stopped.
"""

import csv
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks import harness

SOURCES = "--source_pattern=^(sarscov2|mosmed|ucsd|nor|seg20)_"
PREPARE = {"ct": ["--modality=ct", SOURCES], "xray": ["--modality=xray"]}  # xray has a column of sources
# From ImageNet weights, validation peaks within three epochs; random weights need more. The flips are those of the
# PyTorch reference; other values are chosen by `finetune`.
FLIP = "--set=augment.flip_horizontal=0.5"
RANDOM = ["--set=train.epochs=24", "--set=train.patience=4", FLIP]
NETWORKS = {
    "lite0_imagenet": ["weights=imagenet", "--set=train.epochs=12", "--set=train.patience=2", FLIP],
    "lite0_random": ["weights=none", *RANDOM],
    "cbr_small": ["model=cbr_small,weights=none", *RANDOM],
    # It has no norm, so it needs a centered input.
    "simple": ["model=simple,weights=none", "--set=input.mean=0.5", "--set=input.std=0.25", *RANDOM],
}
# The average covers the last (10 + step) / 9 steps until step 8,990, so that 0.999 also suits runs of 1,000 steps.
EMA = "--set=optim.ema=0.999"
PARTS = ("ordinary", "ema", "source", "tta", "study")
STUDY = ("xray_cnn,protocol=study", "xray_cnn,protocol=study,dropout=True", "xray_cnn", "efficientnet_lite0")
STUDY_SEEDS = 5
LABELS = "--label_map=COVID=covid,Normal=non,Pneumonia=non"  # of xray and of the study
EXTERNAL = "external/folder_xray_hospitals"  # folder of the tests on xray

Commands = dict[Path, list[str]]


class Runs:
    """The folders and commands of the runs."""

    def __init__(self, arguments: Any):
        self.work, self.arguments = arguments.work, arguments
        self.data = f"--data_dir={arguments.work / 'data'}"

    def folder(self, variant: str, name: str, network: str, seed: int) -> Path:
        return self.work / "runs" / variant / name / f"{network}-{seed}"

    def command(self, folder: Path, *options: str) -> Commands:
        """Returns the command that trains or tests a run, by its log file; none if it is finished."""
        log = self.work / "logs" / f"{'-'.join(folder.relative_to(self.work / 'runs').parts)}.log"
        return {} if (folder / "report.md").exists() else {log: ["lungjax.main", *options, f"--workdir={folder}"]}

    def prepare(self, dataset: str, source: Path, *options: str) -> None:
        if not (self.work / "data" / dataset).exists():
            command = ["lungjax.prepare", f"--dataset={dataset}", f"--source={source}"]
            log = self.work / "logs" / f"prepare-{dataset.replace('/', '-')}.log"
            harness.run_commands({log: [*command, self.data, *options]}, 1)

    def train(self, part: str) -> Commands:
        commands: Commands = {}
        for seed in range(self.arguments.seeds):  # the outer loop, so that an early table has all networks
            for name in self.arguments.sets:
                for network in self.arguments.networks:
                    experiment, *options = NETWORKS[network]
                    options += [f"--set=train.seed={seed}", self.data]
                    folder = self.folder("ema" if part == "ema" else "plain", name, network, seed)
                    if part == "source":
                        options.append("--folds=source")
                    else:
                        folder /= "ordinary"
                    options += [EMA] if part == "ema" else []
                    options.append(f"--experiment=finetune:dataset=folder/{name},size=224,{experiment}")
                    commands |= self.command(folder, *options)
        return commands

    def test_with_tta(self) -> Commands:
        """Returns the commands that test copies of the plain runs, which share their checkpoints."""
        commands: Commands = {}
        for run in sorted((self.work / "runs/plain").glob("*/*/*")):
            copy = self.work / "runs/tta" / run.relative_to(self.work / "runs/plain")
            if (run / "report.json").exists() and not copy.exists():
                copy.mkdir(parents=True)
                for file in ("config.json", "data.json", "metrics.jsonl"):
                    shutil.copy(run / file, copy)
                (copy / "checkpoints").symlink_to((run / "checkpoints").resolve())
            if copy.exists():
                commands |= self.command(copy, "--mode=evaluate", "--set=eval.tta=flip", self.data)
        return commands

    def study(self) -> tuple[Commands, Commands]:
        """Returns the commands that train the networks of the table covid_xray, and those that test them on xray."""
        from lungjax.config import experiments

        train, test = Commands(), Commands()
        for model in STUDY:
            name = f"covid_xray:model={model}"
            for seed in range(STUDY_SEEDS):
                folder = self.work / "runs/study" / experiments.load(name).name / f"seed{seed}"
                train |= self.command(folder, f"--experiment={name}", f"--set=train.seed={seed}", self.data)
                options = ["--dataset=folder/xray_hospitals", LABELS, self.data]
                if not (folder / EXTERNAL / "report.md").exists():
                    command = ["lungjax.main", "--mode=evaluate", f"--workdir={folder}", *options]
                    test[self.work / "logs" / f"external-{folder.parent.name}-{seed}.log"] = command
        return train, test


def main() -> None:
    """Prepares the data sets, trains the runs that are not finished, and prints the tables."""
    names = {"sets": list(PREPARE), "networks": list(NETWORKS), "parts": list(PARTS)}
    defaults = {"source": Path, "work": Path("runs/generalization"), "jobs": 2, "seeds": 3}
    arguments = harness.parse(__doc__, ["source"], **defaults, **names)
    runs, parts = Runs(arguments), arguments.parts
    for name in arguments.sets:
        runs.prepare(f"folder/{name}", arguments.source / name, *PREPARE[name])
    for part in ("ordinary", "ema", "source"):
        if part in parts:
            harness.run_commands(runs.train(part), arguments.jobs)
    if "tta" in parts:
        harness.run_commands(runs.test_with_tta(), arguments.jobs)
    for name in arguments.sets:
        print_tables(runs, name)
    if "study" in parts:
        for dataset in ("covid_xray_5k", "covid_xray_5k/oversampled"):
            runs.prepare(dataset, arguments.source / "covid_xray_study")
        hospitals = arguments.work / "hospitals"
        if not hospitals.exists():
            with (arguments.source / "xray/labels.csv").open(newline="") as file:
                rows = [row | {"split": "test"} for row in csv.DictReader(file) if row["source"] != "talo-cohen"]
            harness.write_labels(arguments.source / "xray", hospitals, rows)
        runs.prepare("folder/xray_hospitals", hospitals, *PREPARE["xray"])
        for commands in runs.study():
            harness.run_commands(commands, arguments.jobs)
        table = ["--table=covid_xray", f"--workdir={arguments.work / 'runs/study'}", f"--seeds={STUDY_SEEDS}"]
        harness.run_commands({arguments.work / "logs/table.log": ["lungjax.tables", *table, runs.data]}, 1)
        print_study(arguments.work / "runs/study")


def print_tables(runs: Runs, name: str) -> None:
    """Prints the scores on the test split and on left-out sources, and the drop of the ensemble on each source."""
    from lungjax import datasets
    from lungjax.evaluation import ensemble, predictions
    from lungjax.tables import pooled
    from lungjax.training import cross_validation

    data, seeds = datasets.open_dataset(f"folder/{name}", str(runs.work / "data")), range(runs.arguments.seeds)

    def read(folder: Path) -> list[Any]:
        """Returns the predictions on the test split, and those of each source by the network that has not seen it."""
        ordinary, *folds = [folder / "ordinary", *sorted(folder.glob("fold*"))]
        files = [fold / "predictions_test.csv" for fold in folds]
        complete = folds and all(file.exists() for file in files)
        pooled_folds = cross_validation.pool([predictions.read(file) for file in files], data) if complete else None
        test = ordinary / "predictions_test.csv"
        all_images = pooled_folds and len(pooled_folds) == (data.columns["split"] != "").sum()
        return [predictions.read(test) if test.exists() else None, pooled_folds if all_images else None]

    scores: dict[str, list[Any]] = {"test split": [], "sources not seen in training": []}
    sources: list[Any] = []
    for network in runs.arguments.networks:
        for variant, label in {"plain": "", "tta": ", flips at test time", "ema": ", average of weights"}.items():
            members = zip(*(read(runs.folder(variant, name, network, seed)) for seed in seeds), strict=True)
            ensembles = []
            for rows, each in zip(scores.values(), members, strict=True):
                each = [p for p in each if p is not None]
                if not each:
                    continue
                ensembles.append(ensemble.mean(each))
                for kind, group in ({"single run": each} | ({"ensemble": ensembles[-1:]} if each[1:] else {})).items():
                    cells = [pooled.score(group, metric, 2000) for metric in pooled.SCORES.values()]
                    rows.append([f"{network}, {kind}{label}", len(each), *cells])
            if len(ensembles) == 2:
                sources.append((f"{network}{label}", *ensembles))
    for title, rows in scores.items():
        if rows:
            table = harness.table(["network", "seeds", *pooled.SCORES], rows)
            print(f"\n{name}, {title}:\n\n{table}", flush=True)
    if sources:
        print(f"\n{name}, ensemble on the test images of each source, seen → not seen in training:\n")
        print(by_source(sources), flush=True)


def print_study(folder: Path) -> None:
    """Prints the table of the X-ray study, and the scores of its networks on other hospitals and on each source."""
    from lungjax.evaluation import metrics, predictions
    from lungjax.tables import pooled

    print((folder / "tables/covid_xray.md").read_text())
    names = pooled.SCORES | {
        "sensitivity, slice": "slice.per_class.covid.recall", "specificity, slice": "slice.per_class.covid.specificity",
        "sensitivity, patient": "patient.per_class.covid.recall",
        "specificity, patient": "patient.per_class.covid.specificity",
    }  # fmt: skip
    rows, heads = [], {}
    for network in sorted({path.parents[3] for path in folder.glob(f"*/*/{EXTERNAL}/report.md")}):
        tests = [predictions.read(file) for file in sorted(network.glob(f"*/{EXTERNAL}/predictions_test.csv"))]
        cells = [pooled.score(tests, metric, 2000) for metric in names.values()]
        parts = [metrics.subgroups(p)["source"] for p in tests]
        heads |= {f"accuracy, {source}, {len(p)} images": None for source, p in parts[0].items()}
        cells += [pooled.score([part[source] for part in parts], "slice.accuracy", 2000) for source in parts[0]]
        rows.append([network.name, len(tests), len(tests[0]), *cells])
    print("\nother hospitals, networks of the study:\n")
    print(harness.table(["network", "seeds", "images", *names, *heads], rows))


def by_source(rows: Sequence[tuple[str, Any, Any]]) -> str:
    """Returns a table of AUC, or accuracy if a source has one class, by network and source."""
    import numpy as np

    from lungjax.evaluation import bootstrap, predictions
    from lungjax.report.templating import Number

    heads, lines = {}, []
    for label, before, after in rows:
        cells = []
        for source in np.unique(before.sources):
            seen = predictions.take(before, np.flatnonzero(before.sources == source))
            unseen = predictions.take(after, np.flatnonzero(np.isin(after.ids, seen.ids)))
            metric = "auc_macro" if len(set(seen.labels)) > 1 else "accuracy"
            d = bootstrap.paired_difference(unseen, seen, [metric])[metric]
            heads[f"{source}, {'AUC' if metric == 'auc_macro' else 'accuracy'}, {len(seen)} images"] = None
            cells.append(f"{Number(d.b)} → {Number(d.a)}, drop {Number(d.difference, d.low, d.high)}")
        lines.append([label, *cells])
    return harness.table(["network", *heads], lines)


if __name__ == "__main__":
    main()
