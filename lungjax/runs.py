"""Lists runs and their scores: python -m lungjax.runs [DIR] [--plot=FILE]

One line per run below DIR (default `runs`): name, data set, network, step, best validation score and test score of
`train.monitor`, and whether the run is finished. Below the table, the commands that resume the others.
"""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from absl import flags

from lungjax import cli
from lungjax.config import Config, overrides

FLAGS = flags.FLAGS
HEADER = ("run", "data set", "network", "step", "metric", "val", "test", "state")


@dataclass(frozen=True)
class Listed:
    """A run in a list."""

    folder: Path
    config: Config
    step: int  # last logged step
    steps: int  # of the complete run, 0 if unknown
    finished: bool
    curve: list[tuple[int, float]]  # step and validation score of `train.monitor`
    test: float | None  # score of `train.monitor` on the test split

    @property
    def best(self) -> float | None:
        """The best validation score."""
        scores = [score for _, score in self.curve]
        return (max if self.config.train.maximize else min)(scores, default=None)


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_string("plot", None, "PNG file for a figure of all validation curves.")


def main(argv: list[str]) -> None:
    """Prints the list, and writes the figure."""
    folder = Path(argv[1] if len(argv) > 1 else "runs")
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; give the folder of the runs, such as the parent of --workdir")
    runs, problems = find(folder)
    if not runs and not problems:
        raise ValueError(f"{folder}: no runs there; a run is a folder with config.json and metrics.jsonl")
    print(table(runs, folder))
    unfinished = [run for run in runs if not run.finished]
    if unfinished:
        print("\nTo resume (add --data_dir if it is not ./data):")
    for run in unfinished:
        config = shlex.quote(str(run.folder / "config.json"))
        print(f"  python -m lungjax.main --experiment={config} --workdir={shlex.quote(str(run.folder))}")
    for problem in problems:
        print(f"Skipped: {problem}")
    if FLAGS.plot:
        plot(runs, folder, Path(FLAGS.plot))
        print(f"Figure: {FLAGS.plot}")


def find(folder: Path) -> tuple[list[Listed], list[str]]:
    """Returns the runs in a folder and its subfolders, sorted by path, and what could not be read."""
    runs, problems = [], []
    for path in sorted(folder.rglob("config.json")):
        if not (path.parent / "metrics.jsonl").is_file():
            continue
        try:
            runs.append(read(path.parent))
        except (ValueError, OSError, KeyError, TypeError) as error:
            problems.append(f"{path.parent}: {error}")
    return runs, problems


def read(folder: Path) -> Listed:
    """Returns a run from its files. Raises ValueError if config.json is damaged."""
    from lungjax.training import early_stopping, metrics_log  # they import jax

    path = folder / "config.json"
    config = overrides.from_json(path.read_text("utf-8"), str(path))
    rows, monitor = metrics_log.read(folder / "metrics.jsonl"), config.train.monitor
    curve = [(row["step"], row[f"val.{monitor}"]) for row in rows if row.get(f"val.{monitor}") is not None]
    report_path = folder / "report.json"
    report: dict[str, Any] = json.loads(report_path.read_text("utf-8")) if report_path.is_file() else {}
    steps = config.train.steps or report.get("facts", {}).get("steps") or 0
    if not steps and rows and rows[-1]["epoch"]:
        steps = round(config.train.epochs * rows[-1]["step"] / rows[-1]["epoch"])
    score: Any = report.get("test", {})
    for key in monitor.split(".") if report else []:
        score = score.get(key) if isinstance(score, dict) else None
    return Listed(
        folder=folder,
        config=config,
        step=early_stopping.last_step(folder),
        steps=steps,
        finished=bool(report) and early_stopping.is_complete(folder, config, steps),
        curve=curve,
        test=score if report else None,
    )


def table(runs: Sequence[Listed], folder: Path) -> str:
    """Returns the list as text with aligned columns."""
    rows = [HEADER]
    for run in runs:
        rows.append(
            (
                str(run.folder.relative_to(folder)),
                run.config.data.dataset,
                run.config.model.name,
                f"{run.step}/{run.steps or '?'}",
                run.config.train.monitor,
                "-" if run.best is None else f"{run.best:.4f}",
                "-" if run.test is None else f"{run.test:.4f}",
                "finished" if run.finished else "interrupted",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


def plot(runs: Sequence[Listed], folder: Path, path: Path) -> None:
    """Draws the validation curves of the runs, one axis per metric."""
    from lungjax.report import style

    monitors = sorted({run.config.train.monitor for run in runs})
    figure = style.figure(9, 3.6 * len(monitors))
    for axis, monitor in zip(figure.subplots(len(monitors), squeeze=False)[:, 0], monitors, strict=True):
        style.style(axis)
        axis.set(xlabel="step", ylabel=f"val {monitor}")
        members = [run for run in runs if run.config.train.monitor == monitor and run.curve]
        for i, run in enumerate(members):
            steps, scores = zip(*run.curve, strict=True)
            label = style.short(str(run.folder.relative_to(folder)), 40)
            axis.plot(steps, scores, label=label, marker="o", markersize=3, **style.line_style(i))
        if members:
            style.legend_beside(axis, len(members))
    style.save(figure, path)


if __name__ == "__main__":
    cli.run(main, define_flags, ("[DIR]",))
