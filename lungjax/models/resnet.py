"""ResNet (He et al., CVPR 2016, arXiv 1512.03385), ResNetV2 (ECCV 2016, arXiv 1603.05027) and BiT.

Three architectures share these names, each with its own weights. In Keras v1, as in the paper, the first 1x1
convolution of a stage has its stride, and every convolution has a bias. In torch ("v1.5"; also ResNet18 and 34), the
first 3x3 convolution has the stride, and no convolution has a bias. In Keras V2, norm and ReLU come before each
convolution, the last block of a stage has its stride, and convolutions without a norm after them have a bias. Parameter
shapes do not depend on strides, so weights of another architecture load without an error. Padding is always symmetric.
The CIFAR variants, for images of about 32 pixels, are torch's with a 3x3 stem of stride 1 and without the first pool.

BiT, "Big Transfer" (Kolesnikov et al., ECCV 2020, arXiv 1912.11370), is a wide ResNetV2 with GroupNorm. As in the
released code (github.com/google-research/big_transfer), kernels are standardized (arXiv 1903.10520) with epsilon 1e-10
inside the square root (timm: 1e-8), convolutions have no bias, and each stage applies its stride in the 3x3 convolution
of its first block. A new head is initialized with zeros.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from lungjax.config import HeadConfig
from lungjax.models.head import NORMS
from lungjax.models.layers import BatchNorm, Conv, Initializer, Layer, max_pool
from lungjax.models.network import Network

KERAS_INIT = nn.initializers.glorot_uniform()
TORCH_INIT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
KERAS = {"epsilon": 1.001e-5, "momentum": 0.99, "kernel_init": KERAS_INIT}
ALL_BIASED = ("stem_conv", "conv1", "conv2", "conv3", "shortcut_conv")
EXPANSION = 4  # output channels of a block per channel of its bottleneck


class Block(nn.Module):
    """Two 3x3 convolutions, or 1x1, 3x3 and 1x1 ones, plus the input; ReLU follows the sum."""

    width: int  # channels inside the block
    stride: int
    stride_conv: int
    bottleneck: bool
    conv: Layer
    norm: Layer

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps [B, H, W, C] to [B, ceil(H / stride), ceil(W / stride), D]; D is 4 * width in a bottleneck."""

        def conv_bn(x: jax.Array, features: int, size: int, stride: int, conv: str, bn: str, relu: bool) -> jax.Array:
            x = self.conv(conv, features, size, stride)(x)
            return self.norm(name=bn)(x, train=train, activation=nn.relu if relu else None)

        width, wide = self.width, self.width * EXPANSION
        layers = [(width, 1), (width, 3), (wide, 1)] if self.bottleneck else [(width, 3), (width, 3)]
        shortcut, out = x, layers[-1][0]
        if self.stride != 1 or x.shape[-1] != out:
            shortcut = conv_bn(x, out, 1, self.stride, "shortcut_conv", "shortcut_bn", relu=False)
        for i, (features, size) in enumerate(layers, 1):
            stride = self.stride if i == self.stride_conv else 1
            x = conv_bn(x, features, size, stride, f"conv{i}", f"bn{i}", relu=i < len(layers))
        return nn.relu(x + shortcut)


class PreactBlock(nn.Module):
    """Norm, ReLU, 1x1, norm, ReLU, 3x3, norm, ReLU, 1x1, plus the input."""

    width: int  # channels of the bottleneck
    stride: int
    stride_conv: int
    conv: Layer  # (name, features, size, stride) -> convolution
    norm_relu: Layer  # (x, name, train) -> x
    norm_name: str

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps [B, H, W, C] to [B, ceil(H / stride), ceil(W / stride), 4 * width]."""
        width, wide, inputs = self.width, self.width * EXPANSION, x
        x = self.norm_relu(x, f"preact_{self.norm_name}", train)
        if inputs.shape[-1] != wide:
            shortcut = self.conv("shortcut_conv", wide, 1, self.stride)(x)
        elif self.stride == 1:
            shortcut = inputs
        else:  # not x[:, ::2, ::2]: B may be symbolic
            shortcut = lax.slice(inputs, (0, 0, 0, 0), inputs.shape, (1, self.stride, self.stride, 1))
        for i, (features, size) in enumerate([(width, 1), (width, 3), (wide, 1)], 1):
            x = self.conv(f"conv{i}", features, size, self.stride if i == self.stride_conv else 1)(x)
            x = self.norm_relu(x, f"{self.norm_name}{i}", train) if i < 3 else x
        return shortcut + x


class ResNet(Network):
    """Stem, pool and stages of blocks, where each stage is twice as wide as the one before; also used for BiT."""

    stages: tuple[int, ...]  # blocks
    bottleneck: bool = True  # False: two 3x3 convolutions per block
    preact: bool = False  # norm and ReLU before the convolutions: V2, bottlenecks only
    stride_conv: int = 2  # number of the convolution that has the stride of a block
    stride_last: bool = False  # the last block of each stage but the last has the stride; else the first block
    biased: tuple[str, ...] = ()  # names of the convolutions with a bias
    standardize: float | None = None  # epsilon of weight standardization
    group_norm: bool = False  # in place of batch norm; with preact only
    small_stem: bool = False  # 3x3 with stride 1, without a pool; not with preact
    width: int = 64  # channels of the stem and inside the blocks of the first stage
    momentum: float = 0.9  # of batch norm: decay of the running statistics
    epsilon: float = 1e-5  # of batch or group norm
    kernel_init: Initializer = TORCH_INIT

    def feature_map(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps images [B, H, W, C] to [B, H / 32, W / 32, C'] with four stages; with a small stem, to H / 8, W / 8."""
        norm = partial(BatchNorm, momentum=self.momentum, epsilon=self.epsilon, dtype=self.dtype)

        def conv(name: str, features: int, size: int, stride: int) -> Conv:
            options = {"use_bias": name in self.biased, "kernel_init": self.kernel_init, "dtype": self.dtype}
            return Conv(features, size, stride, "SYMMETRIC", name=name, standardize=self.standardize, **options)

        def norm_relu(x: jax.Array, name: str, train: bool) -> jax.Array:
            if self.group_norm:
                return nn.relu(NORMS["group"](epsilon=self.epsilon, dtype=self.dtype, name=name)(x))
            return norm(name=name)(x, train=train, activation=nn.relu)

        norm_name = "norm" if self.group_norm else "bn"
        block = partial(Block, bottleneck=self.bottleneck, norm=norm)
        block = partial(PreactBlock, norm_relu=norm_relu, norm_name=norm_name) if self.preact else block
        x = conv("stem_conv", self.width, *((3, 1) if self.small_stem else (7, 2)))(x)
        if self.small_stem:
            x = norm_relu(x, "stem_bn", train)
        elif self.preact:  # no ReLU precedes the pool, so its padding is zero
            x = max_pool(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), 3, 2)
        else:
            x = max_pool(norm_relu(x, "stem_bn", train), 3, 2, "SYMMETRIC")
        for number, repeats in enumerate(self.stages, 1):
            strided_block = repeats if self.stride_last else 1
            strided_stage = number < len(self.stages) if self.stride_last else number > 1
            for i in range(1, repeats + 1):
                stride = 2 if strided_stage and i == strided_block else 1
                width, name = self.width * 2 ** (number - 1), f"stage{number}_block{i}"
                x = self.run(block(width, stride, self.stride_conv, conv=conv, name=name), x, train=train)
        return norm_relu(x, f"top_{norm_name}", train) if self.preact else x

    def _stride(self) -> int:
        return super()._stride() // (4 if self.small_stem else 1)


R50, R101, R152 = (3, 4, 6, 3), (3, 4, 23, 3), (3, 8, 36, 3)

keras_v1 = partial(ResNet, stride_conv=1, biased=ALL_BIASED, **KERAS)
keras_v2 = partial(ResNet, preact=True, stride_last=True, biased=("stem_conv", "conv3", "shortcut_conv"), **KERAS)

RESNET = {
    "resnet18": partial(ResNet, (2, 2, 2, 2), bottleneck=False, stride_conv=1),
    "resnet34": partial(ResNet, R50, bottleneck=False, stride_conv=1),
    "resnet50": partial(keras_v1, R50),
    "resnet101": partial(keras_v1, R101),
    "resnet152": partial(keras_v1, R152),
    "resnet50_v15": partial(ResNet, R50),
    "resnet101_v15": partial(ResNet, R101),
    "resnet152_v15": partial(ResNet, R152),
    "resnet18_cifar": partial(ResNet, (2, 2, 2, 2), bottleneck=False, stride_conv=1, small_stem=True),
    "resnet50_cifar": partial(ResNet, R50, small_stem=True),
    "resnet50v2": partial(keras_v2, R50),
    "resnet101v2": partial(keras_v2, R101),
    "resnet152v2": partial(keras_v2, R152),
}

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
