"""The parts of --compile_for that need no TPU compiler; tests/tpu has the others."""

import dataclasses
import importlib.util
import zlib

import jax
import numpy as np
import pytest

from lungjax.config import AugmentConfig, Config, DataConfig, InputSpec, TrainConfig
from lungjax.data import pipeline
from lungjax.data.prepared import BODY_SIDE
from lungjax.runtime import mesh as meshes
from lungjax.training import aot_compile


def test_choices_for_an_unknown_topology():
    generations = "v4, v5e, v5p, v6e"
    for topology, hint in (
        ("v5e-16", "v5e:4x4"), ("v5e", "v5e:4x4"), ("v5e:3x3", "v5e:2x4"), ("v5p:4x4", "v5p:2x2x1"),
        ("v9:4x4", generations), ("", generations),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"--compile_for={topology}: .*{hint}"):
            aot_compile.devices(topology)


def test_missing_compiler(monkeypatch, tmp_path):
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[tpu\]'"):
        aot_compile.compile_for(Config(), "v5e:4x4", tmp_path)


def test_memory_advice():
    config = Config(train=TrainConfig(batch_size=128, accumulate=2))
    error = "RESOURCE_EXHAUSTED: Ran out of memory: HLO temporaries (19.40G) exceeds available HBM (15.75G).\nmore"
    message = aot_compile.does_not_fit(error, config, "v5e:4x4", 16, {"state": 3 * 2**30, "batch": 2**20})
    assert "(19.40G) exceeds available HBM (15.75G)" in message and "3.00 GiB and 1.0 MiB" in message
    tips = message.partition("Try ")[2].split("; ")
    assert [tip.split(" ")[0].removeprefix("--set=train.") for tip in tips] == [
        "accumulate=4", "remat=True", "batch_size=64", "shard_params=True", "more",
    ]  # fmt: skip
    assert "v5e:4x8" in tips[-1]
    train = TrainConfig(batch_size=256, remat=True, shard_params=True)
    last = aot_compile.does_not_fit(error, Config(train=train), "v5e:16x16", 256, {"state": 0, "batch": 0})
    assert last.endswith("Try a smaller network")


def test_batch_shapes_of_the_pipeline(small_data):
    config = Config(
        data=DataConfig(dataset="covidx_ct", sampling="balanced"),
        input=InputSpec(size=(16, 20), channels=3, crop="box", box_margin=0.25),
        augment=AugmentConfig(exterior=0.5, box_jitter=0.2),
        train=TrainConfig(batch_size=6),
    )
    mesh = meshes.make_mesh(devices=jax.devices()[:1])
    shapes = {name: (leaf.shape, leaf.dtype) for name, leaf in aot_compile.batch_shapes(config, mesh).items()}
    packed = zlib.compress(bytes(BODY_SIDE**2 // 8))
    real = dataclasses.replace(small_data, body=True, records=[{**r, "body": packed} for r in small_data.records])
    batch = next(pipeline.train_batches(real, config, start=0))
    assert shapes == {name: (value.shape, value.dtype) for name, value in batch.items()}
    assert shapes["image"] == ((6, 24, 30, 3), np.uint8)


def test_unprepared_data_set(monkeypatch, tmp_path):
    monkeypatch.setattr(aot_compile, "devices", lambda topology: jax.devices()[:1])
    with pytest.raises(ValueError, match="folder/mine is not prepared"):
        aot_compile.compile_for(Config(data=DataConfig(dataset="folder/mine")), "v5e:1x1", tmp_path)
