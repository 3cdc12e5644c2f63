"""`metrics.jsonl`: one JSON object per line, appended during training on the first host."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lungjax.runtime.files import atomic_write


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Appends one row and closes the file, so that the row survives a kill of the process."""
    with path.open("a") as file:
        file.write(json.dumps(dict(row)) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """Returns the rows, without a last line that a crash truncated."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def rewind(path: Path, step: int) -> list[dict[str, Any]]:
    """Drops rows after `step`, which a resumed run writes again, and returns the others."""
    rows = [row for row in read(path) if row["step"] <= step]
    atomic_write(path, "".join(json.dumps(row) + "\n" for row in rows))
    return rows
