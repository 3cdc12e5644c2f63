"""A `jax.profiler` trace of a range of training steps."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax

from lungjax.runtime.distributed import is_first_host, print_once


class Profiler(AbstractContextManager["Profiler"]):
    """Traces the steps `first` to `last` (from 1, inclusive) on the first host, once; a context manager."""

    def __init__(self, folder: Path, steps: tuple[int, int] | None):
        self.folder, self.active = folder, False
        self.steps = range(steps[0], steps[1] + 1) if steps and is_first_host() else range(0)

    def __exit__(self, *_: object) -> None:
        """Ends a trace that is still active, for example after an interruption."""
        if self.active:
            self._stop()
        elif self.steps:
            print_once(f"No profile: steps {self.steps[0]} to {self.steps[-1]} were not trained")

    def call(self, step: int, train_step: Callable[[Any, Any], Any], state: Any, batch: Any) -> Any:
        """Returns `train_step(state, batch)`, traced if `step` is in the range."""
        if step not in self.steps:
            return train_step(state, batch)
        if not self.active:
            jax.block_until_ready(state)  # waits for the steps before the range
            jax.profiler.start_trace(self.folder, create_perfetto_trace=True)
            self.active = True
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            result = train_step(state, batch)
        if step == self.steps[-1]:
            jax.block_until_ready(result)
            self._stop()
        return result

    def _stop(self) -> None:
        self.active, self.steps = False, range(0)
        jax.profiler.stop_trace()
        print_once(f"Profile: {self.folder}")
