"""CoronaHack: chest X-rays with and without pneumonia, mostly of children (Kermany et al.), some of COVID-19."""

import re
from dataclasses import replace
from pathlib import Path

from lungjax.data.csv_table import read_table
from lungjax.datasets import PrepareOptions
from lungjax.datasets import source_files as files
from lungjax.datasets.listing import Example, Listing, compare_counts, complete_splits

CLASSES = ("Normal", "Pneumonia")
TABLE = "Chest_xray_Corona_Metadata.csv"
FOLDER = "Coronahack-Chest-XRay-Dataset"
LABELS = {"Normal": "0", "Pnemonia": "1", "Pneumonia": "1"}  # the table has the misspelling
SPLITS = {"TRAIN": "train", "TEST": "test"}
COLUMNS = ("X_ray_image_name", "Label", "Dataset_type", "Label_1_Virus_category", "Label_2_Virus_category")

ABOUT = files.about("coronahack")


def listing(source: Path, config: str, options: PrepareOptions) -> Listing:
    """Lists the X-rays in the table of the archive `source`. Raises ValueError for missing files and invalid rows."""
    table = files.find(source, (TABLE, f"{FOLDER}/{TABLE}"), "table")
    names = (f"{FOLDER}/{FOLDER}/train/", f"{FOLDER}/train/", "train/")
    root = files.find(source, names, "folder of training images").parent
    listed = []
    for where, row in read_table(table, COLUMNS).rows:
        name, split = row["X_ray_image_name"], files.lookup(row["Dataset_type"], SPLITS, "Dataset_type", where)
        label, image = int(files.lookup(row["Label"], LABELS, "Label", where)), str(root / split / name)
        collection = "Kermany" if kermany(name) else "COVID-19 image data collection"
        example = Example(f"{split}/{name}", image, label, split, patient(name), collection, where=where)
        extra = (row["Label_1_Virus_category"], row["Label_2_Virus_category"])
        listed.append(replace(example, extra=extra, study="train" if split == "train" else "val+test"))
    examples, notes = complete_splits(listed, options.seed)
    notes += compare_counts(examples, CLASSES, ABOUT.expected["default"], "CoronaHack")
    return Listing(CLASSES, examples, ("cause", "agent"), tuple(notes), study=ABOUT.study)


def kermany(file: str) -> str:
    """Returns the patient in Kermany's names, such as person123_virus_4.jpeg or NORMAL2-IM-0059-0001.jpeg; else ""."""
    match = re.match(r"(person\d+)_|((?:NORMAL\d*-)?IM-\d+)-", file)
    return match.group(0)[:-1] if match else ""


def patient(file: str) -> str:
    """Returns the patient in a file name from Kermany, or the case or paper in one from the COVID-19 collection."""
    return kermany(file) or files.web_case(Path(file).stem)
