"""Measures the robust body and lung masks on phantoms, and draws them on real slices.

    python tests/benchmarks/lungs.py [--patients=150] [--first=3000] [--slices=24] [--snakes=4]
        [--sheet=OUT.png --shared=FOLDER] [--seed=17]

Prints a markdown table: Dice of `lung_mask` with the drawn lungs, per class and by where the lesions are (one slice
of each phantom patient, levels in turn, at the phantoms' own size), and slices of 512 x 512 per second of one core
for both masks and the CT-COV19 study's snake, in turns on the same slices. `--sheet` draws 60 real slices of
FOLDER/data/ct with their contours (lungs red, body blue), 15 of each name prefix, on OUT-1.png and OUT-2.png; slices
whose lungs were masked before (`nor_`) come on OUT-masked.png.
"""

import argparse
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage
from skimage import morphology

from lungjax.data.imaging import lung_masks, study_masks
from lungjax.datasets.phantom import slices

PREFIXES = ("mosmed_", "sarscov2_", "seg20_", "ucsd_")
MASKED = "nor_"
TILE, COLUMNS = 300, 6


def phantoms(finding: str, first: int, patients: int) -> list[tuple[np.ndarray, np.ndarray, str]]:
    """Returns one slice of each patient: image uint8 and lungs bool, [H, W], and where its lesions are."""
    out = []
    for seed in range(first, first + patients):
        patient = slices.new_patient(seed, finding)
        drawn = slices.draw_slice(patient, slices.levels(patient, 5)[seed % 5])
        out.append((slices.gray(drawn.hu, patient.window), drawn.lung, where(drawn)))
    return out


def where(drawn: slices.Phantom) -> str:
    """Says whether a slice has lesions, and whether one touches the chest wall over 8 pixels or more."""
    if not drawn.lesion.any():
        return "no lesion in the slice"
    hull = morphology.convex_hull_image(drawn.lung)
    outer = drawn.lung & ~ndimage.binary_erosion(drawn.lung) & ~ndimage.binary_erosion(hull, iterations=3)
    return "a lesion at the chest wall" if (outer & drawn.lesion).sum() >= 8 else "lesions inside the lungs alone"


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


def seconds(function: Callable[[np.ndarray], object], image: np.ndarray) -> float:
    """Returns the CPU seconds of one call; other processes on the machine do not count."""
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
    return [(name, 1 / statistics.median(taken), len(taken)) for name, taken in times.items() if taken]


def square(image: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((512, 512), Image.Resampling.BICUBIC))


def contours(path: Path) -> Image.Image:
    """Returns a slice with the outlines of its masks, a tile of the sheet."""
    image = np.asarray(Image.open(path).convert("L"))
    rgb = np.repeat(image[..., None], 3, 2)
    for mask, colour in [(lung_masks.body_mask(image), (0, 160, 255)), (lung_masks.lung_mask(image), (255, 0, 0))]:
        rgb[mask & ~ndimage.binary_erosion(mask)] = colour
    tile = Image.new("RGB", (TILE, TILE), (40, 40, 80))
    drawn = Image.fromarray(rgb)
    drawn.thumbnail((TILE, TILE - 14))
    tile.paste(drawn, (0, 14))
    ImageDraw.Draw(tile).text((2, 1), path.stem[-44:], fill=(255, 255, 0))
    return tile


def draw_sheet(paths: list[Path], out: Path) -> None:
    """Writes one sheet of tiles."""
    rows = -(-len(paths) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * TILE, rows * TILE), (40, 40, 80))
    for i, path in enumerate(paths):
        sheet.paste(contours(path), (i % COLUMNS * TILE, i // COLUMNS * TILE))
    sheet.save(out)
    print(f"{out}: {len(paths)} slices")


def main() -> None:
    """Prints the table, and draws the sheets if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patients", type=int, default=150)
    parser.add_argument("--first", type=int, default=3000, help="seed of the first phantom patient")
    parser.add_argument("--slices", type=int, default=24, help="slices timed")
    parser.add_argument("--snakes", type=int, default=4, help="of them also by the study's snake")
    parser.add_argument("--sheet", type=Path)
    parser.add_argument("--shared", type=Path)
    parser.add_argument("--seed", type=int, default=17, help="of the draw of real slices")
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

    if args.sheet:
        if not args.shared:
            parser.error("--sheet wants --shared, the folder that holds data/ct")
        files = sorted((args.shared / "data/ct").rglob("*.jpg"))
        rng = np.random.default_rng(args.seed)
        drawn = {
            prefix: list(rng.permutation([f for f in files if f.name.startswith(prefix)])[:15])
            for prefix in (*PREFIXES, MASKED)
        }
        counted = [path for prefix in PREFIXES for path in drawn[prefix]]
        for part, paths in [("1", counted[:30]), ("2", counted[30:]), ("masked", drawn[MASKED])]:
            draw_sheet(paths, args.sheet.with_name(f"{args.sheet.stem}-{part}.png"))


if __name__ == "__main__":
    if os.environ.get("OPENBLAS_NUM_THREADS") != "1":
        # numpy reads these when it is imported, so the program starts over with them.
        os.environ |= {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}
        os.execv(sys.executable, [sys.executable, *sys.argv])
    main()
