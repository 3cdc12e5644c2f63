"""Batches of a fixed size: the last one is padded, so that a single compiled program suffices."""

import numpy as np


def pad_batch(array: np.ndarray, size: int, value: int = 0) -> np.ndarray:
    """Returns `array` [n, ...], n <= size, extended to [size, ...] by rows of `value`."""
    return np.pad(array, [(0, size - len(array)), *[(0, 0)] * (array.ndim - 1)], constant_values=value)
