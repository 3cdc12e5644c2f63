"""Reads downloaded data sets: descriptions, paths regardless of case, lists, and groups from file names."""

import math
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from lungjax.data.folder_walk import list_files
from lungjax.data.imaging import images
from lungjax.datasets.listing import About, Example

Key = TypeVar("Key", str, Path)
ABOUT = tomllib.loads(Path(__file__).with_name("about.toml").read_text("utf-8"))
BLOCK_SIZE = 40  # consecutive file numbers in a block, as in about.toml: roughly the slices of one scan


def about(name: str) -> About:
    """Returns the description of a data set in about.toml."""
    return About(**ABOUT[name])


def find(source: Path, names: Sequence[str], what: str, hint: str = "") -> Path:
    """Returns the first path of `names` in `source`, ignoring case ("/" ends a folder). Raises ValueError if none."""
    for name in names:
        path: Path | None = source
        for part in Path(name).parts:
            path = _entry(path, part) if path else None
        if path and (path.is_dir() if name.endswith("/") else path.is_file()):
            return path
    raise ValueError(f"{source}: no {what}; looked for {', '.join(names)}{'; ' + hint if hint else ''}")


def list_images(folder: Path) -> list[str]:
    """Returns the sorted paths, relative with "/", of all image files below `folder` that are not hidden."""
    return [name for name in list_files(folder) if name.lower().endswith(images.SUFFIXES)]


def class_images(folder: Path, name: str) -> list[tuple[Path, str]]:
    """Returns (absolute path, path in its folder) of class `name`'s images, sorted. Raises ValueError if none."""
    inner = find(folder, (f"{name}/",), f"folder of class {name}")
    paths = [(inner / path, path) for path in list_images(inner)]
    if not paths:
        raise ValueError(f"{inner} has no image")
    return paths


def read_lines(path: Path) -> list[tuple[str, str]]:
    """Returns the nonempty lines of a text file, each with its location. Raises ValueError if there are none."""
    try:
        text = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is not UTF-8 text ({error})") from None
    lines = [(f"{path.name} line {i}", line.strip()) for i, line in enumerate(text, 1) if line.strip()]
    if not lines:
        raise ValueError(f"{path} is empty")
    return lines


def lookup(value: str, values: Mapping[str, str], what: str, where: str) -> str:
    """Returns `values[value]`. Raises ValueError with the location and the allowed values if it is missing."""
    if value not in values:
        raise ValueError(f"{where}: unknown {what} {value!r}; expected {', '.join(values)}")
    return values[value]


def compare_totals(examples: Sequence[Example], expected: Mapping[str, tuple[int, int]], name: str) -> list[str]:
    """Returns one line per split of `Example.study` whose images or patients differ from the published numbers."""
    lines = []
    for split, published in expected.items():
        groups = [example.group for example in examples if example.study == split]
        actual = (len(groups), len(set(groups)))
        if actual != published:
            ours, theirs = (f"{images:,} images of {patients:,} patients" for images, patients in (actual, published))
            lines.append(f"differs from the publication: {split} has {ours}; {name} has {theirs}")
    return lines


def block(stem: str) -> str:
    """Returns the block of BLOCK_SIZE consecutive numbers that contains the last number of a file name.

    "neg_81" and "neg_119" are in "neg_block2", since neighbors are nearly identical; no number: the name is a block.
    """
    match = re.search(r"(\d+)(\D*)$", stem)
    return f"{stem[: match.start()]}block{int(match.group(1)) // BLOCK_SIZE}" if match else stem


def runs(numbers: Mapping[Key, tuple[str, int]], gap: int, longest: float = math.inf) -> dict[Key, str]:
    """Returns the first name of the run of consecutive file numbers that contains each file, such as "pos_289".

    `numbers` are the prefix and number of each name. A run ends before `gap` missing numbers, or after `longest`.
    """
    result: dict[Key, str] = {}
    start = last = ("", 0)
    for name, key in sorted((name, key) for key, name in numbers.items()):
        if name[0] != last[0] or name[1] - last[1] > gap or name[1] - start[1] >= longest or not result:
            start = name
        result[key], last = f"{start[0]}{start[1]}", name
    return result


# The end of a name that distinguishes the figures of one paper or web page: b2, 003, Fig9c, day27, PA
_FIGURE = re.compile(
    r"[-_.](?:[a-z]\d?|\d{1,2}[a-z]?|0\d+|fig(?:ure)?\d*[a-z]?|f\d+[a-z]?|fx\d+|gr\d+[a-z]?|g\d+(?:mr\w+)?|case\d+[a-z]?|"
    r"day[-_]?\d+|\d+-(?:hours|days)|admission|left|right|pa|ap|lrg|html|webp|main|pdf|annot|original)$",
    re.IGNORECASE,
)
# Ids of cases, which are not shortened: UUIDs, hashes, and numbered cases of Radiopaedia and SIRM.
_CASE = re.compile(
    r"([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|[0-9a-f]{32}(?=-)|case_\d+|"
    r"(?:radiop\w+-)?covid-19-(?:(?!day-)[a-z]+-)+\d+(?!-(?:hours|days)))(?![0-9a-z])",
    re.IGNORECASE,
)


def web_case(stem: str) -> str:
    """Returns the case or paper of an image of the COVID-19 image data collection, from its file name.

    The end of a name distinguishes the figures of one paper, which may show several patients, so a group may be too
    large but is rarely too small. An id without a figure number is a separate case.
    """
    match = _CASE.match(stem)
    if match:
        return match.group(1)
    stem = re.sub(r"^(auntminnie)-[a-z]-", r"\1-", stem)
    while (shorter := _FIGURE.sub("", stem)) not in (stem, ""):
        stem = shorter
    return stem


def _entry(folder: Path, name: str) -> Path | None:
    exact = folder / name
    if exact.exists() or not folder.is_dir():
        return exact
    return next((folder / other for other in sorted(os.listdir(folder)) if other.lower() == name.lower()), None)
