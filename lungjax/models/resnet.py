"""ResNet (He et al., CVPR 2016, arXiv 1512.03385) and ResNetV2 (ECCV 2016, arXiv 1603.05027).

Three graphs go by these names, with other weights each. Keras v1, the paper's: a stage's stride is on the first 1x1
convolution, and every convolution has a bias. Torch ("v1.5"; also 18 and 34): the stride is on the 3x3, no bias. Keras
V2: norm and ReLU come before each convolution, a stage's stride is in its last block, and the convolutions that no
norm follows have a bias. The first two have parameters of the same shapes, so a wrong choice loads without an error.
Padding is symmetric in all of them.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from lungjax.config import HeadConfig
from lungjax.models.head import Head, min_cells
from lungjax.models.image_size import Window, check_size, smallest
from lungjax.models.layers import BatchNorm, Conv, Initializer, max_pool

KERAS_INIT = nn.initializers.glorot_uniform()
TORCH_INIT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
KERAS = {"epsilon": 1.001e-5, "momentum": 0.99, "kernel_init": KERAS_INIT}
ALL_BIASED = ("stem_conv", "conv1", "conv2", "conv3", "shortcut_conv")
EXPANSION = 4  # a bottleneck's channels out are this times those in its middle


def pool_zeros(x: jax.Array) -> jax.Array:
    """Takes the maximum of 3x3 windows at stride 2 of x [B, H, W, C] with a border of zeros.

    The border wins where all of a window is negative: in V2 and BiT no ReLU comes before this pool.
    """
    return max_pool(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), 3, 2)


def subsample(x: jax.Array, stride: int) -> jax.Array:
    """Returns every `stride`-th row and column of x [B, H, W, C]: one slice also where B is left open."""
    return x if stride == 1 else lax.slice(x, (0, 0, 0, 0), x.shape, (1, stride, stride, 1))


class Block(nn.Module):
    """Two 3x3 convolutions, or 1x1, 3x3, 1x1, around which the input is added; ReLU after the sum."""

    width: int  # channels in the middle
    stride: int
    bottleneck: bool
    stride_conv: int
    biased: tuple[str, ...]
    momentum: float
    epsilon: float
    kernel_init: Initializer
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps [B, H, W, C] to [B, H / stride, W / stride, D], rounded up; D is 4 * width in a bottleneck."""
        middle, wide = self.width, self.width * EXPANSION

        def conv_bn(x: jax.Array, features: int, size: int, stride: int, conv: str, bn: str, relu: bool) -> jax.Array:
            options = {"padding": "SYMMETRIC", "kernel_init": self.kernel_init, "dtype": self.dtype, "name": conv}
            x = Conv(features, size, stride, use_bias=conv in self.biased, **options)(x)
            norm = BatchNorm(momentum=self.momentum, epsilon=self.epsilon, dtype=self.dtype, name=bn)
            return norm(x, train=train, activation=nn.relu if relu else None)

        layers = [(middle, 1), (middle, 3), (wide, 1)] if self.bottleneck else [(middle, 3), (middle, 3)]
        shortcut, out = x, layers[-1][0]
        if self.stride != 1 or x.shape[-1] != out:
            shortcut = conv_bn(x, out, 1, self.stride, "shortcut_conv", "shortcut_bn", relu=False)
        for i, (features, size) in enumerate(layers, 1):
            stride = self.stride if i == self.stride_conv else 1
            x = conv_bn(x, features, size, stride, f"conv{i}", f"bn{i}", relu=i < len(layers))
        return nn.relu(x + shortcut)


class PreactBlock(nn.Module):
    """Norm and ReLU, then 1x1, 3x3, 1x1 with norm and ReLU between, around which the input is added."""

    width: int  # channels in the middle
    stride: int
    stride_conv: int
    biased: tuple[str, ...]
    momentum: float
    epsilon: float
    kernel_init: Initializer
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps [B, H, W, C] to [B, H / stride, W / stride, 4 * width], rounded up."""
        middle, wide = self.width, self.width * EXPANSION

        def conv(x: jax.Array, features: int, size: int, stride: int, name: str) -> jax.Array:
            options = {"padding": "SYMMETRIC", "kernel_init": self.kernel_init, "dtype": self.dtype, "name": name}
            return Conv(features, size, stride, use_bias=name in self.biased, **options)(x)

        def norm_relu(x: jax.Array, name: str) -> jax.Array:
            norm = BatchNorm(momentum=self.momentum, epsilon=self.epsilon, dtype=self.dtype, name=name)
            return norm(x, train=train, activation=nn.relu)

        preact = norm_relu(x, "preact_bn")
        shortcut = (
            subsample(x, self.stride) if x.shape[-1] == wide else conv(preact, wide, 1, self.stride, "shortcut_conv")
        )
        x = preact
        for i, (features, size) in enumerate([(middle, 1), (middle, 3), (wide, 1)], 1):
            x = conv(x, features, size, self.stride if i == self.stride_conv else 1, f"conv{i}")
            x = norm_relu(x, f"bn{i}") if i < 3 else x
        return shortcut + x


class ResNet(nn.Module):
    """Stem, pool, stages of blocks that double the width, head."""

    repeats: tuple[int, ...]  # blocks of each stage
    bottleneck: bool = True  # False: two 3x3 convolutions a block
    preact: bool = False  # norm and ReLU before the convolutions: V2
    stride_conv: int = 2  # which convolution of a block has its stride
    stride_last: bool = False  # a stage's stride is in its last block, of the last stage none; else the first block
    biased: tuple[str, ...] = ()  # names of the convolutions with a bias
    width: int = 64  # channels of the stem and of the first stage's middle
    momentum: float = 0.9  # of batch norm: the part of the old statistics kept
    epsilon: float = 1e-5  # of batch norm
    kernel_init: Initializer = TORCH_INIT
    head: HeadConfig = HeadConfig()
    outputs: int = 1000
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Maps images [B, H, W, C] to (logits [B, outputs], {"last": the last map, for four stages of side H / 32}).

        Raises ValueError for images below `minimum_size`, and for a V2 without bottlenecks.
        """
        check_size(images, self.minimum_size())
        if self.preact and not self.bottleneck:
            raise ValueError("ResNet: preact=True has bottleneck blocks only")
        bn = {"momentum": self.momentum, "epsilon": self.epsilon, "dtype": self.dtype}
        options = {"biased": self.biased, "kernel_init": self.kernel_init, "stride_conv": self.stride_conv, **bn}
        make = partial(PreactBlock, **options) if self.preact else partial(Block, bottleneck=self.bottleneck, **options)

        def run(block: Block | PreactBlock, x: jax.Array) -> jax.Array:
            return block(x, train=train)

        if self.remat:
            run = nn.remat(run)
        conv = Conv(
            self.width,
            7,
            strides=2,
            padding="SYMMETRIC",
            use_bias="stem_conv" in self.biased,
            kernel_init=self.kernel_init,
            dtype=self.dtype,
            name="stem_conv",
        )
        x = conv(images)  # [B, H / 2, W / 2, width]
        if self.preact:
            x = pool_zeros(x)
        else:
            x = BatchNorm(**bn, name="stem_bn")(x, train=train, activation=nn.relu)
            x = max_pool(x, 3, 2, "SYMMETRIC")
        for number, repeats in enumerate(self.repeats, 1):
            if self.stride_last:
                stride, strided = 2 if number < len(self.repeats) else 1, repeats
            else:
                stride, strided = 2 if number > 1 else 1, 1
            width = self.width * 2 ** (number - 1)
            for i in range(1, repeats + 1):
                block = make(width, stride=stride if i == strided else 1, name=f"stage{number}_block{i}")
                x = run(block, x)
        if self.preact:
            x = BatchNorm(**bn, name="top_bn")(x, train=train, activation=nn.relu)
        logits = Head(self.head, self.outputs, name="head")(x, train=train)
        return logits, {"last": x}

    def minimum_size(self) -> tuple[int, int]:
        """Returns the least height and width in pixels."""
        windows: list[Window] = [(7, 2), (3, 2)] + [(3, 2)] * (len(self.repeats) - 1)
        side = smallest(windows, "same", min_cells(self.head))
        return side, side


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
    "resnet50v2": partial(keras_v2, R50),
    "resnet101v2": partial(keras_v2, R101),
    "resnet152v2": partial(keras_v2, R152),
}
