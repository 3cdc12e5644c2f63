"""Layers whose parameters have the names, shapes and initial values of flax.linen."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from lungjax.models.ops.batch_norm import Activation, batch_norm, normalize, statistics
from lungjax.models.ops.conv import Padding, convolve, explicit_pads, pair
from lungjax.models.ops.pooling import window_max

Initializer = Callable[..., jax.Array]
Layer = Callable[..., Any]  # a module class with some fields set, called with the remaining fields and a name
LECUN_NORMAL = nn.initializers.lecun_normal()
# Stochastic depth (arXiv 1603.09382): drops a residual branch [B, H, W, C] of random examples in training.
DropPath = partial(nn.Dropout, broadcast_dims=(1, 2, 3))


class Conv(nn.Module):
    """A two-dimensional flax.linen.Conv with the same parameters, computed in the fastest way for the platform."""

    features: int
    kernel_size: int | Sequence[int]
    strides: int | Sequence[int] = 1
    padding: Padding = "SAME"
    groups: int = 1  # -1: depthwise, one group per input channel
    use_bias: bool = False
    dtype: Any = jnp.float32
    kernel_init: Initializer = LECUN_NORMAL
    bias_init: Initializer = nn.initializers.zeros_init()
    standardize: float | None = None  # epsilon of weight standardization (arXiv 1903.10520); None: off

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, H, W, C] to [B, H', W', features]; raises ValueError if `groups` does not divide the channels."""
        size, strides = pair(self.kernel_size), pair(self.strides)
        channels = x.shape[-1]
        groups = channels if self.groups == -1 else self.groups
        if channels % groups or self.features % groups:
            raise ValueError(f"Conv {self.name}: groups={groups} must divide {channels} and {self.features} channels")
        shape = (*size, channels // groups, self.features)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        bias = self.param("bias", self.bias_init, (self.features,), jnp.float32) if self.use_bias else None
        if self.standardize is not None:
            kernel = kernel - kernel.mean((0, 1, 2))
            kernel = kernel / jnp.sqrt(jnp.square(kernel).mean((0, 1, 2)) + self.standardize)
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        pads = explicit_pads(self.padding, (x.shape[1], x.shape[2]), size, strides)
        x = convolve(x, kernel, strides, pads)
        return x if bias is None else x + bias.astype(self.dtype)


def max_pool(
    x: jax.Array, window: int | Sequence[int], strides: int | Sequence[int], padding: Padding = "VALID"
) -> jax.Array:
    """Returns the maximum of each window of x [B, H, W, C]; padding is ignored, as in flax.linen.max_pool."""
    window, strides = pair(window), pair(strides)
    return window_max(x, window, strides, explicit_pads(padding, (x.shape[1], x.shape[2]), window, strides))


class BatchNorm(nn.Module):
    """flax.linen.BatchNorm (arXiv 1502.03167) with fewer intermediate maps saved for the gradient.

    Parameters are `scale` and `bias`; the running `mean` and biased `var` are in the collection `batch_stats`.
    Statistics are float32 and, under jit, those of the global batch.
    """

    momentum: float  # decay of the running statistics per step (1 - momentum in torch)
    epsilon: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, activation: Activation | None = None) -> jax.Array:
        """Normalizes [B, ..., C] with batch statistics, else (without `train`) running ones; `activation` is fused."""
        channels = x.shape[-1:]
        starts = {"mean": jnp.zeros, "var": jnp.ones}
        running = [self.variable("batch_stats", name, f, channels, jnp.float32) for name, f in starts.items()]
        scale = self.param("scale", nn.initializers.ones_init(), channels, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros_init(), channels, jnp.float32)
        if train and activation is not None and x.ndim == 4:
            x, mean, var = batch_norm(x, scale, bias, self.epsilon, activation, self.dtype)
        else:
            mean, var = statistics(x) if train else [statistic.value for statistic in running]
            x = normalize(x, mean, var, scale, bias, self.epsilon, self.dtype)
            x = x if activation is None else activation(x)
        if train and not self.is_initializing():
            for statistic, value in zip(running, (mean, var), strict=True):
                old = self.momentum * statistic.value
                statistic.value = old + (1 - self.momentum) * lax.stop_gradient(value)
        return x


class SqueezeExcite(nn.Module):
    """Scales each channel by a gate computed from the mean of the map by two 1x1 convolutions (arXiv 1709.01507)."""

    reduced: int  # channels of the bottleneck
    activation: Activation = nn.silu
    gate: Activation = nn.sigmoid
    dtype: Any = jnp.float32
    kernel_init: Initializer = LECUN_NORMAL

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, H, W, C] to the same shape."""
        fields = {"kernel_size": 1, "use_bias": True, "dtype": self.dtype, "kernel_init": self.kernel_init}
        mean = x.mean((1, 2), keepdims=True, dtype=jnp.promote_types(x.dtype, jnp.float32)).astype(self.dtype)
        middle = self.activation(Conv(self.reduced, name="reduce", **fields)(mean))
        return x * self.gate(Conv(x.shape[-1], name="expand", **fields)(middle))
