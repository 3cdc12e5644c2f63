"""Shallow networks with every kind of block and branch of their families."""

from functools import partial
from typing import Any, NamedTuple

from flax import linen as nn

from lungjax.config import HeadConfig
from lungjax.models.convnext import ConvNeXt
from lungjax.models.densenet import DenseNet
from lungjax.models.efficientnet import EfficientNet, Row, Stage, expand
from lungjax.models.mobilenet import MobileNet
from lungjax.models.mobilenetv3 import MobileNetV3
from lungjax.models.resnet import BiT, ResNet, keras_v1, keras_v2
from lungjax.models.squeezenet import SqueezeNet
from lungjax.models.transfusion import Transfusion
from lungjax.models.vgg import Vgg


class Shallow(NamedTuple):
    make: Any  # constructor
    blocks: int  # number of blocks that remat recomputes
    folded: int  # number of norms that directly follow a convolution


V3 = ((Row(3, 4, 4, 4, nn.relu, 2),), (Row(5, 8, 0, 6, nn.hard_swish, 2), Row(3, 8, 4, 6, nn.hard_swish)))
STAGES = expand((Stage(True, 1, 8, 1, 1), Stage(True, 1, 12, 4, 2), Stage(False, 2, 16, 4, 2, squeeze=0.25)), 8)
SHALLOW = {
    "cbr": Shallow(partial(Transfusion, 5, (8, 12), padding="same", last_pool=False), 2, 2),
    "xray_cnn": Shallow(partial(Transfusion, 3, (4, 8), stride=3, pool=2, norm=False), 2, 0),
    "efficientnet": Shallow(
        partial(EfficientNet, STAGES, stem=8, top=32, momentum=0.9, drop_path=0.5), 4, 1 + (1 + 2 + 2 * 3) + 1
    ),
    "resnet18": Shallow(partial(ResNet, (1, 2), bottleneck=False, stride_conv=1, width=8), 3, 1 + 2 + 3 + 2),
    "resnet50": Shallow(partial(ResNet, (1, 1), **(keras_v1.keywords | {"width": 8})), 2, 1 + 4 + 4),
    "resnet50_v15": Shallow(partial(ResNet, (1, 2), width=8), 3, 1 + 4 + 4 + 3),
    # Norms come before convolutions: only those inside a block follow one.
    "resnet50v2": Shallow(partial(ResNet, (2, 2), **(keras_v2.keywords | {"width": 8})), 4, 4 * 2),
    "bit": Shallow(partial(BiT, (1, 2), width=32, head=HeadConfig()), 3, 0),
    "convnext": Shallow(partial(ConvNeXt, (2, 1), (4, 6), drop_path=0.5), 3, 0),
    "convnextv2": Shallow(partial(ConvNeXt, (2, 1), (4, 6), drop_path=0.5, grn=True), 3, 0),
    "densenet": Shallow(partial(DenseNet, (1, 2), 4), 4, 1 + 3),
    "vgg": Shallow(partial(Vgg, (1, 2), (4, 8), head=HeadConfig()), 3, 0),
    "squeezenet": Shallow(partial(SqueezeNet, (((2, 4),), ((4, 6),))), 2, 0),
    "mobilenet": Shallow(partial(MobileNet, ((1, 8), (2, 12)), stem=4), 3, 1 + 3 * 2),
    "mobilenetv3": Shallow(partial(MobileNetV3, V3, top=16, stem=4), 3, 1 + (2 + 3 + 3) + 1),
}
