"""Branching pulmonary vessels and bronchi: one tree per patient, cut by every slice."""

import functools
import itertools
from dataclasses import dataclass

import numpy as np

from lungjax.datasets.phantom.anatomy import HILUM, LUNG_HEIGHT, Build, half_sizes
from lungjax.datasets.phantom.canvas import Grid, cover, locate

GENERATIONS = 9  # of branches; each tree has 2 ** 9 ends
BRONCHI = 6  # generations that are wide enough to show air


@dataclass(frozen=True)
class Tree:
    """Straight segments of a patient's vessels."""

    start: np.ndarray  # float32 [N, 3]: x, y, z in mm; z increases downwards from level 0
    stop: np.ndarray  # float32 [N, 3]
    radius: np.ndarray  # float32 [N], mm
    bronchus: np.ndarray  # bool [N], whether a bronchus accompanies the segment


@functools.lru_cache(maxsize=8)  # shared by the slices of a patient
def grow(build: Build) -> Tree:
    """Grows arteries and veins from the hila to points throughout both lungs."""
    rng = np.random.default_rng([build.seed, 7])
    segments: list[tuple[np.ndarray, ...]] = []
    for side in (-1, 1):
        for artery in (True, False):
            ends = _ends(build, side, rng)
            at = np.array([[side * 29.0, 2.0 if artery else -8.0, LUNG_HEIGHT * (HILUM if artery else HILUM + 0.04)]])
            for generation in range(1, GENERATIONS + 1):
                ends = _halve(ends, rng)
                at = np.repeat(at, 2, axis=0)
                reach = 0.5 if generation < GENERATIONS else 0.85
                to = at + reach * (ends.mean(axis=1) - at) * rng.uniform(0.8, 1.2, (len(at), 1))
                # Murray's law: the cubed radii of two branches add up to that of their stem.
                radius = 6.4 * 2 ** (-generation / 2.8) * rng.uniform(0.75, 1.15, len(at))
                bronchus = np.full(len(at), artery and 1 < generation <= BRONCHI)
                # Branches are slightly bent paths of 4 or 2 segments.
                t = np.linspace(0, 1, 5 if generation < 6 else 3)[:, None, None]
                bend = 0.07 * np.linalg.norm(to - at, axis=1, keepdims=True) * rng.standard_normal(at.shape)
                path = at + t * (to - at) + np.sin(np.pi * t) * bend
                segments += [(start, stop, radius, bronchus) for start, stop in itertools.pairwise(path)]
                at = to
    start, stop, radius, bronchus = (np.concatenate(column) for column in zip(*segments, strict=True))
    return Tree(start.astype(np.float32), stop.astype(np.float32), radius.astype(np.float32), bronchus)


def _ends(build: Build, side: int, rng: np.random.Generator) -> np.ndarray:
    """Returns points spread over one lung, float [1, 2 ** GENERATIONS, 3]."""
    count = 2**GENERATIONS
    level = rng.permutation(np.linspace(0.06, 1.02, count))
    width, depth = half_sizes(build, level)
    angle, out = rng.uniform(0, 2 * np.pi, count), np.sqrt(rng.uniform(0, 0.92, count))
    x, y = side * width * (0.47 + 0.5 * out * np.cos(angle)), depth * out * np.sin(angle)
    return np.stack([x, y, level * LUNG_HEIGHT], axis=1)[None]


def _halve(ends: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Splits every group of points [G, n, 3] in two across a random line near its longest extent: [2 G, n / 2, 3]."""
    spread = ends.std(axis=1)
    line = spread * (rng.choice((-1.0, 1.0), spread.shape) + 0.5 * rng.standard_normal(spread.shape))
    line *= spread >= 0.6 * spread.max(axis=1, keepdims=True)
    order = (ends * line[:, None]).sum(axis=2).argsort(axis=1)
    return np.take_along_axis(ends, order[..., None], axis=1).reshape(2 * len(ends), -1, 3)


def cut(tree: Tree, g: Grid, level: float, thickness: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the fractions of each pixel that are vessel, bronchial wall and bronchial lumen, float32 [H, W]."""
    z, reach = level * LUNG_HEIGHT, thickness / 2
    heights = np.sort([tree.start[:, 2], tree.stop[:, 2]], axis=0)
    near = (heights[0] - tree.radius < z + reach) & (heights[1] + tree.radius > z - reach)
    start, radius, bronchus = tree.start[near], tree.radius[near], tree.bronchus[near]
    along = tree.stop[near] - start
    rise = np.where(np.abs(along[:, 2]) < 1e-3, 1e-3, along[:, 2])
    ends = np.sort([(z - reach - start[:, 2]) / rise, (z + reach - start[:, 2]) / rise], axis=0).clip(0, 1)
    a, b = (start[:, :2] + end[:, None] * along[:, :2] for end in ends)
    # The part of the slice's thickness that a segment fills: horizontal vessels in a thick slice are fainter.
    fill = np.minimum(1, np.maximum(2 * radius, np.abs(along[:, 2]) * (ends[1] - ends[0])) / thickness)
    vessels = _stamp(g, a, b, radius, fill)
    a, b, r, fill = a[bronchus], b[bronchus], radius[bronchus], fill[bronchus]
    offset = np.stack([0.4 * np.sign(a[:, 0]), -np.ones(len(a))], 1) * 1.75 * r[:, None]
    wall = _stamp(g, a + offset, b + offset, 0.95 * r + 0.3, fill)
    return vessels, wall, _stamp(g, a + offset, b + offset, 0.75 * r, fill)


def _stamp(g: Grid, a: np.ndarray, b: np.ndarray, radius: np.ndarray, fill: np.ndarray) -> np.ndarray:
    """Returns the fraction of each pixel that is covered by round-ended strokes from a to b [N, 2]."""
    height, width = g.x.shape
    out = np.zeros((height, width), np.float32)
    column, row = locate(g, (a + b) / 2)
    span = np.linalg.norm(b - a, axis=1) / 2 + radius + 1.5 * g.pixel
    inside = (column > -9) & (column < width + 9) & (row > -9) & (row < height + 9)
    for chosen in (inside & (span <= 7), inside & (span > 7)):  # short strokes need small windows only
        if not chosen.any():
            continue
        step = np.arange(-np.ceil(span[chosen].max() / g.pixel), np.ceil(span[chosen].max() / g.pixel) + 1, dtype=int)
        rows = (row[chosen, None, None] + step[:, None]).clip(0, height - 1)
        pixels = rows * width + (column[chosen, None, None] + step).clip(0, width - 1)
        ax, ay, bx, by = (p[chosen, i, None, None] for p in (a, b) for i in (0, 1))
        x, y, dx, dy = g.x.ravel()[pixels] - ax, g.y.ravel()[pixels] - ay, bx - ax, by - ay
        t = ((x * dx + y * dy) / (dx * dx + dy * dy + 1e-6)).clip(0, 1)
        r = radius[chosen, None, None]
        part = cover(np.hypot(x - t * dx, y - t * dy) - r, g.pixel) * np.minimum(1, 2 * r / g.pixel)
        np.maximum.at(out.ravel(), pixels, (part * fill[chosen, None, None]).astype(np.float32))
    return out
