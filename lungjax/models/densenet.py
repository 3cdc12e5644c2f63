"""DenseNet-BC (Huang et al., CVPR 2017, arXiv 1608.06993): every layer reads the maps of all layers before it.

Padding is symmetric in all sources; average pools drop the last row and column of an odd map. Batch norm has epsilon
1.001e-5 and decay 0.99 as in Keras; DenseNet161, which only torch has, uses 1e-5 and 0.9.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lungjax.models.layers import BatchNorm, Conv, Layer, max_pool
from lungjax.models.network import Network
from lungjax.models.ops.pooling import avg_pool_2x2

BOTTLENECK = 4  # channels of a layer's 1x1 convolution per channel of growth
KERNEL_INIT = nn.initializers.variance_scaling(2.0, "fan_in", "normal")  # torchvision, after the authors' code


class DenseLayer(nn.Module):
    """Norm, ReLU, 1x1 convolution, norm, ReLU, 3x3 convolution to `growth` channels."""

    growth: int
    conv: Layer
    norm: Layer

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps [B, H, W, C] to the new channels, [B, H, W, growth]."""
        x = self.norm(name="bn1")(x, train=train, activation=nn.relu)
        x = self.conv(BOTTLENECK * self.growth, 1, name="conv1")(x)
        x = self.norm(name="bn2")(x, train=train, activation=nn.relu)
        return self.conv(self.growth, 3, padding=1, name="conv2")(x)


class Transition(nn.Module):
    """Norm, ReLU, average pool of stride 2, and 1x1 convolution to half the channels.

    The paper pools after the convolution. Both are linear, so the result is the same at a quarter of the cost.
    """

    conv: Layer
    norm: Layer

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps [B, H, W, C] to [B, H // 2, W // 2, C // 2]."""
        x = avg_pool_2x2(self.norm(name="bn")(x, train=train, activation=nn.relu))
        return self.conv(x.shape[-1] // 2, 1, name="conv")(x)


class DenseNet(Network):
    """Stem of stride 4, stages of dense layers with a transition after each but the last, then norm and ReLU."""

    stages: tuple[int, ...]  # layers
    growth: int = 32  # channels that each layer adds
    momentum: float = 0.99  # of batch norm: decay of the running statistics
    epsilon: float = 1.001e-5  # of batch norm

    def feature_map(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps images [B, H, W, C] to [B, h, w, channels] with h about H / 32."""

        def concatenated(layer: Layer, maps: list[jax.Array]) -> Any:
            # Inside the rematerialized function, so only the new channels of each layer are saved. Saving the
            # concatenated maps would take memory quadratic in the depth.
            return layer(jnp.concatenate(maps, -1), train=train)

        conv = partial(Conv, dtype=self.dtype, kernel_init=KERNEL_INIT)
        norm = partial(BatchNorm, momentum=self.momentum, epsilon=self.epsilon, dtype=self.dtype)
        x = conv(2 * self.growth, 7, 2, 3, name="stem_conv")(x)  # [B, H / 2, W / 2, 2 * growth]
        x = max_pool(norm(name="stem_bn")(x, train=train, activation=nn.relu), 3, 2, 1)
        for number, depth in enumerate(self.stages, 1):
            maps = [x]
            for i in range(1, depth + 1):
                layer = DenseLayer(self.growth, conv, norm, name=f"stage{number}_block{i}")
                maps.append(self.run_part(layer, maps, concatenated))
            if number < len(self.stages):
                x = self.run(Transition(conv, norm, name=f"stage{number}_transition"), maps, concatenated)
        return norm(name="top_bn")(jnp.concatenate(maps, -1), train=train, activation=nn.relu)


DENSENET = {
    "densenet121": partial(DenseNet, (6, 12, 24, 16)),
    "densenet161": partial(DenseNet, (6, 12, 36, 24), growth=48, momentum=0.9, epsilon=1e-5),
    "densenet169": partial(DenseNet, (6, 12, 32, 32)),
    "densenet201": partial(DenseNet, (6, 12, 48, 32)),
}
