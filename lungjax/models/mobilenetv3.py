"""MobileNetV3 small and large (Howard et al., ICCV 2019, arXiv 1905.02244).

Inverted residuals from a table of rows: 1x1 expands, depthwise, squeeze-excite, 1x1 projects. ReLU in the early rows,
hard swish in the later ones, the stem and the head. Squeeze-excite has ReLU inside, a hard sigmoid gate, and a quarter
of the expanded channels, rounded to a multiple of eight, in between. The head's dense layer of 1280 or 1024 comes after
the pool. Batch norm: epsilon 1e-3 (timm's own training: 1e-5), decay 0.999 (Keras). Padding: TF's SAME; torch-trained
weights need "symmetric".
"""

import math
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
from flax import linen as nn

from lungjax.config import HeadConfig
from lungjax.models.layers import Activation, BatchNorm, Conv, Layer, SqueezeExcite
from lungjax.models.mobilenet import CONV_INIT
from lungjax.models.network import Network

RE, HS = nn.relu, nn.hard_swish


class Row(NamedTuple):
    """A row of the paper's tables 1 and 2: one block."""

    kernel: int
    middle: int  # channels of the depthwise convolution; no expansion if equal to the channels in
    squeeze: int  # bottleneck channels of squeeze-excite; 0: none
    width: int  # channels out
    activation: Activation
    stride: int = 1


class Block(nn.Module):
    """Expand, depthwise, squeeze-excite, project, add."""

    row: Row
    conv: Layer
    norm: Layer
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps [B, H, W, C] to [B, H / stride, W / stride, width], rounded up."""
        row, inputs, act, conv, norm = self.row, x, self.row.activation, self.conv, self.norm
        if row.middle != x.shape[-1]:
            x = conv(row.middle, 1, name="expand_conv")(x)
            x = norm(name="expand_bn")(x, train=train, activation=act)
        x = conv(row.middle, row.kernel, strides=row.stride, groups=-1, name="dwconv")(x)
        x = norm(name="bn")(x, train=train, activation=act)
        if row.squeeze:
            x = SqueezeExcite(row.squeeze, nn.relu, nn.hard_sigmoid, self.dtype, CONV_INIT, name="se")(x)
        x = norm(name="project_bn")(conv(row.width, 1, name="project_conv")(x), train=train)
        return inputs + x if row.stride == 1 and inputs.shape[-1] == row.width else x


class MobileNetV3(Network):
    """Stem, stages of blocks of one width, a 1x1 convolution to `top` channels."""

    paddings: ClassVar[tuple[str, ...]] = ("same", "symmetric")

    stages: tuple[tuple[Row, ...], ...]
    top: int  # channels of the last map
    stem: int = 16  # channels
    momentum: float = 0.999  # of batch norm: decay of the running statistics
    epsilon: float = 1e-3  # of batch norm
    padding: str = "same"

    def feature_map(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps images [B, H, W, C] to [B, H / 32, W / 32, top]."""
        run = self.block_runner(lambda block, x: block(x, train=train))
        conv = partial(Conv, padding=self.padding, dtype=self.dtype, kernel_init=CONV_INIT)
        norm = partial(BatchNorm, momentum=self.momentum, epsilon=self.epsilon, dtype=self.dtype)
        x = conv(self.stem, 3, 2, name="stem_conv")(x)  # [B, H / 2, W / 2, stem]
        x = norm(name="stem_bn")(x, train=train, activation=nn.hard_swish)
        for number, rows in enumerate(self.stages, 1):
            for i, row in enumerate(rows, 1):
                x = run(Block(row, conv, norm, self.dtype, name=f"stage{number}_block{i}"), x)
        x = conv(self.top, 1, name="top_conv")(x)
        return norm(name="top_bn")(x, train=train, activation=nn.hard_swish)

    def _stride(self) -> int:
        return 2 * math.prod(row.stride for rows in self.stages for row in rows)


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


# The head of the paper: mean, a dense layer with hard swish, dropout.
HEAD = partial(HeadConfig, activation="hard_swish", hidden_dropout=0.2)
MOBILENETV3 = {
    "mobilenetv3_small": partial(MobileNetV3, SMALL, 576, head=HEAD(hidden=(1024,))),
    "mobilenetv3_large": partial(MobileNetV3, LARGE, 960, head=HEAD(hidden=(1280,))),
}
