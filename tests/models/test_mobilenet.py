"""MobileNet V1, V2 and V3: sizes, what is easy to get wrong by hand, and rules for their weights."""

from collections import Counter
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lungjax.config import HeadConfig
from lungjax.models import mobilenetv3
from lungjax.models.mobilenet import MOBILENET, MOBILENETV2, Block, MobileNet, v2
from lungjax.models.mobilenetv3 import MOBILENETV3, MobileNetV3, Row
from lungjax.models.trees import flatten
from lungjax.weights.convert import arrange, target
from lungjax.weights.rules import mobilenet as rules_v1
from lungjax.weights.rules import mobilenetv2 as rules_v2
from lungjax.weights.rules import mobilenetv3 as rules_v3

V1 = MOBILENET["mobilenet"]
MODELS = {**MOBILENET, **MOBILENETV2, **MOBILENETV3}


@cache
def leaves(module):
    found = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, 64, 64, 3)), train=False))
    return {c: {path: leaf.shape for path, leaf in flatten(tree).items()} for c, tree in found.items()}


# Trainable parameters, and those with the running statistics: keras.applications.
@pytest.mark.parametrize(
    ("make", "trainable", "total"),
    [
        (V1, 4231976, 4253864),
        (partial(V1, width=0.75), 2585560, 2601976),
        (partial(V1, width=0.5), 1331592, 1342536),
        (partial(V1, width=0.25), 470072, 475544),
        (v2(1.4), 6108776, 6156712),
        (v2(1.3), 5386792, 5431048),
        (MOBILENETV2["mobilenetv2"], 3504872, 3538984),
        (v2(0.75), 2636424, 2663064),
        (v2(0.5), 1968680, 1987224),
        (v2(0.35), 1677128, 1691208),
        (MOBILENETV3["mobilenetv3_small"], 2542856, 2554968),
        (MOBILENETV3["mobilenetv3_large"], 5483032, 5507432),
    ],
)
def test_parameter_counts(make, trainable, total):
    found = leaves(make())
    sizes = {c: sum(int(np.prod(shape)) for shape in tree.values()) for c, tree in found.items()}
    assert sizes["params"] == trainable and sum(sizes.values()) == total


@pytest.mark.parametrize("name", MODELS)
def test_map_head_and_least_size(name):
    module = MODELS[name]()
    assert module.minimum_size() == (32, 32)
    assert module.clone(head=HeadConfig(pool="avg2x2_flatten")).minimum_size() == (64, 64)
    images = jax.ShapeDtypeStruct((1, 96, 160, 3), jnp.float32)
    (logits, features), _ = jax.eval_shape(lambda x: module.init_with_output(jax.random.key(0), x, train=False), images)
    top = {"mobilenet": 1024, "mobilenetv2": 1280, "mobilenetv3_small": 576, "mobilenetv3_large": 960}[name]
    assert features["last"].shape == (1, 3, 5, top) and logits.shape == (1, 1000)
    hidden = {"mobilenetv3_small": (1024,), "mobilenetv3_large": (1280,)}.get(name)
    assert module.head.hidden == hidden and module.head.activation == ("hard_swish" if hidden else None)


def test_stages_begin_where_the_map_or_the_width_changes():
    blocks = {name: Counter(path[:6] for path in leaves(make())["params"] if "bn/scale" in path and "_block" in path)
              for name, make in MODELS.items()}  # fmt: skip
    assert blocks["mobilenet"] == {"stage1": 2, "stage2": 4, "stage3": 4, "stage4": 12, "stage5": 4}
    # Three norms a block, two in the first.
    assert list(blocks["mobilenetv2"].values()) == [2, 6, 9, 12, 9, 9, 3]
    assert list(blocks["mobilenetv3_small"].values()) == [2, 6, 9, 6, 9]
    assert list(blocks["mobilenetv3_large"].values()) == [2, 6, 9, 12, 6, 9]


def plain_norm(channels, epsilon):
    """Parameters and statistics of a norm that changes nothing."""
    scale, shift = np.ones(channels, np.float32), np.zeros(channels, np.float32)
    return {"scale": scale, "bias": shift}, {"mean": shift, "var": scale - epsilon}


@pytest.mark.parametrize(
    ("side", "padding", "wanted"),
    [
        (5, "same", [[7, 9], [17, 19]]),  # (0, 1) puts the middle of the first window on row and column 1
        (5, "symmetric", [[1, 3, 5], [11, 13, 15], [21, 23, 25]]),
        (4, "same", [[6, 8], [14, 16]]),
        (4, "symmetric", [[1, 3], [9, 11]]),
    ],
)
def test_stride_two_of_v1_pads_below_and_right_whatever_the_size(side, padding, wanted):
    """The kernel takes the middle of its window from a map that counts its cells (SAME on 5 x 5 is symmetric)."""
    kernel = np.zeros((3, 3, 1, 2), np.float32)
    kernel[1, 1] = 0.1  # below ReLU6's cut
    norm, statistics = plain_norm(2, 1e-3)
    params = {"dwconv": {"kernel": kernel}, "dwconv_bn": norm, "bn": norm, "conv": {"kernel": np.eye(2)[None, None]}}
    block = Block(2, 2, momentum=0.9, epsilon=1e-3, padding=padding, dtype=jnp.float32)
    variables = {"params": params, "batch_stats": {"dwconv_bn": statistics, "bn": statistics}}
    x = np.repeat(np.arange(1.0, side**2 + 1).reshape(1, side, side, 1), 2, -1).astype(np.float32)
    np.testing.assert_allclose(10 * block.apply(variables, x, train=False)[0, ..., 1], wanted, rtol=1e-5)


def test_v1_cuts_at_six_after_each_norm():
    norm, statistics = plain_norm(2, 1e-3)
    block = Block(2, 1, momentum=0.9, epsilon=1e-3, padding="same", dtype=jnp.float32)
    params = {"dwconv": {"kernel": np.ones((3, 3, 1, 2))}, "dwconv_bn": norm, "bn": norm}
    variables = {
        "params": params | {"conv": {"kernel": np.diag([0.5, 2.0])[None, None]}},
        "batch_stats": {"dwconv_bn": statistics, "bn": statistics},
    }
    x = np.full((1, 1, 1, 2), 9, np.float32)
    np.testing.assert_allclose(block.apply(variables, x, train=False)[0, 0, 0], [3, 6], rtol=1e-5)


def test_hard_swish_and_hard_sigmoid_are_the_papers():
    x = jnp.array([-4.0, -3, -1, 0, 1, 3, 4])
    np.testing.assert_allclose(nn.hard_swish(x), [0, 0, -1 / 3, 0, 2 / 3, 3, 4], atol=1e-7)
    np.testing.assert_allclose(nn.hard_sigmoid(x), [0, 0, 1 / 3, 1 / 2, 2 / 3, 1, 1], atol=1e-7)


@pytest.mark.parametrize(
    ("activation", "wanted"),
    [
        # ReLU: 1, 0, 3, 1 have the mean 5/4; the gate is (5/4 - 1 + 3) / 6 = 13/24.
        (nn.relu, [[1 + 13 / 24, -1], [3 + 39 / 24, 1 + 13 / 24]]),
        # Hard swish: 2/3, -1/3, 3, 2/3 have the mean 1; the gate is 1/2.
        (nn.hard_swish, [[1 + 1 / 3, -1 - 1 / 6], [4.5, 1 + 1 / 3]]),
    ],
)
def test_a_block_of_v3_by_hand(activation, wanted):
    """Nothing expands, the depthwise kernel is 1, the gate's bias is -1, nothing is projected, the input is added."""
    row = Row(1, 1, 1, 1, activation)
    one, (norm, statistics) = np.ones((1, 1, 1, 1), np.float32), plain_norm(1, 1e-3)
    squeeze = {"reduce": {"kernel": one, "bias": np.zeros(1)}, "expand": {"kernel": one, "bias": -np.ones(1)}}
    params = {"dwconv": {"kernel": one}, "bn": norm, "se": squeeze, "project_conv": {"kernel": one}, "project_bn": norm}
    block = mobilenetv3.Block(row, momentum=0.9, epsilon=1e-3, padding="same", dtype=jnp.float32)
    variables = {"params": params, "batch_stats": {"bn": statistics, "project_bn": statistics}}
    x = np.array([[1, -1], [3, 1]], np.float32)[None, ..., None]
    np.testing.assert_allclose(block.apply(variables, x, train=False)[0, ..., 0], wanted, rtol=1e-5)


SHALLOW_V1 = MobileNet(((1, 8), (2, 12)), stem=4, outputs=3)
SHALLOW_V3 = MobileNetV3(
    ((Row(3, 4, 4, 4, nn.relu, 2),), (Row(5, 8, 0, 6, nn.hard_swish, 2), Row(3, 8, 4, 6, nn.hard_swish))),
    top=16,
    stem=4,
    head=HeadConfig(hidden=(8,), activation="hard_swish", hidden_dropout=0.2),
    outputs=3,
)


@pytest.mark.parametrize(("module", "units"), [(SHALLOW_V1, 3), (SHALLOW_V3, 3)], ids=["v1", "v3"])
def test_remat_and_bfloat16_leave_the_parameters_alone(module, units):
    other, images = module.clone(remat=True, dtype=jnp.bfloat16), jnp.zeros((1, 64, 64, 3))
    assert leaves(other) == leaves(module)
    variables = jax.eval_shape(lambda: other.init(jax.random.key(0), images, train=False))

    def run(variables):
        return other.apply(variables, images, train=True, rngs={"dropout": jax.random.key(0)}, mutable=["batch_stats"])

    (logits, features), new = jax.eval_shape(run, variables)
    assert logits.dtype == jnp.float32 and features["last"].dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves((variables, new))} == {jnp.dtype(jnp.float32)}
    assert str(jax.make_jaxpr(run)(variables)).count("remat2") == units


NORM = {"keras": ("gamma", "beta", "moving_mean", "moving_variance"),
        "torch": ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}  # fmt: skip


def spell(layers, torch, today=False):
    """Yields the tensors' names and dimensions; a layer is conv, bias (a convolution with one), dw, bn or dense."""
    for layer, kind in layers:
        if kind == "bn":
            yield from ((f"{layer}{'.' if torch else '/'}{leaf}", 1) for leaf in NORM["torch" if torch else "keras"])
        elif torch:
            yield f"{layer}.weight", 2 if kind == "dense" else 4
        else:
            yield f"{layer}/{'depthwise_kernel' if kind == 'dw' and not today else 'kernel'}", 4
        if kind in ("bias", "dense"):
            yield f"{layer}{'.' if torch else '/'}bias", 1


def v1_keras():
    yield from (("conv1", "conv"), ("conv1_bn", "bn"))
    for n in range(1, 14):
        yield from (
            (f"conv_dw_{n}", "dw"),
            (f"conv_dw_{n}_bn", "bn"),
            (f"conv_pw_{n}", "conv"),
            (f"conv_pw_{n}_bn", "bn"),
        )
    yield "conv_preds", "bias"


def v1_timm():
    yield from (("conv_stem", "conv"), ("bn1", "bn"), ("classifier", "dense"))
    for s, repeats in enumerate((1, 2, 2, 6, 2)):
        for i in range(repeats):
            b = f"blocks.{s}.{i}."
            yield from ((b + "conv_dw", "dw"), (b + "bn1", "bn"), (b + "conv_pw", "conv"), (b + "bn2", "bn"))


def v2_keras(today):
    yield from (("Conv1", "conv"), ("bn_Conv1", "bn"), ("Conv_1", "conv"), ("Conv_1_bn", "bn"))
    yield "predictions" if today else "Logits", "dense"
    for n in range(17):
        for kind in ("expand", "depthwise", "project")[n == 0 :]:
            now = f"block_{n}_{kind}" if n else f"expanded_conv_{kind}"
            yield now if today else f"mobl{n}_conv_{n}_{kind}", "dw" if kind == "depthwise" else "conv"
            yield now + "_BN" if today else f"bn{n}_conv_{n}_bn_{kind}", "bn"


def v2_torchvision():
    yield from (("features.0.0", "conv"), ("features.0.1", "bn"), ("features.18.0", "conv"), ("features.18.1", "bn"))
    yield "classifier.1", "dense"
    for n in range(1, 18):
        steps = ("0.0", "0.1", "1", "2") if n == 1 else ("0.0", "0.1", "1.0", "1.1", "2", "3")
        yield from ((f"features.{n}.conv.{step}", "bn" if i % 2 else "conv") for i, step in enumerate(steps))


def mbconv_timm(repeats, squeezed, last):
    """timm's names of V2 and V3; `squeezed` are blocks with squeeze-excite, counted through from 0."""
    yield from (("conv_stem", "conv"), ("bn1", "bn"), ("classifier", "dense"), *last)
    number = 0
    for s, count in enumerate(repeats):
        for i in range(count):
            names = ("conv_pw", "conv_dw", "conv_pwl") if s else ("conv_dw", "conv_pw")
            for j, name in enumerate(names, 1):
                yield from ((f"blocks.{s}.{i}.{name}", "conv"), (f"blocks.{s}.{i}.bn{j}", "bn"))
            if number in squeezed:
                yield from ((f"blocks.{s}.{i}.se.conv_{k}", "bias") for k in ("reduce", "expand"))
            number += 1


V3 = {  # blocks of each stage; those with squeeze-excite, counted through from 0
    "mobilenetv3_small": ((1, 2, 3, 2, 3), {0, 3, 4, 5, 6, 7, 8, 9, 10}),
    "mobilenetv3_large": ((1, 2, 3, 4, 2, 3), {3, 4, 5, 10, 11, 12, 13, 14}),
}


def v3_timm(name):
    repeats, squeezed = V3[name]
    last = f"blocks.{len(repeats)}.0."
    return mbconv_timm(repeats, squeezed, [(last + "conv", "conv"), (last + "bn1", "bn"), ("conv_head", "bias")])


def v3_keras(name, today):
    repeats, squeezed = V3[name]
    bn, slash = ("_bn", "_") if today else ("/BatchNorm", "/")
    conv = "conv" if today else "Conv"
    yield from (
        (conv, "conv"),
        (conv + bn, "bn"),
        (conv + "_1", "conv"),
        (f"{conv}_1{bn}", "bn"),
        (conv + "_2", "bias"),
    )
    yield "logits" if today else "Logits", "bias"
    for n in range(sum(repeats)):
        block = f"expanded_conv_{n}{slash}" if n else f"expanded_conv{slash}"
        for kind in ("expand", "depthwise", "project")[n == 0 :]:
            yield from ((block + kind, "dw" if kind == "depthwise" else "conv"), (block + kind + bn, "bn"))
        if n in squeezed:
            yield from ((f"{block}squeeze_excite{slash}{conv}{end}", "bias") for end in ("", "_1"))


def v3_torchvision(name):
    repeats, squeezed = V3[name]
    top = f"features.{sum(repeats) + 1}."
    yield from (("features.0.0", "conv"), ("features.0.1", "bn"), (top + "0", "conv"), (top + "1", "bn"))
    yield from (("classifier.0", "dense"), ("classifier.3", "dense"))
    for n in range(sum(repeats)):
        step = 0
        for kind in ("expand", "depthwise", "squeeze", "project"):
            block = f"features.{n + 1}.block.{step}."
            if (kind == "expand" and n == 0) or (kind == "squeeze" and n not in squeezed):
                continue
            yield from (
                ((block + "fc1", "bias"), (block + "fc2", "bias"))
                if kind == "squeeze"
                else ((block + "0", "conv"), (block + "1", "bn"))
            )
            step += 1


LISTS = {
    "mobilenet keras": (rules_v1.RULES["keras"], spell(v1_keras(), False), 137),
    "mobilenet keras today": (rules_v1.RULES["keras"], spell(v1_keras(), False, today=True), 137),
    "mobilenet timm": (rules_v1.RULES["timm"], spell(v1_timm(), True), 137 + 27),
    "mobilenetv2 keras": (rules_v2.RULES["keras"], spell(v2_keras(False), False), 262),
    "mobilenetv2 keras today": (rules_v2.RULES["keras"], spell(v2_keras(True), False, today=True), 262),
    "mobilenetv2 timm": (
        rules_v2.RULES["timm"],
        spell(mbconv_timm((1, 2, 3, 4, 3, 3, 1), (), [("conv_head", "conv"), ("bn2", "bn")]), True),
        262 + 52,
    ),
    "mobilenetv2 torchvision": (rules_v2.RULES["torchvision"], spell(v2_torchvision(), True), 262 + 52),
}
for _name, _count, _norms in (("mobilenetv3_small", 210, 34), ("mobilenetv3_large", 266, 46)):
    LISTS |= {
        f"{_name} keras": (rules_v3.RULES[f"keras_{_name}"], spell(v3_keras(_name, False), False), _count),
        f"{_name} keras today": (rules_v3.RULES[f"keras_{_name}"], spell(v3_keras(_name, True), False, True), _count),
        f"{_name} timm": (rules_v3.RULES[f"timm_{_name}"], spell(v3_timm(_name), True), _count + _norms),
        f"{_name} torchvision": (
            rules_v3.RULES[f"torchvision_{_name}"],
            spell(v3_torchvision(_name), True),
            _count + _norms,
        ),
    }


@pytest.mark.parametrize("case", LISTS)
def test_rules_fill_every_leaf_once(case):
    rules, tensors, arrays = LISTS[case]
    tensors = list(tensors)
    assert len(tensors) == arrays  # as many as in the published file
    paths = [target(name, rules, dimensions) for name, dimensions in tensors]
    found = leaves(MODELS[case.partition(" ")[0]]())
    assert Counter(path for path in paths if path != "") == Counter(
        found["params"].keys() | found["batch_stats"].keys()
    )


def test_both_names_of_keras_depthwise_kernels_are_turned():
    array = np.arange(18.0).reshape(3, 3, 2, 1)
    for leaf in ("kernel", "depthwise_kernel"):
        ours = arrange(array, f"conv_dw_1/{leaf}", "stage1_block1/dwconv/kernel", (3, 3, 1, 2), rules_v1.RULES["keras"])
        assert ours.shape == (3, 3, 1, 2) and ours[1, 2, 0].tolist() == array[1, 2, :, 0].tolist()
