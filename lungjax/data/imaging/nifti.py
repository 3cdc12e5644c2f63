"""NIfTI volumes in Hounsfield units, read with nibabel (`dicom` extra)."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from lungjax.data.imaging import volumes
from lungjax.data.imaging.memory_file import Unreadable, named_errors
from lungjax.data.imaging.volumes import Volume, Windows

SUFFIXES = (".nii", ".nii.gz")
MILLIMETERS = {"mm": 1.0, "meter": 1000.0, "micron": 0.001, "unknown": 1.0}
MIN_SPACING, MAX_SPACING = 0.1, 10.0  # mm between voxels of a CT


@dataclass(frozen=True)
class Header:
    """The header of a NIfTI file, in the axes of `Volume`."""

    shape: tuple[int, int, int]  # z, y, x
    spacing: tuple[float, float, float]  # mm along z, y, x
    notes: tuple[str, ...] = ()


@named_errors
def header(path: str) -> Header:
    """Reads the header of a NIfTI file. If the file specifies no unit of length, mm is assumed, with a note.

    Raises ValueError if the file is not NIfTI or not a single 3D volume, for units other than mm, meter and micron, and
    for voxels outside 0.1 to 10 mm.
    """
    nibabel = volumes.need("nibabel", "NIfTI volumes")
    image = _open(nibabel, path)
    shape = image.shape
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3 or min(shape) < 1:
        sides = " x ".join(str(side) for side in image.shape)
        raise Unreadable(f"{path}: {sides} voxels, expected one three-dimensional volume; split the file")
    unit = nibabel.nifti1.unit_codes.label.get(int(image.header["xyzt_units"]) % 8, "of an undefined code")
    if unit not in MILLIMETERS:
        raise Unreadable(f"{path}: unit of length {unit}; expected mm, meter, micron or unknown (mm)")
    # Stored as float32; rounding makes 0.8 mm equal to 0.8 mm in DICOM.
    sizes = np.round(nibabel.affines.voxel_sizes(image.affine) * MILLIMETERS[unit], 5)
    if not all(MIN_SPACING <= size <= MAX_SPACING for size in sizes):
        sides = " x ".join(f"{size:g}" for size in sizes)
        allowed = f"{MIN_SPACING:g} to {MAX_SPACING:g} mm"
        raise Unreadable(f"{path}: voxels of {sides} mm, expected {allowed}; correct the unit ({unit}) or the affine")
    notes = ["without a unit of length: interpreted as mm"] if unit == "unknown" else []
    if not (image.header["qform_code"] or image.header["sform_code"]):
        notes.append("without an orientation (qform and sform code 0): possibly mirrored")
    # For each body axis (x, y, z), the array axis along it.
    places = nibabel.io_orientation(image.affine)[:, 0].astype(int).tolist()
    z, y, x = (places.index(axis) for axis in (2, 1, 0))
    return Header((shape[z], shape[y], shape[x]), (float(sizes[z]), float(sizes[y]), float(sizes[x])), tuple(notes))


@named_errors
def picture(path: str, plane: str, index: int, windows: Windows) -> bytes:
    """Returns one plane of a NIfTI volume as a PNG file, and caches the volume for the next plane.

    Raises ValueError as `header` does, and for a damaged file or values that are not Hounsfield units.
    """
    return volumes.picture(volume(path), plane, index, windows)


@volumes.cache_latest
@named_errors
def volume(path: str) -> Volume:
    """Reads a NIfTI volume, replacing NaN with air. Raises the same errors as `picture`."""
    spacing = header(path).spacing
    nibabel = volumes.need("nibabel", "NIfTI volumes")
    image = nibabel.as_closest_canonical(_open(nibabel, path))
    values: np.ndarray = image.get_fdata(dtype=np.float32, caching="unchanged")
    values = values.reshape(values.shape[:3])
    np.nan_to_num(values, copy=False, nan=volumes.AIR)
    low, high = float(values.min()), float(values.max())
    if low > -500 or high < 0:
        windowed = low >= 0 and high <= 255
        hint = "windowed images can be used as PNG" if windowed else "expected air at -1000, tissue above 0"
        problem = f"values of {low:g} to {high:g} are not Hounsfield units ({hint})"
        raise Unreadable(f"{path}: {problem}; convert the scan again from DICOM")
    np.rint(np.clip(values, -32768, 32767, out=values), out=values)  # in place, to save memory
    # nibabel's canonical axes run to the right, to the front and to the head.
    return Volume(values.astype(np.int16)[::-1, ::-1].transpose(2, 1, 0), spacing)


def _open(nibabel: Any, path: str) -> Any:
    try:
        image = nibabel.load(path)
    except FileNotFoundError:
        raise Unreadable(f"{path}: no such file") from None
    except Exception as error:  # the exceptions of nibabel's parsers differ
        raise Unreadable(f"{path}: not a readable NIfTI file ({error})") from None
    if not isinstance(image, nibabel.Nifti1Image):  # the base class of NIfTI-2
        raise Unreadable(f"{path}: a {type(image).__name__}, expected NIfTI")
    return image
