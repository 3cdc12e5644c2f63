"""Folding of batch norms: the same numbers, as many norms as a network has behind its convolutions, and no others."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import small_bn
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec
from random_weights import random_images, random_variables

from lungjax import models
from lungjax.config import Config, EvalConfig, HeadConfig, InputSpec
from lungjax.evaluation import predict_split
from lungjax.models import folding, trees
from lungjax.models.bit import BiT
from lungjax.models.convnext import ConvNeXt
from lungjax.models.densenet import DenseNet
from lungjax.models.efficientnet import EfficientNet, Stage
from lungjax.models.layers import BatchNorm, Conv
from lungjax.models.mobilenet import MobileNet
from lungjax.models.mobilenetv3 import HS, MobileNetV3, Row
from lungjax.models.resnet import ALL_BIASED, ResNet
from lungjax.runtime import mesh as meshes

SHAPE = (32, 32, 3)
BN_HEAD = HeadConfig(norm_before_pool="batch", norm_after_pool="batch", hidden=(8,))
STAGES = (Stage(True, 1, 8, 1, 1), Stage(True, 1, 8, 2, 2), Stage(False, 1, 16, 2, 2, 5, 0.25))
ROWS = ((Row(3, 8, 8, 8, HS, 2), Row(5, 16, 0, 8, HS)),)

# One of each family, cut short, and the norms that follow a convolution in it, counted by hand.
NETWORKS = {
    "transfusion": (small_bn(), 2),
    "efficientnet": (partial(EfficientNet, STAGES, 8, 16), 1 + (1 + 2 + 3) + 1),
    "resnet, biased as in Keras": (partial(ResNet, (1, 1), width=8, biased=ALL_BIASED, stride_conv=1), 1 + 4 + 4),
    # Norms come before convolutions: only those inside a block have one before them.
    "resnet v2": (partial(ResNet, (1, 1), width=8, preact=True, biased=("conv3",)), 2 + 2),
    "densenet": (partial(DenseNet, (2, 1), growth=4), 1 + 3),
}
COUNTED = {
    "no norms": (models.MODELS["simple"], 0),
    "group norm, standardised kernels": (partial(BiT, (1, 1), width=32), 0),
    "layer norm": (partial(ConvNeXt, (1, 1), (8, 8), 0.0), 0),
    "mobilenet": (partial(MobileNet, ((1, 8), (1, 8)), stem=8), 1 + 2 + 2),
    "mobilenetv3": (partial(MobileNetV3, ROWS, 16, stem=8), 1 + (2 + 3) + 1),
    # The head norms the last map, which is returned as well, and then its mean, which is no convolution's.
    "norms in the head": (partial(small_bn(), head=BN_HEAD), 2),
    "recomputed blocks": (partial(ResNet, (1, 1), width=8, bottleneck=False, stride_conv=1, remat=True), 1 + 2 + 3),
    "resnet50": (models.MODELS["resnet50"], 53),
    "mobilenetv2": (models.MODELS["mobilenetv2"], 52),
}


def both(module, variables, shape=SHAPE):
    """Logits and last map of the plain and of the folded network, from one program."""
    network = folding.FoldedModel(module, variables, shape)
    prepared, images = network.prepare(variables), random_images(shape)
    run = lambda v, p, x: (module.apply(v, x, train=False), network(p, x))  # noqa: E731
    # Each program runs once: compiled quickly, not well.
    run = jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})
    return network, prepared, *run(variables, prepared, images)


def error(found, wanted):
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    return np.abs(found - wanted).max() / np.ptp(wanted)


def rms(x):
    return np.sqrt(np.square(np.asarray(x, np.float64)).mean())


@pytest.mark.parametrize("name", NETWORKS)
def test_folded_networks_give_the_same_numbers(name):
    make, count = NETWORKS[name]
    module = make(outputs=3)
    variables = random_variables(module, SHAPE)
    network, prepared, plain, folded = both(module, variables)
    assert len(network.pairs) == count
    assert error(folded[0], plain[0]) < 1e-5 and error(folded[1]["last"], plain[1]["last"]) < 1e-5
    norms, kept = ([p for p in trees.flatten(v["batch_stats"]) if p.endswith("/var")] for v in (variables, prepared))
    assert len(kept) == len(norms) - count


@pytest.mark.parametrize("name", COUNTED)
def test_all_norms_that_follow_a_convolution_are_found(name):
    make, count = COUNTED[name]
    module = make()
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, *SHAPE)), train=False))
    assert len(folding.find_pairs(module, shapes, SHAPE)) == count


class Odd(nn.Module):
    """A convolution and a norm, put together so that folding may be wrong."""

    kind: str
    dtype: object = jnp.float32

    @nn.compact
    def __call__(self, images, *, train):
        conv = Conv(4, 3, standardize=1e-5 if self.kind == "standardised" else None, parent=None)
        conv = (nn.Dense(4, parent=None) if self.kind == "dense" else conv).clone(parent=self, name="conv")
        norm = BatchNorm(momentum=0.9, epsilon=1e-2, name="norm")
        x = conv(images)
        if self.kind == "after an activation":
            x = nn.relu(x)
        y = norm(x, train=train)
        if self.kind == "read twice":
            y = y + x
        if self.kind == "read inside":
            y = y + jax.jit(jnp.square)(x)
        if self.kind == "convolution called twice":
            y = y + conv(images[:, ::-1] ** 2)
        if self.kind == "norm called twice":
            y = y + norm(y, train=train)
        if self.kind == "two norms":
            y = BatchNorm(momentum=0.9, epsilon=1e-2, name="second")(y, train=train)
        return y.mean((1, 2)), {"last": x if self.kind == "returned" else y}


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        ("plain", 1),
        ("dense", 1),
        ("two norms", 1),
        ("standardised", 0),
        ("after an activation", 0),
        ("read twice", 0),
        ("read inside", 0),
        ("returned", 0),
        ("convolution called twice", 0),
        ("norm called twice", 0),
    ],
)
def test_only_a_norm_that_alone_reads_a_convolution_is_folded(kind, count):
    module, shape = Odd(kind), (6, 6, 2)
    network, _, plain, folded = both(module, random_variables(module, shape), shape)
    assert len(network.pairs) == count
    assert error(folded[0], plain[0]) < 1e-5 and error(folded[1]["last"], plain[1]["last"]) < 1e-5


def test_bfloat16_folds_in_float32_and_loses_nothing():
    exact, half = (small_bn()(outputs=3, dtype=dtype) for dtype in (jnp.float32, jnp.bfloat16))
    variables = random_variables(exact, SHAPE)
    _, prepared, wanted, _ = both(exact, variables)
    _, same, plain, folded = both(half, variables)
    for path, leaf in trees.flatten(same).items():
        assert leaf.dtype == jnp.float32
        np.testing.assert_array_equal(leaf, trees.flatten(prepared)[path], err_msg=path)
    assert (folded[0].dtype, folded[1]["last"].dtype) == (jnp.float32, jnp.bfloat16)
    # As far from the float32 network as the plain one is.
    far = [rms(np.float32(found[1]["last"]) - wanted[1]["last"]) for found in (plain, folded)]
    assert far[0] > 1e-3 * rms(wanted[1]["last"]) and far[1] < 1.1 * far[0]


def test_folded_variables_keep_their_place_on_the_devices():
    mesh = meshes.make_mesh()
    module = small_bn()(outputs=3)
    cut = NamedSharding(mesh, PartitionSpec(None, None, None, "data"))
    everywhere = meshes.replicated(mesh)
    variables = random_variables(module, SHAPE)
    placed = jax.tree.map(lambda leaf: jax.device_put(leaf, cut if leaf.ndim == 4 else everywhere), variables)
    network = folding.FoldedModel(module, variables, SHAPE)
    prepared = network.prepare(placed)
    assert {leaf.sharding for leaf in trees.flatten(prepared).values() if leaf.ndim == 4} == {cut}
    assert {leaf.sharding for leaf in trees.flatten(prepared).values() if leaf.ndim < 4} == {everywhere}
    assert jax.tree.structure(network.layout(placed)) == jax.tree.structure(prepared)
    for path, leaf in trees.flatten(network.prepare(variables)).items():  # numpy arrays, as a checkpoint gives them
        np.testing.assert_allclose(leaf, trees.flatten(prepared)[path], rtol=1e-6, err_msg=path)


@pytest.mark.parametrize(
    ("platform", "devices", "size", "wanted"),
    [
        ("cpu", 1, (224, 224), folding.CPU_BATCH),
        ("cpu", 4, (600, 600), 4 * folding.CPU_BATCH),
        ("gpu", 1, (224, 224), 64),
        ("tpu", 8, (224, 224), 8 * 64),
        ("gpu", 1, (32, 32), 256),
        ("gpu", 2, (448, 224), 2 * 32),
        ("gpu", 1, (256, 256), 48),  # 49 fit: whole eights
        ("gpu", 3, (800, 800), 3 * 5),
        ("gpu", 3, (4000, 4000), 3),
    ],
)
def test_a_batch_size_left_open_follows_pixels_platform_and_devices(platform, devices, size, wanted):
    config = Config(input=InputSpec(size=size))
    assert folding.batch_size(config, devices, platform) == wanted
    asked = Config(input=InputSpec(size=size), eval=EvalConfig(batch_size=12))
    assert folding.batch_size(asked, devices, platform) == 12


def test_a_pass_over_a_split_takes_batches_of_the_rule(small_data):
    seen = []

    def predict_step(variables, batch):
        seen.append(batch["image"].shape)
        size = len(batch["row"])
        return {"probabilities": np.full((size, 3), 1 / 3), "logits": np.zeros((size, 3)), "row": batch["row"]}

    mesh = meshes.make_mesh()
    predict_split.predict(predict_step, {}, small_data, "test", Config(input=InputSpec(size=(16, 16))), mesh)
    size = folding.CPU_BATCH * mesh.size
    assert seen == [(size, 16, 16, 1)] * -(-13 // size)
