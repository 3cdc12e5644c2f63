"""Splits of one run: cross-validation folds, one source left out, and subsets of the train patients.

They depend only on names and labels, so runs with different seeds or networks use the same patients.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from lungjax.config import Config, nearest
from lungjax.data import splits
from lungjax.data.labels import UNKNOWN, indicators
from lungjax.data.prepared import Prepared

MIN_FOLDS = 3  # one for test, one for val, one for train
VAL_SHARE = 0.15  # of the images from the sources that are not left out


def apply(data: Prepared, config: Config) -> Prepared:
    """Returns `data` with the splits that `data.folds`, `data.fold`, `data.test_source` and `train.fraction` define.

    Folds divide the images of the clean protocol by patient; patients linked by near duplicates count as one. Fold
    `data.fold` is test, the next one val, the rest train. For `data.test_source`, see `leave_out`. With
    `train.fraction`, only that fraction of the train patients of each class remains; smaller fractions are subsets of
    larger ones. `data.uncertain` sets unknown findings of the train split. Name and fingerprint are unchanged.
    Raises ValueError for folds with the study protocol, and if a fold, or train without the source, would lack a class.
    """
    if config.data.folds:
        if data.protocol != "clean":
            raise ValueError(f"data.folds={config.data.folds}: {data.protocol} splits can't be divided into folds")
        part = deal(data, config.data.folds)
        test, val = config.data.fold, (config.data.fold + 1) % config.data.folds
        split = np.select([part == -1, part == test, part == val], ["", "test", "val"], "train")
        data = replace(data, columns=data.columns | {"split": split})
    if config.data.test_source:
        data = replace(data, columns=data.columns | {"split": leave_out(data, config.data.test_source)})
    if config.data.uncertain != "ignore":
        if data.columns["label"].ndim == 1:
            raise ValueError(
                f"data.uncertain={config.data.uncertain}: {data.name} has one class per image, always known"
            )
        label, rows = data.columns["label"].copy(), data.rows("train")
        label[rows] = np.where(label[rows] == UNKNOWN, int(config.data.uncertain == "one"), label[rows])
        data = replace(data, columns=data.columns | {"label": label})
    return data if config.train.fraction == 1 else _take_fraction(data, config.train.fraction)


def deal(data: Prepared, count: int) -> np.ndarray:
    """Returns the fold of each image, int64 [N] from 0 to `count` - 1, or -1 if it has no split in the clean protocol.

    Groups, exact copies and near duplicates are never split up; every fold has every class, and the classes are as
    balanced as the groups allow. Raises ValueError if a class has too few groups or no such assignment is found.
    """
    rows = np.flatnonzero(data.columns["split"] != "")
    labels, groups = data.columns["label"][rows], linked_groups(data, rows)
    of_class = indicators(labels, len(data.classes)) == 1
    patients, name = min((len(np.unique(groups[of_class[:, i]])), name) for i, name in enumerate(data.classes))
    if patients < count:
        limit = f"at most {patients} folds" if patients >= MIN_FOLDS else "more patients"
        raise ValueError(f"data.folds={count}: {name} has {patients} patients in {data.name}; use {limit}")
    place = _divide(labels, groups, len(data.classes), {str(i): 1 / count for i in range(count)})
    if place is None:
        problem = f"{data.name} has patients with images of several classes, and a fold would lack a class"
        raise ValueError(f"data.folds={count}: {problem}; use fewer folds")
    part = np.full(len(data.columns["label"]), -1, np.int64)
    part[rows] = place
    return part


def source_names(data: Prepared) -> list[str]:
    """Returns the sources of the images in the clean protocol. Raises ValueError unless there are two, all known."""
    sources = data.columns["source"][data.columns["split"] != ""]
    names, unknown = np.unique(sources), int((sources == "").sum())
    if unknown:
        raise ValueError(f"{data.name}: the source of {unknown} images is unknown, so none can be left out; name it")
    if len(names) < 2:
        raise ValueError(f"{data.name} has images from one source only; leaving one out needs two or more")
    return [str(name) for name in names]


def leave_out(data: Prepared, source: str) -> np.ndarray:
    """Returns the split of each image, str [N]: test for the images of `source`, train and val for those of the others.

    Val has VAL_SHARE of the latter, divided as in `deal`; a class with a single patient is in train. Images of other
    sources that are linked to the test images by patient, copy or near duplicate are in no split. Raises ValueError
    for an unknown source, and if train would lack a class.
    """
    rows, name = np.flatnonzero(data.columns["split"] != ""), f"data.test_source={source}"
    if source not in (names := source_names(data)):
        raise ValueError(f"{name}: no such source in {data.name}; {nearest(source, names)}")
    test, groups = data.columns["source"][rows] == source, linked_groups(data, rows)
    rest = ~np.isin(groups, groups[test])
    labels, groups = data.columns["label"][rows][rest], groups[rest]
    images = indicators(labels, len(data.classes)).sum(axis=0)
    missing = [name for name, count in zip(data.classes, images, strict=True) if not count]
    if missing:
        remedy = "join sources, or leave out only others, each with --set=data.test_source=NAME"
        raise ValueError(f"{name}: no other source of {data.name} has images of {missing[0]} to train on; {remedy}")
    place = _divide(labels, groups, len(data.classes), {"0": 1 - VAL_SHARE, "1": VAL_SHARE})
    if place is None or place.all() or not place.any():
        raise ValueError(f"{name}: the other sources of {data.name} have too few patients for train and val")
    split = np.full(len(data.columns["split"]), "", "<U5")
    split[rows[test]] = "test"
    split[rows[rest]] = np.where(place == 0, "train", "val")
    return split


def _divide(labels: np.ndarray, groups: np.ndarray, classes: int, shares: Mapping[str, float]) -> np.ndarray | None:
    """Returns the part of each image, int64 [n]; `shares` has keys "0", "1", ... See `_fill_parts`."""
    parts = splits.make_splits(labels.tolist(), groups.tolist(), shares)
    members, first, group = np.unique(groups, return_index=True, return_inverse=True)
    images = np.zeros((len(members), classes), np.int64)
    np.add.at(images, group, indicators(labels, classes))
    place = _fill_parts(np.asarray([int(parts[row]) for row in first]), images, len(shares))
    return None if place is None else place[group]


def _fill_parts(place: np.ndarray, images: np.ndarray, count: int) -> np.ndarray | None:
    """Returns the fold of each group, int64 [G], so that each fold has every class; None if that is impossible.

    A class with fewer groups than folds is in the first ones. If groups differ greatly in size, those of a rare class
    may all be in a few folds. A fold that lacks a class gets the smallest group of it that another fold can spare.
    `place` [G] has initial folds; `images`, int64 [G, C], counts.
    """
    place, has = place.copy(), images > 0
    needed = np.minimum(has.sum(axis=0), count)  # folds with each class
    for label in range(images.shape[1]):
        for part in range(needed[label]):
            if has[place == part, label].any():
                continue
            groups = np.stack([has[place == i].sum(axis=0) for i in range(count)])  # [folds, C]
            free = place[:, None] >= needed
            spare = has[:, label] & ((groups[place] > 1) | ~has | free).all(axis=1)
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
    np.add.at(counts, group, indicators(data.columns["label"][rows], len(data.classes)))
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
