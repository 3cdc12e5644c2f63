"""Leakage between splits: exact copies, near duplicates and patients in several splits.

Leaks in a study's splits are only counted. The clean protocol removes images until its splits share no patient or copy.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lungjax.data import duplicates
from lungjax.data.imaging import images
from lungjax.data.prepared import Prepared
from lungjax.data.splits import SPLITS

Rows = np.ndarray | slice  # row numbers of a data set
MAX_PAIRS = 20  # pairs that are listed; the counts are complete


def clean(
    splits: Sequence[str],
    labels: Sequence[int],
    groups: Sequence[str],
    pixels: Sequence[str],
    near: np.ndarray,
    group_name: str,
) -> tuple[list[str], list[str]]:
    """Returns the splits of the clean protocol, with "" for removed images, and notes on the removed images.

    An image is removed if its group or a near duplicate is in a later split (train, val, test). Of exact copies, only
    the one in the latest split with the first group name remains; copies with different labels are all removed.

    The columns have one value per image: `splits` is "" for images in no split, and `pixels` are equal for exact
    copies. `near`, int64 [P, 2], are the pairs of `duplicates.near_twins`. `group_name` is a plural noun.
    """
    count = len(splits)
    rank = np.array([SPLITS.index(split) if split else -1 for split in splits], np.int64)  # train 0, test 2, none -1
    initial = rank.copy()
    group, same, label = _codes(groups), _codes(pixels), np.asarray(labels)
    notes = []

    def remove(rows: np.ndarray, reason: str) -> None:
        rank[rows] = -1
        if rows.any():
            notes.append(f"images removed from the clean protocol ({reason}): {rows.sum():,}")

    latest = np.full(group.max(initial=-1) + 1, -1)
    np.maximum.at(latest, group, rank)
    remove((rank >= 0) & (rank < latest[group]), f"{group_name} in a later split")
    kinds = np.unique(np.column_stack([same, label])[initial >= 0], axis=0)
    conflict = np.bincount(kinds[:, 0], minlength=count + 1)[same] > 1  # its copies have several labels
    remove(conflict & (rank >= 0), "equal images with different labels")
    order = np.lexsort((np.arange(count), group, -rank, same))
    representative = order[np.unique(same[order], return_index=True)[1]][same]  # of each set of copies
    remove((rank >= 0) & (representative != np.arange(count)), "copies of another image")

    pairs = representative[np.asarray(near, np.int64).reshape(-1, 2)]
    both = np.concatenate([pairs, pairs[:, ::-1]])
    earlier, later = both.T
    before = rank.copy()
    for place in (1, 0):  # val first: an image that val loses to test no longer conflicts with train
        rank[earlier[(rank[earlier] == place) & (rank[later] > place)]] = -1
    remove((before >= 0) & (rank < 0), "near duplicates of an image in a later split")
    remain = both[(rank[both] >= 0).all(axis=1) & (label[earlier] != label[later])]
    if len(remain):
        notes.append(f"pairs of near duplicates in one split with different labels (check them): {len(remain) // 2:,}")
    return [SPLITS[r] if r >= 0 else "" for r in rank], notes


def leaks(
    members: Mapping[str, Sequence[int]], groups: Sequence[str], pixels: Sequence[str], near: np.ndarray
) -> dict[str, dict[str, int]]:
    """Counts the images of val and test that training has seen.

    `members` are the images of each split, where repeated images count once; other arguments are as in `clean`. For val
    and test, if not empty, returns the number of `images` and how many have an `exact_twin_in_train` (or are in train),
    a `near_twin_in_train` but no exact one, their `group_in_train`, or `any` of these; for test, also how many
    have an `exact_twin_in_val`, because val selects the epoch.
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
    """Returns one line per split in the result of `leaks`; `of` names the splits."""
    notes = []
    for split, counts in leaks.items():
        exact, near, shared = (counts[f"{k}_in_train"] for k in ("exact_twin", "near_twin", "group"))
        text = (
            f"{of}: {counts['any']:,} of {counts['images']:,} {split} images leak from train (exact copies: {exact:,}; "
            f"near duplicates: {near:,}; shared {group_name}: {shared:,})"
        )
        in_val = counts.get("exact_twin_in_val")
        notes.append(text + (f"; exact copies in val: {in_val:,}" if in_val else ""))
    return notes


def pairs_named(
    members: Mapping[str, Sequence[int]],
    files: Sequence[str],
    labels: Sequence[Any],
    pixels: Sequence[str],
    near: np.ndarray,
) -> list[str]:
    """Returns at most MAX_PAIRS pairs such as "a.png (test, COVID) = b.png (train, Normal)", worst first.

    "=" joins exact copies (one pair per set of copies), "~" near duplicates. Pairs with different labels come first,
    then pairs across splits, then exact copies, then by name. Images in no split are omitted.
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


def cross(a: Prepared, b: Prepared, a_rows: Rows = slice(None), b_rows: Rows = slice(None)) -> dict[str, Any]:
    """Finds groups and images that two data sets, or some of their rows, have in common, regardless of splits.

    Returns `exact` and `near`, the numbers of images in each data set with an exact copy, or else a near duplicate, in
    the other; `examples`, at most MAX_PAIRS pairs; `b_rows`, bool [N], True for such images of `b`; `note`,
    the limits of the search, or ""; and `lines`, all of this and the names of the common groups as text.
    """
    sides = ((a, a_rows), (b, b_rows))
    a_files, b_files = (data.columns["file"][rows].tolist() for data, rows in sides)
    a_pixels, b_pixels = (data.columns["pixels"][rows].tolist() for data, rows in sides)
    size, both = len(a_files), set(a_pixels) & set(b_pixels)
    places = [(data, int(row)) for data, rows in sides for row in np.arange(len(data.columns["file"]))[rows]]

    def read(i: int) -> np.ndarray:
        data, row = places[i]
        return images.gray(images.decode(data.records[row]["image"], data.window))

    search = duplicates.near_twins(
        np.concatenate([data.columns["phash"][rows] for data, rows in sides]),
        ["a"] * size + ["b"] * len(b_files),  # one group per data set: only pairs across both are searched
        a_pixels + b_pixels,
        read,
    )
    first = {b_pixels[j]: j for j in sorted(range(len(b_files)), key=b_files.__getitem__, reverse=True)}
    copies = [(i, first[a_pixels[i]]) for i in range(size) if a_pixels[i] in both]
    twins = [(i, j - size) for i, j in search.pairs.tolist()]
    similar = {a_pixels[i] for i, _ in twins} - both, {b_pixels[j] for _, j in twins} - both
    exact = [sum(p in both for p in pixels) for pixels in (a_pixels, b_pixels)]
    near = [sum(p in alike for p in pixels) for pixels, alike in zip((a_pixels, b_pixels), similar, strict=True)]
    room = MAX_PAIRS - min(len(twins), MAX_PAIRS // 2)  # so that both kinds are listed
    examples = [
        f"{a_files[i]} {join} {b_files[j]}"
        for join, pairs, limit in (("=", copies, room), ("~", twins, MAX_PAIRS))
        for i, j in sorted(pairs, key=lambda p: (a_files[p[0]], b_files[p[1]]))[:limit]
    ]
    groups = np.intersect1d(a.columns["group"][a_rows], b.columns["group"][b_rows]).tolist()
    names = f" ({', '.join(groups[:MAX_PAIRS])}{', ...' if len(groups) > MAX_PAIRS else ''})" if groups else ""
    lines = [f"patients with the same name in {a.name} and {b.name}: {len(groups):,}{names}"]
    for name, other, total, i in ((a.name, b.name, size, 0), (b.name, a.name, len(b_files), 1)):
        counts = f"{exact[i]:,} have an exact copy and {near[i]:,} a near duplicate in {other}"
        lines.append(f"of the {total:,} images in {name}, {counts}")
    turned = ["only one data set stores images rotated by 180 degrees, so copies in the other are missed"]
    note = "; ".join((turned if a.orientation != b.orientation else []) + ([search.note] if search.note else []))
    lines += [note] if note else []
    seen = np.asarray([pixels in both or pixels in similar[1] for pixels in b_pixels], bool)
    result = {"exact": exact, "near": near, "examples": examples[:MAX_PAIRS], "note": note, "lines": lines}
    return result | {"b_rows": seen}


def _codes(values: Sequence[str]) -> np.ndarray:
    """Returns the index of each value among the sorted unique values, int64 [N]."""
    return np.unique(np.asarray(values, np.str_), return_inverse=True)[1]
