"""Healthy anatomy of a synthetic axial chest slice: body, bones, mediastinum, lungs and large airways.

Coordinates are those of `lungjax.datasets.phantom.canvas`; lengths are in mm. `level` is the height of a slice: 0 at
the top of the lungs, 1 at their base.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lungjax.datasets.phantom.canvas import Grid, blend, box, cover, ellipse, noise, paint, union

AIR, FAT, MUSCLE, BLOOD, MARROW, BONE = -1000.0, -100.0, 50.0, 40.0, 230.0, 800.0  # HU
LUNG_HEIGHT = 210.0  # mm from level 0 to level 1
HILUM = 0.52  # level at which the vessels enter the lungs
LEAN = 0.1  # the fronts of both halves of the cavity are nearer to the midline
VESSELS = (  # range of levels, x in mm, y in depths of the cavity, half axes in mm, angle
    (0, 0.33, -15, -0.11, 7, 8, 0), (0, 0.33, -7, -0.24, 6, 7, 0), (0, 0.33, 12, -0.18, 6, 7, 0),
    (0, 0.33, 16, 0.02, 6, 6, 0), (0, 0.33, -17, -0.3, 7, 8, 0), (0, 0.33, 19, -0.34, 6, 7, 0),
    (0.25, 0.42, 14, 0.02, 13, 34, -0.35),  # arch of the aorta
    (0.25, 0.55, -20, -0.17, 8, 10, 0),  # superior vena cava
    (0.42, 0.55, -10, -0.3, 15, 16, 0),  # ascending aorta
    (0.42, 0.55, 16, -0.3, 14, 17, 0.5), (0.46, 0.58, -5, -0.06, 30, 8, 0.25),  # pulmonary arteries
)  # fmt: skip


@dataclass(frozen=True)
class Build:
    """Body measurements of a patient."""

    width: float  # half width of the chest cavity
    depth: float  # half depth of the chest cavity
    fat: float  # thickness under the skin
    wall: float  # thickness of the muscle around the cavity
    breast: float  # half depth, 0 for none
    heart: float  # size factor
    contrast: float  # HU that contrast medium adds to blood
    fissure: float  # shift of the oblique fissures to the back
    seed: int  # of the vessels


@dataclass(frozen=True)
class Chest:
    """Cross-section of a patient at one level."""

    build: Build
    level: float
    width: float  # half width of the cavity
    depth: float  # half depth of the cavity

    @property
    def half(self) -> tuple[float, float, float]:
        """Center |x|, half width and half depth of one side of the cavity."""
        return 0.44 * self.width, 0.56 * self.width, self.depth

    @property
    def spine(self) -> float:
        """y of the center of the vertebral body."""
        return self.depth - 22

    @property
    def outer(self) -> tuple[float, float]:
        """Half width and half depth of the body without breasts."""
        layer = self.build.fat + self.build.wall
        shoulders = 1 + 0.35 * max(0.35 - self.level, 0)
        a = max(self.width, 0.86 * self.build.width) * shoulders + layer
        return a, max(self.depth, 0.8 * self.build.depth) + 0.75 * layer + 9

    def at(self, levels: Sequence[float], values: Sequence[float]) -> float:
        """Returns a value at this level, interpolated linearly between given levels."""
        return float(np.interp(self.level, levels, values))

    @property
    def heart(self) -> float:
        """Size factor of the heart in this slice."""
        return self.build.heart * self.at((0.42, 0.52, 0.66, 0.82, 0.95, 1), (0, 0.72, 1, 1, 0.8, 0.6))


@dataclass(frozen=True)
class Lungs:
    """The lungs of a slice; arrays are float32 [H, W]."""

    cover: np.ndarray  # lung fraction of the pixel
    depth: np.ndarray  # mm below the chest wall, positive inside
    side: np.ndarray  # -1 in the patient's right half (image left), 1 in the left
    fissure: np.ndarray  # mm behind the oblique fissure, positive in the lower lobe
    mediastinum: np.ndarray  # signed distance to everything that displaces the lungs


def half_sizes(build: Build, level: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the half width and half depth of the cavity at each level of an array of any shape."""
    levels = (0.0, 0.15, 0.3, 0.5, 0.8, 1.0)
    width = build.width * np.interp(level, levels, (0.4, 0.66, 0.85, 0.95, 1.0, 1.0))
    return width, build.depth * np.interp(level, levels, (0.42, 0.66, 0.85, 0.98, 1.0, 1.0))


def wall(c: Chest, g: Grid) -> np.ndarray:
    """Returns the distance to the inner chest wall, negative in the cavity, float32 [H, W]."""
    middle, a, b = c.half
    return box(np.abs(g.x) - middle - LEAN * g.y, g.y, a, b, 2.1)


def at_wall(c: Chest, side: int, angle: float, depth: float) -> tuple[float, float, float]:
    """Returns the point `depth` mm inside the wall and its direction; `angle` is 0 laterally, pi/2 at the back."""
    middle, a, b = c.half
    y = (b - depth) * math.sin(angle)
    x = middle + LEAN * y + (a - depth) * math.cos(angle)
    dy = b * math.cos(angle)
    return side * x, y, math.atan2(dy, side * (LEAN * dy - a * math.sin(angle)))


def skin(c: Chest, g: Grid) -> np.ndarray:
    """Returns the signed distance to the skin, float32 [H, W]."""
    a, b = c.outer
    surface = box(g.x, g.y - 7, a, b, 2.25)
    size = c.build.breast * max(0.0, 1 - ((c.level - 0.62) / 0.38) ** 2)
    if size > 4:
        breast = ellipse(np.abs(g.x) - 0.52 * a, g.y + 0.8 * b, 0.4 * a, 0.2 * b + size, 0.2)
        surface = union(surface, breast, 14)
    return surface


def draw_table(hu: np.ndarray, c: Chest, g: Grid) -> None:
    """Paints a curved patient table under the body into `hu`, in place."""
    curve = g.y - c.outer[1] - 21 + 0.9 * (g.x / 34) ** 2
    for below, half, width, value in ((0, 1.0, 230, -150.0), (22, 1.6, 130, 50.0)):
        blend(hu, cover(np.maximum(np.abs(curve - below) - half, np.abs(g.x) - width), g.pixel), value)


def draw_wall(hu: np.ndarray, c: Chest, g: Grid, rng: np.random.Generator) -> None:
    """Paints skin, fat and muscle into the air of `hu`, in place."""
    surface, x, thickness = skin(c, g), np.abs(g.x), c.build.wall
    blend(hu, cover(surface, g.pixel), 20.0)
    blend(hu, cover(surface + 2.2, g.pixel), FAT + 12 * noise(rng, g, 9))
    front = c.depth + 0.75 * thickness
    muscle = box(g.x, g.y - 5, c.width + thickness + 1, front + 5, 2.25)
    muscle = np.minimum(muscle, ellipse(x - 27, g.y - front + 6, 30, 17, 0.2))  # paraspinal
    if c.level < 0.6:  # pectoral
        muscle = np.minimum(muscle, ellipse(x - 0.55 * c.width, g.y + 0.84 * front, 0.42 * c.width, 14, 0.33))
    muscle = np.maximum(muscle, surface + 3.5)
    blend(hu, cover(muscle, g.pixel), MUSCLE + 6 * noise(rng, g, 8))
    plane = np.abs(box(g.x, g.y - 3, c.width + 0.62 * thickness, c.depth + 0.47 * thickness, 2.2)) - 0.7
    blend(hu, 0.7 * cover(np.maximum(plane, muscle), g.pixel), FAT)


def draw_bones(hu: np.ndarray, c: Chest, g: Grid, rng: np.random.Generator) -> None:
    """Paints spine, ribs, breastbone and shoulder blades into `hu`, in place."""
    bones: list[tuple[float, ...]] = []  # x, y, half axes, angle
    phase = (4.3 * c.level + rng.uniform(0, 0.2)) % 1.0
    for side in (-1, 1):
        bones += [(side * 26, c.spine + 19, 15, 4.5, side * 0.35)]  # transverse process
        bones += [(side * 11, c.spine + 29, 11, 3.2, side * 0.75)]  # lamina
        for angle in np.arange(-1.15, 1.4 - 0.43 * phase, 0.43) + 0.43 * phase:
            # Ribs descend to the front, so their cross-sections are oblique: long and thin along the wall.
            x, y, along = at_wall(c, side, angle, -5.5)
            if angle < -0.85 and c.level > 0.3:  # cartilage
                paint(hu, g, (x, y), rng.uniform(5, 12), 4.5, along, 120)
            else:
                bones += [(x, y, rng.uniform(6, 15), 4.3, along)]
        if c.level < 0.55:  # shoulder blade
            length = 30 - 18 * max(c.level - 0.2, 0)
            bones += [(side * (0.83 * c.width + 10), 0.72 * c.depth + 9, length, 3.6, -side * 0.72)]
    bones += [(0, c.spine + 42, 3.4, 14, 0), (0, c.spine, 17.5, 15, 0)]  # spinous process, vertebral body
    if c.level < 0.82:  # breastbone
        bones += [(rng.uniform(-2, 2), -c.depth - 3, rng.uniform(15, 21), 6.2, 0)]
    for x, y, a, b, angle in bones:
        paint(hu, g, (x, y), a, b, angle, BONE)
        paint(hu, g, (x, y), a - 1.6, b - 1.6, angle, MARROW)
    paint(hu, g, (0, c.spine + 20), 10.5, 9.5, 0, BONE)
    paint(hu, g, (0, c.spine + 20), 8.2, 7.4, 0, 25)  # spinal canal


def lungs(c: Chest, g: Grid, rng: np.random.Generator) -> Lungs:
    """Returns the lungs of a slice."""
    x, y, level, d = g.x, g.y, c.level, c.depth
    middle, a, _ = c.half
    parts = [
        ellipse(x - 2, y + 0.02 * d, c.at((0.1, 0.35, 0.5, 1), (27, 25, 29, 27)), 0.66 * d),
        ellipse(x - 3, y + 0.78 * d, c.at((0.1, 0.35, 0.6), (20, 7, 5)), 0.42 * d),
        ellipse(x, y - c.spine, 24, 21),  # spine
        np.maximum(np.abs(x) - 25 + 0.35 * np.maximum(c.spine + 24 - y, 0), c.spine - y),
        np.abs(x - 3 + 0.05 * y) - 1.4,  # contact of the pleurae of both lungs
    ]
    if c.heart > 0.05:
        parts.append(ellipse(x - 16 * c.heart, y + 0.22 * d, 56 * c.heart, 46 * c.heart, 0.6))
    if 0.24 < level < 0.43:  # arch of the aorta
        parts.append(ellipse(x - 14, y - 0.02 * d, 15 + 4 * c.at((0.24, 0.31, 0.37, 0.43), (0, 1, 1, 0)), 38, -0.35))
    if level > 0.36:  # descending aorta
        parts.append(ellipse(x - 25, y - c.spine + 17, 14, 14))
    bulge = float(np.interp(abs(level - HILUM), (0, 0.14), (12, 0)))
    if bulge > 2:
        parts += [ellipse(x - side * (33 + rng.uniform(-2, 3)), y - 4, bulge, bulge + 6) for side in (-1, 1)]
    mediastinum = functools.reduce(lambda one, other: union(one, other, 9), parts)
    outside = union(-wall(c, g), mediastinum, 5)
    for half, start in ((-1, 0.8), (1, 0.87)):  # liver and stomach under the domes of the diaphragm
        dome = math.sqrt(max(level - start - rng.uniform(-0.03, 0.03), 0) / 0.22)
        if dome > 0.1:
            organ = ellipse(x - half * (middle - 9 + 6 * dome), y + 0.12 * d, dome * a, dome * 0.9 * d)
            mediastinum = np.minimum(mediastinum, organ)
            outside = union(outside, organ, 5)
    side = np.where(x < 3 - 0.05 * y, np.float32(-1), np.float32(1))
    fissure = y - c.at((0.15, 0.5, 0.95), (0.7, 0.18, -0.8)) * d - c.build.fissure
    # It bows forward in the middle and rises towards the wall.
    fissure += 0.22 * (np.abs(x) - middle) - 6 * np.sin(x / 23 + 0.7 * side)
    return Lungs(cover(-outside, g.pixel), -wall(c, g), side, fissure, mediastinum)


def draw_mediastinum(hu: np.ndarray, c: Chest, g: Grid, lung: Lungs, rng: np.random.Generator) -> None:
    """Paints fat, heart, great vessels, esophagus, liver and stomach into `hu`, in place."""
    d, blood, heart = c.depth, BLOOD + c.build.contrast, c.heart
    cavity = np.minimum(wall(c, g), ellipse(g.x, g.y, 0.6 * c.width, 0.9 * d))
    blend(hu, cover(np.maximum(cavity, lung.mediastinum - 4), g.pixel), FAT + 15 + 10 * noise(rng, g, 7))
    if heart > 0.05:
        x, y = 16 * heart, -0.22 * d
        paint(hu, g, (x, y), 52 * heart, 42 * heart, 0.6, 55, 4)
        for dx, dy, size in ((-26, -6, 21), (14, -16, 20), (24, 12, 22), (-8, 20, 19)):
            a = size * heart
            paint(hu, g, (x + dx * heart, y + dy * heart), a, 0.8 * a, 0.5, blood, 6)
    for low, high, x, y, a, b, angle in VESSELS:
        if low < c.level < high:
            paint(hu, g, (x, y * d), a, b, angle, blood)
    if c.level > 0.36:  # descending aorta
        paint(hu, g, (25, c.spine - 17), 12, 12, 0, blood)
    paint(hu, g, (6, c.spine - 27), 8, 5, 0.2, 35)  # esophagus
    for half, start, tissue in ((-1, 0.8, 60 + 0.4 * c.build.contrast), (1, 0.87, 45 + 0.3 * c.build.contrast)):
        if c.level > start:
            organ = np.where(half * g.x > 8, np.maximum(cavity, lung.mediastinum), np.float32(99))
            blend(hu, cover(organ + 3, 5), tissue)
    if c.level > 0.9:
        paint(hu, g, (0.5 * c.width, -0.35 * d), 17, 9, 0.2, -900)  # gas in the stomach


def draw_airways(hu: np.ndarray, c: Chest, g: Grid) -> None:
    """Paints the trachea or the two main bronchi into `hu`, in place."""
    y, below = c.spine - 40 - 20 * c.level, c.level - 0.44
    apart = 10 + 170 * below
    if below < 0:
        airways = [(-3.0, y, 8.5, 9.5)]
    elif below < 0.16:
        airways = [(side * (apart + 2), y + 5 + side, 8.2 - 14 * below, 6.2) for side in (-1, 1)]
    else:
        airways = []
    for x, y, a, b in airways:
        paint(hu, g, (x, y), a + 1.6, b + 1.6, 0, 20)
        paint(hu, g, (x, y), a, b, 0, -985)
