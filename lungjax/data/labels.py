"""Labels of images: one class, int [N], or several findings, int [N, K]: 1 present, 0 absent, -1 unknown."""

from typing import Any

import numpy as np

UNKNOWN = -1


def indicators(labels: np.ndarray, classes: int) -> np.ndarray:
    """Returns whether each image has each class or finding, int64 [N, classes]."""
    labels = np.asarray(labels)
    return (labels == 1 if labels.ndim == 2 else labels[:, None] == np.arange(classes)).astype(np.int64)


def codes(labels: np.ndarray) -> np.ndarray:
    """Returns one int per image, int64 [N], equal for equal labels."""
    return np.unique(labels, axis=0, return_inverse=True)[1].ravel()


def text(label: Any, classes: tuple[str, ...]) -> str:
    """Returns the label of one image as text: a class, or the findings that are present, such as "Edema + Mass"."""
    if np.ndim(label) == 0:
        return classes[label]
    return " + ".join(name for name, value in zip(classes, label, strict=True) if value == 1) or "no finding"
