"""SqueezeNet 1.1 (Iandola et al., arXiv 1602.07360; version 1.1 of the authors' repository), as in torchvision.

Fire modules squeeze the channels with one 1x1 convolution and expand them with parallel 1x1 and 3x3 ones. The 3x3
max pools of stride 2 include a partial window at the end ("ceil mode"). There is no norm. The classifier is a 1x1
convolution and ReLU, followed by the mean over the map (`head.pool=class_map`). Kernels use He uniform initialization.
"""

from dataclasses import field
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn

from lungjax.config import HeadConfig
from lungjax.models.layers import Conv, Layer, max_pool
from lungjax.models.network import Network

KERNEL_INIT = nn.initializers.variance_scaling(2.0, "fan_in", "uniform")
STAGES = (((16, 64), (16, 64)), ((32, 128), (32, 128)), ((48, 192), (48, 192), (64, 256), (64, 256)))


class Fire(nn.Module):
    """1x1 convolution to `squeeze` channels, then 1x1 and 3x3 ones to `expand` channels each, all with ReLU."""

    squeeze: int
    expand: int
    conv: Layer

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, H, W, C] to [B, H, W, 2 * expand]."""
        x = nn.relu(self.conv(self.squeeze, 1, name="squeeze")(x))
        parts = [self.conv(self.expand, size, name=f"expand{size}x{size}")(x) for size in (1, 3)]
        return nn.relu(jnp.concatenate(parts, axis=-1))


class SqueezeNet(Network):
    """Convolution of stride 2, then stages that each start with a max pool."""

    stages: tuple[tuple[tuple[int, int], ...], ...] = STAGES  # squeeze and expand channels of each module
    head: HeadConfig = field(default=HeadConfig(pool="class_map", dropout=0.5), kw_only=True)

    def feature_map(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps images [B, H, W, C] to [B, (H - 1) // 16, (W - 1) // 16, 512]."""
        conv = partial(Conv, use_bias=True, dtype=self.dtype, kernel_init=KERNEL_INIT)
        x = nn.relu(conv(64, 3, 2, "VALID", name="stem_conv")(x))
        for number, rows in enumerate(self.stages, 1):
            x = max_pool(x, 3, 2, [(0, (side - 3) % 2) for side in x.shape[1:3]])
            for i, (squeeze, expand) in enumerate(rows, 1):
                x = self.run(Fire(squeeze, expand, conv, name=f"stage{number}_block{i}"), x)
        return x

    def min_side(self, cells: int) -> int:
        """Returns the smallest side in pixels for `cells` cells per side of the feature map."""
        return super().min_side(cells) + 1  # the first convolution has no padding


SQUEEZENET = {"squeezenet1_1": SqueezeNet}
