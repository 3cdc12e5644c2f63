"""Small networks and blocks, checked by hand where the goldens cannot distinguish two architectures."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from random_weights import random_images, random_variables

from lungjax import models
from lungjax.config import HeadConfig, ModelConfig
from lungjax.models.convnext import ConvNeXt, GlobalResponseNorm
from lungjax.models.layers import DropPath
from lungjax.models.ops.conv import plain_forms
from lungjax.models.resnet import ResNet

SHAPE = (33, 40, 3)


def test_xray_cnn_dropout():
    images = np.random.default_rng(0).normal(size=(2, 40, 40, 3)).astype(np.float32)
    config = ModelConfig(name="xray_cnn", head=HeadConfig(pool="avg", hidden=()))

    def run(key):
        variables, options = models.build(config, 2).init(key, images, train=False), {"rngs": {"dropout": key}}
        return [models.build(replace(config, dropout=p), 2).apply(variables, images, train=train, **options)[1]["last"]
                for p, train in ((None, False), (None, True), (0.5, False), (0.5, True))]  # fmt: skip

    with plain_forms():
        expected, *same, dropped = map(np.asarray, jax.jit(run)(jax.random.key(0)))
    for features in same:
        np.testing.assert_array_equal(features, expected)
    assert (dropped[expected > 0] == 0).mean() > 0.25


def test_stride_convolution_of_resnet():
    """v1 and v1.5 have the same parameters and different outputs."""
    v15 = ResNet((1, 1), width=8, outputs=5)
    v1, variables, images = v15.clone(stride_conv=1), random_variables(v15, SHAPE), random_images(SHAPE)
    assert models.leaf_shapes(v1, SHAPE) == models.leaf_shapes(v15, SHAPE)
    with plain_forms():
        one, other = jax.jit(lambda v: [m.apply(v, images, train=False)[1]["last"] for m in (v1, v15)])(variables)
    assert one.shape == other.shape
    assert np.abs(one - other).max() > 0.1 * np.ptp(one)


def test_layer_scale_of_convnext():
    """The output of a block is the input plus the scaled branch."""
    module, images = ConvNeXt((1,), (4,), drop_path=0.0, outputs=5), random_images((16, 16, 3))
    variables = random_variables(module, (16, 16, 3))

    def run(scale):
        block = variables["params"]["stage1_block1"] | {"layer_scale": jnp.full(4, scale)}
        return module.apply({"params": variables["params"] | {"stage1_block1": block}}, images, train=False)[1]["last"]

    with plain_forms():
        zero, one, two = map(np.asarray, jax.jit(lambda: [run(scale) for scale in (0.0, 1.0, 2.0)])())
    assert np.abs(one - zero).max() > 0.1
    np.testing.assert_allclose(two - zero, 2 * (one - zero), atol=1e-5)


def test_global_response_norm_of_a_zero_channel():
    """The gradient is finite; with initial values, the norm is the identity."""
    x = jnp.ones((1, 2, 2, 3)).at[..., 1].set(0)
    module = GlobalResponseNorm(jnp.float32)
    values = {"params": {"scale": jnp.ones(3), "bias": jnp.zeros(3)}}
    gradient = jax.jit(jax.grad(lambda x: (module.apply(values, x) ** 2).sum()))(x)
    assert np.isfinite(gradient).all() and np.any(gradient[..., 0])
    np.testing.assert_array_equal(module.init_with_output(jax.random.key(0), x)[0], x)


def test_drop_path_per_example():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4000, 2, 2, 1)), jnp.float32) + 10
    module = DropPath(0.2)
    y = module.apply({}, x, deterministic=False, rngs={"dropout": jax.random.key(0)})
    ratio = np.asarray(y / x).reshape(4000, -1)
    dropped = (ratio == 0).all(1)
    np.testing.assert_allclose(ratio[~dropped], 1.25, rtol=1e-5)
    assert abs(dropped.mean() - 0.2) < 0.03
    np.testing.assert_array_equal(module.apply({}, x, deterministic=True), x)
    np.testing.assert_array_equal(DropPath(0.0).apply({}, x, deterministic=False), x)
