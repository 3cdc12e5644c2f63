"""Branching lung vessels and bronchi: one tree a patient, cut by every slice."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from lungjax.datasets.phantom.anatomy import HILUM, LUNG_HEIGHT, Build, half_sizes
from lungjax.datasets.phantom.canvas import Grid, locate

GENERATIONS = 9  # 2 ** 9 ends in each tree
BRONCHI = 6  # generations that are wide enough to show air


@dataclass(frozen=True)
class Tree:
    """Straight pieces of a patient's vessels."""

    start: np.ndarray  # float32 [N, 3]: x, y, z in mm, z growing downwards from level 0
    stop: np.ndarray  # float32 [N, 3]
    radius: np.ndarray  # float32 [N], mm
    bronchus: np.ndarray  # bool [N], whether a bronchus runs beside it


@functools.lru_cache(maxsize=8)  # the slices of a patient share it
def grow(build: Build) -> Tree:
    """Grows arteries and veins of both lungs from the hila to points all over the lungs."""
    rng = np.random.default_rng([build.seed, 7])
    pieces: list[tuple[np.ndarray, ...]] = []
    for side in (-1, 1):
        for artery in (True, False):
            hilum = np.array([side * 29.0, 2.0 if artery else -8.0, LUNG_HEIGHT * (HILUM + (0 if artery else 0.04))])
            ends = _ends(build, side, rng)
            at = hilum[None]
            for generation in range(1, GENERATIONS + 1):
                ends = _halves(ends, rng)
                middle = ends.mean(axis=1)
                at = np.repeat(at, 2, axis=0)
                reach = 0.5 if generation < GENERATIONS else 0.85
                to = at + reach * (middle - at) * rng.uniform(0.8, 1.2, (len(at), 1))
                # Murray's law: the cubes of the radii of two branches add up to that of their stem.
                radius = 6.4 * 2 ** (-generation / 2.8) * rng.uniform(0.75, 1.15, len(at))
                for start, stop in _bent(at, to, 4 if generation < 6 else 2, rng):
                    pieces.append((start, stop, radius, np.full(len(at), artery and 1 < generation <= BRONCHI)))
                at = to
    start, stop, radius, bronchus = (np.concatenate(p) for p in zip(*pieces, strict=True))
    return Tree(start.astype(np.float32), stop.astype(np.float32), radius.astype(np.float32), bronchus)


def _ends(build: Build, side: int, rng: np.random.Generator) -> np.ndarray:
    """Returns points spread over one lung, float [1, 2 ** GENERATIONS, 3]."""
    count = 2**GENERATIONS
    level = rng.permutation(np.linspace(0.06, 1.02, count))
    width, depth = half_sizes(build, level)
    turn, out = rng.uniform(0, 2 * np.pi, count), np.sqrt(rng.uniform(0, 0.92, count))
    x, y = side * width * (0.47 + 0.5 * out * np.cos(turn)), depth * out * np.sin(turn)
    return np.stack([x, y, level * LUNG_HEIGHT], axis=1)[None]


def _halves(ends: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Splits every group of points [G, n, 3] in two along a line near its longest: [2 G, n / 2, 3]."""
    spread = ends.std(axis=1)
    line = spread * rng.choice((-1.0, 1.0), spread.shape) + 0.5 * spread * rng.standard_normal(spread.shape)
    line = line * (spread >= 0.6 * spread.max(axis=1, keepdims=True))
    order = (ends * line[:, None]).sum(axis=2).argsort(axis=1)
    ordered = np.take_along_axis(ends, order[..., None], axis=1)
    return ordered.reshape(2 * len(ends), -1, 3)


def _bent(
    start: np.ndarray, stop: np.ndarray, count: int, rng: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields `count` straight pieces, a power of 2, of slightly bent paths between points [N, 3]."""
    if count == 1:
        yield start, stop
        return
    length = np.linalg.norm(stop - start, axis=1, keepdims=True)
    middle = (start + stop) / 2 + 0.07 * length * rng.standard_normal(start.shape)
    yield from _bent(start, middle, count // 2, rng)
    yield from _bent(middle, stop, count // 2, rng)


def cut(tree: Tree, g: Grid, level: float, thickness: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns how much of each pixel is vessel, bronchial wall and bronchial lumen, float32 [H, W], 0..1."""
    z, reach = level * LUNG_HEIGHT, thickness / 2
    low, high = np.minimum(tree.start[:, 2], tree.stop[:, 2]), np.maximum(tree.start[:, 2], tree.stop[:, 2])
    near = (low - tree.radius < z + reach) & (high + tree.radius > z - reach)
    start, stop, radius = tree.start[near], tree.stop[near], tree.radius[near]
    rise = stop[:, 2] - start[:, 2]
    safe = np.where(np.abs(rise) < 1e-3, 1e-3, rise)
    ends = np.sort(np.stack([(z - reach - start[:, 2]) / safe, (z + reach - start[:, 2]) / safe]), axis=0).clip(0, 1)
    a = start[:, :2] + ends[0][:, None] * (stop - start)[:, :2]
    b = start[:, :2] + ends[1][:, None] * (stop - start)[:, :2]
    # What a piece fills of the slice's thickness: tubes lying in a thick slice are fainter than upright ones.
    filled = np.minimum(1, np.maximum(2 * radius, np.abs(stop - start)[:, 2] * (ends[1] - ends[0])) / thickness)
    vessels = _stamp(g, a, b, radius, filled)
    airway = tree.bronchus[near]
    offset = np.stack([0.4 * np.sign(a[airway, 0]), -np.ones(airway.sum())], 1) * 1.75 * radius[airway, None]
    a, b, r, filled = a[airway] + offset, b[airway] + offset, radius[airway], filled[airway]
    wall = _stamp(g, a, b, 0.95 * r + 0.3, filled)
    return vessels, wall, _stamp(g, a, b, 0.75 * r, filled)


def _stamp(g: Grid, a: np.ndarray, b: np.ndarray, radius: np.ndarray, filled: np.ndarray) -> np.ndarray:
    """Returns the part of each pixel that is covered by round-ended strokes from a to b [N, 2]."""
    height, width = g.x.shape
    out = np.zeros((height, width), np.float32)
    if not len(a):
        return out
    column, row = locate(g, (a + b) / 2)
    span = np.linalg.norm(b - a, axis=1) / 2 + radius + 1.5 * g.pixel
    for limit, above in ((7.0, 0.0), (99.0, 7.0)):
        chosen = (span <= limit) & (span > above)
        chosen &= (column > -9) & (column < width + 9) & (row > -9) & (row < height + 9)
        if not chosen.any():
            continue
        k = int(np.ceil(span[chosen].max() / g.pixel))
        step = np.arange(-k, k + 1)
        rows = (row[chosen, None, None] + step[None, :, None]).clip(0, height - 1)
        columns = (column[chosen, None, None] + step[None, None, :]).clip(0, width - 1)
        at = rows * width + columns
        x, y = g.x.ravel()[at], g.y.ravel()[at]
        ax, ay = a[chosen, 0, None, None], a[chosen, 1, None, None]
        dx, dy = b[chosen, 0, None, None] - ax, b[chosen, 1, None, None] - ay
        t = (((x - ax) * dx + (y - ay) * dy) / (dx * dx + dy * dy + 1e-6)).clip(0, 1)
        distance = np.sqrt((x - ax - t * dx) ** 2 + (y - ay - t * dy) ** 2)
        r = radius[chosen, None, None]
        part = np.clip(0.5 + (r - distance) / g.pixel, 0, 1) * np.minimum(1, 2 * r / g.pixel)
        np.maximum.at(out.ravel(), at, (part * filled[chosen, None, None]).astype(np.float32))
    return out
