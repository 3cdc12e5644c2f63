"""CSV files as exported by spreadsheets: optional byte order mark; commas, semicolons or tabs."""

import csv
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from lungjax.config import nearest
from lungjax.data.folder_walk import check_regular

DELIMITERS = ",;\t"


class Table(NamedTuple):
    """A CSV file with a header."""

    columns: tuple[str, ...]  # in the order of the file
    rows: list[tuple[str, dict[str, str]]]  # location, such as "labels.csv line 7", and values by column


def read_table(path: Path, required: Iterable[str] = ()) -> Table:
    """Reads a CSV file, skipping blank lines and stripping white space around names and values.

    The delimiter is the most frequent one outside quotes in the first line, which may also be Excel's "sep=;". Raises
    ValueError with the line number for a column of `required` that is missing or repeated, a row that does not match
    the header, malformed CSV, text that is not UTF-8, a file without rows, and a device or pipe; OSError for an
    unreadable file.
    """
    check_regular(path)
    with path.open(newline="", encoding="utf-8-sig") as file:
        try:
            first = file.readline()
            excel = first.startswith("sep=")
            delimiter = max(DELIMITERS, key=re.sub(r'"[^"]*"', "", first).count)
            if not excel:
                file.seek(0)
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            columns = tuple(name.strip() for name in next(reader, ()))
            for name in required:
                if columns.count(name) != 1:
                    problem = "appears twice" if name in columns else "is missing"
                    hint = nearest(name, [other for other in columns if other])
                    raise ValueError(f"{path.name} line 1: column {name} {problem}; {hint}")
            rows = []
            for values in reader:
                if not any(values):
                    continue
                place = f"{path.name} line {reader.line_num + excel}"
                if len(values) != len(columns):
                    raise ValueError(f"{place}: {len(values)} values, but the header has {len(columns)} columns")
                rows.append((place, dict(zip(columns, (value.strip() for value in values), strict=True))))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path.name} is not UTF-8 text ({error}): save it as CSV UTF-8") from None
        except csv.Error as error:
            raise ValueError(f"{path.name} line {reader.line_num + excel}: {error}") from None
    if not rows:
        raise ValueError(f"{path} has no rows")
    return Table(columns, rows)
