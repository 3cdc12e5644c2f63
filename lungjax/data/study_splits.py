"""The draws of scikit-learn that studies made their splits with, in numpy: a split is only theirs to the last image.

Sources: scikit-learn's `model_selection/_split.py` (ShuffleSplit, StratifiedShuffleSplit), `utils/extmath.py`
(_approximate_mode) and `utils/_indexing.py` (resample). They draw with numpy's RandomState, whose stream is fixed.
"""

import math
from collections.abc import Sequence

import numpy as np


def train_test_split(
    count: int, test_size: float, seed: int, labels: Sequence[int] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the row numbers, int64, of sklearn's `train_test_split(rows, test_size, random_state=seed)`.

    `test_size` is a share of the `count` rows, rounded up. With `labels` the split is `stratify=labels`. Both parts
    come in sklearn's order, which a second split of one of them depends on. Raises ValueError if a part, or a class
    in a part, would have no row, as sklearn does.
    """
    tests = math.ceil(test_size * count)
    trains = count - tests
    if tests < 1 or trains < 1:
        raise ValueError(f"a test part of {test_size:g} of {count} rows leaves {trains} to train and {tests} to test")
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
    train: list[int] = []
    test: list[int] = []
    for own, first, second in zip(rows, to_train, to_test, strict=True):
        drawn = own[random.permutation(len(own))]
        train.extend(drawn[:first])
        test.extend(drawn[first : first + second])
    return random.permutation(train), random.permutation(test)


def resample(count: int, draws: int, seed: int) -> np.ndarray:
    """Returns how often, int64 [count], sklearn's `resample(rows, n_samples=draws, random_state=seed)` takes a row."""
    return np.bincount(np.random.RandomState(seed).randint(0, count, size=draws), minlength=count)


def cells(count: int, **parts: np.ndarray) -> list[str]:
    """Returns the split's name for each of `count` rows, from the row numbers of each split; "" where it has none."""
    named = [""] * count
    for split, rows in parts.items():
        for row in rows:
            named[row] = split
    return named


def _approximate_mode(sizes: np.ndarray, draws: int, random: np.random.RandomState) -> np.ndarray:
    """Returns about the most probable counts per class of `draws` rows: shares rounded down, the rest by remainder."""
    shares = sizes / sizes.sum() * draws
    counts = np.floor(shares)
    lacking = int(draws - counts.sum())
    remainders = shares - counts
    for value in np.unique(remainders)[::-1] if lacking else ():
        (ties,) = np.where(remainders == value)
        chosen = random.choice(ties, size=min(len(ties), lacking), replace=False)
        counts[chosen] += 1
        lacking -= len(chosen)
        if not lacking:
            break
    return counts.astype(np.int64)
