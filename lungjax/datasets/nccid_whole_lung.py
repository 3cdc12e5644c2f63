"""Coronal CT pictures of the NCCID: does the picture show the whole lung?

Source: https://github.com/nhsx/nccid-ct-slice-lung-classification (src/model_util.py makes the split). The pictures
are 64 x 128, upside down, and cut from volumes of the National COVID-19 Chest Imaging Database.
"""

import re
from pathlib import Path

import numpy as np

from lungjax.data import splits, study_splits
from lungjax.datasets import PrepareOptions
from lungjax.datasets import source_files as files
from lungjax.datasets.listing import About, Example, Listing, differences

CLASSES = ("Others", "WholeLung")  # 0, 1 of the label file
TABLE = "whole_lung_label.csv"
SEED = 42  # of both draws of the study
# How its pictures were cut from the scans; the lung window is the usual one, the study does not say which it took.
CUT = {"hu_windows": ((-600.0, 1500.0),), "plane": "coronal", "position": "mid"}

ABOUT = About(
    title="mid-coronal CT pictures: the whole lung, or not",
    origin=(
        "the National COVID-19 Chest Imaging Database (https://nhsx.github.io/covid-chest-imaging-database), on "
        "application (4,773 pictures of 64 x 128, JPEG). The study cut them itself; `folder` cuts such pictures from "
        "your own volumes (--plane=coronal --position=mid)"
    ),
    layout=f"One folder with the JPEG files and {TABLE} (image_name,whole_lung; 0 or 1).",
    licence="By the database's access agreement only; the study's repository has no licence file.",
    citation=(
        "NHSX: nccid-ct-slice-lung-classification, GitHub, 2021; Cushnan et al.: An overview of the National COVID-19 "
        "Chest Imaging Database, GigaScience 10, 2021."
    ),
    study="Scikit-learn's train_test_split twice (seed 42, 70/15/15), by picture; a series may be on both sides.",
    clean=(
        "Three new splits by group (70/15/15). A group is the file name without its last two numbers, which seems to "
        "be the series; the names are pseudonyms, so that two series of a patient can't be told."
    ),
    expected={"default": {"test": (522, 194)}},
)


def listing(source: Path, config: str, options: PrepareOptions) -> Listing:
    """Lists the pictures named in the label file of `source`.

    Raises ValueError for a missing label file or column, a label that is not 0 or 1, or a file named twice.
    """
    files.refuse_flags(options, "nccid_whole_lung")
    table = files.find(source, (TABLE,), "label file")
    rows = files.table(table, ("image_name", "whole_lung"))
    labels = [int(files.choose(row["whole_lung"], {"0": "0", "1": "1"}, "whole_lung", where)) for where, row in rows]
    groups = [series(row["image_name"]) for _, row in rows]
    # The study drops rows without a file before it draws.
    there = np.asarray([i for i, (_, row) in enumerate(rows) if (table.parent / row["image_name"]).is_file()])
    cells = _study(len(rows), there)
    named = splits.make_splits(labels, groups, seed=options.seed)
    examples = [
        Example(
            row["image_name"],
            str(table.parent / row["image_name"]),
            label,
            split,
            group,
            source="NCCID",
            where=where,
            study=cell,
        )
        for (where, row), label, split, group, cell in zip(rows, labels, named, groups, cells, strict=True)
    ]
    files.check_unique(examples)
    notes = differences(examples, CLASSES, (ABOUT.expected or {})["default"], "the study")
    return Listing(
        CLASSES, examples, notes=tuple(notes), group_name="series by file name", study=ABOUT.study, volumes=CUT
    )


def series(file: str) -> str:
    """Returns a file name such as "1.2.826.0.1.3680043.9.3218.1.1.7.1069.16.3.0.jpg" without its last two numbers."""
    stem = files.stem_of(file)
    return re.sub(r"(?<=\d)\.\d+\.\d+$", "", stem)


def _study(count: int, there: np.ndarray) -> list[str]:
    if len(there) < 4:  # too few to draw three parts: there is no study split then
        return [""] * count
    train, rest = study_splits.train_test_split(len(there), 1.0 - 0.70, SEED)
    val, test = study_splits.train_test_split(len(rest), 0.15 / (0.15 + 0.15), SEED)
    return study_splits.cells(count, train=there[train], val=there[rest[val]], test=there[rest[test]])
