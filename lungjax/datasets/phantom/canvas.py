"""Drawing on a grid of mm: shapes as signed distances, painted with soft edges, and smooth noise.

x runs to the patient's left (image right), y to the back (image bottom), the origin lies in the middle of
the chest. A distance is negative inside its shape, so a slice may be drawn at any pixel size.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lungjax.data.imaging import images


@dataclass(frozen=True)
class Grid:
    """Where the pixels of one slice lie in the patient."""

    x: np.ndarray  # float32 [H, W], mm
    y: np.ndarray  # float32 [H, W], mm
    pixel: float  # mm
    centre: tuple[float, float]  # column and row of x = y = 0, before bending
    turn: float  # radians the patient lies rotated
    bend: float  # mm by which bending moves a point at most


def grid(
    size: tuple[int, int], pixel: float, shift: tuple[float, float], turn: float, rng: np.random.Generator
) -> Grid:
    """Returns the grid of an image of `size` (height, width), rotated by `turn` radians and slightly bent."""
    height, width = size
    column, row = (width - 1) / 2 + shift[0] / pixel, (height - 1) / 2 + shift[1] / pixel
    x = ((np.arange(width) - column) * pixel).astype(np.float32)[None, :]
    y = ((np.arange(height) - row) * pixel).astype(np.float32)[:, None]
    bend = rng.uniform(0.5, 2.5, 4)
    phase = rng.uniform(0, 2 * np.pi, 4)
    # Bent along one axis at a time, which costs no more than two rows of sines.
    across = bend[0] * np.sin(y / 45 + phase[0]) + bend[1] * np.sin(y / 23 + phase[1])
    down = bend[2] * np.sin(x / 45 + phase[2]) + bend[3] * np.sin(x / 25 + phase[3])
    x, y = x + across, y + down
    c, s = np.float32(np.cos(turn)), np.float32(np.sin(turn))
    turned = (c * x + s * y).astype(np.float32), (c * y - s * x).astype(np.float32)
    return Grid(*turned, pixel, (column, row), turn, float(max(bend[:2].sum(), bend[2:].sum())))


def noise(rng: np.random.Generator, g: Grid, scale: float) -> np.ndarray:
    """Returns smooth noise float32 [H, W] of unit variance whose blobs are about `scale` mm wide."""
    # Keys' cubic between random knots, tap by tap: a matrix product would differ from machine to machine.
    taps = [_taps(count, g.pixel / scale) for count in g.x.shape]
    (rows, row_weights), (columns, column_weights) = taps
    knots = rng.standard_normal((rows[-1, -1] + 1, columns[-1, -1] + 1), dtype=np.float32)
    wide = np.zeros((len(knots), len(columns)), np.float32)
    for t in range(4):
        wide += knots[:, columns[:, t]] * column_weights[:, t]
    out = np.zeros(g.x.shape, np.float32)
    for t in range(4):
        out += wide[rows[:, t]] * row_weights[:, t, None]
    return out


@functools.lru_cache(maxsize=64)
def _taps(count: int, step: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns knots int [count, 4] and weights float32 [count, 4] for places `step` apart; variance 1."""
    place = np.arange(count) * step
    knots = place.astype(int)[:, None] + np.arange(4)
    weight = images.kernel_weights(np.abs(place[:, None] + 1 - knots), "bicubic")
    weight /= np.sqrt((weight**2).sum(axis=1, keepdims=True))
    return knots, weight.astype(np.float32)


def ellipse(x: np.ndarray, y: np.ndarray, a: float, b: float, angle: float = 0.0) -> np.ndarray:
    """Returns the signed distance to an ellipse around the origin, exact on its edge."""
    if angle:
        c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        x, y = c * x + s * y, c * y - s * x
    u, v = x / np.float32(a), y / np.float32(b)
    inside = np.sqrt(u * u + v * v) + np.float32(1e-6)
    slope = np.sqrt((u / np.float32(a)) ** 2 + (v / np.float32(b)) ** 2) + np.float32(1e-9)
    return inside * (inside - 1) / slope


def box(x: np.ndarray, y: np.ndarray, a: float, b: float, power: float = 2.6) -> np.ndarray:
    """Returns the distance, along the ray from the origin, to a superellipse."""
    k = (np.abs(x / np.float32(a)) ** power + np.abs(y / np.float32(b)) ** power) ** np.float32(1 / power)
    return np.sqrt(x * x + y * y) * (1 - 1 / np.maximum(k, np.float32(1e-3)))


def cover(distance: np.ndarray, edge: float) -> np.ndarray:
    """Returns how much of each pixel lies inside, 0..1, over an edge `edge` mm wide."""
    return np.clip(np.float32(0.5) - distance / np.float32(edge), 0, 1)


def both(a: np.ndarray, b: np.ndarray, round_mm: float) -> np.ndarray:
    """Returns the distance to the intersection of two shapes, its corner rounded."""
    k = np.float32(round_mm)
    return np.maximum(a, b) + np.maximum(k - np.abs(a - b), 0) ** 2 / (4 * k)


def paint(
    hu: np.ndarray,
    g: Grid,
    at: Sequence[float],
    a: float,
    b: float,
    angle: float,
    value: float,
    edge: float = 0.0,
) -> None:
    """Paints an ellipse of half axes `a` and `b` around the point `at` into `hu`, in place."""
    near = window(g, at, max(a, b))
    x, y = g.x[near] - np.float32(at[0]), g.y[near] - np.float32(at[1])
    if x.size:
        part = cover(ellipse(x, y, a, b, angle), max(edge, g.pixel))
        hu[near] += part * (np.float32(value) - hu[near])


def locate(g: Grid, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the nearest columns and rows, int [N], of points [N, 2] in mm.

    A point outside the image gets a place outside it, without the bending.
    """
    height, width = g.x.shape
    c, s = np.cos(g.turn) / g.pixel, np.sin(g.turn) / g.pixel
    x, y = points[:, 0].astype(np.float64), points[:, 1].astype(np.float64)
    column, row = g.centre[0] + c * x - s * y, g.centre[1] + c * y + s * x
    for _ in range(2):  # the first guess ignores the bending, which is slow enough for two corrections
        known = (row > 0) & (row < height - 1) & (column > 0) & (column < width - 1)
        at = np.rint(row).astype(int).clip(0, height - 1), np.rint(column).astype(int).clip(0, width - 1)
        dx, dy = known * (x - g.x[at]), known * (y - g.y[at])
        column, row = (
            np.where(known, at[1], column) + c * dx - s * dy,
            np.where(known, at[0], row) + c * dy + s * dx,
        )
    return np.rint(column).astype(int), np.rint(row).astype(int)


def window(g: Grid, at: Sequence[float], reach: float) -> tuple[slice, slice]:
    """Returns rows and columns of an part of the image that holds all within `reach` mm of a point."""
    c, s = math.cos(g.turn), math.sin(g.turn)
    column = int(g.centre[0] + (c * at[0] - s * at[1]) / g.pixel)
    row = int(g.centre[1] + (c * at[1] + s * at[0]) / g.pixel)
    r = int((1.1 * reach + g.bend) / g.pixel) + 2
    return slice(max(row - r, 0), max(row + r + 1, 0)), slice(max(column - r, 0), max(column + r + 1, 0))
