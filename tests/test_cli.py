"""Exit codes and messages that all commands share."""

import errno
import json
import os
import signal
import types
from pathlib import Path
from unittest.mock import Mock

import commands
import pytest

from lungjax.config import overrides
from lungjax.runtime import files, signals


def fail(error):
    raise error


@pytest.mark.parametrize(
    ("main", "code", "words"),
    [
        (lambda _: overrides.parse("x", int, "train.steps"), 2, "train.steps=x: expected int"),
        (lambda _: Path("/nowhere/at/all").read_text(), 2, "No such file"),
        (lambda _: fail(KeyboardInterrupt()), 130, "interrupted"),
        (lambda _: fail(signals.Interrupted(signal.SIGTERM)), 143, ""),
        (lambda _: None, 0, ""),
    ],
)
def test_exit_codes(capsys, main, code, words):
    command = types.SimpleNamespace(main=main, define_flags=lambda: None, __name__="command")
    assert commands.run(command) == code
    output = capsys.readouterr().err
    assert words in output and "Traceback" not in output


def test_traceback_of_bugs(capsys):
    command = types.SimpleNamespace(main=lambda _: json.loads("{"), define_flags=lambda: None, __name__="command")
    with pytest.raises(json.JSONDecodeError):  # a ValueError of a library
        commands.run(command)
    command.main = lambda _: overrides.parse("x", int, "train.steps")
    with pytest.raises(ValueError, match="expected int"):
        commands.run(command, "--traceback")


def test_path_of_a_full_disk(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    for write in (lambda path: files.atomic_write(path, "{}"), lambda path: Path("/dev/full").write_text("{}")):

        def main(_, write=write):
            with files.name_disk_errors(tmp_path):
                write(tmp_path / "file.json")

        assert commands.run(types.SimpleNamespace(main=main, define_flags=lambda: None, __name__="command")) == 2
        assert str(tmp_path) in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_unexpected_and_missing_arguments(capsys):
    command = types.SimpleNamespace(main=lambda _: None, define_flags=lambda: None, __name__="command")
    assert commands.run(command, "more") == 1 and "unexpected argument" in "".join(capsys.readouterr())
    assert commands.run(command, positional=("PATH",)) == 1 and "PATH missing" in "".join(capsys.readouterr())
    assert commands.run(command, "a", "b", positional=("PATH...",)) == 0
