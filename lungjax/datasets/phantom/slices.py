"""Synthetic axial chest CT slices with known lungs and lesions, for demonstrations and tests; no patient data.

`draw_slice` returns Hounsfield units and true masks; `gray` returns the 8-bit image of a window. The seed determines
everything. Scanner and body are independent of the finding, so window, size, noise and brightness are uninformative.
Results on these images do not transfer to patients.
"""

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image
from scipy import ndimage

from lungjax.data.imaging import images
from lungjax.datasets.phantom import anatomy, canvas, findings, vessels

CLASSES = findings.CLASSES
LEVELS = (0.24, 0.9)  # lowest and highest level: below the apices of the lungs, above their last crescents
OUTSIDE = -2000.0  # HU outside a round field of view


@dataclass(frozen=True)
class Scanner:
    """A scanner model and the usual format of its images."""

    name: str
    sides: tuple[int, ...]  # widths and heights in pixels
    windows: tuple[tuple[float, float], ...]  # HU of black and white
    noise: tuple[float, float]  # range of the standard deviation in HU
    kernel: tuple[float, float]  # range of the blur in mm
    thickness: tuple[float, float]  # range of the slice thickness in mm
    view: str  # "round": black corners; "square": the complete body; "tight": cut to the chest
    table: bool  # whether the patient table is in view


LUNG, NARROW, WIDE, FULL = (-1350.0, 150.0), (-1100.0, 100.0), (-1300.0, 400.0), (-1200.0, 800.0)
SCANNERS = (
    Scanner("helix4", (176, 184, 192), (LUNG, WIDE), (30, 60), (0.9, 1.3), (3, 5), "square", True),
    Scanner("spiral16", (192, 200), (LUNG, NARROW), (20, 50), (0.5, 1.0), (1.5, 3), "tight", False),
    Scanner("volume64", (208, 216), (WIDE, FULL), (15, 40), (0.6, 1.1), (1, 3), "round", True),
    Scanner("dual128", (200, 224), (LUNG, WIDE, FULL), (10, 35), (0.4, 0.9), (1, 2), "round", True),
    Scanner("mobile32", (160, 176), (LUNG, NARROW, WIDE), (30, 70), (0.8, 1.4), (2, 5), "tight", True),
)


@dataclass(frozen=True)
class Patient:
    """Properties shared by all slices of a patient."""

    seed: int
    finding: str  # one of CLASSES
    scanner: Scanner
    size: tuple[int, int]  # height, width in pixels
    pixel: float  # mm
    shift: tuple[float, float]  # mm from the center of the image to the center of the chest, right and down
    rotation: float  # radians
    window: tuple[float, float]  # HU
    noise: float  # HU
    kernel: float  # mm
    thickness: float  # mm
    build: anatomy.Build
    lung_hu: float  # of clear lung, mean
    gravity: float  # HU from front to back
    lesions: tuple[findings.Lesion, ...]


@dataclass(frozen=True)
class Phantom:
    """One synthetic slice. Arrays are [H, W]."""

    hu: np.ndarray  # float32, Hounsfield units with noise, OUTSIDE the field of view
    lung: np.ndarray  # bool, both lungs with their lesions and vessels
    lesion: np.ndarray  # bool, all false for Normal
    box: tuple[int, int, int, int]  # of the body: xmin, ymin, xmax, ymax in pixels, max exclusive


def new_patient(seed: int, finding: str, scanner: Scanner | None = None) -> Patient:
    """Returns the patient of a seed; only the lesions depend on `finding`. Raises ValueError for an unknown finding."""
    rng = np.random.default_rng([seed, 1])
    scanner = scanner or SCANNERS[rng.integers(len(SCANNERS))]
    build = anatomy.Build(
        width=rng.uniform(116, 142),
        depth=rng.uniform(80, 102),
        fat=rng.uniform(5, 32),
        wall=rng.uniform(15, 26),
        breast=rng.uniform(8, 34) if rng.random() < 0.5 else 0.0,
        heart=rng.uniform(0.85, 1.12),
        contrast=rng.uniform(60, 220) if rng.random() < 0.3 else 0.0,
        fissure=rng.uniform(-12, 12),
        seed=seed,
    )
    body = 2 * (build.width + build.fat + build.wall), 2 * (build.depth + 0.75 * (build.fat + build.wall) + 10)
    side = int(rng.choice(scanner.sides))
    if scanner.view == "tight":
        zoom = rng.uniform(0.84, 1.04)
        height = int(side * np.clip(body[1] / body[0] * rng.uniform(0.98, 1.08), 0.6, 1))
        shift = rng.uniform(-5, 5), rng.uniform(-5, 5)
    else:
        zoom, height = rng.uniform(1.03, 1.25), side
        shift = rng.uniform(-12, 12), rng.uniform(-25, 12)
    return Patient(
        seed=seed,
        finding=finding,
        scanner=scanner,
        size=(height, side),
        pixel=zoom * body[0] / side,
        shift=shift,
        rotation=rng.normal(0, 0.06),
        window=scanner.windows[rng.integers(len(scanner.windows))],
        noise=rng.uniform(*scanner.noise),
        kernel=rng.uniform(*scanner.kernel),
        thickness=rng.uniform(*scanner.thickness),
        build=build,
        lung_hu=rng.uniform(-890, -770),
        gravity=rng.uniform(20, 110),
        lesions=findings.new_lesions(finding, np.random.default_rng([seed, 2])),
    )


def levels(patient: Patient, count: int) -> list[float]:
    """Returns the levels of `count` slices of a patient, top first, at about equal distances."""
    rng = np.random.default_rng([patient.seed, 4])
    spacing = (LEVELS[1] - LEVELS[0]) / count
    return [LEVELS[0] + spacing * (i + rng.uniform(0.1, 0.9)) for i in range(count)]


def draw_slice(patient: Patient, level: float) -> Phantom:
    """Draws one slice of a patient at a level, 0 to 1."""
    seeds = ([patient.seed, part, round(level * 1e6)] for part in range(5, 9))
    shape, content, lesions, scan = map(np.random.default_rng, seeds)
    c, g = _chest(patient, level)
    lung = anatomy.lungs(c, g, shape)
    kinds = ([lesion for lesion in patient.lesions if lesion.lobar == lobar] for lobar in (True, False))
    field = np.maximum(*(findings.draw_lesions(kind, c, g, lung, lesions) for kind in kinds))
    hu = np.full(patient.size, anatomy.AIR, np.float32)
    if patient.scanner.table:
        anatomy.draw_table(hu, c, g)
    anatomy.draw_wall(hu, c, g, shape)
    anatomy.draw_mediastinum(hu, c, g, lung, shape)
    anatomy.draw_bones(hu, c, g, shape)
    anatomy.draw_airways(hu, c, g)

    contrast = patient.build.contrast
    tissue, blood = 35 + 0.25 * contrast, 35 + 0.95 * contrast
    inside = patient.lung_hu + patient.gravity * np.clip(g.y / (2 * c.depth), -0.5, 0.5)
    incidental = findings.draw_incidental(c, g, lung, np.random.default_rng([patient.seed, 3]), content)
    fissure = content.uniform(0.05, 0.25) * np.exp(-((lung.fissure / 1.1) ** 2))
    for fraction in (incidental, fissure, field):
        canvas.blend(inside, fraction, tissue)
    vessel, wall, lumen = vessels.cut(vessels.grow(patient.build), g, level, patient.thickness)
    inside += 0.6 * wall * np.maximum(-100 - inside, 0)
    inside += vessel * np.maximum(blood - inside, 0)
    inside += lumen * np.minimum(-940 - inside, 0)
    canvas.blend(hu, lung.cover, inside)

    is_lung = lung.cover > 0.5
    lesion = is_lung & (field > findings.MIN_VISIBLE)
    return Phantom(_scan(hu, patient, scan), is_lung, lesion, body_box(patient, level))


def draw_radiograph(patient: Patient) -> np.ndarray:
    """Returns a blurred chest X-ray, uint8 [H, 192], bones white: the sum of 16 slices of 64 x 64 pixels."""
    side, levels = 64, np.linspace(0, 1.2, 16)
    scanner = replace(patient.scanner, view="square", table=False)
    pixel = patient.pixel * patient.size[1] / side
    small = replace(patient, scanner=scanner, size=(side, side), pixel=pixel)
    density = np.stack([np.maximum(draw_slice(small, level).hu - anatomy.AIR, 0).sum(axis=0) for level in levels])
    low, high = np.quantile(density, (0.02, 0.98))
    height = round(192 * levels[-1] * anatomy.LUNG_HEIGHT / (side * pixel))
    image = Image.fromarray(gray(density, (float(low), float(high))))
    return np.asarray(image.resize((192, height), Image.Resampling.BICUBIC))


def body_box(patient: Patient, level: float) -> tuple[int, int, int, int]:
    """Returns `Phantom.box` without drawing the slice."""
    return images.bounding_box(anatomy.skin(*_chest(patient, level)) < 0)


def _chest(patient: Patient, level: float) -> tuple[anatomy.Chest, canvas.Grid]:
    g = canvas.grid(patient.size, patient.pixel, patient.shift, patient.rotation)
    half_sizes = map(float, anatomy.half_sizes(patient.build, np.asarray(level)))
    return anatomy.Chest(patient.build, level, *half_sizes), g


def _scan(hu: np.ndarray, patient: Patient, rng: np.random.Generator) -> np.ndarray:
    """Returns the slice with the scanner's blur, noise and round field of view."""
    sigma = patient.kernel / patient.pixel
    hu = ndimage.gaussian_filter(hu, sigma, truncate=3)
    # Sharper kernels have finer noise; the reconstruction removes its lowest frequencies.
    grain = ndimage.gaussian_filter(rng.standard_normal(hu.shape, dtype=np.float32), 0.75 * sigma, truncate=3)
    grain -= 0.5 * ndimage.uniform_filter(grain, 5)
    hu += grain * (patient.noise / float(grain.std()))
    if patient.scanner.view == "round":
        height, width = hu.shape
        row, column = np.ogrid[:height, :width]
        hu[np.hypot(row - (height - 1) / 2, column - (width - 1) / 2) > 0.5 * max(height, width)] = OUTSIDE
    return hu


def gray(hu: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """Returns Hounsfield units as uint8; `window` = (low, high), the values of black and white."""
    return np.rint(images.show(hu, window)).astype(np.uint8)
