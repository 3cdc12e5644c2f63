"""Splits of one run: the parts of a cross-validation, and fewer training patients for a learning curve.

Both depend on names and labels alone, never on `train.seed` or on the order of the images, so that runs of other
seeds and networks are trained and tested on the same patients.
"""

import hashlib
from dataclasses import replace

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from lungjax.config import Config
from lungjax.data import splits
from lungjax.data.prepared import Prepared

LEAST = 3  # parts: one to test on, one to validate on, one to train on


def apply(data: Prepared, config: Config, near: np.ndarray) -> Prepared:
    """Returns `data` with the splits that `data.folds`, `data.fold` and `train.fraction` ask for.

    With folds, every image that is in a split of the clean protocol is dealt into that many parts by patient, where
    patients with near twins count as one; part `fold` is test, the next one val, the rest train. With a fraction,
    only that part of the train patients remains, of each class, and those of a smaller fraction are among those of a
    greater one. Name, fingerprint and images stay those of the prepared copy; `data` itself is not changed.

    Args:
      data: as `open_dataset` gives it, with the splits of its protocol.
      config: of the run; `config.check` has seen it.
      near: int64 [P, 2], rows of near twins in different groups (`near_duplicates.read`); only read with folds.

    Raises ValueError for folds of a study's protocol, and if a part would lack a class.
    """
    if config.data.folds:
        if data.protocol != "clean":
            raise ValueError(f"data.folds={config.data.folds}: {data.protocol} splits can't be dealt anew")
        part = deal(data, config.data.folds, near)
        test, val = config.data.fold, (config.data.fold + 1) % config.data.folds
        named = np.select([part == -1, part == test, part == val], ["", "test", "val"], "train")
        data = replace(data, columns=data.columns | {"split": named})
    return data if config.train.fraction == 1 else _fewer(data, config.train.fraction)


def deal(data: Prepared, count: int, near: np.ndarray) -> np.ndarray:
    """Returns the part of each image, int64 [N] in 0 to `count` - 1, -1 for those in no split of the clean protocol.

    No group, exact copy or near twin lies in two parts, and every part has every class, in shares and numbers as even
    as the groups allow.

    Raises ValueError, naming class and numbers, if a class has too few groups for that.
    """
    rows = np.flatnonzero(data.columns["split"] != "")
    labels, groups = data.columns["label"][rows], joined(data, rows, near)
    held = [len(np.unique(groups[labels == label])) for label in range(len(data.classes))]
    scarce = int(np.argmin(held))
    if held[scarce] < count:
        raise ValueError(
            f"data.folds={count}: {data.classes[scarce]} has {held[scarce]} patients (those with twins count as one) "
            f"in {data.name}, and each part needs one; " + _at_most(held[scarce])
        )
    named = splits.make_splits(labels.tolist(), groups.tolist(), {str(i): 1 / count for i in range(count)})
    members, first, group = np.unique(groups, return_index=True, return_inverse=True)
    images = np.zeros((len(members), len(data.classes)), np.int64)
    np.add.at(images, (group, labels), 1)
    place = _complete(np.asarray([int(named[row]) for row in first]), images, count)
    if place is None:
        raise ValueError(
            f"data.folds={count}: {data.name} can't be dealt so that each part has every class, because patients have "
            f"images of several classes; {_at_most(count - 1)}"
        )
    part = np.full(len(data.columns["label"]), -1, np.int64)
    part[rows] = place[group]
    return part


def _complete(place: np.ndarray, images: np.ndarray, count: int) -> np.ndarray | None:
    """Returns the parts of groups, int64 [G], with a group of every class in each; None if that can't be had.

    Where groups are of very unequal size, those of a rare class may all have been dealt to a few parts. The smallest
    group whose part has others of all its classes then moves. `place` [G]; `images` of each class, int64 [G, C].
    """
    place, has = place.copy(), images > 0
    for label in range(images.shape[1]):
        for part in range(count):
            if has[place == part, label].any():
                continue
            held = np.stack([has[place == i].sum(axis=0) for i in range(count)])  # groups, [parts, C]
            spare = has[:, label] & ((held[place] > 1) | ~has).all(axis=1)
            if not spare.any():
                return None
            place[min(np.flatnonzero(spare), key=lambda g: images[g].sum())] = part
    return place


def joined(data: Prepared, rows: np.ndarray, near: np.ndarray) -> np.ndarray:
    """Returns the group of each of `rows`, str [n], where groups that share a picture have one name, the first.

    A picture is shared by exact copies (`pixels`) and by near twins of which both, or copies of both, are in `rows`.
    """
    names, group = np.unique(data.columns["group"][rows], return_inverse=True)
    pixels = data.columns.get("pixels", data.columns["file"])
    pictures, seen = np.unique(pixels[rows], return_inverse=True)
    pairs = pixels[np.asarray(near, np.int64).reshape(-1, 2)]
    pairs = pairs[np.isin(pairs, pictures).all(axis=1)]
    twins = len(names) + np.searchsorted(pictures, pairs)  # nodes: the groups, then the pictures
    ends = np.concatenate([np.column_stack([group, len(names) + seen]), twins])
    nodes = len(names) + len(pictures)
    edges = coo_array((np.ones(len(ends), np.int8), (ends[:, 0], ends[:, 1])), shape=(nodes, nodes))
    member = connected_components(edges, directed=False)[1][: len(names)]
    first = np.unique(member, return_index=True)[1]  # names are sorted, so the first of a component is its least
    return names[first[member]][group]


def _at_most(count: int) -> str:
    return f"take at most data.folds={count}" if count >= LEAST else f"{LEAST} parts are the least there can be"


def _fewer(data: Prepared, fraction: float) -> Prepared:
    """Returns `data` with `fraction` of the groups of train, at least one image of each class that is there."""
    rows = data.rows("train")
    if not len(rows):
        return data
    names, group = np.unique(data.columns["group"][rows], return_inverse=True)
    counts = np.zeros((len(names), len(data.classes)))
    np.add.at(counts, (group, data.columns["label"][rows]), 1)
    order = sorted(range(len(names)), key=lambda i: _drawn(str(names[i])))
    # The first group with each class is in every fraction; whatever is added, it comes before the others.
    core = {next(i for i in order if counts[i, label]) for label in range(counts.shape[1]) if counts[:, label].any()}
    order.sort(key=lambda i: i not in core)
    kept: list[int] = []
    kind = counts.argmax(axis=1)  # of a group with several classes, the one with most images
    for label in range(counts.shape[1]):
        line = [i for i in order if kind[i] == label]
        least = sum(i in core for i in line)
        kept += line[: max(least, int(fraction * len(line) + 0.5))]
    gone = ~np.isin(data.columns["group"], names[kept])
    column = "split" if data.protocol == "clean" else "split_study"
    cells = data.columns[column].copy()
    for cell in np.unique(cells[gone]):
        cells[gone & (cells == cell)] = _without_train(str(cell))  # never longer than before
    return replace(data, columns=data.columns | {column: cells})


def _without_train(cell: str) -> str:
    """Returns a split, or a study's cell such as "train*3+test", without its train part."""
    return "+".join(part for part in cell.split("+") if part.partition("*")[0] != "train")


def _drawn(name: str) -> bytes:
    return hashlib.blake2b(f"fraction/{name}".encode(errors="surrogateescape"), digest_size=8).digest()
