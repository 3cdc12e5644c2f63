"""Measures the robust body and lung masks on phantoms.

    python tests/benchmarks/lungs.py [--patients=150] [--first=3000] [--slices=24] [--snakes=4]

Prints markdown tables: Dice of `lung_mask` against the drawn lungs, per class and by location of the lesions (one slice
of each phantom patient, at alternating levels), and slices of 512 x 512 per second on one core for both masks and the
CT-COV19 study's snake, in turns on the same slices. `lungjax.explore` draws the masks on the slices of a data set.
"""

import argparse
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable

import numpy as np
from PIL import Image
from scipy import ndimage
from skimage import morphology

from lungjax.data.imaging import lung_masks, study_masks
from lungjax.datasets.phantom import slices


def phantoms(finding: str, first: int, patients: int) -> list[tuple[np.ndarray, np.ndarray, str]]:
    """Returns one slice per patient: image uint8 and lungs bool, [H, W], and the location of its lesions."""
    out = []
    for seed in range(first, first + patients):
        patient = slices.new_patient(seed, finding)
        drawn = slices.draw_slice(patient, slices.levels(patient, 5)[seed % 5])
        out.append((slices.gray(drawn.hu, patient.window), drawn.lung, location(drawn)))
    return out


def location(drawn: slices.Phantom) -> str:
    """Returns whether a slice has lesions, and whether one touches the chest wall along at least 8 pixels."""
    if not drawn.lesion.any():
        return "no lesion in the slice"
    hull = morphology.convex_hull_image(drawn.lung)
    outer = drawn.lung & ~ndimage.binary_erosion(drawn.lung) & ~ndimage.binary_erosion(hull, iterations=3)
    return "a lesion at the chest wall" if (outer & drawn.lesion).sum() >= 8 else "lesions inside the lungs alone"


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


def seconds(function: Callable[[np.ndarray], object], image: np.ndarray) -> float:
    """Returns the CPU seconds of one call, without those of other processes."""
    start = time.process_time()
    function(image)
    return time.process_time() - start


def speeds(images: list[np.ndarray], snakes: int) -> list[tuple[str, float, int]]:
    """Returns name, slices per second (median of the slices) and slices measured."""
    times: dict[str, list[float]] = {"body_mask": [], "lung_mask": [], "the study's snake": []}
    lung_masks.lung_mask(images[0])
    for i, image in enumerate(images):
        times["body_mask"].append(seconds(lung_masks.body_mask, image))
        times["lung_mask"].append(seconds(lung_masks.lung_mask, image))
        if i < snakes:
            bare = np.where(lung_masks.body_mask(image), image, 0).astype(np.uint8)
            times["the study's snake"].append(seconds(study_masks.snake_mask, bare))
    return [(name, 1 / statistics.median(values), len(values)) for name, values in times.items() if values]


def square(image: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((512, 512), Image.Resampling.BICUBIC))


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patients", type=int, default=150)
    parser.add_argument("--first", type=int, default=3000, help="seed of the first phantom patient")
    parser.add_argument("--slices", type=int, default=24, help="slices to time")
    parser.add_argument("--snakes", type=int, default=4, help="of these also with the study's snake")
    args = parser.parse_args()

    print("| lung_mask, Dice | mean | 5th percentile | slices |\n| --- | --- | --- | --- |")
    timed = []
    scores = defaultdict(list)
    for finding in slices.CLASSES:
        for number, (image, lung, place) in enumerate(phantoms(finding, args.first, args.patients)):
            score = dice(lung_masks.lung_mask(image), lung)
            scores[finding].append(score)
            scores[f"of all: {place}"].append(score)
            timed += [square(image)] if number < -(-args.slices // 3) else []
    for name, values in scores.items():
        print(f"| {name} | {np.mean(values):.4f} | {np.percentile(values, 5):.4f} | {len(values)} |", flush=True)

    print("\n| 512 x 512, one core | slices/s | against the snake | slices |\n| --- | --- | --- | --- |")
    rates = speeds(timed[: args.slices], args.snakes)
    slowest = rates[-1][1]
    for name, rate, count in rates:
        print(f"| {name} | {rate:.3g} | {rate / slowest:.3g} | {count} |")


if __name__ == "__main__":
    if os.environ.get("OPENBLAS_NUM_THREADS") != "1":
        # numpy reads these when it is imported, so the program restarts with them.
        os.environ |= {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}
        os.execv(sys.executable, [sys.executable, *sys.argv])
    main()
