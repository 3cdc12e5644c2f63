"""The base class of all networks: checks the image size, applies the head and rematerializes blocks."""

import operator
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from lungjax.config import HeadConfig
from lungjax.models.head import Head


class Network(nn.Module, kw_only=True):  # type: ignore[call-arg]
    """A backbone with the shared head; subclasses define `feature_map`, and `stages` or `_stride` or `min_side`."""

    stem_stride: ClassVar[int] = 2  # without the factor 2 of each stage

    head: HeadConfig = HeadConfig()  # by default that of the original paper
    outputs: int = 1000  # logits
    remat: bool = False  # recompute the activations of each block in the backward pass
    dtype: Any = jnp.float32  # of the activations; parameters are float32

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Maps normalized images [B, H, W, C] to float32 logits [B, outputs] and {"last": the last feature map}.

        Raises ValueError for images smaller than `minimum_size`.
        """
        (height, width), (rows, columns) = images.shape[1:3], self.minimum_size()
        if height < rows or width < columns:
            size = f"images of {height} x {width} pixels are too small for this network"
            raise ValueError(f"{size}, which needs at least {rows} x {columns}; increase input.size")
        x = self.feature_map(images, train=train)
        return Head(self.head, self.outputs, name="head")(x, train=train), {"last": x}

    def feature_map(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps images [B, H, W, C] to the last feature map [B, h, w, c]."""
        raise NotImplementedError

    def minimum_size(self) -> tuple[int, int]:
        """Returns the smallest height and width in pixels that the network and its head accept."""
        side = self.min_side(2 if self.head.pool == "avg2x2_flatten" else 1)
        return side, side

    def min_side(self, cells: int) -> int:
        """Returns the smallest side in pixels for `cells` cells per side; with padding, `cells` strides as in Keras."""
        return self._stride() * cells

    def _stride(self) -> int:
        """Returns the total stride of the feature map in pixels."""
        return int(self.stem_stride * 2 ** len(self.stages))

    def up_to(self, layer: str) -> "Network | None":
        """Returns the network that ends with the block `layer`, or None if the block's cells are spread evenly."""
        return None

    def run(self, block: nn.Module, x: Any, function: Callable[..., Any] = operator.call, **options: Any) -> jax.Array:
        """Returns the feature map function(block, x, **options), rematerialized if `remat` is set.

        `explain.saliency` intercepts this method, to differentiate with respect to the map with the name of the block
        or that in `options`.
        """
        return self.run_part(block, x, function, **options)

    def run_part(
        self, block: nn.Module, x: Any, function: Callable[..., Any] = operator.call, **options: Any
    ) -> jax.Array:
        """Like `run`, for a block that computes only a part of the channels."""
        call = partial(function, **options)
        return (nn.remat(call) if self.remat else call)(block, x)
