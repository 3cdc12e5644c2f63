"""Writes TensorBoard events of a run: metrics, configuration and figures. Needs the `tensorboard` extra."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lungjax.training import metrics_log

FOLDER = "tensorboard"  # in the workdir


class EventFiles:
    """Writes events to WORKDIR/tensorboard, starting with `rows`. Raises ValueError if the extra is missing."""

    def __init__(self, workdir: Path, rows: Iterable[Mapping[str, Any]]):
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise ValueError("TensorBoard events need the extra: pip install -e '.[tensorboard]'") from None
        folder = workdir / FOLDER
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        self.writer = SummaryWriter(str(folder), purge_step=0)  # an open viewer drops events of the deleted files
        config = json.dumps(json.loads((workdir / "config.json").read_text("utf-8")), indent=1)
        self.writer.add_text("config", "".join(f"    {line}\n" for line in config.splitlines()), 0)
        for row in rows:
            self.add_row(row)

    def add_row(self, row: Mapping[str, Any]) -> None:
        """Adds the numbers of one row of metrics.jsonl; "train.loss" becomes "train/loss"."""
        for name, value in row.items():
            if name not in ("step", "time") and value is not None:
                self.writer.add_scalar(name.replace(".", "/", 1), value, row["step"], walltime=row["time"])
        self.writer.flush()


def write(workdir: Path) -> Path:
    """Writes all events of a run and returns their folder. Raises ValueError if `workdir` is not a run."""
    if not (workdir / "config.json").is_file():
        raise ValueError(f"{workdir} is not a run directory: config.json is missing")
    events = EventFiles(workdir, metrics_log.read(workdir / "metrics.jsonl"))
    report = workdir / "report.json"
    if report.is_file():
        step = json.loads(report.read_text("utf-8"))["best"]["step"]
        for path in sorted((workdir / "plots").glob("*.png")):
            pixels = np.asarray(Image.open(path).convert("RGB"))
            events.writer.add_image(f"report/{path.stem}", pixels, step, dataformats="HWC")
    events.writer.close()
    return workdir / FOLDER
