"""DenseNet-BC (Huang et al., CVPR 2017, arXiv 1608.06993): every layer sees the maps of all layers before it.

Padding is torch's, the same on both sides, in all sources (Keras pads explicitly); average pools drop the last
row and column of an odd map. Batch norm: epsilon 1.001e-5 and decay 0.99 in Keras, whose weights of 121, 169 and
201 are the usual ones; 1e-5 and 0.9 in torch, which alone has 161.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lungjax.config import HeadConfig
from lungjax.models.head import Head, min_cells
from lungjax.models.image_size import check_size, smallest
from lungjax.models.layers import BatchNorm, Conv, max_pool
from lungjax.models.ops.pooling import avg_pool_2x2

BOTTLENECK = 4  # channels of a layer's 1x1 convolution, times the growth
KERNEL_INIT = nn.initializers.variance_scaling(2.0, "fan_in", "normal")  # torchvision, after the authors' code


class DenseLayer(nn.Module):
    """Norm, ReLU, 1x1 convolution, norm, ReLU, 3x3 convolution to `growth` channels."""

    growth: int
    momentum: float
    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps [B, H, W, C] to the new channels alone, [B, H, W, growth]."""
        conv = partial(Conv, dtype=self.dtype, kernel_init=KERNEL_INIT)
        norm = partial(BatchNorm, momentum=self.momentum, epsilon=self.epsilon, dtype=self.dtype)
        x = norm(name="bn1")(x, train=train, activation=nn.relu)
        x = conv(BOTTLENECK * self.growth, 1, name="conv1")(x)
        x = norm(name="bn2")(x, train=train, activation=nn.relu)
        return conv(self.growth, 3, padding=1, name="conv2")(x)


class Transition(nn.Module):
    """Norm, ReLU, 1x1 convolution to half the channels, average pool of stride 2."""

    momentum: float
    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps [B, H, W, C] to [B, H // 2, W // 2, C // 2]."""
        norm = BatchNorm(momentum=self.momentum, epsilon=self.epsilon, dtype=self.dtype, name="bn")
        x = norm(x, train=train, activation=nn.relu)
        x = Conv(x.shape[-1] // 2, 1, dtype=self.dtype, kernel_init=KERNEL_INIT, name="conv")(x)
        return avg_pool_2x2(x)


class DenseNet(nn.Module):
    """Stem of stride 4, stages of dense layers with a transition after all but the last, norm, ReLU, head."""

    depths: tuple[int, ...]  # layers of each stage
    growth: int = 32  # channels that each layer adds
    momentum: float = 0.99  # of batch norm: the part of the old statistics kept
    epsilon: float = 1.001e-5  # of batch norm
    head: HeadConfig = HeadConfig()
    outputs: int = 1000
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Maps images [B, H, W, C] to (logits [B, outputs], {"last": the last map after norm and ReLU}).

        The last map is [B, h, w, channels] with h about H / 32. Raises ValueError for images below `minimum_size`.
        """
        check_size(images, self.minimum_size())
        shared = {"momentum": self.momentum, "epsilon": self.epsilon, "dtype": self.dtype}

        # Joined inside what is recomputed: kept are only the new channels of each layer. Their joined maps would
        # take memory that grows with the square of the depth.
        def run(layer: DenseLayer | Transition, maps: list[jax.Array]) -> jax.Array:
            return layer(jnp.concatenate(maps, -1), train=train)

        if self.remat:
            run = nn.remat(run)
        conv = partial(Conv, padding=3, dtype=self.dtype, kernel_init=KERNEL_INIT)
        x = conv(2 * self.growth, 7, strides=2, name="stem_conv")(images)  # [B, H / 2, W / 2, 2 * growth]
        x = BatchNorm(name="stem_bn", **shared)(x, train=train, activation=nn.relu)
        x = max_pool(x, 3, 2, 1)
        for number, depth in enumerate(self.depths, 1):
            maps = [x]
            for i in range(1, depth + 1):
                maps.append(run(DenseLayer(self.growth, name=f"stage{number}_block{i}", **shared), maps))
            if number < len(self.depths):
                x = run(Transition(name=f"stage{number}_transition", **shared), maps)
        x = BatchNorm(name="top_bn", **shared)(jnp.concatenate(maps, -1), train=train, activation=nn.relu)
        logits = Head(self.head, self.outputs, name="head")(x, train=train)
        return logits, {"last": x}

    def minimum_size(self) -> tuple[int, int]:
        """Returns the least height and width in pixels."""
        side = smallest([(7, 2), (3, 2)] + [(2, 2)] * (len(self.depths) - 1), "same", min_cells(self.head))
        return side, side


DENSENET = {
    "densenet121": partial(DenseNet, (6, 12, 24, 16)),
    "densenet161": partial(DenseNet, (6, 12, 36, 24), growth=48, momentum=0.9, epsilon=1e-5),
    "densenet169": partial(DenseNet, (6, 12, 32, 32)),
    "densenet201": partial(DenseNet, (6, 12, 48, 32)),
}
