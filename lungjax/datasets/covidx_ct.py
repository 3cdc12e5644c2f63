"""COVIDx CT 1, 2A, 2B, 3A and 3B from the official label files and PNG folder.

Source: https://github.com/haydengunraj/COVIDNet-CT (docs/dataset.md); images from Kaggle, hgunraj/covidxct. The
split is the official one, by patient. Patient and source of a slice are taken from its file name.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lungjax.data import splits
from lungjax.data.csv_table import read_table
from lungjax.datasets import PrepareOptions
from lungjax.datasets import source_files as files
from lungjax.datasets.listing import Example, Listing, compare_counts

CLASSES = ("Normal", "Pneumonia", "COVID-19")  # labels 0, 1, 2 of the official files

EXTRA = ("age", "sex", "country")  # columns of metadata.csv that are kept

ABOUT = files.about("covidx_ct")
PATIENTS = files.ABOUT["covidx_ct_patients"]  # by version and split

# File name -> patient (first group) and source. The prefix of COVID-CTset varies within a patient, so it is ignored.
RULES = {
    r"((?:NCP|CP|Normal)_\d+)_\d+_\d+\.": "CNCB",
    r"(?:\d*covid\d*|normal\d*|cdnormal\d*|normalcd\d*)_(patient\d+)_SR_": "COVID-CTset",
    r"(LIDC-IDRI-\d{4})-": "LIDC-IDRI",
    r"(volume-covid19-A-\d{4})[-_]": "TCIA",
    r"(coronacases_\d+|radiopaedia_\d+_\d+)[-_]": "COVID-19-CT-Seg",
    r"(COVIDCTMD-[^-]+)-": "COVID-CT-MD",
    r"(HUST-Patient\d+)-": "iCTCF",
    r"(STOIC-\d+)-": "STOIC",
    r"(A\d{6})-": "Stony Brook",
    r"(radiopaedia-\d+)-": "radiopaedia.org",
    r"(study_\d{4})-": "MosMedData",
}

# Classes that the study resampled, and the class whose count they were resampled to.
RESAMPLED = {"train": ((0, 2), 1), "val": ((0, 1), 2)}


def listing(source: Path, config: str, options: PrepareOptions) -> Listing:
    """Lists the slices of version `config` in `source`. Raises ValueError for missing files or bad label files."""
    version = config.upper()
    names = ("_COVIDx_CT-" + version, "_COVIDx-CT-" + version, "_COVIDx_CT", "_COVIDx-CT")
    forms = [f"{root}{{}}{name}.txt" for root in ("", f"splits/v{config[0]}/") for name in names]
    tables = {s: files.find(source, [form.format(s) for form in forms], f"{s} label file") for s in splits.SPLITS}
    folders = (f"{version}_images", "images", f"COVIDx_CT-{version}", f"COVIDx-CT-{version}", "COVIDx-CT", "COVIDx_CT")
    places = [f"{place}/" for name in folders for place in (f"{name}/{name}", name, f"data/{name}")]
    folder = files.find(source, places, "image folder")
    examples = [example for split, table in tables.items() for example in read_labels(table, split, folder)]
    unknown = [example.file for example in examples if not example.source]
    notes = compare_patients(examples, config)
    if unknown:
        rule = "their patient is the part before the last '-' or '_', and their source is empty"
        notes.append(f"{len(unknown)} file names (such as {unknown[0]}) match no rule; {rule}")
    if config in ("2a", "3a"):
        examples = resampled(examples)
    table = source / "metadata.csv"
    if table.is_file():
        rows = [row for _, row in read_table(table, ("patient id", *EXTRA)).rows]
        # As in file names: a few ids of TCIA end in a scan number.
        patients = {patient(f"{row['patient id']}-0.png")[0]: tuple(row[name] for name in EXTRA) for row in rows}
        examples = [replace(e, extra=patients.get(e.group, ("",) * len(EXTRA))) for e in examples]
    extra = EXTRA if table.is_file() else ()
    return Listing(CLASSES, examples, extra, tuple(notes), study=ABOUT.study, body=True)


def resampled(examples: Sequence[Example]) -> list[Example]:
    """Returns the examples in the order of the label file; `study` has the number of times the study drew each one."""
    from sklearn.utils import resample  # here: it takes two seconds to import

    result = list(examples)
    for split, (classes, target) in RESAMPLED.items():
        rows: list[list[int]] = [[] for _ in CLASSES]
        for i, example in enumerate(examples):
            if example.split == split:
                rows[example.label].append(i)
        for label in classes:
            both = rows[label] and rows[target]
            times = Counter(resample(rows[label], n_samples=len(rows[target]), random_state=0) if both else ())
            for i in rows[label]:
                cell = "" if not times[i] else split if times[i] == 1 else f"{split}*{times[i]}"
                result[i] = replace(examples[i], study=cell)
    return result


def patient(file: str) -> tuple[str, str]:
    """Returns the patient id and source of a slice, from its file name; the source is "" if no rule matches."""
    for pattern, source in RULES.items():
        match = re.match(pattern, file)
        if match:
            return match.group(1), source
    stem = file.rpartition(".")[0] or file
    return re.sub(r"[-_][^-_]*$", "", stem) or stem, ""


def read_labels(table: Path, split: str, folder: Path) -> list[Example]:
    """Returns the examples of an official label file with images in `folder`. Raises ValueError for malformed lines."""
    examples = []
    for where, line in files.read_lines(table):
        file, *numbers = line.split()
        if len(numbers) != 5:
            raise ValueError(f"{where}: {line!r}: expected the fields filename class xmin ymin xmax ymax")
        try:
            label, xmin, ymin, xmax, ymax = map(int, numbers)
        except ValueError:
            raise ValueError(f"{where}: class and box must be integers, not {' '.join(numbers)}") from None
        if not 0 <= label < len(CLASSES):
            allowed = ", ".join(f"{i} {name}" for i, name in enumerate(CLASSES))
            raise ValueError(f"{where}: unknown class {label}; expected {allowed}")
        if not (0 <= xmin < xmax and 0 <= ymin < ymax):
            box = f"{xmin} {ymin} {xmax} {ymax}"
            raise ValueError(f"{where}: box {box}: expected 0 <= xmin < xmax and 0 <= ymin < ymax")
        group, source = patient(file)
        corners = (float(xmin), float(ymin), float(xmax), float(ymax))
        image = f"{folder}/{file}"
        examples.append(Example(file, image, label, split, group, source, corners, where=where, study=split))
    return examples


def compare_patients(examples: Sequence[Example], config: str) -> list[str]:
    """Returns the result of `compare_counts` for slices and for patients."""
    name = f"COVIDx CT-{config.upper()}"
    one_per_patient = list({(e.split, e.label, e.group): e for e in examples}.values())
    return [
        *compare_counts(examples, CLASSES, ABOUT.expected[config], name, "slices"),
        *compare_counts(one_per_patient, CLASSES, PATIENTS[config], name, "patients"),
    ]
