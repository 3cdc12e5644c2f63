"""What compiling for a TPU pod needs before there is a compiler; tests/tpu has the rest."""

import dataclasses
import importlib.util

import jax
import numpy as np
import pytest

from lungjax import datasets
from lungjax.config import AugmentConfig, Config, DataConfig, InputSpec, TrainConfig
from lungjax.data import pipeline
from lungjax.runtime import mesh as meshes
from lungjax.training import aot_compile, hlo


@pytest.mark.parametrize(("topology", "sides"), [("v5e:4x4", (4, 4)), ("v5e:1x1", (1, 1)), ("v5p:2x4x4", (2, 4, 4))])
def test_a_topology_is_read(topology, sides):
    assert aot_compile.parse(topology) == (aot_compile.GENERATIONS[topology[:3]], sides)


@pytest.mark.parametrize(
    ("topology", "words"),
    [
        ("v5e-16", "v5e:4x4"),
        ("v5e", "v5e:4x4"),
        ("v5e:3x3", "v5e:2x4"),
        ("v5e:2x2x1", "v5e:2x4"),
        ("v5p:4x4", "v5p:2x2x1"),
        ("v9:4x4", "v4, v5e, v5p, v6e"),
        ("4x4", "v4, v5e, v5p, v6e"),
        ("", "v4, v5e, v5p, v6e"),
    ],
)
def test_another_topology_is_answered_with_the_choices(topology, words):
    with pytest.raises(ValueError, match=f"--compile_for={topology}: .*{words}"):
        aot_compile.parse(topology)


def test_without_the_compiler_the_message_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install '\.\[tpu\]'"):
        aot_compile.compile_for(Config(), "v5e:4x4", tmp_path)


def plan(**values) -> aot_compile.Plan:
    costs = hlo.Costs(
        operations=197e9, memory=819e6 / 2, collectives={"all-reduce": hlo.Traffic(3, {"f32": 2e6, "bf16": 40e6})}
    )
    start = aot_compile.Plan(
        config=Config(train=TrainConfig(batch_size=64)), topology="v5e:4x4", chips=16, hosts=4, parameters=10**6,
        dtype="bfloat16", state=12 * 10**6, batch=10**6, arguments=14 * 10**6, temporaries=10**9, outputs=100,
        code=10**6, costs=costs, seconds=30.0,
    )  # fmt: skip
    return dataclasses.replace(start, **values)


def test_the_least_time_of_a_step_is_that_of_its_arithmetic_or_of_its_traffic():
    # A v5e chip does 197 TFLOP/s and moves 819 GB/s.
    assert plan().arithmetic_seconds == pytest.approx(1e-3)
    assert plan().memory_seconds == pytest.approx(0.5e-3)
    assert plan().images_per_second == pytest.approx(64 / 1e-3)
    assert "at least 1 ms (arithmetic): at most 64,000 images/s" in plan().text()
    slow = plan(costs=hlo.Costs(operations=197e9, memory=2 * 819e6))
    assert "at least 2 ms (memory traffic): at most 32,000 images/s" in slow.text()
    assert "collectives" in slow.text() and "none" in slow.text()
    assert "all-reduce" in plan().text() and "3 a step on each chip: 40.0 MB of bf16, 2.0 MB of f32" in plan().text()


def test_what_a_chip_needs_is_compared_with_its_memory():
    needs = 16 * 2**30 - 14 * 10**6 - 100 - 10**6
    assert plan(temporaries=needs).fits
    assert not plan(temporaries=needs + 1).fits
    assert "16.00 of 16 GiB a chip: it does not fit. Try --set=train.accumulate=2" in plan(temporaries=needs + 1).text()
    assert plan(topology="v6e:4x4", temporaries=needs + 1).fits  # 32 GiB


# As XLA words it for TPUs, in two places of the compiler.
TEMPORARIES = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (19.40G) exceeds "
    "available HBM (15.75G)."
)
ALL = (
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 1.02T of 15.75G "
    "hbm. Exceeded hbm capacity by 1.00T.\n\nTotal hbm usage >= 1.02T:\n"
)


def test_what_does_not_fit_is_told_with_numbers_and_what_to_try():
    config = Config(train=TrainConfig(batch_size=128, accumulate=2))
    told = aot_compile.does_not_fit(TEMPORARIES, config, "v5e:4x4", 16, {"state": 3 * 2**30, "batch": 2**20})
    assert "19.40 GiB for activations and gradients beside 3.00 GiB of state, 1.0 MiB of batch, of 15.75 GiB" in told
    tips = told.partition("Try ")[2].split("; ")
    assert [tip.split(" ")[0] for tip in tips] == [
        "--set=train.shard_params=True",
        "--set=train.accumulate=4",
        "--set=train.remat=True",
        "--set=train.batch_size=64",
        "more",
    ]
    assert "v5e:4x8" in tips[-1]
    told = aot_compile.does_not_fit(ALL, config, "v5e:4x4", 16, {"state": 2**20, "batch": 0})
    assert "shard_params" not in told  # it is not the parameters
    assert "would need 1044.48 GiB of 15.75 GiB" in told
    assert "says: RESOURCE_EXHAUSTED: else" in aot_compile.does_not_fit(
        "RESOURCE_EXHAUSTED: else", config, "v5e:4x4", 16, {"state": 0}
    )


def test_advice_names_only_what_can_be_done():
    train = TrainConfig(batch_size=256, remat=True, shard_params=True)
    told = aot_compile.does_not_fit(TEMPORARIES, Config(train=train), "v5e:16x16", 256, {"state": 0, "batch": 0})
    assert told.endswith("Try a smaller network")


def test_classes_of_data_that_is_not_here_are_as_many_as_published():
    for base, entry in datasets.DATASETS.items():
        expected = datasets.about(base).expected or {}
        for name in entry.configs:
            classes = datasets.classes(f"{base}/{name}")
            for counts in expected.get(name, {}).values():
                assert len(classes) == len(counts), f"{base}/{name}"
            assert len(set(classes)) == len(classes) > 1
    assert datasets.classes("folder/mine") == ()


def test_a_batch_of_missing_data_has_the_shapes_of_a_real_one(small_data, tmp_path):
    config = Config(
        data=DataConfig(dataset="covidx_ct", sampling="balanced"),
        input=InputSpec(size=(16, 20), channels=3, crop="box", box_margin=0.25),
        augment=AugmentConfig(exterior=0.5, box_jitter=0.2),
        train=TrainConfig(batch_size=6),
    )
    mesh = meshes.make_mesh(devices=jax.devices()[:1])
    data = aot_compile._data(config, tmp_path)
    assert data.classes == ("Normal", "Pneumonia", "COVID-19")
    found = {name: (leaf.shape, leaf.dtype) for name, leaf in aot_compile.batch_shapes(config, data, mesh).items()}
    packed = np.zeros(aot_compile.BODY_SIDE**2 // 8, np.uint8)
    real = dataclasses.replace(small_data, body=True, records=[{**r, "body": packed} for r in small_data.records])
    batch = next(pipeline.train_batches(real, config, start=0))
    assert found == {name: (value.shape, value.dtype) for name, value in batch.items()}
    assert found["image"] == ((6, 24, 30, 3), np.uint8)

    with pytest.raises(ValueError, match="folder/mine is not prepared in .*: prepare it"):
        aot_compile._data(dataclasses.replace(config, data=DataConfig(dataset="folder/mine")), tmp_path)
