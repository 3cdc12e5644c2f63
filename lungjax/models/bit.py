"""BiT, "Big Transfer" (Kolesnikov et al., ECCV 2020, arXiv 1912.11370): wide ResNetV2 with GroupNorm.

As in the released code (github.com/google-research/big_transfer): kernels are standardized (arXiv 1903.10520) with
1e-10 inside the root, no convolution has a bias, the stride of a stage is on the 3x3 of its first block, padding is
symmetric and the stem's pool has a border of zeros. A fresh head starts at zero, as in the release's transfer.
"""

from dataclasses import field
from functools import partial

import jax
from flax import linen as nn

from lungjax.config import HeadConfig
from lungjax.models.layers import Conv, Layer
from lungjax.models.network import Network
from lungjax.models.resnet import EXPANSION, KERAS_INIT, R50, R101, R152, pool_zeros

GROUPS = 32  # of GroupNorm, for any width


class Block(nn.Module):
    """Norm and ReLU, then 1x1, 3x3, 1x1 with norm and ReLU between, plus the input."""

    width: int  # channels of the bottleneck
    stride: int
    conv: Layer
    norm: Layer

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, H, W, C] to [B, H / stride, W / stride, 4 * width], rounded up."""
        conv, bottleneck, wide, shortcut = self.conv, self.width, self.width * EXPANSION, x

        def norm_relu(x: jax.Array, name: str) -> jax.Array:
            return nn.relu(self.norm(name=name)(x))

        x = norm_relu(x, "preact_norm")
        if self.stride != 1 or shortcut.shape[-1] != wide:
            shortcut = conv(wide, 1, self.stride, name="shortcut_conv")(x)
        x = norm_relu(conv(bottleneck, 1, name="conv1")(x), "norm1")
        x = norm_relu(conv(bottleneck, 3, self.stride, name="conv2")(x), "norm2")
        return shortcut + conv(wide, 1, name="conv3")(x)


class BiT(Network):
    """Stem, pool, stages of blocks that double the width, norm and ReLU."""

    repeats: tuple[int, ...]  # blocks per stage
    width: int = 64  # channels of the stem and of the first stage's bottlenecks
    standardize: float = 1e-10  # added to a kernel's variance inside the root; timm's copy has 1e-8
    epsilon: float = 1e-5  # of GroupNorm
    head: HeadConfig = field(default=HeadConfig(zero_init=True), kw_only=True)

    def feature_map(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps images [B, H, W, C] to [B, H / 32, W / 32, 32 * width]."""
        run = self.block_runner(lambda block, x: block(x))
        options = {"padding": "SYMMETRIC", "standardize": self.standardize, "kernel_init": KERAS_INIT}
        conv = partial(Conv, dtype=self.dtype, **options)
        # The fast variance (mean of squares minus square of mean) loses digits that parity tests see.
        norm = partial(nn.GroupNorm, GROUPS, epsilon=self.epsilon, use_fast_variance=False, dtype=self.dtype)
        x = pool_zeros(conv(self.width, 7, 2, name="stem_conv")(x))  # [B, H / 4, W / 4, width]
        for number, repeats in enumerate(self.repeats, 1):
            for i in range(1, repeats + 1):
                stride = 2 if number > 1 and i == 1 else 1
                x = run(Block(self.width * 2 ** (number - 1), stride, conv, norm, name=f"stage{number}_block{i}"), x)
        return nn.relu(norm(name="top_norm")(x))

    def _stride(self) -> int:
        return 2 ** (len(self.repeats) + 1)


BIT = {
    "bit_r50x1": partial(BiT, R50),
    "bit_r101x1": partial(BiT, R101),
    "bit_r50x3": partial(BiT, R50, width=3 * 64),
    "bit_r101x3": partial(BiT, R101, width=3 * 64),
    "bit_r152x2": partial(BiT, R152, width=2 * 64),
    "bit_r152x4": partial(BiT, R152, width=4 * 64),
}
