"""CT volumes in Hounsfield units to pictures: planes, square pixels, windows, PNG.

A volume comes from a DICOM series (`dicom`) or a NIfTI file (`nifti`) and always lies the same way here, so a
picture looks as a radiologist expects it, however the scan was stored: axial with the patient's right on the
left of the picture and the chest up, coronal with the patient's right on the left and the head up, sagittal
facing left with the head up.
"""

import functools
import hashlib
import importlib
import itertools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from lungjax.config import nearest
from lungjax.data.imaging import images
from lungjax.data.imaging.memory_file import MissingPackage

AIR = -1000  # Hounsfield units
PLANES = {"axial": 0, "coronal": 1, "sagittal": 2}  # the axis of `Volume.hu` that a plane is cut across
POSITIONS = ("mid", "all")
KEPT = 2  # volumes in memory: reading threads may be at the end of one and the start of the next

Windows = tuple[tuple[float, float], ...]
Made = TypeVar("Made")


@dataclass(frozen=True, eq=False)
class Volume:
    """One scan. Axes go from foot to head, from anterior to posterior, and from the patient's right to left."""

    hu: np.ndarray  # int16 [z, y, x], Hounsfield units
    spacing: tuple[float, float, float]  # mm between centres along z, y, x


def check_options(plane: str, position: str, windows: Windows) -> None:
    """Raises ValueError for an unknown plane or position, or windows that are not one or three of width > 0."""
    if plane not in PLANES:
        raise ValueError(f"--plane={plane}: {nearest(plane, PLANES)}")
    if position not in POSITIONS:
        raise ValueError(f"--position={position}: {nearest(position, POSITIONS)}")
    if len(windows) not in (1, 3) or any(len(window) != 2 or not window[1] > 0 for window in windows):
        raise ValueError(
            f"Hounsfield windows {windows}: wanted one (gray) or three (red, green, blue) of centre and width, "
            "width above 0, such as --hu_window=-600/1500 for the lungs or 40/400 for soft tissue"
        )


def need(package: str, what: str) -> Any:
    """Returns an optional package. Raises MissingPackage, saying how to install it, if it is not there."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise MissingPackage(
            f"{what} need the package {package}, which is not installed: pip install 'lungjax[dicom]'"
        ) from None


def pseudonym(name: str, salt: str) -> str:
    """Returns 12 hex digits that stand for `name`: BLAKE2b of it, keyed with `salt`.

    Without a salt (or with a known one), whoever can list the possible names can find the one behind a hash.
    """
    key = salt.encode()
    key = key if len(key) <= hashlib.blake2b.MAX_KEY_SIZE else hashlib.blake2b(key).digest()
    return hashlib.blake2b(name.encode(), key=key, digest_size=6).hexdigest()


def canonical_axes(directions: np.ndarray) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Returns which axis of an array lies nearest to z, y and x of `Volume`, and 1 or -1 if it runs backwards.

    `directions` [3, 3]: row i is the unit vector along axis i of the array, in DICOM's patient coordinates
    (x to the patient's left, y to the back, z to the head).
    """
    parts = np.asarray(directions, np.float64)[:, ::-1]  # columns z, y, x
    order = max(itertools.permutations(range(3)), key=lambda axes: sum(abs(parts[a, i]) for i, a in enumerate(axes)))
    signs = [1 if parts[axis, i] >= 0 else -1 for i, axis in enumerate(order)]
    return (order[0], order[1], order[2]), (signs[0], signs[1], signs[2])


def canonical(array: np.ndarray, directions: np.ndarray, spacing: Sequence[float]) -> Volume:
    """Returns a scan as it was stored, int16 with three axes, as a `Volume`.

    `directions` as in `canonical_axes`, `spacing` in mm along the array's own axes. Axes are swapped and
    turned, never interpolated: of an oblique scan, the nearest planes are taken.
    """
    order, signs = canonical_axes(directions)
    turned = array.transpose(order)[tuple(slice(None, None, sign) for sign in signs)]
    return Volume(turned, (spacing[order[0]], spacing[order[1]], spacing[order[2]]))


def cut(volume: Volume, plane: str, index: int) -> np.ndarray:
    """Returns one plane of a volume, float32 [h, w] in Hounsfield units, with square pixels.

    The coarser of the two spacings is interpolated (linearly) to the finer, over the same field of view.
    """
    axis = PLANES[plane]
    flat = np.take(volume.hu, index, axis=axis).astype(np.float32)
    if plane != "axial":
        flat = flat[::-1]  # head up
    mm = [volume.spacing[i] for i in range(3) if i != axis]
    finest = min(mm)
    size = (max(1, round(flat.shape[0] * mm[0] / finest)), max(1, round(flat.shape[1] * mm[1] / finest)))
    if size == flat.shape:
        return flat
    whole = (0.0, 0.0, float(flat.shape[1]), float(flat.shape[0]))
    return images.resize(flat, whole, size, "bilinear", True)


def middle_slice(count: int) -> int:
    """Returns the index of the middle one of `count` planes, the later of two."""
    return count // 2


def render(hu: np.ndarray, windows: Windows) -> np.ndarray:
    """Returns Hounsfield units [h, w] as uint8: [h, w] for one window, [h, w, 3] for three.

    Each window is a centre and a width; centre - width / 2 becomes 0 and centre + width / 2 becomes 255.
    """
    values = hu.astype(np.float32)
    channels = [
        np.rint(np.clip((values - (centre - width / 2)) * (255 / width), 0, 255)).astype(np.uint8)
        for centre, width in windows
    ]
    return channels[0] if len(channels) == 1 else np.stack(channels, axis=-1)


def picture(volume: Volume, plane: str, index: int, windows: Windows) -> bytes:
    """Returns one plane of a volume as a PNG file, see `cut` and `render`."""
    return images.encode(render(cut(volume, plane, index), windows))


def raise_error(problem: str) -> bytes:
    """Raises ValueError(problem): the image of an example that was found to be bad before it was read."""
    raise ValueError(problem)


def remembered(read: Callable[..., Made]) -> Callable[..., Made]:
    """Returns `read` with its last KEPT results kept in this process; arguments must be hashable.

    Threads that want the same volume wait for the one that reads it: a volume may be half a gigabyte.
    """
    kept = functools.lru_cache(maxsize=KEPT)(read)
    lock = threading.Lock()

    @functools.wraps(read)
    def locked(*args: Any) -> Made:
        with lock:
            return kept(*args)

    return locked
