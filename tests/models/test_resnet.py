"""ResNet v1, v1.5, V2 and BiT: what tells these graphs apart, and the rules for their files."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_weights import random_images, random_variables

from lungjax.config import HeadConfig
from lungjax.models import bit, resnet
from lungjax.models.bit import BIT, BiT
from lungjax.models.layers import Conv
from lungjax.models.resnet import RESNET, ResNet, pool_zeros
from lungjax.models.trees import flatten
from lungjax.weights.convert import convert
from lungjax.weights.rules.bit import RULES as BIT_RULES
from lungjax.weights.rules.resnet import RULES

SMALL = {"width": 8, "outputs": 5}
TINY = {
    "basic": partial(ResNet, (1, 2), bottleneck=False, stride_conv=1, **SMALL),
    "v1": partial(ResNet, (1, 2), stride_conv=1, biased=resnet.ALL_BIASED, **SMALL),
    "v15": partial(ResNet, (1, 2), **SMALL),
    "v2": partial(ResNet, (2, 2), **(resnet.keras_v2.keywords | SMALL)),
    "bit": partial(BiT, (1, 2), width=32, outputs=5, head=HeadConfig()),
}
# name: trainable parameters, all with the running statistics. Keras's and torchvision's own counts; BiT's from the
# released files (GroupNorm has no statistics).
COUNTS = {
    "resnet18": (11689512, 11699112),
    "resnet34": (21797672, 21814696),
    "resnet50": (25583592, 25636712),
    "resnet101": (44601832, 44707176),
    "resnet152": (60268520, 60419944),
    "resnet50_v15": (25557032, 25610152),
    "resnet101_v15": (44549160, 44654504),
    "resnet152_v15": (60192808, 60344232),
    "resnet50v2": (25568360, 25613800),
    "resnet101v2": (44577896, 44675560),
    "resnet152v2": (60236904, 60380648),
    "bit_r50x1": (25549352, 25549352),
    "bit_r101x1": (44541480, 44541480),
    "bit_r50x3": (217319080, 217319080),
    "bit_r101x3": (387934888, 387934888),
    "bit_r152x2": (236335208, 236335208),
    "bit_r152x4": (936533224, 936533224),
}


def shapes_of(module) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of all leaves by path, without the collection."""
    side = module.minimum_size()
    variables = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, *side, 3)), train=False))
    return {path: leaf.shape for tree in variables.values() for path, leaf in flatten(tree).items()}


@cache
def shapes_of_variant(name: str) -> dict[str, tuple[int, ...]]:
    return shapes_of((RESNET | BIT)[name]())


def last(module, variables, images):
    return np.asarray(jax.jit(lambda v, x: module.apply(v, x, train=False)[1]["last"])(variables, images))


@pytest.mark.parametrize("name", RESNET | BIT)
def test_parameters_of_every_variant(name):
    counts = {path: int(np.prod(shape)) for path, shape in shapes_of_variant(name).items()}
    trainable = sum(count for path, count in counts.items() if not path.endswith(("/mean", "/var")))
    assert (trainable, sum(counts.values())) == COUNTS[name]


@pytest.mark.parametrize("name", TINY)
def test_shapes_at_an_odd_height_and_an_even_width(name):
    module = TINY[name]()
    images = jnp.zeros((2, 33, 48, 3))
    variables = jax.eval_shape(lambda: module.init(jax.random.key(0), images, train=False))
    logits, features = jax.eval_shape(lambda v: module.apply(v, images, train=False), variables)
    channels = {"basic": 16, "bit": 256}.get(name, 64)
    assert logits.shape == (2, 5)
    assert features["last"].shape == (2, 5, 6, channels)
    with pytest.raises(ValueError, match="too small"):
        jax.eval_shape(lambda v: module.apply(v, images[:, :7], train=False), variables)


@pytest.mark.parametrize("name", ["v15", "v2", "bit"])
def test_remat_and_dtype_change_no_parameter(name):
    images = jnp.zeros((2, 32, 32, 3))
    module = TINY[name]()
    other = module.clone(remat=True, dtype=jnp.bfloat16)
    assert shapes_of(other) == shapes_of(module)
    variables = jax.eval_shape(lambda: module.init(jax.random.key(0), images, train=False))
    logits, features = jax.eval_shape(lambda v: other.apply(v, images, train=False), variables)
    assert (logits.dtype, features["last"].dtype) == (jnp.float32, jnp.bfloat16)


def test_stride_place_shows_only_in_the_output():
    v1, v15 = (TINY["v15"](stride_conv=n).clone(repeats=(1, 1)) for n in (1, 2))
    assert shapes_of(v1) == shapes_of(v15)
    images = random_images((33, 40, 3))
    variables = random_variables(v1, images.shape[1:])
    one, other = last(v1, variables, images), last(v15, variables, images)
    assert one.shape == other.shape
    assert np.abs(one - other).max() > 0.1 * np.ptp(one)


def test_v2_strides_in_the_last_block_of_a_stage():
    module, images = TINY["v2"](), np.zeros((1, 32, 32, 3), np.float32)
    states = jax.eval_shape(
        lambda: module.init_with_output(
            jax.random.key(0), images, train=False, capture_intermediates=True, mutable=True
        )[1]["intermediates"]
    )
    sides = {name: state["__call__"][0].shape[1] for name, state in states.items() if name.startswith("stage")}
    assert sides == {"stage1_block1": 8, "stage1_block2": 4, "stage2_block1": 4, "stage2_block2": 4}


def test_pool_has_a_border_of_zeros():
    rows = -np.arange(1.0, 17.0, dtype=np.float32).reshape(1, 4, 4, 1)
    padded = np.pad(rows[0, :, :, 0], 1)
    expected = [[padded[i : i + 3, j : j + 3].max() for j in (0, 2)] for i in (0, 2)]
    assert np.array_equal(pool_zeros(rows)[0, :, :, 0], expected)
    assert expected == [[0, 0], [0, -6]]


@pytest.mark.parametrize("name", ["v2", "bit"])
def test_zero_border_matters(name, monkeypatch):
    images = random_images((32, 32, 3))
    module = TINY[name]().clone(repeats=(1,))
    variables = random_variables(module, images.shape[1:])
    zeros = last(module, variables, images)
    for family in (resnet, bit):
        monkeypatch.setattr(family, "pool_zeros", lambda x: resnet.max_pool(x, 3, 2, 1))
    assert np.abs(last(module, variables, images) - zeros).max() > 1e-3 * np.ptp(zeros)


def test_standardised_kernel_has_mean_0_and_variance_1():
    kernel = np.random.default_rng(0).normal(2.0, 3.0, (3, 3, 4, 6)).astype(np.float32)
    each = np.eye(36, dtype=np.float32).reshape(36, 3, 3, 4)  # one input cell at a time gives the kernel back
    used = Conv(6, 3, padding="VALID", standardize=1e-10).apply({"params": {"kernel": kernel}}, each).reshape(36, 6)
    np.testing.assert_allclose(used.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(used.var(0), 1, rtol=1e-5)


def test_every_convolution_of_bit_is_standardised():
    images = random_images((32, 32, 3))
    module = TINY["bit"]().clone(repeats=(1,))
    variables = random_variables(module, images.shape[1:])
    moved = {
        "params": jax.tree_util.tree_map_with_path(
            lambda path, leaf: 3 * leaf + 0.5 if leaf.ndim == 4 else leaf, variables["params"]
        )
    }
    expected = last(module, variables, images)
    assert np.abs(last(module, moved, images) - expected).max() <= 1e-4 * np.ptp(expected)


def conv(name, size, inputs, features, bias=False):
    shapes = {f"{name}/kernel": (size, size, inputs, features)}
    return shapes | ({f"{name}/bias": (features,)} if bias else {})


def norm(name, features, leaves=("gamma", "beta", "moving_mean", "moving_variance")):
    return {f"{name}/{leaf}": (features,) for leaf in leaves}


def stages(repeats):
    """Yields stage, block, channels in, in the middle and out."""
    inputs = 64
    for stage, n in enumerate(repeats, 1):
        middle = 64 * 2 ** (stage - 1)
        for block in range(1, n + 1):
            yield stage, block, inputs, middle, 4 * middle
            inputs = 4 * middle


def keras_v1(repeats):
    names = conv("conv1_conv", 7, 3, 64, True) | norm("conv1_bn", 64)
    for stage, block, inputs, middle, out in stages(repeats):
        base = f"conv{stage + 1}_block{block}"
        branch = [(1, 1, inputs, middle), (2, 3, middle, middle), (3, 1, middle, out)]
        branch += [(0, 1, inputs, out)] if block == 1 else []
        for number, size, before, after in branch:
            names |= conv(f"{base}_{number}_conv", size, before, after, True) | norm(f"{base}_{number}_bn", after)
    return names | {"probs/kernel": (2048, 1000), "probs/bias": (1000,)}


def keras_v2(repeats):
    names = conv("conv1_conv", 7, 3, 64, True) | norm("post_bn", 2048)
    for stage, block, inputs, middle, out in stages(repeats):
        base = f"conv{stage + 1}_block{block}"
        names |= norm(f"{base}_preact_bn", inputs)
        names |= conv(f"{base}_0_conv", 1, inputs, out, True) if block == 1 else {}
        names |= conv(f"{base}_1_conv", 1, inputs, middle) | norm(f"{base}_1_bn", middle)
        names |= conv(f"{base}_2_conv", 3, middle, middle) | norm(f"{base}_2_bn", middle)
        names |= conv(f"{base}_3_conv", 1, middle, out, True)
    return names | {"predictions/kernel": (2048, 1000), "predictions/bias": (1000,)}


def torchvision(repeats):
    """Names with the shapes of Keras's layout: `as_torch` turns them."""
    names = {"conv1.weight": (7, 7, 3, 64)} | torch_norm("bn1", 64)
    for stage, block, inputs, middle, out in stages(repeats):
        base = f"layer{stage}.{block - 1}"
        for number, size, before, after in [(1, 1, inputs, middle), (2, 3, middle, middle), (3, 1, middle, out)]:
            names |= {f"{base}.conv{number}.weight": (size, size, before, after)}
            names |= torch_norm(f"{base}.bn{number}", after)
        if block == 1:
            names |= {f"{base}.downsample.0.weight": (1, 1, inputs, out)} | torch_norm(f"{base}.downsample.1", out)
    return names | {"fc.weight": (2048, 1000), "fc.bias": (1000,)}


def torch_norm(name, features):
    leaves = {f"{name}.{leaf}": (features,) for leaf in ("weight", "bias", "running_mean", "running_var")}
    return leaves | {f"{name}.num_batches_tracked": ()}


def released_bit(repeats):
    numbers = iter(range(1, 1000))  # some files number their scopes

    def std(name, *shape):
        return conv(f"{name}/standardized_conv2d_{next(numbers)}", *shape)

    group = partial(norm, leaves=("gamma", "beta"))
    names = conv("resnet/root_block/standardized_conv2d", 7, 3, 64) | group("resnet/group_norm", 2048)
    for stage, block, inputs, middle, out in stages(repeats):
        base = f"resnet/block{stage}/unit{block:02}"
        names |= group(f"{base}/a/group_norm", inputs) | std(f"{base}/a", 1, inputs, middle)
        names |= group(f"{base}/b/group_norm", middle) | std(f"{base}/b", 3, middle, middle)
        names |= group(f"{base}/c/group_norm_1", middle) | std(f"{base}/c", 1, middle, out)
        names |= std(f"{base}/a/proj", 1, inputs, out) if block == 1 else {}
    return names | conv("resnet/head/conv2d", 1, 2048, 1000, True)


def timm_bit(repeats):
    def group(name, features):
        return {f"{name}.weight": (features,), f"{name}.bias": (features,)}

    names = {"stem.conv.weight": (7, 7, 3, 64)} | group("norm", 2048)
    for stage, block, inputs, middle, out in stages(repeats):
        base = f"stages.{stage - 1}.blocks.{block - 1}"
        for number, size, before, after in [(1, 1, inputs, middle), (2, 3, middle, middle), (3, 1, middle, out)]:
            names |= group(f"{base}.norm{number}", before)
            names |= {f"{base}.conv{number}.weight": (size, size, before, after)}
        if block == 1:
            names |= {f"{base}.downsample.conv.weight": (1, 1, inputs, out)}
    return names | {"head.fc.weight": (1, 1, 2048, 1000), "head.fc.bias": (1000,)}


def as_torch(shape):
    return (shape[3], shape[2], *shape[:2]) if len(shape) == 4 else shape[::-1]


# name: rules, the file's names and shapes, how many arrays a real file has (num_batches_tracked not counted).
FILES = {
    "resnet50": (RULES["keras"], keras_v1, 320),
    "resnet50v2": (RULES["keras_v2"], keras_v2, 272),
    "resnet50_v15": (RULES["torchvision"], torchvision, 267),
    "bit_r50x1": (BIT_RULES["bit"], released_bit, 153),
    "bit_r50x1 of timm": (BIT_RULES["timm"], timm_bit, 153),
}


@pytest.mark.parametrize("case", FILES)
def test_rules_fill_every_leaf_once(case):
    rules, names, count = FILES[case]
    shapes = {name: as_torch(s) if rules.torch else s for name, s in names(resnet.R50).items()}
    tensors = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    leaves = convert(tensors, rules, shapes_of_variant(case.split()[0]))
    assert len(leaves) == count


@pytest.mark.parametrize("layout", ["keras", "keras_v2"])
def test_only_v1_files_have_bgr_kernels(layout):
    kernel = np.random.default_rng(0).normal(size=(7, 7, 3, 4)).astype(np.float32)
    leaves = convert({"conv1_conv/kernel": kernel}, RULES[layout], {"stem_conv/kernel": kernel.shape})
    expected = kernel[:, :, ::-1] if layout == "keras" else kernel
    assert np.array_equal(leaves["stem_conv/kernel"], expected)
