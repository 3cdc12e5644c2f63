"""CheXpert: frontal and lateral chest X-rays with 14 observations from the radiology reports, some uncertain."""

import re
from dataclasses import replace
from pathlib import Path

from lungjax.data.csv_table import read_table
from lungjax.datasets import PrepareOptions
from lungjax.datasets import source_files as files
from lungjax.datasets.listing import Example, Listing, compare_counts, complete_splits

OBSERVATIONS = (  # in the order of the tables
    *("No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema"),
    *("Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other"),
    *("Fracture", "Support Devices"),
)
CLASSES = {
    "default": OBSERVATIONS,
    "competition": ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion"),
}
VALUES = {"1.0": "1", "0.0": "0", "-1.0": "-1", "1": "1", "0": "0", "-1": "-1", "": "0"}
COLUMNS = ("Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *OBSERVATIONS)
ROOTS = ("", "CheXpert-v1.0/", "CheXpert-v1.0-small/")
TABLES = {"train": "train.csv", "test": "valid.csv"}
PATH = re.compile(r"(?:.*/)?((?:train|valid)/(patient\d+)/study\d+/[^/]+)")
EXPECTED = {"train": (223414, 64540), "test": (234, 200)}  # images and patients

ABOUT = files.about("chexpert")


def listing(source: Path, config: str, options: PrepareOptions) -> Listing:
    """Lists the X-rays in `source`. Raises ValueError for missing files and invalid rows."""
    listed = []
    for split, name in TABLES.items():
        table = files.find(source, [root + name for root in ROOTS], f"table of the {split} split")
        for where, row in read_table(table, COLUMNS).rows:
            match = PATH.fullmatch(row["Path"])
            if match is None:
                raise ValueError(f"{where}: Path {row['Path']!r}; expected train/patient00001/study1/view1_frontal.jpg")
            file, group = match.groups()
            cells = (files.lookup(row[name], VALUES, name, where) for name in CLASSES[config])
            label, view = tuple(map(int, cells)), row["AP/PA"]
            extra = (view if row["Frontal/Lateral"] == "Frontal" else "Lateral", row["Sex"], row["Age"])
            image = str(table.parent / file)
            listed.append(Example(file, image, label, split, group, extra=extra, where=where, study=split))
    notes = compare_counts(listed, CLASSES[config], ABOUT.expected[config], "CheXpert")
    notes += files.compare_totals(listed, EXPECTED, "CheXpert")
    examples, more = complete_splits(listed, options.seed)
    examples = [replace(e, study=e.split) for e in examples]
    return Listing(CLASSES[config], examples, ("view", "sex", "age"), (*notes, *more), study=ABOUT.study)
