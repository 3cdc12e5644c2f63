"""Finds duplicates in a data set, removes them from the clean protocol, and counts them in the study's splits."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lungjax.data import duplicates, leakage, prepared, splits
from lungjax.data.prepared import Prepared
from lungjax.datasets import resolve
from lungjax.datasets.listing import Example, Listing

FILE = "near.csv"  # next to index.csv: the near duplicates of different groups, one pair per line


def search(
    examples: Sequence[Example], columns: Mapping[str, Sequence[str]], listing: Listing, thumbnails: np.ndarray
) -> tuple[np.ndarray, list[str], list[str], dict[str, Any]]:
    """Detects exact copies and near duplicates in the columns of an index, and computes their effect on each protocol.

    `thumbnails`, uint8 [N, duplicates.SIDE, duplicates.SIDE], stand in for the images. Returns the near duplicates in
    different groups as rows, int64 [P, 2]; the clean split of each row, "" for removed ones; notes; and the summary.
    """
    files, groups, pixels, labels = (columns[key] for key in ("file", "group", "pixels", "label"))
    hashes = np.asarray([int(text, 16) for text in columns["phash"]], np.uint64)
    twins = duplicates.near_twins(hashes, groups, pixels, thumbnails.__getitem__)
    starts, numbers = [e.split for e in examples], [e.label for e in examples]
    clean, notes = leakage.clean(starts, numbers, groups, pixels, twins.pairs, listing.group_name)
    if twins.note:
        notes.insert(0, twins.note)
    cells = {"study": columns["split_study"]} if listing.study else {}
    summary: dict[str, Any] = {"near_pairs": len(twins.pairs), "left_out": clean.count(""), "leaks": {}}
    for name, column in (cells | {"clean": clean}).items():
        parsed = [splits.parse_study(cell) for cell in column]
        members = {split: [i for i, parts in enumerate(parsed) if split in parts] for split in splits.SPLITS}
        leaks = leakage.leaks(members, groups, pixels, twins.pairs)
        summary["leaks"][name] = leaks
        notes += leakage.leak_notes(leaks, f"protocol={name}", listing.group_name)
        summary.setdefault("pairs", leakage.pairs_named(members, files, labels, pixels, twins.pairs))
    return twins.pairs, clean, notes, summary


def write(pairs: np.ndarray, files: Sequence[str], directory: Path) -> None:
    """Writes near duplicates, rows int64 [P, 2], into `directory`."""
    with (directory / FILE).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["file", "twin"])
        writer.writerows([files[i], files[j]] for i, j in pairs.tolist())


def read(data: Prepared, data_dir: Path) -> np.ndarray:
    """Returns the near duplicates of a prepared data set as rows, int64 [P, 2]."""
    row = {file: i for i, file in enumerate(data.columns["file"].tolist())}
    with (prepared.directory(data_dir, data.name) / FILE).open(newline="", encoding="utf-8") as file:
        pairs = [[row[a], row[b]] for a, b in list(csv.reader(file))[1:]]
    return np.asarray(pairs, np.int64).reshape(-1, 2)


def cross(one: Prepared, other: Prepared) -> str:
    """Returns, as Markdown, the patients and images in both data sets. Raises ValueError if either is a stage."""
    for data in (one, other):
        if resolve(data.name)[0].stage:
            raise ValueError(f"--cross compares complete images, but {data.name} is a stage; omit the stage")
    shared = leakage.cross(one, other)
    lines = [f"# {one.name} and {other.name}", "", *(f"- {line}" for line in shared["lines"])]
    return "\n".join([*lines, *(f"  - {pair}" for pair in shared["examples"])]) + "\n"
