"""The training step compiled by the TPU compiler, without a TPU, against numbers by hand. Needs the extra `tpu`:

python -m pytest tests/tpu
"""

import re
import subprocess
import sys
from functools import partial

import pytest

from lungjax import models
from lungjax.config import Config, DataConfig, InputSpec, ModelConfig, OptimConfig, TrainConfig, overrides
from lungjax.models.transfusion import Transfusion
from lungjax.training import aot_compile, hlo

# Two blocks for gray images of 32 x 32 and three classes.
STEM, KERNEL = 3 * 3 * 1 * 64, 3 * 3 * 64 * 128
PARAMETERS = STEM + 64 + 2 * 64 + KERNEL + 128 + 2 * 128 + 128 * 3 + 3
STATISTICS = 2 * 64 + 2 * 128
COUNTERS = 4  # steps, skipped steps, and those of Adam and of the schedule
CONFIG = Config(
    data=DataConfig(dataset="phantom_ct"),
    input=InputSpec(size=(32, 32)),
    model=ModelConfig(name="two_blocks"),
    optim=OptimConfig(name="adam"),
    train=TrainConfig(batch_size=16),
)


@pytest.fixture(autouse=True, scope="module")
def network():
    models.MODELS["two_blocks"] = partial(Transfusion, 3, (64, 128))
    yield
    del models.MODELS["two_blocks"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The plan with a copy of the parameters on each of four chips, and the program."""
    texts, costs = [], hlo.costs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hlo, "costs", lambda text: texts.append(text) or costs(text))
        return aot_compile.compile_for(CONFIG, "v5e:2x2", tmp_path_factory.mktemp("data")), texts[0]


def test_copies_of_parameters_and_adam_on_each_chip(whole):
    plan, _ = whole
    assert (plan.chips, plan.hosts, plan.parameters) == (4, 1, PARAMETERS)
    assert plan.state == 4 * (3 * PARAMETERS + STATISTICS + COUNTERS)
    assert plan.batch == 4 * (32 * 32 + 4 + 4)  # bytes: image, label, place in the sequence
    assert plan.arguments >= plan.state
    assert plan.outputs < 2**16  # the new state takes the old one's memory
    assert plan.fits


def test_gradients_are_summed_over_the_chips(whole):
    plan, _ = whole
    assert set(plan.costs.collectives) == {"all-reduce"}
    assert 2 * PARAMETERS <= plan.costs.collectives["all-reduce"].bytes <= 2 * 4 * PARAMETERS


def test_convolutions_are_the_compilers_own_in_bfloat16(whole):
    plan, text = whole
    assert plan.dtype == "bfloat16"
    convolutions = re.findall(r" = (\w+)\[[^\n]* convolution\([^\n]*window=\{size=\d+x\d", text)
    assert convolutions.count("bf16") == len(convolutions) >= 5  # forward, to the kernel, and to the second one's input
    assert "conditional(" not in text


def test_operations_are_those_of_the_layers(whole):
    plan, _ = whole
    images, stem, second = 4, 2 * STEM * 30**2, 2 * KERNEL * 12**2  # a chip's; maps of 30 x 30 and 12 x 12
    # Forward and backward; there is no gradient to the images. The compiler's forms of them pad.
    least = images * (2 * stem + 3 * second)
    assert least <= plan.costs.operations < 1.5 * least


def test_cut_parameters_take_their_share_of_a_chip(whole, tmp_path):
    config = overrides.override(CONFIG, "train.shard_params=True")
    plan = aot_compile.compile_for(config, "v5e:2x2", tmp_path)
    assert plan.state == 4 * (3 * (PARAMETERS - KERNEL + KERNEL // 4) + STATISTICS + COUNTERS)  # the others are small
    assert plan.arguments < whole[0].arguments
    assert plan.costs.collectives["all-gather"].bytes >= 2 * KERNEL
    assert "cut over the chips" in plan.text()


def test_a_step_too_large_ends_in_a_message(tmp_path):
    command = [
        sys.executable, "-m", "lungjax.main", "--experiment=phantom_demo", "--compile_for=v5e:4x4",
        "--set=train.batch_size=1048576",
    ]  # fmt: skip
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2, result.stderr
    assert re.search(r"does not fit on v5e:4x4: a chip would need [\d.]+ GiB", result.stderr)
    assert "--set=train.batch_size=524288" in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "runs").exists() and not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("topology", "chips", "hosts"),
    [("v5e:1x1", 1, 1), ("v5e:4x4", 16, 4), ("v5e:16x16", 256, 64), ("v6e:2x4", 8, 2), ("v5p:2x2x2", 8, 2),
     ("v4:2x2x2", 8, 2)],
)  # fmt: skip
def test_a_chip_is_a_device(topology, chips, hosts):
    found = aot_compile.devices(topology)
    assert len(found) == len({tuple(device.coords) for device in found}) == chips
    assert len({device.process_index for device in found}) == hosts


def test_a_shape_that_hosts_do_not_fill_is_the_compilers_to_refuse():
    with pytest.raises(ValueError, match="v5p:3x1x1: the TPU compiler says: .*divisible"):
        aot_compile.devices("v5p:3x1x1")
