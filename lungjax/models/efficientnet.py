"""EfficientNet (Tan and Le, ICML 2019, arXiv 1905.11946) B0 to B7, its Lite versions, and V2 (arXiv 2104.00298).

The networks consist of stages with two kinds of blocks, scaled in width and depth. Batch norm has epsilon 1e-3
(torch-trained weights: 1e-5) and decay 0.99 (0.9 in V2), as in tensorflow/tpu, google/automl and Keras. Padding is SAME
as in TensorFlow, which is (0, 1) for an even map at stride 2; torch-trained weights need "symmetric". Lite
(tensorflow/tpu, efficientnet/lite) has ReLU6 and no squeeze-excite.
"""

import math
from dataclasses import field
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
from flax import linen as nn

from lungjax.config import HeadConfig
from lungjax.models.layers import Activation, BatchNorm, Conv, DropPath, Initializer, Layer, SqueezeExcite
from lungjax.models.network import Network

# Normal with variance 2 / fan_out (google/automl); for a depthwise kernel jax calls this number fan_in.
CONV_INIT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
DEPTHWISE_INIT = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


class Stage(NamedTuple):
    """A row of table 4 of the V2 paper: identical blocks, except that the first changes width and resolution."""

    fused: bool  # Fused-MBConv, else MBConv
    repeats: int
    width: int  # channels out
    expand: int  # expanded channels per channel in
    stride: int  # of the first block
    kernel: int = 3
    squeeze: float = 0.0  # bottleneck channels of squeeze-excite per (unexpanded) channel in; 0: none


class Row(NamedTuple):
    """The settings of one block."""

    kernel: int
    middle: int  # expanded channels; no expansion if equal to the channels in
    squeeze: int  # bottleneck channels of squeeze-excite; 0: none
    width: int  # channels out
    activation: Activation
    stride: int = 1
    fused: bool = False


class Block(nn.Module):
    """MBConv: expand, depthwise, squeeze-excite, project, add. Fused: k x k expansion without depthwise convolution."""

    row: Row
    drop_path: float
    conv: Layer
    depthwise: Layer
    norm: Layer
    squeeze_excite: Layer

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps [B, H, W, C] to [B, H / stride, W / stride, row.width], rounded up."""
        row, inputs, act = self.row, x, self.row.activation
        expands = row.middle != x.shape[-1]

        def conv_bn(x: jax.Array, width: int, spatial: bool, name: str, act: Activation | None) -> jax.Array:
            size, stride = (row.kernel, row.stride) if spatial else (1, 1)
            x = self.conv(width, size, stride, name=f"{name}_conv")(x)
            return self.norm(name=f"{name}_bn")(x, train=train, activation=act)

        if expands:
            x = conv_bn(x, row.middle, row.fused, "expand", act)
        if not row.fused:
            x = self.depthwise(row.middle, row.kernel, row.stride, name="dwconv")(x)
            x = self.norm(name="bn")(x, train=train, activation=act)
        if row.squeeze:
            x = self.squeeze_excite(row.squeeze, name="se")(x)
        single = row.fused and not expands  # the block is a single k x k convolution
        x = conv_bn(x, row.width, single, "project", act if single else None)
        if inputs.shape == x.shape:
            x = inputs + DropPath(self.drop_path, name="drop_path")(x, deterministic=not train)
        return x


class EfficientNet(Network):
    """Stem, stages of blocks and a 1x1 convolution to `top` channels; also used for MobileNetV2 and V3."""

    paddings: ClassVar[tuple[str, ...]] = ("same", "symmetric")

    stages: tuple[tuple[Row, ...], ...]
    stem: int  # channels
    top: int  # channels of the last map
    momentum: float = 0.99  # of batch norm: decay of the running statistics
    epsilon: float = 1e-3  # of batch norm
    padding: str = "same"
    activation: Activation = nn.silu  # of stem and top
    drop_path: float = 0.2  # block b of n is dropped at b / n of this rate, b = 0..n-1
    conv_init: Initializer = CONV_INIT
    depthwise_init: Initializer = DEPTHWISE_INIT
    squeeze_excite: Layer = partial(SqueezeExcite, kernel_init=CONV_INIT)
    head: HeadConfig = field(default=HeadConfig(dropout=0.2), kw_only=True)

    def feature_map(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps images [B, H, W, C] to [B, H / 32, W / 32, top]."""
        conv = partial(Conv, padding=self.padding, dtype=self.dtype, kernel_init=self.conv_init)
        depthwise = partial(conv, groups=-1, kernel_init=self.depthwise_init)
        norm = partial(BatchNorm, momentum=self.momentum, epsilon=self.epsilon, dtype=self.dtype)
        squeeze_excite = partial(self.squeeze_excite, dtype=self.dtype)
        x = conv(self.stem, 3, 2, name="stem_conv")(x)  # [B, H / 2, W / 2, stem]
        x = norm(name="stem_bn")(x, train=train, activation=self.activation)
        number, total = 0, sum(map(len, self.stages))
        for s, rows in enumerate(self.stages, 1):
            for i, row in enumerate(rows, 1):
                rate, name = self.drop_path * number / total, f"stage{s}_block{i}"
                x = self.run(Block(row, rate, conv, depthwise, norm, squeeze_excite, name=name), x, train=train)
                number += 1
        x = conv(self.top, 1, name="top_conv")(x)
        return norm(name="top_bn")(x, train=train, activation=self.activation)

    def _stride(self) -> int:
        return 2 * math.prod(row.stride for rows in self.stages for row in rows)


def expand(stages: tuple[Stage, ...], channels: int, activation: Activation = nn.silu) -> tuple[tuple[Row, ...], ...]:
    """Returns the blocks of each stage that follow a stem of `channels` channels."""
    result = []
    for stage in stages:
        rows = []
        for i in range(stage.repeats):
            squeeze = max(1, int(channels * stage.squeeze)) if stage.squeeze else 0
            stride, middle = stage.stride if i == 0 else 1, channels * stage.expand
            rows.append(Row(stage.kernel, middle, squeeze, stage.width, activation, stride, stage.fused))
            channels = stage.width
        result.append(tuple(rows))
    return tuple(result)


def compound_scale(
    stages: tuple[Stage, ...], stem: int, width: float, depth: float, dropout: float, guard: bool = False,
    lite: bool = False, activation: Activation = nn.silu, **fields: Any,
) -> partial[EfficientNet]:  # fmt: skip
    """Returns a constructor of the network with all widths and depths of `stages` multiplied by `width` and `depth`.

    Widths are multiples of 8 and, with `guard`, never rounded down by more than 10 %. `lite` drops squeeze-excite and
    leaves stem, top and the depth of the first and last stage unscaled.
    """

    def wide(channels: int) -> int:
        rounded = max(8, int(channels * width + 4) // 8 * 8)
        return rounded + 8 if guard and rounded < 0.9 * (channels * width) else rounded

    scaled = [s._replace(width=wide(s.width), repeats=math.ceil(s.repeats * depth)) for s in stages]
    stem, top = (stem, 1280) if lite else (wide(stem), wide(1280))
    if lite:
        scaled = [s._replace(squeeze=0.0) for s in scaled]
        scaled[0], scaled[-1] = (scaled[i]._replace(repeats=stages[i].repeats) for i in (0, -1))
    fields |= {"activation": activation, "head": HeadConfig(dropout=dropout)}
    return partial(EfficientNet, expand(tuple(scaled), stem, activation), stem, top, **fields)


#         fused, repeats, width, expand, stride, kernel, squeeze
V1 = (
    Stage(False, 1, 16, 1, 1, 3, 0.25),
    Stage(False, 2, 24, 6, 2, 3, 0.25),
    Stage(False, 2, 40, 6, 2, 5, 0.25),
    Stage(False, 3, 80, 6, 2, 3, 0.25),
    Stage(False, 3, 112, 6, 1, 5, 0.25),
    Stage(False, 4, 192, 6, 2, 5, 0.25),
    Stage(False, 1, 320, 6, 1, 3, 0.25),
)


def v2(repeats: tuple[int, ...], widths: tuple[int, ...]) -> tuple[Stage, ...]:
    """Returns the stages of a V2 network: three of Fused-MBConv, then three or four of MBConv."""
    kinds = ((True, 1, 1), (True, 4, 2), (True, 4, 2), (False, 4, 2), (False, 6, 1), (False, 6, 2), (False, 6, 1))
    rows = zip(kinds, repeats, widths, strict=False)  # S and the base stop one stage earlier
    return tuple(Stage(fused, n, w, e, s, 3, 0.0 if fused else 0.25) for (fused, e, s), n, w in rows)


V2_BASE = v2((1, 2, 2, 3, 5, 8), (16, 32, 48, 96, 112, 192))

# Width, depth and dropout of each variant.
B = (
    (1.0, 1.0, 0.2), (1.0, 1.1, 0.2), (1.1, 1.2, 0.3), (1.2, 1.4, 0.3),
    (1.4, 1.8, 0.4), (1.6, 2.2, 0.4), (1.8, 2.6, 0.5), (2.0, 3.1, 0.5),
)  # fmt: skip
lite = partial(compound_scale, guard=True, lite=True, activation=nn.relu6)
LITE = ((1.0, 1.0, 0.2), (1.0, 1.1, 0.2), (1.1, 1.2, 0.3), (1.2, 1.4, 0.3), (1.4, 1.8, 0.3))
EFFICIENTNET = {
    **{f"efficientnet_b{i}": compound_scale(V1, 32, *scale, guard=True) for i, scale in enumerate(B)},
    **{f"efficientnet_lite{i}": lite(V1, 32, *scale) for i, scale in enumerate(LITE)},
}
# Dropout of V2 is 0.2 as in Keras; the authors have 0.3 for B2, B3 and M, and 0.4 for L and XL. Widths are rounded
# without the guard: the first stage of B3 has 16 channels.
v2_scale = partial(compound_scale, dropout=0.2, momentum=0.9)
EFFICIENTNETV2 = {
    "efficientnetv2_b0": v2_scale(V2_BASE, 32, 1.0, 1.0),
    "efficientnetv2_b1": v2_scale(V2_BASE, 32, 1.0, 1.1),
    "efficientnetv2_b2": v2_scale(V2_BASE, 32, 1.1, 1.2),
    "efficientnetv2_b3": v2_scale(V2_BASE, 32, 1.2, 1.4),
    "efficientnetv2_s": v2_scale(v2((2, 4, 4, 6, 9, 15), (24, 48, 64, 128, 160, 256)), 24, 1.0, 1.0),
    "efficientnetv2_m": v2_scale(v2((3, 5, 5, 7, 14, 18, 5), (24, 48, 80, 160, 176, 304, 512)), 24, 1.0, 1.0),
    "efficientnetv2_l": v2_scale(v2((4, 7, 7, 10, 19, 25, 7), (32, 64, 96, 192, 224, 384, 640)), 32, 1.0, 1.0),
    "efficientnetv2_xl": v2_scale(v2((4, 8, 8, 16, 24, 32, 8), (32, 64, 96, 192, 256, 512, 640)), 32, 1.0, 1.0),
}
