"""Findings of synthetic lungs: pneumonia, COVID-19, and incidental findings of all classes.

A lesion field is the fraction of air that tissue and fluid replace, float32 [H, W]: 0 is clear lung, 0.15 to 0.5 ground
glass, near 1 consolidation. The patterns follow the usual descriptions: lobar pneumonia is dense, mostly unilateral,
ends at a fissure and leaves bronchi filled with air; COVID-19 is patchy bilateral ground glass below the pleura, more
often at the back (Chung et al. 2020, doi.org/10.1148/radiol.2020200230).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from lungjax.datasets.phantom.anatomy import Chest, Lungs, at_wall
from lungjax.datasets.phantom.canvas import Grid, cover, ellipse, noise, window

CLASSES = ("Normal", "Pneumonia", "COVID-19")
SEVERITY = (0.4, 1.0)  # range over patients with a finding; a lower minimum makes the task harder
MIN_VISIBLE = 0.08  # minimum lesion field of a lesion pixel


@dataclass(frozen=True)
class Lesion:
    """One lesion of a patient; it varies slightly between slices."""

    lobar: bool  # the consolidation of pneumonia, not the ground glass of COVID-19
    side: int  # -1 or 1, as Lungs.side
    angle: float  # position at the chest wall: 0 lateral, pi/2 at the back
    size: float  # mm
    density: float  # maximum of the lesion field
    patchy: float  # 0 solid to 1 scattered


def new_lesions(finding: str, rng: np.random.Generator) -> tuple[Lesion, ...]:
    """Draws the lesions of a patient; () for Normal. Raises ValueError for a finding that is not in `CLASSES`."""
    if finding not in CLASSES:
        raise ValueError(f"unknown finding {finding!r}; expected {', '.join(CLASSES)}")
    severity, first = rng.uniform(*SEVERITY), int(rng.choice((-1, 1)))
    lobar = finding == "Pneumonia"
    count = 0 if finding == "Normal" else 1 + rng.binomial(1, 0.25) if lobar else 2 + rng.poisson(0.5 + 4 * severity)
    lesions = []
    for i in range(count):
        strength = severity * rng.uniform(0.7, 1.1)
        lesions.append(
            Lesion(
                lobar=lobar,
                side=(first, -first)[i] if i < 2 else int(rng.choice((-1, 1))),
                angle=rng.uniform(-0.9, 1.25) if lobar else float(np.clip(rng.normal(0.75, 0.6), -1.0, 1.3)),
                size=(1 - 0.4 * i) * (17 + 38 * strength) if lobar else 10 + 22 * strength,
                density=min(0.97, 0.38 + 0.62 * strength**0.7) if lobar else 0.16 + 0.34 * strength,
                patchy=rng.uniform(0.2, 1.0),
            )
        )
    return tuple(lesions)


def draw_lesions(lesions: Sequence[Lesion], c: Chest, g: Grid, lung: Lungs, rng: np.random.Generator) -> np.ndarray:
    """Returns the lesion field of one slice, float32 [H, W], 0 to 1; zero for Normal and outside the lungs."""
    field = np.zeros_like(g.x)
    for i, lesion in enumerate(lesions):
        if i > 1 and rng.random() < 0.25:  # the first two lesions reach every slice, the others may not
            continue
        angle = float(np.clip(lesion.angle + rng.normal(0, 0.12), -1.2, 1.35))
        size = lesion.size * rng.uniform(0.75, 1.05)
        lobar = lesion.lobar
        depth = size * rng.uniform(0.35, 0.7) if lobar else 0.3 * size + rng.uniform(0, 6)
        x, y, along = at_wall(c, lesion.side, angle, depth)
        near = window(g, (x, y), 1.7 * size + 14)
        part = replace(g, x=g.x[near], y=g.y[near])
        if not part.x.size:
            continue
        along += rng.normal(0, 0.2)
        q = ellipse(part.x - x, part.y - y, size, 0.75 * size + 5 if lobar else 0.62 * size, along)
        q += 0.2 * size * noise(rng, part, 0.5 * size) + 2.5 * noise(rng, part, 6)
        if lobar:
            fissure = lung.fissure[near]
            center = np.argmin((part.x - x) ** 2 + (part.y - y) ** 2)
            opacity = _consolidation(lesion, q, part, rng) * cover(-fissure * np.sign(fissure.flat[center]), 2.5)
        else:
            opacity = _ground_glass(lesion, q, size, part, rng)
        field[near] = np.maximum(field[near], opacity * (lung.side[near] == lesion.side) * lesion.density)
    return field * (lung.cover > 0)


def _consolidation(lesion: Lesion, q: np.ndarray, g: Grid, rng: np.random.Generator) -> np.ndarray:
    """Returns dense opacity with holes and a halo, for the signed distance `q` to the lesion."""
    holes = np.clip(0.75 + 0.45 * noise(rng, g, 6), 0.15, 1)
    solid = cover(q, 2 + 10 * lesion.patchy) * (1 - lesion.patchy * (1 - holes))
    return np.maximum(solid, 0.3 * cover(q - 7, 14) * holes)


def _ground_glass(lesion: Lesion, q: np.ndarray, size: float, g: Grid, rng: np.random.Generator) -> np.ndarray:
    """Returns a hazy opacity, sometimes with thickened septa, for the signed distance `q` to the lesion."""
    mottle = np.clip(0.8 + 0.35 * lesion.patchy * noise(rng, g, 7), 0.2, 1.2)
    if lesion.patchy > 0.65:  # crazy paving
        net = sum(np.exp(-((noise(rng, g, scale) / 0.22) ** 2)) for scale in (5, 6))
        mottle = 0.85 * mottle + 0.5 * np.minimum(net, 1)
    return np.clip(cover(q, 5 + 0.4 * size) * mottle, 0, 1)


def draw_incidental(
    c: Chest, g: Grid, lung: Lungs, patient: np.random.Generator, rng: np.random.Generator
) -> np.ndarray:
    """Returns the field of findings of any class, float32 [H, W], below 0 for trapped air; `rng` varies by slice."""
    middle, a, b = c.half
    field = patient.uniform(0.0, 0.04) * noise(rng, g, 22) + 0.012 * noise(rng, g, 5)
    haze, thickness, tilt = patient.uniform(0.06, 0.25), patient.uniform(5, 16), patient.uniform(-0.5, 0.5)
    if patient.random() < 0.5:
        # Gravity-dependent opacity along the back wall is as peripheral and posterior as COVID-19, but smooth.
        layer = np.clip(1 - (lung.depth + 2 * noise(rng, g, 25)) / (thickness * (1 + tilt * lung.side)), 0, 1)
        field += haze * rng.uniform(0.6, 1.2) * layer * np.clip((g.y - 0.35 * b) / (0.3 * b), 0, 1)
    # Nodules, and in some patients a nonspecific hazy spot: size in mm, density, width of the edge in mm.
    spots = [(rng.uniform(1.5, 4.5), rng.uniform(0.4, 1), 2.0) for _ in range(rng.poisson(patient.poisson(0.7)))]
    if patient.random() < 0.3:
        spots.append((rng.uniform(5, 15), patient.uniform(0.1, 0.3), 12.0))
    for size, density, edge in spots:
        angle, inward, side = rng.uniform(-1.3, 1.4), rng.uniform(0.1, 0.9), float(rng.choice((-1, 1)))
        x, y = side * (middle + inward * a * math.cos(angle)), inward * b * math.sin(angle)
        spot = ellipse(g.x - x, g.y - y, size, size * rng.uniform(0.6, 1), angle)
        field += density * cover(spot + 0.25 * edge * noise(rng, g, 9), edge)
    return np.clip(field, -0.12, 1)
