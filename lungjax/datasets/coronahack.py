"""CoronaHack: chest X-rays with and without pneumonia, mostly of children (Kermany et al.), some of COVID-19."""

import re
from dataclasses import replace
from pathlib import Path

from lungjax.data.csv_table import read_table
from lungjax.datasets import PrepareOptions
from lungjax.datasets import source_files as files
from lungjax.datasets.listing import About, Example, Listing, compare_counts, complete_splits

CLASSES = ("Normal", "Pneumonia")
TABLE = "Chest_xray_Corona_Metadata.csv"
FOLDER = "Coronahack-Chest-XRay-Dataset"
LABELS = {"Normal": "0", "Pnemonia": "1", "Pneumonia": "1"}  # the table has the misspelling
SPLITS = {"TRAIN": "train", "TEST": "test"}
COLUMNS = ("X_ray_image_name", "Label", "Dataset_type", "Label_1_Virus_category", "Label_2_Virus_category")

ABOUT = About(
    title="chest X-rays: normal or pneumonia (the cause, such as COVID-19, in extra columns)",
    origin="https://www.kaggle.com/datasets/praveengovi/coronahack-chest-xraydataset (5,910 X-rays, about 1.2 GB)",
    layout=f"{TABLE} and {FOLDER}/{FOLDER}/{{train,test}}/FILE, as in the archive.",
    licence="CC BY 4.0 for Kermany's images; individual licenses for the COVID-19 images, see covid_chestxray.",
    citation="P. Govi: CoronaHack Chest X-Ray Dataset, Kaggle, 2020; Kermany et al., Cell 172, 2018.",
    study="The original split (column Dataset_type), which has no validation part: test is also the validation set.",
    clean="The original test split; val is cut from train by patient (personNNN or IM-NNNN in the file name; for the "
    "COVID-19 collection, the case or paper). Patients in both train and test remain only in test.",
    expected={"default": {"train": (1342, 3944), "test": (234, 390)}},
)


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
