"""The CBR networks of "Transfusion" (Raghu et al., NeurIPS 2019, arXiv 1902.07208), and small CNNs of two studies.

A block is convolution, batch norm, ReLU ("CBR") and max pool of stride 2; one dense layer follows the global mean.
The paper does not specify the padding; the default is "valid" as in CT-COV19 (github.com/marta-0/covid-ct). As in that
study's code, layers have Keras's defaults: bias, batch norm with epsilon 1e-3 and decay 0.99, and Glorot uniform.
"""

from functools import partial
from typing import ClassVar

import jax
from flax import linen as nn

from lungjax.config import HeadConfig
from lungjax.models.layers import BatchNorm, Conv, max_pool
from lungjax.models.network import Network


class Transfusion(Network):
    """A block of convolution, norm, ReLU, pool and dropout for each of `widths`; also used for `xray_cnn`."""

    paddings: ClassVar[tuple[str, ...]] = ("valid", "same")

    kernel: int  # side of every convolution
    widths: tuple[int, ...]
    stride: int = 1  # of every convolution
    pool: int = 3  # side of the max pool; its stride is 2
    last_pool: bool = True  # False: no pool in the last block
    norm: bool = True
    momentum: float = 0.99  # of batch norm: decay of the running statistics
    epsilon: float = 1e-3  # of batch norm
    padding: str = "valid"  # of convolutions and pools; pools ignore padded cells
    dropout: float = 0.0  # after each block

    def feature_map(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps images [B, H, W, C] to [B, h, w, widths[-1]]; each pool halves the side."""
        pads = self.padding.upper()
        conv = partial(Conv, padding=pads, use_bias=True, kernel_init=nn.initializers.glorot_uniform())
        norm = partial(BatchNorm, momentum=self.momentum, epsilon=self.epsilon, dtype=self.dtype)

        def block(module: nn.Module, x: jax.Array, name: str, width: int, pool: bool) -> jax.Array:
            x = conv(width, self.kernel, self.stride, dtype=self.dtype, name=f"{name}_conv")(x)
            x = norm(name=f"{name}_bn")(x, train=train, activation=nn.relu) if self.norm else nn.relu(x)
            x = max_pool(x, self.pool, 2, pads) if pool else x
            return nn.Dropout(self.dropout, deterministic=not train, name=f"{name}_dropout")(x)

        for number, width in enumerate(self.widths, 1):
            name, pool = "stem" if number == 1 else f"stage{number}", number < len(self.widths) or self.last_pool
            x = self.run(self, x, block, name=name, width=width, pool=pool)
        return x

    def up_to(self, layer: str) -> "Transfusion":
        """Returns the network that ends with the block `layer`."""
        number = 1 if layer == "stem" else int(layer.removeprefix("stage"))
        return self.clone(widths=self.widths[:number], last_pool=number < len(self.widths) or self.last_pool)

    def min_side(self, cells: int) -> int:
        """Returns the smallest side in pixels whose feature map has `cells` cells per side."""
        windows = [(self.kernel, self.stride), (self.pool, 2)] * len(self.widths)
        for kernel, stride in reversed(windows if self.last_pool else windows[:-1]):
            cells = cells * stride if self.padding == "same" else (cells - 1) * stride + kernel
        return cells


TRANSFUSION = {
    "cbr_larget": partial(Transfusion, 7, (32, 64, 128, 256, 512), last_pool=False),
    "cbr_largew": partial(Transfusion, 7, (64, 128, 256, 512)),
    "cbr_small": partial(Transfusion, 7, (32, 64, 128, 256)),
    "cbr_tiny": partial(Transfusion, 5, (64, 128, 256, 512)),
    # The LargeT of CT-COV19 has exactly the layers of the paper's Tiny.
    "cbr_larget_study": partial(Transfusion, 5, (64, 128, 256, 512)),
    # The "Simple" network of CT-COV19.
    "simple": partial(Transfusion, 3, (16, 32, 64), pool=2, norm=False, head=HeadConfig(pool="max", hidden=(32,))),
}
# The network of the COVID X-ray study (github.com/Mithunjack/covid-19-xay-image-classification); 422,177 parameters
# for images of 256 x 256 x 3. The study's code passes positional arguments of an older Keras, which were read as kernel
# 3 and stride 3 in training; its last run disabled the dropout of 0.25. The single logit is for the study's second
# class, "non" (`head.output=sigmoid`, `head.positive_class=non`).
XRAY_HEAD = HeadConfig(pool="flatten", hidden=(256,))
XRAY_CNN = {"xray_cnn": partial(Transfusion, 3, (64, 32), stride=3, pool=2, norm=False, head=XRAY_HEAD)}
