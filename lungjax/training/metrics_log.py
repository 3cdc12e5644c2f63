"""Metrics of a training run: metrics.jsonl with one JSON object per line, TensorBoard events and the progress bar."""

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from lungjax.data import pipeline
from lungjax.runtime import distributed
from lungjax.runtime.files import atomic_write, name_disk_errors
from lungjax.runtime.progress_bar import progress_bar

if TYPE_CHECKING:  # `setup` imports this module
    from lungjax.training.setup import Run


class MetricsLog(AbstractContextManager["MetricsLog"]):
    """Writes the metrics of a training run on the first host.

    First drops the rows that a resumed run will write again. Then writes the length of the run as a row with `steps`,
    at the start and at the step from which it has another length.
    """

    def __init__(self, run: "Run", step: int, last_validation: int):
        self.run, self.path = run, run.workdir / "metrics.jsonl"
        self.epoch_steps = len(pipeline.train_rows(run.data)) / run.config.train.batch_size
        self.first_step = step
        self.pending: list[Any] = []  # metrics of the steps since the last row, on the devices
        self.clock = time.perf_counter()  # at the last row
        self.events = None
        first_host = distributed.is_first_host()
        if first_host:
            rows = truncate(self.path, step, last_validation)
            if run.config.train.tensorboard:
                from lungjax.training.event_files import EventFiles

                self.events = EventFiles(run.workdir, rows)
            lengths = [row["steps"] for row in rows if "steps" in row]
            if lengths[-1:] != [run.program.steps]:
                self.write(step, {"steps": run.program.steps})
        options = {"total": run.program.steps, "initial": step, "unit": "step", "disable": not first_host}
        self.bar = progress_bar(desc=run.config.name, **options)

    def __exit__(self, *_: object) -> None:
        """Closes the progress bar and the event files."""
        self.bar.close()
        if self.events:
            self.events.writer.close()

    def add(self, metrics: Mapping[str, jax.Array]) -> None:
        """Adds the metrics of a step; waits for the devices only in the first step."""
        self.pending.append(metrics)
        self.bar.update()
        if self.bar.n == self.first_step + 1:
            jax.block_until_ready(metrics)
            distributed.print_once(f"First step {time.time() - self.run.started:.1f} s after the start")

    def fetch(self) -> list[dict[str, Any]]:
        """Returns the metrics of the steps since the last call, after waiting for the devices."""
        pending, self.pending = self.pending, []
        return jax.device_get(pending)

    def write_steps(self, step: int, metrics: Sequence[Mapping[str, Any]]) -> None:
        """Writes the means of `metrics`, one mapping per step, as the row of `step`; does nothing if there are none."""
        rate = len(metrics) * self.run.config.train.batch_size / (time.perf_counter() - self.clock)
        if metrics:
            row = {f"train.{name}": float(np.mean([values[name] for values in metrics])) for name in metrics[0]}
            self.write(step, {**row, "lr": float(self.run.program.schedule(step - 1)), "images_per_s": round(rate, 2)})
            self.bar.set_postfix_str(f"loss {row['train.loss']:.3f}, {rate:.0f} images/s", refresh=False)
        self.reset_clock()

    def write(self, step: int, row: Mapping[str, Any]) -> None:
        """Writes a row after adding step, epoch and time."""
        row = {"step": step, "epoch": round(step / self.epoch_steps, 4), "time": round(time.time(), 1), **row}
        if distributed.is_first_host():
            # The file is closed after each row, which then survives a kill.
            with name_disk_errors(self.path), self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        if self.events:
            self.events.add_row(row)

    def reset_clock(self) -> None:
        """Restarts the clock of images_per_s; call it after work other than training."""
        self.clock = time.perf_counter()


def read(path: Path) -> list[dict[str, Any]]:
    """Returns all rows. Skips lines that are no rows, such as one truncated by a crash, and prints their number."""
    rows = []
    lines = path.read_bytes().splitlines() if path.exists() else []
    for line in lines:
        with suppress(ValueError, TypeError, KeyError, RecursionError):
            row = json.loads(line)
            if isinstance(row["step"], int) and all(isinstance(value, int | float | None) for value in row.values()):
                rows.append(row)
    if len(rows) < len(lines):
        _print_skipped(path, len(lines) - len(rows))
    return rows


@cache  # a command reads the file several times
def _print_skipped(path: Path, count: int) -> None:
    print(f"{path}: skipped {count} damaged line{'s' * (count > 1)}")


def truncate(path: Path, step: int, last_validation: int) -> list[dict[str, Any]]:
    """Drops the rows after `step` and the validations after `last_validation`, and returns the others."""

    def stays(row: Mapping[str, Any]) -> bool:
        validation = any(name.startswith("val.") for name in row)
        return row["step"] <= (min(step, last_validation) if validation else step)

    rows = list(filter(stays, read(path)))
    atomic_write(path, "".join(json.dumps(row) + "\n" for row in rows))
    return rows
