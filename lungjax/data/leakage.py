"""Leakage between splits: exact copies, near twins and shared patients, counted or removed.

A published split ("study") is left unmodified and counted; the clean protocol removes images until no test image has a
twin or its patient in train or val. Everything here works on columns and reads no image.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lungjax.data import duplicates
from lungjax.data.prepared import SPLITS

MAX_PAIRS = 20  # pairs that are listed; the counts are complete


def clean(
    splits: Sequence[str],
    labels: Sequence[int],
    groups: Sequence[str],
    pixels: Sequence[str],
    near: np.ndarray,
    group_name: str,
) -> tuple[list[str], list[str]]:
    """Returns the splits of the clean protocol, with "" for removed images, and notes on what was removed.

    Test goes before val and val before train. An image is removed if its group is also in a later split, if an exact
    copy is kept (the copy in the latest split stays; none does if their labels differ), or if a near twin is in a
    later split. Of several copies in a split, the one with the first group name stays.

    Columns hold a value per image: `splits` is "" for images that are in none from the start, and `pixels` is equal
    for exact copies. `near` int64 [P, 2] are pairs of near twins, see `duplicates.near_twins`. The notes call groups
    `group_name`, a plural noun.
    """
    count = len(splits)
    rank = np.array([SPLITS.index(split) if split else -1 for split in splits], np.int64)  # train 0, test 2, none -1
    initial = rank.copy()
    group, same, label = _codes(groups), _codes(pixels), np.asarray(labels)
    notes = []

    def remove(rows: np.ndarray, reason: str) -> None:
        rank[rows] = -1
        if rows.any():
            notes.append(f"removed from the clean protocol: {_plural(int(rows.sum()), 'image')} ({reason})")

    latest = np.full(group.max(initial=-1) + 1, -1)
    np.maximum.at(latest, group, rank)
    remove((rank >= 0) & (rank < latest[group]), f"their {group_name} are also in a later split")
    conflict = _conflicting(same, label, initial >= 0)[same]
    remove(conflict & (rank >= 0), "equal images have different labels")
    order = np.lexsort((np.arange(count), group, -rank, same))
    representative = order[np.unique(same[order], return_index=True)[1]][same]  # of each set of copies
    remove((rank >= 0) & (representative != np.arange(count)), "copies of another image")

    pairs = representative[np.asarray(near, np.int64).reshape(-1, 2)]
    both = np.concatenate([pairs, pairs[:, ::-1]])
    earlier, later = both.T
    before = rank.copy()
    for place in (1, 0):  # val before train: train needn't avoid what val loses to test
        rank[earlier[(rank[earlier] == place) & (rank[later] > place)]] = -1
    remove((before >= 0) & (rank < 0), "near twins of an image in a later split")
    remain = both[(rank[both] >= 0).all(axis=1) & (label[earlier] != label[later])]
    if len(remain):
        notes.append(f"{_plural(len(remain) // 2, 'near pair')} in one split with different labels: check them")
    return [SPLITS[r] if r >= 0 else "" for r in rank], notes


def leaks(
    members: Mapping[str, Sequence[int]], groups: Sequence[str], pixels: Sequence[str], near: np.ndarray
) -> dict[str, dict[str, int]]:
    """Counts how many images of val and test are known from train.

    `members` are the images of each split; repeated images count once. Other arguments as in `clean`. Returns, for val
    and test if they have images: `images`; `exact_twin_in_train` (equal pixels, or the image itself);
    `near_twin_in_train` and no exact one; `group_in_train`; `any` of these; for test also `exact_twin_in_val`, which
    matters because val selects the epoch.
    """
    group, same = _codes(groups), _codes(pixels)
    rows = {split: np.unique(np.asarray(members.get(split, ()), np.int64)) for split in SPLITS}
    train = rows["train"]
    exact = np.isin(same, same[train])
    pairs = same[np.asarray(near, np.int64).reshape(-1, 2)]
    pairs = np.concatenate([pairs, pairs[:, ::-1]])
    twin = np.isin(same, pairs[np.isin(pairs[:, 1], same[train]), 0]) & ~exact
    patient = np.isin(group, group[train])
    result = {}
    for split in SPLITS[1:]:
        at = rows[split]
        if len(at):
            result[split] = {
                "images": len(at),
                "exact_twin_in_train": int(exact[at].sum()),
                "near_twin_in_train": int(twin[at].sum()),
                "group_in_train": int(patient[at].sum()),
                "any": int((exact | twin | patient)[at].sum()),
            }
            if split == "test":
                result[split]["exact_twin_in_val"] = int(np.isin(same[at], same[rows["val"]]).sum())
    return result


def leak_notes(leaks: Mapping[str, Mapping[str, int]], of: str, group_name: str) -> list[str]:
    """Returns a sentence for each split in the result of `leaks`; `of` names the splits."""
    notes = []
    for split, counts in leaks.items():
        exact, near, shared = (counts[f"{k}_in_train"] for k in ("exact_twin", "near_twin", "group"))
        text = (
            f"{exact:,} of {counts['images']:,} {split} images of {of} {_have(exact)} an exact copy in train, "
            f"{near:,} a near twin, {shared:,} {'shares' if shared == 1 else 'share'} {group_name}; "
            f"{counts['any']:,} {_have(counts['any'])} any of these"
        )
        if in_val := counts.get("exact_twin_in_val"):
            text += f"; {in_val:,} {_have(in_val)} an exact copy in val"
        notes.append(text)
    return notes


def pairs_named(
    members: Mapping[str, Sequence[int]],
    files: Sequence[str],
    labels: Sequence[Any],
    pixels: Sequence[str],
    near: np.ndarray,
) -> list[str]:
    """Returns at most MAX_PAIRS pairs such as "a.png (test, COVID) = b.png (train, Normal)", the worst first.

    "=" joins exact copies (one pair per set of copies), "~" near twins. Pairs with different labels come first, then
    pairs across splits, exact copies before near twins, then by name. Images in no split are left out.
    """
    where: dict[int, list[str]] = {}
    for split in SPLITS:
        for i in np.unique(np.asarray(members.get(split, ()), np.int64)).tolist():
            where.setdefault(i, []).append(split)
    same = _codes(pixels)
    sets: dict[int, list[int]] = {}
    for i in sorted(where, key=lambda i: files[i]):
        sets.setdefault(int(same[i]), []).append(i)

    def rate(i: int, join: str, j: int) -> tuple[Any, ...]:
        i, j = sorted((i, j), key=lambda k: files[k])
        return labels[i] == labels[j], where[i] == where[j], join != "=", files[i], files[j], i, join, j

    rated = []
    for copies in sets.values():
        if len(copies) > 1:
            kinds = {(str(labels[i]), *where[i]): i for i in reversed(copies)}.values()  # the first name of each kind
            choices = [(i, j) for i in kinds for j in kinds if files[i] < files[j]] or [(copies[0], copies[1])]
            rated.append(min(rate(i, "=", j) for i, j in choices))
    for i, j in np.asarray(near, np.int64).reshape(-1, 2).tolist():
        if i in where and j in where:
            rated.append(rate(i, "~", j))
    texts = [f"{file} ({'+'.join(where[i])}, {labels[i]})" if i in where else "" for i, file in enumerate(files)]
    return [f"{texts[i]} {join} {texts[j]}" for *_, i, join, j in sorted(rated)[:MAX_PAIRS]]


@dataclass(frozen=True, eq=False)
class Side:
    """The columns of one prepared data set that `cross` compares."""

    name: str
    files: Sequence[str]
    groups: Sequence[str]
    pixels: Sequence[str]  # equal for exact copies
    hashes: np.ndarray  # uint64 [N], see `duplicates.phash`
    read: Callable[[int], np.ndarray]  # the gray picture of a row, uint8 [H, W]


def cross(a: Side, b: Side) -> dict[str, Any]:
    """Finds groups and images that two data sets share.

    Returns `exact` and `near`: how many images of each have an exact copy, or else a near twin, in the other;
    `examples`: at most MAX_PAIRS pairs; `note`: what the search skipped, or ""; `lines`: all of it, and the names of
    the groups in both, as text.
    """
    groups = sorted(set(a.groups) & set(b.groups))
    both = set(a.pixels) & set(b.pixels)
    first = {b.pixels[j]: j for j in sorted(range(len(b.files)), key=lambda j: b.files[j], reverse=True)}
    copies = [(i, first[a.pixels[i]]) for i in range(len(a.files)) if a.pixels[i] in both]
    size = len(a.files)
    search = duplicates.near_twins(
        np.concatenate([np.asarray(side.hashes, np.uint64) for side in (a, b)]),
        ["a"] * size + ["b"] * len(b.files),  # one group per data set: only pairs across both are searched
        [*a.pixels, *b.pixels],
        lambda i: a.read(i) if i < size else b.read(i - size),
    )
    twins = [(i, j - size) for i, j in search.pairs.tolist()]
    similar = ({a.pixels[i] for i, _ in twins} - both, {b.pixels[j] for _, j in twins} - both)
    exact = [sum(p in both for p in side.pixels) for side in (a, b)]
    near = [sum(p in pixels for p in side.pixels) for side, pixels in zip((a, b), similar, strict=True)]
    room = MAX_PAIRS - min(len(twins), MAX_PAIRS // 2)  # so that both kinds are listed
    examples = [
        f"{a.files[i]} {join} {b.files[j]}"
        for join, pairs, limit in (("=", copies, room), ("~", twins, MAX_PAIRS))
        for i, j in sorted(pairs, key=lambda p: (a.files[p[0]], b.files[p[1]]))[:limit]
    ]
    names = f" ({', '.join(groups[:MAX_PAIRS])}{', ...' if len(groups) > MAX_PAIRS else ''})" if groups else ""
    lines = [f"patients with the same name in {a.name} and {b.name}: {len(groups):,}{names}"]
    for side, other, equal, alike in ((a, b, exact[0], near[0]), (b, a, exact[1], near[1])):
        lines.append(
            f"{equal:,} of {len(side.files):,} images of {side.name} {_have(equal)} an exact copy in {other.name}, "
            f"{alike:,} a near twin"
        )
    lines += [search.note] if search.note else []
    return {"exact": exact, "near": near, "examples": examples[:MAX_PAIRS], "note": search.note, "lines": lines}


def _codes(values: Sequence[str]) -> np.ndarray:
    """Returns the place of each value among the sorted distinct ones, int64 [N]."""
    return np.unique(np.asarray(values, np.str_), return_inverse=True)[1]


def _conflicting(same: np.ndarray, label: np.ndarray, used: np.ndarray) -> np.ndarray:
    """Returns for each set of copies whether its used images have several labels, bool [sets]."""
    kinds = np.unique(np.column_stack([same, np.unique(label, return_inverse=True)[1]])[used], axis=0)
    return np.bincount(kinds[:, 0], minlength=int(same.max(initial=-1)) + 1) > 1


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _have(count: int) -> str:
    return "has" if count == 1 else "have"
