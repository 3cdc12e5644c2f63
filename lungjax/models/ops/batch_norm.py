"""Batch norm by batch statistics, fused with the activation that follows it, in few passes over the map.

The number of passes determines the cost, since maps are larger than the caches. On the CPU the result is written in
one pass after the statistics, only the input is saved for the gradient (XLA would also save x - mean and maps of the
activation), and the gradient takes three passes. As in `ops.conv`, there is no forward-mode derivative.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array, lax

from lungjax.models.ops.conv import cpu_or_default, isolate_fusion, to_float32

Activation = Callable[[Array], Array]
Output = tuple[Array, Array, Array]  # activated map, mean, variance
CHEAP = (nn.relu, nn.relu6)  # activations whose slope is recomputed in each pass instead of written to memory
MAX_SUMMED_ROWS = 8  # per element of the first loop of the gradients


def statistics(x: Array) -> tuple[Array, Array]:
    """Returns mean and biased variance (mean of squares minus squared mean) per channel of x [..., C], in one pass."""
    axes, x = tuple(range(x.ndim - 1)), to_float32(x)
    mean, squares = x.mean(axes), lax.square(x).mean(axes)
    return mean, jnp.maximum(0.0, squares - lax.square(mean))


def normalize(x: Array, mean: Array, var: Array, scale: Array, bias: Array, epsilon: float, dtype: Any) -> Array:
    """Returns (x - mean) / sqrt(var + epsilon) * scale + bias in `dtype`, computed in float32 or wider."""
    return ((x - mean) * (lax.rsqrt(var + epsilon) * scale) + bias).astype(dtype)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def batch_norm(x: Array, scale: Array, bias: Array, epsilon: float, activation: Activation, dtype: Any) -> Output:
    """Normalizes x [B, H, W, C] by its own statistics, multiplies by `scale`, adds `bias`, and applies `activation`.

    `scale` and `bias` are float32 [C], `activation` is elementwise, and `dtype` is the dtype of the normalized map.
    Returns the activated map, and the mean and biased variance, float32 [C], which have no gradient.
    """
    options = {"epsilon": epsilon, "activation": activation, "dtype": dtype}
    return cpu_or_default(x, scale, bias, cpu=_forward, default=_plain, **options)


def _save(x: Array, scale: Array, bias: Array, *fields: Any) -> tuple[Output, Any]:
    y, mean, var = batch_norm(x, scale, bias, *fields)
    return (y, mean, var), (x, scale, bias, mean, var)


def _gradients(epsilon: float, activation: Activation, dtype: Any, saved: Any, dy: Output) -> Any:
    options = {"epsilon": epsilon, "activation": activation, "dtype": dtype}
    return cpu_or_default(*saved, dy[0], cpu=_backward, default=_plain_backward, **options)


batch_norm.defvjp(_save, _gradients)


def _plain(x: Array, scale: Array, bias: Array, *, epsilon: float, activation: Activation, dtype: Any) -> Output:
    mean, var = statistics(x)
    return activation(normalize(x, mean, var, scale, bias, epsilon, dtype)), mean, var


def _plain_backward(*arrays: Array, **fields: Any) -> tuple[Array, ...]:
    x, scale, bias, _, _, dy = arrays
    return jax.vjp(lambda *args: _plain(*args, **fields)[0], x, scale, bias)[1](dy)


def _line(mean: Array, var: Array, scale: Array, bias: Array, epsilon: float) -> tuple[Array, Array]:
    """Returns the factor and offset for which x * factor + offset is the normalized map."""
    factor = lax.rsqrt(var + epsilon) * scale
    return factor, bias - mean * factor


def _forward(x: Array, scale: Array, bias: Array, *, epsilon: float, activation: Activation, dtype: Any) -> Output:
    def apply(x: Array, factor: Array, offset: Array) -> Array:
        return activation((x * factor + offset).astype(dtype))

    mean, var = statistics(x)
    return isolate_fusion(apply, x, *_line(mean, var, scale, bias, epsilon)), mean, var


def _backward(*arrays: Array, epsilon: float, activation: Activation, dtype: Any) -> tuple[Array, ...]:
    x, scale, bias, mean, var, dy = arrays
    factor, offset = _line(mean, var, scale, bias, epsilon)
    rows = max(n for n in range(1, MAX_SUMMED_ROWS + 1) if x.shape[1] % n == 0)

    def inner(x: Array, dy: Array, factor: Array, offset: Array) -> Array:
        """Returns the gradient with respect to the normalized map."""
        return jax.vjp(activation, (x * factor + offset).astype(dtype))[1](dy)[0].astype(factor.dtype)

    if activation not in CHEAP:
        dy = isolate_fusion(inner, x, dy, factor, offset)

        def inner(x: Array, dy: Array, factor: Array, offset: Array) -> Array:
            return dy

    def row_sums(z: Array) -> Array:
        return sum(z[:, n::rows] for n in range(rows))

    def add_up(x: Array, dy: Array, factor: Array, offset: Array) -> Array:
        return row_sums(inner(x, dy, factor, offset))

    def add_up_times_x(x: Array, dy: Array, factor: Array, offset: Array, mean: Array) -> Array:
        return row_sums(inner(x, dy, factor, offset) * (x - mean))

    def combine(x: Array, dy: Array, factor: Array, offset: Array, slope: Array, level: Array) -> Array:
        return (factor * inner(x, dy, factor, offset) - slope * x - level).astype(x.dtype)

    dbias = isolate_fusion(add_up, x, dy, factor, offset).sum((0, 1, 2))
    product = isolate_fusion(add_up_times_x, x, dy, factor, offset, mean).sum((0, 1, 2))
    cells = x.size // x.shape[-1]
    slope = factor / (var + epsilon) * product / cells
    level = factor * dbias / cells - slope * mean
    dx = isolate_fusion(combine, x, dy, factor, offset, slope, level)
    return dx, (product * lax.rsqrt(var + epsilon)).astype(scale.dtype), dbias.astype(bias.dtype)
