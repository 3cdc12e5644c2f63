"""Checks the size of a compressed DICOM image before it is decoded.

Decoders take the size from the stream, not from Rows and Columns, so a small file could make them allocate gigabytes.
"""

import struct
from typing import Any

MAX_SCANS = 100  # per JPEG; a progressive one has about ten, each a pass over the image
MAX_SEGMENTS = 2_000  # per JPEG, before its first scan
# Start-of-frame markers of JPEG (ITU T.81, table B.1) and, last, of JPEG-LS.
FRAMES = (0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF, 0xF7)
SCAN = 0xDA
WITHOUT_SEGMENT = (0x01, 0xD8, *range(0xD0, 0xD8))


def check(data: Any, number: int = 0) -> None:
    """Raises ValueError if a compressed frame of a pydicom data set differs in size from Rows and Columns.

    Uncompressed pixels pass, because pydicom itself checks their byte count.
    """
    syntax = data.file_meta.get("TransferSyntaxUID", None)
    if syntax is None or not syntax.is_compressed or syntax.is_deflated:
        return
    from pydicom.encaps import get_frame
    from pydicom.uid import RLELossless

    rows, columns = int(data.Rows), int(data.Columns)
    frame = get_frame(data.PixelData, number, number_of_frames=int(data.get("NumberOfFrames", 1) or 1))
    if syntax == RLELossless:
        _check_rle(frame, rows * columns)
    elif codestream_size(frame) != (rows, columns):
        raise ValueError("the size of the compressed image differs from Rows and Columns")


def codestream_size(data: bytes) -> tuple[int, int]:
    """Returns the rows and columns of a JPEG, JPEG-LS or JPEG 2000 stream. Raises ValueError if it states no size."""
    if data[:4] == b"\xff\x4f\xff\x51" and len(data) >= 24:  # JPEG 2000: SOC, then SIZ
        right, bottom, left, top = struct.unpack(">4I", data[8:24])
        return bottom - top, right - left
    for marker, start, end in jpeg_segments(data)[0]:
        if marker in FRAMES and end - start >= 9:
            return struct.unpack(">HH", data[start + 5 : start + 9])
    raise ValueError("the compressed image does not specify its size")


def jpeg_segments(data: bytes) -> tuple[list[tuple[int, int, int]], int]:
    """Returns (marker, start, end) of each segment before the first scan of a JPEG, and the start of that scan.

    Raises ValueError if it is not a JPEG, is damaged, or exceeds MAX_SEGMENTS or MAX_SCANS.
    """
    if data[:2] != b"\xff\xd8":
        raise ValueError("not a JPEG")
    segments: list[tuple[int, int, int]] = []
    at = 2
    while len(segments) <= MAX_SEGMENTS:
        while data[at : at + 2] == b"\xff\xff":  # fill bytes
            at += 1
        if len(data) < at + 4 or data[at] != 0xFF:
            raise ValueError("a damaged or truncated JPEG")
        marker = data[at + 1]
        if marker == SCAN:
            if data.count(b"\xff\xda", at) > MAX_SCANS:
                raise ValueError(f"the JPEG has more than {MAX_SCANS} scans")
            return segments, at
        size = 0 if marker in WITHOUT_SEGMENT else int.from_bytes(data[at + 2 : at + 4], "big")
        segments.append((marker, at, at + 2 + size))
        at += 2 + size
    raise ValueError(f"the JPEG has more than {MAX_SEGMENTS} segments")


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
