"""Measures the Dice coefficient of `lung_mask` on phantoms, and the speed of all masks.

OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1 python -m tests.benchmarks.lungs [--patients=150]
"""

import statistics
from collections import defaultdict
from functools import partial

import numpy as np
from PIL import Image

from lungjax.data.imaging import lung_masks, study_masks
from lungjax.datasets.phantom import slices
from tests.benchmarks import harness

FIRST_SEED = 3000
TIMED, SNAKES = 24, 4  # timed slices; the first ones also with the snake of the study


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


def speeds(images: list[np.ndarray]) -> list[tuple[str, float, int]]:
    """Returns name, median of slices per processor second, and number of slices, for each kind of mask."""
    times = defaultdict(list)
    lung_masks.lung_mask(images[0])
    for i, image in enumerate(images):
        calls = {"body_mask": partial(lung_masks.body_mask, image), "lung_mask": partial(lung_masks.lung_mask, image)}
        if i < SNAKES:
            bare = np.where(lung_masks.body_mask(image), image, 0).astype(np.uint8)
            calls["the study's snake"] = partial(study_masks.snake_mask, bare)
        for name, call in calls.items():
            times[name].append(harness.timed(call)[1])
    return [(name, 1 / statistics.median(values), len(values)) for name, values in times.items()]


def main() -> None:
    patients = harness.parse(__doc__, patients=150).patients
    print(harness.header("lung_mask, Dice", "mean", "5th percentile", "slices"))
    timed = []
    scores = defaultdict(list)
    for finding in slices.CLASSES:
        for number in range(patients):
            image, drawn = harness.phantom(finding, FIRST_SEED + number)
            scores[finding].append(dice(lung_masks.lung_mask(image), drawn.lung))
            if number < TIMED // 3:
                timed.append(np.asarray(Image.fromarray(image).resize((512, 512), Image.Resampling.BICUBIC)))
    for name, values in scores.items():
        print(harness.row(name, f"{np.mean(values):.4f}", f"{np.percentile(values, 5):.4f}", len(values)), flush=True)
    rates = speeds(timed)
    rows = [(name, f"{rate:.3g}", f"{rate / rates[-1][1]:.3g}", count) for name, rate, count in rates]
    print("\n" + harness.table(("512 x 512, one core", "slices/s", "against the snake", "slices"), rows))


if __name__ == "__main__":
    main()
