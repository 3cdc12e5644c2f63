"""MobileNetV3 small and large (Howard et al., ICCV 2019, arXiv 1905.02244).

Inverted residuals from a table of rows: 1x1 expands, depthwise, squeeze-excite, 1x1 projects. ReLU in the early rows,
hard swish in the later ones, the stem and the tail. Squeeze-excite has ReLU inside and a hard sigmoid as its gate; its
middle is a quarter of the expanded channels, to the nearest eight. The head's dense layer of 1280 or 1024 comes after
the pool. Batch norm: epsilon 1e-3 (timm's own training: 1e-5), decay 0.999 (Keras). Padding: TF's SAME; weights trained
in torch want "symmetric".
"""

from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from lungjax.config import HeadConfig
from lungjax.models.head import Head, min_cells
from lungjax.models.image_size import check_size, smallest
from lungjax.models.layers import Activation, BatchNorm, Conv, SqueezeExcite

CONV_INIT = nn.initializers.truncated_normal(0.09)  # that of the authors' code (tensorflow/models, slim)
RE, HS = nn.relu, nn.hard_swish


class Row(NamedTuple):
    """A row of the paper's tables 1 and 2: one block."""

    kernel: int
    middle: int  # channels of the depthwise convolution; equal to those that come in: no expansion
    squeeze: int  # channels in the middle of squeeze-excite; 0 is none
    width: int  # channels out
    activation: Activation
    stride: int = 1


class Block(nn.Module):
    """Expand, depthwise, squeeze-excite, project, add."""

    row: Row
    momentum: float
    epsilon: float
    padding: str
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps [B, H, W, C] to [B, H / stride, W / stride, width], rounded up."""
        row, inputs, act = self.row, x, self.row.activation
        conv = partial(Conv, padding=self.padding, dtype=self.dtype, kernel_init=CONV_INIT)
        norm = partial(BatchNorm, momentum=self.momentum, epsilon=self.epsilon, dtype=self.dtype)
        if row.middle != x.shape[-1]:
            x = conv(row.middle, 1, name="expand_conv")(x)
            x = norm(name="expand_bn")(x, train=train, activation=act)
        x = conv(row.middle, row.kernel, strides=row.stride, groups=-1, name="dwconv")(x)
        x = norm(name="bn")(x, train=train, activation=act)
        if row.squeeze:
            squeeze = partial(SqueezeExcite, gate=nn.hard_sigmoid, dtype=self.dtype, kernel_init=CONV_INIT)
            x = squeeze(row.squeeze, nn.relu, name="se")(x)
        x = norm(name="project_bn")(conv(row.width, 1, name="project_conv")(x), train=train)
        return inputs + x if row.stride == 1 and inputs.shape[-1] == row.width else x


class MobileNetV3(nn.Module):
    """Stem, stages of blocks of one width, a 1x1 convolution to `top` channels, head."""

    paddings: ClassVar[tuple[str, ...]] = ("same", "symmetric")

    stages: tuple[tuple[Row, ...], ...]
    top: int  # channels of the last map
    stem: int = 16  # channels
    momentum: float = 0.999  # of batch norm: the part of the old statistics kept
    epsilon: float = 1e-3  # of batch norm
    padding: str = "same"
    head: HeadConfig = HeadConfig()
    outputs: int = 1000
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Maps images [B, H, W, C] to (logits [B, outputs], {"last": [B, H / 32, W / 32, top]}).

        Raises ValueError for images below `minimum_size`.
        """
        check_size(images, self.minimum_size())
        bn = {"momentum": self.momentum, "epsilon": self.epsilon, "dtype": self.dtype}
        conv = partial(Conv, padding=self.padding, dtype=self.dtype, kernel_init=CONV_INIT)

        def run(block: Block, x: jax.Array) -> jax.Array:
            return block(x, train=train)

        if self.remat:
            run = nn.remat(run)
        x = conv(self.stem, 3, strides=2, name="stem_conv")(images)  # [B, H / 2, W / 2, stem]
        x = BatchNorm(name="stem_bn", **bn)(x, train=train, activation=nn.hard_swish)
        for number, rows in enumerate(self.stages, 1):
            for i, row in enumerate(rows, 1):
                block = Block(row, padding=self.padding, name=f"stage{number}_block{i}", **bn)
                x = run(block, x)  # [B, H / stride, W / stride, row.width]
        x = conv(self.top, 1, name="top_conv")(x)  # [B, H / 32, W / 32, top]
        x = BatchNorm(name="top_bn", **bn)(x, train=train, activation=nn.hard_swish)
        logits = Head(self.head, self.outputs, name="head")(x, train=train)
        return logits, {"last": x}

    def minimum_size(self) -> tuple[int, int]:
        """Returns the least height and width in pixels."""
        windows = [(3, 2)] + [(row.kernel, row.stride) for rows in self.stages for row in rows]
        side = smallest(windows, "same", min_cells(self.head))
        return side, side


#   kernel, middle, squeeze, width, activation, stride
SMALL = (
    (Row(3, 16, 8, 16, RE, 2),),
    (Row(3, 72, 0, 24, RE, 2), Row(3, 88, 0, 24, RE)),
    (Row(5, 96, 24, 40, HS, 2), Row(5, 240, 64, 40, HS), Row(5, 240, 64, 40, HS)),
    (Row(5, 120, 32, 48, HS), Row(5, 144, 40, 48, HS)),
    (Row(5, 288, 72, 96, HS, 2), Row(5, 576, 144, 96, HS), Row(5, 576, 144, 96, HS)),
)
LARGE = (
    (Row(3, 16, 0, 16, RE),),
    (Row(3, 64, 0, 24, RE, 2), Row(3, 72, 0, 24, RE)),
    (Row(5, 72, 24, 40, RE, 2), Row(5, 120, 32, 40, RE), Row(5, 120, 32, 40, RE)),
    (Row(3, 240, 0, 80, HS, 2), Row(3, 200, 0, 80, HS), Row(3, 184, 0, 80, HS), Row(3, 184, 0, 80, HS)),
    (Row(3, 480, 120, 112, HS), Row(3, 672, 168, 112, HS)),
    (Row(5, 672, 168, 160, HS, 2), Row(5, 960, 240, 160, HS), Row(5, 960, 240, 160, HS)),
)


def tail(hidden: int) -> HeadConfig:
    """Returns the published head: mean, a dense layer with hard swish, dropout."""
    return HeadConfig(hidden=(hidden,), activation="hard_swish", hidden_dropout=0.2)


MOBILENETV3 = {
    "mobilenetv3_small": partial(MobileNetV3, SMALL, 576, head=tail(1024)),
    "mobilenetv3_large": partial(MobileNetV3, LARGE, 960, head=tail(1280)),
}
