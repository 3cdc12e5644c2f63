"""Lists runs and their scores: python -m lungjax.runs [DIR] [--plot=FILE]

Prints one line per run below DIR (default `runs`), and the commands that resume unfinished runs.
"""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from absl import flags

from lungjax import cli
from lungjax.config import overrides
from lungjax.runtime.advice import in_user_form

FLAGS = flags.FLAGS
HEADER = ("run", "data set", "network", "step", "metric", "val", "test", "state")


@dataclass(frozen=True)
class RunSummary:
    """One line of the list."""

    folder: Path
    monitor: str  # train.monitor
    row: tuple[str, ...]  # as HEADER
    curve: list[tuple[int, float]]  # step and validation score of the monitor


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_string("plot", None, "PNG file to write, with the validation curves of all runs.")


def main(argv: list[str]) -> None:
    """Prints the list and writes the figure."""
    folder = Path(argv[1] if len(argv) > 1 else "runs")
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; give the folder of the runs, such as the parent of --workdir")
    runs, problems = find(folder)
    if not runs and not problems:
        raise ValueError(f"{folder}: no runs found; a run is a folder with config.json and metrics.jsonl")
    rows = [HEADER, *(run.row for run in runs)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    unfinished = [run.folder for run in runs if run.row[-1] != "finished"]
    if unfinished:
        print("\nTo resume (add --data_dir=DIR if the data is not in ./data):")
    for workdir in unfinished:
        config, name = shlex.quote(str(workdir / "config.json")), shlex.quote(str(workdir))
        print(in_user_form(f"  python -m lungjax.main --experiment={config} --workdir={name}"))
    for problem in problems:
        print(f"Skipped: {problem}")
    if FLAGS.plot:
        plot(runs, Path(FLAGS.plot))
        print(f"Figure: {FLAGS.plot}")


def find(folder: Path) -> tuple[list[RunSummary], list[str]]:
    """Returns the runs in a folder and its subfolders, sorted by path, and one line per unreadable run."""
    runs, problems = [], []
    for path in sorted(folder.rglob("config.json")):
        if (path.parent / "metrics.jsonl").is_file():
            try:
                runs.append(read(path.parent, str(path.parent.relative_to(folder))))
            except (ValueError, OSError, KeyError, TypeError) as error:
                problems.append(f"{path.parent}: {error}")
    return runs, problems


def read(folder: Path, name: str) -> RunSummary:
    """Returns a run from its files. Raises ValueError if config.json is damaged."""
    from lungjax.training import metrics_log, progress  # they import jax

    config, report_path = overrides.read(folder / "config.json"), folder / "report.json"
    rows, train = metrics_log.read(folder / "metrics.jsonl"), config.train
    key = f"val.{train.monitor}"
    curve = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    report: dict[str, Any] = json.loads(report_path.read_text("utf-8")) if report_path.is_file() else {}
    steps = next((row["steps"] for row in reversed(rows) if "steps" in row), train.steps)
    test: Any = report.get("test")
    for part in train.monitor.split("."):
        test = test.get(part) if isinstance(test, dict) else None
    best = (max if train.maximize else min)((score for _, score in curve), default=None)
    row = (
        name,
        config.data.dataset,
        config.model.name,
        f"{progress.last_step(folder)}/{steps or '?'}",
        train.monitor,
        *("-" if score is None else f"{score:.4f}" for score in (best, test)),
        "finished" if report and progress.is_complete(folder, config, steps) else "interrupted",
    )
    return RunSummary(folder, train.monitor, row, curve)


def plot(runs: Sequence[RunSummary], path: Path) -> None:
    """Draws the validation curves of the runs, one axis per metric."""
    from lungjax.report import style

    monitors = sorted({run.monitor for run in runs})
    figure = style.figure(9, 3.6 * len(monitors))
    for axis, monitor in zip(figure.subplots(len(monitors), squeeze=False)[:, 0], monitors, strict=True):
        style.style(axis)
        axis.set(xlabel="step", ylabel=f"val {monitor}")
        members = [run for run in runs if run.monitor == monitor and run.curve]
        for i, run in enumerate(members):
            steps, scores = zip(*run.curve, strict=True)
            axis.plot(steps, scores, label=style.short(run.row[0], 40), marker="o", markersize=3, **style.line_style(i))
        if members:
            style.legend_beside(axis, len(members))
    style.save(figure, path)


if __name__ == "__main__":
    cli.run(main, define_flags, ("[DIR]",))
