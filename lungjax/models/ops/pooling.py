"""Pooling in forms that are fast on each platform; see `lungjax.models.ops.conv`."""

import functools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from lungjax.models.ops import conv
from lungjax.models.ops.conv import Pads, Pair, cpu_or_default, isolate_fusion, slices, to_float32


def plain_window_max(x: jax.Array, window: Pair, strides: Pair, pads: Pads) -> jax.Array:
    """Returns the maximum of each window of x [B, H, W, C] by XLA's window reduction."""
    lowest = np.array(-np.inf, x.dtype)
    return lax.reduce_window(x, lowest, lax.max, (1, *window, 1), (1, *strides, 1), ((0, 0), *pads, (0, 0)))


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def window_max(x: jax.Array, window: Pair, strides: Pair, pads: Pads) -> jax.Array:
    """Returns the maximum of each window of x [B, H, W, C]; padding is ignored.

    The gradient goes to the first of equal maxima, row by row. On the CPU, the maximum is taken over shifted slices in
    one loop, fused with the bias and the activation before it.
    """
    return cpu_or_default(x, cpu=_window_max, default=plain_window_max, window=window, strides=strides, pads=pads)


def _window_max(x: jax.Array, window: Pair, strides: Pair, pads: Pads) -> jax.Array:
    return functools.reduce(lax.max, [part for _, _, part in slices(conv.pad(x, pads, -jnp.inf), window, strides)])


def _window_max_gradient(window: Pair, strides: Pair, pads: Pads, x: jax.Array, dy: jax.Array) -> tuple[jax.Array]:
    options = {"window": window, "strides": strides, "pads": pads}
    return (cpu_or_default(x, dy, cpu=_window_max_dx, default=_plain_window_max_dx, **options),)


window_max.defvjp(lambda x, *options: (window_max(x, *options), x), _window_max_gradient)


def _plain_window_max_dx(x: jax.Array, dy: jax.Array, **options: Any) -> jax.Array:
    return jax.vjp(partial(plain_window_max, **options), x)[1](dy)[0]


def _window_max_dx(x: jax.Array, dy: jax.Array, window: Pair, strides: Pair, pads: Pads) -> jax.Array:
    # The maximum is searched again. Comparing with that of the forward pass may match no cell, since the compiler may
    # recompute x for the gradient in another fusion, which rounds differently.
    def find(padded: jax.Array) -> jax.Array:
        (_, _, best), *others = slices(padded, window, strides)
        winner = jnp.zeros(best.shape, jnp.int16)
        for i, j, part in others:
            better = part > best  # the first of equals stays
            best = jnp.where(better, part, best)
            winner = jnp.where(better, jnp.int16(i * window[1] + j), winner)
        return winner

    def term(i: int, j: int, part: jax.Array, winner: jax.Array) -> jax.Array:
        return jnp.where(winner == i * window[1] + j, to_float32(part), 0)

    winner = isolate_fusion(find, conv.pad(x, pads, -jnp.inf))
    return conv.scatter_gradient([dy, winner], x.shape, window, strides, pads, term)


@jax.custom_vjp
def avg_pool_2x2(x: jax.Array) -> jax.Array:
    """Returns the mean of each 2 x 2 block of x [B, H, W, C]; the last row and column of odd maps are dropped."""
    return cpu_or_default(x, cpu=_avg_pool, default=_plain_avg_pool)


_plain_avg_pool = partial(nn.avg_pool, window_shape=(2, 2), strides=(2, 2))


def _avg_pool(x: jax.Array) -> jax.Array:
    total = sum(to_float32(part) for _, _, part in slices(x, (2, 2), (2, 2)))
    return (total / 4).astype(x.dtype)


def _avg_pool_gradient(saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array]:
    height, width = saved[1].shape[1], saved[0].shape[2]
    batch, rows, columns, channels = dy.shape
    quarter = (to_float32(dy) / 4).astype(dy.dtype)[:, :, None, :, None]
    cells = jnp.broadcast_to(quarter, (batch, rows, 2, columns, 2, channels))
    full = cells.reshape(batch, 2 * rows, 2 * columns, channels)
    return (conv.pad(full, ((0, height - 2 * rows), (0, width - 2 * columns))),)


# Of the saved parts, only the shapes are used.
avg_pool_2x2.defvjp(lambda x: (avg_pool_2x2(x), (x[:, :1], x[:, :, :1])), _avg_pool_gradient)
