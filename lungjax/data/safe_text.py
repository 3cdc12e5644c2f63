"""Text from users, such as names of files and classes, made safe for terminals, spreadsheets and file systems.

An exported model.pyz contains this module, so it imports only the standard library.
"""

import re
from collections.abc import Iterable
from typing import Any

# Control characters, line separators and changes of the writing direction: terminals obey them, readers don't see them.
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
FORMULA = re.compile(r"'*[=+\-@]")  # beginning of a cell that a spreadsheet executes, or one that `csv_row` has guarded
MAX_BYTES = 200  # of a file name without the endings that are appended; file systems allow 255


def printable(text: str, keep: str = "") -> str:
    r"""Returns `text` with its control characters, except those in `keep`, as escapes such as \r or \x1b."""
    return CONTROL.sub(lambda match: match[0] if match[0] in keep else ascii(match[0])[1:-1], text)


def check_printable(text: str, where: str) -> None:
    """Raises ValueError for a name with control characters."""
    if CONTROL.search(text):
        raise ValueError(f"{where}: the name {printable(text)} contains control characters; rename it")


def csv_row(values: Iterable[Any]) -> list[Any]:
    """Returns the cells of a CSV row. A text that a spreadsheet would execute as a formula gets an apostrophe in front.

    `csv_text` removes it. Numbers, also as text, are unchanged; control characters except newlines are escaped.
    """
    return [_cell(value) if isinstance(value, str) else value for value in values]


def csv_text(cell: str) -> str:
    """Returns the text from which `csv_row` made a cell."""
    return cell[1:] if cell.startswith("'") and FORMULA.match(cell) else cell


def cut(name: str) -> str:
    """Returns the beginning of a file name that leaves space for endings."""
    data = name.encode("utf-8", "surrogateescape")
    return name if len(data) <= MAX_BYTES else data[:MAX_BYTES].decode("utf-8", "ignore")


def _cell(text: str) -> str:
    text = printable(text, keep="\n")
    if not FORMULA.match(text):
        return text
    try:
        float(text)
    except ValueError:
        return f"'{text}"
    return text
