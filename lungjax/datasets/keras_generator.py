"""Transforms images as Keras's ImageDataGenerator does, for studies that stored the transformed copies."""

import numpy as np
from scipy import ndimage


def transform(
    array: np.ndarray,
    angle: float,
    shift: tuple[float, float] = (0.0, 0.0),
    shear: float = 0.0,
    zoom: tuple[float, float] = (1.0, 1.0),
) -> np.ndarray:
    """Returns an image [H, W] or [H, W, C] as float32, transformed as by Keras's `apply_affine_transform`.

    Interpolation is bilinear, and edge pixels are repeated. `angle` (clockwise) and `shear` are in degrees; `shift`
    (up, to the left) and `zoom` (the visible part) are fractions of height and width.
    """
    size = np.array(array.shape[:2])
    theta, phi = np.deg2rad([angle, shear])
    rotation = np.array([[np.cos(theta), -np.sin(theta)], [np.sin(theta), np.cos(theta)]])
    matrix = rotation @ np.array([[1.0, -np.sin(phi)], [0.0, np.cos(phi)]]) @ np.diag(zoom)
    center = size / 2 - 0.5
    offset = rotation @ (np.array(shift) * size) - matrix @ center + center
    channels = np.moveaxis(np.atleast_3d(array), -1, 0).astype(np.float32)
    moved = [ndimage.affine_transform(channel, matrix, offset, order=1, mode="nearest") for channel in channels]
    return np.stack(moved, -1).reshape(array.shape)
