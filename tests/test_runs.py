"""The list of runs."""

import json
import shutil

import commands
from PIL import Image

from lungjax import runs
from lungjax.evaluation import metrics, predictions


def test_list(tmp_path, trained_run, capsys):
    """A finished run, one that was interrupted before its report, one with a damaged configuration, and others."""
    for name in ("finished", "group/interrupted", "damaged"):
        shutil.copytree(trained_run.workdir, tmp_path / name, ignore=shutil.ignore_patterns("checkpoints", "plots"))
    (tmp_path / "damaged/config.json").write_text("{")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/config.json").write_text("{}")
    interrupted = tmp_path / "group/interrupted"
    (interrupted / "report.json").unlink()
    first = json.dumps({"step": 1, "epoch": 0.5, "val.slice.auc_macro": 0.75})
    (interrupted / "metrics.jsonl").write_text(first + "\n")
    assert commands.run(runs, tmp_path, f"--plot={tmp_path / 'curves.png'}", positional=("[DIR]",)) == 0
    lines = capsys.readouterr().out.splitlines()
    finished, stopped = (next(line for line in lines if line.startswith(n)) for n in ("finished", "group"))
    test = predictions.read(trained_run.workdir / "predictions_test.csv")
    assert finished.split()[1:4] == ["folder/mine", "simple", "2/2"] and finished.endswith("finished")
    monitor = finished.split()[4]
    assert finished.split()[6] == f"{metrics.flat_levels(test)[monitor]:.4f}"
    assert stopped.split()[3] == "1/2" and stopped.endswith("interrupted")
    resume = [line for line in lines if "python -m lungjax.main" in line]
    assert len(resume) == 1 and f"--workdir={interrupted}" in resume[0]
    assert [line for line in lines if "Skipped" in line and "damaged" in line]
    assert not any("notes" in line for line in lines)
    assert Image.open(tmp_path / "curves.png").width > 500


def test_mistakes(tmp_path, capsys):
    cases = ([tmp_path / "nowhere"], 2, "no such folder"), ([tmp_path], 2, "no runs")
    commands.assert_errors(capsys, runs, cases, positional=("[DIR]",))
