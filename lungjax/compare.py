"""Compares two runs on the same test examples: python -m lungjax.compare RUN_A RUN_B

Prints a markdown table: each number of A and of B, B minus A, its 95 % interval by bootstrap over patients, the same
patients being drawn for both, and p. Runs of other examples, labels, patients, classes, or of another version of the
data set are refused. Two runs differ by their seeds too: what holds for two runs need not hold for two networks.
"""

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

FLAGS = flags.FLAGS

NOTE = (
    "p is twice the smaller share of the draws in which B - A is at most, or at least, zero (each counted with one "
    "draw more, at most 1). It is not corrected for reading many rows, and says nothing of other seeds. A dash is a "
    "number without a definition."
)
USUAL = (
    "accuracy", "balanced_accuracy", "auc_macro", "auc_micro", "average_precision_macro", "f1_macro", "f1_weighted",
    "loss", "ece", "brier",
)  # fmt: skip


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_string("split", "test", "Of which split: compares the runs' predictions_SPLIT.csv.")
    flags.DEFINE_list(
        "metrics", None, "Such as slice.auc_macro,patient.per_class.COVID.recall; default: the usual ones."
    )
    flags.DEFINE_integer("draws", 2000, "Draws of the bootstrap.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Of the draws.")
    flags.DEFINE_string("out", None, "A file to write the table to as well.")


def main(argv: list[str]) -> None:
    """Reads two runs, compares and prints."""
    folders = [Path(name) for name in argv[1:]]
    text = compare(folders[0], folders[1], FLAGS.split, FLAGS.metrics, FLAGS.draws, FLAGS.seed)
    print(text, end="")
    if FLAGS.out:
        Path(FLAGS.out).write_text(text, encoding="utf-8")


def compare(
    run_a: Path, run_b: Path, split: str = "test", names: Sequence[str] | None = None, draws: int = 2000, seed: int = 0
) -> str:
    """Returns the comparison of two runs' folders as markdown.

    Args:
      run_a, run_b: folders with report.json and predictions_SPLIT.csv.
      split: "test", "val", or what else was predicted.
      names: "slice." or "patient." and a level's dotted number; None is USUAL and the recall of each class, per patient
        too where patients have several slices.
      draws, seed: of the bootstrap.

    Raises ValueError for a missing file, an unknown name, or runs that can't be compared, saying what differs.
    """
    reports = [_report(run) for run in (run_a, run_b)]
    splits = [_predictions(run, split) for run in (run_a, run_b)]
    try:
        note = _check_same_data(reports[0]["facts"], reports[1]["facts"])
        a, b = splits[0], bootstrap.align(*splits)
    except ValueError as error:
        raise ValueError(f"{run_a} and {run_b} can't be compared: {error}") from error
    known = [f"{unit}.{name}" for unit, level in metrics.whole_levels(a).items() for name in metrics.numbers(level)]
    patients = len(np.unique(metrics.patient_keys(a)))
    if names is None:
        usual = (*USUAL, *(f"per_class.{name}.recall" for name in a.classes))
        units = bootstrap.UNITS if patients < len(a) else ("slice",)
        names = [f"{unit}.{name}" for unit in units for name in usual]
    names = [name.removeprefix(f"{split}.") for name in names]  # as they stand in report.json
    for name in names:
        if name not in known:
            raise ValueError(f"no number {name!r}; {nearest(name, known)}")
    found: dict[str, Difference] = {}
    for unit in bootstrap.UNITS:
        wanted = [name.removeprefix(f"{unit}.") for name in names if name.startswith(f"{unit}.")]
        differences = bootstrap.paired_difference(a, b, wanted, draws, seed, unit) if wanted else {}
        found |= {f"{unit}.{name}": difference for name, difference in differences.items()}
    if any(".study." in name for name in names):
        without = [str(run) for run, p in zip((run_a, run_b), splits, strict=True) if p.logits is None]
        if without:
            note = f"{note} No logits in {' and '.join(without)}: test again (--mode=evaluate).".strip()
    head = [
        f"- A: `{run_a}` ({reports[0]['name']}, {reports[0]['facts'].get('dataset', '?')})",
        f"- B: `{run_b}` ({reports[1]['name']}, {reports[1]['facts'].get('dataset', '?')})",
        f"- {len(a):,} examples of {split}, {patients:,} patients; {draws:,} draws of patients, seed {seed}",
        *([f"- {note}"] if note else []),
    ]
    return "\n".join([*head, "", *_table(names, found), "", NOTE, ""])


def _report(run: Path) -> dict[str, Any]:
    path = run / "report.json"
    if not path.is_file():
        raise ValueError(f"{run}: no report.json there; name the folder of a run that has ended")
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        return {"name": report["name"], "facts": report["facts"]}
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no report of lungjax ({error}); python -m lungjax.main writes one") from error


def _predictions(run: Path, split: str) -> Predictions:
    path = run / f"predictions_{split}.csv"
    if not path.is_file():
        there = sorted(other.stem.removeprefix("predictions_") for other in run.glob("predictions_*.csv"))
        raise ValueError(f"{run}: no {path.name} there; --split may be {' or '.join(there) or 'nothing'}")
    return predictions.read(path)


def _check_same_data(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    """Raises ValueError if the runs' facts are of other data sets; returns what the reader should know, or ""."""
    names, prints = [[str(facts.get(key, "")) for facts in (a, b)] for key in ("dataset", "fingerprint")]
    # name[/config][-stage][-size]: another stage shows other pictures of the same examples, which is worth comparing.
    if names[0].split("-")[0] != names[1].split("-")[0]:
        raise ValueError(f"they are of other data sets, {names[0]} and {names[1]}")
    if names[0] != names[1]:
        return f"The networks saw other images of these examples: {names[0]} and {names[1]}."
    if prints[0] != prints[1]:
        raise ValueError(
            f"they are of other versions of {names[0]}, fingerprints {prints[0][:12]} and {prints[1][:12]}: other "
            "images, labels or splits; train one of them anew"
        )
    return ""


def _table(names: Sequence[str], found: Mapping[str, Difference]) -> list[str]:
    lines = ["| metric | A | B | B - A | 95 % interval | p |", "| --- | ---: | ---: | ---: | ---: | ---: |"]
    for name in names:
        d = found[name]
        interval = "-" if d.low is None or d.high is None else f"{d.low:+.3f} to {d.high:+.3f}"
        numbers = [_number(d.a), _number(d.b), _number(d.difference, "+"), interval, _number(d.p)]
        lines.append(f"| {' | '.join([name.replace('|', chr(92) + '|'), *numbers])} |")
    return lines


def _number(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.3f}"


if __name__ == "__main__":
    cli.run(main, define_flags, ("RUN_A", "RUN_B"))
