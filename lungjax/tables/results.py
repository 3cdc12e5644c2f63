"""A table with our numbers, read from finished runs and compared with the published ones.

Our number is the mean over the seeds, with a 95 % interval by bootstrap over patients and seeds
(`bootstrap.over_runs`). The published number is "inside" the interval, or ours is "above" or "below" the published one.
A difference of half a unit in the last printed digit is tolerated.
"""

import csv
import io
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lungjax.evaluation import bootstrap
from lungjax.evaluation.predictions import Predictions
from lungjax.report import templating
from lungjax.runtime.files import atomic_write
from lungjax.tables import cells, runs
from lungjax.tables.cells import Cell, Table
from lungjax.tables.runs import Options, Run, State

NOT_RUN = "not run"
VERDICTS = ("inside", "above", "below")
CSV_COLUMNS = (
    "row", "column", "metric", "published", "ours", "low", "high", "seeds", "difference", "verdict", "state", "reason",
    "chosen", "command",
)  # fmt: skip
Value = tuple[float | None, float | None, float | None]  # mean over the seeds, low, high


@dataclass(frozen=True)
class Group:
    """The runs of one experiment, one per seed."""

    experiment: str
    runs: tuple[Run, ...]  # () if the experiment can't be loaded
    states: tuple[State, ...]
    predictions: Mapping[str, tuple[Predictions, ...]]  # of the finished runs, by split

    @property
    def finished(self) -> bool:
        """Returns whether every seed is finished."""
        return bool(self.runs) and all(state.kind == "finished" for state in self.states)


@dataclass(frozen=True)
class Result:
    """A cell and our number for it."""

    cell: Cell
    group: Group  # the runs of the number
    state: str  # "finished", or why the number is missing or not final
    reason: str = ""  # the details; if finished, the images that the data lack
    ours: float | None = None
    low: float | None = None
    high: float | None = None
    verdict: str = ""  # one of VERDICTS, or ""
    commands: tuple[str, ...] = ()  # of the missing runs
    chosen: Cell | None = None  # the best candidate, in a table with `chosen_from`

    @property
    def difference(self) -> float | None:
        """Returns our number minus the published one."""
        return None if self.ours is None or self.cell.published is None else self.ours - self.cell.published


class Reader:
    """Reads each run folder of a table once."""

    def __init__(self, table: Table, options: Options, draws: int = 2000, failures: Mapping[str, str] | None = None):
        """`failures` are the errors of `run_missing`, by command line."""
        self._table, self._options, self._draws = table, options, draws
        self._failures = failures or {}
        self._groups: dict[str, Group] = {}
        self._levels: dict[tuple[str, str, str, int], dict[str, Value]] = {}

    def group(self, experiment: str) -> Group:
        """Returns the runs of an experiment with their states and predictions."""
        if experiment not in self._groups:
            self._groups[experiment] = self._read(experiment)
        return self._groups[experiment]

    def _read(self, experiment: str) -> Group:
        try:
            planned = runs.plan(experiment, self._options)
        except (ValueError, ImportError, SyntaxError) as error:
            return Group(experiment, (), (State("unusable", str(error)),), {})
        table = self._table
        found = [runs.check(run, self._options.data_dir, table.counts, table.max_missing) for run in planned]
        states = runs.agree(found)
        predictions: list[list[Predictions]] = []  # of each finished run, by split
        for i, (run, state) in enumerate(zip(planned, states, strict=True)):
            if state.report is not None:
                try:
                    predictions.append([runs.read_predictions(run, state.report, split) for split in cells.SPLITS])
                except (ValueError, KeyError) as error:
                    states[i] = State("damaged", str(error))
        by_split = {split: tuple(own[i] for own in predictions) for i, split in enumerate(cells.SPLITS)}
        return Group(experiment, planned, tuple(states), by_split)

    def _level(self, group: Group, cell: Cell) -> dict[str, Value]:
        """Returns `bootstrap.over_runs` of a finished group, computed once; raises the errors of `over_runs`."""
        key = (group.experiment, cell.split, cell.unit, cell.size)
        if key not in self._levels:
            runs = group.predictions[cell.split]
            self._levels[key] = bootstrap.over_runs(runs, draws=self._draws, unit=cell.unit, size=cell.size)
        return self._levels[key]

    def result(self, cell: Cell) -> Result:
        """Returns the result of a cell's own experiment."""
        group = self.group(cell.experiment)
        if not group.finished:
            return self._unfinished(cell, group)
        try:
            level = {} if cell.validation else self._level(group, cell)
            logged = runs.logged(group.runs, cell) if cell.validation else None
            ours, low, high = level.get(cell.name, (logged, None, None))
        except ValueError as error:
            return Result(cell, group, "damaged", str(error), commands=tuple(run.command for run in group.runs))
        if ours is None:
            return Result(cell, group, "undefined", f"{cell.metric} is undefined for these predictions")
        # Overrides make a different experiment, to which the published number does not apply.
        other = (self._table.elsewhere and not cell.size) or any(run.changed for run in group.runs)
        verdict, reason = "" if other else compare(cell, low, high), group.states[0].reason
        return Result(cell, group, "finished", reason, ours, low, high, verdict)

    def _unfinished(self, cell: Cell, group: Group) -> Result:
        left = [(i, state) for i, state in enumerate(group.states) if state.kind != "finished"]
        commands = tuple(group.runs[i].command for i, _ in left) if group.runs else ()
        for command in commands:
            if command in self._failures:
                return Result(cell, group, "failed", self._failures[command], commands=commands)
        worst = next((state for _, state in left if state.kind not in ("missing", "unfinished")), left[0][1])
        done = len(group.states) - len(left)
        kind = NOT_RUN if worst.kind == "missing" else f"{NOT_RUN}: {worst.kind}"
        kind += f": {done} of {len(group.states)} seeds" if done and worst.kind == "missing" else ""
        return Result(cell, group, kind, worst.reason, commands=commands)


def compare(cell: Cell, low: float | None, high: float | None) -> str:
    """Returns "inside" if our interval contains the published number, "above" or "below" if not, "" if unknown."""
    if cell.published is None or low is None or high is None:
        return ""
    if low - cell.slack > cell.published:
        return "above"
    return "below" if high + cell.slack < cell.published else "inside"


def evaluate(table: Table, tables: Mapping[str, Table], reader: Reader) -> list[Result]:
    """Returns the result of every cell, in order."""
    if table.chosen_from:
        return [_chosen(table, cell, tables, reader) for cell in table.cells]
    return [reader.result(cell) for cell in table.cells]


def _chosen(table: Table, cell: Cell, tables: Mapping[str, Table], reader: Reader) -> Result:
    """Returns the result of a cell for its best candidate, judged by the metric of the candidate."""
    scored = [reader.result(candidate) for candidate in cells.candidates(table, cell, tables)]
    finished = [result for result in scored if result.ours is not None]
    commands = tuple(dict.fromkeys(command for result in scored for command in result.commands))
    if not finished:
        reason = f"none of the {len(scored)} configurations of {table.chosen_from} was run; {scored[0].reason}"
        return Result(cell, scored[0].group, NOT_RUN, reason, commands=commands)
    best = max(finished, key=lambda result: result.ours or 0.0)
    result = reader.result(replace(cell, experiment=best.cell.experiment))
    result = replace(result, cell=cell, commands=commands, chosen=best.cell)
    if len(finished) == len(scored):
        return result
    part = f"{len(finished)} of {len(scored)}"
    # A choice among some of the candidates is a different experiment.
    return replace(result, state=f"best of {part}", reason=f"chosen from {part}; the others were not run", verdict="")


def run_missing(
    table: Table, tables: Mapping[str, Table], options: Options, say: Callable[[str], None]
) -> dict[str, str]:
    """Executes the missing, unfinished and damaged runs; returns {command: error}. Raises `signals.Interrupted`."""
    failures: dict[str, str] = {}
    unprepared: set[str] = set()  # data sets that were reported
    names = cells.experiments(table, tables)
    for number, name in enumerate(names, 1):
        group = Reader(table, options).group(name)
        for run, state in zip(group.runs, group.states, strict=False):
            needed = runs.unprepared(run, options.data_dir)
            if needed and state.kind in runs.EXECUTABLE:
                failures[run.command] = f"{needed} is not prepared in {options.data_dir}"
                if needed not in unprepared:
                    say(f"Skipped, {failures[run.command]}: python -m lungjax.prepare --dataset={needed} --help")
                unprepared.add(needed)
            elif state.kind in runs.EXECUTABLE:
                say(f"[{number}/{len(names)}] {run.command}")
                code, tail = runs.execute(run)
                if code:
                    failures[run.command] = f"{runs.ending(code)}: {tail.splitlines()[-1] if tail else 'no output'}"
                    say(f"Failed, {runs.ending(code)}; the last lines:\n{textwrap.indent(tail, '    ')}\nContinuing.")
        for state in group.states:
            if state.kind not in (*runs.EXECUTABLE, "finished"):
                say(f"[{number}/{len(names)}] skipped, {state.kind}: {name}: {state.reason}")
    return failures


def correlations(table: Table, results: Sequence[Result]) -> list[str]:
    """Returns one sentence per pair of columns in `table.correlate`: Spearman's rho, published and ours."""
    from scipy import stats

    lines = []
    for first, second in table.correlate:
        columns = [{r.cell.row: r for r in results if r.cell.column == column} for column in (first, second)]
        both = [(columns[0][row], columns[1][row]) for row in table.rows if row in columns[0] and row in columns[1]]
        parts = []
        for word, values in (
            ("published", [(a.cell.published, b.cell.published) for a, b in both]),
            ("ours", [(a.ours, b.ours) for a, b in both]),
        ):
            pairs = [(a, b) for a, b in values if a is not None and b is not None]
            rho = float(stats.spearmanr(*zip(*pairs, strict=True)).statistic) if len(pairs) > 2 else float("nan")
            rows = "" if len(pairs) == len(table.rows) else f" over {len(pairs)} of {len(table.rows)} rows"
            parts.append(f"{word} {rho:+.2f}{rows}" if rho == rho else f"{word}: too few rows")
        lines.append(f"Spearman rank correlation of {first} and {second}: {', '.join(parts)}.")
    return lines


def place(cell: Cell) -> str:
    """Returns "row, column" of a cell."""
    return f"{cell.row}, {cell.column}"


def markdown(table: Table, results: Sequence[Result], options: Options, captions: Mapping[str, str]) -> str:
    """Returns the table as a page. `captions` are the captions of its figures by file name."""
    verdicts = [f"{n} {word}" for word in VERDICTS if (n := sum(r.verdict == word for r in results))]
    choice = any(r.chosen for r in results)
    rows = []
    for i, r in enumerate(results):
        repeated = i and results[i - 1].cell.row == r.cell.row
        rows.append([
            "" if repeated else r.cell.row,
            r.cell.column,
            "" if r.cell.published is None else f"{r.cell.published:.{r.cell.decimals}f}",
            _rounded(r.ours, r.cell) or r.state,
            "" if r.low is None else f"{_rounded(r.low, r.cell)} to {_rounded(r.high, r.cell)}",
            "" if r.difference is None else f"{r.difference:+.{max(r.cell.decimals, 3)}f}",
            ", ".join(filter(None, [r.verdict, r.reason if r.state == "finished" else r.state if r.ours else ""])),
            *([place(r.chosen) if r.chosen else ""] * choice),
        ])  # fmt: skip
    reasons: dict[str, list[str]] = {}  # cells by the reason why their numbers are missing
    for r in results:
        if r.reason and r.state not in (NOT_RUN, "finished"):
            reasons.setdefault(f"{r.state}: {' '.join(r.reason.split())}", []).append(place(r.cell))
    head = ["", "", "published", "ours", "95 % interval", "difference", "verdict", *["our choice"] * choice]
    return templating.render(
        "published.md.j2",
        title=table.title,
        source=table.source,
        elsewhere=table.elsewhere.rstrip("."),
        draws=any(cell.size for cell in table.cells),
        seeds=options.seeds,
        sets=options.sets,
        cell_count=len(results),
        scored=sum(r.ours is not None for r in results),
        verdicts=verdicts,
        cells=templating.Table(head, rows),
        notes=[
            *correlations(table, results),
            *table.notes,
            *(f"{place(r.cell)}: {r.cell.note}" for r in results if r.cell.note),
        ],
        figures=[templating.Figure(name, caption) for name, caption in captions.items()],
        missing={
            "reasons": [
                f"{'; '.join(places[:3])}{f' and {len(places) - 3} more' if len(places) > 3 else ''}: {reason}"
                for reason, places in reasons.items()
            ],
            "commands": list(dict.fromkeys(command for r in results for command in r.commands)),
            "datasets": sorted({r.group.runs[0].config.data.dataset for r in results if r.commands and r.group.runs}),
        },
    )


def _rounded(value: float | None, cell: Cell) -> str:
    return "" if value is None else f"{value:.{max(cell.decimals, 3)}f}"


def write(table: Table, results: Sequence[Result], options: Options, captions: Mapping[str, str]) -> Path:
    """Writes NAME.csv and NAME.md into WORKDIR/tables; returns the page's path. `captions` are as in `markdown`."""
    path = options.workdir / "tables" / f"{table.name}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for r in results:
        seeds = 0 if r.ours is None else len(r.group.runs)
        numbers = [r.cell.published, r.ours, r.low, r.high, seeds, r.difference]  # not rounded
        writer.writerow([
            r.cell.row, r.cell.column, r.cell.metric, *("" if x is None else f"{x:.6g}" for x in numbers), r.verdict,
            r.state, r.reason, r.chosen.experiment if r.chosen else "", " && ".join(r.commands),
        ])  # fmt: skip
    atomic_write(path.with_suffix(".csv"), text.getvalue())
    atomic_write(path, markdown(table, results, options, captions))
    return path
