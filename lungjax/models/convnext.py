"""ConvNeXt (Liu et al., CVPR 2022, arXiv 2201.03545) and ConvNeXt V2 (Woo et al., CVPR 2023, arXiv 2301.00808).

V2 has the same network with a global response norm inside its blocks in place of V1's layer scale. All sources
agree: layer norms with epsilon 1e-6, GELU in its exact form, strided convolutions without padding (what is left
over at the lower and right edge is not seen), and a norm after the pool, not before it.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lungjax.config import HeadConfig
from lungjax.models.head import Head, min_cells
from lungjax.models.image_size import check_size, smallest
from lungjax.models.layers import Conv, DropPath, dense_product

EPSILON = 1e-6  # of layer norm and global response norm
LAYER_SCALE = 1e-6  # at the start
# The authors cut their normal at -2 and 2, which is a hundred standard deviations: it is not cut at all.
KERNEL_INIT = nn.initializers.normal(0.02)


class GlobalResponseNorm(nn.Module):
    """Scales each channel by its norm over the map, relative to the mean of all channels' norms, and adds x."""

    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, H, W, C] to the same shape."""
        scale = self.param("scale", nn.initializers.zeros_init(), (x.shape[-1],), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros_init(), (x.shape[-1],), jnp.float32)
        squares = jnp.square(x.astype(jnp.promote_types(x.dtype, jnp.float32))).sum((1, 2), keepdims=True)
        # GELU makes whole channels of small maps exactly zero, where the root's slope is infinite. Torch has 0.
        positive = squares > 0
        norms = jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1)), 0)  # [B, 1, 1, C]
        relative = norms / (norms.mean(-1, keepdims=True) + EPSILON)
        return x * (1 + scale * relative).astype(self.dtype) + bias.astype(self.dtype)


class Block(nn.Module):
    """Depthwise 7 x 7, norm, two dense layers with four times the channels between them, add."""

    grn: bool
    drop_path: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps [B, H, W, C] to the same shape."""
        inputs, channels = x, x.shape[-1]
        dense = partial(nn.Dense, dtype=self.dtype, kernel_init=KERNEL_INIT, dot_general=dense_product)
        conv = partial(Conv, groups=-1, use_bias=True, dtype=self.dtype, kernel_init=KERNEL_INIT)
        x = conv(channels, 7, padding="SAME", name="dwconv")(x)
        x = norm(self.dtype, "norm")(x)
        x = nn.gelu(dense(4 * channels, name="dense1")(x), approximate=False)
        if self.grn:
            x = GlobalResponseNorm(self.dtype, name="grn")(x)
        x = dense(channels, name="dense2")(x)
        if not self.grn:
            start = nn.initializers.constant(LAYER_SCALE)
            x = x * self.param("layer_scale", start, (channels,), jnp.float32).astype(self.dtype)
        return inputs + DropPath(self.drop_path, name="drop_path")(x, train=train)


class Downsample(nn.Module):
    """Norm, then a 2 x 2 convolution of stride 2."""

    width: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, H, W, C] to [B, H // 2, W // 2, width]."""
        conv = partial(Conv, padding="VALID", use_bias=True, dtype=self.dtype, kernel_init=KERNEL_INIT)
        return conv(self.width, 2, strides=2, name="conv")(norm(self.dtype, "norm")(x))


def norm(dtype: Any, name: str) -> nn.LayerNorm:
    """Returns a layer norm over the channels; its statistics are exact float32."""
    return nn.LayerNorm(epsilon=EPSILON, use_fast_variance=False, dtype=dtype, name=name)


class ConvNeXt(nn.Module):
    """A stem of stride 4, four stages of blocks with a downsampling before all but the first, head."""

    depths: tuple[int, ...]  # blocks of each stage
    widths: tuple[int, ...]  # channels of each stage
    drop_path: float  # of the last block; rises evenly from 0 at the first
    grn: bool = False  # V2
    head: HeadConfig = HeadConfig(norm_after_pool="layer")
    outputs: int = 1000
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Maps images [B, H, W, C] to (logits [B, outputs], {"last": [B, H // 32, W // 32, widths[-1]]}).

        Raises ValueError for images below `minimum_size`.
        """
        check_size(images, self.minimum_size())

        def run(block: Block, x: jax.Array) -> jax.Array:
            return block(x, train=train)

        if self.remat:
            run = nn.remat(run)
        stem = partial(Conv, padding="VALID", use_bias=True, dtype=self.dtype, kernel_init=KERNEL_INIT)
        x = stem(self.widths[0], 4, strides=4, name="stem_conv")(images)  # [B, H // 4, W // 4, widths[0]]
        x = norm(self.dtype, "stem_norm")(x)
        last, done = max(sum(self.depths) - 1, 1), 0
        for number, (depth, width) in enumerate(zip(self.depths, self.widths, strict=True), 1):
            if number > 1:
                x = Downsample(width, self.dtype, name=f"stage{number}_downsample")(x)
            for i in range(1, depth + 1):
                rate = self.drop_path * done / last
                x = run(Block(self.grn, rate, self.dtype, name=f"stage{number}_block{i}"), x)
                done += 1
        logits = Head(self.head, self.outputs, name="head")(x, train=train)
        return logits, {"last": x}

    def minimum_size(self) -> tuple[int, int]:
        """Returns the least height and width in pixels."""
        side = smallest([(4, 4)] + [(2, 2)] * (len(self.depths) - 1), "valid", min_cells(self.head))
        return side, side


SHALLOW, DEEP = (3, 3, 9, 3), (3, 3, 27, 3)


def v1(depths: tuple[int, ...], width: int, drop_path: float) -> partial[ConvNeXt]:
    """Returns a V1 whose stages have `width` channels, then twice as many each."""
    return partial(ConvNeXt, depths, (width, 2 * width, 4 * width, 8 * width), drop_path=drop_path)


def v2(depths: tuple[int, ...], width: int, drop_path: float = 0.1) -> partial[ConvNeXt]:
    """Returns a V2 whose stages have `width` channels, then twice as many each."""
    return partial(v1(depths, width, drop_path), grn=True)


# Drop path, from TRAINING.md of the authors' repositories: V1 for ImageNet-1k from scratch (XL: fine-tuning from
# ImageNet-22k, all it was made for); V2 for fine-tuning (atto, tiny, base; the others have no value there).
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
    "convnextv2_tiny": v2(SHALLOW, 96, 0.2),
    "convnextv2_base": v2(DEEP, 128),
    "convnextv2_large": v2(DEEP, 192),
    "convnextv2_huge": v2(DEEP, 352),
}
