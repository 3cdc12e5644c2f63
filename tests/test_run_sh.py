"""run.sh: the extras that it installs, and commands in messages that work as printed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(tmp_path):
    """Returns a function that runs a command in a folder of a checkout, where pip only prints its arguments."""
    for name in ("run.sh", "pyproject.toml", "requirements.lock"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\n[ "$2" = pip ] && echo "$@" || exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    environ = os.environ | {"PYTHONPATH": str(ROOT), "LUNGJAX_ACCEL": "cpu"}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": environ}
    return lambda folder, *command: subprocess.run(command, cwd=tmp_path / folder, **options).stdout


def test_printed_commands(run):
    text = run("", "./run.sh", "prepare", "--dataset=folder", "--help")
    assert "[cpu,dicom]" in text.splitlines()[1]  # DICOM files can be prepared at once
    assert text.endswith("./run.sh prepare --dataset=folder/default --source=FOLDER\n")
    assert "./.venv/bin/python -m pip install -e .'[dicom]'" in text and "python -m lungjax" not in text
    text = run(".venv", "../run.sh", "--experiment=finetune")
    assert "Then: ../run.sh prepare --dataset=folder/default --source=FOLDER --data_dir=data" in text
    assert "./run.sh predict --model=runs/my_run" in run("", "bash", "run.sh", "predict", "--help")


def test_commands_in_the_help(run):
    packages = [path.parent.name for path in (ROOT / "lungjax").glob("*/__main__.py")]
    commands = {path.stem for path in (ROOT / "lungjax").glob("[a-z]*.py")}.union(packages, ["test"]) - {"cli", "main"}
    text = run("", "./run.sh", "help")
    assert [name for name in commands if f"./run.sh {name} " not in text] == []
