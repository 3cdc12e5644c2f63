"""VGG-16 and VGG-19 (Simonyan and Zisserman, ICLR 2015, arXiv 1409.1556; configurations D and E).

The networks have 3x3 convolutions with bias and ReLU, five 2x2 max pools, two dense layers of 4096 on the flattened map
and, as published, no normalization. Kernels use Glorot uniform initialization (as in Keras). The paper and torchvision
use dropout of 0.5 after the dense layers (`head.hidden_dropout`); Keras and the default use none. The dense layers of
published weights need a 7 x 7 map, hence images of 224 x 224.
"""

from dataclasses import field
from functools import partial
from typing import Any, ClassVar

import jax
from flax import linen as nn

from lungjax.config import HeadConfig
from lungjax.models.layers import Conv, max_pool
from lungjax.models.network import Network


class Block(nn.Module):
    """One 3x3 convolution and ReLU."""

    width: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, H, W, C] to [B, H, W, width]."""
        init = nn.initializers.glorot_uniform()
        return nn.relu(Conv(self.width, 3, use_bias=True, dtype=self.dtype, kernel_init=init, name="conv")(x))


class Vgg(Network):
    """Stages of convolutions, each followed by a pool."""

    stem_stride: ClassVar[int] = 1

    stages: tuple[int, ...]  # convolutions
    widths: tuple[int, ...] = (64, 128, 256, 512, 512)  # channels per stage
    head: HeadConfig = field(default=HeadConfig(pool="flatten", hidden=(4096, 4096)), kw_only=True)

    def feature_map(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps images [B, H, W, C] to [B, H / 32, W / 32, 512]."""
        for number, (repeats, width) in enumerate(zip(self.stages, self.widths, strict=True), 1):
            for i in range(1, repeats + 1):
                x = self.run(Block(width, self.dtype, name=f"stage{number}_block{i}"), x)
            x = max_pool(x, 2, 2)  # [B, H / 2, W / 2, width]; an odd map loses its last row and column
        return x


VGG = {"vgg16": partial(Vgg, (2, 2, 3, 3, 3)), "vgg19": partial(Vgg, (2, 2, 4, 4, 4))}
