"""Maps the cells of a feature map to positions in the image."""

from typing import NamedTuple

import numpy as np

from lungjax.models.network import Network


class Axis(NamedTuple):
    """Cell i is centered at `start + step * i` pixels from the center of the first pixel."""

    start: float
    step: float


def cell_positions(network: Network | None, size: tuple[int, int], cells: tuple[int, int]) -> tuple[Axis, Axis]:
    """Returns the positions of the rows and columns of the last feature map in an image.

    Without padding, a cell is at the center of its receptive field, which is as large as the smallest image with one
    cell. With padding or without a `network`, cells are spread evenly, as in image resizing: the pixels that trained
    cells respond to are centered there (measured with the ImageNet weights of EfficientNet-Lite0).

    `size` and `cells` are (height, width) of the image and of the map.
    """
    if network:
        field = network.min_side(1)
        axis = Axis((field - 1) / 2, network.min_side(2) - field)
        if all(axis.step * count < side for side, count in zip(size, cells, strict=True)):
            return axis, axis
    rows, columns = (Axis((side / count - 1) / 2, side / count) for side, count in zip(size, cells, strict=True))
    return rows, columns


def interpolation_weights(axis: Axis, pixels: int, cells: int) -> np.ndarray:
    """Returns linear interpolation weights [pixels, cells], constant beyond the outer cells."""
    at = np.clip((np.arange(pixels) - axis.start) / axis.step, 0, cells - 1)
    return np.maximum(1 - np.abs(at[:, None] - np.arange(cells)), 0).astype(np.float32)
