"""Predicts with the model in this file: python model.pyz scan.png more/*.png

Needs Python 3.11, jax, numpy and pillow, and scikit-image if the model was trained on segmented bodies or lungs.
Prints CSV: the calibrated class probabilities of each image, and whether each class reaches its operating point.
Reads PNG, JPEG, TIFF, BMP, GIF (first frame), WebP and JPEG 2000; 16-bit images get the window of the training
images. For research use only. Not a medical device, not for diagnosis.
"""

import argparse
import csv
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lungjax.config import metadata
from lungjax.data.batching import pad_batch
from lungjax.data.folder_walk import list_files
from lungjax.data.imaging import images
from lungjax.data.safe_text import csv_row, cut, printable
from lungjax.inference import artifacts, records

BATCH = 8


def main() -> int:
    """Parses the command line, predicts, and returns the exit code (1 if an image could not be read)."""
    parser = argparse.ArgumentParser(prog="python model.pyz", description=__doc__.split("\n\n")[1])
    parser.add_argument("paths", nargs="*", metavar="PATH", help="image files, or folders of them")
    parser.add_argument("--rule", default=records.RULE, help="operating point of the decisions (default %(default)s)")
    parser.add_argument("--maps", metavar="FOLDER", help="also write Grad-CAM maps, 8-bit grayscale PNG")
    parser.add_argument("--prepared", action="store_true", help="the images are segmented like the training images")
    try:
        about = artifacts.read_about(Path(__file__).parent)  # of the zip itself
        parser.epilog = f"Guaranteed to run with {artifacts.compatibility(about['jax'])}."
        return predict(parser.parse_args())
    except ImportError as error:
        needs = f"the model was trained on segmented bodies or lungs, which needs the package {error.name}"
        print(
            f"model.pyz: {needs}: pip install scikit-image, or pass --prepared with segmented images", file=sys.stderr
        )
    except (ValueError, OSError) as error:
        print(printable(f"model.pyz: {error}", keep="\n"), file=sys.stderr)
    return 2


def predict(flags: argparse.Namespace) -> int:
    """Predicts the images on the command line; returns the exit code."""
    model = artifacts.read_pyz(Path(__file__).parent)  # the zip itself
    description = model.metadata
    if not flags.paths:
        raise ValueError("give image files or folders; see --help")
    records.check_rule(description, flags.rule)
    if (description.stage or description.box == "body") and not flags.prepared:
        from lungjax.data.imaging import lung_masks  # noqa: F401  # fails before any image is read
    if flags.maps and "gradcam" not in model.programs:
        raise ValueError("--maps: no feature map of this network is large enough for Grad-CAM")
    prepare = artifacts.Preprocessor(description)
    files = gather(flags.paths)
    columns = ["file", *records.columns(description), "novelty", "warnings", "error"]
    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow(csv_row(columns))

    def write(record: dict[str, Any]) -> None:
        table.writerow(csv_row(records.cell(record, column) for column in columns))
        sys.stdout.flush()

    size, failed = min(BATCH, len(files)), 0
    names: set[str] = set()
    for at in range(0, len(files), size):
        inputs = []
        for name in files[at : at + size]:
            try:
                decoded = images.read(images.file_bytes(name))[0]
                inputs.append((name, prepare(decoded, segmented=flags.prepared)))
            except (ValueError, OSError) as error:
                failed += 1
                print(printable(f"model.pyz: {name}: {error}"), file=sys.stderr)
                write(records.failure(name, str(error)))
        if not inputs:
            continue
        batch = pad_batch(np.stack([image.pixels for _, image in inputs]), size)  # one size compiles once
        probabilities = np.asarray(model.outputs(batch)["probabilities"])
        for (name, image), p in zip(inputs, probabilities, strict=False):
            write(records.record(description, name, p, image.novelty, image.warnings, flags.rule))
        if flags.maps:
            maps = model.gradcam(batch, np.full(size, -1, np.int32))
            for (name, _), heat in zip(inputs, maps, strict=False):
                try:
                    save_map(heat, Path(flags.maps), cut(Path(name).stem), names)
                except OSError as error:
                    failed += 1
                    print(printable(f"model.pyz: no map of {name}: {error}"), file=sys.stderr)
    print(metadata.NOTICE, file=sys.stderr)
    return 1 if failed else 0


def gather(paths: list[str]) -> list[str]:
    """Returns the given files and the images in the given folders. Raises ValueError for a folder without images."""
    files: list[str] = []
    for path in paths:
        if not Path(path).is_dir():
            files.append(path)
            continue
        names = [name for name in list_files(Path(path)) if name.lower().endswith(images.SUFFIXES)]
        if not names:
            raise ValueError(f"{path}: no images ({', '.join(images.SUFFIXES)})")
        files += [str(Path(path, name)) for name in names]
    return files


def save_map(heat: np.ndarray, folder: Path, stem: str, names: set[str]) -> None:
    """Writes a map [H, W] in 0..1 as FOLDER/STEM_gradcam.png, with a number if that name is in `names`."""
    folder.mkdir(parents=True, exist_ok=True)
    name, number = f"{stem}_gradcam.png", 1
    while name in names:
        number += 1
        name = f"{stem}_{number}_gradcam.png"
    names.add(name)
    Image.fromarray(np.rint(heat * 255).astype(np.uint8)).save(folder / name)


if __name__ == "__main__":
    sys.exit(main())
