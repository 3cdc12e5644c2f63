"""VGG and the X-ray study's network: sizes, maps by hand, and rules for their weights."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lungjax.config import HeadConfig
from lungjax.models.trees import flatten
from lungjax.models.vgg import VGG, Vgg
from lungjax.models.xray_cnn import XRAY, XrayCNN
from lungjax.weights.convert import arrange, target
from lungjax.weights.rules.vgg import RULES

# Convolutions in torch's numbering of layers.
INDICES = {
    "vgg16": (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28),
    "vgg19": (0, 2, 5, 7, 10, 12, 14, 16, 19, 21, 23, 25, 28, 30, 32, 34),
}
REPEATS = {"vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}


def shapes(module, size):
    found = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, *size)), train=False))
    return {path: leaf.shape for path, leaf in flatten(found["params"]).items()}


def count(shapes):
    return sum(int(np.prod(shape)) for shape in shapes.values())


@pytest.mark.parametrize(("name", "parameters"), [("vgg16", 138357544), ("vgg19", 143667240)])
def test_parameter_counts(name, parameters):
    assert count(shapes(VGG[name](), (224, 224, 3))) == parameters


def test_xray_cnn_has_the_studys_parameters():
    module = XRAY["xray_cnn"](outputs=1)
    found = shapes(module, (256, 256, 3))
    assert count(found) == 422177
    assert found["stem_conv/kernel"] == (3, 3, 3, 64) and found["stage2_conv/kernel"] == (3, 3, 64, 32)
    assert found["head/hidden1/kernel"] == (7 * 7 * 32, 256) and found["head/dense/kernel"] == (256, 1)
    assert shapes(module, (265, 256, 3)) == found  # the study's slip: 265 rows give the same maps


@pytest.mark.parametrize("module", [VGG["vgg16"](), XRAY["xray_cnn"]()], ids=["vgg16", "xray_cnn"])
@pytest.mark.parametrize(("pool", "cells"), [("flatten", 1), ("avg2x2_flatten", 2)])
def test_least_size_leaves_one_cell_for_each_of_the_head(module, pool, cells):
    module = module.clone(head=HeadConfig(pool=pool), outputs=3)
    side = module.minimum_size()[0]

    def last(height, width):
        images = jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32)
        found = jax.eval_shape(lambda x: module.init_with_output(jax.random.key(0), x, train=False)[0], images)
        return found[1]["last"].shape

    assert last(side, side)[1:3] == (cells, cells)
    with pytest.raises(ValueError, match=rf"{side - 1} x {side} pixels"):
        last(side - 1, side)


def test_a_vgg_by_hand():
    """The kernel takes the cell to the right and adds 1, ReLU cuts, the pool takes the largest, flat row by row."""
    module = Vgg((1,), (1,), head=HeadConfig(pool="flatten"), outputs=2)
    kernel = np.zeros((3, 3, 1, 1), np.float32)
    kernel[1, 2] = 1
    conv = {"kernel": kernel, "bias": np.ones(1, np.float32)}
    dense = {"kernel": np.array([[1, 0], [0, 1], [10, 0], [0, 10]], np.float32), "bias": np.zeros(2, np.float32)}
    variables = {"params": {"stage1_block1": {"conv": conv}, "head": {"dense": dense}}}
    # Shifted left, plus 1: [3 -8 -8 1 | 6 1 8 1 | 1 2 1 1 | 1 1 9 1]; a fifth column or row has no pool of its own.
    images = np.array([[1, 2, -9, -9], [0, 5, 0, 7], [3, 0, 1, 0], [0, 0, 0, 8]], np.float32)
    logits, features = module.apply(variables, images[None, ..., None], train=False)
    assert features["last"][0, ..., 0].tolist() == [[6, 8], [2, 9]]
    assert logits.tolist() == [[26, 98]]
    wide = np.pad(images, ((0, 1), (0, 1)))
    assert module.apply(variables, wide[None, ..., None], train=False)[1]["last"].shape == (1, 2, 2, 1)


@pytest.mark.parametrize(("module", "units"), [(Vgg((1, 2), (4, 8)), 3), (XrayCNN((4, 8)), 2)], ids=["vgg", "xray_cnn"])
def test_remat_and_bfloat16_leave_the_parameters_alone(module, units):
    module = module.clone(head=HeadConfig(pool="avg"), outputs=2)
    other = module.clone(remat=True, dtype=jnp.bfloat16)
    assert shapes(other, (40, 40, 3)) == shapes(module, (40, 40, 3))
    images = jnp.zeros((1, 40, 40, 3))
    variables = jax.eval_shape(lambda: other.init(jax.random.key(0), images, train=False))
    logits, features = jax.eval_shape(lambda v: other.apply(v, images, train=True), variables)
    assert logits.dtype == jnp.float32 and features["last"].dtype == jnp.bfloat16
    assert str(jax.make_jaxpr(lambda v: other.apply(v, images, train=True))(variables)).count("remat2") == units


def test_xray_cnn_drops_only_in_training_and_where_asked():
    images = np.random.default_rng(0).normal(size=(2, 40, 40, 3)).astype(np.float32)
    module = XrayCNN((4, 8), head=HeadConfig(pool="avg"), outputs=1)
    variables = module.init(jax.random.key(0), images, train=False)

    def last(dropout, train):
        rngs = {"dropout": jax.random.key(1)}
        return np.asarray(module.clone(dropout=dropout).apply(variables, images, train=train, rngs=rngs)[1]["last"])

    still = last(0.0, False)
    np.testing.assert_array_equal(last(0.0, True), still)
    np.testing.assert_array_equal(last(0.5, False), still)
    assert (last(0.5, True)[still > 0] == 0).mean() > 0.25


def names(layout, model):
    blocks = [(s, i) for s, repeats in enumerate(REPEATS[model], 1) for i in range(1, repeats + 1)]
    if layout.startswith("keras"):
        layers = [f"block{s}_conv{i}" for s, i in blocks] + ["fc1", "fc2", "predictions"]
        if layout == "keras today":
            return [f"{layer}/{leaf}" for layer in layers for leaf in ("kernel", "bias")]
        return [f"{layer}/{layer}_{leaf}_1" for layer in layers for leaf in "Wb"]
    tail = {
        "torchvision": ["classifier.0", "classifier.3", "classifier.6"],
        "timm": ["pre_logits.fc1", "pre_logits.fc2", "head.fc"],
    }[layout]
    layers = [f"features.{index}" for index in INDICES[model]] + tail
    return [f"{layer}.{leaf}" for layer in layers for leaf in ("weight", "bias")]


@pytest.mark.parametrize("model", VGG)
@pytest.mark.parametrize("layout", ["keras", "keras today", "torchvision", "timm"])
def test_rules_fill_every_leaf_once_and_in_order(layout, model):
    rules = RULES["keras" if layout.startswith("keras") else f"{layout}_{model}"]
    paths = [target(name, rules, 1 if name.endswith("bias") else 4) for name in names(layout, model)]
    wanted = shapes(VGG[model](), (224, 224, 3))
    assert Counter(paths) == Counter(wanted.keys())
    order = [path for path in paths if path.endswith("kernel")]
    assert order == sorted(order, key=lambda path: (path.startswith("head"), path.startswith("head/dense"), path))


def test_kernels_that_meet_a_flat_map_or_blue_first():
    shape = (7 * 7 * 512, 2)
    array = np.arange(2 * 512 * 49, dtype=np.float32).reshape(2, 512, 7, 7)
    # Row (h * 7 + w) * 512 + c of ours is what torch multiplies with channel c of cell (h, w).
    for form in (array, array.reshape(2, -1)):  # timm's and torchvision's
        ours = arrange(form, "classifier.0.weight", "head/hidden1/kernel", shape, RULES["torchvision_vgg16"])
        assert ours.shape == shape
        for o, c, h, w in ((0, 0, 0, 0), (0, 1, 0, 0), (1, 511, 6, 5), (1, 3, 2, 4)):
            assert ours[(h * 7 + w) * 512 + c, o] == array[o, c, h, w]
    first = np.arange(27.0).reshape(3, 3, 3, 1)
    ours = arrange(first, "block1_conv1/kernel", "stage1_block1/conv/kernel", first.shape, RULES["keras"])
    assert ours[0, 0, :, 0].tolist() == [2, 1, 0]
