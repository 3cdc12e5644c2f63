"""The layers against plain lax and linen: forward, gradients, and which form a platform gets."""

from collections.abc import Callable
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lungjax.models import layers
from lungjax.models.ops import batch_norm, pooling
from lungjax.models.ops import conv as convolution

# height, width, kernel, strides, padding
WINDOWS = [
    (9, 10, (3, 3), (1, 1), "SAME"),
    (17, 14, (5, 3), (1, 1), "SAME"),
    (27, 30, (7, 7), (2, 2), "SYMMETRIC"),
    (9, 10, (3, 3), (2, 2), "SAME"),
    (10, 9, (5, 5), (2, 2), "SAME"),
    (13, 11, (7, 7), (1, 1), "VALID"),
    (11, 8, (3, 5), (2, 1), ((0, 1), (3, 2))),
    (9, 7, (2, 2), (3, 3), "VALID"),
    (8, 9, (1, 3), (2, 3), ((4, 4), (0, 0))),
    (8, 8, (3, 3), (2, 2), ((-1, 0), (1, 1))),
    (7, 7, (7, 7), (1, 1), "SAME"),
]
# function, reference, kernel's last two sizes, input channels
CONVOLUTIONS = {
    "depthwise": (convolution.depthwise_conv, convolution.plain_depthwise, (1, 6), 6),
    "dense": (convolution.dense_conv, convolution.plain_conv, (6, 4), 6),
    "gray": (convolution.dense_conv, convolution.plain_conv, (1, 4), 1),
    "colour": (convolution.dense_conv, convolution.plain_conv, (3, 4), 3),
}


def draw(seed: int, *shape: int, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def with_gradients(function, *args):
    """Returns the output and the gradients to all arguments, for one fixed cotangent, in float64."""

    def run(*args):
        y, pull = jax.vjp(function, *args)
        return (y, *pull(draw(9, *y.shape, dtype=y.dtype)))

    return [np.asarray(r, np.float64) for r in jax.jit(run)(*args)]


def close(ours, plain, tolerance):
    for a, b in zip(ours, plain, strict=True):
        assert a.shape == b.shape
        assert np.abs(a - b).max() <= tolerance * max(1.0, np.abs(b).max())


CASES = [(kind, window) for kind in CONVOLUTIONS for window in WINDOWS[:: 1 if kind == "depthwise" else 2]]


@pytest.mark.parametrize(("kind", "window"), CASES, ids=str)
def test_convolution_equals_plain(kind, window):
    height, width, size, strides, padding = window
    ours, plain, depth, channels = CONVOLUTIONS[kind]
    x, kernel = draw(0, 2, height, width, channels), draw(1, *size, *depth)
    pads = convolution.explicit_pads(padding, (height, width), size, strides)
    expected = with_gradients(lambda x, k: plain(x, k, strides, pads), x, kernel)
    close(with_gradients(lambda x, k: ours(x, k, strides, pads), x, kernel), expected, 2e-6)


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolution_dtypes(kind):
    ours, plain, depth, channels = CONVOLUTIONS[kind]
    pads = ((1, 2), (2, 1))
    with jax.enable_x64(True):
        x, kernel = draw(0, 2, 9, 11, channels, dtype="float64"), draw(1, 3, 5, *depth, dtype="float64")
        expected = with_gradients(lambda x, k: plain(x, k, (2, 2), pads), x, kernel)
        close(with_gradients(lambda x, k: ours(x, k, (2, 2), pads), x, kernel), expected, 1e-13)
    # bfloat16 is accumulated in float32: only the operands and the result are rounded, to 8 bits.
    x, kernel = draw(0, 2, 33, 31, channels, dtype="bfloat16"), draw(1, 5, 5, *depth, dtype="bfloat16")
    got = with_gradients(lambda x, k: ours(x, k, (1, 1), pads), x, kernel)
    wide = with_gradients(lambda x, k: plain(x, k, (1, 1), pads), *(a.astype("float32") for a in (x, kernel)))
    close(got[:1], wide[:1], 2**-8)

    def outputs(x, k):
        y, pull = jax.vjp(lambda x, k: ours(x, k, (1, 1), pads), x, k)
        return y, *pull(y)

    assert [a.dtype for a in jax.eval_shape(outputs, x, kernel)] == [jnp.bfloat16] * 3


@pytest.mark.parametrize("window", [*WINDOWS[:1], *WINDOWS[3:6], (9, 7, (2, 3), (3, 2), ((0, 1), (2, 1)))], ids=str)
def test_max_pool_equals_plain(window):
    height, width, size, strides, padding = window
    x = draw(0, 2, height, width, 5)

    def ours(x):
        return layers.max_pool(x, size, strides, padding)

    def plain(x):
        return nn.max_pool(x, size, strides, padding)

    close(with_gradients(ours, x), with_gradients(plain, x), 1e-6)
    tied = jnp.maximum(jnp.round(x), 0)  # many windows have several equal maxima
    close(with_gradients(ours, tied), with_gradients(plain, tied), 1e-6)


@pytest.mark.parametrize("shape", [(2, 8, 6, 5), (3, 9, 7, 4)], ids=str)
def test_halve_equals_average_pool(shape):
    x = draw(0, *shape)
    close(with_gradients(pooling.avg_pool_2x2, x), with_gradients(lambda x: nn.avg_pool(x, (2, 2), (2, 2)), x), 1e-6)


def test_max_pool_passes_the_gradient_on_whatever_the_compiler_recomputes():
    """Under jit the norm before the pool is computed again for the gradient, with other roundings."""

    class Stem(nn.Module):
        pool: Callable

        @nn.compact
        def __call__(self, x):
            x = layers.Conv(16, 7, 2, "SYMMETRIC", name="conv")(x)
            x = nn.relu(layers.BatchNorm(momentum=0.9, epsilon=1e-5, name="bn")(x, train=True))
            x = self.pool(x)
            return x + layers.Conv(16, 3, padding="SYMMETRIC", name="after")(x)

    images = np.random.default_rng(0).normal(size=(4, 97, 85, 3)).astype(np.float32)
    ours = Stem(lambda x: layers.max_pool(x, 3, 2, "SYMMETRIC"))
    plain = Stem(lambda x: nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1))))
    variables = ours.init(jax.random.key(0), images)
    weight = np.random.default_rng(1).normal(size=(4, 25, 22, 16)).astype(np.float32)

    def grads(module):
        def loss(params, x):
            return (module.apply({**variables, "params": params}, x, mutable=["batch_stats"])[0] * weight).sum()

        return jax.jit(jax.grad(loss))(variables["params"], images)

    got, expected = grads(ours), grads(plain)
    for layer in ("conv", "bn"):
        for leaf, value in expected[layer].items():
            assert np.abs(got[layer][leaf] - value).max() <= 1e-3 * np.abs(value).max(), (layer, leaf)


def test_max_pool_negative_values_and_bfloat16():
    x = draw(0, 2, 9, 9, 3, dtype="bfloat16") - 10
    y, pull = jax.vjp(lambda x: layers.max_pool(x, 3, 2, "SAME"), x)
    np.testing.assert_array_equal(y, nn.max_pool(x, (3, 3), (2, 2), "SAME"))
    assert pull(y)[0].dtype == jnp.bfloat16


def lowered(function, args, platform: str) -> str:
    def run(*args):
        y, pull = jax.vjp(function, *args)
        return y, pull(y)

    return jax.jit(run).trace(*args).lower(lowering_platforms=(platform,)).as_text()


def test_form_follows_the_platform():
    def depthwise(x, kernel):
        return convolution.depthwise_conv(x, kernel, (1, 1), ((1, 1), (1, 1)))

    args = draw(0, 2, 8, 8, 6), draw(1, 3, 3, 1, 6)
    for platform in ("cuda", "tpu"):
        text = lowered(depthwise, args, platform)
        assert text.count("stablehlo.convolution") == 3  # forward, to the input, to the kernel
        assert "feature_group_count = 6" in text
    text = lowered(depthwise, args, "cpu")
    assert "stablehlo.convolution" not in text

    def pool(x):
        return layers.max_pool(x, 3, 2)

    assert "select_and_scatter" in lowered(pool, args[:1], "cuda")
    assert "select_and_scatter" not in lowered(pool, args[:1], "cpu")

    assert "reduce_window" in lowered(pooling.avg_pool_2x2, args[:1], "cuda")
    assert "reduce_window" not in lowered(pooling.avg_pool_2x2, args[:1], "cpu")

    def normed(x):
        return batch_norm.batch_norm(x, jnp.ones(6), jnp.ones(6), 1e-3, nn.silu, jnp.float32)[0]

    assert "optimization_barrier" in lowered(normed, args[:1], "cpu")
    assert "optimization_barrier" not in lowered(normed, args[:1], "cuda")

    def gray(x, kernel):
        return convolution.dense_conv(x, kernel, (2, 2), ((0, 1), (0, 1)))

    args = draw(0, 2, 8, 8, 1), draw(1, 3, 3, 1, 6)
    assert lowered(gray, args, "cuda").count("stablehlo.convolution") == 3
    assert lowered(gray, args, "cpu").count("stablehlo.convolution") == 1  # the kernel's gradient


class Small(nn.Module):
    """A gray image through every kind of convolution, norm and activation, and the pools."""

    remat: bool = False

    @nn.compact
    def __call__(self, x):
        def body(module, x):
            x = layers.Conv(8, 3, groups=-1, strides=2, name="depth")(x)
            return layers.max_pool(layers.Conv(12, 3, padding="VALID", name="dense")(x), 3, 2)

        x = pooling.avg_pool_2x2(layers.Conv(8, 3, name="stem")(x))
        x = (nn.remat(body) if self.remat else body)(self, x)
        return layers.Conv(4, 1, use_bias=True, name="point")(x).mean((1, 2))


def test_jit_vmap_remat_and_sharding_agree():
    x = draw(0, 4, 33, 31, 1)
    variables = jax.jit(Small().init)(jax.random.key(0), x)

    def loss(variables, x, remat=False):
        return (Small(remat).apply(variables, x) ** 2).sum()

    # Each a function of its own: of the same one jax would remember the trace of the plain layers.
    def together(variables, x):
        return loss(variables, x)

    def recomputed(variables, x):
        return loss(variables, x, remat=True)

    def each(variables, x):
        return jax.vmap(lambda x: loss(variables, x[None]))(x).sum()

    plain = {
        "depthwise_conv": "plain_depthwise",
        "dense_conv": "plain_conv",
        "window_max": "plain_window_max",
    }
    both = {**vars(convolution), **vars(pooling)}
    with mock.patch.multiple(layers, **{name: both[p] for name, p in plain.items()}):
        expected = jax.jit(jax.grad(loss))(variables, x)

    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    copied = jax.device_put(variables, NamedSharding(mesh, PartitionSpec()))
    for got in (
        jax.jit(jax.grad(together))(variables, x),
        jax.jit(jax.grad(together))(copied, sharded),
        jax.jit(jax.grad(recomputed))(variables, x),
        jax.jit(jax.grad(each))(variables, x),
    ):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), expected, got)


def test_compiler_options_are_accepted_and_change_nothing():
    x, kernel = draw(0, 2, 20, 20, 24), draw(1, 5, 5, 24, 32)

    def conv(x, kernel):
        return convolution.plain_conv(x, kernel, (1, 1), ((0, 0), (0, 0)))

    compiled = jax.jit(conv, compiler_options=convolution.compiler_options()).lower(x, kernel).compile()
    np.testing.assert_allclose(compiled(x, kernel), conv(x, kernel), rtol=1e-4, atol=1e-4)
    if convolution.compiler_options():
        assert "ynn_fusion" not in compiled.as_text()


def test_prediction_keeps_a_product_apart_from_what_follows():
    x, kernel, bias = draw(0, 49, 192), draw(1, 192, 320), draw(2, 320)

    def layer(x, kernel, bias):
        return jax.nn.silu(convolution.product(x, kernel) + bias)

    options = convolution.compiler_options(train=False)
    compiled = jax.jit(layer, compiler_options=options).lower(x, kernel, bias).compile()
    np.testing.assert_allclose(compiled(x, kernel, bias), layer(x, kernel, bias), rtol=1e-4, atol=1e-4)
    if options:
        assert "ynn_fusion" not in compiled.as_text()


LINEN = [
    {"features": 7, "kernel_size": 3},
    {"features": 7, "kernel_size": (3, 5), "strides": (2, 1), "padding": "VALID", "use_bias": True},
    {"features": 7, "kernel_size": 1, "use_bias": True},
    {"features": 7, "kernel_size": 1, "strides": 2},
    {"features": 7, "kernel_size": 1, "padding": 1},
    {"features": 6, "kernel_size": 3, "groups": -1},
    {"features": 6, "kernel_size": 5, "groups": 6, "strides": 2, "padding": ((1, 2), (2, 2))},
    {"features": 12, "kernel_size": 3, "groups": 6},  # two kernels a channel
    {"features": 4, "kernel_size": 3, "groups": 2, "padding": 2},
]


@pytest.mark.parametrize("fields", LINEN, ids=str)
def test_conv_equals_linen(fields):
    x = draw(0, 2, 9, 11, 6)
    ours = layers.Conv(**fields)
    fields = {"groups": 1, "use_bias": False, **fields}
    groups, size = fields.pop("groups"), convolution.pair(fields.pop("kernel_size"))
    linen = nn.Conv(kernel_size=size, feature_group_count=6 if groups == -1 else groups, **fields)
    variables, expected = ours.init(jax.random.key(1), x), linen.init(jax.random.key(1), x)
    jax.tree.map(np.testing.assert_array_equal, variables, expected)
    if fields["use_bias"]:
        variables["params"]["bias"] = draw(3, 7)

    def run(module, kernel, x):
        return module.apply({"params": {**variables["params"], "kernel": kernel}}, x)

    kernel = variables["params"]["kernel"]
    expected = with_gradients(lambda k, x: run(linen, k, x), kernel, x)
    close(with_gradients(lambda k, x: run(ours, k, x), kernel, x), expected, 2e-6)


def test_conv_wrong_groups_and_padding():
    x = draw(0, 1, 8, 8, 6)
    with pytest.raises(ValueError, match="6 channels in and 7 out.*groups=2"):
        layers.Conv(7, 3, groups=2).init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="'REFLECT'.*SAME, VALID"):
        layers.Conv(7, 3, padding="REFLECT").init(jax.random.key(0), x)


def test_conv_bfloat16_keeps_float32_parameters():
    x = draw(0, 1, 8, 8, 6)
    for fields in LINEN:
        module = layers.Conv(dtype=jnp.bfloat16, **fields)
        variables = jax.eval_shape(module.init, jax.random.key(0), x)
        assert {p.dtype for p in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
        assert jax.eval_shape(module.apply, variables, x).dtype == jnp.bfloat16


def test_squeeze_excite_by_hand():
    x = draw(0, 2, 5, 3, 6)
    module = layers.SqueezeExcite(2, activation=nn.relu)
    variables = module.init(jax.random.key(0), x)
    shapes = jax.tree.map(jnp.shape, variables["params"])
    assert shapes == {
        "reduce": {"kernel": (1, 1, 6, 2), "bias": (2,)},
        "expand": {"kernel": (1, 1, 2, 6), "bias": (6,)},
    }
    p = jax.tree.map(lambda a: draw(a.size, *a.shape), variables["params"])
    middle = np.maximum(np.mean(x, (1, 2)) @ p["reduce"]["kernel"][0, 0] + p["reduce"]["bias"], 0)
    gate = 1 / (1 + np.exp(-(middle @ p["expand"]["kernel"][0, 0] + p["expand"]["bias"])))
    np.testing.assert_allclose(module.apply({"params": p}, x), x * gate[:, None, None], rtol=1e-5, atol=1e-6)


def test_drop_path_drops_whole_examples():
    x = draw(0, 4000, 2, 2, 1) + 10
    module = layers.DropPath(0.2)
    y = module.apply({}, x, train=True, rngs={"dropout": jax.random.key(0)})
    ratio = np.asarray(y / x).reshape(4000, -1)
    dropped = (ratio == 0).all(1)
    np.testing.assert_allclose(ratio[~dropped], 1.25, rtol=1e-5)
    assert abs(dropped.mean() - 0.2) < 0.03
    np.testing.assert_array_equal(module.apply({}, x, train=False), x)
    np.testing.assert_array_equal(layers.DropPath(0.0).apply({}, x, train=True), x)
