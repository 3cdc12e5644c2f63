"""One table over all networks by shapes alone, and behaviour on one shallow variant of each family."""

import dataclasses
import re
from functools import cache, partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from random_weights import random_images, random_variables

from lungjax import models
from lungjax.config import HeadConfig, ModelConfig, OptimConfig
from lungjax.models import layers
from lungjax.models.efficientnet import EfficientNet, Stage
from lungjax.models.head import Head
from lungjax.models.layers import BatchNorm, Conv, DropPath
from lungjax.models.ops import conv
from lungjax.models.transfusion import Transfusion
from lungjax.models.trees import flatten
from lungjax.training.optim import frozen_paths
from lungjax.training.step import frozen_batch_norm

# name: image channels, classes, trainable parameters, those with BatchNorm statistics, last map of 128 x 160
# (cbr_larget: of 256 x 330, below), least side.
# CBR and Simple: arithmetic of the papers' layers. Others: keras.applications, torchvision, timm and the papers' code
# (BatchNorm statistics are two numbers for each of its channels).
TABLE = {
    "cbr_larget": (1, 3, 8536003, 8537987, None, 217),
    "cbr_largew": (1, 3, 8437123, 8439043, (1, 3, 512), 121),
    "cbr_small": (1, 3, 2111171, 2112131, (1, 3, 256), 121),
    "cbr_tiny": (1, 3, 4306819, 4308739, (3, 5, 512), 91),
    "cbr_larget_study": (1, 3, 4306819, 4308739, (3, 5, 512), 91),
    "simple": (1, 3, 25475, 25475, (14, 18, 64), 22),
    "efficientnet_b0": (3, 1000, 5288548, 5330564, (4, 5, 1280), 32),
    "efficientnet_b1": (3, 1000, 7794184, 7856232, (4, 5, 1280), 32),
    "efficientnet_b2": (3, 1000, 9109994, 9177562, (4, 5, 1408), 32),
    "efficientnet_b3": (3, 1000, 12233232, 12320528, (4, 5, 1536), 32),
    "efficientnet_b4": (3, 1000, 19341616, 19466816, (4, 5, 1792), 32),
    "efficientnet_b5": (3, 1000, 30389784, 30562520, (4, 5, 2048), 32),
    "efficientnet_b6": (3, 1000, 43040704, 43265136, (4, 5, 2304), 32),
    "efficientnet_b7": (3, 1000, 66347960, 66658680, (4, 5, 2560), 32),
    "efficientnet_lite0": (3, 1000, 4652008, None, (4, 5, 1280), 32),
    "efficientnet_lite1": (3, 1000, 5416680, None, (4, 5, 1280), 32),
    "efficientnet_lite2": (3, 1000, 6092072, None, (4, 5, 1280), 32),
    "efficientnet_lite3": (3, 1000, 8197096, None, (4, 5, 1280), 32),
    "efficientnet_lite4": (3, 1000, 13006568, None, (4, 5, 1280), 32),
    "efficientnetv2_b0": (3, 1000, 7139704, 7200312, (4, 5, 1280), 32),
    "efficientnetv2_b1": (3, 1000, 8141052, 8212124, (4, 5, 1280), 32),
    "efficientnetv2_b2": (3, 1000, 10096086, 10178374, (4, 5, 1408), 32),
    "efficientnetv2_b3": (3, 1000, 14358406, 14467622, (4, 5, 1536), 32),
    "efficientnetv2_s": (3, 1000, 21458488, 21612360, (4, 5, 1280), 32),
    "efficientnetv2_m": (3, 1000, 54139356, 54431388, (4, 5, 1280), 32),
    "efficientnetv2_l": (3, 1000, 118515272, 119027848, (4, 5, 1280), 32),
    "efficientnetv2_xl": (3, 1000, 208119808, 208896832, (4, 5, 1280), 32),
}
NAMES = re.compile(r"stem_(conv|bn|norm)|stage\d+_(block\d+|downsample|transition|conv|bn)|top_(conv|bn|norm)|head")
# Every kind of block and branch that the real variants have, in few layers.
SHALLOW_CBR = partial(Transfusion, 5, (8, 12), padding="same", last_pool=False)
SHALLOW_EFFICIENTNET = partial(
    EfficientNet,
    stages=(
        Stage(True, 1, 8, 1, 1),
        Stage(True, 1, 12, 4, 2),
        Stage(False, 2, 16, 4, 2, squeeze=0.25),
    ),
    stem=8,
    top=32,
    momentum=0.9,
)


@pytest.fixture(autouse=True)
def shallow(monkeypatch):
    monkeypatch.setitem(models.MODELS, "shallow_cbr", SHALLOW_CBR)
    monkeypatch.setitem(models.MODELS, "shallow_efficientnet", SHALLOW_EFFICIENTNET)


def count(tree) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def shapes(module, image_shape, batch=2):
    """Variables, logits and features as shapes: nothing is computed."""

    def run(images):
        (logits, features), variables = module.init_with_output(jax.random.key(0), images, train=False)
        return variables, logits, features

    return jax.eval_shape(run, jax.ShapeDtypeStruct((batch, *image_shape), jnp.float32))


def last_map(module, height, width, channels=1):
    return shapes(module, (height, width, channels))[2]["last"].shape[1:]


@pytest.mark.parametrize("family", ["transfusion", "efficientnet", "efficientnetv2"])
def test_the_table_names_every_network(family):
    """Of these families; the others have theirs beside the tests of their own."""
    assert set(models.FAMILIES[family]) <= set(TABLE)


@cache
@mock.patch.object(layers, "depthwise_conv", conv.plain_depthwise)  # the same shapes, traced far sooner
def table_shapes(name):
    channels, classes, _, _, last, _ = TABLE[name]
    return shapes(models.build(ModelConfig(name=name), classes), (*((128, 160) if last else (256, 330)), channels))


@cache
@mock.patch.object(layers, "depthwise_conv", conv.plain_depthwise)
def parameters(name):
    """Shapes of a network's parameters: of the table's trace where there is one, for a second trace costs a second."""
    if name in TABLE:
        return table_shapes(name)[0]["params"]
    config = ModelConfig(name=name)
    return shapes(models.build(config, 3), (*models.minimum_size(config), 3), batch=1)[0]["params"]


@pytest.mark.parametrize("name", list(models.MODELS))
def test_names_follow_the_convention_that_tuning_goes_by(name):
    """Also: any class count, and every network can be tuned by its head alone, its last block and its last stage."""
    assert models.build(ModelConfig(name=name), 3).outputs == 3
    assert name in models.FAMILIES[models.family_of(name)]
    params = parameters(name)
    assert [part for part in params if not NAMES.fullmatch(part)] == []
    assert params["head"]["dense"]["kernel"].shape[-1] == (TABLE[name][1] if name in TABLE else 3)
    paths = set(flatten(params))
    head = {path for path in paths if path.startswith("head/")}
    assert head and paths - frozen_paths(OptimConfig(tune="head"), params) == head
    block = paths - frozen_paths(OptimConfig(tune="blocks:1"), params)
    stage = paths - frozen_paths(OptimConfig(tune="stages:1"), params)
    assert head < block <= stage < paths
    stages = {int(found[1]) for found in map(re.compile(r"stage(\d+)_").match, paths) if found}
    assert stages == set(range(min(stages), max(stages) + 1)) and min(stages) in (1, 2)
    assert all(path.startswith(f"stage{max(stages)}_") == (path in stage) for path in paths if path.startswith("stage"))


@pytest.mark.parametrize("name", TABLE)
def test_shapes_and_parameter_counts(name):
    _, classes, trainable, total, last, least = TABLE[name]
    config = ModelConfig(name=name)
    variables, logits, features = table_shapes(name)
    assert count(variables["params"]) == trainable and total in (None, count(variables))
    assert logits.shape == (2, classes) and logits.dtype == jnp.float32
    assert features["last"].shape == (2, *(last or (3, 8, 512)))
    assert {"stem_conv", "head"} < set(variables["params"]) and "dense" in variables["params"]["head"]
    assert models.minimum_size(config) == (least, least)


@pytest.mark.parametrize("name", ["cbr_larget", "cbr_small", "cbr_tiny", "simple", "efficientnetv2_b0"])
@pytest.mark.parametrize("padding", [None, "same"])
@pytest.mark.parametrize("pool", [None, "avg2x2_flatten"])
def test_minimum_size_works_and_one_pixel_less_does_not(name, padding, pool):
    if padding and name.startswith("efficientnet"):
        padding = None
    config = ModelConfig(name=name, padding=padding, head=HeadConfig(pool=pool))
    module = models.build(config, 3)
    height, width = models.minimum_size(config)
    cells = 2 if pool else 1
    assert last_map(module, height, width)[:2] == (cells, cells)
    for size in ((height - 1, width), (height, width - 1)):
        with pytest.raises(ValueError, match=f"{size[0]} x {size[1]} pixels.*at least {height} x {width}"):
            last_map(module, *size)


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("cbr_tiny", (512, 512), (27, 27)),
        ("cbr_tiny", (328, 512), (15, 27)),
        ("cbr_larget_study", (256, 330), (11, 15)),
        ("cbr_small", (512, 512), (25, 25)),
        ("cbr_largew", (328, 512), (13, 25)),
        ("cbr_small", (256, 330), (9, 14)),
        ("simple", (512, 512), (62, 62)),
    ],
)
def test_maps_of_the_ct_cov19_study(name, size, expected):
    assert last_map(models.build(ModelConfig(name=name), 3), *size)[:2] == expected


def test_same_padding_halves_the_map_at_each_pool():
    module = models.build(ModelConfig(name="cbr_small", padding="same"), 3)
    assert last_map(module, 96, 80) == (6, 5, 256)


def test_head_takes_the_map_alone():
    """What Grad-CAM does: the head by itself on features["last"] gives the network's own logits."""
    module = models.build(ModelConfig(name="simple"), 3)
    variables = random_variables(module, (30, 30, 1))
    logits, features = module.apply(variables, random_images((30, 30, 1)), train=False)
    head = Head(module.head, module.outputs)
    again = head.apply({"params": variables["params"]["head"]}, features["last"], train=False)
    np.testing.assert_allclose(again, logits, rtol=1e-6)


def test_published_head_stays_where_the_configuration_says_nothing():
    simple = models.build(ModelConfig(name="simple", head=HeadConfig(dropout=0.1)), 3)
    assert (simple.head.pool, simple.head.hidden, simple.head.dropout) == ("max", (32,), 0.1)
    assert models.build(ModelConfig(name="efficientnetv2_b0"), 3).head.dropout == 0.2
    replaced = models.build(ModelConfig(name="simple", head=HeadConfig(pool="avg", hidden=())), 3)
    assert (replaced.head.pool, replaced.head.hidden) == ("avg", ())


@pytest.mark.parametrize("name", ["simple", "shallow_efficientnet"])
@pytest.mark.parametrize("classes", [2, 3, 5])
def test_class_counts(name, classes):
    assert shapes(models.build(ModelConfig(name=name), classes), (40, 40, 1))[1].shape == (2, classes)


def test_sigmoid_gives_one_logit_for_two_classes_only():
    config = ModelConfig(name="simple", head=HeadConfig(output="sigmoid", positive_class="covid"))
    assert shapes(models.build(config, 2), (40, 40, 1))[1].shape == (2, 1)
    with pytest.raises(ValueError, match=r"sigmoid is for two classes, the data set has 3"):
        models.build(config, 3)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ModelConfig(name="efficentnetv2_s"), "'efficentnetv2_s'.*efficientnetv2_s"),
        (ModelConfig(name="efficientnetv2_b0", padding="valid"), "model.padding='valid'.*efficientnetv2_b0.*same"),
        (ModelConfig(name="vgg16", padding="same"), "model.padding='same'.*vgg16"),
        (ModelConfig(name="cbr_tiny", drop_path=0.1), "model.drop_path=0.1.*cbr_tiny"),
        (ModelConfig(dtype="float16"), "model.dtype='float16'.*bfloat16"),
    ],
)
def test_what_a_network_does_not_have_is_named(config, message):
    with pytest.raises(ValueError, match=message):
        models.build(config, 3)
    with pytest.raises(ValueError, match=message):
        models.minimum_size(config)


def test_one_class_is_no_classification():
    with pytest.raises(ValueError, match="at least 2"):
        models.build(ModelConfig(), 1)


def test_equal_builds_share_one_compiled_program():
    config = ModelConfig(name="efficientnetv2_s")
    traces = []

    @partial(jax.jit, static_argnums=0)
    def run(module, images):
        traces.append(1)
        return images

    for _ in range(2):
        run(models.build(config, 3), jnp.ones(1))
    run(models.build(config, 4), jnp.ones(1))
    assert len(traces) == 2


FAMILIES = {  # name: configuration, image shape
    "shallow_cbr": (ModelConfig(name="shallow_cbr"), (18, 17, 1)),
    "shallow_efficientnet": (ModelConfig(name="shallow_efficientnet", drop_path=0.5), (19, 16, 3)),
}


def make_loss(name, dtype="float32", remat=False, train=True):
    """Random variables, and a loss of their parameters with (logits, features, updates) beside it."""
    config, shape = FAMILIES[name]
    module = models.build(dataclasses.replace(config, dtype=dtype), 3, remat=remat)
    variables, images = random_variables(module, shape), random_images(shape)

    def loss_fn(params):
        (logits, features), updates = module.apply(
            {**variables, "params": params},
            images,
            train=train,
            rngs={"dropout": jax.random.key(1)},
            mutable=["batch_stats"],
        )
        return jnp.square(logits - 1.0).mean(), (logits, features, updates)

    return variables, loss_fn


@cache
def step(name, **options):
    """Variables, gradients, (logits, features, updates): compiled once for all tests that look at them."""
    variables, loss_fn = make_loss(name, **options)
    return variables, *jax.jit(jax.grad(loss_fn, has_aux=True))(variables["params"])


@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_reaches_every_parameter(name):
    # In training a bias before BatchNorm has no gradient and a drop path may be closed, so: as in evaluation.
    grads = flatten(step(name, train=False)[1])
    assert [path for path, grad in grads.items() if not np.any(grad)] == []
    assert all(np.isfinite(grad).all() for grad in grads.values())


@pytest.mark.parametrize("name", FAMILIES)
def test_training_changes_statistics_by_the_network_s_decay(name):
    variables, _, (_, _, updates) = step(name)
    old, new = flatten(variables["batch_stats"]), flatten(updates["batch_stats"])
    assert set(old) == set(new)
    assert all(np.any(old[path] != new[path]) for path in old)
    # new = decay * old + (1 - decay) * batch, and a batch's variance is not negative
    decay = {"shallow_cbr": 0.99, "shallow_efficientnet": 0.9}[name]
    variances = [new[path] / old[path] for path in old if path.endswith("var")]
    assert all(np.all(ratio >= decay - 1e-6) for ratio in variances)
    assert min(ratio.min() for ratio in variances) < decay + 0.005


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_evaluation_and_frozen_norms_keep_statistics(name, frozen):
    config, shape = FAMILIES[name]
    head = HeadConfig(norm_before_pool="batch", norm_after_pool="batch")
    module = models.build(dataclasses.replace(config, head=head), 3)
    variables = random_variables(module, shape)

    def run(train):
        with frozen_batch_norm("frozen" if frozen else "update", frozenset()):
            return module.apply(
                variables,
                random_images(shape),
                train=train,
                rngs={"dropout": jax.random.key(0)},
                mutable=["batch_stats"],
            )

    (_, features), updates = jax.jit(partial(run, frozen))()
    new = flatten(updates["batch_stats"])
    for path, value in flatten(variables["batch_stats"]).items():
        np.testing.assert_array_equal(new[path], value)
    if frozen and name == "shallow_cbr":  # and the running statistics are what it normalises with
        (_, expected), _ = jax.jit(partial(run, False))()
        np.testing.assert_allclose(features["last"], expected["last"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_remat_gives_equal_gradients_and_recomputes(name):
    variables, plain, (_, _, stats) = step(name)
    same, remat, (_, _, remat_stats) = step(name, remat=True)
    assert flatten(variables).keys() == flatten(same).keys()
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), remat, plain)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), remat_stats, stats)
    blocks = {"shallow_cbr": 2, "shallow_efficientnet": 4}[name]
    for wanted, expected in ((False, 0), (True, blocks)):
        _, loss_fn = make_loss(name, remat=wanted)
        equations = jax.make_jaxpr(loss_fn)(variables["params"]).eqns
        assert sum(e.primitive.name in ("checkpoint", "remat2", "remat") for e in equations) == expected


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_computes_small_and_keeps_float32_parameters_statistics_and_logits(name):
    _, _, (full, features, _) = step(name)
    assert features["last"].dtype == jnp.float32
    _, grads, (logits, features, updates) = step(name, dtype="bfloat16")
    assert features["last"].dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves((logits, grads, updates))} == {jnp.dtype("float32")}
    assert 0 < np.abs(logits - full).max() < 0.1 * np.abs(full).max()
    config, shape = FAMILIES[name]
    module = models.build(dataclasses.replace(config, dtype="bfloat16"), 3)
    computed = set()

    def note(call, args, kwargs, context):
        result = call(*args, **kwargs)
        if context.method_name == "__call__" and isinstance(context.module, Conv | BatchNorm):
            computed.add(result.dtype)
        return result

    with nn.intercept_methods(note):
        initial = shapes(module, shape)[0]
    assert computed == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(initial)} == {jnp.dtype("float32")}


def test_drop_path_grows_linearly_over_the_blocks():
    rates = []

    def note(call, args, kwargs, context):
        if isinstance(context.module, DropPath) and context.method_name == "__call__":
            rates.append(context.module.rate)
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        shapes(models.build(ModelConfig(name="efficientnetv2_b1", drop_path=0.27), 3), (64, 64, 3))
    starts = {0, 2, 5, 8, 12, 18}  # of stages, among 27 blocks: they change the shape and have no sum to drop
    np.testing.assert_allclose(rates, [0.01 * b for b in range(27) if b not in starts], rtol=1e-6)


def test_efficientnet_kernels_start_as_the_authors_do():
    stages = (Stage(True, 1, 64, 4, 2), Stage(False, 1, 64, 4, 1, squeeze=0.25))
    module = EfficientNet(stages, stem=64, top=512)
    params = jax.jit(lambda: module.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)), train=False))()["params"]
    for path, fan_out in (
        ("top_conv", 512),
        ("stage1_block1/expand_conv", 9 * 256),
        ("stage2_block1/dwconv", 9),
        ("stage2_block1/se/expand", 256),
    ):
        assert np.std(flatten(params)[f"{path}/kernel"]) == pytest.approx(np.sqrt(2 / fan_out), rel=0.05), path
