"""Decodes untrusted images in memory, within the limits of `data.imaging.limits`.

The formats of `images.FORMATS` and, with the `dicom` extra, DICOM are accepted and recognized by their first bytes.
Each file goes only to the decoder for its format; Pillow limits the text and profiles that it inflates. Nothing is
written to disk, and no message quotes the content of a DICOM file.
"""

import logging
import struct
import warnings
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from PIL import Image

from lungjax.data.imaging import dicom, images
from lungjax.data.imaging import limits as file_limits
from lungjax.data.imaging.limits import LimitError
from lungjax.data.imaging.memory_file import MemoryFile, MissingPackage
from lungjax.data.imaging.volumes import Windows

MIB = 2**20
ALLOWED = f"expected one image per file; supported formats: {images.FORMAT_NAMES}, and DICOM"
MAGIC = (
    (b"\x89PNG\r\n\x1a\n", "PNG"), (b"\xff\xd8\xff", "JPEG"), (b"II*\0", "TIFF"), (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"), (b"MM\0+", "TIFF"), (b"BM", "BMP"), (b"GIF87a", "GIF"), (b"GIF89a", "GIF"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG2000"), (b"\xff\x4f\xff\x51", "JPEG2000"),
)  # fmt: skip


class UploadError(ValueError):
    """A rejected upload; `status` is the HTTP status, `reason` is one word for the metrics."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status, self.reason = status, reason


@dataclass(frozen=True)
class Limits(file_limits.Limits):
    """Limits of one upload; `pixels` is also the limit of all frames together."""

    bytes: int = 64 * MIB
    min_side: int = 8  # pixels along each side, at least
    frames: int = 256  # of a multi-frame DICOM file

    bytes_flag: ClassVar[str] = "--max_mb"


@dataclass(frozen=True, eq=False)
class Upload:
    """One decoded file."""

    images: list[np.ndarray]  # uint8 or uint16, [H, W] or [H, W, 3]; several for the frames of an enhanced CT
    series: str = ""  # SeriesInstanceUID and PatientID of a CT slice, only for grouping
    modality: str = ""  # of a DICOM file: CT or one of `dicom.XRAYS`


def quiet() -> None:
    """Silences the loggers and warnings of the decoders, whose messages quote values of the files.

    Setting a level is not enough: pydicom resets that of its logger when it is first imported.
    """
    for name in ("PIL", "pydicom", "python_multipart"):
        logger = logging.getLogger(name)
        logger.disabled = True
        logger.propagate = False  # for the messages of child loggers
        logger.handlers = [logging.NullHandler()]  # without a handler, Python prints warnings to stderr
    warnings.simplefilter("ignore")


def kind_of(data: bytes) -> str:
    """Returns Pillow's name for the format, or DICOM. Raises UploadError for any other kind."""
    if not data:
        raise UploadError(422, "empty", "an empty file")
    if data[128:132] == b"DICM":
        return "DICOM"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    for magic, kind in MAGIC:
        if data.startswith(magic):
            return kind
    raise UploadError(415, "type", f"not a known image format; {ALLOWED}")


def read(data: bytes, limits: Limits, hu_windows: Windows = ((-600.0, 1500.0),), plane: str = "axial") -> Upload:
    """Decodes a file in memory; CT slices must be in `plane`; `hu_windows` apply. Raises only UploadError."""
    try:
        limits.check_bytes(len(data))
        kind = kind_of(data)
        if kind == "DICOM":
            upload = _dicom(data, limits, hu_windows, plane)
        else:
            data = _jpeg(data) if kind == "JPEG" else data
            upload = Upload([images.read(data, (kind,), limits)[0]])
    except UploadError:
        raise
    except LimitError as error:
        raise UploadError(413, error.reason, str(error).removeprefix("file: ")) from None
    except MissingPackage as error:
        raise UploadError(415, "type", f"this service does not read DICOM: {error}") from None
    except Exception as error:  # decoders raise anything; except for `Unreadable`, the message may quote a DICOM file
        shown = isinstance(error, dicom.Unreadable if kind == "DICOM" else ValueError)
        words = str(error).removeprefix("file: ").strip() if shown else f"a damaged or truncated {kind} file"
        raise UploadError(422, "damaged", words if len(words) < 300 else f"{words[:300]} ...") from None
    for image in upload.images:
        height, width = image.shape[:2]
        if min(width, height) < limits.min_side:
            allowed = f"at least {limits.min_side} per side are required"
            raise UploadError(422, "small", f"{width} x {height} pixels; {allowed}")
    return upload


def _jpeg(data: bytes) -> bytes:
    """Returns a JPEG without segments that do not affect its pixels; of Exif, only the orientation remains."""
    segments, scan = file_limits.jpeg_segments(data)
    parts = [b"\xff\xd8"]
    for marker, start, end in segments:
        if marker == 0xE1 and (turn := images.orientation(data[start + 4 : end])) in images.TURNS:
            exif = Image.Exif()
            exif[images.ORIENTATION] = turn
            parts.append(b"\xff\xe1" + struct.pack(">H", len(exif.tobytes()) + 2) + exif.tobytes())
        if not (0xE0 < marker <= 0xEF and marker != 0xEE) and marker != 0xFE:  # APP14 has the color transform
            parts.append(data[start:end])
    return b"".join([*parts, data[scan:]])


def _dicom(data: bytes, limits: Limits, hu_windows: Windows, plane: str) -> Upload:
    file = MemoryFile("file", data)
    frames = dicom.headers(file, limits)
    headers = [header for header in frames if not header.aside]
    if not headers:
        raise UploadError(422, "aside", f"no image of the patient ({frames[0].aside})")
    header, (height, width) = headers[0], headers[0].size
    if len(frames) > limits.frames or len(frames) * width * height > limits.pixels:
        allowed = f"at most {limits.frames} with {limits.pixels} pixels in total are accepted"
        raise UploadError(413, "frames", f"{len(frames)} frames of {width} x {height} pixels; {allowed}")
    if header.modality in dicom.XRAYS:
        return Upload([images.decode(dicom.xray(file, limits), None, ("PNG",))], modality=header.modality)
    own = dicom.series(headers).plane
    if header.orientation is not None and own != plane:
        raise UploadError(422, "plane", f"the slice is {own}, but the model is for {plane}; use lungjax.predict")
    # Files without a series UID are single, and equal UIDs of two patients are two series.
    series = "" if header.series == str(file) else f"{header.series} {header.patient}"
    slices = dicom.frames(file, headers, hu_windows, limits)
    return Upload([images.decode(data, None, ("PNG",)) for data in slices], series, header.modality)
