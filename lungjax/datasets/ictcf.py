"""The nCT, pCT and NiCT slices of iCTCF: COVID-negative, COVID-positive and non-informative axial CT slices.

Source: Ning et al. 2020 (ictcf.biocuckoo.cn) as Kaggle azaemon/preprocessed-ct-scans-for-covid19; the study:
https://github.com/kaclewtak/Classifying-CT-Scans-for-COVID-19-Classification. There are no patients in the names.
"""

import functools
import re
from pathlib import Path

import numpy as np
from scipy import ndimage

from lungjax.data import splits, study_splits
from lungjax.data.imaging import images
from lungjax.datasets import PrepareOptions
from lungjax.datasets import source_files as files
from lungjax.datasets.listing import About, Example, Listing, differences

CLASSES = ("nCT", "pCT", "niCT")  # label numbers 0, 1, 2 of the study; the archive spells the last NiCT
TARGET = 9000  # images of each class that had fewer, once the study had generated the rest
ROTATION, SHIFT = 15.0, 0.1  # degrees and parts of a side, both ways, of a generated image
SEED = 25  # of both draws of the study
FOLDERS = ("Original CT Scans/", "CT Scans/", "")

ABOUT = About(
    title="axial chest CT slices: COVID-negative, COVID-positive, non-informative (no lung)",
    origin=(
        "https://www.kaggle.com/datasets/azaemon/preprocessed-ct-scans-for-covid19 (19,685 original slices, about 4 GB "
        "with the preprocessed ones, which are not needed)"
    ),
    layout=(
        '"Original CT Scans/{nCT,pCT,NiCT}/FILE.jpg" as in the archive, or the three folders alone; letter case does '
        "not matter."
    ),
    licence="CC BY 4.0 as stated on Kaggle.",
    citation=(
        "Ning et al.: Open resource of clinical data from patients with pneumonia for the prediction of COVID-19 "
        "outcomes via deep learning, Nature Biomedical Engineering 4, 1197-1207, 2020; A. Z. B. Aziz: CT Scans for "
        "COVID-19 Classification, Kaggle, 2020."
    ),
    study=(
        "Scikit-learn's stratified train_test_split twice (seed 25, 70/20/10), by slice, drawn after pCT and niCT were "
        "filled up to 9,000 with rotated and shifted copies (the configuration oversampled has such copies; default is "
        "without them): copies of one slice are on both sides. The study's file order and its copies are not "
        "published: the draw is of the names in order of their numbers."
    ),
    clean=(
        f"Three new splits (70/15/15) by blocks of {files.BLOCK} consecutive file numbers of a class, for there are no "
        "patients in the names. Generated copies are left out. A block's border, or a scan in two classes, may still "
        "part slices of a patient. iCTCF is also in COVIDx CT: do not test one with the other."
    ),
    expected={
        "default": {"all": (9979, 4001, 5705)},
        "oversampled": {"test": (998, 900, 900), "all": (9979, 9000, 9000)},
    },
)


def listing(source: Path, config: str, options: PrepareOptions) -> Listing:
    """Lists the original slices in `source`; with `config` "oversampled" the generated copies as well.

    Raises ValueError for a missing class folder, with the names looked for, or one without images.
    """
    files.refuse_flags(options, "ictcf")
    names = [f"{place}{CLASSES[0]}/" for place in FOLDERS]
    root = files.find(source, names, "folder of class nCT").parent
    paths: list[list[Path]] = []
    for name in CLASSES:
        folder = files.find(root, (f"{name}/",), f"folder of class {name}")
        found = sorted(files.pictures(folder), key=lambda path: (_number(path), path))
        if not found:
            raise ValueError(f"{folder} has no image")
        paths.append([folder / path for path in found])
    examples = _originals(source, paths, options.seed) + _generated(paths, options.seed)
    cells = _study([example.label for example in examples])
    kept = [
        Example(e.file, e.image, e.label, e.split, e.group, e.source, study=cell)
        for e, cell in zip(examples, cells, strict=True)
        if config == "oversampled" or e.source == "iCTCF"
    ]
    notes = differences(kept, CLASSES, (ABOUT.expected or {})[config], "iCTCF")
    return Listing(
        CLASSES, kept, notes=tuple(notes), group_name="blocks of neighbouring slices", study=ABOUT.study, body=True
    )


def generate(path: str, angle: float, down: float, right: float) -> bytes:
    """Returns the image of the file `path` as PNG, turned left by `angle` degrees, then moved by parts of its sides.

    As Keras's ImageDataGenerator does it (a positive `down` looks further down, so the content moves up; order 1, fill
    nearest, cast to uint8), on the slice at its own size.
    """
    gray = images.gray(images.read(Path(path).read_bytes())[0]).astype(np.float32)
    height, width = gray.shape
    theta = np.deg2rad(angle)
    turn = np.array([[np.cos(theta), np.sin(theta)], [-np.sin(theta), np.cos(theta)]])
    centre = np.array([height / 2 - 0.5, width / 2 - 0.5])
    offset = turn @ np.array([down * height, right * width]) - turn @ centre + centre
    moved = ndimage.affine_transform(gray, turn, offset, order=1, mode="nearest")
    return images.encode(moved.astype(np.uint8))


def _originals(source: Path, paths: list[list[Path]], seed: int) -> list[Example]:
    rows = [(label, path) for label, found in enumerate(paths) for path in found]
    groups = [f"{CLASSES[label]}/{files.block(path.stem)}" for label, path in rows]
    named = splits.make_splits([label for label, _ in rows], groups, seed=seed)
    return [
        Example(path.relative_to(source).as_posix(), str(path), label, split, group, "iCTCF")
        for (label, path), group, split in zip(rows, groups, named, strict=True)
    ]


def _generated(paths: list[list[Path]], seed: int) -> list[Example]:
    """Lists what fills each class up to TARGET: passes over its shuffled slices, each turned and shifted anew."""
    examples = []
    for label, found in enumerate(paths):
        random = np.random.default_rng([seed, label])
        wanted = max(0, TARGET - len(found))
        passes = -(-wanted // len(found))
        order = [int(row) for _ in range(passes) for row in random.permutation(len(found))][:wanted]
        moves = random.uniform(-1, 1, (wanted, 3)) * [ROTATION, SHIFT, SHIFT]
        for i, (row, move) in enumerate(zip(order, moves, strict=True)):
            path = found[row]
            group = f"{CLASSES[label]}/{files.block(path.stem)}"
            image = functools.partial(generate, str(path), *map(float, move))
            examples.append(
                Example(f"generated/{CLASSES[label]}/{i:05}.png", image, label, "", group, "generated by the study")
            )
    return examples


def _study(labels: list[int]) -> list[str]:
    """Returns the study's split of each image, drawn with the generated ones."""
    order = np.argsort(labels, kind="stable")
    known = [labels[i] for i in order]
    rest, test = study_splits.train_test_split(len(known), 0.1, SEED, known)
    train, val = study_splits.train_test_split(len(rest), 0.2 / 0.9, SEED, [known[i] for i in rest])
    return study_splits.cells(len(known), train=order[rest[train]], val=order[rest[val]], test=order[test])


def _number(path: str) -> int:
    match = re.search(r"(\d+)\D*$", files.stem_of(path))
    return int(match.group(1)) if match else -1
