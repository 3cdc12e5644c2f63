"""Whether the compressed picture inside a DICOM file is as large as the file says, looked at before it is decoded.

Rows and Columns are one statement, the compressed stream has another, and decoders follow the stream: a few kilobytes
may ask for gigabytes.
"""

import struct
from typing import Any

SCANS = 100  # of one JPEG; a progressive one has about ten, and each goes over the whole picture
SEGMENTS = 2_000  # of one JPEG before its first scan
# Start-of-frame markers of JPEG (ITU T.81, table B.1) and, the last, JPEG-LS.
FRAMES = (0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF, 0xF7)
SCAN = 0xDA
ALONE = (0x01, 0xD8, *range(0xD0, 0xD8))  # markers without a segment


def check(data: Any) -> None:
    """Raises ValueError if the compressed pixels of a pydicom data set are larger than its Rows and Columns say.

    Uncompressed pixels pass: pydicom compares their number of bytes.
    """
    syntax = data.file_meta.get("TransferSyntaxUID", None)
    if syntax is None or not syntax.is_compressed or syntax.is_deflated:
        return
    from pydicom.encaps import generate_frames
    from pydicom.uid import RLELossless

    rows, columns = int(data.Rows), int(data.Columns)
    frame = next(generate_frames(data.PixelData, number_of_frames=1))
    if syntax == RLELossless:
        _check_rle(frame, rows * columns)
        return
    found = codestream_size(frame)
    if found != (rows, columns):
        raise ValueError("its compressed picture has another size than Rows and Columns")


def codestream_size(data: bytes) -> tuple[int, int]:
    """Returns rows and columns of a JPEG, JPEG-LS or JPEG 2000 stream. Raises ValueError where they can't be found."""
    if data[:4] == b"\xff\x4f\xff\x51" and len(data) >= 24:  # JPEG 2000: SOC, then SIZ
        right, bottom, left, top = struct.unpack(">4I", data[8:24])
        return bottom - top, right - left
    found, _ = jpeg_segments(data)
    for marker, start, end in found:
        if marker in FRAMES and end - start >= 9:
            return struct.unpack(">HH", data[start + 5 : start + 9])
    raise ValueError("a compressed picture without a size")


def jpeg_segments(data: bytes) -> tuple[list[tuple[int, int, int]], int]:
    """Returns marker, start and end of each segment before the first scan of a JPEG, and where that scan starts.

    Raises ValueError for what is no JPEG, more than SEGMENTS segments, or more than SCANS scans.
    """
    if data[:2] != b"\xff\xd8":
        raise ValueError("no JPEG")
    found: list[tuple[int, int, int]] = []
    at = 2
    while len(found) <= SEGMENTS:
        while data[at : at + 2] == b"\xff\xff":  # fill bytes
            at += 1
        if len(data) < at + 4 or data[at] != 0xFF:
            raise ValueError("a damaged or truncated JPEG")
        marker = data[at + 1]
        if marker == SCAN:
            if data.count(b"\xff\xda", at) > SCANS:
                raise ValueError(f"a JPEG of more than {SCANS} scans")
            return found, at
        size = 0 if marker in ALONE else int.from_bytes(data[at + 2 : at + 4], "big")
        found.append((marker, at, at + 2 + size))
        at += 2 + size
    raise ValueError(f"a JPEG of more than {SEGMENTS} segments")


def _check_rle(frame: bytes, pixels: int) -> None:
    """Raises ValueError if a segment of run-length coded bytes holds more than one byte for each pixel.

    Two bytes may stand for 128. Counting is as slow as decoding, and stops where a segment is full.
    """
    count = int.from_bytes(frame[:4], "little")
    if not 1 <= count <= 15 or len(frame) < 64:
        raise ValueError("damaged run lengths")
    starts = struct.unpack(f"<{count}I", frame[4 : 4 + 4 * count])
    for start, end in zip(starts, (*starts[1:], len(frame)), strict=True):
        at, made = start, 0
        while at < min(end, len(frame)):
            head = frame[at]
            made += 257 - head if head > 128 else head + 1 if head < 128 else 0
            at += 2 if head > 128 else head + 2 if head < 128 else 1
            if made > pixels + 1:  # a segment of odd length is filled up by one
                raise ValueError("run lengths that are longer than the picture")
