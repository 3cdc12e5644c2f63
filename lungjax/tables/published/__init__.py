"""The results tables of the studies, as printed: `TABLES` by name, from tables.toml and cells.csv.

cells.csv has one row per cell: table, row, column, experiment (as for `--experiment`), metric, published and note.
`published` is the printed text, so that it can be checked against the source: ".966" and "96.6%" are 0.966 with three
digits, and "1" and "0" are 1.00 and 0.00 in reports with two digits. It is empty if the study printed no number.
"""

import csv
import tomllib
from decimal import Decimal, InvalidOperation
from importlib.resources import files
from typing import Any

from lungjax.tables.cells import Cell, Table

MIN_DECIMALS = 2  # of a report that prints 1.00 as 1


def parse_number(text: str) -> tuple[float | None, int]:
    """Returns the value of a printed rate in 0..1 or loss, and its decimal places. Raises ValueError for other text."""
    if not text:
        return None, MIN_DECIMALS
    try:
        digits = Decimal(text.removesuffix("%"))
    except InvalidOperation:
        raise ValueError(f"{text!r} is not a number: write .966 or 96.6%, or leave it empty") from None
    if text.endswith("%"):
        digits = digits.scaleb(-2)
    return float(digits), max(MIN_DECIMALS, -int(digits.as_tuple().exponent))


def read(cells_csv: str, tables_toml: str) -> dict[str, Table]:
    """Returns the tables by name from the text of both files. Raises ValueError for an invalid cell or table."""
    entries = tomllib.loads(tables_toml)
    cells: dict[str, list[Cell]] = {name: [] for name in entries["table"]}
    for line in csv.DictReader(cells_csv.splitlines()):
        if line["table"] not in cells:
            raise ValueError(f"cells.csv: table {line['table']!r} has no entry in tables.toml")
        own = {key: line[key] for key in ("row", "column", "experiment", "metric", "note")}
        published, decimals = parse_number(line["published"])
        cells[line["table"]].append(Cell(published=published, decimals=decimals, **own))
    tables = {}
    for name, entry in entries["table"].items():
        shared = entries["study"].get(entry.pop("study", ""), {"notes": []})
        fields: dict[str, Any] = dict(entry)
        fields["counts"] = {split: tuple(counts) for split, counts in entry.get("counts", {}).items()}
        fields["correlate"] = tuple(map(tuple, entry.get("correlate", ())))
        fields["notes"] = (*entry.get("notes", ()), *shared["notes"])
        fields.setdefault("matrices", shared.get("matrices", {}))
        tables[name] = Table(name=name, cells=tuple(cells[name]), **fields)
    return tables


_FOLDER = files(__name__)
TABLES = read((_FOLDER / "cells.csv").read_text("utf-8"), (_FOLDER / "tables.toml").read_text("utf-8"))
