"""Compares runs on the same test examples: python -m lungjax.compare RUN_A RUN_B [RUN_C ...]

Prints a Markdown table with each metric of A and B, the difference B - A, its 95 % interval by paired bootstrap over
patients, and the p-value, and a table with DeLong's test of the AUC and McNemar's test of accuracy and recall. Each
further run is also compared with A. Holm's correction is over all comparisons that are printed. Runs with different
examples, labels, patients, classes or versions of the data set are rejected. Runs of the same network with different
seeds also differ, so a difference between two runs does not imply a difference between networks.
"""

import itertools
import json
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from lungjax import cli
from lungjax.config import nearest
from lungjax.evaluation import bootstrap, metrics, paired_tests, predictions
from lungjax.evaluation.bootstrap import Difference
from lungjax.evaluation.paired_tests import DeLong, McNemar
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
    """Compares the runs and prints the tables."""
    print(compare([Path(run) for run in argv[1:]], FLAGS.split, FLAGS.metrics, FLAGS.draws), end="")


def compare(runs: Sequence[Path], split: str = "test", names: Sequence[str] | None = None, draws: int = 2000) -> str:
    """Returns a Markdown comparison of finished runs, given their folders, with the first one.

    `names` are metrics UNIT.NAME, where UNIT is "slice" or "patient"; None compares DEFAULT_METRICS and the recall of
    each class, and the AUC of each of several classes, per slice and, if patients have several slices, per patient.
    Raises ValueError for a missing file, an unknown metric, or runs that can't be compared.
    """
    reports = [_report(run) for run in runs]
    a, *others = (_predictions(run, split) for run in runs)
    notes = []
    for i, (run, report) in enumerate(zip(runs[1:], reports[1:], strict=True)):
        try:
            notes.append(_check_same_data(reports[0]["facts"], report["facts"]))
            others[i] = bootstrap.align(a, others[i])
        except ValueError as error:
            raise ValueError(f"{runs[0]} and {run} can't be compared: {error}") from error
    names = _metrics(a, names, split)
    letters = string.ascii_uppercase[: len(runs)]
    pairs = dict(zip(letters[1:], others, strict=True))
    differences = {(x, name): d for x, b in pairs.items() for name, d in _differences(a, b, names, draws).items()}
    tests = {(x, name): t for x, b in pairs.items() for name in names if (t := paired_tests.test(a, b, name))}
    adjusted = _adjust(differences), _adjust(tests)
    tables = []
    for x in pairs:
        head = ["metric", "A", x, f"{x} - A", "95 % interval", "p", "p, Holm"]
        rows = [_row(name, differences[x, name], adjusted[0].get((x, name))) for name in names]
        tables.append(templating.Table(head, rows, f"{x} against A: paired bootstrap"))
        rows = [_test_row(name, x, t, adjusted[1][x, name]) for name in names if (t := tests.get((x, name)))]
        head = ["metric", "test", "result", "p", "p, Holm"]
        tables += (
            [templating.Table(head, rows, f"{x} against A: DeLong's and McNemar's tests", text=True)] if rows else []
        )
    return templating.render(
        "compare.md.j2",
        runs={
            name: {"folder": run, "name": report["name"], "dataset": report["facts"].get("dataset", "unknown")}
            for name, run, report in zip(letters, runs, reports, strict=True)
        },
        examples=len(a),
        patients=len(np.unique(metrics.patient_keys(a))),
        split=split,
        draws=draws,
        notes=list(filter(None, dict.fromkeys(notes))),
        tables=tables,
        comparisons=[len(p) for p in adjusted],
    )


def _metrics(a: Predictions, names: Sequence[str] | None, split: str) -> list[str]:
    """Returns the names of the metrics to compare. Raises ValueError for an unknown one."""
    available = metrics.numbers(metrics.unit_levels(a))
    if names is None:
        rates = (
            ("recall", "auc") if len(a.classes) > 2 or a.multilabel else ("recall",)
        )  # the AUC of two classes is `auc_macro`
        per_class = (f"per_class.{name}.{rate}" for rate in rates for name in a.classes)
        units = bootstrap.UNITS if len(np.unique(metrics.patient_keys(a))) < len(a) else ("slice",)
        names = [f"{unit}.{name}" for unit, name in itertools.product(units, (*DEFAULT_METRICS, *per_class))]
        names = [name for name in names if name in available]
    names = [name.removeprefix(f"{split}.") for name in names]  # as in report.json
    for name in names:
        if name not in available:
            raise ValueError(f"unknown metric {name!r}; {nearest(name, available)}")
    return names


def _differences(a: Predictions, b: Predictions, names: Sequence[str], draws: int) -> dict[str, Difference]:
    differences: dict[str, Difference] = {}
    for unit in bootstrap.UNITS:
        own = [name.removeprefix(f"{unit}.") for name in names if name.startswith(f"{unit}.")]
        results = bootstrap.paired_difference(a, b, own, draws, unit) if own else {}
        differences |= {f"{unit}.{name}": difference for name, difference in results.items()}
    return differences


def _adjust(comparisons: Mapping[Any, Any]) -> dict[Any, float]:
    """Returns the p-values with Holm's correction of the comparisons that have one."""
    p = {key: each.p for key, each in comparisons.items() if each.p is not None}
    return dict(zip(p, paired_tests.holm(list(p.values())), strict=True))


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


def _row(name: str, d: Difference, adjusted: float | None) -> list[str]:
    interval = "-" if d.low is None or d.high is None else f"{d.low:+.3f} to {d.high:+.3f}"
    difference = "-" if d.difference is None else f"{d.difference:+.3f}"
    return [name, templating.rate(d.a), templating.rate(d.b), difference, interval, _p(d.p), _p(adjusted)]


def _test_row(name: str, letter: str, test: DeLong | McNemar, adjusted: float) -> list[str]:
    if isinstance(test, McNemar):
        kind, result = "McNemar", f"correct: only {letter} {test.only_b}, only A {test.only_a}, of {test.pairs}"
    else:
        low, high = test.interval
        kind, result = "DeLong", f"{letter} - A: {test.difference:+.3f} ({low:+.3f} to {high:+.3f})"
    return [name, kind, result, _p(test.p), _p(adjusted)]


def _p(p: float | None) -> str:
    return templating.rate(p) if p is None or p >= 0.0005 else f"{p:.0e}"


if __name__ == "__main__":
    cli.run(main, define_flags, ("RUN_A", "RUN_B..."))
