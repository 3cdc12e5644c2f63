"""scikit-learn's random splits in numpy, to reproduce the splits of studies to the last image.

Sources: scikit-learn's `model_selection/_split.py` (ShuffleSplit, StratifiedShuffleSplit), `utils/extmath.py`
(_approximate_mode) and `utils/_indexing.py` (resample). They use numpy's RandomState, whose stream is frozen.
"""

import math
from collections.abc import Sequence

import numpy as np


def train_test_split(
    count: int, test_size: float, seed: int, labels: Sequence[int] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the row numbers, int64, of sklearn's `train_test_split(rows, test_size, random_state=seed)`.

    `test_size` is a fraction of the `count` rows, rounded up. With `labels` the split is `stratify=labels`. Both parts
    are in sklearn's order, on which a second split of one of them depends. Raises ValueError, as sklearn does, if a
    part, or a class in a part, would be empty.
    """
    tests = math.ceil(test_size * count)
    trains = count - tests
    if tests < 1 or trains < 1:
        raise ValueError(f"test_size {test_size:g} of {count} rows leaves {trains} for train and {tests} for test")
    random = np.random.RandomState(seed)
    if labels is None:
        order = random.permutation(count)
        return order[tests:], order[:tests]
    _, member, sizes = np.unique(np.asarray(labels), return_inverse=True, return_counts=True)
    if sizes.min() < 2 or min(trains, tests) < len(sizes):
        raise ValueError(
            f"{count} rows of {len(sizes)} classes, the smallest of {sizes.min()}, are too few for a stratified split"
        )
    rows = np.split(np.argsort(member, kind="stable"), np.cumsum(sizes)[:-1])
    to_train = _approximate_mode(sizes, trains, random)
    to_test = _approximate_mode(sizes - to_train, tests, random)
    shuffled = [members[random.permutation(len(members))] for members in rows]
    train = [members[:first] for members, first in zip(shuffled, to_train, strict=True)]
    test = [members[a : a + b] for members, a, b in zip(shuffled, to_train, to_test, strict=True)]
    return random.permutation(np.concatenate(train)), random.permutation(np.concatenate(test))


def resample(count: int, draws: int, seed: int) -> np.ndarray:
    """Returns how often, int64 [count], sklearn's `resample(rows, n_samples=draws, random_state=seed)` takes a row."""
    return np.bincount(np.random.RandomState(seed).randint(0, count, size=draws), minlength=count)


def cells(count: int, **parts: np.ndarray) -> list[str]:
    """Returns the split of each of `count` rows, from the row numbers of each split; "" for rows in none."""
    names = [""] * count
    for split, rows in parts.items():
        for row in rows:
            names[row] = split
    return names


def _approximate_mode(sizes: np.ndarray, draws: int, random: np.random.RandomState) -> np.ndarray:
    """Returns counts per class for `draws` rows: shares rounded down, the rest by remainder."""
    shares = sizes / sizes.sum() * draws
    counts = np.floor(shares)
    rest = int(draws - counts.sum())
    remainders = shares - counts
    for value in np.unique(remainders)[::-1]:
        if not rest:
            break
        (ties,) = np.where(remainders == value)
        choice = random.choice(ties, size=min(len(ties), rest), replace=False)
        counts[choice] += 1
        rest -= len(choice)
    return counts.astype(np.int64)
