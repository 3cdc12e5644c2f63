"""What is read of a downloaded data set's folder: files in any letter case, tables, lists, and groups by file name."""

import csv
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from lungjax.config import nearest
from lungjax.data.imaging import images
from lungjax.datasets import PrepareOptions
from lungjax.datasets.listing import Example

BLOCK = 40  # consecutive file numbers in a block: about a scan's slices, as they were picked for these data sets


def refuse_flags(options: PrepareOptions, name: str) -> None:
    """Raises ValueError for an option that only folders of one's own take."""
    for flag in options.for_folders():
        raise ValueError(f"{flag} is for folders: {name} has its own groups, sources and classes; leave it out")


def find(source: Path, names: Sequence[str], what: str, hint: str = "") -> Path:
    """Returns the first of `names` (relative paths, "." for the source itself; a final "/" asks for a folder).

    Letter case does not matter. Raises ValueError with the names looked for if none is there.
    """
    for name in names:
        path: Path | None = source
        for part in Path(name).parts:
            path = _entry(path, part) if path else None
        if path and (path.is_dir() if name == "." or name.endswith("/") else path.is_file()):
            return path
    raise ValueError(f"{source}: no {what}; looked for {', '.join(names)}{'; ' + hint if hint else ''}")


def folders(source: Path) -> list[str]:
    """Returns the names of the folders directly in `source`, sorted, without hidden ones."""
    return sorted(entry.name for entry in os.scandir(source) if entry.is_dir() and not _hidden(entry.name))


def pictures(folder: Path) -> list[str]:
    """Returns all image files below `folder`, relative with "/", sorted, without hidden ones."""
    found = []
    for where, inner, files in os.walk(folder, followlinks=True):
        inner[:] = [name for name in inner if not _hidden(name)]
        base = os.path.relpath(where, folder)
        for name in files:
            if not _hidden(name) and name.lower().endswith(images.SUFFIXES):
                found.append(name if base == "." else f"{base}/{name}".replace(os.sep, "/"))
    return sorted(found)


def table(path: Path, columns: Iterable[str]) -> list[tuple[str, dict[str, str]]]:
    """Returns the rows of a CSV file, each with its place, such as "labels.csv line 7".

    The header may have further columns, also nameless ones. Raises ValueError for a lacking or repeated column of
    `columns`, a malformed line, or text that is not UTF-8.
    """
    rows = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            header = [name.strip() for name in next(reader, [])]
            for name in columns:
                if header.count(name) != 1:
                    what = f"no column {name}" if name not in header else f"column {name} is there twice"
                    known = [other for other in header if other]
                    raise ValueError(f"{path.name} line 1: {what}; {nearest(name, known)}")
            for values in reader:
                where = f"{path.name} line {reader.line_num}"
                if not any(values):
                    continue
                if len(values) != len(header):
                    raise ValueError(f"{where}: {len(values)} values, but the header has {len(header)} columns")
                rows.append((where, dict(zip(header, (value.strip() for value in values), strict=True))))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is not UTF-8 text ({error}): save it as UTF-8") from None
    except csv.Error as error:
        raise ValueError(f"{path.name} line {reader.line_num}: {error}") from None
    if not rows:
        raise ValueError(f"{path} has no row")
    return rows


def lines(path: Path) -> list[tuple[str, str]]:
    """Returns the lines of a text file that are not empty, each with its place. Raises ValueError if there is none."""
    try:
        text = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is not UTF-8 text ({error})") from None
    found = [(f"{path.name} line {i}", line.strip()) for i, line in enumerate(text, 1) if line.strip()]
    if not found:
        raise ValueError(f"{path} is empty")
    return found


def choose(value: str, known: Mapping[str, str], what: str, where: str) -> str:
    """Returns `known[value]`. Raises ValueError with the place and the allowed values for another `value`."""
    if value not in known:
        raise ValueError(f"{where}: unknown {what} {value!r}; allowed are {', '.join(known)}")
    return known[value]


def check_unique(examples: Sequence[Example]) -> None:
    """Raises ValueError for a file that is named twice, with both places."""
    first: dict[str, str] = {}
    for example in examples:
        if example.file in first:
            raise ValueError(f"{example.where}: {example.file} is already in {first[example.file]}")
        first[example.file] = example.where


def block(stem: str, size: int = BLOCK) -> str:
    """Returns the block of `size` consecutive numbers that the last number of a file name falls in.

    Slices that follow each other are nearly one picture; numbered files of an unknown patient therefore stay together
    in blocks. "neg_81" and "neg_119" give "neg_block2"; a name without a number is its own block.
    """
    match = re.search(r"(\d+)(\D*)$", stem)
    return f"{stem[: match.start()]}block{int(match.group(1)) // size}" if match else stem


# How a figure of a paper or web page is told from its neighbours, at the end of a name: b2, 003, Fig9c, day27, PA ...
_FIGURE = re.compile(
    r"[-_.](?:[a-z]\d?|\d{1,2}[a-z]?|0\d+|fig(?:ure)?\d*[a-z]?|f\d+[a-z]?|fx\d+|gr\d+[a-z]?|g\d+(?:mr\w+)?|case\d+[a-z]?|"
    r"day[-_]?\d+|\d+-(?:hours|days)|admission|left|right|pa|ap|lrg|html|webp|main|pdf|annot|original)$",
    re.IGNORECASE,
)
# Names that hold an id of the case, which must not be cut: a UUID or hash, and numbered cases of Radiopaedia and SIRM.
_CASE = re.compile(
    r"([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|[0-9a-f]{32}(?=-)|case_\d+|"
    r"(?:radiop\w+-)?covid-19-(?:(?!day-)[a-z]+-)+\d+(?!-(?:hours|days)))(?![0-9a-z])",
    re.IGNORECASE,
)


def web_case(stem: str) -> str:
    """Returns the case, or the paper, that a picture of the COVID-19 image data collection is of, by its file name.

    The collection's names end in what tells the figures of one paper apart. A paper may show several patients, so
    this keeps too much together rather than too little; an id without a figure number is its own case.
    """
    match = _CASE.match(stem)
    if match:
        return match.group(1)
    stem = re.sub(r"^(auntminnie)-[a-z]-", r"\1-", stem)
    while True:
        shorter = _FIGURE.sub("", stem)
        if shorter == stem or not shorter:
            return stem
        stem = shorter


def stem_of(file: str) -> str:
    """Returns the last part of a path without its suffix."""
    return os.path.splitext(file.rpartition("/")[2])[0]


def _entry(folder: Path, name: str) -> Path | None:
    exact = folder / name
    if exact.exists() or not folder.is_dir():
        return exact
    return next((folder / other for other in sorted(os.listdir(folder)) if other.lower() == name.lower()), None)


def _hidden(name: str) -> bool:
    return name.startswith((".", "__MACOSX"))
