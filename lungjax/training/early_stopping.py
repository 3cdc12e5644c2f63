"""What training remembers beside the state: the best validation so far, and where it is in the data.

Saved with every checkpoint, so that a resumed run decides as the untouched one would have.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lungjax import config as configs
from lungjax.config import Config
from lungjax.data.prepared import Prepared
from lungjax.evaluation import metrics
from lungjax.evaluation.predictions import Predictions
from lungjax.training import metrics_log


@dataclass
class Progress:
    """Numbers only, changed in place as the run goes."""

    best: float = math.nan  # value of train.monitor
    best_step: int = 0
    validations_without_improvement: int = 0  # validations since the best one
    stopped: int = 0  # 1 once patience has ended the run
    validated: int = 0  # step of the last validation
    skipped_batches: int = 0  # batches left out by train.on_nan=rewind: step s takes batch s - 1 + this
    rewinds: int = 0
    consecutive_bad_steps: int = 0  # steps in a row that train.on_nan=skip has left out

    def saved(self) -> dict[str, float | int]:
        """Returns what goes into a checkpoint."""
        return dataclasses.asdict(self)

    @classmethod
    def restored(cls, saved: Mapping[str, Any]) -> "Progress":
        """The inverse of `saved`."""
        fresh = dataclasses.asdict(cls())
        return cls(**{name: type(start)(saved.get(name, start)) for name, start in fresh.items()})

    def update(self, scores: Mapping[str, float | None], config: Config, step: int) -> bool:
        """Compares the validation of `step` with the best so far; returns whether it is better."""
        score = scores[config.train.monitor]
        assert score is not None  # `check_monitor` has seen to that
        self.validated = step
        better = math.isnan(self.best) or (score > self.best if config.train.maximize else score < self.best)
        if better:
            self.best, self.best_step, self.validations_without_improvement = float(score), step, 0
        else:
            self.validations_without_improvement += 1
            self.stopped = int(0 < config.train.patience <= self.validations_without_improvement)
        return better


def logged(workdir: Path) -> int:
    """Returns the last step in a run's log."""
    return max((int(row["step"]) for row in metrics_log.read(workdir / "metrics.jsonl")), default=0)


def ended(workdir: Path, config: Config, steps: int) -> bool:
    """Says whether a run was trained to the last of its `steps`, or until its patience ended it; by its log alone.

    A report says less: --mode=evaluate writes one of an interrupted run too.
    """
    if logged(workdir) >= steps:
        return True
    progress, key = Progress(), f"val.{config.train.monitor}"
    for row in metrics_log.read(workdir / "metrics.jsonl"):
        if row.get(key) is not None:
            progress.update({config.train.monitor: row[key]}, config, int(row["step"]))
    return bool(progress.stopped)


def check_monitor(config: Config, data: Prepared) -> None:
    """Raises ValueError before training if there is nothing to validate or test on, or no `train.monitor` there."""
    for split in ("val", "test"):
        if not len(data.rows(split)):
            raise ValueError(f"{data.name}: the {split} split is empty; prepare the data set with a {split} part")
    rows, classes = data.rows("val"), len(data.classes)
    guess = Predictions(
        ids=data.columns["file"][rows],
        groups=data.columns["group"][rows],
        sources=data.columns["source"][rows],
        labels=data.columns["label"][rows],
        probabilities=np.full((len(rows), classes), 1 / classes),
        classes=data.classes,
    )
    known, name = metrics.flat_levels(guess), config.train.monitor
    if name not in known:
        raise ValueError(f"train.monitor={name!r}: {configs.nearest(name, known)}")
    if known[name] is None:
        raise ValueError(
            f"train.monitor={name} is not defined on the val split (a class is missing there); choose another, such as "
            "slice.accuracy"
        )
