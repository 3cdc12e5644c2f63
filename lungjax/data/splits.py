"""Splits by group: no patient is in two splits, and class frequencies are similar."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lungjax.data.labels import indicators

SPLITS = ("train", "val", "test")
SHARES = {"train": 0.70, "val": 0.15, "test": 0.15}


def parse_study(cell: str) -> dict[str, int]:
    """Returns the repetitions per split in a cell such as "train*3" or "val+test". Raises ValueError for other text."""
    counts = {}
    for part in cell.split("+") if cell else []:
        split, _, times = part.partition("*")
        if split not in SPLITS or not (times or "1").isdigit():
            raise ValueError(f"{cell!r} is not a list of splits such as train, train*3 or val+test")
        counts[split] = int(times or 1)
    return counts


def study_cells(count: int, **parts: Iterable[int]) -> list[str]:
    """Returns the split of each of `count` rows, given the rows of each split; "" for rows in none."""
    names = {row: split for split, rows in parts.items() for row in rows}
    return [names.get(row, "") for row in range(count)]


def hash_order(text: str) -> bytes:
    """Returns a sort key that puts texts in a fixed pseudo-random order."""
    return hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=8).digest()


def make_splits(
    labels: Sequence[Any], groups: Sequence[str], shares: Mapping[str, float] = SHARES, seed: int = 0
) -> list[str]:
    """Returns the split of each example, drawn by group and stratified by class.

    Groups are assigned in order of decreasing size (`seed` determines the order of groups of equal size), each to the
    split that keeps the counts per class closest to `shares`, which sum to one. The order of examples has no effect.
    """
    names, member = np.unique(np.asarray(groups, dtype=np.str_), return_inverse=True)
    of_class = indicators(np.asarray(labels), int(np.max(labels)) + 1)
    counts = np.zeros((len(names), of_class.shape[1] + 1))  # the last column, the number of images, breaks ties
    np.add.at(counts, member, np.column_stack([of_class, np.ones(len(of_class))]))
    remaining = np.array(list(shares.values()))[:, None] * counts.sum(axis=0)  # [splits, classes + 1]
    scale = 1 / np.maximum(remaining, 1e-9)
    order = sorted(range(len(names)), key=lambda i: (-counts[i, -1], hash_order(f"{seed}/{names[i]}")))
    choice = np.zeros(len(names), np.int64)
    for i in order:
        # Growth of the squared distance to the target counts, relative to them, in each split.
        growth = (((remaining - counts[i]) ** 2 - remaining**2) * scale).sum(axis=1)
        choice[i] = int(np.argmin(growth))
        remaining[choice[i]] -= counts[i]
    splits = list(shares)
    return [splits[choice[m]] for m in member]
