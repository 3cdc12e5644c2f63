"""Cells from numbers as they were printed, so that a table's module can be held against the page it came from.

A number is a string: ".966" or "0.966" is 0.966 of 3 digits, "96.6%" is 0.966 of 3 digits, "1" and "0" are 1 and 0
of `LEAST` digits, which is what the studies' reports round to. "-" stands where nothing was printed. Several numbers
stand in one string with "/" between them; "%" at its end is of all of them.
"""

from collections.abc import Sequence
from decimal import Decimal, InvalidOperation

from lungjax.tables.cells import Cell

LEAST = 2  # digits after the point of a report that prints 1.00 and not 1
RATES = ("precision", "recall", "f1")  # the order of a classification report
SHOWN = {"f1": "F1", "auc": "AUC", "average_precision": "AP", "npv": "NPV"}  # in a column's name


def number(text: str) -> tuple[float | None, int]:
    """Returns a printed number's value, a rate in 0..1 or a loss, and its digits after the point.

    Raises ValueError for what is no number.
    """
    if text == "-":
        return None, LEAST
    try:
        digits = Decimal(text.removesuffix("%"))
    except InvalidOperation:
        raise ValueError(f"{text!r} is no printed number: write .966, 96.6% or -") from None
    if text.endswith("%"):
        digits = digits.scaleb(-2)
    return float(digits), max(LEAST, -int(digits.as_tuple().exponent))


def several(text: str) -> list[str]:
    """Returns the numbers of a string such as ".77/.87/.82" or "98.5/81.2/89.0%", each by itself."""
    percent = "%" if text.endswith("%") else ""
    return [part + percent for part in text.removesuffix("%").split("/")]


def cell(row: str, column: str, experiment: str, metric: str, printed: str = "-", note: str = "") -> Cell:
    """Returns the cell of one printed number."""
    published, decimals = number(printed)
    return Cell(row, column, experiment, metric, published, decimals, note)


def line(
    row: str, experiment: str, columns: Sequence[tuple[str, str]], printed: str, note: str = ""
) -> tuple[Cell, ...]:
    """Returns a row of cells: `columns` are pairs of name and metric, `printed` their numbers with "/" between.

    Raises ValueError if there are not as many numbers as columns.
    """
    parts = several(printed)
    if len(parts) != len(columns):
        raise ValueError(f"{row}: {printed!r} has {len(parts)} numbers for {len(columns)} columns")
    return tuple(
        cell(row, name, experiment, metric, part, note) for (name, metric), part in zip(columns, parts, strict=True)
    )


def columns(name: str, level: str, rates: Sequence[str] = RATES) -> list[tuple[str, str]]:
    """Returns the columns of one class for `line`: "CLASS RATE" and its metric; `level` is such as "val.slice"."""
    return [(f"{name} {SHOWN.get(rate, rate)}", f"{level}.per_class.{name}.{rate}") for rate in rates]


def report(
    row: str,
    experiment: str,
    level: str,
    classes: Sequence[str],
    printed: Sequence[str],
    rates: Sequence[str] = RATES,
) -> tuple[Cell, ...]:
    """Returns the cells of a classification report's classes: `printed` has one string of `rates` a class.

    `level` is SPLIT.UNIT, such as "val.slice"; the columns are named "CLASS RATE".
    """
    return tuple(
        made
        for name, text in zip(classes, printed, strict=True)
        for made in line(row, experiment, columns(name, level, rates), text)
    )
