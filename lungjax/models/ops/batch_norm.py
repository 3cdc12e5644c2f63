"""Batch norm by the batch's own statistics, with the activation that follows it, in few passes over the map.

A map is larger than a processor's caches, so the passes over it are what this costs. On the CPU the result is written
in one pass after the statistics, nothing else is kept for the gradient, and that takes three passes: two sums and the
result. Left to the compiler, it keeps x - mean and the activation's inner parts as maps of their own. As in
`lungjax.models.ops.conv`, the form is chosen when the function is lowered, and there is no forward-mode derivative.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from lungjax.models.ops.conv import cpu_or_default, isolate_fusion

Activation = Callable[[jax.Array], jax.Array]
Normed = tuple[jax.Array, jax.Array, jax.Array]
CHEAP = (nn.relu, nn.relu6)  # activations whose slope is worked out thrice rather than written to memory once
SUMMED_ROWS = 8  # an element of the gradients' first loop adds up so many cells at most


def statistics(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns mean and biased variance of each channel of x [..., C], float32 at least, in one pass.

    The variance is the mean of squares less the square of the mean, as in flax.linen.BatchNorm.
    """
    axes, x = tuple(range(x.ndim - 1)), x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean, squares = x.mean(axes), lax.square(x).mean(axes)
    return mean, jnp.maximum(0.0, squares - lax.square(mean))


def normalize(
    x: jax.Array, mean: jax.Array, var: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float, dtype: Any
) -> jax.Array:
    """Returns (x - mean) / sqrt(var + epsilon) * scale + bias in `dtype`, computed in float32 at least."""
    return ((x - mean) * (lax.rsqrt(var + epsilon) * scale) + bias).astype(dtype)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def batch_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float, activation: Activation, dtype: Any
) -> Normed:
    """Normalises x [B, H, W, C] by its own statistics, scales, shifts and activates.

    Args:
      x: the map.
      scale: [C] float32.
      bias: [C] float32.
      epsilon: added to the variance.
      activation: of each element on its own.
      dtype: of the normalised map.

    Returns the activated map, and mean and biased variance [C] in float32, through which no gradient flows.
    """
    cpu, plain = (partial(f, epsilon=epsilon, activation=activation, dtype=dtype) for f in (_forward, _plain))
    return cpu_or_default(x, scale, bias, cpu=cpu, default=plain)


def _save(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float, activation: Activation, dtype: Any
) -> tuple[Normed, Any]:
    y, mean, var = batch_norm(x, scale, bias, epsilon, activation, dtype)
    return (y, mean, var), (x, scale, bias, mean, var)


def _gradients(epsilon: float, activation: Activation, dtype: Any, saved: Any, dy: Normed) -> Any:
    cpu, plain = (partial(f, epsilon=epsilon, activation=activation, dtype=dtype) for f in (_backward, _plain_backward))
    return cpu_or_default(*saved, dy[0], cpu=cpu, default=plain)


batch_norm.defvjp(_save, _gradients)


def _plain(
    x: jax.Array, scale: jax.Array, bias: jax.Array, *, epsilon: float, activation: Activation, dtype: Any
) -> Normed:
    mean, var = statistics(x)
    return activation(normalize(x, mean, var, scale, bias, epsilon, dtype)), mean, var


def _plain_backward(
    x: jax.Array, scale: jax.Array, bias: jax.Array, mean: jax.Array, var: jax.Array, dy: jax.Array, **fields: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    return jax.vjp(lambda *args: _plain(*args, **fields)[0], x, scale, bias)[1](dy)


def _line(
    mean: jax.Array, var: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> tuple[jax.Array, jax.Array]:
    """Returns factor and offset with which x * factor + offset is the normalised map."""
    factor = lax.rsqrt(var + epsilon) * scale
    return factor, bias - mean * factor


def _forward(
    x: jax.Array, scale: jax.Array, bias: jax.Array, *, epsilon: float, activation: Activation, dtype: Any
) -> Normed:
    def apply(x: jax.Array, factor: jax.Array, offset: jax.Array) -> jax.Array:
        return activation((x * factor + offset).astype(dtype))

    mean, var = statistics(x)
    return isolate_fusion(apply, x, *_line(mean, var, scale, bias, epsilon)), mean, var


def _backward(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    mean: jax.Array,
    var: jax.Array,
    dy: jax.Array,
    *,
    epsilon: float,
    activation: Activation,
    dtype: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    factor, offset = _line(mean, var, scale, bias, epsilon)
    rows = max(n for n in range(1, SUMMED_ROWS + 1) if x.shape[1] % n == 0)

    def inner(x: jax.Array, dy: jax.Array, factor: jax.Array, offset: jax.Array) -> jax.Array:
        """Returns the gradient to the normalised map."""
        return jax.vjp(activation, (x * factor + offset).astype(dtype))[1](dy)[0].astype(factor.dtype)

    if activation not in CHEAP:
        dy = isolate_fusion(inner, x, dy, factor, offset)

        def inner(x: jax.Array, dy: jax.Array, factor: jax.Array, offset: jax.Array) -> jax.Array:
            return dy

    def add_up(x: jax.Array, dy: jax.Array, factor: jax.Array, offset: jax.Array) -> jax.Array:
        return sum(inner(x[:, n::rows], dy[:, n::rows], factor, offset) for n in range(rows))

    def add_up_times_x(x: jax.Array, dy: jax.Array, factor: jax.Array, offset: jax.Array, mean: jax.Array) -> jax.Array:
        parts = ((x[:, n::rows], dy[:, n::rows]) for n in range(rows))
        return sum(inner(x, dy, factor, offset) * (x - mean) for x, dy in parts)

    def combine(
        x: jax.Array, dy: jax.Array, factor: jax.Array, offset: jax.Array, slope: jax.Array, level: jax.Array
    ) -> jax.Array:
        return (factor * inner(x, dy, factor, offset) - slope * x - level).astype(x.dtype)

    dbias = isolate_fusion(add_up, x, dy, factor, offset).sum((0, 1, 2))
    product = isolate_fusion(add_up_times_x, x, dy, factor, offset, mean).sum((0, 1, 2))
    cells = x.size // x.shape[-1]
    slope = factor / (var + epsilon) * product / cells
    level = factor * dbias / cells - slope * mean
    dx = isolate_fusion(combine, x, dy, factor, offset, slope, level)
    return dx, (product * lax.rsqrt(var + epsilon)).astype(scale.dtype), dbias.astype(bias.dtype)
