"""Batches of a fixed size: the last one is padded, so that a single compiled program suffices."""

import numpy as np


def pad_batch(array: np.ndarray, size: int, value: int = 0) -> np.ndarray:
    """Returns `array` [n, ...], n <= size, extended to [size, ...] by rows of `value`; unchanged if n is size."""
    missing = size - len(array)
    if not missing:
        return array
    return np.concatenate([array, np.full((missing, *array.shape[1:]), value, array.dtype)])
