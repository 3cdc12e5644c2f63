"""DICOM files, read with pydicom (`dicom` extra): CT series in Hounsfield units, X-rays in the window of the file.

A file is a path or a `MemoryFile`. A CT file has one slice, or several frames with functional groups (enhanced CT,
DICOM PS3.3 A.38), which become slices of one series.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lungjax.data.imaging import dicom_frames, images, volumes
from lungjax.data.imaging.limits import DEFAULT, LimitError, Limits
from lungjax.data.imaging.memory_file import File, MemoryFile, Unreadable, named_errors, open_limited, quote
from lungjax.data.imaging.volumes import PLANES, Volume, Windows

SUFFIXES = (".dcm", ".dicom")
XRAYS = ("CR", "DX", "RG")
NON_IMAGES = ("SR", "PR", "KO", "SEG", "RTSTRUCT", "RTPLAN", "RTDOSE", "REG", "DOC", "AU")
OTHER_MODALITIES = ("MR", "US", "PT", "NM", "MG", "XA", "RF", "OT", "ES", "OP", "XC")  # safe to quote in messages
TAGS = [
    "SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "PatientID", "Modality", "ImageType",
    "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PixelSpacing", "ImageOrientationPatient",
    "ImagePositionPatient", "RescaleSlope", "RescaleIntercept", "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
]  # fmt: skip
FUNCTIONAL_GROUPS = {  # sequence with each attribute of a frame
    "ImagePositionPatient": "PlanePositionSequence", "ImageOrientationPatient": "PlaneOrientationSequence",
    "PixelSpacing": "PixelMeasuresSequence", "RescaleSlope": "PixelValueTransformationSequence",
    "RescaleIntercept": "PixelValueTransformationSequence", "FrameType": "CTImageFrameTypeSequence",
}  # fmt: skip
MAX_GROUPS_BYTES = 2**21  # of functional groups in an upload; millions of empty items would keep the parser busy
MAX_DISK_GROUPS_BYTES = 2**22  # the same on disk, where an enhanced CT may have 1500 slices
PADDING = [0x00280120, 0x00280121]  # PixelPaddingValue and PixelPaddingRangeLimit
ORIENTATION_TOLERANCE = 0.01  # of direction cosines within a series: about half a degree
MAX_TILT = 0.09  # sine of 5 degrees, between the stack and the normal of its slices
STEP_TOLERANCE = 0.1  # of the median distance between slices
DECODERS = "pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg, or convert it to uncompressed DICOM"


@dataclass(frozen=True, slots=True)
class Header:
    """The header of one DICOM image. Only `patient` is personal information."""

    path: File
    series: str  # SeriesInstanceUID
    image: str  # SOPInstanceUID
    patient: str  # PatientID, else the study's UID
    modality: str
    aside: str  # kind of a file to skip, such as "localizers"; "" for images of the patient
    size: tuple[int, int]  # rows, columns
    spacing: tuple[float, float] | None  # mm between rows, between columns
    orientation: tuple[float, ...] | None  # six direction cosines: along a row, down a column
    position: tuple[float, ...] | None  # mm, of the first pixel
    rescale: tuple[float, float] = (1.0, 0.0)  # slope and intercept of Hounsfield units
    frame: int | None = None  # from 0; None for a file with a single image

    @property
    def name(self) -> str:
        """The file and, counted from 1 as in DICOM, the frame."""
        return str(self.path) if self.frame is None else f"{self.path}#frame-{self.frame + 1:04d}"


@dataclass(frozen=True)
class Series:
    """The slices of one CT series in anatomical order: from foot to head, front to back or right to left."""

    headers: tuple[Header, ...]
    plane: str  # of its slices
    shape: tuple[int, int, int]  # of its `Volume`
    step: float  # mm between slices, 1 for a single one
    flaw: str  # reason why no other plane can be cut, or ""
    notes: tuple[str, ...] = ()

    def check(self, plane: str, limits: Limits = DEFAULT) -> None:
        """Raises ValueError if the plane can't be cut from these slices, which are then a volume in memory."""
        if self.flaw and plane != self.plane:
            raise ValueError(f"{self.headers[0].name}: no {plane} plane can be cut: {self.flaw}")
        if plane != self.plane:
            limits.check_volume(self.shape)


def is_dicom(path: str) -> bool:
    """Returns whether a file exists and has DICOM's magic bytes, DICM at byte 128."""
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


@named_errors
def headers(path: File, limits: Limits = DEFAULT) -> list[Header]:
    """Reads a DICOM file without its pixels; returns one header, or one per frame of an enhanced CT.

    Raises ValueError with the file name if the file is not DICOM, is neither a CT nor an X-ray, has no pixels, has
    several frames without functional groups, is compressed without a decoder, is a CT without rescale values, or
    exceeds a limit.
    """
    data = _read(path, limits, header_only=True)
    for name in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        raw = data.get_item(name).value if name in data else None
        allowed = MAX_GROUPS_BYTES if isinstance(path, MemoryFile) else MAX_DISK_GROUPS_BYTES
        if isinstance(raw, bytes) and len(raw) > allowed:  # not parsed yet
            raise ValueError("too many elements")
    frames = list(data.get("PerFrameFunctionalGroupsSequence", None) or ())
    if not frames:
        return [_header(path, data, limits)]
    if len(frames) != int(data.get("NumberOfFrames", 1)):
        raise Unreadable(f"{path}: functional groups of {len(frames)} frames differ from NumberOfFrames")
    shared, result = list(data.get("SharedFunctionalGroupsSequence", None) or ()), []
    for number, frame in enumerate(frames):
        for name, sequence in FUNCTIONAL_GROUPS.items():
            items = [item for groups in (frame, *shared) for item in groups.get(sequence, None) or ()]
            value = next((item[name].value for item in items if name in item), None)
            data.pop(name, None)
            if value is not None:
                setattr(data, name, value)
        result.append(_header(path, data, limits, number))
    return result


def _header(path: File, data: Any, limits: Limits, frame: int | None = None) -> Header:
    modality = str(data.get("Modality", ""))
    image_type = [str(word).upper() for word in data.get("FrameType", None) or data.get("ImageType", None) or []]
    aside = ""
    if modality in NON_IMAGES:
        aside = f"{modality} objects"
    elif "LOCALIZER" in image_type:
        aside = "localizers"
    elif modality == "CT" and (data.get("SamplesPerPixel", 1) != 1 or "SCREEN SAVE" in image_type):
        aside = "screen captures"
    else:
        _check(data, path, modality, frame)
        limits.check_image(int(data.Columns), int(data.Rows))
    spacing = _numbers(data, "PixelSpacing", 2, path)
    if spacing and min(spacing) <= 0:
        raise Unreadable(f"{path}: PixelSpacing is not positive {quote(path, f'({spacing[0]:g} x {spacing[1]:g})')}")
    orientation = _numbers(data, "ImageOrientationPatient", 6, path)
    if orientation:
        across, down = np.reshape(orientation, (2, 3))
        if max(abs(across @ down), abs(across @ across - 1), abs(down @ down - 1)) > ORIENTATION_TOLERANCE:
            raise Unreadable(f"{path}: ImageOrientationPatient is not two orthogonal unit vectors")
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
        rescale=(float(data.get("RescaleSlope", 1)), float(data.get("RescaleIntercept", 0))) if not aside else (1, 0),
        frame=frame,
    )


def series(headers: Sequence[Header]) -> Series:
    """Sorts the slices of one CT series by their position along the slice normal.

    InstanceNumber is ignored, because it may be reversed or missing. Series with missing or unevenly spaced slices
    get a note, and no other plane can be cut from them. Raises ValueError, naming two of the files, if sizes, pixel
    spacings or orientations differ, if two slices have the same position, or if a position is missing.
    """
    first = headers[0]
    if len(headers) == 1 and (first.orientation is None or first.position is None):
        return Series((first,), "axial", (1, *first.size), 1.0, "a single slice without a position", ())
    for other in headers:
        _check_alike(first, other)
    assert first.orientation is not None
    directions = _directions(first.orientation)
    order, signs = volumes.canonical_axes(directions)
    axis = order.index(0)  # the body axis along which the slices are stacked
    normal = directions[0] * signs[axis]
    places = np.asarray([header.position for header in headers], np.float64)
    along = places @ normal
    ranks = np.argsort(along, kind="stable")
    ordered, along, places = tuple(headers[i] for i in ranks), along[ranks], places[ranks]
    steps = np.diff(along)
    for i in np.flatnonzero(steps < 0.01)[:1]:
        pair = f"{ordered[i].name} and {ordered[i + 1].name}"
        raise Unreadable(f"{pair} have the same series and position; keep one of these copies or scans")
    step = float(np.median(steps)) if len(steps) else 1.0
    sides = (len(headers), *first.size)
    shape = (sides[order[0]], sides[order[1]], sides[order[2]])
    flaw, *notes = _flaws(ordered, steps, step, places, normal)
    return Series(ordered, list(PLANES)[axis], shape, step, flaw, tuple(notes))


def picture(header: Header, windows: Windows, limits: Limits = DEFAULT, data: Any = None) -> bytes:
    """Returns one CT slice as a PNG file, oriented as described in `volumes`. Raises ValueError for damaged pixels.

    `data` is the pydicom data set of a `MemoryFile` that has been read already.
    """
    one = series([header])
    return volumes.picture(_volume(one.headers, one.step, limits, data), one.plane, 0, windows, limits)


@named_errors
def frames(file: MemoryFile, headers: Sequence[Header], windows: Windows, limits: Limits = DEFAULT) -> list[bytes]:
    """Returns the slices `headers` of one file as `picture` does, but reads the file only once."""
    data = _read(file, limits)
    return [picture(header, windows, limits, data) for header in headers]


def cut(
    headers: tuple[Header, ...], step: float, plane: str, index: int, windows: Windows, limits: Limits = DEFAULT
) -> bytes:
    """Returns a slice of a sorted series in `plane` as a PNG file; caches the volume. Same errors as `picture`."""
    return volumes.picture(_cached_volume(headers, step, limits), plane, index, windows, limits)


@named_errors
def xray(path: File, limits: Limits = DEFAULT) -> bytes:
    """Returns an X-ray as an 8-bit PNG file with white bones, even if it is stored inverted (MONOCHROME1).

    Scales differ between manufacturers, so the window is that of the file (WindowCenter and WindowWidth, or its VOI
    LUT); without one, the range of the pixels is mapped to 0..255. Raises the same errors as `picture`.
    """
    from pydicom.pixels import apply_modality_lut

    data, pixels = _pixels(path, limits)
    if pixels.ndim == 3:
        if pixels.dtype != np.uint8:
            raise Unreadable(f"{path}: color pixels of {pixels.dtype}, expected uint8")
        return images.encode(pixels)
    padding = _padding(data, pixels)
    windowed = _windowed(data, apply_modality_lut(pixels, data), ~padding)
    if data.get("PhotometricInterpretation", "") == "MONOCHROME1":
        windowed = 1 - windowed
    windowed[padding] = 0
    return images.encode(np.rint(np.clip(windowed, 0, 1) * 255).astype(np.uint8))


def _read(path: File, limits: Limits, header_only: bool = False) -> Any:
    pydicom = volumes.need("pydicom", "DICOM files")
    try:
        if not header_only and not isinstance(path, MemoryFile):
            limits.check_bytes(os.stat(path).st_size)
        tags = TAGS if header_only else None
        with open_limited(path, limits.bytes) as opened:
            file = dicom_frames.inflated(opened, limits)
            return pydicom.dcmread(file, stop_before_pixels=header_only, specific_tags=tags)
    except OSError as error:
        raise Unreadable(f"{path}: {(error.strerror or str(error)).lower()}") from None
    except pydicom.errors.InvalidDicomError:
        raise Unreadable(f"{path}: not a DICOM file (no DICM at byte 128)") from None


def _check(data: Any, path: File, modality: str, frame: int | None) -> None:
    if modality != "CT" and modality not in XRAYS:
        name = modality if modality in OTHER_MODALITIES else quote(path, modality)
        raise Unreadable(f"{path}: modality {name or 'unknown'}; expected CT or X-ray ({', '.join(XRAYS)})")
    if not data.get("Rows") or not data.get("Columns"):
        raise Unreadable(f"{path}: a DICOM file without pixels")
    if int(data.get("NumberOfFrames", 1) or 1) > 1 and (frame is None or modality != "CT"):
        raise Unreadable(f"{path}: several frames without the functional groups of a CT; save one frame per file")
    if modality == "CT" and ("RescaleSlope" not in data or "RescaleIntercept" not in data):
        raise Unreadable(f"{path}: a CT without RescaleSlope or RescaleIntercept, so Hounsfield units are unknown")
    syntax = data.file_meta.get("TransferSyntaxUID", None)
    if syntax is not None and syntax.is_compressed and not _can_decode(syntax):
        name = quote(path, syntax.name, "?") if syntax.name == str(syntax) else syntax.name
        raise Unreadable(f"{path}: no decoder for its compressed pixels ({name}); {DECODERS}")


def _numbers(data: Any, name: str, count: int, path: File) -> tuple[float, ...] | None:
    try:
        numbers = tuple(float(value) for value in data.get(name) or ())
    except (ValueError, TypeError) as error:
        raise Unreadable(f"{path}: {name} can't be read {quote(path, f'({error})')}") from None
    if numbers and (len(numbers) != count or not np.isfinite(numbers).all()):
        values = quote(path, f"the values {numbers}", "other values")
        raise Unreadable(f"{path}: {name} has {values}, expected {count} numbers")
    return numbers or None


def _can_decode(syntax: Any) -> bool:
    from pydicom.pixels import get_decoder

    try:
        return bool(syntax.is_deflated or get_decoder(syntax).is_available)
    except NotImplementedError:  # raised for an unknown transfer syntax
        return False


def _pixels(path: File, limits: Limits, frame: int | None = None, data: Any = None) -> tuple[Any, np.ndarray]:
    """Returns a data set that describes the pixels, and the stored values, [rows, columns] or [rows, columns, 3]."""
    pydicom = volumes.need("pydicom", "DICOM files")
    # Does not read the other frames from disk.
    frame_only = data is None and frame is not None and not isinstance(path, MemoryFile)
    if data is None:
        data = pydicom.Dataset() if frame_only else _read(path, limits)
    if not frame_only and "PixelData" not in data:
        raise Unreadable(f"{path}: a DICOM file without pixels")
    try:
        if not frame_only:
            limits.check_image(int(data.Columns), int(data.Rows))
            dicom_frames.check(data, frame or 0)
            pixels = pydicom.pixels.pixel_array(data, index=frame)
        else:
            with open_limited(path, limits.bytes) as opened:
                file = dicom_frames.inflated(opened, limits)
                header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=dicom_frames.TAGS)
                limits.check_image(int(header.Columns), int(header.Rows))
                dicom_frames.check(header, frame or 0, file)
                pixels = pydicom.pixels.pixel_array(file, index=frame, ds_out=data, specific_tags=PADDING)
    except LimitError:
        raise
    except Exception as error:  # decoders raise anything
        syntax = getattr(data, "file_meta", {}).get("TransferSyntaxUID", None)
        compressed = syntax is not None and syntax.is_compressed
        hint = f"if the file is complete, {DECODERS}" if compressed else "the file may be truncated"
        reason = f"its pixels can't be decoded {quote(path, f'({error})')}".strip()
        raise Unreadable(f"{path}: {reason}; {hint}") from None
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[-1] != 3):
        raise Unreadable(f"{path}: pixels of shape {pixels.shape}, expected one gray or RGB image")
    return data, pixels


def _padding(data: Any, pixels: np.ndarray) -> np.ndarray:
    """Returns a mask, bool [rows, columns], of the pixels that PixelPaddingValue marks as outside the scan."""
    value = data.get("PixelPaddingValue", None)
    if value is None:
        return np.zeros(pixels.shape, bool)
    low, high = sorted((int(value), int(data.get("PixelPaddingRangeLimit", value))))
    return (pixels >= low) & (pixels <= high)


@named_errors
def _hu(path: File, header: Header, limits: Limits, data: Any) -> np.ndarray:
    """Returns the Hounsfield units of one slice, int16 [rows, columns]; pixels outside the scan are air."""
    data, pixels = _pixels(path, limits, header.frame, data)
    hu = pixels * np.float32(header.rescale[0]) + np.float32(header.rescale[1])
    hu[_padding(data, pixels)] = volumes.AIR
    return np.rint(np.clip(hu, -32768, 32767)).astype(np.int16)


def _volume(headers: Sequence[Header], step: float, limits: Limits, data: Any = None) -> Volume:
    """Reads a sorted series with slices `step` mm apart. Raises the same errors as `picture`."""
    first = headers[0]
    stack = np.empty((len(headers), *first.size), np.int16)
    for i, one in enumerate(headers):
        stack[i] = _hu(one.path, one, limits, data)
    directions = _directions(first.orientation or (1.0, 0.0, 0.0, 0.0, 1.0, 0.0))
    if len(headers) > 1:  # slices are sorted along the body, but their normal may point in the opposite direction
        ends = np.asarray(headers[-1].position) - np.asarray(first.position)
        directions[0] *= 1.0 if ends @ directions[0] > 0 else -1.0
    return volumes.canonical(stack, directions, (step, *(first.spacing or (1.0, 1.0))))


_cached_volume = volumes.cache_latest(_volume)


def _directions(orientation: Sequence[float]) -> np.ndarray:
    """Returns the unit vectors along the slices, down the columns and along the rows, [3, 3]."""
    across, down = np.asarray(orientation[:3], np.float64), np.asarray(orientation[3:], np.float64)
    return np.stack([np.cross(across, down), down, across])


def _check_alike(first: Header, other: Header) -> None:
    pair = f"{first.name} and {other.name} belong to one series"
    for header in (first, other):
        if header.orientation is None or header.position is None:
            name = "ImageOrientationPatient" if header.orientation is None else "ImagePositionPatient"
            raise Unreadable(f"{header.name}: no {name}, so the series can't be sorted")
    assert first.orientation is not None and other.orientation is not None
    turn = np.abs(np.subtract(first.orientation, other.orientation)).max()
    spacings = first.spacing or (0.0, 0.0), other.spacing or (0.0, 0.0)
    for field, name, alike in (
        ("orientation", "orientations", turn <= ORIENTATION_TOLERANCE),
        ("size", "sizes (rows, columns)", first.size == other.size),
        ("spacing", "pixel spacings", np.allclose(*spacings, rtol=1e-3)),
    ):
        if not alike:
            values = f"{getattr(first, field)} and {getattr(other, field)}"
            raise Unreadable(f"{pair}, but have different {name}, {values}; give each its own folder and series")


def _flaws(
    ordered: Sequence[Header], steps: np.ndarray, step: float, places: np.ndarray, normal: np.ndarray
) -> list[str]:
    """Returns the reason why no other plane can be cut from a series (or ""), followed by notes."""
    if len(ordered) == 1:
        return ["a single slice"]
    if ordered[0].spacing is None:
        return ["no PixelSpacing"]
    stack = places[-1] - places[0]
    if np.linalg.norm(stack - (stack @ normal) * normal) > MAX_TILT * np.linalg.norm(stack):
        return ["a tilted gantry: each slice is shifted relative to the next"]
    uneven = np.flatnonzero(np.abs(steps - step) > STEP_TOLERANCE * step)
    if not len(uneven):
        return [""]
    i = int(uneven[0])
    files = " and ".join(os.path.basename(header.name) for header in ordered[i : i + 2])
    missing = int(np.rint(steps[uneven] / step - 1).clip(min=0).sum())
    if missing:
        flaw = f"about {missing} missing slices, the first between {files} ({steps[i]:g} mm, else {step:g} mm)"
        return [flaw, "with missing slices"]
    uneven_steps = "uneven distances between slices"
    return [f"{uneven_steps}, {steps[i]:g} mm between {files}, else {step:g} mm", f"with {uneven_steps}"]


def _windowed(data: Any, values: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Returns the values of an X-ray in the file's window, float32, where 0..1 is black to white."""
    from pydicom.multival import MultiValue
    from pydicom.pixels import apply_voi_lut

    center, width = (data.get(name) for name in ("WindowCenter", "WindowWidth"))
    center, width = (value[0] if isinstance(value, MultiValue) else value for value in (center, width))
    values = np.asarray(values)
    if center is not None and width is not None and float(width) > 1:
        x, c, w = values.astype(np.float32), float(center), float(width)
        function = data.get("VOILUTFunction", None) or "LINEAR"
        if function == "SIGMOID":
            return np.asarray(1 / (1 + np.exp(np.clip(-4 * (x - c) / w, -80, 80))), np.float32)
        return (x - c) / w + 0.5 if function == "LINEAR_EXACT" else (x - (c - 0.5)) / (w - 1) + 0.5
    if data.get("VOILUTSequence", None):
        bits = int(data.VOILUTSequence[0].LUTDescriptor[2])
        return np.asarray(apply_voi_lut(values.astype(np.int64), data), np.float32) / (2**bits - 1)
    scanned = values[inside] if inside.any() else values
    low, high = float(scanned.min()), float(scanned.max())
    return (values.astype(np.float32) - low) / max(high - low, 1e-6)
