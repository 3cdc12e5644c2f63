"""DenseNet against numpy written from the paper; parameter counts; rules on names as the files have them."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_weights import random_images, random_variables

from lungjax.models.densenet import DENSENET, DenseNet
from lungjax.models.trees import flatten
from lungjax.weights.convert import convert, target
from lungjax.weights.rules.densenet import RULES

# With 1000 classes: trainable, and with running statistics. Keras; torchvision for 161.
PARAMETERS = {
    "densenet121": (7978856, 8062504),
    "densenet161": (28681000, 28900936),
    "densenet169": (14149480, 14307880),
    "densenet201": (20013928, 20242984),
}
DEPTHS, GROWTH = (2, 1), 4


def tiny():
    return DenseNet(DEPTHS, GROWTH, outputs=5)


def apply(module, values, images):
    return jax.jit(lambda v, x: module.apply(v, x, train=False))(values, images)


def conv(x, kernel, stride=1, pad=0):
    k = kernel.shape[0]
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    h, w = (x.shape[1] - k) // stride + 1, (x.shape[2] - k) // stride + 1
    rows, columns = stride * (h - 1) + 1, stride * (w - 1) + 1
    return sum(x[:, i : i + rows : stride, j : j + columns : stride] @ kernel[i, j] for i in range(k) for j in range(k))


def norm_relu(x, p, s):
    return np.maximum((x - s["mean"]) / np.sqrt(s["var"] + 1.001e-5) * p["scale"] + p["bias"], 0)


def pool(x, k, pad, reduce):
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)), constant_values=-np.inf)
    h, w = (x.shape[1] - k) // 2 + 1, (x.shape[2] - k) // 2 + 1
    taps = [x[:, i : i + 2 * h - 1 : 2, j : j + 2 * w - 1 : 2] for i in range(k) for j in range(k)]
    return reduce(np.stack(taps), 0)


def reference(p, s, images):
    x = norm_relu(conv(images, p["stem_conv"]["kernel"], 2, 3), p["stem_bn"], s["stem_bn"])
    x = pool(x, 3, 1, np.max)
    for stage, depth in enumerate(DEPTHS, 1):
        for i in range(1, depth + 1):
            q, r = p[f"stage{stage}_block{i}"], s[f"stage{stage}_block{i}"]
            y = conv(norm_relu(x, q["bn1"], r["bn1"]), q["conv1"]["kernel"])
            y = conv(norm_relu(y, q["bn2"], r["bn2"]), q["conv2"]["kernel"], 1, 1)
            x = np.concatenate([x, y], -1)
        if stage < len(DEPTHS):
            q, r = p[f"stage{stage}_transition"], s[f"stage{stage}_transition"]
            x = pool(conv(norm_relu(x, q["bn"], r["bn"]), q["conv"]["kernel"]), 2, 0, np.mean)
    x = norm_relu(x, p["top_bn"], s["top_bn"])
    return x.mean((1, 2)) @ p["head"]["dense"]["kernel"] + p["head"]["dense"]["bias"], x


@pytest.mark.parametrize("size", [(32, 48), (43, 37)])
def test_equals_numpy_at_even_and_odd_sizes(size):
    module, images = tiny(), random_images((*size, 3))
    values = random_variables(module, (32, 32, 3))
    logits, features = apply(module, values, images)
    wide = jax.tree.map(np.float64, values)
    expected, last = reference(wide["params"], wide["batch_stats"], np.float64(images))
    bound = 1e-5 * np.ptp(expected[0] - expected[1])
    assert np.abs(logits - expected).max() <= bound
    assert features["last"].shape == last.shape
    np.testing.assert_allclose(features["last"], last, atol=1e-5 * last.max())
    swapped = reference(wide["params"], jax.tree.map(np.flip, wide["batch_stats"]), np.float64(images))[0]
    assert np.abs(logits - swapped).max() > 100 * bound


@pytest.mark.parametrize("name", DENSENET)
def test_parameter_counts(name):
    module = DENSENET[name]()
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False))
    trainable, everything = (sum(math.prod(v.shape) for v in jax.tree.leaves(t)) for t in (shapes["params"], shapes))
    assert (trainable, everything) == PARAMETERS[name]


def test_batch_norm_is_that_of_the_usual_weights():
    assert {name: (n().epsilon, n().momentum) for name, n in DENSENET.items()} == {
        "densenet121": (1.001e-5, 0.99),
        "densenet161": (1e-5, 0.9),
        "densenet169": (1.001e-5, 0.99),
        "densenet201": (1.001e-5, 0.99),
    }


def training(module, values, images):
    """Returns gradients and new statistics of a training step's loss."""

    def loss(params):
        (logits, _), new = module.apply({**values, "params": params}, images, train=True, mutable=["batch_stats"])
        return (logits**2).sum(), new["batch_stats"]

    gradients, statistics = jax.jit(jax.grad(loss, has_aux=True))(values["params"])
    return flatten(gradients), flatten(statistics)


def test_recomputing_layers_changes_no_gradient_and_no_statistics():
    module, images = DenseNet((1, 1), GROWTH, outputs=5), random_images((32, 32, 3))
    values = random_variables(module, (32, 32, 3))
    plain, recomputed = training(module, values, images), training(module.clone(remat=True), values, images)
    assert plain[0]["stage1_block1/conv1/kernel"].any()
    for one, other in zip(plain, recomputed, strict=True):
        for path, value in one.items():
            # Batch norm cancels most of a gradient below it; what is left has fewer exact digits.
            np.testing.assert_allclose(other[path], value, atol=1e-2 * np.abs(value).max(), err_msg=path)
    for path, value in flatten(values["batch_stats"]).items():
        assert not np.array_equal(plain[1][path], value)


def test_half_precision_stays_close():
    module, images = DenseNet((1, 1), GROWTH, outputs=5), random_images((32, 32, 3))
    values = random_variables(module, (32, 32, 3))
    logits, features = apply(module.clone(dtype=jnp.bfloat16), values, images)
    expected, _ = apply(module, values, images)
    assert features["last"].dtype == jnp.bfloat16 and logits.dtype == jnp.float32
    assert np.abs(logits - expected).max() < 0.05 * np.ptp(expected)


def test_least_size():
    module = DENSENET["densenet121"]()
    assert module.minimum_size() == (32, 32)
    with pytest.raises(ValueError, match="at least 32 x 32"):
        module.init(jax.random.key(0), jnp.zeros((1, 32, 31, 3)), train=False)


# Layer names by our unit; s and i count from 1, as in torch; k is Keras's number of the stage.
TORCH = {
    "stem_conv": "features.conv0",
    "stem_bn": "features.norm0",
    "bn1": "features.denseblock{s}.denselayer{i}.norm{dot}1",
    "conv1": "features.denseblock{s}.denselayer{i}.conv{dot}1",
    "bn2": "features.denseblock{s}.denselayer{i}.norm{dot}2",
    "conv2": "features.denseblock{s}.denselayer{i}.conv{dot}2",
    "transition/bn": "features.transition{s}.norm",
    "transition/conv": "features.transition{s}.conv",
    "top_bn": "features.norm5",
    "head/dense": "classifier",
}
KERAS = {
    "stem_conv": "conv1{dot}conv",
    "stem_bn": "conv1{dot}bn",
    "bn1": "conv{k}_block{i}_0_bn",
    "conv1": "conv{k}_block{i}_1_conv",
    "bn2": "conv{k}_block{i}_1_bn",
    "conv2": "conv{k}_block{i}_2_conv",
    "transition/bn": "pool{k}_bn",
    "transition/conv": "pool{k}_conv",
    "top_bn": "bn",
    "head/dense": "{head}",
}
KERAS_LEAVES = {"scale": "gamma", "mean": "moving_mean", "var": "moving_variance", "kernel": "kernel"}
TORCH_LEAVES = {"scale": "weight", "mean": "running_mean", "var": "running_var", "kernel": "weight", "bias": "bias"}


def in_file(path, value, layout, **words):
    """Returns name and array of our leaf as a file of `layout` has them."""
    unit, _, leaf = path.rpartition("/")
    where = re.fullmatch(r"stage(\d)_(?:block(\d+)/|(?=transition))(.*)", unit)
    stage, i, unit = (int(where[1]), int(where[2] or 1), where[3]) if where else (0, 0, unit)
    name = (TORCH if layout == "torchvision" else KERAS)[unit].format(s=stage, i=i, k=stage + 1, **words)
    if layout == "keras":
        return f"{name}/{KERAS_LEAVES.get(leaf, 'beta' if unit != 'head/dense' else 'bias')}", value
    return f"{name}.{TORCH_LEAVES[leaf]}", value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        ("torchvision", {"dot": ""}),
        ("torchvision", {"dot": "."}),
        ("keras", {"dot": "/", "head": "fc1000"}),  # the released files
        ("keras", {"dot": "_", "head": "predictions"}),  # Keras today
    ],
)
def test_rules_fill_every_leaf(layout, words):
    values = random_variables(DenseNet((1, 2, 11), GROWTH, outputs=5), (32, 32, 3))
    leaves = {path.partition("/")[2]: value for path, value in flatten(values).items()}
    file = dict(in_file(path, value, layout, **words) for path, value in leaves.items())
    assert len(file) == len(leaves)
    found = convert(file, RULES[layout], {path: value.shape for path, value in leaves.items()})
    for path, value in leaves.items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)


def test_names_of_the_deep_stages():
    name = "features.denseblock4.denselayer16.norm.2.running_var"
    assert target(name, RULES["torchvision"], 1) == "stage4_block16/bn2/var"
    assert target("conv5_block16_1_bn/moving_variance", RULES["keras"], 1) == "stage4_block16/bn2/var"
    assert target("conv5_block16_3_bn/gamma", RULES["keras"], 1) is None
