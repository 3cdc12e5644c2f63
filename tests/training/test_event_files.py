"""TensorBoard events, read by TensorBoard, and the trace of the profiler."""

import gzip
import json
import shutil
import signal
import sys

import commands
import numpy as np
import pytest
from small_runs import PLAIN, changed, interrupt
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lungjax import tensorboard
from lungjax.runtime import signals
from lungjax.training import metrics_log, train

CONFIG = changed(PLAIN, "train.tensorboard=True", "train.steps=8", "train.log_parameters=True")


def assert_events_equal_rows(workdir):
    events = EventAccumulator(str(workdir / "tensorboard"), {"scalars": 0, "images": 0, "tensors": 0}).Reload()
    rows = metrics_log.read(workdir / "metrics.jsonl")
    for tag, key in (("train/loss", "train.loss"), ("val/slice.accuracy", "val.slice.accuracy")):
        expected = [(row["step"], row[key]) for row in rows if key in row]
        assert [event.step for event in events.Scalars(tag)] == [step for step, _ in expected]
        np.testing.assert_allclose([e.value for e in events.Scalars(tag)], [value for _, value in expected], rtol=1e-6)
    return events


def test_resumed_run_repeats_no_step(tmp_path, monkeypatch, small_network, capsys):
    workdir = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(signals.Interrupted):
        interrupt(patch, signal.SIGTERM, 6)
        train.run(CONFIG, workdir, tmp_path)
    assert [event.step for event in assert_events_equal_rows(workdir).Scalars("train/loss")] == list(range(1, 7))
    shutil.rmtree(workdir / "checkpoints/last/6")  # as if killed before this checkpoint, so steps 5 and 6 are repeated
    train.run(CONFIG, workdir, tmp_path, profile=(7, 8))
    events = assert_events_equal_rows(workdir)
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 9))
    assert "small_bn" in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()

    output = capsys.readouterr().out
    assert "Devices: 1 x cpu on 1 host" in output and "Training: 8 steps of 8 images" in output
    assert "head/dense/kernel" in output and "frozen" in output
    (trace,) = (workdir / "profile").rglob("perfetto_trace.json.gz")
    names = [event.get("name", "") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]]
    assert sum("train_step" in name for name in names) >= 2


def test_missing_extra_is_found_before_training(tmp_path, monkeypatch, small_network):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ValueError, match="extra"):
        train.run(CONFIG, tmp_path / "run", tmp_path)
    assert not (tmp_path / "run").exists()


def test_events_of_a_finished_run(tmp_path, trained_run, capsys):
    workdir = shutil.copytree(trained_run.workdir, tmp_path / "run")
    assert not (workdir / "tensorboard").exists()
    for _ in range(2):  # again changes nothing
        assert commands.run(tensorboard, workdir, positional=("RUN...",)) == 0
        events = assert_events_equal_rows(workdir)
        assert "report/confusion_slice" in events.Tags()["images"]
    assert f"--logdir={workdir / 'tensorboard'}" in capsys.readouterr().out
    assert commands.run(tensorboard, tmp_path / "nowhere", positional=("RUN...",)) == 2
    assert "not a run" in capsys.readouterr().err
