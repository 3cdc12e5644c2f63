"""What can be counted in a prepared data set without a network: its splits, its shortcuts, what is there twice."""

import itertools

import numpy as np

from lungjax.data.prepared import SPLITS, Prepared


def count_splits(data: Prepared, group_name: str) -> dict[str, dict[str, list[int]]]:
    """Returns {split: {"images": [per class], group_name: [per class]}} of the set's protocol; empty splits too.

    A group with images of two classes counts in both. An image that a study counts three times counts three times.
    """
    labels, c = data.columns["label"], len(data.classes)
    counts = {}
    for split in SPLITS:
        rows = data.rows(split)
        images = np.bincount(labels[rows], minlength=c)
        groups = [len(np.unique(data.columns["group"][rows[labels[rows] == label]])) for label in range(c)]
        counts[split] = {"images": images.tolist(), group_name: groups}
    return counts


def count_values(values: np.ndarray, labels: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the distinct `values`, those with most images first, and their images of each class, int64 [V, C].

    `values` [N], or [N, K] where a value is a row.
    """
    names, member = np.unique(values, axis=0, return_inverse=True)
    counts = np.zeros((len(names), classes), np.int64)
    np.add.at(counts, (member.ravel(), labels), 1)
    order = np.argsort(-counts.sum(axis=1), kind="stable")
    return names[order], counts[order]


def frequencies(keys: np.ndarray, labels: np.ndarray, train: np.ndarray, test: np.ndarray, classes: int) -> np.ndarray:
    """Returns what `keys` alone say of the class of each test image, float64 [n, C], rows sum to 1.

    The share of each class among the train images of the same key, smoothed by `classes` images more that are shared
    out as the whole train split is (Laplace's rule, where classes are even). So a key that train has not gets the
    shares of train. `keys` [N] of any kind, `labels` int [N], `train` and `test` rows; train must not be empty.
    """
    names, at = np.unique(keys[train], return_inverse=True)
    counts = np.zeros((len(names) + 1, classes))  # the last row is for keys that train has not
    np.add.at(counts, (at, labels[train]), 1)
    place = np.minimum(np.searchsorted(names, keys[test]), len(names) - 1)
    counts = counts[np.where(names[place] == keys[test], place, len(names))] + classes * counts.sum(axis=0) / len(train)
    return counts / counts.sum(axis=1, keepdims=True)


def guess(keys: np.ndarray, labels: np.ndarray, train: np.ndarray, test: np.ndarray, classes: int) -> float | None:
    """Returns the mean recall on `test` of a guess from `keys` alone; None if train or test lacks a class.

    Each test image is given the class that holds the largest share of its images with this key in train (of equal
    ones by chance, so of all of them for a key that train has not). Arguments as in `frequencies`.
    """
    if min(len(np.unique(labels[train])), len(np.unique(labels[test]))) < classes:
        return None
    # Divided by the classes' own shares, smoothed frequencies are in the order of the parts of each class.
    shares = frequencies(keys, labels, train, test, classes) / np.bincount(labels[train], minlength=classes)
    best = np.isclose(shares, shares.max(axis=1, keepdims=True), rtol=1e-9, atol=0)
    right = (best / best.sum(axis=1, keepdims=True))[np.arange(len(test)), labels[test]]
    return float(np.mean([right[labels[test] == label].mean() for label in range(classes)]))


def shortcuts(data: Prepared) -> dict[str, float | None]:
    """Returns for source, size and mean gray level how well each alone gives the class away, see `guess`."""
    columns, train, test = data.columns, data.rows("train"), data.rows("test")
    size = np.column_stack([columns["width"], columns["height"]])
    steps = np.quantile(columns["mean"][train], np.linspace(0.05, 0.95, 19)) if len(train) else np.zeros(1)
    keys = {
        "the source": np.unique(columns["source"], return_inverse=True)[1],
        "width and height": np.unique(size, axis=0, return_inverse=True)[1].ravel(),
        "the mean gray level, in 20 steps": np.searchsorted(steps, columns["mean"]),
    }
    return {what: guess(k, columns["label"], train, test, len(data.classes)) for what, k in keys.items()}


def spread(rows: np.ndarray, data: Prepared, count: int, rng: np.random.Generator) -> list[int]:
    """Draws up to `count` of `rows`: sources take turns, and no group comes again before all of its source came."""
    rows = rng.permutation(rows)
    sources, groups = data.columns["source"][rows], data.columns["group"][rows]
    again = np.ones(len(rows), bool)
    again[np.unique(groups, return_index=True)[1]] = False
    order = np.argsort(again, kind="stable")
    turns = [rows[order][sources[order] == s][:count].tolist() for s in rng.permutation(np.unique(sources))]
    drawn = [row for turn in itertools.zip_longest(*turns) for row in turn if row is not None]
    return drawn[:count]


def copies(data: Prepared) -> np.ndarray:
    """Returns exact copies as rows, int64 [P, 2]: for each set of equal pixels one image with each of the others.

    That one is in a split of the set's protocol if any of them is.
    """
    _, member, count = np.unique(data.columns["pixels"], return_inverse=True, return_counts=True)
    rows = np.flatnonzero(count[member] > 1)
    rows = rows[np.lexsort((rows, cells(data)[rows] == "", member[rows]))]
    new = np.diff(member[rows], prepend=-1) != 0
    first = rows[np.maximum.accumulate(np.where(new, np.arange(len(rows)), 0))]
    return np.column_stack([first, rows])[~new]


def worst_first(pairs: np.ndarray, data: Prepared) -> tuple[np.ndarray, int, int]:
    """Returns pairs int64 [P, 2], the most harmful first, how many lie in two splits, how many have two labels."""
    differ = {
        key: data.columns[key][pairs[:, 0]] != data.columns[key][pairs[:, 1]]
        for key in ("label", "split_study", "split", "group")
    }
    split = cells(data)[pairs]
    across = (split[:, 0] != split[:, 1]) & (split != "").all(axis=1)
    keys = (differ["label"], across, differ["split_study"], differ["split"], differ["group"])
    order = np.lexsort(tuple(~key for key in reversed(keys)))
    return pairs[order], int(across.sum()), int(differ["label"].sum())


def cells(data: Prepared) -> np.ndarray:
    """Returns where each image is in the set's protocol, str [N], such as "train" or "val+test"; "" is left out."""
    return data.columns["split" if data.protocol == "clean" else "split_study"]


def mean_histograms(
    histograms: np.ndarray, values: np.ndarray, weights: np.ndarray, most: int
) -> dict[str, np.ndarray]:
    """Returns the weighted mean of `histograms` [n, 256] for each of the `most` frequent of `values` [n]."""
    names, count = np.unique(values, return_counts=True)
    shown = names[np.argsort(-count, kind="stable")][:most]
    return {
        str(name) or "(none)": np.average(histograms[values == name], axis=0, weights=weights[values == name])
        for name in shown
    }
