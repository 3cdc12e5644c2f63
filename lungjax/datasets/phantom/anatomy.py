"""The healthy parts of a drawn axial chest slice: body, bones, mediastinum, lungs and large airways.

The patient's coordinates and `Grid` are those of `lungjax.datasets.phantom.canvas`. `level` is the height of a
slice: 0 at the top of the lungs, 1 at their base.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lungjax.datasets.phantom.canvas import Grid, both, box, cover, ellipse, noise, paint

AIR, FAT, MUSCLE, BLOOD, MARROW, BONE = -1000.0, -100.0, 50.0, 40.0, 230.0, 800.0  # HU
LUNG_HEIGHT = 210.0  # mm from level 0 to level 1
HILUM = 0.52  # level at which the vessels enter the lungs


@dataclass(frozen=True)
class Build:
    """How a patient is built."""

    width: float  # half width of the chest cavity
    depth: float  # half depth of the chest cavity
    fat: float  # thickness under the skin
    wall: float  # thickness of muscle around the cavity
    breast: float  # 0 for none, else half depth
    heart: float  # size factor
    contrast: float  # HU that contrast medium adds to blood
    arms: bool  # beside the body; else raised out of the slice
    fissure: float  # mm by which the oblique fissures lie further back
    seed: int  # of ribs, vessels and small shifts


@dataclass(frozen=True)
class Chest:
    """Cross-section of the cavity at one level."""

    width: float
    depth: float
    spine: float  # y of the vertebral body's centre
    level: float

    @property
    def half(self) -> tuple[float, float, float]:
        """Centre |x|, half width and half depth of one side of the cavity."""
        return 0.44 * self.width, 0.56 * self.width, self.depth


@dataclass(frozen=True)
class Lungs:
    """Where the lungs are in a slice; all float32 [H, W]."""

    cover: np.ndarray  # part of the pixel that is lung, 0..1
    depth: np.ndarray  # mm below the chest wall, positive inside
    side: np.ndarray  # -1 in the patient's right half (image left), 1 in the left
    fissure: np.ndarray  # mm behind the oblique fissure, positive in the lower lobe


def half_sizes(build: Build, level: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns half width and half depth of the cavity in mm at levels, 0..1, of any shape."""
    levels = (0.0, 0.15, 0.3, 0.5, 0.8, 1.0)
    width = build.width * np.interp(level, levels, (0.4, 0.66, 0.85, 0.95, 1.0, 1.0))
    return width, build.depth * np.interp(level, levels, (0.42, 0.66, 0.85, 0.98, 1.0, 1.0))


def chest(build: Build, level: float) -> Chest:
    """Returns the cavity of a patient at a level, 0..1."""
    width, depth = (float(v) for v in half_sizes(build, np.asarray(level)))
    return Chest(width, depth, depth - 22.0, level)


LEAN = 0.1  # the fronts of both halves of the cavity lie nearer to the midline


def wall(c: Chest, g: Grid) -> np.ndarray:
    """Returns the distance to the inner chest wall, negative in the cavity, float32 [H, W]."""
    middle, a, b = c.half
    return box(np.abs(g.x) - np.float32(middle) - np.float32(LEAN) * g.y, g.y, a, b, 2.1)


def at_wall(c: Chest, side: int, angle: float, depth: float) -> tuple[float, float, float]:
    """Returns the point `depth` mm inside the chest wall and the wall's direction there in radians.

    `side` is -1 or 1 as in `Lungs.side`; `angle` is 0 at the side, pi/2 at the back, -pi/2 in front.
    """
    middle, a, b = c.half
    y = (b - depth) * np.sin(angle)
    x = middle + LEAN * y + (a - depth) * np.cos(angle)
    dy = b * np.cos(angle)
    return side * x, y, float(np.arctan2(dy, side * (LEAN * dy - a * np.sin(angle))))


def body(build: Build, c: Chest, g: Grid) -> np.ndarray:
    """Returns the signed distance to the skin, float32 [H, W]; arms not counted."""
    layer = build.fat + build.wall
    shoulders = 1.0 + 0.35 * max(0.35 - c.level, 0.0)
    a = max(c.width, 0.86 * build.width) * shoulders + layer
    b = max(c.depth, 0.8 * build.depth) + 0.75 * layer + 9.0
    skin = box(g.x, g.y - 7, a, b, 2.25)
    if build.breast:
        size = build.breast * max(0.0, 1 - ((c.level - 0.62) / 0.38) ** 2)
        if size > 4:
            front = ellipse(np.abs(g.x) - 0.52 * a, g.y + 0.8 * b, 0.4 * a, 0.2 * b + size, 0.2)
            k = np.float32(14)
            skin = np.minimum(skin, front) - np.maximum(k - np.abs(skin - front), 0) ** 2 / (4 * k)
    return skin


def draw_wall(hu: np.ndarray, build: Build, c: Chest, g: Grid, rng: np.random.Generator) -> None:
    """Paints body, muscle and, if they are down, arms into the air of `hu`, in place."""
    skin = body(build, c, g)
    if build.arms:
        x = max(c.width, 0.86 * build.width) + build.fat + build.wall + 46
        for side in (-1, 1):
            at = side * (x + rng.uniform(-4, 8)), 22 + rng.uniform(-12, 12)
            paint(hu, g, at, 41, 46, 0, FAT)
            paint(hu, g, at, 34, 39, 0, MUSCLE)
            paint(hu, g, at, 11, 11, 0, BONE)
            paint(hu, g, at, 6, 6, 0, MARROW - 250)
    hu += cover(skin, g.pixel) * (np.float32(20) - hu)
    strands = FAT + 12 * noise(rng, g, 9)
    hu += cover(skin + 2.2, g.pixel) * (strands - hu)
    x = np.abs(g.x)
    m = 0.75 * build.wall
    muscle = box(g.x, g.y - 5, c.width + build.wall + 1, c.depth + m + 5, 2.25)
    back = ellipse(x - 27, g.y - c.depth - m + 6, 30, 17, 0.2)  # paraspinal
    chestmuscle = ellipse(x - 0.55 * c.width, g.y + 0.84 * (c.depth + m), 0.42 * c.width, 14, 0.33)
    muscle = np.minimum(np.minimum(muscle, back), chestmuscle if c.level < 0.6 else back)
    muscle = np.maximum(muscle, skin + 3.5)
    tissue = MUSCLE + 6 * noise(rng, g, 8)
    hu += cover(muscle, g.pixel) * (tissue - hu)
    # Fat planes between the muscle layers.
    plane = np.abs(box(g.x, g.y - 3, c.width + 0.62 * build.wall, c.depth + 0.62 * m, 2.2)) - 0.7
    hu += 0.7 * cover(np.maximum(plane, muscle), g.pixel) * (np.float32(FAT) - hu)


def draw_bones(hu: np.ndarray, build: Build, c: Chest, g: Grid, rng: np.random.Generator) -> None:
    """Paints spine, ribs, breastbone and shoulder blades into `hu`, in place."""

    def bone(at: Sequence[float], a: float, b: float, angle: float = 0.0, shell: float = 1.7) -> None:
        paint(hu, g, at, a, b, angle, BONE)
        if min(a, b) > shell + 0.5:
            paint(hu, g, at, a - shell, b - shell, angle, MARROW)

    back = c.spine + 25
    for side in (-1, 1):
        bone((side * 26, back - 6), 15, 4.5, side * 0.35)  # transverse process
        bone((side * 11, back + 4), 11, 3.2, side * 0.75)  # lamina
    bone((0, back + 17), 3.4, 14)  # spinous process
    bone((0, c.spine), 17.5, 15, shell=1.5)
    paint(hu, g, (0, c.spine + 20), 10.5, 9.5, 0, BONE)
    paint(hu, g, (0, c.spine + 20), 8.2, 7.4, 0, 25)  # canal
    phase = (4.3 * c.level + rng.uniform(0, 0.2)) % 1.0
    for side in (-1, 1):
        for angle in np.arange(-1.15, 1.45, 0.43) + 0.43 * phase:
            if angle > 1.4:
                continue
            # Ribs run downwards to the front, so each is cut obliquely: long and thin along the wall.
            px, py, along = at_wall(c, side, angle, -5.5)
            at = px, py
            front = angle < -0.85
            length = rng.uniform(6, 15) * (0.8 if front else 1.0)
            if front and c.level > 0.3:  # cartilage
                paint(hu, g, at, length, 4.5, along, 120)
            else:
                bone(at, length, 4.3, along)
    if c.level < 0.82:
        bone((rng.uniform(-2, 2), -c.depth - 3), rng.uniform(15, 21), 6.2)
    if c.level < 0.55:
        for side in (-1, 1):
            at = side * (0.83 * c.width + 10), 0.72 * c.depth + 9
            bone(at, 30 - 18 * max(c.level - 0.2, 0), 3.6, -side * 0.72, 1.4)


def draw_table(hu: np.ndarray, c: Chest, build: Build, g: Grid, kind: int) -> None:
    """Paints one of three patient tables, or none (kind 0), under the body into `hu`, in place."""
    top = max(c.depth, 0.8 * build.depth) + 0.75 * (build.fat + build.wall) + 18
    if kind == 0:
        return
    curve = g.y - top - 12 + (g.x / 34) ** 2 * (0.9 if kind < 3 else 0.15)
    shells = ((0.0, 1.0, -150.0), (22.0, 1.6, 50.0)) if kind != 3 else ((0.0, 0.9, -300.0), (30.0, 3.0, 250.0))
    for below, half, value in shells:
        line = np.maximum(np.abs(curve - below) - half, np.abs(g.x) - (230 if below == 0 else 130))
        hu += cover(line, g.pixel) * (np.float32(value) - hu)


def lungs(build: Build, c: Chest, g: Grid, rng: np.random.Generator) -> tuple[Lungs, np.ndarray]:
    """Returns the lungs, and the signed distance to all that pushes them aside, float32 [H, W]."""
    x, y = g.x, g.y
    middle, a, _ = c.half
    edge = wall(c, g)
    level, d = c.level, c.depth
    core = ellipse(x - 2, y + 0.02 * d, float(np.interp(level, (0.1, 0.35, 0.5, 1), (27, 25, 29, 27))), 0.66 * d)
    front = ellipse(x - 3, y + 0.78 * d, float(np.interp(level, (0.1, 0.35, 0.6), (20, 7, 5))), 0.42 * d)
    spine = np.minimum(
        ellipse(x, y - c.spine, 24, 21),
        np.maximum(np.abs(x) - 25 + 0.35 * np.maximum(c.spine + 24 - y, 0), c.spine - y),
    )
    middle_parts = [front, spine, np.abs(x - 3 + 0.05 * y) - 1.4]
    grown = build.heart * float(np.interp(level, (0.42, 0.52, 0.66, 0.82, 0.95, 1), (0, 0.72, 1, 1, 0.8, 0.6)))
    if grown > 0.05:
        at = 16 * grown, -0.22 * d
        middle_parts.append(ellipse(x - at[0], y - at[1], 56 * grown, 46 * grown, 0.6))
    arch = float(np.interp(level, (0.24, 0.31, 0.37, 0.43), (0, 1, 1, 0)))
    if arch:
        middle_parts.append(ellipse(x - 14, y - 0.02 * d, 15 + 4 * arch, 38, -0.35))
    if level > 0.36:
        middle_parts.append(ellipse(x - 25, y - c.spine + 17, 14, 14))  # descending aorta
    for side in (-1, 1):
        bulge = float(np.interp(abs(level - HILUM), (0, 0.14), (12, 0)))
        if bulge > 2:
            middle_parts.append(ellipse(x - side * (33 + rng.uniform(-2, 3)), y - 4, bulge, bulge + 6))
    pushed = core
    for part in middle_parts:
        k = np.float32(9)
        pushed = np.minimum(pushed, part) - np.maximum(k - np.abs(pushed - part), 0) ** 2 / (4 * k)
    inside = both(edge, -pushed, 5.0)
    for half, start in ((-1, 0.8), (1, 0.87)):
        dome = float(np.sqrt(max(level - start - rng.uniform(-0.03, 0.03), 0) / 0.22))
        if dome > 0.1:
            organ = ellipse(x - half * (middle - 9 + 6 * dome), y + 0.12 * d, dome * a, dome * 0.9 * d)
            pushed = np.minimum(pushed, organ)
            inside = both(inside, -organ, 5.0)
    sides = np.where(x < 3 - 0.05 * y, np.float32(-1), np.float32(1))
    place = float(np.interp(level, (0.15, 0.5, 0.95), (0.7, 0.18, -0.8))) * d + build.fissure
    # The fissure bows forward in the middle and climbs towards the wall.
    behind = y - place + 0.22 * (np.abs(x) - middle) - 6 * np.sin(x / 23 + 0.7 * sides)
    return Lungs(cover(inside, g.pixel), -edge, sides, behind.astype(np.float32)), pushed


def draw_mediastinum(
    hu: np.ndarray, build: Build, c: Chest, g: Grid, pushed: np.ndarray, rng: np.random.Generator
) -> None:
    """Paints fat, heart, great vessels, gullet, liver and stomach into `hu`, in place."""
    cavity = np.minimum(wall(c, g), ellipse(g.x, g.y, 0.6 * c.width, 0.9 * c.depth))
    hu += cover(np.maximum(cavity, pushed - 4), g.pixel) * (FAT + 15 + 10 * noise(rng, g, 7) - hu)
    blood, level, d = BLOOD + build.contrast, c.level, c.depth
    grown = build.heart * float(np.interp(level, (0.42, 0.52, 0.66, 0.82, 0.95, 1), (0, 0.72, 1, 1, 0.8, 0.6)))
    if grown > 0.05:
        at = 16 * grown, -0.22 * d
        paint(hu, g, at, 52 * grown, 42 * grown, 0.6, 55, 4)
        for dx, dy, size in ((-26, -6, 21.0), (14, -16, 20), (24, 12, 22), (-8, 20, 19)):
            paint(
                hu,
                g,
                (at[0] + dx * grown, at[1] + dy * grown),
                size * grown,
                0.8 * size * grown,
                0.5,
                blood,
                6,
            )
    if level < 0.33:
        for dx, dy, size in (
            (-17, -14, 7),
            (-9, -25, 6),
            (10, -20, 6),
            (14, -4, 5.5),
            (-19, -30, 7),
            (17, -33, 6),
        ):
            paint(hu, g, (dx + 2, dy + 5), size, size * 1.1, 0, blood)
    if 0.25 < level < 0.42:
        paint(hu, g, (14, 0.02 * d), 13, 34, -0.35, blood)
        paint(hu, g, (-18, -0.18 * d), 8, 10, 0, blood)  # superior vena cava
    elif level >= 0.42 and grown < 0.85:
        paint(hu, g, (-10, -0.3 * d), 15, 16, 0, blood)  # ascending aorta
        paint(hu, g, (-25, -0.16 * d), 8, 10, 0, blood)
        paint(hu, g, (16, -0.3 * d), 14, 17, 0.5, blood)  # lung artery
        if 0.46 < level < 0.58:
            paint(hu, g, (-5, -0.06 * d), 30, 8, 0.25, blood)
    if level > 0.36:
        paint(hu, g, (25, c.spine - 17), 12, 12, 0, blood)
    paint(hu, g, (6, c.spine - 27), 8, 5, 0.2, 35)  # gullet
    for half, start, tissue in ((-1, 0.8, 60 + 0.4 * build.contrast), (1, 0.87, 45 + 0.3 * build.contrast)):
        if level > start:
            organ = np.where(half * g.x > 8, np.maximum(cavity, pushed), np.float32(99))
            hu += cover(organ + 3, 5) * (np.float32(tissue) - hu)
    if level > 0.9:
        paint(hu, g, (0.5 * c.width, -0.35 * d), 17, 9, 0.2, -900)  # gas in the stomach


def draw_airways(hu: np.ndarray, c: Chest, g: Grid) -> None:
    """Paints the windpipe or the two main bronchi into `hu`, in place."""
    y = c.spine - 40 - 20 * c.level
    if c.level < 0.44:
        places, a, b = [(-3.0, y)], 8.5, 9.5
    elif c.level < 0.6:
        apart = 10 + 170 * (c.level - 0.44)
        places, a, b = [(-apart - 2, y + 4), (apart + 2, y + 6)], 8.2 - 14 * (c.level - 0.44), 6.2
    else:
        return
    for at in places:
        paint(hu, g, at, a + 1.6, b + 1.6, 0, 20)
        paint(hu, g, at, a, b, 0, -985)
