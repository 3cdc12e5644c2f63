"""Coronal CT images from the NCCID, classified by whether they show the whole lung.

Source: https://github.com/nhsx/nccid-ct-slice-lung-classification (src/model_util.py makes the split). The images are
64 x 128, rotated by 180 degrees, and cut from volumes of the National COVID-19 Chest Imaging Database.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from lungjax.data import splits
from lungjax.data.csv_table import read_table
from lungjax.datasets import PrepareOptions
from lungjax.datasets import source_files as files
from lungjax.datasets.listing import Example, Listing, compare_counts, complete_splits

CLASSES = ("Others", "WholeLung")  # 0, 1 of the label file
TABLE = "whole_lung_label.csv"
SEED = 42  # of both draws of the study
# How the study cut its images. It does not state the window; the images in its notebook suggest about -990 to 380 HU.
VOLUMES = {"hu_windows": ((-300.0, 1400.0),), "plane": "coronal", "position": "mid", "orientation": "rotated"}

ABOUT = files.about("nccid_whole_lung")


def listing(source: Path, config: str, options: PrepareOptions) -> Listing:
    """Lists the images in the label file of `source`. Raises ValueError if the file is missing or a line is invalid."""
    table = files.find(source, (TABLE,), "label file")
    rows = read_table(table, ("image_name", "whole_lung")).rows
    # The study drops rows without a file before it draws.
    existing = [i for i, (_, row) in enumerate(rows) if (table.parent / row["image_name"]).is_file()]
    cells = _study(len(rows), existing)
    listed = []
    for (where, row), cell in zip(rows, cells, strict=True):
        name, label = row["image_name"], files.lookup(row["whole_lung"], {"0": "0", "1": "1"}, "whole_lung", where)
        image, group = str(table.parent / name), series(name)
        listed.append(Example(name, image, int(label), "", group, "NCCID", where=where, study=cell))
    examples, _ = complete_splits(listed, options.seed)
    notes = tuple(compare_counts(examples, CLASSES, ABOUT.expected["default"], "the study"))
    return Listing(CLASSES, examples, (), notes, "series by file name", ABOUT.study, volumes=VOLUMES)


def series(file: str) -> str:
    """Returns a file name such as "1.2.826.0.1.3680043.9.3218.1.1.7.1069.16.3.0.jpg" without its last two numbers."""
    return re.sub(r"(?<=\d)\.\d+\.\d+$", "", Path(file).stem)


def _study(count: int, existing: Sequence[int]) -> list[str]:
    from sklearn.model_selection import train_test_split  # here: it takes two seconds to import

    if len(existing) < 4:  # too few for three parts: no study split
        return [""] * count
    train, rest = train_test_split(existing, test_size=1.0 - 0.70, random_state=SEED)
    val, test = train_test_split(rest, test_size=0.15 / (0.15 + 0.15), random_state=SEED)
    return splits.study_cells(count, train=train, val=val, test=test)
