"""Statistics of a prepared data set: counts per value, shortcut baselines, duplicates, samples."""

import itertools
from collections.abc import Sequence

import numpy as np

from lungjax.data.labels import codes, indicators
from lungjax.data.prepared import Prepared

MAX_CATEGORIES = 10  # of a kept column; more numbers are cut into thirds
MISSING = ("", "nan", "na", "n/a", "none", "unknown")
UNKNOWN = "unknown"


def count_values(values: np.ndarray, labels: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the distinct `values` [N] or [N, K], most frequent first, and their images per class, int64 [V, C]."""
    names, member = np.unique(values, axis=0, return_inverse=True)
    counts = np.zeros((len(names), classes), np.int64)
    np.add.at(counts, member.ravel(), indicators(labels, classes))
    order = np.argsort(-np.bincount(member.ravel(), minlength=len(names)), kind="stable")
    return names[order], counts[order]


def numbers(values: np.ndarray) -> np.ndarray | None:
    """Returns the texts [N] as float64, NaN if missing, or None for categories.

    These are texts that are not all numbers, or have at most MAX_CATEGORIES different values.
    """
    missing = np.isin(np.char.lower(values), MISSING)
    try:
        parsed = np.where(missing, "nan", values).astype(np.float64)
    except ValueError:
        return None
    return parsed if len(np.unique(parsed[~missing])) > MAX_CATEGORIES else None


def categories(values: np.ndarray) -> np.ndarray:
    """Returns a category per text [N]: UNKNOWN if missing, thirds such as "42 to 58" of `numbers`, or the text."""
    parsed = numbers(values)
    if parsed is None:
        return np.where(np.isin(np.char.lower(values), MISSING), UNKNOWN, values)
    result = np.full(len(values), UNKNOWN, dtype=object)
    ends = np.nanquantile(parsed, [1 / 3, 2 / 3], method="inverted_cdf")
    third = np.searchsorted(ends, parsed)
    for k in range(3):
        rows = (third == k) & ~np.isnan(parsed)
        if rows.any():
            result[rows] = f"{parsed[rows].min():g} to {parsed[rows].max():g}"
    return result.astype(np.str_)


def frequencies(keys: np.ndarray, labels: np.ndarray, train: np.ndarray, test: np.ndarray, classes: int) -> np.ndarray:
    """Returns the class probabilities of each test image given only its key, float64 [n, C]; rows sum to 1.

    They are the class frequencies of train images with this key, smoothed by `classes` pseudo-images with the
    frequencies of the train split. `keys` [N] have any type; `labels` are int [N], `train` (nonempty) and `test` rows.
    """
    names, at = np.unique(keys[train], return_inverse=True)
    counts = np.zeros((len(names) + 1, classes))  # the last row is for keys missing in train
    np.add.at(counts, (at, labels[train]), 1)
    place = np.minimum(np.searchsorted(names, keys[test]), len(names) - 1)
    counts = counts[np.where(names[place] == keys[test], place, len(names))] + classes * counts.sum(axis=0) / len(train)
    return counts / counts.sum(axis=1, keepdims=True)


def guess(keys: np.ndarray, labels: np.ndarray, train: np.ndarray, test: np.ndarray, classes: int) -> float | None:
    """Returns the mean recall on `test` of a guess from `keys` alone (see `frequencies`); None if a class is missing.

    The guess is the class with the largest share of its train images under this key, or random if tied or unknown.
    """
    if min(len(np.unique(labels[train])), len(np.unique(labels[test]))) < classes:
        return None
    # Smoothed frequencies divided by class frequencies have the same order as the shares.
    shares = frequencies(keys, labels, train, test, classes) / np.bincount(labels[train], minlength=classes)
    best = np.isclose(shares, shares.max(axis=1, keepdims=True), rtol=1e-9, atol=0)
    right = (best / best.sum(axis=1, keepdims=True))[np.arange(len(test)), labels[test]]
    return float(np.mean([right[labels[test] == label].mean() for label in range(classes)]))


def shortcuts(data: Prepared) -> dict[str, float | None]:
    """Returns the mean recall of a `guess` from source, image size and mean intensity, each alone.

    Several findings are guessed separately, and their mean is returned.
    """
    columns, train, test = data.columns, data.rows("train"), data.rows("test")
    size = np.column_stack([columns["width"], columns["height"]])
    steps = np.quantile(columns["mean"][train], np.linspace(0.05, 0.95, 19)) if len(train) else np.zeros(1)
    keys = {
        "the source": np.unique(columns["source"], return_inverse=True)[1],
        "width and height": np.unique(size, axis=0, return_inverse=True)[1].ravel(),
        "the mean gray level, in 20 steps": np.searchsorted(steps, columns["mean"]),
    }
    labels, classes = columns["label"], len(data.classes)
    problems = [(labels, classes)] if labels.ndim == 1 else [(finding, 2) for finding in labels.T]
    result: dict[str, float | None] = {}
    for what, key in keys.items():
        guesses = [guess(key, y, train[y[train] >= 0], test[y[test] >= 0], c) for y, c in problems]
        known = [score for score in guesses if score is not None]
        result[what] = float(np.mean(known)) if known else None
    return result


def spread(rows: np.ndarray, data: Prepared, count: int, rng: np.random.Generator) -> list[int]:
    """Draws up to `count` of `rows` from alternating sources; a group repeats only after all groups of its source."""
    rows = rng.permutation(rows)
    sources, groups = data.columns["source"][rows], data.columns["group"][rows]
    repeated = np.ones(len(rows), bool)
    repeated[np.unique(groups, return_index=True)[1]] = False
    order = np.argsort(repeated, kind="stable")
    lines = [rows[order][sources[order] == s][:count].tolist() for s in rng.permutation(np.unique(sources))]
    return take_turns(lines, count)


def take_turns(lists: Sequence[Sequence[int]], count: int) -> list[int]:
    """Returns the first element of each list, then the second ones, and so on; at most `count`."""
    return [item for turn in itertools.zip_longest(*lists) for item in turn if item is not None][:count]


def copies(data: Prepared) -> np.ndarray:
    """Returns pairs of exact copies, int64 [P, 2]: the first of a set (in a split, if any is) and another image."""
    _, member, count = np.unique(data.columns["pixels"], return_inverse=True, return_counts=True)
    rows = np.flatnonzero(count[member] > 1)
    rows = rows[np.lexsort((rows, cells(data)[rows] == "", member[rows]))]
    new = np.diff(member[rows], prepend=-1) != 0
    first = rows[np.maximum.accumulate(np.where(new, np.arange(len(rows)), 0))]
    return np.column_stack([first, rows])[~new]


def worst_first(pairs: np.ndarray, data: Prepared) -> tuple[np.ndarray, int, int]:
    """Returns the pairs, int64 [P, 2], worst first, and the numbers of pairs across splits and across labels."""
    columns = data.columns | {"label": codes(data.columns["label"])}
    differ = {
        key: columns[key][pairs[:, 0]] != columns[key][pairs[:, 1]]
        for key in ("label", "split_study", "split", "group")
    }
    split = cells(data)[pairs]
    across = (split[:, 0] != split[:, 1]) & (split != "").all(axis=1)
    keys = (differ["label"], across, differ["split_study"], differ["split"], differ["group"])
    order = np.lexsort(tuple(~key for key in reversed(keys)))
    return pairs[order], int(across.sum()), int(differ["label"].sum())


def cells(data: Prepared) -> np.ndarray:
    """Returns the splits of each image in the selected protocol, str [N]: "train", "val+test", or "" for none."""
    return data.columns["split" if data.protocol == "clean" else "split_study"]


def mean_histograms(
    histograms: np.ndarray, values: np.ndarray, weights: np.ndarray, limit: int
) -> dict[str, np.ndarray]:
    """Returns the weighted mean of `histograms` [n, 256] for each of the `limit` most frequent of `values` [n]."""
    names, count = np.unique(values, return_counts=True)
    return {
        str(name) or "(none)": np.average(histograms[values == name], axis=0, weights=weights[values == name])
        for name in names[np.argsort(-count, kind="stable")][:limit]
    }
