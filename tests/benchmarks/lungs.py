"""Measures the Dice coefficient of `lung_mask` on phantoms, and the speed of all mask functions.

OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1 python -m tests.benchmarks.lungs [--patients=150]
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from lungjax.data.imaging import lung_masks, study_masks
from lungjax.datasets.phantom import slices
from tests.benchmarks import harness

FIRST_SEED = 3000
TIMED, SNAKES = 24, 4  # timed slices, and the number of them for the study's slow snake


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


def rate(mask: Callable[[np.ndarray], Any], images: list[np.ndarray]) -> float:
    """Returns the number of masks per CPU second, after an untimed warm-up."""
    mask(images[0])
    return len(images) / harness.timed(lambda: [mask(image) for image in images])[1]


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
    bare = [np.where(lung_masks.body_mask(image), image, 0).astype(np.uint8) for image in timed[:SNAKES]]
    rates = {"body_mask": rate(lung_masks.body_mask, timed), "lung_mask": rate(lung_masks.lung_mask, timed)}
    rates["the study's snake"] = snake = rate(study_masks.snake_mask, bare)
    rows = [(name, f"{own:.3g}", f"{own / snake:.3g}") for name, own in rates.items()]
    print("\n" + harness.table(("512 x 512, one core", "slices/s", "against the snake"), rows))


if __name__ == "__main__":
    main()
