"""The progress of a run besides its training state, saved so that a resumed run makes the same decisions."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lungjax.config import Config
from lungjax.training import metrics_log


@dataclass
class Progress:
    """The best validation so far and the position in the data; checkpoints contain `vars(progress)`."""

    best: float = math.nan  # value of train.monitor
    best_step: int = 0
    validations_without_improvement: int = 0
    stopped: int = 0  # 1 after early stopping
    last_validation: int = 0  # step of the last validation
    skipped_batches: int = 0  # by train.on_nan=rewind; step s uses batch s - 1 + skipped_batches
    rewinds: int = 0
    consecutive_bad_steps: int = 0  # with train.on_nan=skip

    def update(self, scores: Mapping[str, float | None], config: Config, step: int) -> bool:
        """Records the validation of `step`; returns whether it is the best so far."""
        score = scores[config.train.monitor]
        assert score is not None  # otherwise `check_monitor` has raised
        self.last_validation = step
        better = math.isnan(self.best) or (score > self.best if config.train.maximize else score < self.best)
        if better:
            self.best, self.best_step, self.validations_without_improvement = float(score), step, 0
        else:
            self.validations_without_improvement += 1
            self.update_stop(config)
        return better

    def update_stop(self, config: Config) -> None:
        """Stops the run if `train.patience` is exhausted, or lets it continue if `train.patience` was raised."""
        self.stopped = int(0 < config.train.patience <= self.validations_without_improvement)


def last_step(workdir: Path) -> int:
    """Returns the last step in the metrics.jsonl of a run, or 0 if there is none."""
    return max((int(row["step"]) for row in metrics_log.read(workdir / "metrics.jsonl")), default=0)


def is_complete(workdir: Path, config: Config, steps: int) -> bool:
    """Returns whether metrics.jsonl shows a run that reached its last step or early stopping, and was validated there.

    The existence of a report does not show this, since --mode=evaluate also writes one for an interrupted run.
    """
    progress, key = Progress(), f"val.{config.train.monitor}"
    for row in metrics_log.read(workdir / "metrics.jsonl"):
        if row.get(key) is not None:
            progress.update({config.train.monitor: row[key]}, config, int(row["step"]))
    return bool(progress.stopped) or progress.last_validation >= steps
