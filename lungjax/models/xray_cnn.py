"""The small network of the COVID X-ray study (github.com/Mithunjack/covid-19-xay-image-classification).

Two 3x3 convolutions of stride 3, each with ReLU and a 2x2 max pool, the map flattened, a dense layer of 256. The
stride comes from positional arguments of an older Keras, read as kernel 3 and stride 3; it is what the study trained.
There is one logit, the probability of its second class "non": `head.output=sigmoid` and `head.positive_class=non`
say so. With images of 256 x 256 x 3 and one logit the network has 422,177 parameters. Kernels start Glorot uniform.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lungjax.config import HeadConfig
from lungjax.models.head import Head, min_cells
from lungjax.models.image_size import check_size, smallest
from lungjax.models.layers import Conv, max_pool


class XrayCNN(nn.Module):
    """Convolution, ReLU, pool and dropout for each of `widths`."""

    widths: tuple[int, ...] = (64, 32)
    dropout: float = 0.0  # after each pool; the study's summary has it without a rate, its last run has none
    head: HeadConfig = HeadConfig(pool="flatten", hidden=(256,))
    outputs: int = 1000
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Maps images [B, H, W, C] to (logits [B, outputs], {"last": the last map [B, h, w, 32]}).

        Raises ValueError for images below `minimum_size`.
        """
        check_size(images, self.minimum_size())

        def block(module: nn.Module, x: jax.Array, number: int) -> jax.Array:
            name = "stem" if number == 1 else f"stage{number}"
            conv = partial(Conv, use_bias=True, kernel_init=nn.initializers.glorot_uniform(), dtype=self.dtype)
            x = conv(self.widths[number - 1], 3, strides=3, padding="VALID", name=f"{name}_conv")(x)
            x = max_pool(nn.relu(x), 2, 2)
            return nn.Dropout(self.dropout, deterministic=not train, name=f"{name}_dropout")(x)

        if self.remat:
            block = nn.remat(block, static_argnums=(2,))
        x = images
        for number in range(1, len(self.widths) + 1):
            x = block(self, x, number)  # [B, h, w, widths[number - 1]], a sixth of the side before
        logits = Head(self.head, self.outputs, name="head")(x, train=train)
        return logits, {"last": x}

    def minimum_size(self) -> tuple[int, int]:
        """Returns the least height and width in pixels."""
        side = smallest([(3, 3), (2, 2)] * len(self.widths), "valid", min_cells(self.head))
        return side, side


XRAY = {"xray_cnn": XrayCNN}
