"""Images from strangers: bytes in memory to pixels, with every limit checked before what it limits is done.

Allowed are the formats of `images.FORMATS` and, with the extra `dicom`, DICOM; the first bytes say which one a file is.
Sizes are read from the header, compressed parts are inflated up to a limit, and each file goes to the one decoder of
its kind. An animated PNG or WebP and a TIFF of several pages are refused: the first one need not be the one that was
meant. Nothing is written anywhere, and no message quotes what a DICOM file holds.
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
ALLOWED = f"allowed are {images.FORMAT_NAMES}, and DICOM; one image per file"
MAGIC = (
    (b"\x89PNG\r\n\x1a\n", "PNG"), (b"\xff\xd8\xff", "JPEG"), (b"II*\0", "TIFF"), (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"), (b"MM\0+", "TIFF"), (b"BM", "BMP"), (b"GIF87a", "GIF"), (b"GIF89a", "GIF"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG2000"), (b"\xff\x4f\xff\x51", "JPEG2000"),
)  # fmt: skip
STRANGERS = (
    (b"PK\x03\x04", "a ZIP archive"), (b"PK\x05\x06", "a ZIP archive"), (b"\x1f\x8b", "gzip data"),
    (b"%PDF", "a PDF document"), (b"%!PS", "a PostScript file"), (b"RIFF", "RIFF data that is no WebP image"),
    (b"7z\xbc\xaf", "a 7-Zip archive"), (b"Rar!", "a RAR archive"), (b"\xfd7zXZ", "xz data"), (b"BZh", "bzip2 data"),
    (b"\x7fELF", "a program"), (b"MZ", "a program"), (b"\x5c\x01\0\0", "a NIfTI volume"),
    (b"<", "a text file (HTML, XML or SVG)"),
)  # fmt: skip
TEXT_BYTES = MIB  # that text chunks and colour profile of a PNG may inflate to, together
CHUNKS = 50_000  # of a PNG
TAGS = 512  # of a TIFF
SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # a pixel, by a PNG's colour type
TIFF_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
TILES = {256: "width", 257: "height", 322: "width", 323: "height"}  # of the image, and of its tiles
DEFLATED = b"1.2.840.10008.1.2.1.99"
PLAIN = b"\x02\x00\x10\x00UI\x14\x001.2.840.10008.1.2.1\x00"  # the transfer syntax of uncompressed files, as an element


class UploadError(ValueError):
    """Why an upload is not answered. `status` is HTTP's, `reason` one word for statistics."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status, self.reason = status, reason


@dataclass(frozen=True)
class Limits:
    """What one file may be."""

    bytes: int = 64 * MIB
    pixels: int = 30_000_000
    side: int = 10_000  # pixels along height or width
    least: int = 8  # pixels along each


@dataclass(frozen=True, eq=False)
class Upload:
    """One decoded file."""

    pixels: np.ndarray  # uint8 or uint16, [H, W] or [H, W, 3]
    kind: str  # Pillow's name of the format, or DICOM
    series: str = ""  # SeriesInstanceUID and PatientID of a CT slice; to group by, never to be shown


def quiet() -> None:
    """Silences the loggers and warnings of the decoders: their messages quote values of the files.

    A level would not do: pydicom resets the level of its logger when it is first imported.
    """
    for name in ("PIL", "pydicom", "python_multipart"):
        logger = logging.getLogger(name)
        logger.disabled = True
        logger.propagate = False  # nor what child loggers pass up
        logger.handlers = [logging.NullHandler()]  # without a handler, Python prints warnings to stderr
    warnings.simplefilter("ignore")


def kind_of(data: bytes) -> str:
    """Returns Pillow's name of the format, or DICOM. Raises Refused for anything else, naming it where it is known."""
    if not data:
        raise UploadError(422, "empty", "an empty file")
    if data[128:132] == b"DICM":
        return "DICOM"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    for magic, kind in MAGIC:
        if data.startswith(magic):
            return kind
    start = data[:512].lstrip()
    found = next((what for magic, what in STRANGERS if start.startswith(magic)), "")
    if not found and all(byte >= 32 or byte in b"\t\n\r\f" for byte in start):
        found = "a text file"
    raise UploadError(415, "type", f"{found or 'no image that is known here'}; {ALLOWED}")


def read(
    data: bytes,
    limits: Limits,
    hu_windows: Windows = ((-600.0, 1500.0),),
    plane: str = "axial",
) -> Upload:
    """Decodes one file in memory.

    Args:
      data: the file.
      limits: of it.
      hu_windows: of CT slices, as for `dicom.picture`.
      plane: of the network's training images; CT slices of another one are refused.

    Raises Refused, and nothing else that a file could cause.
    """
    if len(data) > limits.bytes:
        raise UploadError(413, "bytes", f"a file of {len(data)} bytes; at most {limits.bytes} are taken")
    kind = kind_of(data)
    try:
        if kind == "DICOM":
            return _dicom(data, limits, hu_windows, plane)
        check = {"PNG": _png, "JPEG": _jpeg, "TIFF": _tiff, "BMP": _bmp, "JPEG2000": _jpeg2000}.get(kind)
        if check is not None:
            data = check(data, limits)
        with Image.open(io.BytesIO(data), formats=(kind,)) as opened:  # reads the header alone
            check_size(*opened.size, limits)
        return Upload(images.read(data, (kind,))[0], kind)
    except UploadError:
        raise
    except Image.DecompressionBombError:
        raise UploadError(413, "pixels", f"too many pixels; at most {limits.pixels} are taken") from None
    except ValueError as error:
        words = str(error) or "damaged"
        raise UploadError(422, "damaged", words if len(words) < 200 else f"{words[:200]} ...") from None
    except Exception:  # decoders raise what they like
        raise UploadError(422, "damaged", f"a damaged or truncated {kind} file") from None


def check_size(width: int, height: int, limits: Limits) -> None:
    """Raises Refused for an image of that many pixels along each side."""
    if width > limits.side or height > limits.side:
        raise UploadError(413, "side", f"{width} x {height} pixels; at most {limits.side} are taken along a side")
    if width * height > limits.pixels:
        raise UploadError(413, "pixels", f"{width} x {height} pixels; at most {limits.pixels} in all are taken")
    if min(width, height) < limits.least:
        raise UploadError(
            422, "small", f"{width} x {height} pixels; at least {limits.least} along each side are needed"
        )


def _png(data: bytes, limits: Limits) -> bytes:
    if len(data) < 33 or data[12:16] != b"IHDR":
        raise UploadError(422, "damaged", "a damaged or truncated PNG file")
    width, height, bits, color = struct.unpack(">IIBB", data[16:26])
    check_size(width, height, limits)
    at, texts, stored = 8, 0, 0
    for _ in range(CHUNKS):
        if at + 8 > len(data):
            break
        size, name = struct.unpack(">I4s", data[at : at + 8])
        if name == b"acTL":
            raise UploadError(422, "frames", "an animated PNG: save one frame as a file of its own")
        if name in (b"zTXt", b"iTXt", b"iCCP"):
            texts += _inflated(data[at + 8 : at + 8 + size])
            if texts > TEXT_BYTES:
                raise UploadError(
                    413, "bomb", f"text or colour profile of a PNG that inflate to more than {TEXT_BYTES} bytes"
                )
        stored += size if name == b"IDAT" else 0
        at += 12 + size
    else:
        raise UploadError(422, "damaged", f"a PNG of more than {CHUNKS} chunks")
    raw = height * (width * bits * SAMPLES.get(color, 4) // 8 + 2)
    if stored > 1.1 * raw + MIB:
        raise UploadError(422, "bomb", "a PNG with far more data than its pixels need")
    return data


def _inflated(chunk: bytes) -> int:
    """Returns how many bytes a PNG's text chunk or colour profile inflates to, up to just above TEXT_BYTES."""
    start = chunk.find(b"\0") + 1  # after its keyword
    most = 0
    # iTXt has a flag, a method and two more words before its text; the others a method alone.
    for at in {start + 1, chunk.find(b"\0", chunk.find(b"\0", start + 2) + 1) + 1}:
        try:
            most = max(most, len(zlib.decompressobj().decompress(chunk[at:], TEXT_BYTES + 1)))
        except zlib.error:  # it is not there, or not compressed
            continue
    return most


def _jpeg(data: bytes, limits: Limits) -> bytes:
    """Returns a JPEG without the segments that do not affect its pixels: Exif, profiles, further pictures, comments."""
    segments, scan = dicom_frames.jpeg_segments(data)
    kept = [b"\xff\xd8"]
    for marker, start, end in segments:
        if marker in dicom_frames.FRAMES:
            height, width = struct.unpack(">HH", data[start + 5 : start + 9])
            check_size(width, height, limits)
        if not (0xE0 < marker <= 0xEF and marker != 0xEE) and marker != 0xFE:  # APP14 says what the colours are
            kept.append(data[start:end])
    return b"".join([*kept, data[scan:]])


def _tiff(data: bytes, limits: Limits) -> bytes:
    """Checks the first directory of a TIFF: sizes of image and tiles, bytes of its tags, and that no other follows."""
    order = "<" if data[:2] == b"II" else ">"
    big = data[2:4] in (b"+\0", b"\0+")
    number, entry, place = ("Q", "HHQ", "Q") if big else ("H", "HHI", "I")
    try:
        (at,) = struct.unpack_from(f"{order}{place}", data, 8 if big else 4)
        (count,) = struct.unpack_from(order + number, data, at)
        if count > TAGS:
            raise UploadError(422, "damaged", f"a TIFF of more than {TAGS} tags")
        at += struct.calcsize(f"={number}")
        sides: dict[int, int] = {}
        total, wide = 0, struct.calcsize(f"={entry}")
        room = struct.calcsize(f"={place}")
        for _ in range(count):
            tag, form, values = struct.unpack_from(order + entry, data, at)
            size = values * TIFF_BYTES.get(form, 1)
            total += size if size > room else 0
            if tag in TILES and form in (3, 4, 16):
                (side,) = struct.unpack_from(order + {3: "H", 4: "I", 16: "Q"}[form], data, at + wide)
                sides[tag] = max(side, sides.get(tag, 0))
            at += wide + room
        (following,) = struct.unpack_from(f"{order}{place}", data, at)
    except struct.error:
        raise UploadError(422, "damaged", "a damaged or truncated TIFF file") from None
    check_size(sides.get(256, 0), sides.get(257, 0), limits)
    if 322 in sides or 323 in sides:  # a tile is held whole, however small the image
        check_size(max(sides.get(322, 0), limits.least), max(sides.get(323, 0), limits.least), limits)
    if total > len(data):
        raise UploadError(422, "bomb", "a TIFF whose tags are larger than the file")
    if following:
        raise UploadError(422, "frames", "several pages in one TIFF: save one image per file")
    return data


def _bmp(data: bytes, limits: Limits) -> bytes:
    if len(data) < 54:
        raise UploadError(422, "damaged", "a damaged or truncated BMP file")
    if int.from_bytes(data[14:18], "little") >= 40:
        width, height, _, _, packed = struct.unpack("<iiHHI", data[18:34])
        check_size(abs(width), abs(height), limits)
        if packed in (1, 2):
            raise UploadError(422, "damaged", "a BMP with run lengths: save it as PNG")
    return data


def _jpeg2000(data: bytes, limits: Limits) -> bytes:
    """Checks the size of image and tiles in the codestream, which decoders follow, whatever the boxes around it say."""
    start = data.find(b"\xff\x4f\xff\x51")
    if start < 0 or len(data) < start + 40:
        raise UploadError(422, "damaged", "a damaged or truncated JPEG 2000 file")
    right, bottom, left, top, wide, high = struct.unpack(">6I", data[start + 8 : start + 32])
    check_size(right - left, bottom - top, limits)
    check_size(max(min(wide, right), limits.least), max(min(high, bottom), limits.least), limits)
    return data


def _dicom(data: bytes, limits: Limits, hu_windows: Windows, plane: str) -> Upload:
    try:
        volumes.need("pydicom", "DICOM files")
    except ValueError as error:
        raise UploadError(415, "type", f"this service reads no DICOM: {error}") from None
    file = MemoryFile("file", _not_deflated(data, limits) if DEFLATED in data else data)
    try:
        header = dicom.header(file)
        if header.aside:
            raise UploadError(422, "aside", f"shows nothing of the patient ({header.aside})")
        check_size(header.size[1], header.size[0], limits)
        if header.modality in dicom.XRAYS:
            return Upload(images.decode(dicom.xray(file), None, ("PNG",)), "DICOM")
        own = dicom.series([header]).plane
        if header.orientation is not None and own != plane:
            words = f"a slice in the {own} plane, and this model is for the {plane} one"
            raise UploadError(422, "plane", f"{words}: lungjax.predict cuts it from a series")
        # Files without a series stand alone, and the same series of two patients is two.
        series = "" if header.series == str(file) else f"{header.series} {header.patient}"
        return Upload(images.decode(dicom.picture(file, hu_windows), None, ("PNG",)), "DICOM", series)
    except dicom.Unreadable as error:
        raise UploadError(422, "damaged", str(error).removeprefix("file: ").strip()) from None
    except UploadError:
        raise
    except Exception:  # whose words may be the file's own
        raise UploadError(422, "damaged", "a damaged DICOM file") from None


def _not_deflated(data: bytes, limits: Limits) -> bytes:
    """Returns a DICOM file whose elements were deflated as one that is not, so that no parser inflates it unlimited."""
    at, syntax = 132, b""
    while data[at : at + 2] == b"\x02\x00" and at + 12 <= len(data):  # group 2: who wrote it, and how
        long = data[at + 4 : at + 6] in (b"OB", b"OW", b"SQ", b"UN", b"UT", b"UC", b"UR", b"OF", b"OD", b"OL")
        size = int.from_bytes(data[at + 8 : at + 12] if long else data[at + 6 : at + 8], "little")
        start = at + (12 if long else 8)
        if data[at + 2 : at + 4] == b"\x10\x00":
            syntax = data[start : start + size].rstrip(b"\0 ")
        at = start + size
    if syntax != DEFLATED:
        raise UploadError(422, "damaged", "a DICOM file that is deflated, or not, in a way that can't be told")
    unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        content = unpacker.decompress(memoryview(data)[at:], limits.bytes + 1)
    except zlib.error:
        raise UploadError(422, "damaged", "a damaged deflated DICOM file") from None
    if len(content) > limits.bytes:
        raise UploadError(413, "bomb", f"a deflated DICOM file that inflates to more than {limits.bytes} bytes")
    if not unpacker.eof:
        raise UploadError(422, "damaged", "a truncated deflated DICOM file")
    return b"\0" * 128 + b"DICM" + PLAIN + content
