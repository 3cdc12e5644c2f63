"""Leakage between splits: exact copies, near duplicates and patients in several splits.

Leaks in a study's splits are only counted. The clean protocol removes images until its splits share no patient or copy.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from lungjax.data import duplicates
from lungjax.data.imaging import images
from lungjax.data.labels import codes
from lungjax.data.prepared import Prepared
from lungjax.data.splits import SPLITS

Rows = np.ndarray | slice  # row numbers of a data set
MAX_PAIRS = 20  # pairs that are listed; the counts are complete


def clean(
    splits: ArrayLike, labels: ArrayLike, groups: ArrayLike, pixels: ArrayLike, near: np.ndarray, group_name: str
) -> tuple[list[str], dict[str, int]]:
    """Returns the splits of the clean protocol, with "" for removed images, and the number of these by reason.

    An image is removed if its group or a near duplicate is in a later split (train, val, test). Of exact copies, only
    the one in the latest split with the first group name remains; copies with different labels are all removed.

    The columns have one value per image: `splits` is "" for images in no split, and `pixels` are equal for exact
    copies. `near`, int64 [P, 2], are the pairs of `duplicates.near_twins`. `group_name` is a plural noun.
    """
    names = np.asarray(splits, np.str_)
    rank = np.select([names == split for split in SPLITS], range(len(SPLITS)), -1)  # train 0, test 2, none -1
    count, initial = len(rank), rank.copy()
    group, same, label = _codes(groups), _codes(pixels), codes(np.asarray(labels))
    removed = dict[str, int]()

    def remove(rows: np.ndarray, reason: str) -> None:
        rank[rows] = -1
        if rows.any():
            removed[reason] = int(rows.sum())

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
    return [SPLITS[r] if r >= 0 else "" for r in rank], removed


def leaks(data: Prepared) -> dict[str, dict[str, int]]:
    """Counts the images of val and test that training has seen, in the splits of the data set's protocol.

    Repeated images count once. For val and test, if not empty, returns the number of `images` and how many have an
    `exact_twin_in_train` (or are in train), a `near_twin_in_train` but no exact one, their `group_in_train`, or `any`
    of these; for test, also how many have an `exact_twin_in_val`, because val selects the epoch.
    """
    groups, same = data.columns["group"], _codes(data.columns["pixels"])
    rows = {split: np.unique(data.rows(split)) for split in SPLITS}
    train = rows["train"]
    exact = np.isin(same, same[train])
    pairs = same[np.concatenate([data.near, data.near[:, ::-1]])]
    twin = np.isin(same, pairs[np.isin(pairs[:, 1], same[train]), 0]) & ~exact
    patient = np.isin(groups, groups[train])
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


def leak_notes(leaks: Mapping[str, Mapping[str, int]], of: str, group_name: str) -> Iterator[str]:
    """Yields one line per split in the result of `leaks`; `of` names the splits."""
    for split, counts in leaks.items():
        exact, near, shared = (counts[f"{k}_in_train"] for k in ("exact_twin", "near_twin", "group"))
        text = (
            f"{of}: {counts['any']:,} of {counts['images']:,} {split} images leak from train (exact copies: {exact:,}; "
            f"near duplicates: {near:,}; shared {group_name}: {shared:,})"
        )
        in_val = counts.get("exact_twin_in_val")
        yield text + (f"; exact copies in val: {in_val:,}" if in_val else "")


def cross(a: Prepared, b: Prepared, a_rows: Rows = slice(None), b_rows: Rows = slice(None)) -> dict[str, Any]:
    """Finds groups and images that two data sets, or some of their rows, have in common, regardless of splits.

    Returns `exact` and `near`, the numbers of images in each data set with an exact copy, or else a near duplicate, in
    the other; `examples`, at most MAX_PAIRS pairs; `b_rows`, bool [N], True for such images of `b`; `note`,
    the limits of the search, or ""; and `lines`, all of this and the common groups as text.
    """
    sides = ((a, a_rows), (b, b_rows))
    files, pixels, groups, hashes = (
        [data.columns[name][rows] for data, rows in sides] for name in ("file", "pixels", "group", "phash")
    )
    size, other = (len(names) for names in files)
    places = [(data, row) for data, rows in sides for row in np.arange(len(data.columns["file"]))[rows].tolist()]

    def read(i: int) -> np.ndarray:
        data, row = places[i]
        return images.gray(images.decode(data.records[row]["image"], data.window))

    # One group per data set, so that only pairs across both are searched.
    search = duplicates.near_twins(
        np.concatenate(hashes), np.repeat(["a", "b"], [size, other]), np.concatenate(pixels), read
    )
    twins = search.pairs - [0, size]
    copies = [np.isin(pixels[0], pixels[1]), np.isin(pixels[1], pixels[0])]
    similar = [np.isin(p, p[rows]) & ~copy for p, rows, copy in zip(pixels, twins.T, copies, strict=True)]
    exact, near = ([int(mask.sum()) for mask in masks] for masks in (copies, similar))
    first = {pixel: file for file, pixel in sorted(zip(files[1], pixels[1], strict=True), reverse=True)}
    examples = sorted(f"{files[0][i]} = {first[pixels[0][i]]}" for i in np.flatnonzero(copies[0]))
    likely = sorted(f"{files[0][i]} ~ {files[1][j]}" for i, j in twins)
    room = MAX_PAIRS - min(len(likely), MAX_PAIRS // 2)  # so that both kinds are listed
    shared = np.intersect1d(groups[0], groups[1]).tolist()
    names = f" ({', '.join(shared[:MAX_PAIRS])}{', ...' if len(shared) > MAX_PAIRS else ''})" if shared else ""
    lines = [f"patients with the same name in {a.name} and {b.name}: {len(shared):,}{names}"]
    for name, others, total, i in ((a.name, b.name, size, 0), (b.name, a.name, other, 1)):
        counts = f"{exact[i]:,} have an exact copy and {near[i]:,} a near duplicate in {others}"
        lines.append(f"of the {total:,} images in {name}, {counts}")
    notes = [search.note] if search.note else []
    if a.orientation != b.orientation:
        notes.insert(0, "only one data set stores images rotated by 180 degrees, so copies in the other are missed")
    note = "; ".join(notes)
    lines += [note] if note else []
    examples = [*examples[:room], *likely][:MAX_PAIRS]
    seen = copies[1] | similar[1]
    return {"exact": exact, "near": near, "examples": examples, "note": note, "lines": lines, "b_rows": seen}


def _codes(values: ArrayLike) -> np.ndarray:
    """Returns the index of each value among the sorted unique values, int64 [N]."""
    return np.unique(np.asarray(values, np.str_), return_inverse=True)[1]
