"""What a results table of a study is: cells with a published number, each of one experiment and one metric.

A module of `lungjax.tables.published` makes `Table`s of `Cell`s; nothing here imports jax. The usual table gives
each cell its own experiment:

    Cell("original, baseline", "Simple", "ct_cov19:model=simple,images=original,protocol=study",
         "val.slice.f1_weighted", 0.778)

A published number is as printed, a rate in 0..1 or a loss; `decimals` is how many digits were printed, which is the
slack that a comparison gets. Several cells may name one experiment, for several metrics: they share its runs.

**Metrics** are paths into a report without "per run": SPLIT.UNIT.NAME with SPLIT "val" or "test", UNIT "slice" or
"patient", and NAME a level's dotted name: "test.slice.accuracy", "val.slice.f1_weighted",
"test.slice.study.auc_micro_logits", "test.slice.per_class.COV.recall", "test.patient.auc_macro".

**Tables that choose.** With `chosen_from="ct_cov19_val"` a cell's runs are not those of its own `experiment` (that
is the one which the study chose, shown beside) but of the best one, by our runs, among the candidates: the cells
of that table whose row or column is this cell's row. Best is the highest mean of the candidate's own metric. So

    Table("ct_cov19_test", ..., chosen_from="ct_cov19_val", correlate=(("Val F1", "Test F1"),), cells=(
        Cell("Simple", "Val F1", "ct_cov19:model=simple,...,protocol=study", "val.slice.f1_weighted", 0.810),
        Cell("Simple", "Test F1", "ct_cov19:model=simple,...,protocol=study", "test.slice.f1_weighted", 0.582),
        ...))

gives for each network the val and test score of the configuration that is best on val. `correlate` names pairs of
columns whose Spearman rank correlation over the rows is given, of the published numbers and of ours.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from lungjax import config as configs

SPLITS = ("val", "test")
UNITS = ("slice", "patient")
CHARTS = ("bars", "confusions", "curves")
POOLINGS = ("micro", "macro", "micro_logits")


@dataclass(frozen=True)
class Cell:
    """One number of a study, and the run that answers it."""

    row: str
    column: str
    experiment: str  # what --experiment names, without the seed
    metric: str  # SPLIT.UNIT.NAME
    published: float | None  # as printed; None where the study gives no number for a run that belongs here
    decimals: int = 3  # digits after the point as printed
    note: str = ""  # one sentence, printed below the table

    def __post_init__(self) -> None:
        """Raises ValueError for a metric that is no path, and for a published number that is no rate."""
        where = f"{self.row}, {self.column}"
        parts = self.metric.split(".", 2)
        if len(parts) < 3 or parts[0] not in SPLITS or parts[1] not in UNITS:
            raise ValueError(
                f"{where}: metric {self.metric!r} is not SPLIT.UNIT.NAME, such as test.slice.accuracy, with SPLIT of "
                f"{', '.join(SPLITS)} and UNIT of {', '.join(UNITS)}"
            )
        most = float("inf") if self.name == "loss" else 1.0
        if self.published is not None and not 0 <= self.published <= most:
            raise ValueError(f"{where}: published {self.published}: rates are written in 0..1")

    @property
    def split(self) -> str:
        """Returns "val" or "test"."""
        return self.metric.split(".")[0]

    @property
    def unit(self) -> str:
        """Returns "slice" or "patient"."""
        return self.metric.split(".")[1]

    @property
    def name(self) -> str:
        """Returns the metric's name within its level, such as "per_class.COV.recall"."""
        return self.metric.split(".", 2)[2]

    @property
    def slack(self) -> float:
        """Returns half a unit of the last printed digit: how far rounding can have moved the published number."""
        return 0.5 * 10.0**-self.decimals


@dataclass(frozen=True)
class Table:
    """A results table of a study."""

    name: str  # of --table
    title: str
    source: str  # where it was published
    cells: tuple[Cell, ...]
    # Images per class, in label order, of the study's splits: {"val": (908, 388, 45)}. A run on other counts is on
    # other data, and its number is not shown.
    counts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    elsewhere: str = ""  # why the published numbers are of another data set; then no verdict is given
    notes: tuple[str, ...] = ()  # sentences below the table
    charts: tuple[str, ...] = ()  # of CHARTS
    # One of POOLINGS, of the charts "curves": all example-class pairs as one problem, the mean of the classes' curves,
    # or the pairs' raw logits as one problem.
    pooling: str = "micro"
    chosen_from: str = ""  # the table whose best configuration is scored here; see the module's docstring
    correlate: tuple[tuple[str, str], ...] = ()  # pairs of columns; see the module's docstring

    def __post_init__(self) -> None:
        """Raises ValueError for a place with two cells, an unknown chart, split or column."""
        places = [(cell.row, cell.column) for cell in self.cells]
        twice = sorted({place for place in places if places.count(place) > 1})
        if twice:
            raise ValueError(f"table {self.name}: two cells at {twice[0][0]}, {twice[0][1]}")
        for what, given, known in (
            ("charts", self.charts, CHARTS),
            ("pooling", [self.pooling], POOLINGS),
            ("counts", self.counts, SPLITS + ("train",)),
            ("correlate", [column for pair in self.correlate for column in pair], self.columns),
        ):
            for name in given:
                if name not in known:
                    raise ValueError(f"table {self.name}: {what}: unknown {name!r}; {configs.nearest(name, known)}")

    @property
    def rows(self) -> tuple[str, ...]:
        """Returns the rows' names, as they come."""
        return tuple(dict.fromkeys(cell.row for cell in self.cells))

    @property
    def columns(self) -> tuple[str, ...]:
        """Returns the columns' names, as they come."""
        return tuple(dict.fromkeys(cell.column for cell in self.cells))


def candidates(table: Table, cell: Cell, tables: Mapping[str, Table]) -> tuple[Cell, ...]:
    """Returns the cells whose experiments a cell may be scored with: itself, or those that it is chosen from.

    Raises ValueError if the table that it is chosen from is not there, or has no row or column of that name.
    """
    if not table.chosen_from:
        return (cell,)
    if table.chosen_from not in tables:
        raise ValueError(
            f"table {table.name}: chosen_from={table.chosen_from!r} is no table; "
            f"{configs.nearest(table.chosen_from, tables)}"
        )
    found = tuple(other for other in tables[table.chosen_from].cells if cell.row in (other.row, other.column))
    if not found:
        raise ValueError(f"table {table.name}: {table.chosen_from} has no row or column {cell.row!r} to choose from")
    return found


def experiments(table: Table, tables: Mapping[str, Table]) -> list[str]:
    """Returns the experiments that a table's numbers come from, each once, in order. Raises as `candidates`."""
    return list(dict.fromkeys(one.experiment for cell in table.cells for one in candidates(table, cell, tables)))
