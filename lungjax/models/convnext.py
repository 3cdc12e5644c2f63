"""ConvNeXt (Liu et al., CVPR 2022, arXiv 2201.03545) and ConvNeXt V2 (Woo et al., CVPR 2023, arXiv 2301.00808).

V2 replaces the layer scale of the blocks with a global response norm. All sources have layer norms with epsilon 1e-6,
exact GELU, strided convolutions without padding (which ignore leftover rows and columns), and a norm after the pool.
"""

from dataclasses import field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lungjax.config import HeadConfig
from lungjax.models.layers import Conv, DropPath, Layer
from lungjax.models.network import Network
from lungjax.models.ops.conv import product, to_float32
from lungjax.models.ops.gelu import gelu

EPSILON = 1e-6  # of layer norm and global response norm
LAYER_SCALE = 1e-6  # initial value
# The authors truncate at -2 and 2, which at a hundred standard deviations has no effect.
KERNEL_INIT = nn.initializers.normal(0.02)


class GlobalResponseNorm(nn.Module):
    """Scales each channel by its norm over the map relative to the mean norm of all channels, and adds the input."""

    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, H, W, C] to the same shape."""
        scale = self.param("scale", nn.initializers.zeros_init(), (x.shape[-1],), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros_init(), (x.shape[-1],), jnp.float32)
        squares = jnp.square(to_float32(x)).sum((1, 2), keepdims=True)
        # GELU can zero a complete channel of a small map. The slope of the root is infinite there; torch uses 0.
        positive = squares > 0
        norms = jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1)), 0)  # [B, 1, 1, C]
        relative = norms / (norms.mean(-1, keepdims=True) + EPSILON)
        return x * (1 + scale * relative).astype(self.dtype) + bias.astype(self.dtype)


class Block(nn.Module):
    """Depthwise 7 x 7 convolution, norm, two dense layers with four times the channels between them, plus the input."""

    grn: bool
    drop_path: float
    conv: Layer
    norm: Layer
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps [B, H, W, C] to the same shape."""
        inputs, channels = x, x.shape[-1]
        multiply = lambda x, kernel, *_, **__: product(x, kernel)  # noqa: E731
        dense = partial(nn.Dense, dtype=self.dtype, kernel_init=KERNEL_INIT, dot_general=multiply)
        x = self.norm(name="norm")(self.conv(channels, 7, padding="SAME", groups=-1, name="dwconv")(x))
        x = gelu(dense(4 * channels, name="dense1")(x))
        if self.grn:
            x = GlobalResponseNorm(self.dtype, name="grn")(x)
        x = dense(channels, name="dense2")(x)
        if not self.grn:
            init = nn.initializers.constant(LAYER_SCALE)
            x = x * self.param("layer_scale", init, (channels,), jnp.float32).astype(self.dtype)
        return inputs + DropPath(self.drop_path, name="drop_path")(x, deterministic=not train)


class Downsample(nn.Module):
    """Norm, then a 2 x 2 convolution of stride 2."""

    width: int
    conv: Layer
    norm: Layer

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, H, W, C] to [B, H // 2, W // 2, width]."""
        return self.conv(self.width, 2, 2, name="conv")(self.norm(name="norm")(x))


class ConvNeXt(Network):
    """A stem of stride 4 and stages of blocks, with downsampling before all stages but the first."""

    stages: tuple[int, ...]  # blocks
    widths: tuple[int, ...]  # channels per stage
    drop_path: float  # of the last block; rises linearly from 0 at the first
    grn: bool = False  # V2
    head: HeadConfig = field(default=HeadConfig(norm_after_pool="layer"), kw_only=True)

    def feature_map(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps images [B, H, W, C] to [B, H // 32, W // 32, widths[-1]]."""
        conv = partial(Conv, padding="VALID", use_bias=True, dtype=self.dtype, kernel_init=KERNEL_INIT)
        norm = partial(nn.LayerNorm, epsilon=EPSILON, use_fast_variance=False, dtype=self.dtype)  # see head.NORMS
        x = norm(name="stem_norm")(conv(self.widths[0], 4, 4, name="stem_conv")(x))  # [B, H // 4, W // 4, widths[0]]
        number, last = 0, max(sum(self.stages) - 1, 1)
        for s, (depth, width) in enumerate(zip(self.stages, self.widths, strict=True), 1):
            if s > 1:
                x = Downsample(width, conv, norm, name=f"stage{s}_downsample")(x)
            for i in range(1, depth + 1):
                rate = self.drop_path * number / last
                block = Block(self.grn, rate, conv, norm, self.dtype, name=f"stage{s}_block{i}")
                x = self.run(block, x, train=train)
                number += 1
        return x


SHALLOW, DEEP = (3, 3, 9, 3), (3, 3, 27, 3)


def v1(depths: tuple[int, ...], width: int, drop_path: float, grn: bool = False) -> partial[ConvNeXt]:
    """Returns a constructor; `width`, the number of channels of the first stage, doubles with each further stage."""
    return partial(ConvNeXt, depths, (width, 2 * width, 4 * width, 8 * width), drop_path=drop_path, grn=grn)


v2 = partial(v1, drop_path=0.1, grn=True)
# Rates of drop path from TRAINING.md of the authors' repositories: for V1 those of ImageNet-1k from scratch (XL: of
# fine-tuning from ImageNet-22k, its only recipe), for V2 those of fine-tuning (given only for atto, tiny and base).
CONVNEXT = {
    "convnext_tiny": v1(SHALLOW, 96, 0.1),
    "convnext_small": v1(DEEP, 96, 0.4),
    "convnext_base": v1(DEEP, 128, 0.5),
    "convnext_large": v1(DEEP, 192, 0.5),
    "convnext_xlarge": v1(DEEP, 256, 0.4),
    "convnextv2_atto": v2((2, 2, 6, 2), 40),
    "convnextv2_femto": v2((2, 2, 6, 2), 48),
    "convnextv2_pico": v2((2, 2, 6, 2), 64),
    "convnextv2_nano": v2((2, 2, 8, 2), 80),
    "convnextv2_tiny": v2(SHALLOW, 96, drop_path=0.2),
    "convnextv2_base": v2(DEEP, 128),
    "convnextv2_large": v2(DEEP, 192),
    "convnextv2_huge": v2(DEEP, 352),
}
