"""NIfTI volumes in Hounsfield units, read with nibabel (`dicom` extra)."""

import gzip
import math
import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from lungjax.data.imaging import volumes
from lungjax.data.imaging.limits import DEFAULT, Limits
from lungjax.data.imaging.memory_file import Unreadable, named_errors
from lungjax.data.imaging.volumes import Volume, Windows

SUFFIXES = (".nii", ".nii.gz")
MILLIMETERS = {"mm": 1.0, "meter": 1000.0, "micron": 0.001, "unknown": 1.0}
MIN_SPACING, MAX_SPACING = 0.1, 10.0  # mm between voxels of a CT
GZIP = b"\x1f\x8b"
MAX_DEFLATE_RATIO = 1032  # of the format: at most 258 bytes per two bits
HEADER_BYTES = 540  # of NIfTI-2, which are also its first four bytes; NIfTI-1 has 348
MAX_OFFSET = 2**24  # bytes before the voxels, with extensions
PART = 2**20  # voxels


@dataclass(frozen=True)
class Header:
    """The header of a NIfTI file, in the axes of `Volume`."""

    shape: tuple[int, int, int]  # z, y, x
    spacing: tuple[float, float, float]  # mm along z, y, x
    notes: tuple[str, ...] = ()


@named_errors
def header(path: str, limits: Limits = DEFAULT) -> Header:
    """Reads the header of a NIfTI file. If the file specifies no unit of length, mm is assumed, with a note.

    Raises ValueError if the file is not NIfTI, is shorter than its header states, is not a single 3D volume, or exceeds
    a limit; and for units other than mm, meter and micron, and for voxels outside 0.1 to 10 mm.
    """
    nibabel = volumes.need("nibabel", "NIfTI volumes")
    raw = _raw_header(nibabel, path)
    sides = shape = tuple(int(side) for side in raw.get_data_shape())
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3 or min(shape) < 1:
        text = " x ".join(map(str, sides))
        raise Unreadable(f"{path}: {text} voxels, expected one three-dimensional volume; split the file")
    limits.check_volume(shape)
    _check_length(path, raw)
    unit = nibabel.nifti1.unit_codes.label.get(int(raw["xyzt_units"]) % 8, "of an undefined code")
    if unit not in MILLIMETERS:
        raise Unreadable(f"{path}: unit of length {unit}; expected mm, meter, micron or unknown (mm)")
    affine = raw.get_best_affine()
    # Stored as float32; rounding makes 0.8 mm equal to 0.8 mm in DICOM.
    sizes = np.round(nibabel.affines.voxel_sizes(affine) * MILLIMETERS[unit], 5)
    if not all(MIN_SPACING <= size <= MAX_SPACING for size in sizes):
        text = " x ".join(f"{size:g}" for size in sizes)
        allowed = f"{MIN_SPACING:g} to {MAX_SPACING:g} mm"
        raise Unreadable(f"{path}: voxels of {text} mm, expected {allowed}; correct the unit ({unit}) or the affine")
    notes = ["without a unit of length: interpreted as mm"] if unit == "unknown" else []
    if not (raw["qform_code"] or raw["sform_code"]):
        notes.append("without an orientation (qform and sform code 0): possibly mirrored")
    # For each body axis (x, y, z), the array axis along it.
    places = nibabel.io_orientation(affine)[:, 0].astype(int).tolist()
    z, y, x = (places.index(axis) for axis in (2, 1, 0))
    return Header((shape[z], shape[y], shape[x]), (float(sizes[z]), float(sizes[y]), float(sizes[x])), tuple(notes))


@named_errors
def picture(path: str, plane: str, index: int, windows: Windows, limits: Limits = DEFAULT) -> bytes:
    """Returns one plane of a NIfTI volume as a PNG file, and caches the volume for the next plane.

    Raises ValueError as `header` does, and for a damaged file or values that are not Hounsfield units.
    """
    return volumes.picture(volume(path, limits), plane, index, windows, limits)


@volumes.cache_latest
@named_errors
def volume(path: str, limits: Limits = DEFAULT) -> Volume:
    """Reads a NIfTI volume, replacing NaN with air. Raises the same errors as `picture`."""
    spacing = header(path, limits).spacing
    nibabel = volumes.need("nibabel", "NIfTI volumes")
    raw = _raw_header(nibabel, path)
    dtype, (slope, intercept) = raw.get_data_dtype(), raw.get_slope_inter()
    if dtype.kind not in "iuf":
        raise Unreadable(f"{path}: voxels of type {raw.get_value_label('datatype')}, expected one number per voxel")
    # In parts, since the volume in another type, let alone in float32, may not fit into memory.
    hu = np.empty(raw.get_data_shape()[:3], np.int16, order="F")
    flat = hu.reshape(-1, order="F")
    low, high = np.inf, -np.inf
    with _open(path) as file:
        file.read(raw.get_data_offset())
        for at in range(0, flat.size, PART):
            part = flat[at : at + PART]
            data = file.read(part.size * dtype.itemsize)
            if len(data) < part.size * dtype.itemsize:
                raise Unreadable(f"{path}: a damaged file, which ends before its last voxel")
            with np.errstate(over="ignore", invalid="ignore"):
                values = np.frombuffer(data, dtype).astype(np.float32)
                if slope is not None:
                    values = values * np.float32(slope) + np.float32(intercept)
            np.nan_to_num(values, copy=False, nan=volumes.AIR)
            low, high = min(low, float(values.min())), max(high, float(values.max()))
            part[:] = np.rint(np.clip(values, -32768, 32767))
        file.read(1)  # of a compressed file, verifies the checksum
    if low > -500 or high < 0:
        windowed = low >= 0 and high <= 255
        hint = "windowed images can be used as PNG" if windowed else "expected air at -1000, tissue above 0"
        problem = f"values of {low:g} to {high:g} are not Hounsfield units ({hint})"
        raise Unreadable(f"{path}: {problem}; convert the scan again from DICOM")
    # nibabel's canonical axes run to the right, to the front and to the head.
    canonical = nibabel.apply_orientation(hu, nibabel.io_orientation(raw.get_best_affine()))
    return Volume(canonical[::-1, ::-1].transpose(2, 1, 0), spacing)


def _open(path: str) -> Any:
    """Opens a file; one that is compressed is decompressed, whatever its suffix."""
    with open(path, "rb") as file:
        compressed = file.read(2) == GZIP
    return gzip.open(path) if compressed else open(path, "rb")


def _raw_header(nibabel: Any, path: str) -> Any:
    """Returns nibabel's header of a file. The extensions, whose size is not limited, are not read."""
    try:
        with _open(path) as file:
            data = file.read(HEADER_BYTES)
        second = HEADER_BYTES in (int.from_bytes(data[:4], "little"), int.from_bytes(data[:4], "big"))
        kind = nibabel.Nifti2Header if second else nibabel.Nifti1Header
        raw = kind(data[: kind.template_dtype.itemsize])
    except FileNotFoundError:
        raise Unreadable(f"{path}: no such file") from None
    except Exception as error:  # the exceptions of nibabel's parsers differ
        raise Unreadable(f"{path}: not a readable NIfTI file ({error})") from None
    if raw["magic"].item()[:3] != kind.single_magic[:3] or not 0 <= raw.get_data_offset() <= MAX_OFFSET:
        raise Unreadable(f"{path}: not a readable NIfTI file (its header has no magic word n+1 or a wrong offset)")
    return raw


def _check_length(path: str, raw: Any) -> None:
    """Raises Unreadable if the file is too short for its voxels, even with the best compression."""
    size, voxels = os.path.getsize(path), math.prod(int(side) for side in raw.get_data_shape())
    expected = raw.get_data_offset() + voxels * raw.get_data_dtype().itemsize
    with _open(path) as file:
        ratio = MAX_DEFLATE_RATIO if isinstance(file, gzip.GzipFile) else 1
    if size * ratio < expected:
        problem = f"{size} bytes are too few for the {voxels} voxels that its header states"
        raise Unreadable(f"{path}: a damaged or truncated file: {problem}")
