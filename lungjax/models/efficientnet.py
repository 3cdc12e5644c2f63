"""EfficientNetV2 (Tan and Le, ICML 2021, arXiv 2104.00298): B0 to B3, S, M, L.

Two kinds of block in a table of stages; width and depth scale the base to B0..B3. Layer names are those of
Keras with a slash after the block, so that weight rules stay short.

Batch norm: epsilon 1e-3, decay 0.9 (google/automl efficientnetv2/hparams.py, Keras). Padding: TF's SAME,
which at stride 2 pads an even map by (0, 1). Input range and mean/std belong to the weights (`InputSpec`).
"""

import math
from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from lungjax.config import HeadConfig
from lungjax.models.head import Head, cells
from lungjax.models.layers import Activation, BatchNorm, Conv, DropPath, SqueezeExcite
from lungjax.models.sizes import check_size, smallest

BN_EPSILON = 1e-3
# Normal with variance 2 / fan_out (google/automl). An input pixel of a depthwise kernel [k, k, 1, C] has
# k * k outputs, which is what jax counts as its fan_in.
CONV_INIT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
DEPTHWISE_INIT = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


class Stage(NamedTuple):
    """A row of the paper's table 4: equal blocks, the first of which changes width and resolution."""

    fused: bool  # Fused-MBConv, else MBConv
    repeats: int
    width: int  # channels out
    expand: int  # the middle is this times the channels in
    stride: int  # of the first block
    kernel: int = 3
    squeeze: float = 0.0  # squeeze-excite to this part of the block's input channels; 0 is none


class Block(nn.Module):
    """MBConv: expand, depthwise, squeeze-excite, project, add. Fused: one k x k expands, no depthwise."""

    stage: Stage
    stride: int
    drop_path: float
    momentum: float
    activation: Activation
    freeze_norm: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps [B, H, W, C] to [B, H / stride, W / stride, stage.width], rounded up."""
        stage, inputs, act, dtype = self.stage, x, self.activation, self.dtype
        middle = x.shape[-1] * stage.expand
        conv = partial(Conv, padding="SAME", dtype=dtype, kernel_init=CONV_INIT)

        def norm(x: jax.Array, name: str) -> jax.Array:
            bn = BatchNorm(momentum=self.momentum, epsilon=BN_EPSILON, dtype=dtype, name=name)
            return bn(x, train=train and not self.freeze_norm)

        if stage.fused and stage.expand > 1:
            x = conv(middle, stage.kernel, strides=self.stride, name="expand_conv")(x)
            x = act(norm(x, "expand_bn"))
        elif stage.expand > 1:
            x = act(norm(conv(middle, 1, name="expand_conv")(x), "expand_bn"))
        if not stage.fused:
            x = Conv(
                middle,
                stage.kernel,
                strides=self.stride,
                padding="SAME",
                groups=middle,
                dtype=dtype,
                kernel_init=DEPTHWISE_INIT,
                name="dwconv",
            )(x)
            x = act(norm(x, "bn"))
        if stage.squeeze:
            # A part of the block's own input channels, not of the expanded ones.
            reduced = max(1, int(inputs.shape[-1] * stage.squeeze))
            x = SqueezeExcite(reduced, act, kernel_init=CONV_INIT, dtype=dtype, name="se")(x)
        if stage.fused and stage.expand == 1:  # the one k x k convolution is the whole block
            x = conv(stage.width, stage.kernel, strides=self.stride, name="project_conv")(x)
            x = act(norm(x, "project_bn"))
        else:
            x = norm(conv(stage.width, 1, name="project_conv")(x), "project_bn")
        if inputs.shape == x.shape:
            x = inputs + DropPath(self.drop_path, name="drop_path")(x, train=train)
        return x


class EfficientNet(nn.Module):
    """Stem, stages of blocks, a 1x1 convolution to `top` channels, head."""

    stages: tuple[Stage, ...]
    stem: int  # channels
    top: int  # channels of the last map
    momentum: float = 0.9  # of batch norm: the part of the old statistics kept
    activation: Activation = nn.silu
    drop_path: float = 0.2  # block b of n is dropped with b / n of this, b = 0..n-1
    head: HeadConfig = HeadConfig(dropout=0.2)
    outputs: int = 1000
    freeze_norm: bool = False
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Maps images [B, H, W, C] to (logits [B, outputs], {"last": [B, H / 32, W / 32, top]}).

        Raises ValueError for images below `minimum_size`.
        """
        check_size(images, self.minimum_size())
        conv = partial(Conv, padding="SAME", dtype=self.dtype, kernel_init=CONV_INIT)
        norm = partial(BatchNorm, momentum=self.momentum, epsilon=BN_EPSILON, dtype=self.dtype)
        norm_trains = train and not self.freeze_norm

        def run(block: Block, x: jax.Array) -> jax.Array:
            return block(x, train=train)

        if self.remat:
            run = nn.remat(run)
        x = conv(self.stem, 3, strides=2, name="stem_conv")(images)  # [B, H / 2, W / 2, stem]
        x = self.activation(norm(name="stem_bn")(x, train=norm_trains))
        total, done = sum(stage.repeats for stage in self.stages), 0
        for number, stage in enumerate(self.stages, 1):
            for i in range(stage.repeats):
                block = Block(
                    stage,
                    stride=stage.stride if i == 0 else 1,
                    drop_path=self.drop_path * done / total,
                    momentum=self.momentum,
                    activation=self.activation,
                    freeze_norm=self.freeze_norm,
                    dtype=self.dtype,
                    name=f"block{number}{chr(ord('a') + i)}",
                )
                x = run(block, x)  # [B, H / stride, W / stride, stage.width]
                done += 1
        x = conv(self.top, 1, name="top_conv")(x)  # [B, H / 32, W / 32, top]
        x = self.activation(norm(name="top_bn")(x, train=norm_trains))
        logits = Head(self.head, self.outputs, self.freeze_norm, name="head")(x, train=train)
        return logits, {"last": x}

    def minimum_size(self) -> tuple[int, int]:
        """Returns the least height and width in pixels."""
        windows = [(3, 2)] + [(stage.kernel, stage.stride) for stage in self.stages]
        side = smallest(windows, "same", cells(self.head))
        return side, side


def scale(stages: Iterable[Stage], stem: int, width: float, depth: float) -> dict[str, Any]:
    """Returns the fields of a network `width` times as wide and `depth` times as deep.

    Widths round to the nearest eight, without V1's guard against losing a tenth: B3's first stage has 16.
    """

    def eights(channels: int) -> int:
        return max(8, int(channels * width + 4) // 8 * 8)

    scaled = tuple(s._replace(width=eights(s.width), repeats=math.ceil(s.repeats * depth)) for s in stages)
    return {"stages": scaled, "stem": eights(stem), "top": eights(1280)}


#         fused, repeats, width, expand, stride
V2_BASE = (
    Stage(True, 1, 16, 1, 1),
    Stage(True, 2, 32, 4, 2),
    Stage(True, 2, 48, 4, 2),
    Stage(False, 3, 96, 4, 2, squeeze=0.25),
    Stage(False, 5, 112, 6, 1, squeeze=0.25),
    Stage(False, 8, 192, 6, 2, squeeze=0.25),
)
V2_S = (
    Stage(True, 2, 24, 1, 1),
    Stage(True, 4, 48, 4, 2),
    Stage(True, 4, 64, 4, 2),
    Stage(False, 6, 128, 4, 2, squeeze=0.25),
    Stage(False, 9, 160, 6, 1, squeeze=0.25),
    Stage(False, 15, 256, 6, 2, squeeze=0.25),
)
V2_M = (
    Stage(True, 3, 24, 1, 1),
    Stage(True, 5, 48, 4, 2),
    Stage(True, 5, 80, 4, 2),
    Stage(False, 7, 160, 4, 2, squeeze=0.25),
    Stage(False, 14, 176, 6, 1, squeeze=0.25),
    Stage(False, 18, 304, 6, 2, squeeze=0.25),
    Stage(False, 5, 512, 6, 1, squeeze=0.25),
)
V2_L = (
    Stage(True, 4, 32, 1, 1),
    Stage(True, 7, 64, 4, 2),
    Stage(True, 7, 96, 4, 2),
    Stage(False, 10, 192, 4, 2, squeeze=0.25),
    Stage(False, 19, 224, 6, 1, squeeze=0.25),
    Stage(False, 25, 384, 6, 2, squeeze=0.25),
    Stage(False, 7, 640, 6, 1, squeeze=0.25),
)

# Dropout is Keras's 0.2 throughout; the authors' code raises it to 0.3 for B2, B3, M and 0.4 for L.
EFFICIENTNET = {
    f"efficientnetv2_{name}": partial(EfficientNet, **scale(stages, stem, width, depth))
    for name, stages, stem, width, depth in (
        ("b0", V2_BASE, 32, 1.0, 1.0),
        ("b1", V2_BASE, 32, 1.0, 1.1),
        ("b2", V2_BASE, 32, 1.1, 1.2),
        ("b3", V2_BASE, 32, 1.2, 1.4),
        ("s", V2_S, 24, 1.0, 1.0),
        ("m", V2_M, 24, 1.0, 1.0),
        ("l", V2_L, 32, 1.0, 1.0),
    )
}
