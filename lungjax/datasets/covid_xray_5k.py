"""COVID-XRay-5K (DeepCovid): chest X-rays, COVID-19 or not, from the official archive or the study's repository."""

import functools
import re
from dataclasses import replace
from pathlib import Path

import numpy as np

from lungjax.datasets import PrepareOptions, keras_generator
from lungjax.datasets import source_files as files
from lungjax.datasets.listing import Example, Listing, compare_counts, complete_splits

CLASSES = ("covid", "non")  # labels 0, 1: the folders in order, so the study's sigmoid was P(non)
SOURCES = ("COVID-19 image data collection", "CheXpert")
ROOTS = ("", "data_upload_v3/", "data_upload_v3/data_upload_v3/", "data/", "data_set/")
REPOSITORY = {"train": (121, 994), "test": (100, 1473)}  # images per class in the study's repository

# Ranges of the study's generator: degrees, degrees, visible fraction of each side, factor.
ROTATION, SHEAR, ZOOM, BRIGHTNESS = 5.0, 0.2, (0.7, 1.3), (0.2, 1.0)

# Names of generated files: Keras's PREFIX_INDEX_HASH with the study's prefix, Augmentor's FOLDER_original_FILE_UUID.
GENERATED = re.compile(r"a_\d+_\d+$|.*_original_.+_[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}$")
CHEXPERT = re.compile(r"(?:(.+?)[-_ ]?)?(patient\d+)[-_]", re.IGNORECASE)

ABOUT = files.about("covid_xray_5k")


def listing(source: Path, config: str, options: PrepareOptions) -> Listing:
    """Lists the X-rays in `source`; "oversampled" adds generated ones. Raises ValueError for a class without images."""
    listed, generated = [], 0
    for split, study in (("train", "train"), ("test", "val+test")):
        folder = files.find(source, [f"{root}{split}/" for root in ROOTS], f"{split} folder")
        for label, name in enumerate(CLASSES):
            for path, inner in files.class_images(folder, name):
                file, cell, patient = path.relative_to(source).as_posix(), split, group(inner, label)
                if split == "train" and not label and GENERATED.match(path.stem):
                    generated, cell, patient = generated + 1, "", "generated"
                extra = (finding(inner) if label else "COVID-19",)
                listed.append(Example(file, str(path), label, cell, patient, SOURCES[label], extra=extra, study=study))
    examples, notes = complete_splits(listed, options.seed)
    if generated:
        notes.append(
            f"{generated} generated images in train/covid, recognized by name, are used only by protocol=study"
        )
    publications = {"COVID-XRay-5K": ABOUT.expected["default"], "the study's repository": REPOSITORY}
    if config == "oversampled":
        publications = {"the study's repository": ABOUT.expected[config]}
        originals = [example for example in examples if example.study == "train" and not example.label]
        examples += _generated(originals[-1], len(originals), options.seed)
        notes.append(f"{len(originals)} images are generated from {originals[-1].file}, for protocol=study only")
    name = min(publications, key=lambda key: abs(sum(map(sum, publications[key].values())) - len(examples)))
    notes += compare_counts(examples, CLASSES, publications[name], name)
    return Listing(CLASSES, examples, ("finding",), tuple(notes), "patients, papers or images", ABOUT.study)


def generate(
    array: np.ndarray, angle: float, shear: float, zoom: tuple[float, float], flip: bool, brightness: float
) -> np.ndarray:
    """Returns a copy of an X-ray as the study generated it, uint8, without JPEG compression; angles are in degrees.

    Keras stretches the gray levels to 0..255 before and after the change of brightness, which only makes them coarser.
    """
    moved = keras_generator.transform(array, angle, shear=shear, zoom=zoom)
    return _stretch(np.floor(_stretch(moved[:, ::-1] if flip else moved) * brightness)).astype(np.uint8)


def _stretch(array: np.ndarray) -> np.ndarray:
    return np.floor(np.interp(array, (array.min(), array.max()), (0, 255)))


def _generated(original: Example, count: int, seed: int) -> list[Example]:
    """Returns `count` random copies of one X-ray, since the study's code kept only the last of the files it read."""
    rng, copies = np.random.default_rng(seed), []
    for i in range(count):
        angle, shear = rng.uniform(-1, 1, 2) * (ROTATION, SHEAR)
        zoom, flip, brightness = tuple(rng.uniform(*ZOOM, 2)), rng.random() < 0.5, rng.uniform(*BRIGHTNESS)
        transform = functools.partial(generate, angle=angle, shear=shear, zoom=zoom, flip=flip, brightness=brightness)
        copies.append(replace(original, file=f"generated/{i:03}.jpg", split="", transform=transform))
    return copies


def group(file: str, label: int) -> str:
    """Returns the CheXpert patient in the name of a non-COVID file, or the case or paper in that of a COVID file."""
    stem = Path(file).stem
    match = CHEXPERT.match(stem) if label else None
    return match.group(2).lower() if match else stem if label else files.web_case(stem)


def finding(path: str) -> str:
    """Returns the finding of a CheXpert file: its folder below the class, or the text before the patient number."""
    match = CHEXPERT.match(Path(path).stem)
    return path.rpartition("/")[0] or (match.group(1) or "" if match else "")
