"""How small an image may be: what a chain of windows leaves of it."""

from collections.abc import Iterable

import jax

Window = tuple[int, int]  # kernel and stride of a convolution or pool, in pixels


def smallest(windows: Iterable[Window], padding: str, cells: int = 1) -> int:
    """Returns the least side in pixels that leaves `cells` on the last map.

    With "valid" a pixel less leaves too few. With "same" a map never vanishes; asked for is then the total
    stride for each cell, below which a cell sees more padding than image (Keras has the same limit).
    """
    side = cells
    for kernel, stride in reversed(list(windows)):
        side = side * stride if padding == "same" else (side - 1) * stride + kernel
    return side


def check_size(images: jax.Array, least: tuple[int, int]) -> None:
    """Raises ValueError for images [B, H, W, C] below `least` (height, width)."""
    height, width = images.shape[1:3]
    if height < least[0] or width < least[1]:
        raise ValueError(
            f"images of {height} x {width} pixels are too small for this network: at least "
            f"{least[0]} x {least[1]}; raise input.size"
        )
