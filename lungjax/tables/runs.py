"""The runs that a table's cells need: where they live, what state they are in, and how missing ones are made.

A run is one seed of one experiment, in WORKDIR/NAME/seedN, with NAME the configuration's; cells that share an
experiment share its runs. Nothing here starts a device: training is done in processes of its own.
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
from lungjax.evaluation import predictions
from lungjax.evaluation.predictions import Predictions
from lungjax.runtime import signals
from lungjax.runtime.checkpoint import newest
from lungjax.training import early_stopping, workdir
from lungjax.weights import load

# What a run can be. Only the last one gives numbers.
STATES = ("missing", "unfinished", "other configuration", "other data", "damaged", "unusable", "finished")
BY_RUNNING = ("missing", "unfinished", "damaged")  # states that the run's command mends
SPARE = 0.02  # part of a published split that a run under the clean protocol may lack
FEW = 4  # differing fields that are named
TAIL = 6  # last lines of a failed run that are shown


@dataclass(frozen=True)
class Options:
    """What a user says of all runs of a table."""

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
    config: Config  # with the overrides and the seed; what weights add is not in it yet
    dataset: str  # full name of the data set that the experiment is about, whatever the overrides say
    folder: Path
    arguments: tuple[str, ...]  # of lungjax.main
    protocol: str = "study"  # of the experiment itself, whatever the overrides say
    sets: tuple[str, ...] = ()  # the overrides

    @property
    def changed(self) -> tuple[str, ...]:
        """Returns the overrides that make another experiment of it; those of speed and memory don't."""
        return tuple(s for s in self.sets if s.partition("=")[0].strip() not in workdir.MUTABLE_FIELDS)

    @property
    def command(self) -> str:
        """Returns the command line that makes the run, or goes on with it."""
        return shlex.join(("python", "-m", "lungjax.main", *self.arguments))


@dataclass(frozen=True)
class State:
    """What a run's folder holds."""

    kind: str  # one of STATES
    reason: str = ""  # a sentence; "" if finished
    report: Mapping[str, Any] | None = None  # of a finished run


@lru_cache(maxsize=1024)
def plan(name: str, options: Options) -> tuple[Run, ...]:
    """Returns the runs of an experiment, one a seed. Raises ValueError if it can't be loaded or makes no sense."""
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


def check(run: Run, data_dir: Path, counts: Mapping[str, Sequence[int]]) -> State:
    """Says what a run's folder holds, without its predictions.

    Args:
      run: of `plan`.
      data_dir: where data sets are prepared; the run's, if it is there, must be the one that it was trained on.
      counts: images per class of the study's splits, in label order; a run under the clean protocol may lack SPARE of
        them.
    """
    saved, report = run.folder / "config.json", run.folder / "report.json"
    if not saved.exists():
        return State("missing", f"there is no run in {run.folder}")
    try:
        wanted, have = load.resolve(run.config), overrides.from_json(saved.read_text(), str(saved))
    except ValueError as error:
        return State("unusable", str(error))
    changed = [line for line in overrides.difference(have, wanted) if line.split(":")[0] not in workdir.MUTABLE_FIELDS]
    if changed and (report.exists() or newest(run.folder, "last") is not None):
        more = f" and {len(changed) - FEW} more" if len(changed) > FEW else ""
        return State(
            "other configuration",
            f"{run.folder} holds a run of another configuration: {'; '.join(changed[:FEW])}{more}. Choose another "
            "--workdir, or delete that run",
        )
    if not report.exists():
        return State("unfinished", f"{run.folder} has no report.json yet")
    try:
        found = json.loads(report.read_text())
        facts, classes = found["facts"], found["classes"]
        held = {split: [facts["counts"][split][name] for name in classes] for split in facts["counts"]}
        steps, dataset, fingerprint = facts["steps"], facts["dataset"], facts["fingerprint"]
    except (ValueError, KeyError, TypeError) as error:
        return State("damaged", f"{report} can't be read: {type(error).__name__} {error}")
    if not early_stopping.ended(run.folder, have, steps):
        return State("unfinished", f"{run.folder} stopped at step {early_stopping.logged(run.folder)} of {steps}")
    if dataset != run.dataset:
        return State("other data", f"{run.folder} was trained on {dataset}, this table is about {run.dataset}")
    if list(datasets.classes(dataset) or classes) != list(classes):
        return State("other data", f"{run.folder} has the classes {', '.join(classes)}: not those of {dataset}")
    now = prepared_fingerprint(data_dir, dataset)
    if now and now != fingerprint:
        return State(
            "other data",
            f"{run.folder} was trained on {dataset} with fingerprint {fingerprint[:12]}, in {data_dir} it is "
            f"{now[:12]}: other images, labels or splits",
        )
    # The clean protocol takes the published split but for exact copies, of which a real set has few.
    spare = SPARE if run.protocol == "clean" else 0.0
    for split, published in counts.items():
        own = held.get(split, [])
        if len(own) != len(published) or any(
            not (1 - spare) * n <= have <= n for have, n in zip(own, published, strict=True)
        ):
            return State(
                "other data",
                f"{run.folder}: the {split} split has {listed(held.get(split, ()))} images a class, the study's "
                f"{listed(published)} ({', '.join(classes)})",
            )
    return State("finished", report=found)


def agree(states: Sequence[State]) -> list[State]:
    """Returns the states of an experiment's seeds, those marked that were trained on other data than the first."""
    prints = [state.report["facts"]["fingerprint"] for state in states if state.report]
    agreed = []
    for state in states:
        mine = state.report["facts"]["fingerprint"] if state.report else ""
        if mine and mine != prints[0]:
            why = f"its data has fingerprint {mine[:12]}, that of another seed {prints[0][:12]}"
            state = State("other data", f"{why}: they were trained on different images, labels or splits")
        agreed.append(state)
    return agreed


@lru_cache(maxsize=64)
def prepared_fingerprint(data_dir: Path, dataset: str) -> str:
    """Returns the fingerprint of a prepared data set, "" if it is not in `data_dir`."""
    where = prepared.directory(data_dir, dataset)
    return prepared.fingerprint(where) if prepared.is_prepared(where) else ""


def unprepared(run: Run, data_dir: Path) -> str:
    """Returns the name of the run's data set if it must be prepared first, "" if it is there or is drawn."""
    parts, entry = datasets.resolve(run.config.data.dataset)
    return "" if entry.synthetic or prepared.is_prepared(prepared.directory(data_dir, parts.full)) else parts.full


def listed(numbers: Sequence[int]) -> str:
    """Returns "908 / 388 / 45", or "no"."""
    return " / ".join(f"{n:,}" for n in numbers) or "no"


def read_predictions(run: Run, report: Mapping[str, Any], split: str) -> Predictions:
    """Returns the predictions of a finished run. Raises ValueError if they are missing, damaged or not the report's."""
    path = run.folder / f"predictions_{split}.csv"
    if not path.exists():
        raise ValueError(f"{path} is missing")
    found = predictions.read(path)
    counts, level = report["facts"]["counts"][split], report[split]["slice"]
    if list(found.classes) != list(report["classes"]):
        raise ValueError(f"{path}: classes {', '.join(found.classes)}, report.json has {', '.join(report['classes'])}")
    held = dict(zip(found.classes, np.bincount(found.labels, minlength=len(found.classes)).tolist(), strict=True))
    if held != counts:
        raise ValueError(
            f"{path}: {listed(list(held.values()))} images a class, report.json counts {listed(list(counts.values()))}"
        )
    accuracy = float((found.predicted == found.labels).mean())
    if abs(accuracy - level["accuracy"]) > 1e-6:
        raise ValueError(f"{path}: accuracy {accuracy:.6f}, report.json says {level['accuracy']:.6f}")
    return found


def execute(run: Run) -> tuple[int, str]:
    """Makes a run, or goes on with it, in a process of its own; its output goes to ours as it comes.

    Returns its exit code and the last lines that it wrote. Ctrl-C and SIGTERM are passed on once, so that the run
    saves; when it has, `signals.Interrupted` is raised. A second Ctrl-C ends it at once.
    """
    command = [sys.executable, "-m", "lungjax.main", *run.arguments]
    tail = b""
    # A session of its own: a terminal's Ctrl-C would otherwise reach it beside what is passed on, as a second one.
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    assert process.stdout is not None
    try:
        with signals.watching() as watch, selectors.DefaultSelector() as waiting:
            waiting.register(process.stdout, selectors.EVENT_READ)
            told = False
            while True:
                if watch.number and not told:
                    process.send_signal(signal.SIGTERM)
                    told = True
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
    return code, "\n".join([line for line in lines if line][-TAIL:])


def ending(code: int) -> str:
    """Says how a process ended that failed, such as "exit code 2" or "ended by SIGKILL"."""
    if code >= 0:
        return f"exit code {code}"
    killed = " (often for want of memory)" if -code == signal.SIGKILL else ""
    return f"ended by {signal.Signals(-code).name}{killed}"
