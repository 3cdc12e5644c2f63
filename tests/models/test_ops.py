"""The CPU forms of convolutions, pooling and batch norm, and their gradients, against XLA and flax.linen."""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lungjax.models import layers
from lungjax.models.ops import batch_norm, conv, pooling
from lungjax.models.ops.gelu import gelu


def draw(seed, *shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def with_gradients(function, *args):
    """Returns the output and the gradients of all arguments, for one fixed cotangent, in float64."""

    def run(*args):
        y, pull = jax.vjp(function, *args)
        return (y, *pull(draw(9, *y.shape, dtype=y.dtype)))

    return [np.asarray(r, np.float64) for r in jax.jit(run)(*args)]


def close(results, references, tolerance):
    for a, b in zip(results, references, strict=True):
        assert a.shape == b.shape
        assert np.abs(a - b).max() <= tolerance * max(1.0, np.abs(b).max())


def lowered(function, platform, *args):
    """Returns the StableHLO of a function and its gradients for a platform."""

    def run(*args):
        y, pull = jax.vjp(function, *args)
        return y, pull(y)

    return conv.jit(run, platform).trace(*args).lower(lowering_platforms=(platform,)).as_text()


# height, width, kernel, strides, padding
WINDOWS = [
    (9, 10, (3, 3), (1, 1), "SAME"),
    (27, 30, (7, 7), (2, 2), "SYMMETRIC"),
    (9, 10, (3, 3), (2, 2), "SAME"),
    (11, 8, (3, 5), (2, 1), ((0, 1), (3, 2))),
    (9, 7, (2, 2), (3, 3), "VALID"),
    (8, 9, (1, 3), (2, 3), ((4, 4), (0, 0))),
    (8, 8, (3, 3), (2, 2), ((-1, 0), (1, 1))),
    (7, 7, (7, 7), (1, 1), "SAME"),
]
# input channels, kernel's last two sizes
CONVOLUTIONS = {"depthwise": (6, (1, 6)), "dense": (6, (6, 4)), "gray": (1, (1, 4)), "color": (3, (3, 4))}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolution_against_lax(kind):
    channels, depth = CONVOLUTIONS[kind]
    windows = WINDOWS[:: 1 if kind == "depthwise" else 2]
    arrays = []
    for height, width, size, *_ in windows:
        batch = 12 if size == (3, 3) else 2  # kernel gradients of 12 images are summed in blocks of 4
        arrays.append((draw(0, batch, height, width, channels), draw(1, *size, *depth)))

    def run(function):
        def one(x, kernel, window):
            height, width, size, strides, padding = window
            pads = conv.explicit_pads(padding, (height, width), size, strides)
            y, pull = jax.vjp(lambda x, k: function(x, k, strides, pads), x, kernel)
            return y, *pull(draw(9, *y.shape))

        return jax.jit(lambda arrays: [one(*a, window) for a, window in zip(arrays, windows, strict=True)])(arrays)

    for result, expected in zip(run(conv.convolve), run(conv.plain_conv), strict=True):
        close(result, expected, 2e-6)


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolution_dtypes(kind):
    channels, depth = CONVOLUTIONS[kind]
    pads = ((1, 2), (2, 1))
    with jax.enable_x64(True):
        x, kernel = draw(0, 2, 9, 11, channels, dtype="float64"), draw(1, 3, 5, *depth, dtype="float64")
        expected = with_gradients(lambda x, k: conv.plain_conv(x, k, (2, 2), pads), x, kernel)
        close(with_gradients(lambda x, k: conv.convolve(x, k, (2, 2), pads), x, kernel), expected, 1e-13)
    # bfloat16 is accumulated in float32: only the operands and the result are rounded, to 8 bits.
    x, kernel = draw(0, 2, 33, 31, channels, dtype="bfloat16"), draw(1, 5, 5, *depth, dtype="bfloat16")
    y = jax.jit(lambda x, k: conv.convolve(x, k, (1, 1), pads))(x, kernel)
    wide = conv.plain_conv(x.astype("float32"), kernel.astype("float32"), (1, 1), pads)
    close([np.asarray(y, np.float64)], [np.asarray(wide, np.float64)], 2**-8)

    def outputs(x, k):
        y, pull = jax.vjp(lambda x, k: conv.convolve(x, k, (1, 1), pads), x, k)
        return y, *pull(y)

    assert [a.dtype for a in jax.eval_shape(outputs, x, kernel)] == [jnp.bfloat16] * 3


def test_form_of_each_platform():
    x, gray = draw(0, 2, 8, 8, 6), draw(0, 2, 8, 8, 1)

    def convolve(x, kernel):
        return conv.convolve(x, kernel, (2, 2), ((0, 1), (0, 1)))

    def norm(x):
        return batch_norm.batch_norm(x, jnp.ones(6), jnp.ones(6), 1e-3, nn.silu, jnp.float32)[0]

    kernel, word = draw(1, 3, 3, 1, 6), "stablehlo.convolution"  # of output, input gradient and kernel gradient
    for function, args, operation, default, cpu in (
        (convolve, (x, kernel), word, 3, 0), (convolve, (gray, kernel), word, 3, 1),
        (lambda x: layers.max_pool(x, 3, 2), (x,), "select_and_scatter", 1, 0),
        (pooling.avg_pool_2x2, (x,), "reduce_window", 1, 0), (norm, (x,), 'inlineable = "false"', 0, 5),
        (gelu, (x,), 'inlineable = "false"', 0, 2),
    ):  # fmt: skip
        for platform, count in (("cuda", default), ("tpu", default), ("cpu", cpu)):
            assert lowered(function, platform, *args).count(operation) == count, (operation, platform)
    with conv.plain_forms():
        assert lowered(lambda *args: convolve(*args), "cpu", gray, kernel).count(word) == 3


def test_compiler_options():
    """The options change no result and disable YNNPACK for convolutions and, in prediction, for products."""
    x, kernel = draw(0, 2, 20, 20, 24), draw(1, 5, 5, 24, 32)
    rows, matrix, bias = draw(0, 49, 192), draw(1, 192, 320), draw(2, 320)

    def convolve(x, kernel):
        return conv.plain_conv(x, kernel, (1, 1), ((0, 0), (0, 0)))

    def layer(x, kernel, bias):
        return jax.nn.silu(conv.product(x, kernel) + bias)

    for function, args, train in ((convolve, (x, kernel), True), (layer, (rows, matrix, bias), False)):
        options = conv.compiler_options(train=train)
        compiled = jax.jit(function, compiler_options=options).lower(*args).compile()
        np.testing.assert_allclose(compiled(*args), function(*args), rtol=1e-4, atol=1e-4)
        assert not options or "ynn_fusion" not in compiled.as_text()


LINEN = [
    {"features": 7, "kernel_size": (3, 5), "strides": (2, 1), "padding": "VALID", "use_bias": True},
    {"features": 7, "kernel_size": 1, "use_bias": True},
    {"features": 7, "kernel_size": 1, "strides": 2},
    {"features": 7, "kernel_size": 1, "padding": 1},
    {"features": 6, "kernel_size": 3, "groups": -1},
    {"features": 6, "kernel_size": 5, "groups": 6, "strides": 2, "padding": ((1, 2), (2, 2))},
    {"features": 12, "kernel_size": 3, "groups": 6},  # two kernels per channel
    {"features": 4, "kernel_size": 3, "groups": 2, "padding": 2},
]


def test_conv_layer_against_linen():
    """Initial values, and outputs with a random bias."""
    x, pairs = draw(0, 2, 9, 11, 6), []
    for fields in LINEN:
        options = {"groups": 1, "use_bias": False, **fields}
        groups, size = options.pop("groups"), conv.pair(options.pop("kernel_size"))
        linen = nn.Conv(kernel_size=size, feature_group_count=6 if groups == -1 else groups, **options)
        pairs.append((layers.Conv(**fields), linen))

    def run(x):
        results = []
        for layer, linen in pairs:
            first, second = layer.init(jax.random.key(1), x), linen.init(jax.random.key(1), x)
            bias = {"bias": draw(3, 7)} if linen.use_bias else {}
            variables = {"params": first["params"] | bias}
            results.append((first, second, layer.apply(variables, x), linen.apply(variables, x)))
        return results

    for first, second, output, expected in jax.jit(run)(x):
        jax.tree.map(np.testing.assert_array_equal, first, second)
        np.testing.assert_allclose(output, expected, rtol=2e-5, atol=2e-6)
    for layer, _ in pairs:  # in bfloat16 too the parameters are float32
        half = layer.clone(dtype=jnp.bfloat16)
        shapes = jax.eval_shape(half.init, jax.random.key(0), x)
        assert {p.dtype for p in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
        assert jax.eval_shape(half.apply, shapes, x).dtype == jnp.bfloat16


def test_standardized_kernel():
    kernel = np.random.default_rng(0).normal(2.0, 3.0, (3, 3, 4, 6)).astype(np.float32)
    cells = np.eye(36, dtype=np.float32).reshape(36, 3, 3, 4)  # one input cell at a time gives the kernel back
    module = layers.Conv(6, 3, padding="VALID", standardize=1e-10)
    used = np.reshape(jax.jit(module.apply)({"params": {"kernel": kernel}}, cells), (36, 6))
    np.testing.assert_allclose(used.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(used.var(0), 1, rtol=1e-5)


# height, width, window, strides, padding
POOLS = [
    (9, 10, (3, 3), (1, 1), "SAME"),
    (9, 10, (3, 3), (2, 2), "SAME"),
    (10, 9, (5, 5), (2, 2), "SAME"),
    (13, 11, (7, 7), (1, 1), "VALID"),
    (9, 7, (2, 3), (3, 2), ((0, 1), (2, 1))),
]


def test_max_pool_against_linen():
    for height, width, *window in POOLS:
        x = draw(0, 2, height, width, 5)
        x = jnp.concatenate([x, jnp.maximum(jnp.round(x), 0)], -1)  # ties: many windows have several equal maxima
        close(*(with_gradients(lambda x, f=f, w=window: f(x, *w), x) for f in (layers.max_pool, nn.max_pool)), 1e-6)


def test_max_pool_of_negative_bfloat16():
    x = draw(0, 2, 9, 9, 3, dtype="bfloat16") - 10
    y, pull = jax.vjp(lambda x: layers.max_pool(x, 3, 2, "SAME"), x)
    np.testing.assert_array_equal(y, nn.max_pool(x, (3, 3), (2, 2), "SAME"))
    assert pull(y)[0].dtype == jnp.bfloat16


def test_avg_pool_against_linen():
    for shape in ((2, 8, 6, 5), (3, 9, 7, 4)):
        x = draw(0, *shape)
        plain = with_gradients(lambda x: nn.avg_pool(x, (2, 2), (2, 2)), x)
        close(with_gradients(pooling.avg_pool_2x2, x), plain, 1e-6)


def test_max_pool_gradient_of_a_recomputed_input():
    """Under jit, the norm before the pool is recomputed for the gradient, with different rounding."""

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
    variables = jax.jit(plain.init)(jax.random.key(0), images)
    weight = np.random.default_rng(1).normal(size=(4, 25, 22, 16)).astype(np.float32)

    def gradients(module):
        def loss(params, x):
            return (module.apply({**variables, "params": params}, x, mutable=["batch_stats"])[0] * weight).sum()

        return jax.jit(jax.grad(loss))(variables["params"], images)

    result, expected = gradients(ours), gradients(plain)
    for layer in ("conv", "bn"):
        for leaf, value in expected[layer].items():
            assert np.abs(result[layer][leaf] - value).max() <= 1e-3 * np.abs(value).max(), (layer, leaf)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("name", ["silu", "relu6", ""])
def test_batch_norm_and_activation_against_linen(name, dtype):
    """Compares initial values, outputs, running statistics and gradients; 7, 9 and 11 rows are split differently."""
    activation = getattr(nn, name) if name else None
    with jax.enable_x64(dtype == "float64"):
        fields = {"momentum": 0.75, "epsilon": 1e-2, "dtype": dtype}
        layer, linen = layers.BatchNorm(**fields), nn.BatchNorm(use_running_average=False, **fields)
        shape = (3, {"float32": 7, "float64": 9, "bfloat16": 11}[dtype], 5, 6)
        x = draw(0, *shape, dtype=dtype) * 2 + 1
        variables = layer.init(jax.random.key(0), x, train=False)
        jax.tree.map(np.testing.assert_array_equal, variables, linen.init(jax.random.key(0), x))
        variables["batch_stats"] = {"mean": draw(3, 6), "var": draw(4, 6) ** 2}
        params = {"scale": draw(1, 6, dtype=dtype) + 1, "bias": draw(2, 6, dtype=dtype)}
        params = jax.tree.map(lambda p: p.astype("float32"), params)

        def run(module, x, params, **options):
            y, updates = module.apply({**variables, "params": params}, x, mutable=["batch_stats"], **options)
            stats = jax.lax.stop_gradient(updates["batch_stats"])
            return y, stats["mean"], stats["var"]

        def reference(x, params):
            y, mean, var = run(linen, x, params)
            return (y if activation is None else activation(y)), mean, var

        def fused(x, params):
            return run(layer, x, params, train=True, activation=activation)

        def all_of(function, x, params):
            (y, *stats), pull = jax.vjp(function, x, params)
            dx, dparams = pull((draw(9, *y.shape, dtype=y.dtype), jnp.ones(6), jnp.ones(6)))
            return y, *stats, dx, dparams["scale"], dparams["bias"]

        got, expected = (jax.jit(partial(all_of, f))(x, params) for f in (fused, reference))
        got += run(layer, x, params, train=False, activation=activation)
        y, *stats = run(linen.clone(use_running_average=True), x, params)
        expected += (y if activation is None else activation(y), *stats)
        got, expected = ([np.asarray(a, "float64") for a in results] for results in (got, expected))
        if dtype == "bfloat16":  # two roundings may be on different sides of the activation's kink: compare norms
            for a, b in zip(got, expected, strict=True):
                assert np.linalg.norm(a - b) <= 0.02 * np.linalg.norm(b)
        else:
            close(got, expected, {"float32": 5e-6, "float64": 2e-7}[dtype])


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 0.02)])
def test_gelu_by_hand(dtype, tolerance):
    x = jnp.linspace(-6, 6, 49, dtype=dtype)
    y, dx = with_gradients(gelu, x)
    points = [float(value) for value in x]
    below = [(1 + math.erf(t / math.sqrt(2))) / 2 for t in points]  # of the normal distribution
    density = [math.exp(-t * t / 2) / math.sqrt(2 * math.pi) for t in points]
    slope = [p + t * d for t, p, d in zip(points, below, density, strict=True)]
    cotangent = np.asarray(draw(9, 49, dtype=dtype), np.float64)
    close([y, dx], [np.multiply(points, below), cotangent * slope], tolerance)


def test_float32_statistics_of_bfloat16_maps():
    x = (draw(0, 8, 16, 16, 3) * 0.1 + 30).astype("bfloat16")
    module = layers.BatchNorm(momentum=0.0, epsilon=1e-3, dtype=jnp.bfloat16)
    variables = module.init(jax.random.key(0), x, train=False)
    y, updates = module.apply(variables, x, train=True, mutable=["batch_stats"])
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(updates["batch_stats"]["mean"], np.mean(x.astype("float32"), (0, 1, 2)), rtol=1e-5)
