"""What a run survives: signals, kills, numbers that are none, full disks. The end is that of the untouched run."""

import dataclasses
import errno
import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import small_bn, without_pictures
from test_train import CONFIG as PLAIN
from test_train import changed, last_weights, opened  # noqa: F401  (the last one is a fixture)

from lungjax import models
from lungjax.config import overrides
from lungjax.data import pipeline
from lungjax.models import trees
from lungjax.runtime import signals
from lungjax.runtime.checkpoint import newest
from lungjax.training import metrics_log, program, train
from lungjax.training import workdir as workdirs

CONFIG = changed(PLAIN, "model.name=small_bn", "train.save_steps=3")


def assert_same_end(a: Path, b: Path, number: int) -> None:
    ends = [last_weights(workdir, number) for workdir in (a, b)]
    assert ends[0].keys() == ends[1].keys() and len(ends[0]) > 20
    for name, array in ends[0].items():
        np.testing.assert_array_equal(ends[1][name], array, err_msg=name)
    assert newest(a, "best") == newest(b, "best")
    scores = [
        [(r["step"], r["val.slice.loss"]) for r in metrics_log.read(w / "metrics.jsonl") if "val.slice.loss" in r]
        for w in (a, b)
    ]
    assert scores[0] == scores[1]


@pytest.fixture(scope="module")
def untouched(tmp_path_factory, small_data):
    """The run that nothing happened to."""
    folder = tmp_path_factory.mktemp("untouched")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, "small_bn", small_bn())
        patch.setattr(train, "open_dataset", lambda name, *_, **__: small_data)
        without_pictures(patch)
        train.run(CONFIG, folder / "run", folder)
    return folder / "run"


def asks_to_end(number: int, at: int, monkeypatch) -> None:
    """Sends this process a signal in the middle of step `at`, or with a negative number in its validation."""
    if at > 0:
        real = train.device_batches

        def batches(this, start):
            for i, batch in enumerate(real(this, start), start + 1):
                if i == at:
                    os.kill(os.getpid(), number)
                yield batch

        monkeypatch.setattr(train, "device_batches", batches)
        return
    real_batches = pipeline.eval_batches

    def eval_batches(*args, **kwargs):
        os.kill(os.getpid(), number)
        return real_batches(*args, **kwargs)

    monkeypatch.setattr(pipeline, "eval_batches", eval_batches)


@pytest.mark.parametrize(
    ("number", "at", "saved"), [(signal.SIGTERM, 6, 6), (signal.SIGINT, 8, 8), (signal.SIGTERM, -1, 4)]
)
def test_a_run_asked_to_end_saves_and_goes_on_as_if_nothing_was(
    tmp_path, monkeypatch, capsys, untouched, number, at, saved
):
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        asks_to_end(number, at, patch)
        with pytest.raises(signals.Interrupted) as stop:
            train.run(CONFIG, tmp_path / "run", tmp_path)
    assert stop.value.number == number and signal.getsignal(number) is before
    assert f"{signal.Signals(number).name} at step {saved}" in capsys.readouterr().out
    assert newest(tmp_path / "run", "last") == saved
    train.run(CONFIG, tmp_path / "run", tmp_path)
    assert_same_end(untouched, tmp_path / "run", 12)


def test_killed_at_random_moments_a_run_ends_with_the_same_bits(tmp_path):
    """SIGKILL, in processes of their own; tests/benchmarks/kills.py does it 20 times."""
    script, draw = Path(__file__).parents[1] / "run_small.py", random.Random(5)
    fields = ["model.head.dropout=0.3", "train.steps=30", "train.eval_steps=6", "train.save_steps=2"]
    runs = {
        name: [sys.executable, str(script), "--pause=0.03", str(tmp_path / name), *fields] for name in ("whole", "cut")
    }
    whole = subprocess.Popen(runs["whole"])
    for kill in range(2):
        process = subprocess.Popen(runs["cut"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        reached = (newest(tmp_path / "cut", "last") or 0) + draw.randint(1, 5)
        deadline = time.time() + 120
        while process.poll() is None and time.time() < deadline:
            rows = metrics_log.read(tmp_path / "cut" / "metrics.jsonl")
            if rows and rows[-1]["step"] >= reached:
                break
            time.sleep(0.01)
        time.sleep(draw.random() / 10)
        assert process.poll() is None, f"kill {kill}: it ended before"
        process.kill()
        process.wait()
    assert whole.wait() == 0
    subprocess.run(runs["cut"], check=True)
    assert_same_end(tmp_path / "whole", tmp_path / "cut", newest(tmp_path / "whole", "last"))


def test_a_damaged_checkpoint_is_skipped_batches(tmp_path, capsys, untouched):
    with pytest.MonkeyPatch.context() as patch:
        asks_to_end(signal.SIGTERM, 8, patch)
        with pytest.raises(signals.Interrupted):
            train.run(CONFIG, tmp_path / "run", tmp_path)
    newest_files = [p for p in (tmp_path / "run/checkpoints/last/8").rglob("*") if p.is_file() and "/d/" in str(p)]
    largest = max(newest_files, key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    train.run(CONFIG, tmp_path / "run", tmp_path)
    said = capsys.readouterr().out
    assert "Going on from step 6 of 12" in said and largest.name in said
    assert_same_end(untouched, tmp_path / "run", 12)


def broken_at(bad_steps: set[int]):
    """Batches whose images are no numbers at the given places in the sequence."""

    def batches(this, start):
        for i, batch in enumerate(real_batches(this, start), start + 1):
            if i in bad_steps:
                batch = {**batch, "image": batch["image"].astype(np.float32) * np.nan}
            yield batch

    return batches


real_batches = train.device_batches


def test_a_loss_that_is_no_number_stops_names_the_batch_and_keeps_the_state_before(
    tmp_path, monkeypatch, small_data, untouched
):
    with monkeypatch.context() as patch:
        patch.setattr(train, "device_batches", broken_at({7}))
        with pytest.raises(ValueError, match=r"the loss is nan.* at step 7; its batch: (?P<names>.*)") as error:
            train.run(changed(CONFIG, "train.log_steps=100", "train.save_steps=5"), tmp_path / "run", tmp_path)
    names = small_data.columns["file"][pipeline.batch_rows(small_data, CONFIG, 6)]
    assert all(name in str(error.value) for name in names) and len(names) == 8
    assert newest(tmp_path / "run", "last") == 6
    # The state of step 6 is whole: with the batch mended the end is that of the untouched run.
    train.run(CONFIG, tmp_path / "run", tmp_path)
    assert_same_end(untouched, tmp_path / "run", 12)


def test_skip_leaves_the_step_out_and_changes_nothing_else(tmp_path, monkeypatch, capsys, small_data):
    monkeypatch.setattr(train, "device_batches", broken_at({3}))
    train.run(changed(CONFIG, "train.on_nan=skip", "train.steps=4"), tmp_path / "run", tmp_path)
    assert "Left out: the loss is nan" in capsys.readouterr().out
    end = last_weights(tmp_path / "run", 4)
    assert end["['skipped']"] == 1 and end["['step']"] == 4
    # By hand: the step function itself, without the third batch but with the keys of steps 1, 2 and 4.
    compiled = program.build(CONFIG, small_data.classes, small_data.columns["label"][:36], train.meshes.make_mesh())
    state = compiled.new_state({})
    for i, batch in zip(range(4), pipeline.train_batches(small_data, CONFIG, start=0), strict=False):
        if i == 2:
            state = state.replace(step=state.step + 1)
        else:
            state, _ = compiled.train_step(state, batch)
    for path, leaf in trees.flatten(state.params).items():
        key = "['params']" + "".join(f"['{part}']" for part in path.split("/"))
        np.testing.assert_array_equal(end[key], leaf, err_msg=path)


def test_rewind_goes_back_and_on_with_other_examples(tmp_path, monkeypatch, capsys):
    config = changed(CONFIG, "train.on_nan=rewind", "train.save_steps=4", "train.steps=8")
    monkeypatch.setattr(train, "device_batches", broken_at({2, 7}))
    train.run(config, tmp_path / "run", tmp_path)
    said = capsys.readouterr().out
    assert "Going back to step 0" in said and "Going back to step 4" in said
    # Batches 1 and 2 were passed over, then the broken 7th of the sequence: step 5 reads number 7, from 0.
    progress = json.loads((tmp_path / "run/checkpoints/last/8/progress.json").read_text())
    assert progress["skipped_batches"] == 3 and progress["rewinds"] == 2
    assert all(np.isfinite(leaf).all() for leaf in last_weights(tmp_path / "run", 8).values())
    steps = [row["step"] for row in metrics_log.read(tmp_path / "run/metrics.jsonl") if "train.loss" in row]
    assert steps == sorted(set(steps)) and steps[-1] == 8


def test_rewinding_for_ever_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "device_batches", broken_at(set(range(1, 100))))
    with pytest.raises(ValueError, match="went back 5 times already"):
        train.run(changed(CONFIG, "train.on_nan=rewind"), tmp_path / "run", tmp_path)


def test_a_folder_that_cannot_be_written_or_has_no_room_is_refused_before_training(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match=r"can't be written.*another --workdir"):
        train.run(CONFIG, tmp_path / "file" / "run", tmp_path)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(workdirs.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ValueError, match=r"take up to \d+ MiB, 0 MiB are free"):
        train.run(CONFIG, tmp_path / "run", tmp_path)


def test_two_runs_at_once_in_one_folder_are_refused_and_the_first_is_left_alone(tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    with (workdir / "lock").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        (workdir / "config.json").write_text(overrides.to_json(CONFIG))  # of a run that has saved nothing yet
        with pytest.raises(ValueError, match="another run is training there"):
            train.run(changed(CONFIG, "optim.lr=0.5"), workdir, tmp_path)
        assert overrides.from_json((workdir / "config.json").read_text()) == CONFIG


@pytest.mark.parametrize(
    ("name", "damage"), [("config.json", "empty"), ("config.json", "missing"), ("data.json", "half")]
)
def test_run_files_lost_in_a_power_cut(name, damage, tmp_path, monkeypatch, capsys, untouched):
    with monkeypatch.context() as patch:
        asks_to_end(signal.SIGTERM, 4, patch)
        with pytest.raises(signals.Interrupted):
            train.run(CONFIG, tmp_path / "run", tmp_path)
    file = tmp_path / "run" / name
    whole = file.read_text()
    if damage == "missing":
        file.unlink()
    else:
        file.write_text(whole[: len(whole) // 2] if damage == "half" else "")
    if name == "config.json":
        with pytest.raises(ValueError, match="another network"):
            train.run(changed(CONFIG, "model.head.hidden=8"), tmp_path / "run", tmp_path)
        assert not file.exists() or not file.read_text()
    train.run(CONFIG, tmp_path / "run", tmp_path)
    assert str(file) in capsys.readouterr().out and file.read_text() == whole
    assert_same_end(untouched, tmp_path / "run", CONFIG.train.steps)


def test_full_disk_before_training_leaves_no_lock(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ValueError, match="can't be written .No space left"):
            train.run(CONFIG, tmp_path / "run", tmp_path)
    workdirs.check(tmp_path / "run", CONFIG, "train")


def test_reading_processes_outlive_a_signal_but_not_the_run(tmp_path, untouched):
    """Ctrl-C and SIGTERM go to the whole process group: the run still saves. After SIGKILL no process is left."""
    script = str(Path(__file__).parents[1] / "run_small.py")
    for number, code in ((signal.SIGTERM, 143), (signal.SIGKILL, -9)):
        out = tmp_path / str(code)
        fields = ["--pause=0.2", "data.workers=1", "train.steps=200"]
        process = subprocess.Popen([sys.executable, script, str(out), *fields], start_new_session=True)
        deadline = time.time() + 120
        while len(metrics_log.read(out / "metrics.jsonl")) < 3 and time.time() < deadline:
            time.sleep(0.02)
        group = os.getpgid(process.pid)
        (os.killpg if number == signal.SIGTERM else os.kill)(group, number)
        assert process.wait(60) == code
        deadline = time.time() + 30
        while group_lives(group) and time.time() < deadline:
            time.sleep(0.05)
        assert not group_lives(group)
        assert (newest(out, "last") is not None) == (number == signal.SIGTERM)


def group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("split", ["val", "test"])
def test_an_empty_split_is_refused_before_training(tmp_path, monkeypatch, small_data, split):
    columns = small_data.columns | {
        "split": np.where(small_data.columns["split"] == split, "", small_data.columns["split"])
    }
    monkeypatch.setattr(train, "open_dataset", lambda *_, **__: dataclasses.replace(small_data, columns=columns))
    with pytest.raises(ValueError, match=f"the {split} split is empty"):
        train.run(CONFIG, tmp_path / "run", tmp_path)


def test_a_monitor_without_a_value_on_val_is_refused_before_training(tmp_path, monkeypatch, small_data):
    labels = np.where(small_data.columns["split"] == "val", 0, small_data.columns["label"])
    columns = small_data.columns | {"label": labels}
    monkeypatch.setattr(train, "open_dataset", lambda *_, **__: dataclasses.replace(small_data, columns=columns))
    with pytest.raises(ValueError, match=r"slice.auc_macro is not defined on the val split"):
        train.run(changed(CONFIG, "train.monitor=slice.auc_macro"), tmp_path / "run", tmp_path)


def test_out_of_memory_says_what_to_try():
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 99 bytes.")
    said = r"batch_size=8.*32, 32.*accumulate=2.*remat=True.*batch_size=4.*99 bytes"
    with pytest.raises(ValueError, match=said), program.memory_explained(CONFIG, 1):
        raise error
    other = jax.errors.JaxRuntimeError("INTERNAL: something else")
    with pytest.raises(jax.errors.JaxRuntimeError), program.memory_explained(CONFIG, 1):
        raise other
