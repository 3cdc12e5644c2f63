"""Batch norm and its activation compared with flax.linen."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from kernels import close, draw

from lungjax.models import layers


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


def test_float32_statistics_of_bfloat16_maps():
    x = (draw(0, 8, 16, 16, 3) * 0.1 + 30).astype("bfloat16")
    module = layers.BatchNorm(momentum=0.0, epsilon=1e-3, dtype=jnp.bfloat16)
    variables = module.init(jax.random.key(0), x, train=False)
    y, updates = module.apply(variables, x, train=True, mutable=["batch_stats"])
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(updates["batch_stats"]["mean"], np.mean(x.astype("float32"), (0, 1, 2)), rtol=1e-5)
