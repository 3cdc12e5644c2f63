"""Compares two prepared data sets: do the test images of one show patients that a network was trained on?"""

import re
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import numpy as np

from lungjax.data import leakage, prepared
from lungjax.data.prepared import Prepared
from lungjax.datasets import DATASETS, resolve

MAX_NAMES = 5  # patients, sources or pairs in an error message
PSEUDONYM = re.compile("[0-9a-f]{12}")  # of a DICOM patient; the same in all folders prepared in one data_dir


def report(one: Prepared, other: Prepared) -> str:
    """Returns, as Markdown, the patients and images in both data sets. Raises ValueError if either is a stage."""
    for data in (one, other):
        if resolve(data.name)[0].stage:
            raise ValueError(f"--cross compares complete images, but {data.name} is a stage; omit the stage")
    shared = leakage.cross(one, other)
    lines = [f"# {one.name} and {other.name}", "", *(f"- {line}" for line in shared["lines"])]
    return "\n".join([*lines, *(f"  - {pair}" for pair in shared["examples"])]) + "\n"


def check(own: Prepared, other: Prepared, data_dir: Path, what: str, drop: bool = False) -> tuple[Prepared, list[str]]:
    """Checks whether test images of `other` show patients in train or val of `own`; returns `other` and notes.

    The checks are patient names, sources, equal pixels, and near duplicates. For stages, the last two compare the
    complete images if these are prepared in `data_dir`. `what` names the test images. Raises ValueError for shared
    patients; with `drop`, their images leave the test split instead, but a shared source, whose patients are unknown,
    and a test split without other patients remain errors.
    """
    seen, rows = np.union1d(own.rows("train"), own.rows("val")), np.unique(other.rows("test"))
    view, groups = other, other.columns["group"][rows]
    removed = np.zeros(len(rows), bool)
    total = f"{len(rows):,} images"

    def fail(reason: str, examples: list[str]) -> NoReturn:
        advice = "An external test needs patients that the run has not seen: choose another --split or --dataset"
        advice += "" if drop else ", or leave out the shared patients with --overlap=drop"
        reason = f"{reason} {'; '.join(examples[:MAX_NAMES])}. {advice}"
        raise ValueError(f"{what} can't be used to test a run trained on {own.name}: {reason}")

    if names := shared_groups(own, seen, other, rows):
        removed = np.isin(groups, names)
        text = f"{removed.sum():,} of its {total} show {len(names):,} patients of the run's train or val split, such as"
        if not drop:
            fail(text, names)
    if sources := shared_sources(own, seen, other, rows):
        fail("patients may be the same under different names, since both include images of", sources)
    doubts = []
    sides = [_without_stage(own, seen, data_dir), _without_stage(other, rows, data_dir)]
    if sides[0] and sides[1]:
        (own, seen), (other, rows) = sides[0], sides[1]
    elif resolve(own.name)[0].stage != resolve(other.name)[0].stage:
        missing = other.name if sides[0] else own.name
        doubts.append(f"Near duplicates can't be detected between stages; also prepare {missing} without its stage.")
    shared = leakage.cross(own, other, seen, rows)
    exact, near = shared["exact"][1], shared["near"][1]
    if exact or near:
        copies = f"{exact:,} are exact copies and {near:,} near duplicates"
        text = f"of its {total}, {copies} of images in the run's train or val split, such as"
        removed |= shared["b_rows"] | (np.isin(groups, groups[shared["b_rows"]]) & (groups != ""))
        if not drop:
            fail(text, shared["examples"])
    if removed.all():
        fail("no image is left after excluding", ["the patients that the run has seen"])
    if removed.any():
        count = f"{removed.sum():,} of {total} of {len(np.unique(groups[removed])):,} patients"
        doubts.append(f"--overlap=drop left out {count} that the run has seen in training or validation.")
        splits = view.columns["split"].copy()
        splits[np.unique(view.rows("test"))[removed]] = ""
        view = replace(view, columns=view.columns | {"split": splits})
    if shared["note"]:
        doubts.append(f"The search for duplicates was incomplete: {shared['note']}.")
    return view, doubts


def shared_groups(one: Prepared, rows: np.ndarray, other: Prepared, others: np.ndarray) -> list[str]:
    """Returns the names of patients in `rows` of one data set and in `others` of another, sorted.

    A name identifies the same person only across versions of one data set, a DICOM pseudonym across all folders.
    """
    names = np.intersect1d(one.columns["group"][rows], other.columns["group"][others]).tolist()
    if _identity(one) == _identity(other):
        return [name for name in names if name]
    folders = all(resolve(data.name)[0].base == "folder" for data in (one, other))
    return [name for name in names if folders and PSEUDONYM.fullmatch(name)]


def shared_sources(one: Prepared, rows: np.ndarray, other: Prepared, others: np.ndarray) -> list[str]:
    """Returns the common sources of two data sets, sorted, including each other; private sources are ignored."""
    if _identity(one) == _identity(other):
        return []
    sources = []
    for data, at in ((one, rows), (other, others)):
        base = resolve(data.name)[0].base
        private = base == "folder" or DATASETS[base].synthetic
        names = set() if private else set(data.columns["source"][at].tolist())
        sources.append((names | {DATASETS[base].collection}) - {""})
    return sorted(sources[0] & sources[1])


def _identity(data: Prepared) -> tuple[str, ...]:
    """Returns the part of the name that all versions of a data set share; every folder is a separate data set."""
    name = resolve(data.name)[0]
    return (name.base, name.config) if name.base == "folder" else (name.base,)


def _without_stage(data: Prepared, rows: np.ndarray, data_dir: Path) -> tuple[Prepared, np.ndarray] | None:
    """Returns the data set without its stage, and the same rows in it; None if it is not prepared or lacks an image."""
    name = resolve(data.name)[0]
    if not name.stage:
        return data, rows
    files = data.columns["file"][rows].tolist()
    for full in (replace(name, stage="").full, replace(name, stage="", size=None).full):
        folder = prepared.directory(data_dir, full)
        if prepared.is_prepared(folder):
            complete = prepared.load(folder, full)
            row = {file: i for i, file in enumerate(complete.columns["file"].tolist())}
            if row.keys() >= set(files):
                return complete, np.asarray([row[file] for file in files], np.int64)
    return None
