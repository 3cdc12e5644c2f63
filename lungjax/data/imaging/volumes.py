"""Renders planes of CT volumes in Hounsfield units as images: square pixels, windows, PNG.

Volumes from DICOM series (`dicom`) and NIfTI files (`nifti`) have the same axes. In images, the chest (axial) or the
head (coronal, sagittal) is up, and the patient's right is on the left; sagittal images face left.
"""

import functools
import hashlib
import importlib
import itertools
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from lungjax.data.imaging import images
from lungjax.data.imaging.limits import DEFAULT, Limits
from lungjax.data.imaging.memory_file import MissingPackage

AIR = -1000  # Hounsfield units
PLANES = {"axial": 0, "coronal": 1, "sagittal": 2}  # the axis of `Volume.hu` normal to the plane
CACHE_SIZE = 2  # volumes in memory, because threads may use the end of one while the next one is read

Windows = tuple[tuple[float, float], ...]
Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class Volume:
    """One scan. Axes run from foot to head, from anterior to posterior, and from the patient's right to left."""

    hu: np.ndarray  # int16 [z, y, x], Hounsfield units
    spacing: tuple[float, float, float]  # mm between voxel centers along z, y, x


def need(package: str, what: str) -> Any:
    """Imports and returns an optional package. Raises MissingPackage with the install command if it is missing."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise MissingPackage(f"{what} need {package}, which is missing: pip install -e '.[dicom]'") from None


def pseudonym(name: str, salt: str) -> str:
    """Returns 12 hex digits in place of `name`: its BLAKE2b hash, keyed with the secret `salt`."""
    key = salt.encode()
    key = key if len(key) <= hashlib.blake2b.MAX_KEY_SIZE else hashlib.blake2b(key).digest()
    return hashlib.blake2b(name.encode(), key=key, digest_size=6).hexdigest()


def canonical_axes(directions: np.ndarray) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Returns the array axes nearest to z, y and x of `Volume`, and their signs, 1 or -1.

    `directions` [3, 3]: row i is the unit vector along axis i of the array, in DICOM's patient coordinates
    (x to the patient's left, y to the back, z to the head).
    """
    parts = np.asarray(directions, np.float64)[:, ::-1]  # columns z, y, x
    order = max(itertools.permutations(range(3)), key=lambda axes: sum(abs(parts[a, i]) for i, a in enumerate(axes)))
    signs = [1 if parts[axis, i] >= 0 else -1 for i, axis in enumerate(order)]
    return (order[0], order[1], order[2]), (signs[0], signs[1], signs[2])


def canonical(array: np.ndarray, directions: np.ndarray, spacing: Sequence[float]) -> Volume:
    """Returns a stored scan, int16 with three axes, as a `Volume`; oblique scans are not interpolated.

    `directions` are those of `canonical_axes`; `spacing` is in mm along the axes of the array.
    """
    order, signs = canonical_axes(directions)
    flipped = array.transpose(order)[tuple(slice(None, None, sign) for sign in signs)]
    return Volume(flipped, (spacing[order[0]], spacing[order[1]], spacing[order[2]]))


def cut(volume: Volume, plane: str, index: int, limits: Limits = DEFAULT) -> np.ndarray:
    """Returns one plane of a volume, float32 [h, w] in Hounsfield units, with square pixels.

    The axis with the larger spacing is interpolated linearly to the smaller spacing, over the same field of view.
    Raises LimitError if the plane then has too many pixels.
    """
    axis = PLANES[plane]
    flat = np.moveaxis(volume.hu, axis, 0)[index]  # np.take would copy the volume, which is not contiguous
    if plane != "axial":
        flat = flat[::-1]  # head up
    mm = [volume.spacing[i] for i in range(3) if i != axis]
    size = (max(1, round(flat.shape[0] * mm[0] / min(mm))), max(1, round(flat.shape[1] * mm[1] / min(mm))))
    limits.check_image(size[1], size[0])
    flat = flat.astype(np.float32)
    return flat if size == flat.shape else images.resize(flat, images.full_region(flat), size, "bilinear", True)


def render(hu: np.ndarray, windows: Windows) -> np.ndarray:
    """Returns Hounsfield units [h, w] as uint8: [h, w] for one window, [h, w, 3] for three.

    A window is a center and a width; center - width / 2 becomes 0 and center + width / 2 becomes 255.
    """
    values = hu.astype(np.float32)
    channels = [
        np.rint(np.clip((values - (center - width / 2)) * (255 / width), 0, 255)).astype(np.uint8)
        for center, width in windows
    ]
    return channels[0] if len(channels) == 1 else np.stack(channels, axis=-1)


def indices(count: int, position: str) -> Sequence[int]:
    """Returns the numbers of the slices to use, of `count`: the middle one for position "mid", else all."""
    return [count // 2] if position == "mid" else range(count)


def picture(volume: Volume, plane: str, index: int, windows: Windows, limits: Limits = DEFAULT) -> bytes:
    """Returns one plane of a volume as a PNG file; see `cut` and `render`."""
    return images.encode(render(cut(volume, plane, index, limits), windows))


def raise_error(problem: str) -> bytes:
    """Raises ValueError(problem). Stands in for the reader of an image already known to be unusable."""
    raise ValueError(problem)


def cache_latest(read: Callable[..., Result]) -> Callable[..., Result]:
    """Caches the last CACHE_SIZE results or errors of `read`, whose first argument may be the path of a file.

    A file that has changed is read again. Since volumes are large, only one thread reads at a time.
    """
    cache: dict[Any, Result | ValueError] = {}  # the least recently used first
    lock = threading.Lock()

    @functools.wraps(read)
    def wrapper(*args: Any) -> Result:
        with lock:
            stat = os.stat(args[0]) if isinstance(args[0], str) and os.path.exists(args[0]) else None
            key = (args, stat and (stat.st_size, stat.st_mtime_ns))
            if key in cache:
                cache[key] = result = cache.pop(key)
            else:
                while len(cache) >= CACHE_SIZE:
                    del cache[next(iter(cache))]
                try:
                    result = read(*args)
                except ValueError as error:
                    result = error
                cache[key] = _copy(result) if isinstance(result, ValueError) else result
        if isinstance(result, ValueError):
            raise _copy(result) from None
        return result

    return wrapper


def _copy(error: ValueError) -> ValueError:
    """Returns an error without its traceback, which holds the arrays of a reader."""
    return type(error)(*error.args)
