"""`metrics.jsonl`: one JSON object a line, appended as the run goes, first host only."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lungjax.runtime.files import atomic_write


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Adds one row and hands it to the operating system, so that a killed run keeps it."""
    with path.open("a") as file:
        file.write(json.dumps(dict(row)) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """Returns the rows; a last line cut short by a crash is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def rewind(path: Path, step: int) -> list[dict[str, Any]]:
    """Drops rows past `step`, which a resumed run will write again, and returns the kept ones."""
    rows = [row for row in read(path) if row["step"] <= step]
    atomic_write(path, "".join(json.dumps(row) + "\n" for row in rows))
    return rows
