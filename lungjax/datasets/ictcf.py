"""The nCT, pCT and NiCT slices of iCTCF: COVID-negative, COVID-positive and non-informative axial CT slices.

Source: Ning et al. 2020 (ictcf.biocuckoo.cn), as published on Kaggle, azaemon/preprocessed-ct-scans-for-covid19; study:
https://github.com/kaclewtak/Classifying-CT-Scans-for-COVID-19-Classification. The file names contain no patient ids.
"""

import functools
import re
from dataclasses import replace
from pathlib import Path

import numpy as np

from lungjax.data import splits
from lungjax.data.imaging import images
from lungjax.datasets import PrepareOptions, keras_generator
from lungjax.datasets import source_files as files
from lungjax.datasets.listing import About, Example, Listing, compare_counts, complete_splits

CLASSES = ("nCT", "pCT", "niCT")  # labels 0, 1, 2 of the study; the archive spells the last NiCT
TARGET = 9000  # images of each smaller class after the study's oversampling
ROTATION, SHIFT = 15.0, 0.1  # maximum for a generated image, in degrees and in fractions of a side
SEED = 25  # of both draws of the study
FOLDERS = ("Original CT Scans/", "CT Scans/", "")

ABOUT = About(
    title="axial chest CT slices: COVID-negative, COVID-positive, non-informative (no lung)",
    origin="https://www.kaggle.com/datasets/azaemon/preprocessed-ct-scans-for-covid19 (19,685 original slices, about "
    "4 GB with the preprocessed ones, which are not needed)",
    layout='"Original CT Scans/{nCT,pCT,NiCT}/FILE.jpg" as in the archive, or only the three folders, in any case.',
    licence="CC BY 4.0, as stated on Kaggle.",
    citation="Ning et al., Nature Biomedical Engineering 4, 1197-1207, 2020; A. Z. B. Aziz: CT Scans for COVID-19 "
    "Classification, Kaggle, 2020.",
    study="Scikit-learn's stratified train_test_split twice (seed 25, 70/20/10), by slice, after oversampling pCT and "
    "niCT to 9,000 with rotated and shifted copies, so copies of one slice are in several splits. Only the "
    "configuration oversampled has these copies. The study's file order is unpublished; here, names are ordered by "
    "number.",
    clean=f"Three new splits (70/15/15) by blocks of {files.BLOCK_SIZE} consecutive file numbers of a class, because "
    "the names contain no patient ids; a patient's slices may be in two blocks. Generated copies are removed. iCTCF is "
    "also part of COVIDx CT: do not test one with the other.",
    expected={
        "default": {"all": (9979, 4001, 5705)},
        "oversampled": {"test": (998, 900, 900), "all": (9979, 9000, 9000)},
    },
)


def listing(source: Path, config: str, options: PrepareOptions) -> Listing:
    """Lists the original slices in `source` and, with `config` "oversampled", the generated copies.

    Raises ValueError for a missing class folder, with the names tried, or one without images.
    """
    root = files.find(source, [f"{folder}{CLASSES[0]}/" for folder in FOLDERS], "folder of class nCT").parent
    paths = [
        sorted((path for path, _ in files.class_images(root, name)), key=lambda path: (_number(path), path))
        for name in CLASSES
    ]
    examples = _originals(source, paths, options.seed) + _generated(paths, options.seed)
    cells = _study([example.label for example in examples])
    examples = [replace(example, study=cell) for example, cell in zip(examples, cells, strict=True)]
    chosen = [example for example in examples if config == "oversampled" or example.source == "iCTCF"]
    notes = tuple(compare_counts(chosen, CLASSES, ABOUT.expected[config], "iCTCF"))
    return Listing(CLASSES, chosen, (), notes, "blocks of neighboring slices", ABOUT.study, body=True)


def generate(array: np.ndarray, angle: float, down: float, right: float) -> np.ndarray:
    """Returns a copy of a slice as the study generated it: gray uint8 [H, W] (see `keras_generator.transform`)."""
    return keras_generator.transform(images.gray(array), angle, (down, right)).astype(np.uint8)


def _originals(source: Path, paths: list[list[Path]], seed: int) -> list[Example]:
    examples = [
        Example(path.relative_to(source).as_posix(), str(path), label, "", _group(label, path), "iCTCF")
        for label, class_paths in enumerate(paths)
        for path in class_paths
    ]
    return complete_splits(examples, seed)[0]


def _generated(paths: list[list[Path]], seed: int) -> list[Example]:
    """Lists the copies that fill each class up to TARGET: shuffled slices, each rotated and shifted at random."""
    examples = []
    for label, class_paths in enumerate(paths):
        rng = np.random.default_rng([seed, label])
        count = max(0, TARGET - len(class_paths))
        passes = -(-count // len(class_paths))
        order = [int(row) for _ in range(passes) for row in rng.permutation(len(class_paths))][:count]
        moves = rng.uniform(-1, 1, (count, 3)) * [ROTATION, SHIFT, SHIFT]
        for i, (row, move) in enumerate(zip(order, moves, strict=True)):
            path = class_paths[row]
            file, source = f"generated/{CLASSES[label]}/{i:05}.png", "generated by the study"
            transform = functools.partial(generate, angle=move[0], down=move[1], right=move[2])
            examples.append(Example(file, str(path), label, "", _group(label, path), source, transform=transform))
    return examples


def _study(labels: list[int]) -> list[str]:
    """Returns the study's split of each image, drawn together with the generated ones."""
    from sklearn.model_selection import train_test_split  # here: it takes two seconds to import

    rows, classes = np.argsort(labels, kind="stable"), np.asarray(labels)
    rest, test = train_test_split(rows, test_size=0.1, random_state=SEED, stratify=classes[rows])
    train, val = train_test_split(rest, test_size=0.2 / 0.9, random_state=SEED, stratify=classes[rest])
    return splits.study_cells(len(rows), train=train, val=val, test=test)


def _group(label: int, path: Path) -> str:
    return f"{CLASSES[label]}/{files.block(path.stem)}"


def _number(path: Path) -> int:
    match = re.search(r"(\d+)\D*$", path.stem)
    return int(match.group(1)) if match else -1
