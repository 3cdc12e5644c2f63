"""Compares two runs on the same test examples: python -m lungjax.compare RUN_A RUN_B

Prints a Markdown table with each metric of A and B, the difference B - A, its 95 % interval by paired bootstrap over
patients, and the p-value. Runs with different examples, labels, patients, classes or versions of the data set are
rejected. Runs of the same network with different seeds also differ, so a difference between two runs does not imply a
difference between networks.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from lungjax import cli
from lungjax.config import nearest
from lungjax.evaluation import bootstrap, metrics, predictions
from lungjax.evaluation.bootstrap import Difference
from lungjax.evaluation.predictions import Predictions
from lungjax.report import templating

FLAGS = flags.FLAGS

DEFAULT_METRICS = (
    "accuracy", "balanced_accuracy", "auc_macro", "auc_micro", "average_precision_macro", "f1_macro", "f1_weighted",
    "loss", "ece", "brier",
)  # fmt: skip


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_string("split", "test", "Split to compare; both runs need a predictions_SPLIT.csv.")
    flags.DEFINE_list("metrics", None, "Metrics to compare, such as slice.auc_macro,patient.per_class.COVID.recall.")
    flags.DEFINE_integer("draws", 2000, "Bootstrap draws.", lower_bound=1)


def main(argv: list[str]) -> None:
    """Compares two runs and prints the table."""
    print(compare(Path(argv[1]), Path(argv[2]), FLAGS.split, FLAGS.metrics, FLAGS.draws), end="")


def compare(
    run_a: Path, run_b: Path, split: str = "test", names: Sequence[str] | None = None, draws: int = 2000
) -> str:
    """Returns a Markdown comparison of two finished runs, given their folders.

    `names` are metrics UNIT.NAME, where UNIT is "slice" or "patient"; None compares DEFAULT_METRICS and the recall of
    each class, per slice and, if patients have several slices, per patient. Raises ValueError for a missing file, an
    unknown metric, or runs that can't be compared.
    """
    reports = [_report(run) for run in (run_a, run_b)]
    a, b = (_predictions(run, split) for run in (run_a, run_b))
    try:
        note = _check_same_data(reports[0]["facts"], reports[1]["facts"])
        b = bootstrap.align(a, b)
    except ValueError as error:
        raise ValueError(f"{run_a} and {run_b} can't be compared: {error}") from error
    available = metrics.numbers(metrics.unit_levels(a))
    patients = len(np.unique(metrics.patient_keys(a)))
    if names is None:
        recalls = (f"per_class.{name}.recall" for name in a.classes)
        units = bootstrap.UNITS if patients < len(a) else ("slice",)
        names = [f"{unit}.{name}" for unit, name in itertools.product(units, (*DEFAULT_METRICS, *recalls))]
    names = [name.removeprefix(f"{split}.") for name in names]  # as in report.json
    for name in names:
        if name not in available:
            raise ValueError(f"unknown metric {name!r}; {nearest(name, available)}")
    differences: dict[str, Difference] = {}
    for unit in bootstrap.UNITS:
        own = [name.removeprefix(f"{unit}.") for name in names if name.startswith(f"{unit}.")]
        results = bootstrap.paired_difference(a, b, own, draws, unit) if own else {}
        differences |= {f"{unit}.{name}": difference for name, difference in results.items()}
    head = ["metric", "A", "B", "B - A", "95 % interval", "p"]
    return templating.render(
        "compare.md.j2",
        runs={
            name: {"folder": run, "name": report["name"], "dataset": report["facts"].get("dataset", "unknown")}
            for name, run, report in zip("AB", (run_a, run_b), reports, strict=True)
        },
        examples=len(a),
        patients=patients,
        split=split,
        draws=draws,
        note=note,
        comparison=templating.Table(head, [_row(name, differences[name]) for name in names]),
    )


def _report(run: Path) -> dict[str, Any]:
    path = run / "report.json"
    if not path.is_file():
        raise ValueError(f"{run}: no report.json; name the folder of a finished run")
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        return {"name": report["name"], "facts": report["facts"]}
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a report of a lungjax run ({error})") from error


def _predictions(run: Path, split: str) -> Predictions:
    path = run / f"predictions_{split}.csv"
    if not path.is_file():
        splits = sorted(other.stem.removeprefix("predictions_") for other in run.glob("predictions_*.csv"))
        raise ValueError(f"{run}: no {path.name}; splits with predictions: {', '.join(splits) or 'none'}")
    return predictions.read(path)


def _check_same_data(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    """Returns a note if the preprocessing differs, otherwise "". Raises ValueError if the data differ."""
    names, prints = [[str(facts.get(key, "")) for facts in (a, b)] for key in ("dataset", "fingerprint")]
    # name[/config][-stage][-size]: different stages of the same examples can be compared.
    if names[0].split("-")[0] != names[1].split("-")[0]:
        raise ValueError(f"the runs use different data sets, {names[0]} and {names[1]}")
    if names[0] != names[1]:
        return f"The networks saw different images of these examples: {names[0]} and {names[1]}."
    if prints[0] != prints[1]:
        versions = f"different versions of {names[0]}, fingerprints {prints[0][:12]} and {prints[1][:12]}"
        raise ValueError(f"{versions}: images, labels or splits differ; train one of the runs again")
    return ""


def _row(name: str, d: Difference) -> list[str]:
    interval = "-" if d.low is None or d.high is None else f"{d.low:+.3f} to {d.high:+.3f}"
    difference = "-" if d.difference is None else f"{d.difference:+.3f}"
    return [name, templating.rate(d.a), templating.rate(d.b), difference, interval, templating.rate(d.p)]


if __name__ == "__main__":
    cli.run(main, define_flags, ("RUN_A", "RUN_B"))
