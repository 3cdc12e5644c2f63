"""BiT, "Big Transfer" (Kolesnikov et al., ECCV 2020, arXiv 1912.11370): wide ResNetV2 with GroupNorm.

As in the released code (github.com/google-research/big_transfer), kernels are standardized (arXiv 1903.10520) with
epsilon 1e-10 inside the square root (timm: 1e-8), convolutions have no bias, and each stage applies its stride in the
3x3 convolution of its first block. A new head is initialized with zeros.
"""

from functools import partial

from lungjax.config import HeadConfig
from lungjax.models.resnet import KERAS_INIT, R50, R101, R152, ResNet

BiT = partial(
    ResNet, preact=True, group_norm=True, standardize=1e-10, kernel_init=KERAS_INIT, head=HeadConfig(zero_init=True)
)
BIT = {
    "bit_r50x1": partial(BiT, R50),
    "bit_r101x1": partial(BiT, R101),
    "bit_r50x3": partial(BiT, R50, width=3 * 64),
    "bit_r101x3": partial(BiT, R101, width=3 * 64),
    "bit_r152x2": partial(BiT, R152, width=2 * 64),
    "bit_r152x4": partial(BiT, R152, width=4 * 64),
}
