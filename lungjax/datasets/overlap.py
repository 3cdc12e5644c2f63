"""Whether images that are to test a network are of patients that it has seen; two prepared data sets are compared."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np

from lungjax.data import leakage, prepared
from lungjax.data.prepared import Prepared
from lungjax.datasets import DATASETS, resolve
from lungjax.datasets.build import near_duplicates

SHOWN = 5  # patients, sources or pairs that a refusal names
PSEUDONYM = re.compile("[0-9a-f]{12}")  # of a DICOM patient: the same in all folders prepared in one data_dir


def refuse(own: Prepared, other: Prepared, data_dir: Path, what: str) -> list[str]:
    """Raises ValueError if test images of `other` are of patients in train or val of `own`; returns doubts in words.

    Looked for, in this order: patients of the same name, where both are one data set in some version; images from a
    source that both hold, or that one of them is; equal pixels; near twins. The last two compare whole images where
    the data set is a stage and the one without it is prepared.

    Args:
      own: the data set of the run, with its splits.
      other: the images to be tested are its test split; may be the same data set.
      data_dir: where both are prepared.
      what: the tested images, for the message, such as "the test split of folder/b".
    """
    seen, rows = np.union1d(own.rows("train"), own.rows("val")), np.unique(other.rows("test"))
    refused = f"{what} can't test a run on {own.name}: "
    advice = "An external test needs patients that the run has not seen: name another --split or --dataset"
    groups = shared_groups(own, seen, other, rows)
    if groups:
        count = int(np.isin(other.columns["group"][rows], groups).sum())
        raise ValueError(
            f"{refused}{count:,} of its {len(rows):,} images are of {len(groups):,} patients that it was trained or "
            f"validated on, such as {', '.join(groups[:SHOWN])}. {advice}"
        )
    sources = shared_sources(own, seen, other, rows)
    if sources:
        raise ValueError(
            f"{refused}both hold images of {', '.join(sources[:SHOWN])}, where patients can be the same under other "
            f"names. {advice}"
        )
    wholes, doubts = [_whole(own, seen, data_dir), _whole(other, rows, data_dir)], []
    stages = [resolve(data.name)[0].stage for data in (own, other)]
    pairs = [pair for pair in wholes if pair is not None]
    if len(pairs) == 2:
        (own, seen), (other, rows) = pairs
    elif stages[0] != stages[1]:
        lacking = own.name if wholes[0] is None else other.name
        doubts.append(f"Near twins can't be told in different stages; prepare {lacking} without its stage as well.")
    found = leakage.cross(near_duplicates.side(own, seen), near_duplicates.side(other, rows))
    exact, near = found["exact"][1], found["near"][1]
    if exact or near:
        raise ValueError(
            f"{refused}of its {len(rows):,} images {exact:,} are exact copies and {near:,} near twins of images that "
            f"it was trained or validated on, such as {'; '.join(found['examples'][:SHOWN])}. {advice}"
        )
    return doubts + ([f"Not all near twins were looked for: {found['note']}."] if found["note"] else [])


def shared_groups(one: Prepared, rows: np.ndarray, other: Prepared, others: np.ndarray) -> list[str]:
    """Returns the names of patients that are among `rows` of one data set and `others` of another, sorted.

    Names mean the same person only in versions of one data set, and the pseudonyms of DICOM patients in any folder.
    """
    names = np.intersect1d(one.columns["group"][rows], other.columns["group"][others]).tolist()
    if _origin(one) == _origin(other):
        return [name for name in names if name]
    folders = all(resolve(data.name)[0].base == "folder" for data in (one, other))
    return [name for name in names if folders and PSEUDONYM.fullmatch(name)]


def shared_sources(one: Prepared, rows: np.ndarray, other: Prepared, others: np.ndarray) -> list[str]:
    """Returns the sources, sorted, that two different public data sets both have images of, or that one of them is.

    The sources of anyone's folder, and of drawn images, are no public names: there is none then.
    """
    if _origin(one) == _origin(other):
        return []
    held = []
    for data, at in ((one, rows), (other, others)):
        base = resolve(data.name)[0].base
        named = set() if base == "folder" or DATASETS[base].drawn else set(data.columns["source"][at].tolist())
        held.append((named | {DATASETS[base].collection}) - {""})
    return sorted(held[0] & held[1])


def _origin(data: Prepared) -> tuple[str, ...]:
    """Returns what the versions of one data set have in common; each folder is a data set of its own."""
    name = resolve(data.name)[0]
    return (name.base, name.config) if name.base == "folder" else (name.base,)


def _whole(data: Prepared, rows: np.ndarray, data_dir: Path) -> tuple[Prepared, np.ndarray] | None:
    """Returns the data set without its stage and the same images there; None if it isn't prepared or lacks one."""
    name = resolve(data.name)[0]
    if not name.stage:
        return data, rows
    for full in (replace(name, stage="").full, replace(name, stage="", size=None).full):
        place = prepared.directory(data_dir, full)
        if prepared.is_prepared(place):
            found = prepared.load(place, full)
            row = {file: i for i, file in enumerate(found.columns["file"].tolist())}
            wanted = data.columns["file"][rows].tolist()
            if all(file in row for file in wanted):
                return found, np.asarray([row[file] for file in wanted], np.int64)
    return None
