"""The training command: user errors, tested in this process, and one complete run in its own process and folder."""

import json
import shutil
import subprocess
import sys

import commands

from lungjax import main
from lungjax.runtime import environment


def run(folder, *arguments):
    command = [sys.executable, "-m", "lungjax.main", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_mistakes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(environment, "prepare_jax", lambda: None)
    demo = "--experiment=phantom_demo"
    cases = (
        (["--experiment=phantom_dmo"], 2, "did you mean phantom_demo"),
        (["--experimnt=phantom_demo"], 1, "Did you mean: experiment"),
        ([demo, "--set=optim.lrr=1"], 2, "did you mean optim.lr"),
        ([demo, "--mode=tset"], 1, "train"),
        (["--experiment=finetune"], 2, "python -m lungjax.prepare --dataset=folder"),
        (["phantom_demo"], 1, "unexpected argument"),
        ([demo, "--profile=10-20"], 1, "START:STOP"),
        ([demo, "--profile=20:10"], 1, "START:STOP"),
        ([], 1, "--list"),
    )
    commands.assert_errors(capsys, main, cases)
    assert not (tmp_path / "runs").exists()
    assert commands.run(main, "--list") == 0 and "phantom_demo" in capsys.readouterr().out


def test_order_of_flags_in_the_help(tmp_path):
    text = run(tmp_path, "--help").stdout
    assert 0 < text.index("--experiment") < text.index("--workdir")


def test_complete_run(tmp_path):
    arguments = [
        "--experiment=phantom_demo:dataset=phantom_ct/tiny", "--set=input.size=32", "--set=train.batch_size=8",
        "--set=train.steps=60", "--set=train.eval_steps=10", "--set=model.name=simple", "--set=augment=none",
        "--set=eval.draws=20", "--set=eval.examples=1",
    ]  # fmt: skip
    result = run(tmp_path, *arguments)
    assert result.returncode == 0, result.stderr
    level = json.loads((tmp_path / "runs/phantom_demo/report.json").read_text())["test"]["slice"]
    low, high = level["intervals"]["accuracy"]
    *_, scores, patients, last = result.stdout.splitlines()
    assert f"{level['n']} test slices" in scores and "test patients" in patients
    assert f"; accuracy {level['accuracy']:.3f} ({low:.3f} to {high:.3f}); " in scores
    assert last == "Report: runs/phantom_demo/report.html" and "\r" not in result.stderr


def test_evaluating_a_moved_run(trained_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(environment, "prepare_jax", lambda: None)
    shutil.copytree(trained_run.workdir, tmp_path / "elsewhere")
    data = f"--data_dir={trained_run.data_dir}"
    assert commands.run(main, "--experiment=elsewhere/config.json", "--mode=evaluate", data, "--set=eval.draws=0") == 0
    output = capsys.readouterr().out
    assert output.splitlines()[-1] == "Report: elsewhere/report.html" and "95 %" not in output
