"""BiT, "Big Transfer" (Kolesnikov et al., ECCV 2020, arXiv 1912.11370): wide ResNetV2 with GroupNorm.

As in the released code (github.com/google-research/big_transfer), kernels are standardized (arXiv 1903.10520) with
1e-10 inside the root, convolutions have no bias, the 3x3 convolution of the first block of a stage has its stride,
padding is symmetric, and the pool of the stem has a border of zeros. A new head is initialized with zeros.
"""

from dataclasses import field
from functools import partial

import jax
from flax import linen as nn

from lungjax.config import HeadConfig
from lungjax.models.head import NORMS
from lungjax.models.layers import Conv
from lungjax.models.network import Network
from lungjax.models.resnet import KERAS_INIT, R50, R101, R152, PreactBlock, pool_zeros


class BiT(Network):
    """Stem, pool, stages of blocks, each twice as wide as the one before, norm and ReLU."""

    repeats: tuple[int, ...]  # blocks per stage
    width: int = 64  # channels of the stem and of the first stage's bottlenecks
    standardize: float = 1e-10  # epsilon of weight standardization, inside the root; 1e-8 in timm
    epsilon: float = 1e-5  # of GroupNorm
    head: HeadConfig = field(default=HeadConfig(zero_init=True), kw_only=True)

    def feature_map(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps images [B, H, W, C] to [B, H / 32, W / 32, 32 * width]."""

        def conv(name: str, features: int, size: int, stride: int) -> Conv:
            options = {"standardize": self.standardize, "kernel_init": KERAS_INIT, "dtype": self.dtype}
            return Conv(features, size, stride, "SYMMETRIC", name=name, **options)

        def norm_relu(x: jax.Array, name: str, train: bool) -> jax.Array:
            return nn.relu(NORMS["group"](epsilon=self.epsilon, dtype=self.dtype, name=name)(x))

        x = pool_zeros(conv("stem_conv", self.width, 7, 2)(x))  # [B, H / 4, W / 4, width]
        for number, repeats in enumerate(self.repeats, 1):
            for i in range(1, repeats + 1):
                stride, width = 2 if number > 1 and i == 1 else 1, self.width * 2 ** (number - 1)
                block = PreactBlock(width, stride, 2, conv, norm_relu, "norm", name=f"stage{number}_block{i}")
                x = self.run(block, x, train=train)
        return norm_relu(x, "top_norm", train)

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
