"""Limits of one file, which are checked before the step that they protect: a small file may decode to gigabytes.

The defaults admit X-rays of 6000 x 6000 pixels and CT volumes of 512 x 512 x 1500 voxels, and keep the memory of a
process below 2 GiB. Functions that read files take them as `limits`.
"""

import math
import re
import struct
from dataclasses import dataclass
from typing import ClassVar

BYTES_PER_PIXEL = 8  # of an uncompressed file, at most: four channels of 16 bits
MAX_AXIS = 32_767  # voxels along each axis of a volume, as in NIfTI-1
MAX_SCANS = 20  # per JPEG; a progressive one has about ten, each a pass over the image
MAX_SEGMENTS = 2_000  # per JPEG
SCAN, END = 0xDA, 0xD9
WITHOUT_SEGMENT = (0x01, 0xD8)
# A marker, except for the restart markers; \xff\x00 is a byte of the compressed data, and \xff\xff a fill byte.
MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
CODESTREAM = b"\xff\x4f\xff\x51"  # start of a JPEG 2000 image: SOC, then SIZ


class LimitError(ValueError):
    """A file that exceeds one of the limits, `reason`."""

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Limits:
    """Limits of one file."""

    pixels: int = 40_000_000  # of an image, or of one plane of a scan
    voxels: int = 400_000_000  # of a volume in memory
    bytes: int = BYTES_PER_PIXEL * 40_000_000  # of a file in memory, and of what it inflates to

    bytes_flag: ClassVar[str] = "--max_megapixels"

    def check_image(self, width: int, height: int) -> None:
        """Raises LimitError for an image with too many pixels."""
        _check("pixels", f"{width} x {height} pixels", width * height, self.pixels, "--max_megapixels")

    def check_volume(self, shape: tuple[int, ...]) -> None:
        """Raises LimitError for a volume with too many voxels in total or along one axis."""
        volume = f"{' x '.join(map(str, shape))} voxels"
        _check("voxels", volume, math.prod(shape), self.voxels, "--max_megavoxels")
        if max(shape) > MAX_AXIS:
            raise LimitError(f"{volume}; at most {MAX_AXIS} along an axis are accepted", "voxels")

    def check_bytes(self, count: int, what: str = "the file has") -> None:
        """Raises LimitError for too many bytes."""
        _check("bytes", f"{what} {count} bytes", count, self.bytes, self.bytes_flag)


DEFAULT = Limits()


def _check(reason: str, what: str, count: int, limit: int, flag: str) -> None:
    if count > limit:
        raise LimitError(f"{what}; at most {limit} are accepted, which {flag} raises", reason)


def jpeg_segments(data: bytes) -> tuple[list[tuple[int, int, int]], int]:
    """Returns (marker, start, end) of each segment before the first scan of a JPEG, and the start of that scan.

    Raises ValueError if it is not a JPEG, has no scan, or exceeds MAX_SEGMENTS or MAX_SCANS.
    """
    if data[:2] != b"\xff\xd8":
        raise ValueError("not a JPEG")
    segments: list[tuple[int, int, int]] = []
    scans, first, at = 0, 0, 2
    for _ in range(MAX_SEGMENTS):
        found = MARKER.search(data, at)
        if found is None or data[found.end() - 1] == END:
            break
        start, marker = found.start(), data[found.end() - 1]
        size = 0 if marker in WITHOUT_SEGMENT else int.from_bytes(data[start + 2 : start + 4], "big")
        at = start + 2 + size
        if marker == SCAN:
            scans, first = scans + 1, first or start
            if scans > MAX_SCANS:
                raise ValueError(f"the JPEG has more than {MAX_SCANS} scans")
        elif not scans:
            segments.append((marker, start, at))
    else:
        raise ValueError(f"the JPEG has more than {MAX_SEGMENTS} segments")
    if not scans:
        raise ValueError("a damaged or truncated JPEG")
    return segments, first


def check_jpeg2000(data: bytes, limits: Limits) -> None:
    """Checks image and tiles of every JPEG 2000 codestream in a file, whose sizes in the boxes around it may differ."""
    for found in re.finditer(re.escape(CODESTREAM), data):
        right, bottom, left, top, width, height = struct.unpack_from(">6I", data, found.start() + 8)
        limits.check_image(right - left, bottom - top)
        limits.check_image(min(width, right), min(height, bottom))
