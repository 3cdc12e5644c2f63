"""Decodes untrusted images in memory, checking every limit before the step that it protects.

The formats of `images.FORMATS` and, with the `dicom` extra, DICOM are accepted and recognized by their first bytes.
Sizes are read from the header, and each file goes only to the decoder for its format; Pillow limits the text and
profiles that it inflates. Animated PNG and WebP and multi-page TIFF are rejected, since the first frame may not be the
intended one. Nothing is written to disk, and no message quotes the content of a DICOM file.
"""

import io
import logging
import struct
import warnings
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image

from lungjax.data.imaging import dicom, dicom_frames, images, volumes
from lungjax.data.imaging.memory_file import MemoryFile
from lungjax.data.imaging.volumes import Windows

MIB = 2**20
ALLOWED = f"expected one image per file; supported formats: {images.FORMAT_NAMES}, and DICOM"
MAGIC = (
    (b"\x89PNG\r\n\x1a\n", "PNG"), (b"\xff\xd8\xff", "JPEG"), (b"II*\0", "TIFF"), (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"), (b"MM\0+", "TIFF"), (b"BM", "BMP"), (b"GIF87a", "GIF"), (b"GIF89a", "GIF"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG2000"), (b"\xff\x4f\xff\x51", "JPEG2000"),
)  # fmt: skip
DEFLATED = b"1.2.840.10008.1.2.1.99"
META_LENGTH = b"\x02\x00\x00\x00UL\x04\x00"  # start of the element
EXPLICIT_LITTLE_ENDIAN = b"\x02\x00\x10\x00UI\x14\x001.2.840.10008.1.2.1\x00"  # element


class UploadError(ValueError):
    """A rejected upload; `status` is the HTTP status, `reason` is one word for the metrics."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status, self.reason = status, reason


@dataclass(frozen=True)
class Limits:
    """Limits of one file."""

    bytes: int = 64 * MIB
    pixels: int = 30_000_000
    side: int = 10_000  # pixels along each side, at most
    min_side: int = 8  # and at least
    frames: int = 256  # of a multi-frame DICOM file


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
    if len(data) > limits.bytes:
        raise UploadError(413, "bytes", f"the file has {len(data)} bytes; at most {limits.bytes} are accepted")
    kind = kind_of(data)
    try:
        if kind == "DICOM":
            return _dicom(data, limits, hu_windows, plane)
        if kind == "JPEG":
            data = _jpeg(data, limits)
        if kind == "JPEG2000":
            _check_jpeg2000(data, limits)
        _check_header(data, kind, limits)
        return Upload([images.read(data, (kind,))[0]])
    except UploadError:
        raise
    except Image.DecompressionBombError:
        raise UploadError(413, "pixels", f"too many pixels; at most {limits.pixels} are accepted") from None
    except ValueError as error:
        words = str(error) or "damaged"
        raise UploadError(422, "damaged", words if len(words) < 200 else f"{words[:200]} ...") from None
    except Exception:  # decoders raise anything
        raise UploadError(422, "damaged", f"a damaged or truncated {kind} file") from None


def check_size(width: int, height: int, limits: Limits) -> None:
    """Raises UploadError for an image that is too large or too small."""
    if width > limits.side or height > limits.side:
        raise UploadError(413, "side", f"{width} x {height} pixels; at most {limits.side} per side are accepted")
    if width * height > limits.pixels:
        raise UploadError(413, "pixels", f"{width} x {height} pixels; at most {limits.pixels} in total are accepted")
    if min(width, height) < limits.min_side:
        raise UploadError(422, "small", f"{width} x {height} pixels; at least {limits.min_side} per side are required")


def _check_header(data: bytes, kind: str, limits: Limits) -> None:
    """Checks the number of pages and the sizes of the image and its tiles, for which Pillow reads only the header."""
    with Image.open(io.BytesIO(data), formats=(kind,)) as image:
        check_size(*image.size, limits)
        if kind != "GIF" and getattr(image, "is_animated", False):
            raise UploadError(422, "frames", f"several pages or frames in one {kind}; save one image per file")
        if kind == "TIFF":  # Pillow decodes complete tiles, even of a small image
            tags = image.tag_v2  # type: ignore[attr-defined]
            check_size(tags.get(322, limits.min_side), tags.get(323, limits.min_side), limits)


def _jpeg(data: bytes, limits: Limits) -> bytes:
    """Returns a JPEG without segments that do not affect its pixels; of Exif, only the orientation remains."""
    segments, scan = dicom_frames.jpeg_segments(data)
    parts = [b"\xff\xd8"]
    for marker, start, end in segments:
        if marker in dicom_frames.FRAMES:
            height, width = struct.unpack(">HH", data[start + 5 : start + 9])
            check_size(width, height, limits)
        if marker == 0xE1 and (turn := images.orientation(data[start + 4 : end])) in images.TURNS:
            exif = Image.Exif()
            exif[images.ORIENTATION] = turn
            parts.append(b"\xff\xe1" + struct.pack(">H", len(exif.tobytes()) + 2) + exif.tobytes())
        if not (0xE0 < marker <= 0xEF and marker != 0xEE) and marker != 0xFE:  # APP14 has the color transform
            parts.append(data[start:end])
    return b"".join([*parts, data[scan:]])


def _check_jpeg2000(data: bytes, limits: Limits) -> None:
    """Checks the sizes of the image and its tiles in the codestream; decoders ignore those in the boxes around it."""
    start = data.find(b"\xff\x4f\xff\x51")
    if start < 0 or len(data) < start + 40:
        raise UploadError(422, "damaged", "a damaged or truncated JPEG 2000 file")
    right, bottom, left, top, wide, high = struct.unpack(">6I", data[start + 8 : start + 32])
    check_size(right - left, bottom - top, limits)
    check_size(max(min(wide, right), limits.min_side), max(min(high, bottom), limits.min_side), limits)


def _dicom(data: bytes, limits: Limits, hu_windows: Windows, plane: str) -> Upload:
    try:
        volumes.need("pydicom", "DICOM files")
    except ValueError as error:
        raise UploadError(415, "type", f"this service does not read DICOM: {error}") from None
    file = MemoryFile("file", _inflated_dicom(data, limits) if DEFLATED in data else data)
    try:
        frames = dicom.headers(file)
        headers = [header for header in frames if not header.aside]
        if not headers:
            raise UploadError(422, "aside", f"no image of the patient ({frames[0].aside})")
        header, (height, width) = headers[0], headers[0].size
        check_size(width, height, limits)
        if len(frames) > limits.frames or len(frames) * width * height > limits.pixels:
            allowed = f"at most {limits.frames} with {limits.pixels} pixels in total are accepted"
            raise UploadError(413, "frames", f"{len(frames)} frames of {width} x {height} pixels; {allowed}")
        if header.modality in dicom.XRAYS:
            return Upload([images.decode(dicom.xray(file), None, ("PNG",))], modality=header.modality)
        own = dicom.series(headers).plane
        if header.orientation is not None and own != plane:
            raise UploadError(422, "plane", f"the slice is {own}, but the model is for {plane}; use lungjax.predict")
        # Files without a series UID are single, and equal UIDs of two patients are two series.
        series = "" if header.series == str(file) else f"{header.series} {header.patient}"
        slices = dicom.frames(file, headers, hu_windows)
        return Upload([images.decode(data, None, ("PNG",)) for data in slices], series, header.modality)
    except dicom.Unreadable as error:
        raise UploadError(422, "damaged", str(error).removeprefix("file: ").strip()) from None
    except UploadError:
        raise
    except Exception:  # the message may quote the file
        raise UploadError(422, "damaged", "a damaged DICOM file") from None


def _inflated_dicom(data: bytes, limits: Limits) -> bytes:
    """Returns a deflated DICOM file uncompressed, so that no parser inflates it without a limit."""
    # The file meta information, with the transfer syntax, starts with its length in an element of 12 bytes.
    end = 144 + int.from_bytes(data[140:144], "little")
    if not data.startswith(META_LENGTH, 132) or DEFLATED not in data[144:end]:
        raise UploadError(422, "damaged", "a DICOM file with an unknown transfer syntax")
    unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        content = unpacker.decompress(memoryview(data)[end:], limits.bytes + 1)
    except zlib.error:
        raise UploadError(422, "damaged", "a damaged deflated DICOM file") from None
    if len(content) > limits.bytes:
        raise UploadError(413, "bomb", f"a deflated DICOM file that inflates to more than {limits.bytes} bytes")
    if not unpacker.eof:
        raise UploadError(422, "damaged", "a truncated deflated DICOM file")
    return b"\0" * 128 + b"DICM" + EXPLICIT_LITTLE_ENDIAN + content
