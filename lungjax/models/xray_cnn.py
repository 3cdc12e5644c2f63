"""The small network of the COVID X-ray study (github.com/Mithunjack/covid-19-xay-image-classification).

Two 3x3 convolutions of stride 3, each with ReLU and a 2x2 max pool, are followed by a dense layer of 256 units. The
study's code passes positional arguments of an older Keras, which were read as kernel 3 and stride 3 in training. The
single logit is for the study's second class, "non" (`head.output=sigmoid`, `head.positive_class=non`). With images of
256 x 256 x 3 and one logit, the network has 422,177 parameters. Initialization is Glorot uniform.
"""

from dataclasses import field

import jax
from flax import linen as nn

from lungjax.config import HeadConfig
from lungjax.models.layers import Conv, max_pool
from lungjax.models.network import Network


class XrayCNN(Network):
    """Convolution, ReLU, pool and dropout for each of `widths`."""

    widths: tuple[int, ...] = (64, 32)
    dropout: float = 0.0  # after each pool; in the study's summary, but disabled (0.25) in its last run
    head: HeadConfig = field(default=HeadConfig(pool="flatten", hidden=(256,)), kw_only=True)

    def feature_map(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps images [B, H, W, C] to [B, h, w, 32]; each block divides the side by six."""

        def block(module: nn.Module, x: jax.Array, name: str, width: int) -> jax.Array:
            options = {"use_bias": True, "kernel_init": nn.initializers.glorot_uniform(), "dtype": self.dtype}
            x = Conv(width, 3, 3, "VALID", name=f"{name}_conv", **options)(x)
            x = max_pool(nn.relu(x), 2, 2)
            return nn.Dropout(self.dropout, deterministic=not train, name=f"{name}_dropout")(x)

        for number, width in enumerate(self.widths, 1):
            name = "stem" if number == 1 else f"stage{number}"
            x = self.run(self, x, block, name=name, width=width)
        return x

    def _stride(self) -> int:
        return 6 ** len(self.widths)


XRAY = {"xray_cnn": XrayCNN}
