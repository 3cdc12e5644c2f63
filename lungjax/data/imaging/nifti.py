"""NIfTI volumes in Hounsfield units, read with nibabel (extra `dicom`)."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from lungjax.data.imaging import volumes
from lungjax.data.imaging.memory_file import Unreadable, named_errors
from lungjax.data.imaging.volumes import Volume, Windows

SUFFIXES = (".nii", ".nii.gz")
MILLIMETRES = {"mm": 1.0, "meter": 1000.0, "micron": 0.001, "unknown": 1.0}
PLAUSIBLE = (0.1, 10.0)  # mm between voxels of a CT


@dataclass(frozen=True)
class Header:
    """What the header of a NIfTI file says of its volume, in the axes of `Volume`."""

    shape: tuple[int, int, int]  # z, y, x
    spacing: tuple[float, float, float]  # mm along z, y, x
    notes: tuple[str, ...] = ()


@named_errors("NIfTI")
def header(path: str) -> Header:
    """Reads the header of a NIfTI file, without its values.

    Raises ValueError for a file that is no NIfTI, has more than three dimensions, or whose units are not
    lengths or give voxels outside 0.1 to 10 mm. Metres and microns are converted; without a unit, mm is assumed
    and a note says so.
    """
    nibabel = volumes.need("nibabel", "NIfTI volumes")
    image = _open(nibabel, path)
    shape = image.shape
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3 or min(shape) < 1:
        given = " x ".join(str(side) for side in image.shape)
        raise Unreadable(f"{path}: {given} voxels, wanted one volume with three dimensions: save each as its own file")
    try:
        unit = image.header.get_xyzt_units()[0]
    except KeyError:
        unit = f"code {int(image.header['xyzt_units'])}"
    if unit not in MILLIMETRES:
        raise Unreadable(f"{path}: the unit of length is {unit}; allowed are mm, meter, micron and unknown (mm)")
    # The file holds 32-bit numbers: rounded, 0.8 mm is 0.8 mm, as in DICOM.
    sizes = np.round(nibabel.affines.voxel_sizes(image.affine) * MILLIMETRES[unit], 5)
    if not all(PLAUSIBLE[0] <= size <= PLAUSIBLE[1] for size in sizes):
        given = " x ".join(f"{size:g}" for size in sizes)
        raise Unreadable(
            f"{path}: voxels of {given} mm (unit in the file: {unit}) can't be a chest CT, which has "
            f"{PLAUSIBLE[0]:g} to {PLAUSIBLE[1]:g} mm: correct the unit (xyzt_units) or the affine"
        )
    notes = []
    if unit == "unknown":
        notes.append("without a unit of length: taken as mm")
    if not (image.header["qform_code"] or image.header["sform_code"]):
        notes.append("without an orientation (qform and sform code 0): taken as stored, which may be mirrored")
    # Of each body axis (x, y, z), which axis of the array lies along it.
    places = nibabel.io_orientation(image.affine)[:, 0].astype(int).tolist()
    order = [places.index(axis) for axis in (2, 1, 0)]
    sides = tuple(int(shape[axis]) for axis in order)
    return Header(
        (sides[0], sides[1], sides[2]),
        (float(sizes[order[0]]), float(sizes[order[1]]), float(sizes[order[2]])),
        tuple(notes),
    )


@named_errors("NIfTI")
def picture(path: str, plane: str, index: int, windows: Windows) -> bytes:
    """Returns one plane of a NIfTI volume as a PNG file; the volume stays in memory for the next plane.

    Raises ValueError as `header` does, and for a damaged file or values that are no Hounsfield units.
    """
    return volumes.picture(volume(path), plane, index, windows)


@volumes.remembered
@named_errors("NIfTI")
def volume(path: str) -> Volume:
    """Reads a NIfTI volume; NaN becomes air. Raises ValueError as `picture` does."""
    found = header(path)
    nibabel = volumes.need("nibabel", "NIfTI volumes")
    image = nibabel.as_closest_canonical(_open(nibabel, path))
    values: np.ndarray = image.get_fdata(dtype=np.float32, caching="unchanged")
    values = values.reshape(values.shape[:3])
    np.nan_to_num(values, copy=False, nan=volumes.AIR)
    low, high = float(values.min()), float(values.max())
    if low > -500 or high < 0:
        hint = (
            "it was windowed already, or is a mask: convert the scan anew from DICOM, or give its slices as PNG"
            if low >= 0 and high <= 255
            else "a CT of the chest has air at -1000 and tissue above 0: convert the scan anew from DICOM"
        )
        raise Unreadable(f"{path}: its values are {low:g} to {high:g}, which are no Hounsfield units; {hint}")
    np.rint(np.clip(values, -32768, 32767, out=values), out=values)  # in place: half a gigabyte is usual
    # nibabel's canonical axes go to the right, to the front and to the head.
    return Volume(values.astype(np.int16)[::-1, ::-1].transpose(2, 1, 0), found.spacing)


def _open(nibabel: Any, path: str) -> Any:
    try:
        image = nibabel.load(path)
    except FileNotFoundError:
        raise Unreadable(f"{path}: no such file") from None
    except Exception as error:  # of its many parsers, for whatever the suffix promises
        raise Unreadable(f"{path}: no NIfTI file that can be read ({error})") from None
    if not isinstance(image, nibabel.Nifti1Image):  # NIfTI-2 derives from it
        raise Unreadable(f"{path}: a {type(image).__name__}, wanted NIfTI")
    return image
