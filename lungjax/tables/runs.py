"""Runs of a table: their folders and states, and the execution of missing ones.

A run is one seed of one experiment, in WORKDIR/NAME/seedN, where NAME is the name of the configuration. Each run trains
in its own process; the parent process uses no device.
"""

import json
import os
import selectors
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from lungjax import config as configs
from lungjax import datasets
from lungjax.config import Config, experiments, overrides
from lungjax.data import prepared
from lungjax.data.labels import indicators
from lungjax.evaluation import calibration, metrics, predictions
from lungjax.evaluation.predictions import Predictions
from lungjax.runtime import signals
from lungjax.runtime.checkpoint import newest
from lungjax.tables.cells import Cell
from lungjax.training import metrics_log, progress, workdir
from lungjax.weights import load

EXECUTABLE = ("missing", "unfinished", "damaged")  # states that executing the run resolves
MAX_EXCLUDED = 0.02  # share of a published split that a run under the clean protocol may lack
MAX_FIELDS = 4  # fields that an error message names
MAX_LINES = 6  # last lines of a failed run in its error message


@dataclass(frozen=True)
class Options:
    """Options of all runs of a table."""

    workdir: Path
    data_dir: Path
    weights_dir: Path | None = None
    sets: tuple[str, ...] = ()  # overrides of every run, such as "train.devices=1"
    seeds: int = 3


@dataclass(frozen=True)
class Run:
    """One seed of one experiment."""

    experiment: str
    seed: int
    config: Config  # with overrides and seed, before the weights are resolved
    dataset: str  # full name of the experiment's data set, before overrides
    folder: Path
    arguments: tuple[str, ...]  # of lungjax.main
    protocol: str = "study"  # of the experiment, before overrides
    sets: tuple[str, ...] = ()  # the overrides

    @property
    def changed(self) -> tuple[str, ...]:
        """Returns the overrides that change the experiment, not only speed or memory."""
        return tuple(s for s in self.sets if s.partition("=")[0].strip() not in workdir.MUTABLE_FIELDS)

    @property
    def command(self) -> str:
        """Returns the command line that starts or resumes the run."""
        return shlex.join(("python", "-m", "lungjax.main", *self.arguments))


@dataclass(frozen=True)
class State:
    """The state of a run's folder."""

    kind: str  # of EXECUTABLE, or "other configuration", "other data", "unusable", "finished"
    reason: str = ""  # if finished, the images that the run's data lack, such as "97 of 100 covid test images"
    report: Mapping[str, Any] | None = None  # of a finished run


@lru_cache(maxsize=1024)
def plan(name: str, options: Options) -> tuple[Run, ...]:
    """Returns the runs of an experiment, one per seed. Raises ValueError for an invalid experiment or override."""
    base = experiments.load(name)
    dataset = datasets.resolve(base.data.dataset)[0].full
    runs = []
    for seed in range(options.seeds):
        config = base
        for assignment in (f"train.seed={seed}", *options.sets):
            config = overrides.override(config, assignment)
        configs.check(config)
        folder = options.workdir / base.name / f"seed{seed}"
        arguments = [f"--experiment={name}", f"--set=train.seed={seed}"]
        arguments += [f"--set={assignment}" for assignment in options.sets]
        arguments += [f"--workdir={folder}", f"--data_dir={options.data_dir}"]
        arguments += [f"--weights_dir={options.weights_dir}"] if options.weights_dir else []
        runs.append(Run(name, seed, config, dataset, folder, tuple(arguments), base.data.protocol, tuple(options.sets)))
    return tuple(runs)


def check(run: Run, data_dir: Path, counts: Mapping[str, Sequence[int]], max_missing: float = 0.0) -> State:
    """Returns the state of a run's folder, without reading its predictions.

    The run's data must have the fingerprint of the copy in `data_dir`, if prepared, and `counts` images per class in
    the study's splits. A class may lack a share of up to `max_missing`, and MAX_EXCLUDED under the clean protocol.
    """
    saved, report = run.folder / "config.json", run.folder / "report.json"
    if not saved.exists():
        return State("missing", f"no run in {run.folder}")
    try:
        expected, config = load.resolve(run.config), overrides.read(saved)
    except ValueError as error:
        return State("unusable", str(error))
    difference = overrides.difference(config, expected)
    changed = [line for line in difference if line.split(":")[0] not in workdir.MUTABLE_FIELDS]
    if changed and (report.exists() or newest(run.folder, "last") is not None):
        fields = "; ".join(changed[:MAX_FIELDS])
        fields += f" and {len(changed) - MAX_FIELDS} more" if len(changed) > MAX_FIELDS else ""
        reason = f"the run in {run.folder} has another configuration: {fields}. Choose another --workdir or delete it"
        return State("other configuration", reason)
    if not report.exists():
        return State("unfinished", f"{run.folder} has no report.json")
    try:
        content = json.loads(report.read_text())
        facts, classes = content["facts"], content["classes"]
        own_counts = {split: [facts["counts"][split][name] for name in classes] for split in facts["counts"]}
        steps, dataset, fingerprint = facts["steps"], facts["dataset"], facts["fingerprint"]
    except (ValueError, KeyError, TypeError) as error:
        return State("damaged", f"{report} can't be read: {type(error).__name__} {error}")
    if not progress.is_complete(run.folder, config, steps):
        return State("unfinished", f"{run.folder} stopped at step {progress.last_step(run.folder)} of {steps}")
    if dataset != run.dataset:
        return State("other data", f"{run.folder} was trained on {dataset}; this table needs {run.dataset}")
    if list(datasets.classes(dataset) or classes) != list(classes):
        return State("other data", f"{run.folder} does not have the classes of {dataset}, but {', '.join(classes)}")
    now = prepared_fingerprint(data_dir, dataset)
    if now and now != fingerprint:
        prints = f"fingerprint {fingerprint[:12]}, but {data_dir} has {now[:12]}: images, labels or splits differ"
        return State("other data", f"{run.folder} was trained on {dataset} with {prints}")
    # The clean protocol excludes exact copies from the published split; real data sets have few.
    share, lacking = max_missing + MAX_EXCLUDED * (run.protocol == "clean"), []
    for split, published in counts.items():
        own = own_counts.get(split, [])
        if len(own) != len(published) or any(not 0 <= n - m <= share * n for m, n in zip(own, published, strict=True)):
            numbers = f"{listed(own)} images per class, the study {listed(published)} ({', '.join(classes)})"
            return State("other data", f"{run.folder}: the {split} split has {numbers}")
        each = zip(own, published, classes, strict=True)
        lacking += [f"{m:,} of {n:,} {name} {split} images" for m, n, name in each if m < n]
    return State("finished", ", ".join(lacking), content)


def agree(states: Sequence[State]) -> list[State]:
    """Returns the states of an experiment's seeds; "other data" for seeds whose data differ from the first."""
    fingerprints = [state.report["facts"]["fingerprint"] if state.report else "" for state in states]
    first = next(filter(None, fingerprints), "")
    return [
        State("other data", f"fingerprint {own[:12]}, another seed has {first[:12]}: images, labels or splits differ")
        if own not in ("", first)
        else state
        for state, own in zip(states, fingerprints, strict=True)
    ]


@lru_cache(maxsize=64)
def prepared_fingerprint(data_dir: Path, dataset: str) -> str:
    """Returns the fingerprint of a data set, or "" if it is not prepared in `data_dir`."""
    where = prepared.directory(data_dir, dataset)
    return prepared.fingerprint(where) if prepared.is_prepared(where) else ""


def unprepared(run: Run, data_dir: Path) -> str:
    """Returns the name of the run's data set if it must be prepared first, otherwise ""."""
    parts, entry = datasets.resolve(run.config.data.dataset)
    return "" if entry.synthetic or prepared.is_prepared(prepared.directory(data_dir, parts.full)) else parts.full


def listed(numbers: Sequence[int]) -> str:
    """Formats counts as "908 / 388 / 45", or "no"."""
    return " / ".join(f"{n:,}" for n in numbers) or "no"


def read_predictions(run: Run, report: Mapping[str, Any], split: str) -> Predictions:
    """Returns the uncalibrated predictions. Raises ValueError if they are missing, damaged or contradict `report`."""
    path = run.folder / f"predictions_{split}.csv"
    if not path.exists():
        raise ValueError(f"{path} is missing")
    table = predictions.read(path)
    counts, level = report["facts"]["counts"][split], report[split]["slice"]
    if list(table.classes) != list(report["classes"]):
        raise ValueError(f"{path}: classes {', '.join(table.classes)}, report.json has {', '.join(report['classes'])}")
    images = indicators(table.labels, len(table.classes)).sum(axis=0).tolist()
    if images != [counts[name] for name in table.classes]:
        raise ValueError(f"{path}: {listed(images)} images per class, report.json has {listed(list(counts.values()))}")
    accuracy = metrics.summarize(table)["accuracy"]
    if abs(accuracy - level["accuracy"]) > 1e-6:
        raise ValueError(f"{path}: accuracy {accuracy:.6f}, report.json has {level['accuracy']:.6f}")
    return calibration.apply_temperature(table, 1.0)


def logged(runs: Sequence[Run], cell: Cell) -> float | None:
    """Returns the mean of a validation metric logged during training; None if a run lacks it or it is undefined."""
    name = cell.metric.partition("@")[0]
    rows = [metrics_log.read(run.folder / "metrics.jsonl") for run in runs]
    logs = [[row[name] for row in own if name in row][cell.validation - 1 :] for own in rows]
    return float(np.mean([log[0] for log in logs])) if all(log and log[0] is not None for log in logs) else None


def execute(run: Run) -> tuple[int, str]:
    """Starts or resumes a run in a subprocess and prints its output; returns its exit code and last lines.

    The first Ctrl-C or SIGTERM is forwarded to the run and raises `signals.Interrupted`; a second Ctrl-C kills the run.
    """
    command = [sys.executable, "-m", "lungjax.main", *run.arguments]
    tail = b""
    # In a new session: otherwise Ctrl-C in a terminal would also reach it directly, and count as a second one.
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    assert process.stdout is not None
    try:
        with signals.watching() as watch, selectors.DefaultSelector() as waiting:
            waiting.register(process.stdout, selectors.EVENT_READ)
            forwarded = False
            while True:
                if watch.number and not forwarded:
                    process.send_signal(signal.SIGTERM)
                    forwarded = True
                if not waiting.select(timeout=0.2):
                    continue
                chunk = os.read(process.stdout.fileno(), 65536)
                if not chunk:
                    break
                tail = (tail + chunk)[-16384:]
                print(chunk.decode(errors="replace"), end="", flush=True)
            code = process.wait()
            watch.check()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        process.stdout.close()
    lines = [line.split("\r")[-1].rstrip() for line in tail.decode(errors="replace").split("\n")]
    return code, "\n".join([line for line in lines if line][-MAX_LINES:])


def ending(code: int) -> str:
    """Describes the exit code of a failed process, such as "exit code 2" or "killed by SIGKILL"."""
    if code >= 0:
        return f"exit code {code}"
    memory = " (often out of memory)" if -code == signal.SIGKILL else ""
    return f"killed by {signal.Signals(-code).name}{memory}"
