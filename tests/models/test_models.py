"""All networks, checked by shape evaluation, and the behavior of one shallow network per family."""

import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from random_weights import random_images, random_variables
from shallow import SHALLOW

from lungjax import models
from lungjax.config import Config, EvalConfig, HeadConfig, InputSpec, ModelConfig, OptimConfig
from lungjax.models.convnext import ConvNeXt
from lungjax.models.efficientnet import EfficientNet, Stage, expand
from lungjax.models.inputs import CPU_BATCH, prediction_batch_size
from lungjax.models.layers import BatchNorm, Conv
from lungjax.models.ops import conv
from lungjax.models.trees import flatten
from lungjax.training.optim import frozen_paths

ROWS = (Path(__file__).parent / "networks.txt").read_text().splitlines()
TABLE = {name: values for name, *values in map(str.split, ROWS) if name != "#"}
# Size of the last map by image size, for the networks of the studies.
MAPS = {
    "cbr_larget": {(256, 330): (3, 8)},
    "cbr_largew": {(128, 160): (1, 3), (328, 512): (13, 25)},
    "cbr_small": {(128, 160): (1, 3), (512, 512): (25, 25), (256, 330): (9, 14)},
    "cbr_tiny": {(128, 160): (3, 5), (512, 512): (27, 27), (328, 512): (15, 27)},
    "cbr_larget_study": {(256, 330): (11, 15)},
    "simple": {(128, 160): (14, 18), (512, 512): (62, 62)},
    "xray_cnn": {(256, 256): (7, 7)},
    "resnet18_cifar": {(28, 28): (4, 4), (64, 50): (8, 7)},
    "resnet50_cifar": {(28, 28): (4, 4)},
    "squeezenet1_1": {(224, 224): (13, 13), (107, 90): (6, 5)},
}
PARTS = re.compile(r"stem_(conv|bn|norm)|stage\d+_(block\d+|downsample|transition|conv|bn)|top_(conv|bn|norm)|head")
SHAPE = (40, 37, 3)


def count(tree) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def shapes(module, image_shape, batch=2):
    """Returns the shapes of variables, logits and features."""

    def run(images):
        (logits, features), variables = module.init_with_output(jax.random.key(0), images, train=False)
        return variables, logits, features

    with conv.plain_forms():
        return jax.eval_shape(run, jax.ShapeDtypeStruct((batch, *image_shape), jnp.float32))


def last_map(module, height, width):
    return shapes(module, (height, width, 1), batch=1)[2]["last"].shape[1:3]


FIRST = [
    next(name for name in family if name in TABLE) for family in models.FAMILIES.values() if set(family) & set(TABLE)
]


@pytest.mark.parametrize(
    "names",
    [FIRST, pytest.param([name for name in TABLE if name not in FIRST], marks=pytest.mark.slow)],
    ids=["one_per_family", "others"],
)
def test_shapes_parameters_and_layer_names(names):
    for name in names:
        trainable, total, channels = TABLE[name]
        module = models.build(ModelConfig(name=name), 1000)
        variables, logits, features = shapes(module, (224, 224, 3))
        assert count(variables["params"]) == int(trainable), name
        assert total == "-" or count(variables) == int(total), name
        assert (logits.shape, logits.dtype) == ((2, 1000), jnp.float32), name
        assert features["last"].shape == (2, 7, 7, int(channels)), name
        assert module.minimum_size() == (32, 32), name
        check_layer_names(name, variables["params"])


def check_layer_names(name, params):
    """Checks that layer names allow fine-tuning of the head, the last block and the last stage."""
    assert name in models.FAMILIES[models.family_of(name)]
    assert [part for part in params if not PARTS.fullmatch(part)] == [], name
    paths = set(flatten(params))
    head = {path for path in paths if path.startswith("head/")}
    block, stage = (paths - frozen_paths(OptimConfig(tune=tune), params) for tune in ("blocks:1", "stages:1"))
    assert head and paths - frozen_paths(OptimConfig(tune="head"), params) == head, name
    assert head < block <= stage < paths, name
    stages = {int(match[1]) for match in map(re.compile(r"stage(\d+)_").match, paths) if match}
    assert stages == set(range(min(stages), max(stages) + 1)) and min(stages) in (1, 2), name
    assert all(path.startswith(f"stage{max(stages)}_") == (path in stage) for path in paths if path[:5] == "stage"), (
        name
    )


def test_networks_of_the_studies():
    for name, maps in MAPS.items():
        module = models.build(ModelConfig(name=name), 3)
        assert {size: last_map(module, *size) for size in maps} == maps, name
        check_layer_names(name, shapes(module, (256, 256, 1))[0]["params"])
    assert last_map(models.build(ModelConfig(name="cbr_small", padding="same"), 3), 96, 80) == (6, 5)
    # The goldens cover padding="same", with which Keras pads odd maps by (0, 1) and the last map would be (2, 2).
    assert last_map(models.build(ModelConfig(name="mobilenet", padding="symmetric"), 3), 65, 65) == (3, 3)
    assert set(TABLE) | set(MAPS) == set(models.MODELS)


def test_minimum_size_and_one_pixel_less():
    for pool, cells in (("avg", 1), ("avg2x2_flatten", 2)):
        head = HeadConfig(pool=pool)
        cbr = [models.build(ModelConfig(name=n, padding=p, head=head), 3)
               for n in ("cbr_larget", "cbr_small", "simple") for p in ("valid", "same")]  # fmt: skip
        for module in [*cbr, *(network.make(head=head, outputs=3) for network in SHALLOW.values())]:
            height, width = module.minimum_size()
            assert last_map(module, height, width) == (cells, cells), module
            for size in ((height - 1, width), (height, width - 1)):
                with pytest.raises(ValueError, match=f"{size[0]} x {size[1]} pixels.*at least {height} x {width}"):
                    last_map(module, *size)


def test_remat_and_bfloat16():
    """Parameters are unchanged, every block is recomputed, and all layers but the head compute in bfloat16."""
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    images = jax.ShapeDtypeStruct((2, *SHAPE), jnp.float32)
    for name, network in SHALLOW.items():
        module = network.make(outputs=3)
        other = module.clone(remat=True, dtype=jnp.bfloat16)
        dtypes = set()

        def note(call, args, kwargs, context, dtypes=dtypes):
            result = call(*args, **kwargs)
            if context.method_name == "__call__" and isinstance(context.module, Conv | BatchNorm):
                dtypes.add(result.dtype)
            return result

        def run(images, other=other):
            return other.init_with_output(keys, images, train=True)

        with nn.intercept_methods(note):
            (logits, features), variables = jax.eval_shape(run, images)
        assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, shapes(module, SHAPE)[0]), name
        assert {leaf.dtype for leaf in jax.tree.leaves((variables, logits))} == {jnp.dtype("float32")}, name
        assert dtypes == {features["last"].dtype} == {jnp.dtype("bfloat16")}, name

        def forward(variables, images, other=other):
            return other.apply(variables, images, train=True, rngs=keys, mutable=["batch_stats"])

        with conv.plain_forms():
            equations = jax.make_jaxpr(forward)(variables, images).eqns
        assert sum(equation.primitive.name == "remat2" for equation in equations) == network.blocks, name


DEFAULT = ("cbr", "efficientnet", "densenet")


@pytest.mark.parametrize("name", [n if n in DEFAULT else pytest.param(n, marks=pytest.mark.slow) for n in SHALLOW])
def test_training_step_of_a_shallow_network(name):
    """Gradients reach every parameter and do not change with remat; statistics follow the decay; bfloat16 is close."""
    module = SHALLOW[name].make(outputs=3)
    variables, images = random_variables(module, SHAPE), random_images(SHAPE)

    def gradients(train, remat=False):
        def loss(params):
            options = {"train": train, "rngs": {"dropout": jax.random.key(1)}, "mutable": ["batch_stats"]}
            output, updates = module.clone(remat=remat).apply({**variables, "params": params}, images, **options)
            return jnp.square(output[0] - 1.0).mean(), updates

        return jax.grad(loss, has_aux=True)(variables["params"])

    def run():
        logits, half = (module.clone(dtype=d).apply(variables, images, train=False)[0] for d in ("float32", "bfloat16"))
        return gradients(False)[0], gradients(True), gradients(True, remat=True), logits, half

    with conv.plain_forms():
        evaluation, plain, remat, logits, half = jax.jit(run)()
    # In training a bias before batch norm has no gradient and a drop path may be closed.
    assert [path for path, g in flatten(evaluation).items() if not np.any(g) or not np.isfinite(g).all()] == []
    # Batch norm cancels most of a gradient below it; the remainder has fewer exact digits.
    largest = max(np.abs(g).max() for g in jax.tree.leaves(plain[0]))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4 * largest), remat[0], plain[0])
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), remat[1], plain[1])
    assert 0 < np.abs(half - logits).max() < 0.1 * np.abs(logits).max()
    old, new = (flatten(v.get("batch_stats", {})) for v in (variables, plain[1]))
    assert set(old) == set(new) and all(np.any(old[path] != new[path]) for path in old)
    # new = decay * old + (1 - decay) * batch, where the variance of the batch is not negative
    ratios = [new[path] / old[path] for path in old if path.endswith("var")]
    assert all(np.all(ratio >= module.momentum - 1e-6) for ratio in ratios)
    assert not ratios or min(ratio.min() for ratio in ratios) < (1 + module.momentum) / 2  # not a slower decay


def test_published_head_as_default():
    simple = models.build(ModelConfig(name="simple", head=HeadConfig(dropout=0.1)), 3)
    assert (simple.head.pool, simple.head.hidden, simple.head.dropout) == ("max", (32,), 0.1)
    assert models.build(ModelConfig(name="efficientnetv2_b0"), 3).head.dropout == 0.2
    replaced = models.build(ModelConfig(name="simple", head=HeadConfig(pool="avg", hidden=())), 3)
    assert (replaced.head.pool, replaced.head.hidden) == ("avg", ())
    v3 = models.build(ModelConfig(name="mobilenetv3_small"), 3).head
    assert (v3.hidden, v3.activation) == ((1024,), "hard_swish")


def test_class_counts():
    for classes in (2, 5):
        assert shapes(models.build(ModelConfig(name="simple"), classes), (40, 40, 1))[1].shape == (2, classes)
    config = ModelConfig(name="simple", head=HeadConfig(output="sigmoid", positive_class="covid"))
    assert shapes(models.build(config, 2), (40, 40, 1))[1].shape == (2, 1)
    with pytest.raises(ValueError, match="class_map"):
        models.build(ModelConfig(head=HeadConfig(output="sigmoid", pool="class_map")), 2)
    with pytest.raises(ValueError, match="sigmoid"):
        models.build(config, 3)
    with pytest.raises(ValueError, match="at least 2"):
        models.build(ModelConfig(), 1)


def test_names_of_unavailable_options():
    for config, message in (
        (ModelConfig(name="efficentnetv2_s"), "'efficentnetv2_s'.*efficientnetv2_s"),
        (ModelConfig(name="efficientnetv2_b0", padding="valid"), "model.padding='valid'.*same"),
        (ModelConfig(name="vgg16", padding="same"), "model.padding='same'.*vgg16"),
        (ModelConfig(name="cbr_tiny", drop_path=0.1), "model.drop_path=0.1.*cbr_tiny"),
    ):
        with pytest.raises(ValueError, match=message):
            models.build(config, 3)


def test_linear_rise_of_drop_path():
    """The rates rise from 0 to the given rate in ConvNeXt, and to (n - 1) / n of it over n blocks in EfficientNet."""
    efficientnet = models.build(ModelConfig(name="efficientnetv2_b1", drop_path=0.27), 3)
    starts = {0, 2, 5, 8, 12, 18}  # first blocks of stages have no shortcut
    convnext = ConvNeXt((1, 2, 1, 1), (4, 6, 8, 10), drop_path=0.5)
    for module, expected in (
        (efficientnet, [0.01 * b for b in range(27) if b not in starts]),
        (convnext, np.linspace(0, 0.5, 5)),
    ):
        rates = []

        def note(call, args, kwargs, context, rates=rates):
            if context.module.name == "drop_path" and context.method_name == "__call__":
                rates.append(context.module.rate)
            return call(*args, **kwargs)

        with nn.intercept_methods(note):
            shapes(module, (64, 64, 3))
        np.testing.assert_allclose(rates, expected, rtol=1e-6)


def test_initial_values_of_the_authors():
    stages = expand((Stage(True, 1, 64, 4, 2), Stage(False, 1, 64, 4, 1, squeeze=0.25)), 64)
    efficientnet, convnext = EfficientNet(stages, stem=64, top=512), ConvNeXt((1,), (16,), drop_path=0.0, outputs=5)

    def run(key):
        return [m.init(key, jnp.zeros((1, 16, 16, 3)), train=False)["params"] for m in (efficientnet, convnext)]

    with conv.plain_forms():
        efficient, convnext = map(flatten, jax.jit(run)(jax.random.key(0)))
    for path, fan_out in (
        ("top_conv", 512),
        ("stage1_block1/expand_conv", 9 * 256),
        ("stage2_block1/dwconv", 9),
        ("stage2_block1/se/expand", 256),
    ):
        assert np.std(efficient[f"{path}/kernel"]) == pytest.approx(np.sqrt(2 / fan_out), rel=0.05), path
    assert np.std(convnext["stage1_block1/dense1/kernel"]) == pytest.approx(0.02, rel=0.1)
    np.testing.assert_array_equal(convnext["stage1_block1/layer_scale"], np.full(16, 1e-6, np.float32))


def test_batch_size_by_pixels_platform_and_devices():
    for platform, devices, size, expected in (
        ("cpu", 1, (224, 224), CPU_BATCH),
        ("cpu", 4, (600, 600), 4 * CPU_BATCH),
        ("gpu", 1, (224, 224), 64),
        ("tpu", 8, (224, 224), 8 * 64),
        ("gpu", 1, (32, 32), 256),
        ("gpu", 2, (448, 224), 2 * 32),
        ("gpu", 1, (256, 256), 48),  # 49 fit: a multiple of eight
        ("gpu", 3, (800, 800), 3 * 5),
        ("gpu", 3, (4000, 4000), 3),
    ):
        config = Config(input=InputSpec(size=size))
        assert prediction_batch_size(config, devices, platform) == expected, (platform, devices, size)
        fixed = Config(input=InputSpec(size=size), eval=EvalConfig(batch_size=12))
        assert prediction_batch_size(fixed, devices, platform) == 12
