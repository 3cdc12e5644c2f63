"""--compile_for reports against hand-computed numbers. Needs the `tpu` extra, no TPU: python -m pytest tests/tpu"""

import re
import subprocess
import sys
from functools import partial

import pytest

from lungjax import models
from lungjax.config import Config, DataConfig, InputSpec, ModelConfig, OptimConfig, TrainConfig, overrides
from lungjax.models.transfusion import Transfusion
from lungjax.training import aot_compile

# A network of two blocks for gray images of 32 x 32 and three classes.
STEM, KERNEL = 3 * 3 * 1 * 64, 3 * 3 * 64 * 128
PARAMETERS = STEM + 64 + 2 * 64 + KERNEL + 128 + 2 * 128 + 128 * 3 + 3
STATISTICS = 2 * 64 + 2 * 128
CONFIG = Config(
    data=DataConfig(dataset="phantom_ct"),
    input=InputSpec(size=(32, 32)),
    model=ModelConfig(name="two_blocks"),
    optim=OptimConfig(name="adam"),
    train=TrainConfig(batch_size=64),
)


def mebibytes(numbers: float) -> str:
    return f"{4 * numbers / 2**20:.1f} MiB"


@pytest.fixture(autouse=True)
def network(monkeypatch):
    monkeypatch.setitem(models.MODELS, "two_blocks", partial(Transfusion, 3, (64, 128)))


def test_report_of_replicated_parameters(tmp_path):
    report = aot_compile.compile_for(CONFIG, "v5e:2x2", tmp_path)
    assert "4 v5e on 1 host" in report
    assert f"two_blocks, {PARAMETERS:,} parameters, computes in bfloat16" in report
    assert "64 images of 32 x 32, 16 per chip" in report and "it fits" in report
    assert f"{mebibytes(3 * PARAMETERS + STATISTICS)} parameters, statistics and optimizer state, replicated" in report
    # Gradients are summed over the chips, in the bfloat16 of the convolutions.
    assert re.search(r"all-reduce +\d+ in the program of each chip: 0.\d MB of bf16", report)
    assert "all-gather" not in report
    # Forward and backward passes of 16 images; maps of 30 x 30 and 12 x 12, no gradient with respect to the images.
    flops = 16 * 2 * (2 * STEM * 30**2 + 3 * KERNEL * 12**2)
    assert flops / 1e9 <= float(re.search(r"([\d.]+) GFLOP", report)[1]) < 1.5 * flops / 1e9
    # A loop over micro-batches is compiled once and runs twice.
    accumulated = aot_compile.compile_for(overrides.override(CONFIG, "train.accumulate=2"), "v5e:2x2", tmp_path)
    assert "in 2 micro-batches" in accumulated
    assert flops / 1e9 <= float(re.search(r"([\d.]+) GFLOP", accumulated)[1]) < 1.5 * flops / 1e9


def test_report_of_sharded_parameters(tmp_path):
    report = aot_compile.compile_for(overrides.override(CONFIG, "train.shard_params=True"), "v5e:2x2", tmp_path)
    numbers = 3 * (PARAMETERS - KERNEL + KERNEL // 4) + STATISTICS  # only the large kernel is sharded
    assert f"{mebibytes(numbers)} parameters, statistics and optimizer state, sharded" in report
    assert re.search(r"all-gather +\d+ in the program of each chip: 0.1 MB of bf16", report)


def test_step_beyond_the_memory(tmp_path):
    command = [
        sys.executable, "-m", "lungjax.main", "--experiment=phantom_demo", "--compile_for=v5e:4x4",
        "--set=train.batch_size=1048576",
    ]  # fmt: skip
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2, result.stderr
    assert re.search(r"does not fit on v5e:4x4.*[\d.]+[GT]", result.stderr)
    assert "--set=train.batch_size=524288" in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "runs").exists() and not (tmp_path / "data").exists()


def test_topologies():
    for topology, chips, hosts in (
        ("v5e:1x1", 1, 1), ("v5e:4x4", 16, 4), ("v5e:16x16", 256, 64), ("v6e:2x4", 8, 2), ("v5p:2x2x2", 8, 2),
        ("v4:2x2x2", 8, 2),
    ):  # fmt: skip
        devices = aot_compile.devices(topology)
        assert len(devices) == len({tuple(device.coords) for device in devices}) == chips, topology
        assert len({device.process_index for device in devices}) == hosts, topology
    with pytest.raises(ValueError, match=r"v5p:3x1x1: .*divisible"):
        aot_compile.devices("v5p:3x1x1")
