"""DICOM files, read with pydicom (extra `dicom`): CT series in Hounsfield units, X-rays in their own window.

A file is a path, or `Held` in memory.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lungjax.data.imaging import dicom_frames, images, volumes
from lungjax.data.imaging.memory_file import File, Held, Unreadable, named_errors, quote
from lungjax.data.imaging.volumes import PLANES, Volume, Windows

SUFFIXES = (".dcm", ".dicom")
XRAYS = ("CR", "DX", "RG")
# Objects that lie beside the images of a study and show nothing of the patient.
BESIDE = ("SR", "PR", "KO", "SEG", "RTSTRUCT", "RTPLAN", "RTDOSE", "REG", "DOC", "AU")
TAGS = [
    "SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "PatientID", "Modality", "ImageType",
    "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PixelSpacing", "ImageOrientationPatient",
    "ImagePositionPatient", "RescaleSlope", "RescaleIntercept", "SharedFunctionalGroupsSequence",
]  # fmt: skip
STEADY = 0.01  # how far direction cosines of one series may differ: about half a degree
SHEARED = 0.09  # sine of 5 degrees, by which the stack may lean without being a sheared volume
UNEVEN = 0.1  # of the usual distance between slices
AS_STORED = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
OTHERS = ("MR", "US", "PT", "NM", "MG", "XA", "RF", "OT", "ES", "OP", "XC")  # modalities that a message may name


@dataclass(frozen=True, slots=True)
class Header:
    """What one DICOM file says of itself. Of the person there is nothing in it but `patient`."""

    path: File
    series: str  # SeriesInstanceUID
    image: str  # SOPInstanceUID
    patient: str  # PatientID, or the study's UID where there is none
    modality: str
    aside: str  # why the file is no image of the patient, "" if it is one
    size: tuple[int, int]  # rows, columns
    spacing: tuple[float, float] | None  # mm between rows, between columns
    orientation: tuple[float, ...] | None  # six direction cosines: along a row, down a column
    position: tuple[float, ...] | None  # mm, of the first pixel


@dataclass(frozen=True)
class Series:
    """The slices of one CT series in the order of the body: from foot to head, front to back or right to left."""

    headers: tuple[Header, ...]
    plane: str  # the plane of its slices
    shape: tuple[int, int, int]  # of the `Volume` it makes
    step: float  # mm between slices, 1 for a single one
    flaw: str  # why no other plane can be cut from it, "" if it can
    notes: tuple[str, ...] = ()


def is_dicom(path: str) -> bool:
    """Says whether a file has DICOM's mark, the letters DICM after 128 bytes. False for one that is not there."""
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


@named_errors("DICOM")
def header(path: File) -> Header:
    """Reads the header of a DICOM file, not its pixels.

    Raises ValueError, with the file, if it is no DICOM file, another modality than CT or X-ray, without pixels,
    with several frames, compressed in a way that nothing installed decodes, or a CT without a rescale.
    """
    data = _read(path, header_only=True)
    modality = str(data.get("Modality", ""))
    kinds = [str(word).upper() for word in data.get("ImageType", None) or []]
    aside = ""
    if modality in BESIDE:
        aside = f"{modality} objects"
    elif "LOCALIZER" in kinds:
        aside = "localizers"
    elif modality == "CT" and (data.get("SamplesPerPixel", 1) != 1 or "SCREEN SAVE" in kinds):
        aside = "screen pictures"
    if not aside:
        _check(data, path, modality)
    spacing = _numbers(data, "PixelSpacing", 2, path)
    if spacing and min(spacing) <= 0:
        raise Unreadable(f"{path}: a PixelSpacing of {quote(path, f'{spacing[0]:g} x {spacing[1]:g} mm', 'zero')}")
    orientation = _numbers(data, "ImageOrientationPatient", 6, path)
    if orientation:
        across, down = np.reshape(orientation, (2, 3))
        if max(abs(across @ down), abs(across @ across - 1), abs(down @ down - 1)) > STEADY:
            raise Unreadable(f"{path}: an ImageOrientationPatient that is not two unit vectors at a right angle")
    return Header(
        path=path,
        series=str(data.get("SeriesInstanceUID", "")) or str(path),
        image=str(data.get("SOPInstanceUID", "")) or str(path),
        patient=str(data.get("PatientID", "") or "").strip() or str(data.get("StudyInstanceUID", "")) or str(path),
        modality=modality,
        aside=aside,
        size=(int(data.get("Rows", 0) or 0), int(data.get("Columns", 0) or 0)),
        spacing=(spacing[0], spacing[1]) if spacing else None,
        orientation=orientation,
        position=_numbers(data, "ImagePositionPatient", 3, path),
    )


def series(headers: Sequence[Header]) -> Series:
    """Sorts the slices of one CT series by their position along the normal of their planes.

    InstanceNumber is not used: it may count backwards, or not at all. Missing slices and uneven distances are
    noted, and are a flaw if another plane is to be cut. Raises ValueError, with two of the files, where size,
    pixel spacing or orientation differ, or two slices have the same position, and for lacking positions.
    """
    first = headers[0]
    if len(headers) == 1 and (first.orientation is None or first.position is None):
        shape = (1, *first.size)
        return Series((first,), "axial", shape, 1.0, "a single slice without a position", ())
    for other in headers:
        _check_alike(first, other)
    assert first.orientation is not None
    directions = _directions(first.orientation)
    order, signs = volumes.canonical_axes(directions)
    axis = order.index(0)  # of the body, along which the slices lie
    normal = directions[0] * signs[axis]
    places = np.asarray([header.position for header in headers], np.float64)
    along = places @ normal
    ranks = np.argsort(along, kind="stable")
    ordered, along, places = tuple(headers[i] for i in ranks), along[ranks], places[ranks]
    steps = np.diff(along)
    for i in np.flatnonzero(steps < 0.01)[:1]:
        raise Unreadable(
            f"{ordered[i].path} and {ordered[i + 1].path} have the same series and position: copies, or several "
            "scans in one series; keep one of them"
        )
    step = float(np.median(steps)) if len(steps) else 1.0
    sides = (len(headers), *first.size)
    shape = (sides[order[0]], sides[order[1]], sides[order[2]])
    notes, flaw = _flaws(ordered, steps, step, places, normal)
    return Series(ordered, next(p for p, a in PLANES.items() if a == axis), shape, step, flaw, notes)


@named_errors("DICOM")
def picture(path: File, windows: Windows) -> bytes:
    """Returns the CT slice of one file as a PNG file, turned as `volumes` says; only this file is read.

    Raises ValueError as `header` does, and for pixels that can't be decoded.
    """
    slice_of = header(path)
    one = series([slice_of])
    return volumes.picture(_volume([slice_of], one.step), one.plane, 0, windows)


def cut(paths: tuple[File, ...], step: float, plane: str, index: int, windows: Windows) -> bytes:
    """Returns one plane of a series as a PNG file; the volume stays in memory for the next plane.

    `paths` are in the order of `Series.headers`, `step` is its `step`. Raises ValueError as `picture` does.
    """
    return volumes.picture(volume(paths, step), plane, index, windows)


@volumes.remembered
def volume(paths: tuple[File, ...], step: float) -> Volume:
    """Reads a sorted series whose slices lie `step` mm apart. Raises ValueError as `picture` does."""
    return _volume([header(path) for path in paths], step)


@named_errors("DICOM")
def xray(path: File) -> bytes:
    """Returns an X-ray as an 8-bit PNG file in which bone is white, also where the file has MONOCHROME1.

    The window is the file's own (WindowCenter and WindowWidth, else its VOI LUT), because every maker has its
    own scale and no window fits all of a data set; without one, the range of its pixels becomes 0 to 255.
    Raises ValueError as `picture` does.
    """
    from pydicom.pixels import apply_modality_lut

    data = _read(path)
    pixels = _pixels(data, path)
    if pixels.ndim == 3:
        if pixels.dtype != np.uint8:
            raise Unreadable(f"{path}: colour pixels of {pixels.dtype}, wanted uint8")
        return images.encode(pixels)
    padding = _padding(data, pixels)
    shown = _windowed(data, apply_modality_lut(pixels, data), ~padding)
    if data.get("PhotometricInterpretation", "") == "MONOCHROME1":
        shown = 1 - shown
    shown[padding] = 0
    return images.encode(np.rint(np.clip(shown, 0, 1) * 255).astype(np.uint8))


def _read(path: File, header_only: bool = False) -> Any:
    pydicom = volumes.need("pydicom", "DICOM files")
    source = path.open() if isinstance(path, Held) else path
    try:
        if header_only:
            return pydicom.dcmread(source, stop_before_pixels=True, specific_tags=TAGS)
        return pydicom.dcmread(source)
    except OSError as error:
        raise Unreadable(f"{path}: {(error.strerror or str(error)).lower()}") from None
    except pydicom.errors.InvalidDicomError:
        raise Unreadable(f"{path}: no DICOM file (the letters DICM are not at byte 128)") from None


def _check(data: Any, path: File, modality: str) -> None:
    if modality != "CT" and modality not in XRAYS:
        named = modality if modality in OTHERS else quote(path, modality)
        raise Unreadable(f"{path}: modality {named or 'unknown'}; allowed are CT and the X-rays {', '.join(XRAYS)}")
    if not data.get("Rows") or not data.get("Columns"):
        raise Unreadable(f"{path}: a DICOM file without pixels")
    if int(data.get("NumberOfFrames", 1) or 1) > 1 or "SharedFunctionalGroupsSequence" in data:
        raise Unreadable(
            f"{path}: several frames in one file (an enhanced or multi-frame object): convert it to one file a "
            "slice, or to NIfTI"
        )
    if modality == "CT" and ("RescaleSlope" not in data or "RescaleIntercept" not in data):
        raise Unreadable(f"{path}: a CT without RescaleSlope and RescaleIntercept: no Hounsfield units can be had")
    syntax = data.file_meta.get("TransferSyntaxUID", None)
    if syntax is not None and syntax.is_compressed and not _decodes(syntax):
        named = quote(path, syntax.name, "?") if syntax.name == str(syntax) else syntax.name
        raise Unreadable(f"{path}: its pixels are compressed ({named}) and {_advice(syntax)}")


def _numbers(data: Any, name: str, count: int, path: File) -> tuple[float, ...] | None:
    try:
        numbers = tuple(float(value) for value in data.get(name) or ())
    except (ValueError, TypeError) as error:
        raise Unreadable(f"{path}: {name} can't be read {quote(path, f'({error})')}") from None
    if numbers and (len(numbers) != count or not np.isfinite(numbers).all()):
        raise Unreadable(
            f"{path}: {name} has {quote(path, f'the values {numbers}', 'other values')}, wanted {count} numbers"
        )
    return numbers or None


def _decodes(syntax: Any) -> bool:
    from pydicom.pixels import get_decoder

    try:
        return bool(syntax.is_deflated or get_decoder(syntax).is_available)
    except NotImplementedError:  # pydicom's word for a transfer syntax that it does not know
        return False


def _advice(syntax: Any) -> str:
    name = syntax.name.upper()
    if "JPEG" not in name and "RLE" not in name:
        return "no package decodes that: convert the file to uncompressed DICOM"
    part = "openjpeg" if "2000" in name else "rle" if "RLE" in name else "libjpeg"
    return f"nothing installed decodes that: pip install pylibjpeg pylibjpeg-{part}"


def _pixels(data: Any, path: File) -> np.ndarray:
    """Returns the stored values, [rows, columns] or, in colour, [rows, columns, 3] RGB."""
    if "PixelData" not in data:
        raise Unreadable(f"{path}: a DICOM file without pixels")
    try:
        if isinstance(path, Held):
            dicom_frames.check(data)
        pixels: np.ndarray = data.pixel_array
    except Exception as error:  # decoders raise what they like
        syntax = data.file_meta.get("TransferSyntaxUID", None)
        squeezed = syntax is not None and syntax.is_compressed
        hint = f"; if the file is whole, {_advice(syntax)}" if squeezed else "; the file may be truncated"
        said = f"its pixels can't be decoded {quote(path, f'({error})')}".strip()
        raise Unreadable(f"{path}: {said}{hint}") from None
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[-1] != 3):
        raise Unreadable(f"{path}: pixels of shape {pixels.shape}, wanted one gray or RGB picture")
    return pixels


def _padding(data: Any, pixels: np.ndarray) -> np.ndarray:
    """Returns where the stored values mean "outside what was scanned", bool [rows, columns]."""
    value = data.get("PixelPaddingValue", None)
    if value is None:
        return np.zeros(pixels.shape, bool)
    limit = data.get("PixelPaddingRangeLimit", value)
    low, high = sorted((int(value), int(limit)))
    return (pixels >= low) & (pixels <= high)


@named_errors("DICOM")
def _hu(path: File) -> np.ndarray:
    """Returns the Hounsfield units of one slice, int16 [rows, columns]; what was not scanned is air."""
    data = _read(path)
    pixels = _pixels(data, path)
    hu = pixels * np.float32(data.RescaleSlope) + np.float32(data.RescaleIntercept)
    hu[_padding(data, pixels)] = volumes.AIR
    return np.rint(np.clip(hu, -32768, 32767)).astype(np.int16)


def _volume(headers: Sequence[Header], step: float) -> Volume:
    first = headers[0]
    stack = np.empty((len(headers), *first.size), np.int16)
    for i, one in enumerate(headers):
        stack[i] = _hu(one.path)
    directions = _directions(first.orientation or AS_STORED)
    if len(headers) > 1:  # sorted along the body, which the normal may point against
        ends = np.asarray(headers[-1].position) - np.asarray(first.position)
        directions[0] *= 1.0 if ends @ directions[0] > 0 else -1.0
    spacing = first.spacing or (1.0, 1.0)
    return volumes.canonical(stack, directions, (step, *spacing))


def _directions(orientation: Sequence[float]) -> np.ndarray:
    """Returns the unit vectors along the slices, the rows (downwards) and the columns, [3, 3]."""
    across, down = np.asarray(orientation[:3], np.float64), np.asarray(orientation[3:], np.float64)
    return np.stack([np.cross(across, down), down, across])


def _check_alike(first: Header, other: Header) -> None:
    pair = f"{first.path} and {other.path} are of one series"
    for header in (first, other):
        for name, value in (("ImageOrientationPatient", header.orientation), ("ImagePositionPatient", header.position)):
            if value is None:
                raise Unreadable(f"{header.path}: no {name}, so its series can't be put in order")
    assert first.orientation is not None and other.orientation is not None
    if np.abs(np.subtract(first.orientation, other.orientation)).max() > STEADY:
        raise Unreadable(f"{pair}, but have different orientations; give each orientation its own folder and series")
    if first.size != other.size:
        sizes = " and ".join(f"{rows} x {columns}" for rows, columns in (first.size, other.size))
        raise Unreadable(f"{pair}, but have different sizes, {sizes} (rows x columns)")
    mm, others = first.spacing or (0.0, 0.0), other.spacing or (0.0, 0.0)
    if not np.allclose(mm, others, rtol=1e-3):
        spacings = " and ".join(f"{down:g} x {across:g}" for down, across in (mm, others))
        raise Unreadable(f"{pair}, but have different pixel spacings, {spacings} mm")


def _flaws(
    ordered: Sequence[Header], steps: np.ndarray, step: float, places: np.ndarray, normal: np.ndarray
) -> tuple[tuple[str, ...], str]:
    """Returns what to note of a series, and why no other plane can be cut from it."""
    if len(ordered) == 1:
        return (), "a single slice"
    if ordered[0].spacing is None:
        return (), "no PixelSpacing"
    lean = places[-1] - places[0]
    if np.linalg.norm(lean - (lean @ normal) * normal) > SHEARED * np.linalg.norm(lean):
        return (), "a tilted gantry: each slice is shifted against the next"
    odd = np.flatnonzero(np.abs(steps - step) > UNEVEN * step)
    if not len(odd):
        return (), ""
    i = int(odd[0])
    between = f"between {os.path.basename(str(ordered[i].path))} and {os.path.basename(str(ordered[i + 1].path))}"
    missing = int(np.rint(steps[odd] / step - 1).clip(min=0).sum())
    if missing:
        flaw = f"about {missing} missing slices, the first {between} ({steps[i]:g} mm, else {step:g} mm)"
        return ("with missing slices",), flaw
    flaw = f"uneven distances between slices, {between} {steps[i]:g} mm, else {step:g} mm"
    return ("with uneven distances between slices",), flaw


def _windowed(data: Any, values: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Returns the values of an X-ray as its file wants them shown, float32, 0..1 (or beyond, to be clipped)."""
    from pydicom.multival import MultiValue
    from pydicom.pixels import apply_voi_lut

    centre, width = (data.get(name) for name in ("WindowCenter", "WindowWidth"))
    centre, width = (value[0] if isinstance(value, MultiValue) else value for value in (centre, width))
    values = np.asarray(values)
    if centre is not None and width is not None and float(width) > 1:
        x, c, w = values.astype(np.float32), float(centre), float(width)
        shape = data.get("VOILUTFunction", None) or "LINEAR"
        if shape == "SIGMOID":
            return np.asarray(1 / (1 + np.exp(np.clip(-4 * (x - c) / w, -80, 80))), np.float32)
        return (x - c) / w + 0.5 if shape == "LINEAR_EXACT" else (x - (c - 0.5)) / (w - 1) + 0.5
    if data.get("VOILUTSequence", None):
        bits = int(data.VOILUTSequence[0].LUTDescriptor[2])
        return np.asarray(apply_voi_lut(values.astype(np.int64), data), np.float32) / (2**bits - 1)
    seen = values[inside] if inside.any() else values
    low, high = float(seen.min()), float(seen.max())
    return (values.astype(np.float32) - low) / max(high - low, 1e-6)
