"""The results tables of the studies: cells of published numbers, see published/tables.toml. Imports no jax."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lungjax import config as configs

SPLITS = ("val", "test")
METRIC = re.compile(
    r"(?=[^@]*$|val\.\w+\.\w+@)(?P<split>val|test)\.(?P<unit>slice|patient)\.(?P<name>[^@/]+)"
    r"(@(?P<validation>[1-9]\d*)|/(?P<size>[1-9]\d*))?"
)
CHARTS = ("bars", "confusions", "curves")


@dataclass(frozen=True)
class Cell:
    """One published number, and the experiment that reproduces it."""

    row: str
    column: str
    experiment: str  # as --experiment takes it, without the seed
    metric: str  # SPLIT.UNIT.NAME, or SPLIT.UNIT.NAME/SIZE for random draws of SIZE examples
    published: float | None  # None if the study printed no number
    decimals: int = 3  # printed digits after the decimal point
    note: str = ""  # one sentence below the table
    # The parts of `metric`: SPLIT, UNIT, NAME, the number of a validation (0: of the tested weights), SIZE (0: all).
    split: str = field(init=False)
    unit: str = field(init=False)
    name: str = field(init=False)
    validation: int = field(init=False)
    size: int = field(init=False)

    def __post_init__(self) -> None:
        """Sets the parts of `metric`. Raises ValueError for an invalid metric or published number."""
        where = f"{self.row}, {self.column}"
        if not (match := METRIC.fullmatch(self.metric)):
            allowed = "SPLIT.UNIT.NAME[/SIZE] (SPLIT: val or test; UNIT: slice or patient) or val.UNIT.NAME@VALIDATION"
            raise ValueError(f"{where}: metric {self.metric!r}: expected {allowed}")
        numbers = {name: int(match[name] or 0) for name in ("validation", "size")}
        vars(self).update(match.groupdict() | numbers)
        limit = float("inf") if self.name == "loss" else 1.0
        if self.published is not None and not 0 <= self.published <= limit:
            raise ValueError(f"{where}: published {self.published}: a rate must be in 0..1")

    @property
    def slack(self) -> float:
        """Returns half a unit of the last printed digit, the largest rounding error of the published number."""
        return 0.5 * 10.0**-self.decimals


@dataclass(frozen=True)
class Table:
    """A results table of a study."""

    name: str  # of --table
    title: str
    source: str  # where it was published
    cells: tuple[Cell, ...]
    # Images per class, in label order, of the study's splits, such as {"val": (908, 388, 45)}. A run with other counts
    # used other data and does not count.
    counts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    max_missing: float = 0.0  # share of a class in `counts` that an incomplete copy may lack; the cells state how many
    # Published confusion matrices by row; each has one row per true class.
    matrices: Mapping[str, Sequence[Sequence[int]]] = field(default_factory=dict)
    elsewhere: str = ""  # how the data of the published numbers differ; if set, only draws of SIZE have verdicts
    notes: tuple[str, ...] = ()  # sentences below the table
    charts: tuple[str, ...] = ()  # of CHARTS
    chosen_from: str = ""  # the table whose best configuration is scored; see the module's docstring
    correlate: tuple[tuple[str, str], ...] = ()  # pairs of columns; see the module's docstring

    def __post_init__(self) -> None:
        """Raises ValueError for duplicate cells, or an unknown chart, split, row or column."""
        for place, n in Counter((cell.row, cell.column) for cell in self.cells).items():
            if n > 1:
                raise ValueError(f"table {self.name}: two cells in {place[0]}, {place[1]}")
        for what, given, known in (
            ("charts", self.charts, CHARTS),
            ("counts", self.counts, SPLITS + ("train",)),
            ("matrices", self.matrices, self.rows),
            ("correlate", [column for pair in self.correlate for column in pair], self.columns),
        ):
            for name in given:
                if name not in known:
                    raise ValueError(f"table {self.name}: {what}: unknown {name!r}; {configs.nearest(name, known)}")

    @property
    def rows(self) -> tuple[str, ...]:
        """Returns the names of the rows in order."""
        return tuple(dict.fromkeys(cell.row for cell in self.cells))

    @property
    def columns(self) -> tuple[str, ...]:
        """Returns the names of the columns in order."""
        return tuple(dict.fromkeys(cell.column for cell in self.cells))


def candidates(table: Table, cell: Cell, tables: Mapping[str, Table]) -> tuple[Cell, ...]:
    """Returns the cell or, with `chosen_from`, its candidates in that table. Raises ValueError if there are none."""
    if not table.chosen_from:
        return (cell,)
    matches = tuple(other for other in tables[table.chosen_from].cells if cell.row in (other.row, other.column))
    if not matches:
        raise ValueError(f"table {table.name}: {table.chosen_from} has no row or column {cell.row!r} to choose from")
    return matches


def experiments(table: Table, tables: Mapping[str, Table]) -> list[str]:
    """Returns the distinct experiments of a table, in order. Raises the errors of `candidates`."""
    return list(dict.fromkeys(one.experiment for cell in table.cells for one in candidates(table, cell, tables)))
