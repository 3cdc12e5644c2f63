"""Interruptions, damage, non-finite losses and full disks: a resumed run ends like an uninterrupted one."""

import dataclasses
import errno
import fcntl
import json
import os
import shutil
import signal
from unittest.mock import Mock

import numpy as np
import pytest
import small_runs as runs
from small_runs import CONFIG, PLAIN, changed

from lungjax.config import overrides
from lungjax.data import pipeline
from lungjax.models import trees
from lungjax.runtime import signals
from lungjax.runtime.checkpoint import newest
from lungjax.training import metrics_log, setup, train
from lungjax.training import workdir as workdirs

pytestmark = pytest.mark.usefixtures("small_network")
REWIND = ("train.on_nan=rewind", "train.save_steps=4", "train.steps=8")


@pytest.fixture(scope="module")
def folders(tmp_path_factory, small_data):
    """Workdirs of a complete run and of one that was stopped by SIGTERM at step 8; copy the second before resuming."""
    root = tmp_path_factory.mktemp("safety")
    with pytest.MonkeyPatch.context() as patch:
        runs.patched(patch, small_data)
        train.run(CONFIG, root / "complete", root)
        runs.interrupt(patch, signal.SIGTERM, 8)
        with pytest.raises(signals.Interrupted):
            train.run(CONFIG, root / "stopped", root)
    return root


@pytest.fixture
def complete(folders):
    return folders / "complete"


@pytest.fixture
def stopped(folders, tmp_path):
    return shutil.copytree(folders / "stopped", tmp_path / "run")


def break_batches(monkeypatch, steps):
    """Replaces the images of some steps by NaN; all images become float32, so that one program is compiled."""
    factor = {True: np.float32(np.nan), False: np.float32(1)}
    runs.change_batches(monkeypatch, lambda step, batch: {**batch, "image": batch["image"] * factor[step in steps]})


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_bit_exact_resume_after_signal(tmp_path, monkeypatch, capsys, complete, number):
    """SIGTERM arrives during a training step, and SIGINT during validation."""
    handler, name = signal.getsignal(number), signal.Signals(number).name
    with monkeypatch.context() as patch:
        if number == signal.SIGTERM:
            runs.interrupt(patch, number, 5)
        else:
            real = pipeline.eval_batches
            patch.setattr(pipeline, "eval_batches", lambda *a, **k: os.kill(os.getpid(), number) or real(*a, **k))
        with pytest.raises(signals.Interrupted) as stop:
            train.run(CONFIG, tmp_path / "run", tmp_path)
    assert stop.value.number == number and signal.getsignal(number) is handler
    step = 5 if number == signal.SIGTERM else 4
    assert f"{name} at step {step}" in capsys.readouterr().out and newest(tmp_path / "run", "last") == step
    (tmp_path / "run/report.json").write_text("of an evaluation in between")
    train.run(CONFIG, tmp_path / "run", tmp_path)
    runs.assert_same_end(complete, tmp_path / "run")
    assert json.loads((tmp_path / "run/report.json").read_text())


def test_bit_exact_resume_after_kill(tmp_path, complete):
    """A SIGTERM that reaches the whole process group still lets the run save; SIGKILL leaves no worker behind."""
    out = tmp_path / "run"
    for number, code, step in ((signal.SIGTERM, 143, 3), (signal.SIGKILL, -9, 8)):
        process = runs.start(out, 1, "--all", "--pause=0.1", "data.workers=1", new_group=True)
        runs.wait_for_step(out, step, process)
        (os.killpg if number == signal.SIGTERM else os.kill)(process.pid, number)
        assert process.wait(60) == code
        assert runs.group_ends(process.pid) and newest(out, "last") >= 3
    train.run(CONFIG, out, tmp_path)
    runs.assert_same_end(complete, out)


def test_resume_from_before_a_damaged_checkpoint(tmp_path, capsys, complete, stopped):
    files = [p for p in (stopped / "checkpoints/last/8").rglob("*") if p.is_file() and "/d/" in str(p)]
    largest = max(files, key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    train.run(CONFIG, stopped, tmp_path)
    output = capsys.readouterr().out
    assert "Resuming from step 6 of 12" in output and largest.name in output
    runs.assert_same_end(complete, stopped)


def test_run_files_lost_in_a_power_failure(tmp_path, capsys, complete, stopped):
    contents = {name: (stopped / name).read_bytes() for name in ("config.json", "data.json")}
    (stopped / "config.json").write_bytes(bytes(len(contents["config.json"])))
    (stopped / "data.json").unlink()
    with pytest.raises(ValueError, match="another network"):
        train.run(changed(CONFIG, "model.head.hidden=8"), stopped, tmp_path)
    with pytest.raises(ValueError, match="config.json"):
        train.run(CONFIG, stopped, tmp_path, mode="evaluate")
    assert not any((stopped / "config.json").read_bytes()) and not (stopped / "data.json").exists()
    train.run(CONFIG, stopped, tmp_path)
    assert "config.json and data.json" in capsys.readouterr().out
    assert contents == {name: (stopped / name).read_bytes() for name in contents}
    runs.assert_same_end(complete, stopped)


def test_non_finite_loss_and_its_batch(tmp_path, monkeypatch, small_data, complete):
    with monkeypatch.context() as patch:
        break_batches(patch, {7})
        with pytest.raises(ValueError, match="at step 7; batch") as error:
            train.run(changed(CONFIG, "train.log_steps=100", "train.save_steps=5"), tmp_path / "run", tmp_path)
    names = small_data.columns["file"][pipeline.batch_rows(small_data, CONFIG, 6)]
    assert all(name in str(error.value) for name in names) and len(names) == 8
    assert newest(tmp_path / "run", "last") == 6  # the state is the last good one
    train.run(CONFIG, tmp_path / "run", tmp_path)
    states = [runs.last_state(workdir) for workdir in (complete, tmp_path / "run")]
    for path, array in states[0].items():
        np.testing.assert_array_equal(states[1][path], array, err_msg=path)


def test_skip_of_only_the_bad_step(tmp_path, monkeypatch, capsys, small_data):
    config = changed(PLAIN, "train.on_nan=skip", "train.steps=5", "train.eval_steps=5", "optim.ema=0.26")
    with monkeypatch.context() as patch:
        break_batches(patch, {3})
        train.run(config, tmp_path / "run", tmp_path)
    assert "Step skipped: loss nan" in capsys.readouterr().out
    end = runs.last_state(tmp_path / "run")
    assert end["bad_steps"] == 1 and end["step"] == 5
    # By hand: the training step on batches 1, 2, 4 and 5 with the keys of those steps, and the averages after it.
    built = runs.build(config)
    state, decays = built.new_state({}), [1 / 10, 2 / 11, 3 / 12, 0.26]
    average = {path: np.float64(leaf) for path, leaf in trees.flatten(state.variables).items()}
    for i, batch in zip(range(5), pipeline.train_batches(small_data, config, start=0), strict=False):
        if i == 2:
            state = state.replace(step=state.step + 1)
        else:
            state, _ = built.train_step(state, batch)
            last, decay = trees.flatten({"params": state.params, "batch_stats": state.batch_stats}), decays.pop(0)
            average = {path: decay * average[path] + (1 - decay) * np.float64(last[path]) for path in last}
    for path, leaf in last.items():
        np.testing.assert_array_equal(end[path], leaf, err_msg=path)
    assert not any(path.startswith("ema/params/stem_conv") for path in end)  # it is frozen
    runs.assert_close(runs.best_variables(tmp_path / "run"), trees.unflatten(average), rtol=1e-6, atol=1e-7)
    assert len(runs.different(runs.best_variables(tmp_path / "run"), trees.unflatten(last))) > 8


def test_other_examples_after_a_rewind(tmp_path, monkeypatch, capsys):
    config = changed(PLAIN, *REWIND)
    break_batches(monkeypatch, {2, 7})
    train.run(config, tmp_path / "run", tmp_path)
    output = capsys.readouterr().out
    assert "Rewinding to step 0" in output and "Rewinding to step 4" in output
    # Skips batches 1 and 2, then batch 7, which step 5 read after the first rewind.
    progress = json.loads((tmp_path / "run/checkpoints/last/8/progress.json").read_text())
    assert progress["skipped_batches"] == 3 and progress["rewinds"] == 2
    assert all(np.isfinite(leaf).all() for leaf in runs.last_state(tmp_path / "run").values())
    steps = [row["step"] for row in metrics_log.read(tmp_path / "run/metrics.jsonl") if "train.loss" in row]
    assert steps == sorted(set(steps)) and steps[-1] == 8


def test_limit_of_rewinds(tmp_path, monkeypatch):
    break_batches(monkeypatch, range(100))
    with pytest.raises(ValueError, match="rewound 5 times"):
        train.run(changed(PLAIN, *REWIND), tmp_path / "run", tmp_path)


def test_unusable_workdir_before_training(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="can't be written"):
        train.run(CONFIG, tmp_path / "file/run", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(ValueError, match="No space left"):
            train.run(CONFIG, tmp_path / "run", tmp_path)
    workdirs.check(tmp_path / "run", CONFIG, "train")  # no lock is left
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ValueError, match="0 MiB are free"):
        train.run(CONFIG, tmp_path / "run", tmp_path)


def test_concurrent_run_in_one_workdir(tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    with (workdir / "lock").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        (workdir / "config.json").write_text(overrides.to_json(CONFIG))  # of a run that has saved nothing yet
        with pytest.raises(ValueError, match="another run is training"):
            train.run(changed(CONFIG, "optim.lr=0.5"), workdir, tmp_path)
        assert overrides.from_json((workdir / "config.json").read_text()) == CONFIG


def test_unsuitable_splits_before_training(tmp_path, monkeypatch, small_data):
    splits, labels = small_data.columns["split"], small_data.columns["label"]
    for columns, monitor, hint in (
        ({"split": np.where(splits == "val", "", splits)}, "slice.accuracy", "val split is empty"),
        ({"split": np.where(splits == "test", "", splits)}, "slice.accuracy", "test split is empty"),
        ({"label": np.where(splits == "val", 0, labels)}, "slice.auc_macro", "undefined on the val split"),
    ):
        other = dataclasses.replace(small_data, columns=small_data.columns | columns)
        monkeypatch.setattr(setup, "open_dataset", lambda *_, other=other, **__: other)
        with pytest.raises(ValueError, match=hint):
            train.run(changed(CONFIG, f"train.monitor={monitor}"), tmp_path / "run", tmp_path)
    assert not (tmp_path / "run").exists()
