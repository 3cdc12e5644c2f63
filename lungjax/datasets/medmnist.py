"""MedMNIST: small gray images of public data sets, in NumPy archives. PneumoniaMNIST, ChestMNIST and OrganAMNIST."""

import functools
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np

from lungjax.data import splits
from lungjax.data.imaging import images
from lungjax.datasets import PrepareOptions, nih_chestxray14
from lungjax.datasets import source_files as files
from lungjax.datasets.listing import Example, Listing, compare_counts

SUBSETS = {
    "pneumonia": ("normal", "pneumonia"),
    "chest": nih_chestxray14.CLASSES,
    "organa": (
        *("bladder", "femur-left", "femur-right", "heart", "kidney-left", "kidney-right"),
        *("liver", "lung-left", "lung-right", "pancreas", "spleen"),
    ),
}
CONFIGS = tuple(name + size for name in SUBSETS for size in ("", "_64", "_128", "_224"))
CLASSES = {config: SUBSETS[config.partition("_")[0]] for config in CONFIGS}
SOURCES = {"pneumonia": "Kermany", "chest": "NIH ChestX-ray14", "organa": "LiTS"}
SIZES = {  # images in train, val and test, by version of MedMNIST: 3 first
    "chest": ((78468, 11219, 22433),),
    "organa": ((34561, 6491, 17778), (34581, 6491, 17778)),
}
STUDY = {
    "pneumonia": "test is that of Kermany et al.; val was cut from train by image, so both may share patients",
    "chest": "the sizes are not those of the official lists; whether the split is by patient is unknown",
    "organa": "the split is by CT scan",
}

ABOUT = files.about("medmnist")
STUDY_OF_ALL = " ".join(f"{name.capitalize()}: {text}." for name, text in STUDY.items())
ABOUT = replace(ABOUT, study=f"{ABOUT.study} {STUDY_OF_ALL}")


def listing(source: Path, config: str, options: PrepareOptions) -> Listing:
    """Lists the images of an archive in `source`. Raises ValueError if it is missing or damaged."""
    subset, classes = config.partition("_")[0], CLASSES[config]
    path = files.find(source, (config.replace(subset, f"{subset}mnist") + ".npz",), "archive of MedMNIST")
    examples: list[Example] = []
    for split in splits.SPLITS:
        pixels, labels = read_split(path, split, classes)
        for number, (image, row) in enumerate(zip(pixels, labels.astype(int).tolist(), strict=True)):
            file, label = f"{split}/{number:06}.png", tuple(row) if subset == "chest" else row[0]
            encode = functools.partial(images.encode, image)
            examples.append(Example(file, encode, label, split, file, SOURCES[subset], study=split))
    if subset in ABOUT.expected:
        notes = compare_counts(examples, classes, ABOUT.expected[subset], "MedMNIST")
    else:
        counts = tuple(sum(e.split == split for e in examples) for split in splits.SPLITS)
        ours, theirs = (" / ".join(f"{n:,}" for n in row) for row in (counts, SIZES[subset][0]))
        line = f"differs from the publication: {ours} images in train / val / test; MedMNIST has {theirs}"
        notes = [] if counts in SIZES[subset] else [line]
    study = f"The splits of the archive: {STUDY[subset]}. Patients are unknown, so each image counts as one."
    modality = "ct" if subset == "organa" else "xray"
    return Listing(classes, examples, notes=tuple(notes), group_name="images", study=study, modality=modality)


def read_split(path: Path, split: str, classes: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the images [N, H, W] and labels [N, 1 or K] of a split. Raises ValueError for a damaged archive."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            pixels, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
    except (KeyError, OSError, TypeError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: damaged, or not an archive of MedMNIST ({error}); download it again") from None
    several = classes == SUBSETS["chest"]
    shape, values = (*pixels.shape[:1], len(classes) if several else 1), 2 if several else len(classes)
    valid = labels.shape == shape and np.isin(labels, np.arange(values)).all()
    if not valid or pixels.ndim != 3 or pixels.dtype != np.uint8:
        found = f"{pixels.dtype} images {pixels.shape} and labels {labels.shape}"
        raise ValueError(f"{path}: {split} has {found}; expected uint8 [N, H, W] and {shape} from 0 to {values - 1}")
    return pixels, labels
