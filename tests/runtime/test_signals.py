"""Signals that stop a run, and Ctrl-C at unfavorable moments."""

import errno
import os
import signal
import subprocess
import sys
from unittest.mock import Mock

import pytest

from lungjax.runtime import distributed, signals

CODE = """
import gc, os, signal, time; signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in background jobs
from lungjax import cli

def interrupt(phase, info):
    gc.callbacks.remove(interrupt)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.01)

def main(_):
    gc.callbacks.append(interrupt)
    gc.collect()
    time.sleep(10)

cli.run(main, lambda: None)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_stop_after_a_signal(number):
    before = signal.signal(number, signal.SIG_DFL)  # ignored in background jobs, or below nohup
    try:
        with signals.watching() as watch:
            assert not watch.should_stop(1)
            os.kill(os.getpid(), number)
            assert watch.should_stop(2)
            with pytest.raises(signals.Interrupted, match=number.name):
                watch.check()
    finally:
        signal.signal(number, before)


def test_hangup_ignored_by_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.watching() as watch:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not watch.should_stop(1)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_message_to_a_closed_terminal(monkeypatch):
    monkeypatch.setattr(distributed.tqdm, "write", Mock(side_effect=OSError(errno.EIO, "Input/output error")))
    distributed.print_once("saved")


def test_ctrl_c_during_garbage_collection():
    result = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=60)
    assert result.returncode == 130 and "interrupted" in result.stderr and "ignored" not in result.stderr
