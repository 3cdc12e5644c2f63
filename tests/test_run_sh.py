"""run.sh: the extras that its commands install, and commands in messages that work as printed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def checkout(tmp_path):
    """run.sh with a .venv whose Python is this one, but prints what pip would install."""
    for name in ("run.sh", "pyproject.toml", "requirements.lock"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\n[ "$2" = pip ] && echo "$@" || exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return tmp_path


def run(folder, *command):
    environ = os.environ | {"PYTHONPATH": str(ROOT), "LUNGJAX_ACCEL": "cpu"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environ)
    return done.stdout + done.stderr


def test_printed_commands(checkout):
    text = run(checkout, "./run.sh", "prepare", "--dataset=folder", "--help")
    assert "[cpu,dicom]" in text.splitlines()[1]  # DICOM folders work without further installation
    assert text.endswith("./run.sh prepare --dataset=folder/default --source=FOLDER\n")
    assert "./.venv/bin/python -m pip install -e .'[dicom]'" in text and "python -m lungjax" not in text
    other = checkout / "other"
    other.mkdir()
    text = run(other, "../run.sh", "--experiment=cbr_folder")
    assert "Then: ../run.sh prepare --dataset=folder/default --source=FOLDER --data_dir=data" in text
    assert "./run.sh predict --model=runs/my_run" in run(checkout, "bash", "run.sh", "predict", "--help")


def test_help_lists_the_commands(checkout):
    text = run(checkout, "./run.sh", "help")
    commands = [path.stem for path in (ROOT / "lungjax").glob("*.py")] + [
        path.parent.name for path in (ROOT / "lungjax").glob("*/__main__.py")
    ]
    assert all(f"./run.sh {name} " in text for name in {*commands, "test"} - {"__init__", "cli", "main"})
    assert not (checkout / ".venv/lungjax-cpu").exists()
