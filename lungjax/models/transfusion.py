"""The CBR family of "Transfusion" (Raghu et al., NeurIPS 2019, arXiv 1902.07208); the CT-COV19 study's CNNs.

A block is convolution, batch norm, ReLU ("CBR") and a max pool of stride 2; one dense layer follows the
global mean. The paper leaves the padding open: `padding` is a field, by default the study's "valid".
Convolutions have a bias, batch norm has epsilon 1e-3 and decay 0.99, kernels start Glorot uniform: the Keras
defaults that the study's code (github.com/marta-0/covid-ct) has.
"""

from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from lungjax.config import HeadConfig
from lungjax.models.head import Head, min_cells
from lungjax.models.image_size import Window, check_size, smallest
from lungjax.models.layers import BatchNorm, Conv, max_pool


class Transfusion(nn.Module):
    """Blocks of convolution, norm, ReLU, pool, one for each of `widths`."""

    paddings: ClassVar[tuple[str, ...]] = ("valid", "same")

    kernel: int  # side of every convolution
    widths: tuple[int, ...]
    pool: int = 3  # side of the max pool; its stride is 2
    last_pool: bool = True  # False: the last block goes straight to the head
    norm: bool = True
    momentum: float = 0.99  # of batch norm: the part of the old statistics kept
    epsilon: float = 1e-3  # of batch norm
    padding: str = "valid"  # of convolutions and pools; padded cells never win a pool
    head: HeadConfig = HeadConfig()
    outputs: int = 1000
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Maps images [B, H, W, C] to (logits [B, outputs], {"last": the last map [B, h, w, c]}).

        Raises ValueError for images below `minimum_size`.
        """
        check_size(images, self.minimum_size())
        pads = self.padding.upper()

        def block(module: nn.Module, x: jax.Array, number: int) -> jax.Array:
            name = "stem" if number == 1 else f"stage{number}"
            x = Conv(
                self.widths[number - 1],
                self.kernel,
                padding=pads,
                use_bias=True,
                kernel_init=nn.initializers.glorot_uniform(),
                dtype=self.dtype,
                name=f"{name}_conv",
            )(x)
            if self.norm:
                norm = BatchNorm(momentum=self.momentum, epsilon=self.epsilon, dtype=self.dtype, name=f"{name}_bn")
                x = norm(x, train=train, activation=nn.relu)
            else:
                x = nn.relu(x)
            if number < len(self.widths) or self.last_pool:
                x = max_pool(x, self.pool, 2, pads)
            return x

        if self.remat:
            block = nn.remat(block, static_argnums=(2,))
        x = images
        for number in range(1, len(self.widths) + 1):
            x = block(self, x, number)  # [B, h, w, widths[number - 1]], half the side of the block before
        logits = Head(self.head, self.outputs, name="head")(x, train=train)
        return logits, {"last": x}

    def minimum_size(self) -> tuple[int, int]:
        """Returns the least height and width in pixels."""
        windows: list[Window] = [(self.kernel, 1), (self.pool, 2)] * len(self.widths)
        side = smallest(windows if self.last_pool else windows[:-1], self.padding, min_cells(self.head))
        return side, side


TRANSFUSION = {
    "cbr_larget": partial(Transfusion, 7, (32, 64, 128, 256, 512), last_pool=False),
    "cbr_largew": partial(Transfusion, 7, (64, 128, 256, 512)),
    "cbr_small": partial(Transfusion, 7, (32, 64, 128, 256)),
    "cbr_tiny": partial(Transfusion, 5, (64, 128, 256, 512)),
    # What the CT-COV19 study calls LargeT is layer for layer the paper's Tiny.
    "cbr_larget_study": partial(Transfusion, 5, (64, 128, 256, 512)),
    # The same study's own "Simple": 3x3 convolutions, 2x2 pools, no norm.
    "simple": partial(Transfusion, 3, (16, 32, 64), pool=2, norm=False, head=HeadConfig(pool="max", hidden=(32,))),
}
