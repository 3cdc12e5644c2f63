"""VGG-16 and VGG-19 (Simonyan and Zisserman, ICLR 2015, arXiv 1409.1556; configurations D and E).

3x3 convolutions with a bias and ReLU, five 2x2 max pools, the whole map flattened, two dense layers of 4096. The
published network has no norm. Kernels start Glorot uniform (Keras; the paper's own advice after publication). Keras
has no dropout after the dense layers, the paper and torchvision have 0.5 (`head.hidden_dropout`). The dense layers
of published weights belong to a 7 x 7 map, that is to images of 224 x 224.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lungjax.config import HeadConfig
from lungjax.models.head import Head, min_cells
from lungjax.models.image_size import check_size, smallest
from lungjax.models.layers import Conv, max_pool

WIDTHS = (64, 128, 256, 512, 512)  # channels of the stages


class Block(nn.Module):
    """One 3x3 convolution and ReLU."""

    width: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, H, W, C] to [B, H, W, width]."""
        init = nn.initializers.glorot_uniform()
        return nn.relu(Conv(self.width, 3, use_bias=True, dtype=self.dtype, kernel_init=init, name="conv")(x))


class Vgg(nn.Module):
    """Five stages of convolutions, each closed by a pool, and the head."""

    repeats: tuple[int, ...]  # convolutions of each stage
    widths: tuple[int, ...] = WIDTHS
    head: HeadConfig = HeadConfig(pool="flatten", hidden=(4096, 4096))
    outputs: int = 1000
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Maps images [B, H, W, C] to (logits [B, outputs], {"last": [B, H / 32, W / 32, 512]}).

        Raises ValueError for images below `minimum_size`.
        """
        check_size(images, self.minimum_size())

        def run(block: Block, x: jax.Array) -> jax.Array:
            return block(x)

        if self.remat:
            run = nn.remat(run)
        x = images
        for number, (repeats, width) in enumerate(zip(self.repeats, self.widths, strict=True), 1):
            for i in range(1, repeats + 1):
                x = run(Block(width, self.dtype, name=f"stage{number}_block{i}"), x)
            x = max_pool(x, 2, 2)  # [B, H / 2, W / 2, width]; an odd map loses its last row and column
        logits = Head(self.head, self.outputs, name="head")(x, train=train)
        return logits, {"last": x}

    def minimum_size(self) -> tuple[int, int]:
        """Returns the least height and width in pixels."""
        side = smallest([(2, 2)] * len(self.repeats), "valid", min_cells(self.head))
        return side, side


VGG = {
    "vgg16": partial(Vgg, (2, 2, 3, 3, 3)),
    "vgg19": partial(Vgg, (2, 2, 4, 4, 4)),
}
