"""Comparison of functions and their gradients with a reference."""

import jax
import jax.numpy as jnp
import numpy as np


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

    return jax.jit(run).trace(*args).lower(lowering_platforms=(platform,)).as_text()
