"""MobileNet (Howard et al., 2017, arXiv 1704.04861) and MobileNetV2 (Sandler et al., CVPR 2018, arXiv 1801.04381).

A block of V1 is a 3x3 depthwise and a 1x1 convolution, each with batch norm and ReLU6. At stride 2 `padding="same"`
pads by (0, 1) as in Keras, which differs from SAME on odd maps. V2 has the MBConv of EfficientNet with ReLU6 and
without squeeze-excite. Batch norm has epsilon 1e-3 (torch-trained weights: 1e-5 and "symmetric" padding) and decay 0.99
in V1 and 0.999 in V2. Dropout is as in Keras: 0.001 in V1, none in V2 (torchvision: 0.2).
"""

from dataclasses import field
from functools import partial
from typing import ClassVar

import jax
from flax import linen as nn

from lungjax.config import HeadConfig
from lungjax.models.efficientnet import Stage, compound_scale
from lungjax.models.layers import BatchNorm, Conv, Layer, Padding
from lungjax.models.network import Network

# As in the authors' code (tensorflow/models, slim); V2 is initialized like EfficientNet instead, as in torchvision.
CONV_INIT = nn.initializers.truncated_normal(0.09)


class Block(nn.Module):
    """Depthwise separable convolution: 3x3 depthwise, then 1x1 pointwise, each with norm and ReLU6."""

    width: int
    stride: int
    padding: str
    conv: Layer
    norm: Layer

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps [B, H, W, C] to [B, H / stride, W / stride, width]."""
        pads: Padding = ((0, 1), (0, 1)) if self.padding == "same" and self.stride == 2 else self.padding
        x = self.conv(x.shape[-1], 3, strides=self.stride, padding=pads, groups=-1, name="dwconv")(x)
        x = self.norm(name="dwconv_bn")(x, train=train, activation=nn.relu6)
        x = self.conv(self.width, 1, name="conv")(x)
        return self.norm(name="bn")(x, train=train, activation=nn.relu6)


class MobileNet(Network):
    """MobileNet V1: a stem and five stages of blocks."""

    paddings: ClassVar[tuple[str, ...]] = ("same", "symmetric")
    stem_stride: ClassVar[int] = 1  # times that of the first stage, which has no stride

    stages: tuple[tuple[int, int], ...] = ((1, 64), (2, 128), (2, 256), (6, 512), (2, 1024))  # blocks, channels
    stem: int = 32  # channels
    momentum: float = 0.99  # of batch norm: decay of the running statistics
    epsilon: float = 1e-3  # of batch norm
    padding: str = "same"
    head: HeadConfig = field(default=HeadConfig(dropout=0.001), kw_only=True)

    def feature_map(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps images [B, H, W, C] to [B, H / 32, W / 32, 1024]."""
        conv = partial(Conv, dtype=self.dtype, kernel_init=CONV_INIT)
        norm = partial(BatchNorm, momentum=self.momentum, epsilon=self.epsilon, dtype=self.dtype)
        x = conv(self.stem, 3, 2, self.padding, name="stem_conv")(x)  # [B, H / 2, W / 2, stem]
        x = norm(name="stem_bn")(x, train=train, activation=nn.relu6)
        for number, (repeats, channels) in enumerate(self.stages, 1):
            for i in range(1, repeats + 1):
                stride = 2 if number > 1 and i == 1 else 1
                name = f"stage{number}_block{i}"
                x = self.run(Block(channels, stride, self.padding, conv, norm, name=name), x, train=train)
        return x


#        fused, repeats, width, expand, stride
V2 = (
    Stage(False, 1, 16, 1, 1),
    Stage(False, 2, 24, 6, 2),
    Stage(False, 3, 32, 6, 2),
    Stage(False, 4, 64, 6, 2),
    Stage(False, 3, 96, 6, 1),
    Stage(False, 3, 160, 6, 2),
    Stage(False, 1, 320, 6, 1),
)

MOBILENET = {"mobilenet": MobileNet}
MOBILENETV2 = {
    "mobilenetv2": compound_scale(V2, 32, 1.0, 1.0, 0.0, guard=True, momentum=0.999, activation=nn.relu6, drop_path=0.0)
}
