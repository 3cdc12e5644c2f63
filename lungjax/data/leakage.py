"""Which images a protocol keeps, and how far a split leaks: exact copies, near twins and shared patients.

A published split ("study") is kept as it is and counted; the clean protocol leaves images out until no test image
has a twin or its patient in train or val. Everything here works on columns and doesn't touch an image.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lungjax.data import duplicates
from lungjax.data.prepared import SPLITS

SHOWN = 20  # pairs that are named; the counts are complete
TRAIN = SPLITS[0]


def clean(
    splits: Sequence[str],
    labels: Sequence[int],
    groups: Sequence[str],
    pixels: Sequence[str],
    near: np.ndarray,
    group_name: str = "patients",
) -> tuple[list[str], list[str]]:
    """Returns the splits of the clean protocol, with "" for images left out, and what was left out, in words.

    Test goes before val and val before train: an image goes if its group is also in a later split, if an equal
    image is kept already (the copy in the latest split stays; with different labels none does), or if a near
    twin is kept in a later split. Of several copies in a split, the one of the first group name stays.

    Args:
        splits: train, val, test, or "" for images that are out from the start.
        labels: of each image.
        groups: of each image.
        pixels: of each image; equal for exact copies.
        near: int64 [P, 2], pairs of near twins, see `duplicates.near_twins`.
        group_name: what groups are, for the words.

    Raises ValueError for another split or columns of different lengths.
    """
    count = len(splits)
    if not len(labels) == len(groups) == len(pixels) == count:
        raise ValueError(f"{count} splits, {len(labels)} labels, {len(groups)} groups and {len(pixels)} pixels")
    if unknown := sorted(set(splits) - {"", *SPLITS}):
        raise ValueError(f"split {unknown[0]!r}; allowed are {', '.join(SPLITS)} and '' (left out)")
    rank = np.array([SPLITS.index(split) if split else -1 for split in splits], np.int64)  # train 0, test 2
    begun = rank.copy()
    names, group = np.unique(np.asarray(groups, np.str_), return_inverse=True)
    same = np.unique(np.asarray(pixels, np.str_), return_inverse=True)[1]
    label = np.asarray(labels)

    latest = np.full(len(names), -1)
    np.maximum.at(latest, group, rank)
    torn = (rank >= 0) & (rank < latest[group])
    rank[torn] = -1

    conflict = _conflicting(same, label, begun >= 0)[same] & (rank >= 0)
    rank[conflict] = -1
    order = np.lexsort((np.arange(count), group, -rank, same))
    first = order[np.unique(same[order], return_index=True)[1]]  # of each set of copies, in the latest split
    kept = first[same]
    copies = (rank >= 0) & (kept != np.arange(count))
    rank[copies] = -1

    pairs = kept[np.asarray(near, np.int64).reshape(-1, 2)]
    both = np.concatenate([pairs, pairs[:, ::-1]])
    twins = np.zeros(count, bool)
    for place in (1, 0):  # val before train: what val loses to test, train needn't avoid
        earlier, later = both.T
        lost = earlier[(rank[earlier] == place) & (rank[later] > place)]
        twins[lost] = True
        rank[lost] = -1
    remain = both[(rank[both] >= 0).all(axis=1) & (label[both[:, 0]] != label[both[:, 1]])]

    notes = []
    for lost, why in (
        (torn, f"their {group_name} are also in a later split"),
        (conflict, "equal images have different labels"),
        (copies, "copies of an image that is kept"),
        (twins, "near twins of an image in a later split"),
    ):
        if lost.any():
            notes.append(f"left out of the clean protocol: {_many(int(lost.sum()), 'image')} ({why})")
    if len(remain):
        notes.append(f"{_many(len(remain) // 2, 'near pair')} in one split with different labels stay: look at them")
    return [SPLITS[r] if r >= 0 else "" for r in rank], notes


def leaks(
    members: Mapping[str, Sequence[int]], groups: Sequence[str], pixels: Sequence[str], near: np.ndarray
) -> dict[str, dict[str, int]]:
    """Counts how many images of val and of test a split has shown to the network in training.

    Args:
        members: the images of each split; an image that a split counts several times counts once.
        groups: of each image.
        pixels: of each image; equal for exact copies.
        near: int64 [P, 2], pairs of near twins.

    Returns, for val and test if they have images: `images`; `exact_twin_in_train` (equal pixels, or the image
    itself); `near_twin_in_train` and no exact one; `group_in_train`; `any` of these; for test also
    `exact_twin_in_val`, which matters where val chose the epoch.
    """
    group = np.unique(np.asarray(groups, np.str_), return_inverse=True)[1]
    same = np.unique(np.asarray(pixels, np.str_), return_inverse=True)[1]
    rows = {split: np.unique(np.asarray(members.get(split, ()), np.int64)) for split in SPLITS}
    trained = np.isin(same, same[rows[TRAIN]])
    pairs = same[np.asarray(near, np.int64).reshape(-1, 2)]
    pairs = np.concatenate([pairs, pairs[:, ::-1]])
    near_train = np.isin(same, pairs[np.isin(pairs[:, 1], same[rows[TRAIN]]), 0]) & ~trained
    known = np.isin(group, group[rows[TRAIN]])
    result = {}
    for split in SPLITS[1:]:
        at = rows[split]
        if len(at):
            result[split] = {
                "images": len(at),
                "exact_twin_in_train": int(trained[at].sum()),
                "near_twin_in_train": int(near_train[at].sum()),
                "group_in_train": int(known[at].sum()),
                "any": int((trained | near_train | known)[at].sum()),
            }
            if split == "test":
                result[split]["exact_twin_in_val"] = int(np.isin(same[at], same[rows["val"]]).sum())
    return result


def leak_notes(
    found: Mapping[str, Mapping[str, int]], of: str = "the study's split", group_name: str = "patients"
) -> list[str]:
    """Returns a sentence for each split of `leaks`."""
    notes = []
    for split, counts in found.items():
        exact, near, shared = (counts[f"{k}_in_train"] for k in ("exact_twin", "near_twin", "group"))
        text = (
            f"{exact:,} of {counts['images']:,} {split} images of {of} {_have(exact)} an exact copy in train, "
            f"{near:,} a near twin, {shared:,} {'shares' if shared == 1 else 'share'} {group_name}; "
            f"{counts['any']:,} {_have(counts['any'])} any of these"
        )
        if counts.get("exact_twin_in_val"):
            text += f"; {counts['exact_twin_in_val']:,} {_have(counts['exact_twin_in_val'])} an exact copy in val"
        notes.append(text)
    return notes


def pairs_named(
    members: Mapping[str, Sequence[int]],
    files: Sequence[str],
    labels: Sequence[Any],
    pixels: Sequence[str],
    near: np.ndarray,
    shown: int = SHOWN,
) -> list[str]:
    """Returns at most `shown` pairs such as "a.png (test, COVID) = b.png (train, Normal)", the worst first.

    "=" joins exact copies (one pair for each set of them), "~" near twins. Pairs with different labels come first,
    then pairs over two splits, exact copies before near twins, then by name. Images in no split are not named.
    """
    where: dict[int, list[str]] = {}
    for split in SPLITS:
        for i in np.unique(np.asarray(members.get(split, ()), np.int64)).tolist():
            where.setdefault(i, []).append(split)
    same = np.unique(np.asarray(pixels, np.str_), return_inverse=True)[1]
    used = np.array(sorted(where, key=lambda i: files[i]), np.int64)
    sets: dict[int, list[int]] = {}
    for i in used.tolist():
        sets.setdefault(int(same[i]), []).append(i)

    def badness(i: int, j: int) -> tuple[bool, bool]:
        return labels[i] == labels[j], where[i] == where[j]  # False sorts first

    rated: list[tuple[tuple[bool, bool], str, int, int]] = []
    for copies in (found for found in sets.values() if len(found) > 1):
        kinds = {(str(labels[i]), *where[i]): i for i in reversed(copies)}.values()  # the first by name of each kind
        choice = [(i, j) for i in kinds for j in kinds if files[i] < files[j]] or [(copies[0], copies[1])]
        i, j = min(choice, key=lambda pair: (badness(*pair), files[pair[0]], files[pair[1]]))
        rated.append((badness(i, j), " = ", i, j))
    for i, j in np.asarray(near, np.int64).reshape(-1, 2).tolist():
        if i in where and j in where:
            i, j = sorted((i, j), key=lambda k: files[k])
            rated.append((badness(i, j), " ~ ", i, j))
    rated.sort(key=lambda r: (r[0], r[1] != " = ", files[r[2]], files[r[3]]))
    return [
        join.join(f"{files[k]} ({'+'.join(where[k])}, {labels[k]})" for k in (i, j)) for _, join, i, j in rated[:shown]
    ]


@dataclass(frozen=True, eq=False)
class Side:
    """The columns of one prepared data set that `cross` compares."""

    name: str
    files: Sequence[str]
    groups: Sequence[str]
    pixels: Sequence[str]  # equal for exact copies
    hashes: np.ndarray  # uint64 [N], see `duplicates.phash`
    read: Callable[[int], np.ndarray]  # the gray picture of a row, uint8 [H, W]


def cross(a: Side, b: Side, group_name: str = "patients") -> dict[str, Any]:
    """Finds groups and images that two data sets share.

    Returns `names`; `images`: of each; `groups`: names of groups in both; `exact` and `near`: how many images of
    each have an exact copy, or else a near twin, in the other; `examples`: at most 20 named pairs; `note`: what the
    search left out, or ""; `lines`: all of it in words.
    """
    shared = sorted(set(a.groups) & set(b.groups))
    both = set(a.pixels) & set(b.pixels)
    exact = [int(np.isin(np.asarray(side.pixels, np.str_), sorted(both)).sum()) for side in (a, b)] if both else [0, 0]
    place: dict[str, int] = {}
    for j in sorted(range(len(b.files)), key=lambda j: b.files[j], reverse=True):
        place[b.pixels[j]] = j
    pairs = [(i, place[a.pixels[i]]) for i in range(len(a.files)) if a.pixels[i] in both]
    size = len(a.files)
    near = duplicates.near_twins(
        np.concatenate([np.asarray(side.hashes, np.uint64) for side in (a, b)]),
        ["a"] * size + ["b"] * len(b.files),  # each data set is one group: only pairs over both are sought
        [*a.pixels, *b.pixels],
        lambda i: a.read(i) if i < size else b.read(i - size),
    )
    named = [(i, j - size) for i, j in near.pairs.tolist()]
    counts = []
    for side, rows in ((a, [i for i, _ in named]), (b, [j for _, j in named])):
        alike = {side.pixels[i] for i in rows} - both
        counts.append(sum(p in alike for p in side.pixels))
    room = SHOWN - min(len(named), SHOWN // 2)  # so that some of each kind are seen
    examples = [
        f"{a.files[i]} {join} {b.files[j]}"
        for join, found, most in (("=", pairs, room), ("~", named, SHOWN))
        for i, j in sorted(found, key=lambda p: (a.files[p[0]], b.files[p[1]]))[:most]
    ]
    lines = [
        f"{group_name} with the same name in {a.name} and {b.name}: {len(shared):,}"
        + (f" ({', '.join(shared[:SHOWN])}{', ...' if len(shared) > SHOWN else ''})" if shared else "")
    ]
    for side, other, equal, alike_n in ((a, b, exact[0], counts[0]), (b, a, exact[1], counts[1])):
        lines.append(
            f"{equal:,} of {len(side.files):,} images of {side.name} {_have(equal)} an exact copy in {other.name}, "
            f"{alike_n:,} a near twin"
        )
    lines += [near.note] if near.note else []
    return {
        "names": [a.name, b.name],
        "images": [len(a.files), len(b.files)],
        "groups": shared,
        "exact": exact,
        "near": counts,
        "examples": examples[:SHOWN],
        "note": near.note,
        "lines": lines,
    }


def _conflicting(same: np.ndarray, label: np.ndarray, used: np.ndarray) -> np.ndarray:
    """Says of each set of copies whether its used images have several labels, bool [sets]."""
    kinds = np.unique(np.column_stack([same, np.unique(label, return_inverse=True)[1]])[used], axis=0)
    return np.bincount(kinds[:, 0], minlength=int(same.max(initial=-1)) + 1) > 1


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def _have(count: int) -> str:
    return "has" if count == 1 else "have"
