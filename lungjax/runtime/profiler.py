"""A `jax.profiler` trace of a range of training steps."""

from pathlib import Path
from typing import Any

import jax

from lungjax.runtime.distributed import print_once


class Profiler:
    """Traces the steps `first` to `last` (from 1, inclusive) into a folder; a context manager.

    The folder opens with TensorBoard's profile plugin or `xprof`; its perfetto_trace.json.gz in ui.perfetto.dev.
    """

    def __init__(self, folder: Path, steps: tuple[int, int] | None):
        self.folder, self.steps, self.active = folder, steps, False

    def __enter__(self) -> "Profiler":
        """Returns itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Ends a trace that is still active, as after an interruption."""
        self._stop()

    def before_step(self, step: int) -> None:
        """Starts the trace before the first step of the range, or at a resumed step within it."""
        if self.steps and not self.active and self.steps[0] <= step <= self.steps[1]:
            jax.profiler.start_trace(self.folder, create_perfetto_trace=True)
            self.active = True

    def after_step(self, step: int, results: Any) -> None:
        """Ends the trace after the last step, once its results are computed."""
        if self.steps and step == self.steps[1]:
            jax.block_until_ready(results)
            self._stop()

    def _stop(self) -> None:
        if self.active:
            self.active = False
            jax.profiler.stop_trace()
            print_once(f"Profile: {self.folder}")
