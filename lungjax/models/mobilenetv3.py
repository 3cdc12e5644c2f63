"""MobileNetV3 small and large (Howard et al., ICCV 2019, arXiv 1905.02244).

Blocks are the MBConv of EfficientNet, with ReLU in the early ones; all later layers, the stem and the head use hard
swish. Squeeze-excite has a bottleneck of a quarter of the expanded channels, rounded to a multiple of 8, with ReLU and
a hard sigmoid gate. Batch norm has epsilon 1e-3 (weights trained by timm: 1e-5) and decay 0.999 (Keras). Padding is
SAME as in TensorFlow; torch-trained weights need "symmetric".
"""

from functools import partial

from flax import linen as nn

from lungjax.config import HeadConfig
from lungjax.models.efficientnet import EfficientNet, Row
from lungjax.models.layers import SqueezeExcite
from lungjax.models.mobilenet import CONV_INIT

RE, HS = nn.relu, nn.hard_swish
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

MobileNetV3 = partial(
    EfficientNet, stem=16, momentum=0.999, activation=HS, drop_path=0.0, conv_init=CONV_INIT, depthwise_init=CONV_INIT,
    squeeze_excite=partial(SqueezeExcite, activation=RE, gate=nn.hard_sigmoid, kernel_init=CONV_INIT),
)  # fmt: skip
# As in the paper: mean, a dense layer with hard swish, dropout.
HEAD = partial(HeadConfig, activation="hard_swish", hidden_dropout=0.2)
MOBILENETV3 = {
    "mobilenetv3_small": partial(MobileNetV3, SMALL, top=576, head=HEAD(hidden=(1024,))),
    "mobilenetv3_large": partial(MobileNetV3, LARGE, top=960, head=HEAD(hidden=(1280,))),
}
