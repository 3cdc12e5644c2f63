"""A table with our numbers in it: read from finished runs, compared with the published ones, written down.

Ours is the mean over the seeds; its 95 % interval is a bootstrap over patients and seeds (`bootstrap.over_runs`). A
published number is "inside" that interval, or ours is "above" or "below" it; as published numbers are rounded, half a
unit of their last digit counts as inside.
"""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lungjax.config import Config
from lungjax.evaluation import bootstrap
from lungjax.evaluation.predictions import Predictions
from lungjax.runtime.files import atomic_write
from lungjax.tables import cells, runs
from lungjax.tables.cells import Cell, Table
from lungjax.tables.runs import Options, Run, State

NOT_RUN = "not run"
CSV_COLUMNS = (
    "row", "column", "metric", "published", "ours", "low", "high", "seeds", "difference", "verdict", "state", "reason",
    "chosen", "command",
)  # fmt: skip


Value = tuple[float, float | None, float | None]  # mean, low, high


@dataclass(frozen=True)
class Group:
    """The runs of one experiment, one a seed, and what is in their folders."""

    experiment: str
    runs: tuple[Run, ...]  # () if the experiment can't be loaded
    states: tuple[State, ...]

    @property
    def finished(self) -> bool:
        """Says whether every seed gives numbers."""
        return bool(self.runs) and all(state.kind == "finished" for state in self.states)

    @property
    def config(self) -> Config:
        """Returns the configuration of the first seed."""
        return self.runs[0].config


@dataclass(frozen=True)
class Result:
    """A cell and what our runs say to it."""

    cell: Cell
    state: str  # "finished", or in few words why there is no number (or why it is not final)
    reason: str = ""  # the same in a sentence
    ours: float | None = None
    low: float | None = None
    high: float | None = None
    seeds: int = 0
    difference: float | None = None
    verdict: str = ""  # "inside", "above", "below"; "" without one
    commands: tuple[str, ...] = ()  # that make what is missing
    group: Group | None = None  # the runs that the number is of
    chosen: Cell | None = None  # where a table chooses: the candidate that was taken


class Reader:
    """Looks into run folders, each once."""

    def __init__(self, table: Table, options: Options, draws: int = 2000, failures: Mapping[str, str] | None = None):
        """`failures` says of command lines how they failed just now."""
        self._table, self._options, self._draws = table, options, draws
        self._failures = failures or {}
        self._groups: dict[str, Group] = {}
        self._predictions: dict[tuple[str, str], tuple[Predictions, ...]] = {}
        self._values: dict[tuple[str, str], Value | None] = {}

    def group(self, experiment: str) -> Group:
        """Returns an experiment's runs and their states, damaged predictions included."""
        if experiment not in self._groups:
            try:
                planned = runs.plan(experiment, self._options)
            except (ValueError, ImportError, SyntaxError) as error:
                self._groups[experiment] = Group(experiment, (), (State("unusable", str(error)),))
            else:
                found = [runs.check(run, self._options.data_dir, self._table.counts) for run in planned]
                states = [self._read(run, state) for run, state in zip(planned, runs.agree(found), strict=True)]
                self._groups[experiment] = Group(experiment, planned, tuple(states))
        return self._groups[experiment]

    def _read(self, run: Run, state: State) -> State:
        if state.kind == "finished" and state.report is not None:
            try:
                for split in cells.SPLITS:
                    runs.read_predictions(run, state.report, split)
            except (ValueError, KeyError) as error:
                return State("damaged", str(error))
        return state

    def predictions(self, group: Group, split: str) -> tuple[Predictions, ...]:
        """Returns the predictions of a finished group's seeds."""
        key = (group.experiment, split)
        if key not in self._predictions:
            pairs = zip(group.runs, group.states, strict=True)
            self._predictions[key] = tuple(
                runs.read_predictions(run, state.report, split) for run, state in pairs if state.report
            )
        return self._predictions[key]

    def values(self, group: Group, metrics: Sequence[str]) -> dict[str, Value | None]:
        """Returns mean over the seeds, low and high of each SPLIT.UNIT.NAME; None where it is not defined.

        Low and high are None where there is no interval, as for a single patient.

        Raises ValueError if the seeds' predictions are not of the same examples, or are no probabilities.
        """
        asked = [metric for metric in dict.fromkeys(metrics) if (group.experiment, metric) not in self._values]
        for part in dict.fromkeys(tuple(metric.split(".", 2)[:2]) for metric in asked):
            split, unit = part
            start = f"{split}.{unit}."
            names = [metric.removeprefix(start) for metric in asked if metric.startswith(start)]
            found = bootstrap.over_runs(self.predictions(group, split), names, draws=self._draws, seed=0, unit=unit)
            for name in names:
                mean, low, high = found[name]
                self._values[group.experiment, start + name] = None if mean is None else (mean, low, high)
        return {metric: self._values[group.experiment, metric] for metric in metrics}

    def each(self, group: Group, metric: str) -> list[float]:
        """Returns a metric's value of each seed, NaN where it is not defined."""
        split, unit, name = metric.split(".", 2)
        found = [
            bootstrap.over_runs([one], [name], draws=0, unit=unit)[name][0] for one in self.predictions(group, split)
        ]
        return [float("nan") if value is None else value for value in found]

    def result(self, cell: Cell, alike: Sequence[str] = ()) -> Result:
        """Returns what the runs of a cell's own experiment say; `alike` are metrics that will be asked for as well."""
        group = self.group(cell.experiment)
        if not group.finished:
            return self._unfinished(cell, group)
        try:
            value = self.values(group, [cell.metric, *alike])[cell.metric]
        except ValueError as error:
            return Result(cell, "damaged", str(error), commands=tuple(run.command for run in group.runs), group=group)
        if value is None:
            return Result(cell, "not defined", f"{cell.metric} has no value for these predictions", group=group)
        ours, low, high = value
        difference = None if cell.published is None else ours - cell.published
        # What was overridden is another experiment, which the published number says nothing about.
        other = self._table.elsewhere or any(run.changed for run in group.runs)
        verdict = "" if other else judge(cell, low, high)
        return Result(cell, "finished", "", ours, low, high, len(group.runs), difference, verdict, group=group)

    def _unfinished(self, cell: Cell, group: Group) -> Result:
        left = [(i, state) for i, state in enumerate(group.states) if state.kind != "finished"]
        commands = tuple(group.runs[i].command for i, _ in left) if group.runs else ()
        failed = [f"{self._failures[command]}" for command in commands if command in self._failures]
        worst = next((state for _, state in left if state.kind not in ("missing", "unfinished")), left[0][1])
        if failed:
            return Result(cell, "failed", failed[0], commands=commands, group=group)
        done = len(group.states) - len(left)
        if worst.kind == "missing":
            kind = NOT_RUN if not done else f"{NOT_RUN}: {done} of {len(group.states)} seeds"
        else:
            kind = f"{NOT_RUN}: {worst.kind}"
        return Result(cell, kind, worst.reason, commands=commands, group=group)


def judge(cell: Cell, low: float | None, high: float | None) -> str:
    """Returns the verdict on our interval: "inside", "above" or "below" the published number; "" without one."""
    if cell.published is None or low is None or high is None:
        return ""
    if low - cell.slack > cell.published:
        return "above"
    return "below" if high + cell.slack < cell.published else "inside"


def evaluate(table: Table, tables: Mapping[str, Table], reader: Reader) -> list[Result]:
    """Returns a result for every cell, in order."""
    if table.chosen_from:
        return [_chosen(table, cell, tables, reader) for cell in table.cells]
    metrics: dict[str, list[str]] = {}
    for cell in table.cells:
        metrics.setdefault(cell.experiment, []).append(cell.metric)
    return [reader.result(cell, metrics[cell.experiment]) for cell in table.cells]


def _chosen(table: Table, cell: Cell, tables: Mapping[str, Table], reader: Reader) -> Result:
    """Returns the result of the candidate that is best by its own metric, scored by the cell's metric."""
    among = cells.candidates(table, cell, tables)
    scored = [reader.result(candidate) for candidate in among]
    finished = [result for result in scored if result.ours is not None]
    commands = tuple(dict.fromkeys(command for result in scored for command in result.commands))
    if not finished:
        reason = f"none of the {len(among)} configurations of {table.chosen_from} is run; {scored[0].reason}"
        return Result(cell, NOT_RUN, reason, commands=commands)
    best = max(finished, key=lambda result: result.ours or 0.0)
    answer = Cell(cell.row, cell.column, best.cell.experiment, cell.metric, cell.published, cell.decimals, cell.note)
    found = reader.result(answer)
    complete = len(finished) == len(among)
    return Result(
        cell,
        found.state if complete else f"best of {len(finished)} of {len(among)}",
        found.reason if complete else f"chosen among {len(finished)} of {len(among)}: the others are not run",
        found.ours,
        found.low,
        found.high,
        found.seeds,
        found.difference,
        found.verdict if complete else "",  # a choice among a part of them is another experiment
        commands,
        found.group,
        best.cell,
    )


def run_missing(
    table: Table, tables: Mapping[str, Table], options: Options, say: Callable[[str], None]
) -> dict[str, str]:
    """Makes every run that is missing, unfinished or damaged, one after the other; the others are left alone.

    Returns how each that failed did, by its command line. Raises `signals.Interrupted` once a run that was asked to
    end has saved.
    """
    failures: dict[str, str] = {}
    lacking: set[str] = set()  # data sets that were said to be
    names = cells.experiments(table, tables)
    for number, name in enumerate(names, 1):
        group = Reader(table, options).group(name)
        for run, state in zip(group.runs, group.states, strict=False):
            needed = runs.unprepared(run, options.data_dir)
            if needed and state.kind in runs.BY_RUNNING:
                failures[run.command] = f"{needed} is not prepared in {options.data_dir}"
                if needed not in lacking:
                    say(f"Left out, {failures[run.command]}: python -m lungjax.prepare --dataset={needed} --help")
                lacking.add(needed)
            elif state.kind in runs.BY_RUNNING:
                say(f"[{number}/{len(names)}] {run.command}")
                code, tail = runs.execute(run)
                if code:
                    failures[run.command] = f"{runs.ending(code)}: {tail.splitlines()[-1] if tail else 'no output'}"
                    say(f"Failed, {runs.ending(code)}; its last lines:\n{indented(tail)}\nOn with the next one.")
        for state in group.states:
            if state.kind not in (*runs.BY_RUNNING, "finished"):
                say(f"[{number}/{len(names)}] left alone, {state.kind}: {name}: {state.reason}")
    return failures


def indented(text: str) -> str:
    """Returns lines moved right by four."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def correlations(table: Table, found: Sequence[Result]) -> list[str]:
    """Returns a sentence for each pair of columns of `table.correlate`: Spearman's rho, published and ours."""
    from scipy import stats

    lines = []
    for first, second in table.correlate:
        places = {(result.cell.row, result.cell.column): result for result in found}
        pairs = [(places.get((row, first)), places.get((row, second))) for row in table.rows]
        both = [(a, b) for a, b in pairs if a and b]
        said = []
        for word, values in (
            ("published", [(a.cell.published, b.cell.published) for a, b in both]),
            ("ours", [(a.ours, b.ours) for a, b in both]),
        ):
            known = [(a, b) for a, b in values if a is not None and b is not None]
            rho = float(stats.spearmanr(*zip(*known, strict=True)).statistic) if len(known) > 2 else float("nan")
            many = "" if len(known) == len(table.rows) else f" over {len(known)} of {len(table.rows)} rows"
            said.append(f"{word} {rho:+.2f}{many}" if rho == rho else f"{word}: too few rows")
        lines.append(f"Spearman rank correlation of {first} and {second}: {', '.join(said)}.")
    return lines


def told(table: Table, found: Sequence[Result]) -> str:
    """Returns what a terminal shows: a line a cell, then the commands of what is missing."""
    wide = max(len(f"{r.cell.row}, {r.cell.column}") for r in found)
    lines = [table.title]
    for r in found:
        printed = "" if r.cell.published is None else f"{r.cell.published:.{r.cell.decimals}f}"
        ours = r.state if r.ours is None else _shown(r.ours, r.cell)
        ours += f" [{_shown(r.low, r.cell)}, {_shown(r.high, r.cell)}] {r.verdict}" if r.low is not None else ""
        ours += f" ({r.state})" if r.ours is not None and r.state != "finished" else ""
        lines.append(f"  {f'{r.cell.row}, {r.cell.column}':{wide}}  published {printed:>6}  ours {ours}")
    return "\n".join([*lines, *correlations(table, found), *_missing(found)])


def as_csv(found: Sequence[Result]) -> str:
    """Returns one line a cell; the columns are CSV_COLUMNS. Numbers are not rounded."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for r in found:
        writer.writerow([
            r.cell.row, r.cell.column, r.cell.metric, _bare(r.cell.published), _bare(r.ours), _bare(r.low),
            _bare(r.high), r.seeds, _bare(r.difference), r.verdict, r.state, r.reason,
            r.chosen.experiment if r.chosen else "", " && ".join(r.commands),
        ])  # fmt: skip
    return text.getvalue()


def _bare(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def markdown(table: Table, found: Sequence[Result], options: Options, pictures: Mapping[str, str]) -> str:
    """Returns the table for people. `pictures`: what each PNG beside the file shows, by file name."""
    by_verdict = {word: sum(r.verdict == word for r in found) for word in ("inside", "above", "below")}
    scored = sum(r.ours is not None for r in found)
    lines = [f"# {table.title}", "", f"Published: {table.source}. Ours: mean over {options.seeds} seed"]
    lines[-1] += f"{'s' * (options.seeds != 1)}, with a 95 % interval by bootstrap over patients and seeds."
    if table.elsewhere:
        lines += [
            "",
            f"**The published numbers are of other data: {table.elsewhere.rstrip('.')}. No verdict is given.**",
        ]
    if options.sets:
        lines += ["", f"**Our runs were changed by {', '.join(f'--set={s}' for s in options.sets)}.**"]
    words = ", ".join(f"{n} {word}" for word, n in by_verdict.items() if n)
    lines += ["", f"{len(found)} cells: {scored} with a number{f' ({words})' if words else ''}, "]
    lines[-1] += f"{len(found) - scored} without. Above and below say where ours lies."
    choice = any(r.chosen for r in found)
    header = ["", "", "published", "ours", "95 % interval", "difference", "verdict", *["our choice"] * choice]
    lines += ["", f"| {' | '.join(header)} |", f"| --- | --- |{' ---: |' * 4} --- |{' --- |' * choice}"]
    for i, r in enumerate(found):
        row = r.cell.row if not i or found[i - 1].cell.row != r.cell.row else ""
        published = "" if r.cell.published is None else f"{r.cell.published:.{r.cell.decimals}f}"
        values = [row, r.cell.column, published, _shown(r.ours, r.cell) or r.state]
        values += ["" if r.low is None or r.high is None else f"{_shown(r.low, r.cell)} to {_shown(r.high, r.cell)}"]
        values += ["" if r.difference is None else f"{r.difference:+.{max(r.cell.decimals, 3)}f}"]
        values += [r.verdict or (r.state if r.ours is not None and r.state != "finished" else "")]
        if choice:
            values += [f"{r.chosen.row}, {r.chosen.column}" if r.chosen else ""]
        lines.append(f"| {' | '.join(value.replace('|', '/') for value in values)} |")
    lines += ["", *[f"- {line}" for line in (*correlations(table, found), *table.notes)]]
    lines += [f"- {r.cell.row}, {r.cell.column}: {r.cell.note}" for r in found if r.cell.note]
    for name, what in pictures.items():
        lines += ["", f"![{what}]({name})"]
    lines += _missing(found)
    return "\n".join(lines) + "\n"


def _shown(value: float | None, cell: Cell) -> str:
    return "" if value is None else f"{value:.{max(cell.decimals, 3)}f}"


def _missing(found: Sequence[Result]) -> list[str]:
    """Returns the lines on what has no number: why, and the commands."""
    reasons: dict[str, list[str]] = {}
    for r in found:
        if r.reason and r.state not in (NOT_RUN, "finished"):
            reasons.setdefault(f"{r.state}: {r.reason}", []).append(f"{r.cell.row}, {r.cell.column}")
    lines = ["", "## Why cells have no number", ""] if reasons else []
    for reason, places in reasons.items():
        more = f" and {len(places) - 3} more" if len(places) > 3 else ""
        text = " ".join(reason.split())
        lines.append(f"- {'; '.join(places[:3])}{more}: {text}")
    commands = list(dict.fromkeys(command for r in found for command in r.commands))
    if commands:
        sets = sorted({run.config.data.dataset for r in found if r.commands and r.group for run in r.group.runs})
        lines += [
            "",
            f"They need these data sets (python -m lungjax.prepare --dataset=NAME --help): {', '.join(sets)}.",
        ]
        lines += ["", f"## Not run: {len(commands)} commands", "", *[f"    {command}" for command in commands]]
    return lines


def write(
    table: Table, found: Sequence[Result], options: Options, reader: Reader,
    draw: Callable[[Table, Sequence[Result], Reader, Path], dict[str, str]],
) -> Path:  # fmt: skip
    """Writes NAME.csv, the pictures and NAME.md into WORKDIR/tables; returns the last one's path."""
    folder = options.workdir / "tables"
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / f"{table.name}.csv", as_csv(found))
    path = folder / f"{table.name}.md"
    atomic_write(path, markdown(table, found, options, draw(table, found, reader, folder)))
    return path
