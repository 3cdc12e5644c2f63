"""Progress of a run outside its training state: the best validation so far, and the position in the data.

Saved with every checkpoint, so that a resumed run makes the same decisions as an uninterrupted one.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lungjax import config as configs
from lungjax.config import Config
from lungjax.data.prepared import Prepared
from lungjax.evaluation import metrics
from lungjax.evaluation.predictions import Predictions
from lungjax.training import metrics_log


@dataclass
class Progress:
    """Numbers only, updated in place; a checkpoint holds `vars(progress)`."""

    best: float = math.nan  # value of train.monitor
    best_step: int = 0
    validations_without_improvement: int = 0
    stopped: int = 0  # 1 after early stopping
    last_validation: int = 0  # step of the last validation
    skipped_batches: int = 0  # by train.on_nan=rewind: step s uses batch s - 1 + skipped_batches
    rewinds: int = 0
    consecutive_bad_steps: int = 0  # skipped by train.on_nan=skip

    def update(self, scores: Mapping[str, float | None], config: Config, step: int) -> bool:
        """Compares the validation of `step` with the best so far; returns whether it is better."""
        score = scores[config.train.monitor]
        assert score is not None  # otherwise `check_monitor` has raised
        self.last_validation = step
        better = math.isnan(self.best) or (score > self.best if config.train.maximize else score < self.best)
        if better:
            self.best, self.best_step, self.validations_without_improvement = float(score), step, 0
        else:
            self.validations_without_improvement += 1
            self.stopped = int(0 < config.train.patience <= self.validations_without_improvement)
        return better


def last_step(workdir: Path) -> int:
    """Returns the last step in a run's metrics.jsonl, or 0 if it has none."""
    return max((int(row["step"]) for row in metrics_log.read(workdir / "metrics.jsonl")), default=0)


def is_complete(workdir: Path, config: Config, steps: int) -> bool:
    """Returns whether metrics.jsonl shows that a run was trained to the last of its `steps` or to early stopping.

    The report does not show it, since --mode=evaluate writes one for an interrupted run too.
    """
    if last_step(workdir) >= steps:
        return True
    progress, key = Progress(), f"val.{config.train.monitor}"
    for row in metrics_log.read(workdir / "metrics.jsonl"):
        if row.get(key) is not None:
            progress.update({config.train.monitor: row[key]}, config, int(row["step"]))
    return bool(progress.stopped)


def check_monitor(config: Config, data: Prepared) -> None:
    """Raises ValueError if the val or test split is empty, or `train.monitor` is unknown or undefined on val."""
    for split in ("val", "test"):
        if not len(data.rows(split)):
            raise ValueError(f"{data.name}: the {split} split is empty; prepare the data set with a {split} part")
    rows, classes = data.rows("val"), len(data.classes)
    files, groups, sources, labels = (data.columns[name][rows] for name in ("file", "group", "source", "label"))
    uniform = Predictions(
        files, groups, sources, labels, np.full((len(rows), classes), 1 / classes), classes=data.classes
    )
    scores, name = metrics.flat_levels(uniform), config.train.monitor
    if name not in scores:
        raise ValueError(f"train.monitor={name!r}: {configs.nearest(name, scores)}")
    if scores[name] is None:
        raise ValueError(
            f"train.monitor={name} is undefined on the val split (a class is missing); choose another, such as "
            "slice.accuracy"
        )
