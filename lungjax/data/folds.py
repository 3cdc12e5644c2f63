"""Splits of one run: cross-validation folds, and subsets of the train patients for a learning curve.

Both depend only on names and labels, so runs with different seeds or networks use the same patients.
"""

from dataclasses import replace

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from lungjax.config import Config
from lungjax.data import splits
from lungjax.data.prepared import Prepared

MIN_FOLDS = 3  # one for test, one for val, one for train


def apply(data: Prepared, config: Config) -> Prepared:
    """Returns `data` with the splits that `data.folds`, `data.fold` and `train.fraction` define.

    Folds divide the images of the clean protocol by patient; patients linked by near duplicates count as one. Fold
    `data.fold` is test, the next one val, the rest train. With `train.fraction`, only that fraction of the train
    patients of each class remains; smaller fractions are subsets of larger ones. Name and fingerprint are unchanged.
    Raises ValueError for folds with the study protocol, and if a fold would lack a class.
    """
    if config.data.folds:
        if data.protocol != "clean":
            raise ValueError(f"data.folds={config.data.folds}: {data.protocol} splits can't be divided into folds")
        part = deal(data, config.data.folds)
        test, val = config.data.fold, (config.data.fold + 1) % config.data.folds
        split = np.select([part == -1, part == test, part == val], ["", "test", "val"], "train")
        data = replace(data, columns=data.columns | {"split": split})
    return data if config.train.fraction == 1 else _take_fraction(data, config.train.fraction)


def deal(data: Prepared, count: int) -> np.ndarray:
    """Returns the fold of each image, int64 [N] from 0 to `count` - 1, or -1 if it has no split in the clean protocol.

    Groups, exact copies and near duplicates are never split up; every fold has every class, and the classes are as
    balanced as the groups allow. Raises ValueError if a class has too few groups or no such assignment is found.
    """
    rows = np.flatnonzero(data.columns["split"] != "")
    labels, groups = data.columns["label"][rows], linked_groups(data, rows)
    patients, name = min((len(np.unique(groups[labels == i])), name) for i, name in enumerate(data.classes))
    if patients < count:
        limit = f"at most {patients} folds" if patients >= MIN_FOLDS else "more patients"
        raise ValueError(f"data.folds={count}: {name} has {patients} patients in {data.name}; use {limit}")
    parts = splits.make_splits(labels.tolist(), groups.tolist(), {str(i): 1 / count for i in range(count)})
    members, first, group = np.unique(groups, return_index=True, return_inverse=True)
    images = np.zeros((len(members), len(data.classes)), np.int64)
    np.add.at(images, (group, labels), 1)
    place = _fill_parts(np.asarray([int(parts[row]) for row in first]), images, count)
    if place is None:
        problem = f"{data.name} has patients with images of several classes, and a fold would lack a class"
        raise ValueError(f"data.folds={count}: {problem}; use fewer folds")
    part = np.full(len(data.columns["label"]), -1, np.int64)
    part[rows] = place[group]
    return part


def _fill_parts(place: np.ndarray, images: np.ndarray, count: int) -> np.ndarray | None:
    """Returns the fold of each group, int64 [G], so that each fold has every class; None if that is impossible.

    If groups differ greatly in size, those of a rare class may all be in a few folds. A fold that lacks a class gets
    the smallest group of it that another fold can spare. `place` [G] has initial folds; `images`, int64 [G, C], counts.
    """
    place, has = place.copy(), images > 0
    for label in range(images.shape[1]):
        for part in range(count):
            if has[place == part, label].any():
                continue
            groups = np.stack([has[place == i].sum(axis=0) for i in range(count)])  # [folds, C]
            spare = has[:, label] & ((groups[place] > 1) | ~has).all(axis=1)
            if not spare.any():
                return None
            place[min(np.flatnonzero(spare), key=lambda g: images[g].sum())] = part
    return place


def linked_groups(data: Prepared, rows: np.ndarray) -> np.ndarray:
    """Returns the groups of `rows`, str [n]; those linked by copies or near duplicates in `rows` get one name."""
    names, group = np.unique(data.columns["group"][rows], return_inverse=True)
    pixels = data.columns.get("pixels", data.columns["file"])
    pictures, picture = np.unique(pixels[rows], return_inverse=True)
    pairs = pixels[data.near]
    pairs = pairs[np.isin(pairs, pictures).all(axis=1)]
    twins = len(names) + np.searchsorted(pictures, pairs)  # nodes: the groups, then the pictures
    ends = np.concatenate([np.column_stack([group, len(names) + picture]), twins])
    nodes = len(names) + len(pictures)
    edges = coo_array((np.ones(len(ends), np.int8), (ends[:, 0], ends[:, 1])), shape=(nodes, nodes))
    member = connected_components(edges, directed=False)[1][: len(names)]
    first = np.unique(member, return_index=True)[1]  # of each component
    return names[first[member]][group]


def _take_fraction(data: Prepared, fraction: float) -> Prepared:
    """Returns `data` with `fraction` of the train groups, and at least one image of each class in train."""
    rows = data.rows("train")
    if not len(rows):
        return data
    names, group = np.unique(data.columns["group"][rows], return_inverse=True)
    counts = np.zeros((len(names), len(data.classes)))
    np.add.at(counts, (group, data.columns["label"][rows]), 1)
    order = sorted(range(len(names)), key=lambda i: splits.hash_order(f"fraction/{names[i]}"))
    # The first group of each class is in every fraction, so it comes before the others.
    core = {next(i for i in order if counts[i, label]) for label in np.flatnonzero(counts.any(axis=0))}
    order.sort(key=lambda i: i not in core)
    selected: list[int] = []
    main_class = counts.argmax(axis=1)
    for label in range(counts.shape[1]):
        line = [i for i in order if main_class[i] == label]
        selected += line[: max(sum(i in core for i in line), int(fraction * len(line) + 0.5))]
    dropped = ~np.isin(data.columns["group"], names[selected])
    column = "split" if data.protocol == "clean" else "split_study"
    cells = data.columns[column].copy()
    for cell in np.unique(cells[dropped]):
        parts = [part for part in str(cell).split("+") if part.partition("*")[0] != "train"]
        cells[dropped & (cells == cell)] = "+".join(parts)  # never longer than before
    return replace(data, columns=data.columns | {column: cells})
