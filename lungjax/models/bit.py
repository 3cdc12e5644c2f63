"""BiT, "Big Transfer" (Kolesnikov et al., ECCV 2020, arXiv 1912.11370): wide ResNetV2 with GroupNorm.

As in the released code (github.com/google-research/big_transfer): kernels are standardised (arXiv 1903.10520) with
1e-10 inside the root, no convolution has a bias, a stage's stride is on the 3x3 of its first block, padding is
symmetric and the stem's pool has a border of zeros. A fresh head starts at zero, as in the release's transfer.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lungjax.config import HeadConfig
from lungjax.models.head import Head, min_cells
from lungjax.models.image_size import Window, check_size, smallest
from lungjax.models.layers import Conv
from lungjax.models.resnet import EXPANSION, KERAS_INIT, R50, R101, R152, pool_zeros

GROUPS = 32  # of GroupNorm, whatever the width


def norm_relu(x: jax.Array, epsilon: float, dtype: Any, name: str) -> jax.Array:
    """Takes GroupNorm and ReLU of x [B, H, W, C]."""
    # The fast variance (mean of squares less square of mean) loses digits that parity tests see.
    return nn.relu(nn.GroupNorm(GROUPS, epsilon=epsilon, use_fast_variance=False, dtype=dtype, name=name)(x))


class Block(nn.Module):
    """Norm and ReLU, then 1x1, 3x3, 1x1 with norm and ReLU between, around which the input is added."""

    width: int  # channels in the middle
    stride: int
    standardize: float
    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, H, W, C] to [B, H / stride, W / stride, 4 * width], rounded up."""
        middle, wide = self.width, self.width * EXPANSION
        conv = partial(
            Conv, padding="SYMMETRIC", standardize=self.standardize, kernel_init=KERAS_INIT, dtype=self.dtype
        )
        norm = partial(norm_relu, epsilon=self.epsilon, dtype=self.dtype)
        shortcut = x
        x = norm(x, name="preact_norm")
        if self.stride != 1 or shortcut.shape[-1] != wide:
            shortcut = conv(wide, 1, self.stride, name="shortcut_conv")(x)
        x = norm(conv(middle, 1, name="conv1")(x), name="norm1")
        x = norm(conv(middle, 3, self.stride, name="conv2")(x), name="norm2")
        return shortcut + conv(wide, 1, name="conv3")(x)


class BiT(nn.Module):
    """Stem, pool, stages of blocks that double the width, norm and ReLU, head."""

    repeats: tuple[int, ...]  # blocks of each stage
    width: int = 64  # channels of the stem and of the first stage's middle
    standardize: float = 1e-10  # added to a kernel's variance before the root; timm's copy of this network has 1e-8
    epsilon: float = 1e-5  # of GroupNorm
    head: HeadConfig = HeadConfig(zero_init=True)
    outputs: int = 1000
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Maps images [B, H, W, C] to (logits [B, outputs], {"last": the last map, for four stages of side H / 32}).

        Raises ValueError for images below `minimum_size`.
        """
        check_size(images, self.minimum_size())

        def run(block: Block, x: jax.Array) -> jax.Array:
            return block(x)

        if self.remat:
            run = nn.remat(run)
        shared = {"standardize": self.standardize, "dtype": self.dtype}
        stem = Conv(self.width, 7, 2, padding="SYMMETRIC", kernel_init=KERAS_INIT, name="stem_conv", **shared)
        x = pool_zeros(stem(images))  # [B, H / 4, W / 4, width]
        for number, repeats in enumerate(self.repeats, 1):
            for i in range(1, repeats + 1):
                stride = 2 if number > 1 and i == 1 else 1
                width = self.width * 2 ** (number - 1)
                x = run(Block(width, stride, epsilon=self.epsilon, name=f"stage{number}_block{i}", **shared), x)
        x = norm_relu(x, self.epsilon, self.dtype, "top_norm")
        logits = Head(self.head, self.outputs, name="head")(x, train=train)
        return logits, {"last": x}

    def minimum_size(self) -> tuple[int, int]:
        """Returns the least height and width in pixels."""
        windows: list[Window] = [(7, 2), (3, 2)] + [(3, 2)] * (len(self.repeats) - 1)
        side = smallest(windows, "same", min_cells(self.head))
        return side, side


BIT = {
    "bit_r50x1": partial(BiT, R50),
    "bit_r101x1": partial(BiT, R101),
    "bit_r50x3": partial(BiT, R50, width=3 * 64),
    "bit_r101x3": partial(BiT, R101, width=3 * 64),
    "bit_r152x2": partial(BiT, R152, width=2 * 64),
    "bit_r152x4": partial(BiT, R152, width=4 * 64),
}
