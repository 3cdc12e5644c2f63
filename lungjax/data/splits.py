"""Splits by group: no patient in two splits, every class in about its share."""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

SPLITS = ("train", "val", "test")
SHARES = {"train": 0.70, "val": 0.15, "test": 0.15}


def parse_study(cell: str) -> dict[str, int]:
    """Returns how often each split of a cell such as "train", "train*3" or "val+test" counts its image.

    Raises ValueError for anything else.
    """
    counts = {}
    for part in cell.split("+") if cell else []:
        split, _, times = part.partition("*")
        if split not in SPLITS or not (times or "1").isdigit():
            raise ValueError(f"{cell!r} is no list of splits such as train, train*3 or val+test")
        counts[split] = int(times or 1)
    return counts


def make_splits(
    labels: Sequence[int], groups: Sequence[str], shares: Mapping[str, float] = SHARES, seed: int = 0
) -> list[str]:
    """Returns the split of each example, drawn by group and stratified by class.

    Groups go from the biggest to the smallest, equal ones in an order drawn by `seed`, each to the split
    where it leaves the counts per class nearest to `shares` (which sum to one). The result depends
    on names, labels and seed only, not on the order of the examples.
    """
    names, member = np.unique(np.asarray(groups, dtype=np.str_), return_inverse=True)
    classes = int(max(labels)) + 1
    counts = np.zeros((len(names), classes))
    np.add.at(counts, (member, np.asarray(labels)), 1)
    counts = np.column_stack([counts, counts.sum(axis=1)])  # the total decides where the classes are even
    part = np.array(list(shares.values()))
    wanted = part[:, None] * counts.sum(axis=0)  # [splits, classes + 1]
    scale = 1 / np.maximum(wanted, 1e-9)
    drawn = [
        hashlib.blake2b(f"{seed}/{name}".encode(errors="surrogateescape"), digest_size=8).digest() for name in names
    ]
    order = sorted(range(len(names)), key=lambda i: (-counts[i, -1], drawn[i]))
    left = wanted.copy()
    chosen = np.zeros(len(names), np.int64)
    for i in order:
        # The squared distance to the wanted counts, relative to them, grows by this much in each split.
        worse = (((left - counts[i]) ** 2 - left**2) * scale).sum(axis=1)
        chosen[i] = int(np.argmin(worse))
        left[chosen[i]] -= counts[i]
    splits = list(shares)
    return [splits[chosen[m]] for m in member]


def complete(
    splits: Sequence[str], labels: Sequence[int], groups: Sequence[str], seed: int = 0
) -> tuple[list[str], list[str]]:
    """Returns the split of each example with missing ones made, and what was made, in words.

    `splits` are all "" (three splits are made) or all names; a val or test split that nobody gave is cut from
    the train split, by group. Raises ValueError if there is no train split to cut from.
    """
    given = set(splits)
    if given == {""}:
        return make_splits(labels, groups, SHARES, seed), [
            f"splits made by group, stratified by class, 70/15/15, seed {seed}"
        ]
    missing = [split for split in SPLITS if split not in given]
    if "train" in missing:
        raise ValueError(f"there is no train split, only {', '.join(sorted(given))}")
    if not missing:
        return list(splits), []
    shares = {split: SHARES[split] for split in ("train", *missing)}
    whole = sum(shares.values())
    rows = [i for i, split in enumerate(splits) if split == "train"]
    cut = make_splits(
        [labels[i] for i in rows], [groups[i] for i in rows], {s: v / whole for s, v in shares.items()}, seed
    )
    done = list(splits)
    for i, split in zip(rows, cut, strict=True):
        done[i] = split
    return done, [f"no {' and no '.join(missing)} split was given: cut from train by group, seed {seed}"]
