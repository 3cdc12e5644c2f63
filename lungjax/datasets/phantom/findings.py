"""What a drawn lung may show: pneumonia, COVID-19, and what any lung may have besides.

A lesion field is the part of the air that tissue and fluid replace, float32 [H, W]: 0 is clear lung, 0.15 to
0.5 ground glass, near 1 consolidation. The patterns follow the usual descriptions: lobar pneumonia is dense,
mostly one-sided, ends at a fissure and leaves bronchi air-filled; COVID-19 is patchy bilateral ground glass
below the pleura, more often at the back (Chung et al. 2020, doi.org/10.1148/radiol.2020200230).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from lungjax.datasets.phantom.anatomy import Chest, Lungs, at_wall
from lungjax.datasets.phantom.canvas import Grid, cover, ellipse, locate, noise, window

CLASSES = ("Normal", "Pneumonia", "COVID-19")
SEVERITY = (0.4, 1.0)  # of the patients with a finding, uniform; the lower the mildest, the harder the task
VISIBLE = 0.08  # lesion field from which a pixel counts as lesion


@dataclass(frozen=True)
class Focus:
    """One lesion of a patient; every slice shows it a little different."""

    side: int  # -1 or 1, as Lungs.side
    angle: float  # where it lies at the chest wall: 0 lateral, pi/2 at the back
    size: float  # mm
    density: float  # highest lesion field
    patchy: float  # 0 solid .. 1 scattered


@dataclass(frozen=True)
class Extras:
    """What says nothing about the class."""

    dependent: float  # thickness in mm of the denser lung at the back of someone lying down
    haze: float  # density of that layer
    mosaic: float  # strength of patchy air trapping
    bubbles: float  # part of emphysema, 0 none
    nodules: int
    scar: float  # length in mm, 0 none
    fluid: float  # mm of pleural fluid at the back, 0 none
    moved: float  # mm of heart and breathing motion
    blur: float  # density of a hazy spot that belongs to no disease


def new_foci(finding: str, rng: np.random.Generator) -> tuple[Focus, ...]:
    """Draws the lesions of a patient; () for Normal.

    Raises ValueError for a finding that is not in `CLASSES`.
    """
    if finding not in CLASSES:
        raise ValueError(f"finding {finding!r}: allowed are {', '.join(CLASSES)}")
    severity = rng.uniform(*SEVERITY)
    first = 1 if rng.random() < 0.5 else -1
    foci = []
    if finding == "Pneumonia":
        for i in range(1 + int(rng.random() < 0.25)):
            smaller = 1.0 if i == 0 else 0.6
            foci.append(
                Focus(
                    side=first if i == 0 else -first,
                    angle=rng.uniform(-0.9, 1.25),
                    size=smaller * (17 + 38 * severity * rng.uniform(0.7, 1.1)),
                    density=min(0.97, 0.38 + 0.62 * severity**0.7 * rng.uniform(0.7, 1.1)),
                    patchy=rng.uniform(0.1, 1.0),
                )
            )
    if finding == "COVID-19":
        for i in range(2 + rng.poisson(0.5 + 4 * severity)):
            foci.append(
                Focus(
                    side=(first, -first)[i] if i < 2 else int(rng.choice((-1, 1))),
                    angle=float(np.clip(rng.normal(0.75, 0.6), -1.0, 1.3)),
                    size=10 + 22 * severity * rng.uniform(0.5, 1.1),
                    density=0.16 + 0.34 * severity * rng.uniform(0.4, 1.1) + (0.2 if rng.random() < 0.15 else 0),
                    patchy=rng.uniform(0.3, 1.0),
                )
            )
    return tuple(foci)


def new_extras(rng: np.random.Generator) -> Extras:
    """Draws what a patient of any class may have besides."""

    def some(part: float, low: float, high: float) -> float:
        return float(rng.uniform(low, high)) if rng.random() < part else 0.0

    return Extras(
        dependent=some(0.5, 5, 16),
        haze=rng.uniform(0.06, 0.25),
        mosaic=rng.uniform(0.0, 0.04),
        bubbles=some(0.2, 0.1, 0.5),
        nodules=int(rng.poisson(0.7)),
        scar=some(0.3, 10, 35),
        fluid=some(0.12, 3, 10),
        moved=some(0.3, 1, 4),
        blur=some(0.3, 0.1, 0.3),
    )


def lesions(
    finding: str, foci: tuple[Focus, ...], c: Chest, g: Grid, lung: Lungs, rng: np.random.Generator
) -> np.ndarray:
    """Returns the lesion field of one slice, float32 [H, W], 0..1; zero for Normal and outside the lungs."""
    field = np.zeros_like(g.x)
    for i, focus in enumerate(foci):
        if i > 1 and rng.random() < 0.25:  # not every focus reaches every slice; the first two do
            continue
        angle = float(np.clip(focus.angle + rng.normal(0, 0.12), -1.2, 1.35))
        size = focus.size * rng.uniform(0.75, 1.05)
        if finding == "Pneumonia":
            deep = size * rng.uniform(0.35, 0.7)
            draw = _lobar
        else:
            deep = 0.3 * size + rng.uniform(0, 6)
            draw = _ground_glass
        *at, along = at_wall(c, focus.side, angle, deep)
        near = window(g, at, 1.7 * size + 14)
        part = replace(g, x=g.x[near], y=g.y[near])
        if part.x.size:
            turned = _turn_to(part, at, along + rng.normal(0, 0.2))
            behind = _this_side(lung.fissure, g, at, near)
            drawn = draw(focus, turned, size, part, behind, rng) * (lung.side[near] == focus.side)
            field[near] = np.maximum(field[near], drawn * np.float32(focus.density))
    return (field * (lung.cover > 0)).astype(np.float32)


def _this_side(fissure: np.ndarray, g: Grid, at: Sequence[float], near: tuple[slice, slice]) -> np.ndarray:
    """Returns mm from the fissure, positive in the lobe that holds the point `at`."""
    column, row = (int(v[0]) for v in locate(g, np.array([at])))
    height, width = fissure.shape
    here = fissure[min(max(row, 0), height - 1), min(max(column, 0), width - 1)]
    return fissure[near] if here > 0 else -fissure[near]


def _turn_to(g: Grid, at: Sequence[float], angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns coordinates float32 [H, W] in mm around a point, the first along `angle`."""
    c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    x, y = g.x - np.float32(at[0]), g.y - np.float32(at[1])
    return c * x + s * y, c * y - s * x


Place = tuple[np.ndarray, np.ndarray]  # coordinates around a lesion, the first along the pleura


def _lobar(
    focus: Focus, place: Place, size: float, g: Grid, behind: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Consolidation from the pleura inwards, ending at the fissure."""
    q = ellipse(*place, size, 0.75 * size + 5)
    q = q + 0.2 * size * noise(rng, g, 0.45 * size) + 2.5 * noise(rng, g, 6)
    soft = 2 + 10 * focus.patchy
    lobe = cover(-behind, 2.5)
    holes = np.clip(0.75 + 0.45 * noise(rng, g, 6), 0.15, 1)
    solid = cover(q, soft) * (1 - np.float32(focus.patchy) * (1 - holes))
    halo = 0.3 * np.clip(0.5 - (q - 7) / 14, 0, 1) * holes
    return np.maximum(solid, halo) * lobe


def _ground_glass(
    focus: Focus, place: Place, size: float, g: Grid, behind: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """One hazy patch that lies along the pleura on both sides of a fissure, some with thickened septa."""
    q = ellipse(*place, size, 0.62 * size)
    q = q + 0.22 * size * noise(rng, g, 0.5 * size) + 2 * noise(rng, g, 6)
    mottle = np.clip(0.8 + 0.35 * focus.patchy * noise(rng, g, 7), 0.2, 1.2)
    if focus.patchy > 0.65:  # crazy paving
        net = np.exp(-((noise(rng, g, 5) / 0.22) ** 2)) + np.exp(-((noise(rng, g, 6) / 0.22) ** 2))
        mottle = 0.85 * mottle + 0.5 * np.minimum(net, 1)
    return np.clip(cover(q, 5 + 0.4 * size) * mottle, 0, 1)


def background(extras: Extras, c: Chest, g: Grid, lung: Lungs, rng: np.random.Generator) -> np.ndarray:
    """Returns what the extras replace of the air, float32 [H, W]; below 0 where emphysema leaves more."""
    field = np.float32(extras.mosaic) * noise(rng, g, 22) + np.float32(0.012) * noise(rng, g, 5)
    middle, a, b = c.half
    if extras.dependent:
        # Gravity's layer follows the back wall, so it is as peripheral and posterior as COVID-19, but smooth.
        left, right = extras.dependent * rng.uniform(0.4, 1.2, 2)
        thick = np.where(lung.side > 0, np.float32(left), np.float32(right))
        layer = np.clip(1 - (lung.depth + 2 * noise(rng, g, 25)) / thick, 0, 1)
        back = np.clip((g.y - 0.35 * b) / (0.3 * b), 0, 1)
        field = field + np.float32(extras.haze * rng.uniform(0.6, 1.2)) * layer * back
    if extras.blur:
        angle, side = rng.uniform(-1.2, 1.4), rng.choice((-1, 1))
        inward = rng.uniform(0, 0.6)
        at = side * (middle + inward * a * np.cos(angle)), inward * b * np.sin(angle)
        spot = ellipse(g.x - np.float32(at[0]), g.y - np.float32(at[1]), rng.uniform(5, 15), rng.uniform(5, 12), angle)
        field = field + np.float32(extras.blur) * np.clip(0.4 - (spot + 3 * noise(rng, g, 9)) / 12, 0, 1)
    if extras.bubbles:
        holes = np.clip(noise(rng, g, 9) - np.float32(1.6 - 1.6 * extras.bubbles), 0, 1)
        field = field - np.float32(0.1) * holes
    if extras.scar and rng.random() < 0.7:
        angle, side = rng.uniform(-1.0, 1.3), rng.choice((-1, 1))
        at = side * (middle + 0.75 * a * np.cos(angle)), 0.75 * b * np.sin(angle)
        x, y = g.x - np.float32(at[0]), g.y - np.float32(at[1])
        band = ellipse(x, y + 0.02 * x * x, extras.scar, 1.3, rng.uniform(0, np.pi))
        field = field + np.float32(0.5) * cover(band, 3)
    for _ in range(rng.poisson(extras.nodules)):
        angle, inward, side = rng.uniform(-1.3, 1.4), rng.uniform(0.2, 0.95), rng.choice((-1, 1))
        at = side * (middle + inward * a * np.cos(angle)), inward * b * np.sin(angle)
        spot = ellipse(g.x - np.float32(at[0]), g.y - np.float32(at[1]), *rng.uniform(1.5, 4.5, 2))
        field = field + np.float32(rng.uniform(0.4, 1)) * cover(spot, 2)
    return np.clip(field, -0.12, 1.0).astype(np.float32)
