"""Positions of the cells of a feature map in the image."""

from typing import NamedTuple

import numpy as np

from lungjax.models.network import Network


class Axis(NamedTuple):
    """Cell i of a map is centered at pixel `start + step * i`, counted from the center of the first pixel."""

    start: float
    step: float


def cell_positions(network: Network | None, size: tuple[int, int], cells: tuple[int, int]) -> tuple[Axis, Axis]:
    """Returns the positions of the rows and columns of the last feature map in an image.

    Without padding they are the centers of the receptive fields, and the map leaves a margin of the image: the smallest
    image with one cell is its receptive field, and each further cell needs one stride more. With padding the cells are
    spread evenly, as in image resizing: the centers of the input that trained cells react to are there (measured on
    EfficientNet-Lite0's ImageNet weights), not at the centers of the receptive fields, which padding shifts.

    Args:
      network: of the feature map; None spreads the cells evenly.
      size: height and width of the image in pixels.
      cells: rows and columns of the map.
    """
    if network:
        field = network.min_side(1)
        axis = Axis((field - 1) / 2, network.min_side(2) - field)
        if all(axis.step * count < side for side, count in zip(size, cells, strict=True)):
            return axis, axis
    rows, columns = (Axis((side / count - 1) / 2, side / count) for side, count in zip(size, cells, strict=True))
    return rows, columns


def interpolation_weights(axis: Axis, pixels: int, cells: int) -> np.ndarray:
    """Returns the weights [pixels, cells] of linear interpolation; constant beyond the outer cells."""
    at = np.clip((np.arange(pixels) - axis.start) / axis.step, 0, cells - 1)
    return np.maximum(1 - np.abs(at[:, None] - np.arange(cells)), 0).astype(np.float32)
