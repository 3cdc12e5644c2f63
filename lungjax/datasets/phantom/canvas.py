"""Drawing in millimeters: shapes as signed distances with soft edges, and smooth noise.

x points to the patient's left (image right), y to the back (image bottom); the origin is the middle of the chest.
Distances are negative inside a shape. A slice can be drawn at any pixel size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage


@dataclass(frozen=True)
class Grid:
    """Positions, in the patient, of the pixels of one slice."""

    x: np.ndarray  # float32 [H, W], mm
    y: np.ndarray  # float32 [H, W], mm
    pixel: float  # mm
    origin: tuple[float, float]  # column and row of x = y = 0
    rotation: float  # radians


def grid(size: tuple[int, int], pixel: float, shift: tuple[float, float], rotation: float) -> Grid:
    """Returns the grid of an image of `size` (height, width); `shift` in mm moves the origin right and down."""
    height, width = size
    origin = (width - 1) / 2 + shift[0] / pixel, (height - 1) / 2 + shift[1] / pixel
    column = ((np.arange(width) - origin[0]) * pixel).astype(np.float32)
    row = ((np.arange(height) - origin[1]) * pixel).astype(np.float32)[:, None]
    c, s = math.cos(rotation), math.sin(rotation)
    return Grid(c * column + s * row, c * row - s * column, pixel, origin, rotation)


def locate(g: Grid, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the nearest columns and rows, int [N], of points [N, 2] in mm; they may be outside the image."""
    c, s = math.cos(g.rotation) / g.pixel, math.sin(g.rotation) / g.pixel
    x, y = points.T
    return np.rint(g.origin[0] + c * x - s * y).astype(int), np.rint(g.origin[1] + c * y + s * x).astype(int)


def window(g: Grid, at: Sequence[float], reach: float) -> tuple[slice, slice]:
    """Returns rows and columns of the part of the image within `reach` mm of a point; empty outside the image."""
    (column,), (row,) = locate(g, np.array([at]))
    r = int(reach / g.pixel) + 2
    return slice(max(row - r, 0), max(row + r + 1, 0)), slice(max(column - r, 0), max(column + r + 1, 0))


def noise(rng: np.random.Generator, g: Grid, scale: float) -> np.ndarray:
    """Returns smooth noise, float32 [H, W] of about unit variance, with blobs about `scale` mm wide."""
    sigma = 0.4 * scale / g.pixel
    white = rng.standard_normal(g.x.shape, dtype=np.float32)
    return ndimage.gaussian_filter(white, sigma, truncate=3) * (2 * math.sqrt(math.pi) * sigma)


def ellipse(x: np.ndarray, y: np.ndarray, a: float, b: float, angle: float = 0.0) -> np.ndarray:
    """Returns the approximate signed distance to an ellipse around the origin with semi-axes `a` and `b`."""
    if angle:
        c, s = math.cos(angle), math.sin(angle)
        x, y = c * x + s * y, c * y - s * x
    u, v = x / a, y / b
    radius = np.sqrt(u * u + v * v) + 1e-6
    slope = np.sqrt((u / a) ** 2 + (v / b) ** 2) + 1e-9
    return radius * (radius - 1) / slope


def box(x: np.ndarray, y: np.ndarray, a: float, b: float, power: float) -> np.ndarray:
    """Returns the distance, along the ray from the origin, to a superellipse."""
    k = (np.abs(x / a) ** power + np.abs(y / b) ** power) ** (1 / power)
    return np.sqrt(x * x + y * y) * (1 - 1 / np.maximum(k, 1e-3))


def union(a: np.ndarray, b: np.ndarray, smooth: float) -> np.ndarray:
    """Returns the distance to the union of two shapes, blended over `smooth` mm."""
    return np.minimum(a, b) - np.maximum(smooth - np.abs(a - b), 0) ** 2 / (4 * smooth)


def cover(distance: np.ndarray, edge: float) -> np.ndarray:
    """Returns the fraction of each pixel inside a shape, over an edge `edge` mm wide."""
    return np.clip(0.5 - distance / edge, 0, 1)


def blend(hu: np.ndarray, fraction: np.ndarray, value: np.ndarray | float) -> None:
    """Mixes `value` into a fraction of each pixel of `hu`, in place."""
    hu += fraction * (value - hu)


def paint(
    hu: np.ndarray, g: Grid, at: Sequence[float], a: float, b: float, angle: float, value: float, edge: float = 0.0
) -> None:
    """Paints an ellipse with semi-axes `a` and `b`, centered at `at`, into `hu`, in place."""
    near = window(g, at, max(a, b) + 2)
    distance = ellipse(g.x[near] - at[0], g.y[near] - at[1], a, b, angle)
    blend(hu[near], cover(distance, max(edge, g.pixel)), value)
