"""The command line as a stranger meets it: in a process of its own, in a folder of its own."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from lungjax.runtime.checkpoint import newest

DEMO = ["--experiment=phantom_demo:dataset=phantom_ct/tiny", "--set=input.size=64", "--set=train.batch_size=8"]


def lungjax(folder, *arguments, **kwargs):
    command = [sys.executable, "-m", "lungjax.main", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, **kwargs)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--experiment=phantom_dmo"], "nearest: phantom_demo"),
        (["--experimnt=phantom_demo"], "Did you mean: experiment"),
        (["--experiment=phantom_demo", "--set=optim.lrr=1"], "nearest: optim.lr"),
        (["--experiment=phantom_demo", "--set=optim.lr=fast"], "expected float"),
        (["--experiment=phantom_demo", "--set=model.weights=imagenet"], "no ImageNet weights of"),
        (["--experiment=phantom_demo", "--set=optim.frozen_batch_norm=keras"], "with_layer, update, frozen"),
        (["--experiment=phantom_demo", "--mode=tset"], "train"),
        (["--experiment=cbr_folder"], "python -m lungjax.prepare --dataset=folder"),
        (["--experiment=cbr_folder:dataset=covidx_ct/4a"], "nearest|known"),
        (["phantom_demo"], "unexpected argument"),
        ([], "--list"),
    ],
)
def test_mistakes_end_in_a_message_without_a_traceback(tmp_path, arguments, words):
    result = lungjax(tmp_path, *arguments)
    said = result.stdout + result.stderr
    assert result.returncode != 0
    assert "Traceback" not in said
    assert any(word in said for word in words.split("|")), said
    assert not (tmp_path / "runs").exists()


def test_help_shows_our_flags_first_and_list_every_experiment(tmp_path):
    text = lungjax(tmp_path, "--help").stdout
    assert 0 < text.index("--experiment") < text.index("--workdir")
    assert "phantom_demo" in lungjax(tmp_path, "--list").stdout


def test_from_nothing_to_a_report_killed_on_the_way(tmp_path):
    """SIGKILL while training, the same command again, and the report stands where the last line says."""
    arguments = [*DEMO, "--set=train.steps=30", "--set=train.eval_steps=5"]
    command = [sys.executable, "-m", "lungjax.main", *arguments]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while newest(tmp_path / "runs/phantom_demo", "last") is None and process.poll() is None and time.time() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert newest(tmp_path / "runs/phantom_demo", "last") is not None

    result = lungjax(tmp_path, *arguments)
    assert result.returncode == 0, result.stderr
    assert "Going on from step" in result.stdout
    assert result.stdout.splitlines()[-1] == "Report: runs/phantom_demo/report.html"
    report = json.loads((tmp_path / "runs/phantom_demo/report.json").read_text())
    assert 0 <= report["test"]["slice"]["accuracy"] <= 1

    refused = lungjax(tmp_path, *arguments, "--set=optim.lr=0.5")
    assert refused.returncode == 2 and "optim.lr: 0.003 -> 0.5" in refused.stderr
    (tmp_path / "runs/phantom_demo").rename(tmp_path / "elsewhere")
    again = lungjax(tmp_path, "--experiment=elsewhere/config.json", "--mode=evaluate")
    assert again.returncode == 0, again.stderr
    assert again.stdout.splitlines()[-1] == "Report: elsewhere/report.html"
