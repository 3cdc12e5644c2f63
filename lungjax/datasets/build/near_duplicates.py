"""Images that a data set holds twice: found among its rows, taken out of the clean protocol, counted in the study's."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lungjax.data import duplicates, prepared, leakage, splits
from lungjax.data.imaging import images
from lungjax.data.prepared import Prepared
from lungjax.datasets import resolve
from lungjax.datasets.listing import Example, Listing

FILE = "near.csv"  # beside index.csv: the near twins of different groups, a line each


@dataclass(frozen=True)
class Twins:
    """What `search` found; rows are places in the index."""

    near: np.ndarray  # int64 [P, 2], rows of near twins in different groups
    clean: list[str]  # split of each row, "" for left out
    notes: list[str]
    told: dict[str, Any]  # for the summary


def search(
    examples: Sequence[Example], columns: Mapping[str, Sequence[str]], listing: Listing, thumbnails: np.ndarray
) -> Twins:
    """Finds exact copies and near twins among the columns of an index, and what that means for each protocol.

    `thumbnails`, uint8 [N, duplicates.SIDE, duplicates.SIDE], spare reading the images once more.
    """
    files, groups, pixels, labels = (columns[key] for key in ("file", "group", "pixels", "label"))
    hashes = np.asarray([int(text, 16) for text in columns["phash"]], np.uint64)
    found = duplicates.near_twins(hashes, groups, pixels, thumbnails.__getitem__)
    numbers = [example.label for example in examples]
    clean, notes = leakage.clean(
        [e.split for e in examples], numbers, groups, pixels, found.pairs, listing.group_name
    )
    cells: dict[str, Sequence[str]] = {"study": columns["split_study"]} if listing.study else {}
    cells["clean"] = clean
    told: dict[str, Any] = {"near_pairs": len(found.pairs), "left_out": clean.count(""), "leaks": {}}
    for name, column in cells.items():
        members = {split: _members(column, split).tolist() for split in splits.SPLITS}
        leaks = leakage.leaks(members, groups, pixels, found.pairs)
        told["leaks"][name] = leaks
        notes = [*notes, *leakage.leak_notes(leaks, f"protocol={name}", listing.group_name)]
        told.setdefault("pairs", leakage.pairs_named(members, files, labels, pixels, found.pairs))
    return Twins(found.pairs, clean, [*filter(None, [found.note]), *notes], told)


def _members(cells: Sequence[str], split: str) -> np.ndarray:
    holds = {cell: split in splits.parse_study(cell) for cell in set(cells)}
    return np.flatnonzero([holds[cell] for cell in cells])


def write(found: Twins, files: Sequence[str], directory: Path) -> None:
    """Writes the near twins into `directory`."""
    with (directory / FILE).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["file", "twin"])
        writer.writerows([files[i], files[j]] for i, j in found.near.tolist())


def read(data: Prepared, data_dir: Path) -> np.ndarray:
    """Returns the near twins of a prepared data set as rows, int64 [P, 2]."""
    place = {file: i for i, file in enumerate(data.columns["file"].tolist())}
    with (prepared.directory(data_dir, data.name) / FILE).open(newline="", encoding="utf-8") as file:
        pairs = [[place[a], place[b]] for a, b in list(csv.reader(file))[1:]]
    return np.asarray(pairs, np.int64).reshape(-1, 2)


def cross(one: Prepared, other: Prepared) -> str:
    """Returns, as markdown, the patients and images that two prepared data sets share.

    Raises ValueError for a stage, which hides what there is to compare.
    """
    for data in (one, other):
        if resolve(data.name)[0].stage:
            raise ValueError(f"--cross compares whole images, and {data.name} is a stage: give it without")
    found = leakage.cross(side(one), side(other))
    lines = [f"# {one.name} and {other.name}", "", *(f"- {line}" for line in found["lines"])]
    return "\n".join([*lines, *(f"  - {pair}" for pair in found["examples"])]) + "\n"


def side(data: Prepared, rows: np.ndarray | None = None) -> leakage.Side:
    """Returns what `leakage.cross` compares of a prepared data set: all of it, or some of its `rows` [n]."""
    rows = np.arange(len(data.columns["file"])) if rows is None else rows
    files, groups, pixels = (data.columns[key][rows].tolist() for key in ("file", "group", "pixels"))

    def read(place: int) -> np.ndarray:
        return images.gray(images.decode(data.records[int(rows[place])]["image"], data.window))

    return leakage.Side(data.name, files, groups, pixels, data.columns["phash"][rows], read)
