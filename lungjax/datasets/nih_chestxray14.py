"""NIH ChestX-ray14: frontal chest X-rays with 14 findings, which were extracted from the radiology reports."""

from dataclasses import replace
from pathlib import Path

from lungjax.config import nearest
from lungjax.data.csv_table import read_table
from lungjax.datasets import PrepareOptions
from lungjax.datasets import source_files as files
from lungjax.datasets.listing import Example, Listing, compare_counts, complete_splits

CLASSES = (
    *("Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax"),
    *("Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia"),
)
NO_FINDING = "No Finding"
TABLES = ("Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv")
LISTS = {"train": "train_val_list.txt", "test": "test_list.txt"}
COLUMNS = ("Image Index", "Finding Labels", "Patient ID", "Patient Age", "View Position")
EXPECTED = {"train": (86524, 28008), "test": (25596, 2797)}  # images and patients

ABOUT = files.about("nih_chestxray14")


def listing(source: Path, config: str, options: PrepareOptions) -> Listing:
    """Lists the X-rays in `source`. Raises ValueError for missing files, an unlisted image or an unknown finding."""
    table = files.find(source, TABLES, "table of findings")
    split_of: dict[str, str] = {}
    for split, name in LISTS.items():
        split_of |= {line: split for _, line in files.read_lines(files.find(source, (name,), "list of images"))}
    folders = sorted(path for path in source.glob("images*") if path.is_dir())
    folders = folders or [files.find(source, ("images/", "images_001/images/"), "folder of images")]
    places = {Path(name).name: f"{folder}/{name}" for folder in folders for name in files.list_images(folder)}
    listed = []
    for where, row in read_table(table, COLUMNS).rows:
        file, group = row["Image Index"], f"patient {row['Patient ID']}"
        if file not in split_of:
            raise ValueError(f"{where}: {file} is neither in {' nor in '.join(LISTS.values())}")
        image, label = places.get(file, f"{folders[0]}/{file}"), label_of(row["Finding Labels"], where)
        sex = row.get("Patient Gender") or row.get("Patient Sex", "")  # the name depends on the version of the table
        extra = (row["View Position"], sex, row["Patient Age"].removesuffix("Y"))
        split = split_of[file]
        listed.append(Example(file, image, label, split, group, extra=extra, where=where, study=split))
    name = "NIH ChestX-ray14"
    notes = compare_counts(listed, CLASSES, ABOUT.expected["default"], name)
    notes += files.compare_totals(listed, EXPECTED, name)
    examples, more = complete_splits(listed, options.seed)
    examples = [replace(e, study=e.split) for e in examples]
    return Listing(CLASSES, examples, ("view", "sex", "age"), (*notes, *more), study=ABOUT.study)


def label_of(findings: str, where: str) -> tuple[int, ...]:
    """Returns the label of findings such as "Edema|Mass". Raises ValueError for an unknown one."""
    names = findings.split("|")
    for name in names:
        if name not in (*CLASSES, NO_FINDING):
            raise ValueError(f"{where}: unknown finding {name!r}; {nearest(name, (*CLASSES, NO_FINDING))}")
    return tuple(int(name in names) for name in CLASSES)
