"""COVIDx CT 1, 2A, 2B, 3A and 3B from the official label files and PNG folder, as a TFDS data set.

Source: https://github.com/haydengunraj/COVIDNet-CT (docs/dataset.md); images from Kaggle, hgunraj/covidxct.
The split is the official one, by patient. Patient and source of a slice follow from its file name.
"""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from lungjax.data import prepared
from lungjax.datasets import Options, records
from lungjax.datasets.records import Example, Listing

CLASSES = ("Normal", "Pneumonia", "COVID-19")  # label numbers 0, 1, 2 of the official files
CONFIGS = ("1", "2a", "2b", "3a", "3b")

# Slices and patients per class of the official tables (CT-1, val and test: counted in the files).
_VAL2, _TEST2 = ((11842, 7400, 6244), (126, 190, 166)), ((12245, 7395, 6018), (126, 125, 175))
_VAL3, _TEST3 = ((17570, 8008, 8147), (164, 202, 194)), ((17922, 7965, 7894), (164, 138, 201))
EXPECTED: dict[str, dict[str, tuple[tuple[int, ...], tuple[int, ...]]]] = {
    "1": {
        "train": ((27201, 22061, 12520), (144, 420, 300)),
        "val": ((9107, 7400, 4529), (47, 190, 95)),
        "test": ((9450, 7395, 4346), (52, 125, 116)),
    },
    "2a": {"train": ((35996, 25496, 82286), (321, 558, 1958)), "val": _VAL2, "test": _TEST2},
    "2b": {"train": ((35996, 25496, 88467), (321, 558, 2714)), "val": _VAL2, "test": _TEST2},
    "3a": {"train": ((35996, 26970, 294552), (321, 592, 3336)), "val": _VAL3, "test": _TEST3},
    "3b": {"train": ((35996, 26970, 300733), (321, 592, 4092)), "val": _VAL3, "test": _TEST3},
}

# The metadata has two ids, "_0" and "_1", for each of 17 TCIA patients with two scans; here they are one.
TWO_SCANS = 17

# File name -> patient (first group) and source. COVID-CTset's prefix varies within a patient: no part of it.
RULES = tuple(
    (re.compile(pattern), source)
    for pattern, source in (
        (r"((?:NCP|CP|Normal)_\d+)_\d+_\d+\.", "CNCB"),
        (r"(?:\d*covid\d*|normal\d*|cdnormal\d*|normalcd\d*)_(patient\d+)_SR_", "COVID-CTset"),
        (r"(LIDC-IDRI-\d{4})-", "LIDC-IDRI"),
        (r"(volume-covid19-A-\d{4})[-_]", "TCIA"),
        (r"(coronacases_\d+|radiopaedia_\d+_\d+)[-_]", "COVID-19-CT-Seg"),
        (r"(COVIDCTMD-[^-]+)-", "COVID-CT-MD"),
        (r"(HUST-Patient\d+)-", "iCTCF"),
        (r"(STOIC-\d+)-", "STOIC"),
        (r"(A\d{6})-", "Stony Brook"),
        (r"(radiopaedia-\d+)-", "radiopaedia.org"),
        (r"(study_\d{4})-", "MosMedData"),
    )
)


class Builder(tfds.core.ShardBasedBuilder):
    """TFDS builder of COVIDx CT; `listing` says what goes into it."""

    name = "covidx_ct"
    VERSION = records.VERSION
    BUILDER_CONFIGS = tuple(
        tfds.core.BuilderConfig(name=name, description=f"COVIDx CT-{name.upper()}") for name in CONFIGS
    )

    def __init__(self, *, classes: Sequence[str] = CLASSES, shards: Any = (), **kwargs: Any):
        self._classes, self._shards = classes, shards
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return records.info(self, self._classes, "Axial chest CT slices: Normal, Pneumonia, COVID-19.")

    def _shard_iterators_per_split(self, dl_manager: Any) -> Any:
        return {prepared.SLICES: self._shards}


def listing(source: Path, config: str, options: Options) -> Listing:
    """Lists the slices of version `config` in the folder `source`.

    Raises ValueError for a missing label file or image folder, with the names looked for, or for a malformed
    line, an unknown class, an empty box or a file listed twice, with file and line.
    """
    given = [f"--{k}" for k in ("source_pattern", "group_pattern", "classes") if getattr(options, k)]
    if given:
        raise ValueError(f"{given[0]} is for folders: covidx_ct has official patients, sources and classes")
    tables = {split: _label_file(source, split, config) for split in prepared.SPLITS}
    folder = _image_folder(source, config)
    examples: list[Example] = []
    first: dict[str, str] = {}
    unknown: list[str] = []
    for split, table in tables.items():
        for example in read_labels(table, split, folder):
            if example.file in first:
                raise ValueError(f"{example.where}: {example.file} is already in {first[example.file]}")
            first[example.file] = example.where
            if not example.source:
                unknown.append(example.file)
            examples.append(example)
    notes = differences(examples, config)
    if unknown:
        notes.append(
            f"{len(unknown)} file names follow none of the known rules, such as {unknown[0]}: what precedes "
            "the last '-' or '_' is taken as patient, and the source is left empty"
        )
    return Listing(CLASSES, examples, notes=tuple(notes))


def patient(file: str) -> tuple[str, str]:
    """Returns patient id and source of a slice by its file name; source is "" where no rule fits."""
    for pattern, source in RULES:
        match = pattern.match(file)
        if match:
            return match.group(1), source
    stem = file.rpartition(".")[0] or file
    return re.sub(r"[-_][^-_]*$", "", stem) or stem, ""


def read_labels(table: Path, split: str, folder: Path) -> list[Example]:
    """Returns the examples of one official label file; its images are sought in `folder`.

    Raises ValueError naming file and line for a line that is not `filename class xmin ymin xmax ymax`.
    """
    examples = []
    with table.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{table.name} line {number}"
            fields = line.split()
            if not fields:
                continue
            if len(fields) != 6:
                raise ValueError(
                    f"{where}: {line.strip()!r} has {len(fields)} fields, wanted 6: filename class xmin ymin xmax ymax"
                )
            try:
                label, xmin, ymin, xmax, ymax = (int(text) for text in fields[1:])
            except ValueError:
                raise ValueError(
                    f"{where}: class and box must be whole numbers, found {' '.join(fields[1:])}"
                ) from None
            if not 0 <= label < len(CLASSES):
                known = ", ".join(f"{i} {name}" for i, name in enumerate(CLASSES))
                raise ValueError(f"{where}: unknown class {label}; known: {known}")
            if not (0 <= xmin < xmax and 0 <= ymin < ymax):
                raise ValueError(
                    f"{where}: box {xmin} {ymin} {xmax} {ymax} is empty or negative; wanted 0 <= xmin < xmax "
                    "and 0 <= ymin < ymax"
                )
            group, origin = patient(fields[0])
            box = (float(xmin), float(ymin), float(xmax), float(ymax))
            path = f"{folder}/{fields[0]}"
            examples.append(Example(fields[0], path, label, split, group, origin, box, where=where))
    if not examples:
        raise ValueError(f"{table} is empty")
    return examples


def differences(examples: Sequence[Example], config: str) -> list[str]:
    """Returns a line for each split whose slices or patients per class differ from the published ones."""
    slices = Counter((e.split, e.label) for e in examples)
    patients = Counter((split, label) for split, label, _ in {(e.split, e.label, e.group) for e in examples})
    lines = []
    for split, (wanted_slices, wanted_patients) in EXPECTED[config].items():
        for what, found, wanted in (
            ("slices", slices, wanted_slices),
            ("patients", patients, wanted_patients),
        ):
            have = tuple(found[split, label] for label in range(len(CLASSES)))
            scans = (*wanted[:2], wanted[2] - TWO_SCANS)
            if have == wanted or (config != "1" and (what, split, have) == ("patients", "train", scans)):
                continue
            lines.append(
                f"differs from the publication: {split} has {_counts(have)} {what} of {', '.join(CLASSES)}; "
                f"COVIDx CT-{config.upper()} has {_counts(wanted)}"
            )
    return lines or [f"all slices and patients per class are as published for COVIDx CT-{config.upper()}"]


def _counts(numbers: Sequence[int]) -> str:
    return " / ".join(f"{number:,}" for number in numbers)


def _label_file(source: Path, split: str, config: str) -> Path:
    version = config.upper()
    names = [
        f"{split}_COVIDx_CT-{version}.txt",
        f"{split}_COVIDx-CT-{version}.txt",
        f"{split}_COVIDx_CT.txt",
        f"{split}_COVIDx-CT.txt",
    ]
    found = [source / name for name in names if (source / name).is_file()]
    if not found:
        raise ValueError(f"{source}: no {split} label file; looked for {', '.join(names)}")
    return found[0]


def _image_folder(source: Path, config: str) -> Path:
    version = config.upper()
    names = [
        f"{version}_images",
        "images",
        f"COVIDx_CT-{version}",
        f"COVIDx-CT-{version}",
        "COVIDx-CT",
        "COVIDx_CT",
    ]
    found = [source / name for name in names if (source / name).is_dir()]
    if not found:
        raise ValueError(f"{source}: no image folder; looked for {', '.join(names)}")
    return found[0]
