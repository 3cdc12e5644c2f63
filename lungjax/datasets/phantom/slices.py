"""Drawn axial chest CT slices with known lungs and lesions: data to try things on, no patient involved.

`draw_patient` gives Hounsfield units and true masks, `gray` the 8-bit image of a window. Everything follows
from the seed. What a scanner or a body looks like is drawn apart from the finding, so that window, size,
noise and brightness say nothing about it. These are drawings: nothing learned from them holds for patients.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import ndimage

from lungjax.datasets.phantom import anatomy, canvas, findings, vessels

CLASSES = findings.CLASSES
LEVELS = (
    0.24,
    0.9,
)  # lowest and highest level drawn: below the tips of the lungs, above their last crescents


@dataclass(frozen=True)
class Scanner:
    """A make of scanner and how its images are usually saved."""

    name: str
    sides: tuple[int, ...]  # pixels, widths and heights to choose from
    windows: tuple[tuple[float, float], ...]  # HU that become black and white
    noise: tuple[float, float]  # standard deviation in HU, lowest and highest
    kernel: tuple[float, float]  # blur in mm, sharpest and softest
    thickness: tuple[float, float]  # of a slice in mm
    view: str  # "round": black corners; "square": the whole body; "tight": cut to the chest
    table: int  # 0 none in view, else one of 3 shapes


LUNG, NARROW, WIDE, FULL = (-1350.0, 150.0), (-1100.0, 100.0), (-1300.0, 400.0), (-1200.0, 800.0)
SCANNERS = (
    Scanner("helix4", (176, 184, 192), (LUNG, WIDE), (30, 60), (0.9, 1.3), (3, 5), "square", 1),
    Scanner("spiral16", (192, 200), (LUNG, NARROW), (20, 50), (0.5, 1.0), (1.5, 3), "tight", 0),
    Scanner("volume64", (208, 216), (WIDE, FULL), (15, 40), (0.6, 1.1), (1, 3), "round", 2),
    Scanner("dual128", (200, 224), (LUNG, WIDE, FULL), (10, 35), (0.4, 0.9), (1, 2), "round", 3),
    Scanner("mobile32", (160, 176), (LUNG, NARROW, WIDE), (30, 70), (0.8, 1.4), (2, 5), "tight", 1),
)


@dataclass(frozen=True)
class Patient:
    """All that is decided once for a patient."""

    seed: int
    finding: str  # one of CLASSES
    scanner: Scanner
    size: tuple[int, int]  # height, width in pixels
    pixel: float  # mm
    shift: tuple[float, float]  # mm the body lies right of and below the image's middle
    turn: float  # radians
    window: tuple[float, float]  # HU
    noise: float  # HU
    kernel: float  # mm
    thickness: float  # mm
    build: anatomy.Build
    lung_hu: float  # of clear lung in the middle
    gravity: float  # HU from front to back
    foci: tuple[findings.Focus, ...]
    extras: findings.Extras


@dataclass(frozen=True)
class Phantom:
    """One drawn slice. Arrays are [H, W]."""

    hu: np.ndarray  # float32, Hounsfield units with noise, -2000 outside a round field of view
    lung: np.ndarray  # bool, all of both lungs, lesions and vessels included
    lesion: np.ndarray  # bool, where the finding is; never set for Normal
    box: tuple[int, int, int, int]  # of the body: xmin, ymin, xmax, ymax in pixels, max exclusive
    level: float  # 0 top .. 1 base of the lungs


def new_patient(seed: int, finding: str, scanner: Scanner | None = None) -> Patient:
    """Returns the patient of a seed; everything but the lesions is the same for every `finding`.

    Raises ValueError for a finding that is not in `CLASSES`.
    """
    rng = np.random.default_rng([seed, 1])
    made = scanner or SCANNERS[rng.integers(len(SCANNERS))]
    build = anatomy.Build(
        width=rng.uniform(116, 142),
        depth=rng.uniform(80, 102),
        fat=rng.uniform(5, 32),
        wall=rng.uniform(15, 26),
        breast=rng.choice((0.0, rng.uniform(8, 34))),
        heart=rng.uniform(0.85, 1.12),
        contrast=rng.choice((0.0, rng.uniform(60, 220)), p=(0.7, 0.3)),
        arms=bool(rng.random() < 0.15),
        fissure=rng.uniform(-12, 12),
        seed=seed,
    )
    body = (
        2 * (build.width + build.fat + build.wall),
        2 * (build.depth + 0.75 * (build.fat + build.wall) + 10),
    )
    if made.view == "tight":
        zoom = rng.uniform(0.84, 1.04)
        width = int(rng.choice(made.sides))
        pixel = zoom * body[0] / width
        size = int(np.clip(zoom * body[1] / pixel * rng.uniform(0.98, 1.08), 0.6 * width, width)), width
        shift = rng.uniform(-5, 5), rng.uniform(-5, 5)
    else:
        side = int(rng.choice(made.sides))
        pixel = rng.uniform(1.03, 1.25) * body[0] / side
        size = side, side
        shift = rng.uniform(-12, 12), rng.uniform(-25, 12)
    return Patient(
        seed=seed,
        finding=finding,
        scanner=made,
        size=size,
        pixel=pixel,
        shift=shift,
        turn=rng.normal(0, 0.06),
        window=made.windows[rng.integers(len(made.windows))],
        noise=rng.uniform(*made.noise),
        kernel=rng.uniform(*made.kernel),
        thickness=rng.uniform(*made.thickness),
        build=build,
        lung_hu=rng.uniform(-890, -770),
        gravity=rng.uniform(20, 110),
        foci=findings.new_foci(finding, np.random.default_rng([seed, 2])),
        extras=findings.new_extras(np.random.default_rng([seed, 3])),
    )


def levels(patient: Patient, count: int) -> list[float]:
    """Returns the levels of `count` slices of a patient, top first, about evenly apart."""
    rng = np.random.default_rng([patient.seed, 4])
    apart = (LEVELS[1] - LEVELS[0]) / count
    return [LEVELS[0] + apart * (i + rng.uniform(0.1, 0.9)) for i in range(count)]


def draw_patient(seed: int, finding: str, slices: int) -> list[Phantom]:
    """Draws `slices` slices of one patient, from the top of the lungs to their base.

    Raises ValueError for a finding that is not in `CLASSES`.
    """
    patient = new_patient(seed, finding)
    return [draw_slice(patient, level) for level in levels(patient, slices)]


def draw_slice(patient: Patient, level: float) -> Phantom:
    """Draws one slice of a patient at a level, 0..1."""
    shape, build = np.random.default_rng(_key(patient, level, 5)), patient.build
    g = _grid(patient, level)
    c = anatomy.chest(build, level)
    hu = np.full(patient.size, anatomy.AIR, np.float32)
    anatomy.draw_table(hu, c, build, g, patient.scanner.table)
    anatomy.draw_wall(hu, build, c, g, shape)
    lung, pushed = anatomy.lungs(build, c, g, shape)
    anatomy.draw_mediastinum(hu, build, c, g, pushed, shape)
    anatomy.draw_bones(hu, build, c, g, shape)
    anatomy.draw_airways(hu, c, g)
    inside, lesion = _lung_hu(patient, level, c, g, lung)
    hu += lung.cover * (inside - hu)
    hu = _scan(hu, patient, g, level)
    is_lung = lung.cover > 0.5
    return Phantom(hu, is_lung, is_lung & (lesion > findings.VISIBLE), body_box(patient, level), level)


def _key(patient: Patient, level: float, part: int) -> list[int]:
    return [patient.seed, part, round(level * 1e6)]


def _grid(patient: Patient, level: float) -> canvas.Grid:
    bend = np.random.default_rng(_key(patient, level, 6))
    return canvas.grid(patient.size, patient.pixel, patient.shift, patient.turn, bend)


def body_box(patient: Patient, level: float) -> tuple[int, int, int, int]:
    """Returns the box around the trunk (arms not counted) as in `Phantom.box`, without drawing the slice."""
    g = _grid(patient, level)
    coarse = replace(g, x=g.x[::2, ::2], y=g.y[::2, ::2])
    inside = anatomy.body(patient.build, anatomy.chest(patient.build, level), coarse) < 0
    columns, rows = np.flatnonzero(inside.any(0)) * 2, np.flatnonzero(inside.any(1)) * 2
    height, width = patient.size
    return int(columns[0]), int(rows[0]), min(int(columns[-1]) + 2, width), min(int(rows[-1]) + 2, height)


def _lung_hu(
    patient: Patient, level: float, c: anatomy.Chest, g: canvas.Grid, lung: anatomy.Lungs
) -> tuple[np.ndarray, np.ndarray]:
    """Returns what fills the lungs in HU, and the lesion field, float32 [H, W]."""
    rng, extras = np.random.default_rng(_key(patient, level, 7)), patient.extras
    tissue = np.float32(35 + 0.25 * patient.build.contrast)
    air = patient.lung_hu + patient.gravity * np.clip(g.y / (2 * c.depth), -0.5, 0.5)
    hu = air + findings.background(extras, c, g, lung, rng) * (tissue - air)
    line = np.exp(-((lung.fissure / 1.1) ** 2)) * np.float32(rng.uniform(0.05, 0.25))
    hu += line * (tissue - hu)
    vessel, wall, lumen = vessels.cut(vessels.grow(patient.build), g, level, patient.thickness)
    if extras.fluid:
        depth = extras.fluid * rng.uniform(0.3, 1.1)
        layer = canvas.cover(lung.depth - depth * np.clip((g.y - 0.3 * c.depth) / (0.4 * c.depth), 0, 1), 2)
        hu += layer * (lung.side == (1 if patient.seed % 2 else -1)) * (np.float32(8) - hu)
    field = findings.lesions(patient.finding, patient.foci, c, g, lung, np.random.default_rng(_key(patient, level, 8)))
    hu += field * (tissue - hu)
    hu += 0.6 * wall * np.maximum(-100 - hu, 0)
    hu += vessel * np.maximum(tissue + 0.7 * patient.build.contrast - hu, 0)
    hu += lumen * np.minimum(-940 - hu, 0)
    return hu.astype(np.float32), field


def _scan(hu: np.ndarray, patient: Patient, g: canvas.Grid, level: float) -> np.ndarray:
    """Returns the slice as the scanner shows it: motion, blur, noise, round field of view."""
    rng = np.random.default_rng(_key(patient, level, 9))
    if patient.extras.moved:
        shift = rng.normal(0, patient.extras.moved / g.pixel, 2)
        hu = 0.6 * hu + 0.4 * ndimage.shift(hu, shift, order=1, mode="nearest")
    hu = ndimage.gaussian_filter(hu, patient.kernel / g.pixel, truncate=3)
    # Sharper kernels leave finer noise; the reconstruction takes its lowest frequencies away.
    grain = rng.standard_normal(hu.shape, dtype=np.float32)
    grain = ndimage.gaussian_filter(grain, 0.75 * patient.kernel / g.pixel, truncate=3)
    grain -= 0.5 * ndimage.uniform_filter(grain, 5)
    hu = hu + grain * np.float32(patient.noise / grain.std())
    if patient.scanner.view == "round":
        height, width = hu.shape
        row, column = np.ogrid[:height, :width]
        r = np.hypot(row - (height - 1) / 2, column - (width - 1) / 2)
        hu = np.where(r > 0.5 * max(height, width), np.float32(-2000), hu)
    return hu.astype(np.float32)


def gray(hu: np.ndarray, window: Sequence[float]) -> np.ndarray:
    """Returns Hounsfield units as uint8, `window` = (low, high) giving the values of black and white."""
    low, high = window
    return np.clip(np.rint((hu - low) * (255.0 / (high - low))), 0, 255).astype(np.uint8)
