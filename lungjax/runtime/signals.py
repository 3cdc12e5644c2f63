"""SIGTERM and Ctrl-C as a question that the training loop asks between two steps, so that it can save first.

Schedulers send SIGTERM some seconds before they kill (SLURM, Kubernetes, preempted machines). Imports no jax: the
entry files read this one.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """Raised once the run is saved; `number` is the signal's, which makes the exit code (128 + number)."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


class Watch:
    """What `watching` gives: whether the run was asked to end."""

    def __init__(self, shared: Callable[[int], bool] | None):
        self.number = 0  # of the signal that came; 0 is none
        self._shared = shared

    def asked(self, step: int) -> bool:
        """Returns whether the run shall end here; every host calls it after the same steps, and gets one answer."""
        if self._shared and self._shared(step):
            self.number = signal.SIGTERM
        return bool(self.number)

    def check(self) -> None:
        """Raises Interrupted if the run was asked to end; with several hosts only after `asked` has said so."""
        if self.number:
            raise Interrupted(self.number)


@contextmanager
def watching(shared: Callable[[int], bool] | None = None) -> Iterator[Watch]:
    """Keeps SIGTERM and the first Ctrl-C from ending the process; a second Ctrl-C does.

    With several hosts, `shared` tells of a SIGTERM that reached any of them; Ctrl-C is turned into one here. Outside
    the main thread, where Python allows no handlers, nothing is caught.
    """
    watch, twice = Watch(shared), False

    def note(number: int, _: FrameType | None) -> None:
        nonlocal twice
        if number == signal.SIGINT and twice:
            raise KeyboardInterrupt
        twice = True
        if shared:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            watch.number = number

    if threading.current_thread() is not threading.main_thread():
        yield watch
        return
    caught = (signal.SIGINT,) if shared else (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, note) for number in caught}
    try:
        yield watch
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
