"""Graceful shutdown: signals set a flag that the training loop polls between steps, to save the run first.

Schedulers such as SLURM and Kubernetes, and preemptible machines, send SIGTERM a few seconds before they kill a
process; a closed terminal sends SIGHUP. This module does not import jax, since the commands import it at startup.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Interrupted(KeyboardInterrupt):
    """Raised once the run is saved; the exit code is 128 + `number`, the number of the signal."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


class Watch:
    """The signal that a run received; yielded by `watching`."""

    def __init__(self, preempted: Callable[[int], bool] | None):
        self.number = 0  # of the signal; 0 before any
        self._preempted = preempted

    def should_stop(self, step: int) -> bool:
        """Returns whether the run should stop; all hosts must call it after the same steps and get the same result."""
        if self._preempted and self._preempted(step):
            self.number = signal.SIGTERM
        return bool(self.number)

    def check(self) -> None:
        """Raises Interrupted if the run should stop; with several hosts, only after `should_stop` has returned True."""
        if self.number:
            raise Interrupted(self.number)


def repeat_ignored_interrupts() -> None:
    """Sends Ctrl-C again if Python ignored its KeyboardInterrupt, which it does in garbage collection and finalizers.

    jax's garbage collector callback runs often enough in the first seconds to swallow one Ctrl-C in ten.
    """
    default = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()  # when the callback has returned
        else:
            default(unraisable)

    sys.unraisablehook = hook


@contextmanager
def watching(preempted: Callable[[int], bool] | None = None) -> Iterator[Watch]:
    """Keeps SIGTERM, SIGHUP and the first Ctrl-C from ending the process; a second Ctrl-C ends it.

    `preempted` is that of `distributed`; with several hosts, Ctrl-C and SIGHUP become a SIGTERM. A SIGHUP that `nohup`
    ignores remains ignored. Outside the main thread, where Python allows no handlers, no signal is caught.
    """
    watch, interrupted = Watch(preempted), False

    def handle(number: int, _: FrameType | None) -> None:
        nonlocal interrupted
        if number == signal.SIGINT and interrupted:
            raise KeyboardInterrupt
        interrupted = True
        if preempted:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            watch.number = number

    if threading.current_thread() is not threading.main_thread():
        yield watch
        return
    numbers = [signal.SIGINT] if preempted else [signal.SIGINT, signal.SIGTERM]
    numbers += [] if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else [signal.SIGHUP]
    handlers = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield watch
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
