"""Asks the network in this file: python model.pyz scan.png more/*.png

Needs Python 3.11, jax, numpy and pillow; scikit-image too where the network was trained on cut-out bodies or lungs.
Prints CSV: each image's class probabilities (calibrated) and whether the operating point of each class is reached.
PNG, JPEG, TIFF, BMP, GIF (first frame), WebP and JPEG 2000; 16-bit images go through the window that the network was
trained with. For research use only. Not a medical device, not for diagnosis.
"""

import argparse
import csv
import glob
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lungjax.config import metadata
from lungjax.data import preprocess
from lungjax.data.imaging import images
from lungjax.evaluation import novelty
from lungjax.inference import artifacts, records

BATCH = 8


def main() -> int:
    """Reads the command line, predicts, and returns the exit code: 1 if an image could not be read."""
    parser = argparse.ArgumentParser(prog="python model.pyz", description=__doc__.split("\n\n")[1])
    parser.add_argument("paths", nargs="*", metavar="PATH", help="image files, folders of them, or patterns")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of CSV")
    parser.add_argument("--rule", default=records.RULE, help="operating point that decides (default %(default)s)")
    parser.add_argument("--maps", metavar="FOLDER", help="also writes Grad-CAM maps, 8-bit gray PNG")
    parser.add_argument("--batch", type=int, default=BATCH, help="images at once (default %(default)s)")
    parser.add_argument(
        "--prepared", action="store_true", help="the images are cut out already, as the training images were"
    )
    parser.add_argument("--about", action="store_true", help="prints what the model says of itself, as JSON")
    flags = parser.parse_args()
    try:
        return ask(flags)
    except (ValueError, OSError) as error:
        print(f"model.pyz: {error}", file=sys.stderr)
        return 2


def ask(flags: argparse.Namespace) -> int:
    """Does what the command line says; returns the exit code."""
    model = artifacts.read_pyz(Path(__file__).parent)  # the zip itself
    told = model.metadata
    if flags.about:
        print(json.dumps(told.public(), indent=1, ensure_ascii=False))
        return 0
    if not flags.paths:
        raise ValueError("give image files or folders; --help says more")
    if flags.batch < 1:
        raise ValueError(f"--batch={flags.batch}: at least 1")
    records.check_rule(told, flags.rule)
    if (told.stage or told.box == "body") and not flags.prepared:
        need_masks()  # before any image is read
    known = None if told.familiarity is None else novelty.from_dict(told.familiarity)
    files = gather(flags.paths)
    write = line_writer(told, flags.json)
    batch, failed = min(flags.batch, len(files)), 0
    used: set[str] = set()
    for at in range(0, len(files), batch):
        good = []
        for name in files[at : at + batch]:
            try:
                good.append((name, *picture(Path(name), told, known, flags.prepared)))
            except (ValueError, OSError) as error:
                failed += 1
                print(f"model.pyz: {name}: {error}", file=sys.stderr)
                write(records.failure(name, str(error)))
        if not good:
            continue
        pixels = np.stack([one for _, one, *_ in good])
        fill = np.zeros((batch - len(good), *pixels.shape[1:]), np.uint8)  # one size compiles once
        full = np.concatenate([pixels, fill])
        probabilities = model.predict(full)
        for (name, _, unlike, warnings), p in zip(good, probabilities, strict=False):
            write(records.record(told, name, p, unlike, warnings, flags.rule))
        if flags.maps:
            heat, _ = model.gradcam(full, np.full(batch, -1, np.int32))
            for (name, *_), one in zip(good, heat, strict=False):
                save_map(one, Path(flags.maps), Path(name).stem, used)
    print(metadata.NOTICE, file=sys.stderr)
    return 1 if failed else 0


def gather(paths: list[str]) -> list[str]:
    """Returns the files that the paths name: files as they are, images of folders in order, matches of patterns.

    Raises ValueError for a path that is not there, or a folder without images.
    """
    found: list[str] = []
    for path in paths:
        place = Path(path)
        if place.is_dir():
            inside = sorted(str(p) for p in place.rglob("*") if p.suffix.lower() in images.SUFFIXES and p.is_file())
        elif place.exists():
            inside = [path]
        else:  # shells that don't know patterns leave them to the program
            inside = sorted(glob.glob(path, recursive=True))
        if not inside:
            what = f"no images in it ({', '.join(images.SUFFIXES)})" if place.is_dir() else "no such file"
            raise ValueError(f"{path}: {what}")
        found += inside
    return found


def need_masks() -> None:
    """Raises ValueError where scikit-image, which finds bodies and lungs, is missing."""
    try:
        from lungjax.data.imaging import lung_masks  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"this network was trained on cut-out bodies or lungs, and finding them takes the package {error.name}: "
            "pip install scikit-image, or give images that are cut out already, with --prepared"
        ) from None


def picture(path: Path, told: Any, known: Any, prepared: bool) -> tuple[np.ndarray, float | None, list[str]]:
    """Returns an image file as the network's input uint8 [H, W, C], how unlike the training images it is, and warnings.

    The steps are those of `lungjax.inference.predictor.Predictor.picture`. Raises ValueError if the file can't be read.
    """
    pixels, stored, warnings = preprocess.picture(images.read(path.read_bytes())[0], told, None, prepared)
    unlike = None if known is None else known.score(stored)
    if known is not None and unlike is not None and unlike > 1:
        warnings.append(f"unlike the training images: {known.reason(stored)}")
    return pixels, unlike, warnings


def line_writer(told: Any, as_json: bool) -> Any:
    """Returns the function that prints a record of `records`."""
    if as_json:
        return lambda record: print(json.dumps(record, ensure_ascii=False), flush=True)
    columns = ["file", "predicted", *(f"p_{name}" for name in told.classes)]
    columns += [*(f"called_{name}" for name in told.classes), "unlike", "warnings", "error"]
    writer = csv.DictWriter(sys.stdout, columns, lineterminator="\n")
    writer.writeheader()

    def write(record: dict[str, Any]) -> None:
        writer.writerow(dict(_cells(record)))
        sys.stdout.flush()

    return write


def _cells(record: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name in ("file", "predicted", "unlike", "error"):
        yield name, "" if record.get(name) is None else record[name]
    yield "warnings", "; ".join(record.get("warnings", ()))
    for name, p in record.get("probabilities", {}).items():
        yield f"p_{name}", p
    for name, decision in record.get("decisions", {}).items():
        yield f"called_{name}", "yes" if decision["called"] else "no"


def save_map(heat: np.ndarray, folder: Path, stem: str, used: set[str]) -> None:
    """Writes a map [H, W] in 0..1 as FOLDER/STEM_gradcam.png, with a number where that name is taken."""
    folder.mkdir(parents=True, exist_ok=True)
    name, number = f"{stem}_gradcam.png", 1
    while name in used:
        number += 1
        name = f"{stem}_{number}_gradcam.png"
    used.add(name)
    Image.fromarray(np.rint(heat * 255).astype(np.uint8)).save(folder / name)


if __name__ == "__main__":
    sys.exit(main())
