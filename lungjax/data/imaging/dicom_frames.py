"""Checks the size of a compressed DICOM image before it is decoded, and limits that of an inflated file.

Decoders take the size from the stream, not from Rows and Columns, so a small file could make them allocate gigabytes.
"""

import io
import struct
import zlib
from typing import Any

from lungjax.data.imaging.limits import CODESTREAM, Limits, jpeg_segments
from lungjax.data.imaging.memory_file import LimitedReader

# Start-of-frame markers of JPEG (ITU T.81, table B.1) and, last, of JPEG-LS.
FRAMES = (0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF, 0xF7)
TAGS = ["Rows", "Columns", "NumberOfFrames", "ExtendedOffsetTable", "ExtendedOffsetTableLengths"]
DEFLATED = b"1.2.840.10008.1.2.1.99"
META_LENGTH = b"\x02\x00\x00\x00UL\x04\x00"  # start of the element
EXPLICIT_LITTLE_ENDIAN = b"\x02\x00\x10\x00UI\x14\x001.2.840.10008.1.2.1\x00"  # element
MAX_META_BYTES = 2**16


def inflated(file: LimitedReader, limits: Limits) -> LimitedReader:
    """Returns a deflated DICOM file uncompressed, so that no parser inflates it without a limit; other files unchanged.

    Raises LimitError, or ValueError for a damaged file.
    """
    # The file meta information, with the transfer syntax, starts with its length in an element of 12 bytes.
    head = file.read(144)
    meta = file.read(min(int.from_bytes(head[140:144], "little"), MAX_META_BYTES))
    if not head.startswith(META_LENGTH, 132) or DEFLATED not in meta:
        file.seek(0)
        return file
    unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
    content = unpacker.decompress(file.read(limits.bytes), limits.bytes + 1)
    limits.check_bytes(len(content), "a deflated DICOM file that inflates to at least")
    if not unpacker.eof:
        raise ValueError("a truncated deflated DICOM file")
    raw = io.BytesIO(b"\0" * 128 + b"DICM" + EXPLICIT_LITTLE_ENDIAN + content)
    return LimitedReader(raw, file.max_bytes, file.max_reads)


def check(data: Any, number: int = 0, file: Any = None) -> None:
    """Raises ValueError if a compressed frame of a pydicom data set differs in size from Rows and Columns.

    Uncompressed pixels pass, because pydicom itself checks their byte count. `file` is the position of the pixels in a
    file of which `data` is only the header.
    """
    syntax = data.file_meta.get("TransferSyntaxUID", None)
    if syntax is None or not syntax.is_compressed or syntax.is_deflated:
        return
    from pydicom.encaps import get_frame
    from pydicom.uid import RLELossless

    rows, columns = int(data.Rows), int(data.Columns)
    if file is not None:
        file.seek(12, 1)  # tag, VR and length of the element with the pixels
    offsets = [data.get(name, None) for name in ("ExtendedOffsetTable", "ExtendedOffsetTableLengths")]
    frame = get_frame(
        data.PixelData if file is None else file,
        number,
        number_of_frames=int(data.get("NumberOfFrames", 1) or 1),
        extended_offsets=tuple(offsets) if all(offsets) else None,
    )
    if syntax == RLELossless:
        _check_rle(frame, rows * columns)
    elif codestream_size(frame) != (rows, columns):
        raise ValueError("the size of the compressed image differs from Rows and Columns")


def codestream_size(data: bytes) -> tuple[int, int]:
    """Returns the rows and columns of a JPEG, JPEG-LS or JPEG 2000 stream. Raises ValueError if it states no size."""
    if data[:4] == CODESTREAM and len(data) >= 24:
        right, bottom, left, top = struct.unpack(">4I", data[8:24])
        return bottom - top, right - left
    for marker, start, end in jpeg_segments(data)[0]:
        if marker in FRAMES and end - start >= 9:
            return struct.unpack(">HH", data[start + 5 : start + 9])
    raise ValueError("the compressed image does not specify its size")


def _check_rle(frame: bytes, pixels: int) -> None:
    """Raises ValueError if a run-length encoded segment expands to more than one byte per pixel."""
    count = int.from_bytes(frame[:4], "little")
    if not 1 <= count <= 15 or len(frame) < 64:
        raise ValueError("damaged run-length coding")
    starts = struct.unpack(f"<{count}I", frame[4 : 4 + 4 * count])
    for start, end in zip(starts, (*starts[1:], len(frame)), strict=True):
        at, size = start, 0
        while at < min(end, len(frame)):
            head = frame[at]
            size += 257 - head if head > 128 else head + 1 if head < 128 else 0
            at += 2 if head > 128 else head + 2 if head < 128 else 1
            if size > pixels + 1:  # segments of odd length are padded by one byte
                raise ValueError("run-length encoded pixels exceed the image")
