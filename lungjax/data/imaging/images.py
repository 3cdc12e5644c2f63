"""Turns image files into network input: decode, window, crop, resize.

8-bit images become uint8. Gray images with more bits become uint16 and require a window, which maps them to float32 in
0..255; values are rounded only after resizing. Other modes become gray or RGB as with Pillow's `convert`, which Keras
and torchvision use, so transparency is ignored, and 16-bit color loses its low byte; a gray palette becomes gray.
Images are turned upright according to their EXIF orientation; boxes refer to the upright image.
"""

import hashlib
import io
import math
import struct
import warnings
import zlib
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lungjax.config import CROPS, INTERPOLATIONS, InputSpec, nearest
from lungjax.data.folder_walk import check_regular
from lungjax.data.imaging import limits as file_limits
from lungjax.data.imaging.limits import LimitError, Limits

Region = tuple[float, float, float, float]  # left, top, right, bottom in pixels; right and bottom exclusive

SIGNATURE = b"\x89PNG\r\n\x1a\n"
# File suffixes, and Pillow's names of the formats. Its other plugins are disabled, because some run programs on a file
# regardless of its suffix (EPS runs Ghostscript).
FORMATS = {
    ".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".mpo": "JPEG", ".tif": "TIFF", ".tiff": "TIFF", ".bmp": "BMP",
    ".gif": "GIF", ".webp": "WEBP", ".jp2": "JPEG2000", ".j2k": "JPEG2000",
}  # fmt: skip
SUFFIXES = tuple(FORMATS)
FORMAT_NAMES = "PNG, JPEG, TIFF, BMP, GIF (first frame), WebP and JPEG 2000"
FIRST_FRAME = ("GIF", "MPO")  # other multi-page files are an error; an MPO is a JPEG with further images
INTEGERS = ("I", "F", "I;16", "I;16L", "I;16B")  # Pillow's modes that are read as 16-bit gray
LOSSLESS = ("1", "L", "P", "RGB", "RGBX", *INTEGERS)
MODES = (*LOSSLESS, "LA", "La", "PA", "RGBA", "RGBa", "CMYK", "YCbCr")
ORIENTATION = 0x0112  # EXIF tag, and the transposition that turns each of its values upright
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
RADIUS = {"bilinear": 1, "bicubic": 2, "lanczos": 3}  # of the kernels, in source pixels

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # `Limits` are stricter


def digest(array: np.ndarray) -> str:
    """Returns a hex digest of decoded pixels; equal for exact copies, even across file formats."""
    gray = array[..., 0] if array.ndim == 3 and (array == array[..., :1]).all() else array
    blake = hashlib.blake2b(f"{gray.shape}{gray.dtype}".encode(), digest_size=10)
    blake.update(np.ascontiguousarray(gray).data)
    return blake.hexdigest()


def encode(array: np.ndarray) -> bytes:
    """Returns uint8 [H, W] or [H, W, 3], or uint16 [H, W], as a PNG without filters or compression.

    array_record compresses records anyway, and `read` takes only a tenth of the time.
    """
    samples = np.ascontiguousarray(array, ">u2" if array.dtype == np.uint16 else np.uint8)
    height, width = array.shape[:2]
    rows = samples.view(np.uint8).reshape(height, -1)
    lines = np.pad(rows, ((0, 0), (1, 0)))  # each row starts with its filter, 0 for none
    header = struct.pack(">IIBBBBB", width, height, 8 * samples.itemsize, 2 if array.ndim == 3 else 0, 0, 0, 0)
    data = SIGNATURE
    for name, part in ((b"IHDR", header), (b"IDAT", zlib.compress(lines.data, 0)), (b"IEND", b"")):
        data += struct.pack(">I", len(part)) + name + part + struct.pack(">I", zlib.crc32(name + part))
    return data


def _decode_own(data: bytes) -> np.ndarray | None:
    """Returns the pixels of a file from `encode`; None for any other or damaged file.

    Pillow takes twice as long, mostly in Python code that blocks other threads. zlib verifies the pixels' checksum.
    """
    if not data.startswith(SIGNATURE) or data[37:41] != b"IDAT" or data[41:43] != b"\x78\x01" or data[-8:-4] != b"IEND":
        return None
    width, height, bits, kind, *rest = struct.unpack(">IIBBBBB", data[16:29])
    if (bits, kind) not in ((8, 0), (8, 2), (16, 0)) or any(rest):
        return None
    row = 1 + width * (bits // 8) * (3 if kind == 2 else 1)
    if not 0 < height * row < len(data):  # compressed, or truncated
        return None
    try:
        decompressor = zlib.decompressobj()
        raw = decompressor.decompress(memoryview(data)[41:-16], height * row + 1)
    except zlib.error:
        return None
    if not decompressor.eof or len(raw) != height * row or any(raw[::row]):
        return None
    rows = np.frombuffer(raw, np.uint8).reshape(height, row)[:, 1:]
    if bits == 16:
        return np.ascontiguousarray(rows).view(">u2").astype(np.uint16)
    return rows.reshape(height, width, 3) if kind == 2 else rows


def gray(array: np.ndarray) -> np.ndarray:
    """Returns an image as uint8 [H, W]: the luminance of colors; other types are scaled to 0..255."""
    if array.ndim == 3:
        array = np.asarray(Image.fromarray(array).convert("L"))
    if array.dtype == np.uint8:
        return array
    low, high = np.percentile(array, (0.5, 99.5))
    return np.rint(np.clip((array - low) * (255.0 / max(high - low, 1.0)), 0, 255)).astype(np.uint8)


def decode(data: bytes, window: tuple[float, float] | None, formats: tuple[str, ...] | None = None) -> np.ndarray:
    """Returns an encoded image as [H, W] (gray) or [H, W, 3] (RGB), uint8, or float32 in 0..255 for 16 bits.

    `window` holds the 16-bit values that become 0 and 255. `formats` lists the formats to try by Pillow's names, by
    default all of FORMATS. The size is not limited; for files of unknown origin, see `read`. Raises ValueError for an
    unreadable image, and for 16 bits without a window.
    """
    return np.asarray(load(data, window, formats))


def load(
    data: bytes, window: tuple[float, float] | None, formats: tuple[str, ...] | None = None
) -> np.ndarray | Image.Image:
    """Like `decode`, but returns gray 8-bit files as Pillow images, which saves two copies in `to_input`."""
    image, _ = _open(data, formats, None)
    if isinstance(image, Image.Image) or image.dtype == np.uint8:
        return image
    if window is None:
        raise ValueError("a 16-bit image, but the data set has no window; prepare it with --window=low,high")
    return show(image, window)


def extent(image: np.ndarray | Image.Image) -> tuple[int, int]:
    """Returns width and height."""
    return image.size if isinstance(image, Image.Image) else (image.shape[1], image.shape[0])


def full_region(image: np.ndarray | Image.Image) -> Region:
    """Returns the region of the complete image."""
    width, height = extent(image)
    return 0.0, 0.0, float(width), float(height)


def bounding_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Returns the box of a nonempty mask: xmin, ymin, xmax, ymax in pixels, max exclusive."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def rotate(image: np.ndarray | Image.Image, box: Region | np.ndarray) -> tuple[np.ndarray, Region]:
    """Returns an image and its box (xmin, ymin, xmax, ymax in pixels) rotated by 180 degrees."""
    width, height = extent(image)
    return np.asarray(image)[::-1, ::-1], (width - box[2], height - box[3], width - box[0], height - box[1])


def show(array: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """Returns 16-bit values as float32 in 0..255; the two values of `window` become 0 and 255."""
    low, high = window
    return np.clip((array.astype(np.float32) - low) * np.float32(255.0 / (high - low)), 0.0, 255.0)


def to_input(image: np.ndarray | Image.Image, box: np.ndarray, spec: InputSpec, margin: float) -> np.ndarray:
    """Returns `image` cropped and resized for a network, uint8 [height, width, channels].

    `image` is [H, W] or [H, W, 3], uint8, or float32 in 0..255; or a result of `load`. `box`, used if spec.crop is
    "box", is xmin, ymin, xmax, ymax in pixels, max exclusive. `margin`, a fraction of the sides of the crop, is added
    on each edge and clipped to the image. Raises ValueError for an empty box or an unknown crop or interpolation.
    """
    if spec.crop not in CROPS:
        raise ValueError(f"input.crop={spec.crop!r}: expected {', '.join(CROPS)}")
    if spec.interpolation not in INTERPOLATIONS:
        raise ValueError(f"input.interpolation={spec.interpolation!r}; {nearest(spec.interpolation, INTERPOLATIONS)}")
    if spec.channels == 1 and isinstance(image, np.ndarray) and image.ndim == 3:
        image = gray(image)
    width, height = extent(image)
    region = view(box, spec, margin, width, height)
    if region == full_region(image) and (height, width) == tuple(spec.size):
        resized = np.asarray(image)
    else:
        resized = resize(image, region, spec.size, spec.interpolation, spec.antialias)
    if resized.dtype != np.uint8:
        resized = np.clip(np.rint(resized), 0, 255).astype(np.uint8)
    if resized.ndim == 2:
        resized = resized[..., None] if spec.channels == 1 else np.repeat(resized[..., None], spec.channels, axis=-1)
    return resized


def view(box: Sequence[float] | np.ndarray, spec: InputSpec, margin: float, width: int, height: int) -> Region:
    """Returns the region of a width x height image that `to_input` shows.

    Odd remainders of a center crop are halved as in torchvision's CenterCrop, rounded to even. Raises ValueError for an
    empty box or window.
    """
    if spec.crop == "none":
        return 0.0, 0.0, float(width), float(height)
    left, top, right, bottom = (float(v) for v in box)
    if spec.crop == "center":
        if min(spec.crop_size) < 1:
            raise ValueError(f"input.crop_size={spec.crop_size}: input.crop=center needs a positive height and width")
        rows, columns = min(spec.crop_size[0], height), min(spec.crop_size[1], width)
        top, left = float(round((height - rows) / 2)), float(round((width - columns) / 2))
        right, bottom = left + columns, top + rows
    dx, dy = margin * (right - left), margin * (bottom - top)
    x0, y0, x1, y1 = max(left - dx, 0.0), max(top - dy, 0.0), min(right + dx, width), min(bottom + dy, height)
    if x1 - x0 < 1 or y1 - y0 < 1:
        raise ValueError(f"box {left:g} {top:g} {right:g} {bottom:g} contains no pixel of the {width} x {height} image")
    return x0, y0, float(x1), float(y1)


def resize(
    image: np.ndarray | Image.Image, region: Region, size: tuple[int, int], kernel: str, antialias: bool
) -> np.ndarray:
    """Returns `region` of `image` resized to `size` (height, width).

    With `antialias` the kernel widens when shrinking (Pillow's resampling within the region). Without it, the plain
    kernel is sampled at each output's center, with the region's edge repeated, as in TensorFlow and torch with
    antialias=False. bicubic is Keys' kernel with a = -0.5 (torch uses -0.75); lanczos has 3 lobes. "nearest" takes the
    pixel under the output's center in both cases.
    """
    left, top, right, bottom = region
    if antialias and kernel != "nearest":
        picture = image if isinstance(image, Image.Image) else Image.fromarray(np.ascontiguousarray(image))
        edges = (int(left), int(top), math.ceil(right), math.ceil(bottom))
        # With Pillow's box argument alone, the kernel would read beyond the region.
        cropped = picture if edges == (0, 0, *picture.size) else picture.crop(edges)
        inside = (left - edges[0], top - edges[1], right - edges[0], bottom - edges[1])
        return np.asarray(cropped.resize((size[1], size[0]), Image.Resampling[kernel.upper()], box=inside))
    image = np.asarray(image)
    if kernel == "nearest":
        rows = np.floor(_centers(top, bottom, size[0])).astype(np.int64).clip(0, image.shape[0] - 1)
        columns = np.floor(_centers(left, right, size[1])).astype(np.int64).clip(0, image.shape[1] - 1)
        return image[rows[:, None], columns]
    values = image.astype(np.float32)
    for axis, low, high in ((0, top, bottom), (1, left, right)):
        places, weights = _taps(low, high, size[axis], image.shape[axis], kernel)
        weights = weights.reshape(len(weights), *(-1 if a == axis else 1 for a in range(image.ndim)))
        values = reduce(np.add, (np.take(values, p, axis) * w for p, w in zip(places, weights, strict=True)))
    return np.clip(np.rint(values), 0, 255).astype(np.uint8) if image.dtype == np.uint8 else values


def _centers(low: float, high: float, count: int) -> np.ndarray:
    return low + (np.arange(count) + 0.5) * (high - low) / count


def _taps(low: float, high: float, count: int, limit: int, kernel: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns source pixels int64 [taps, count] and weights float32 [taps, count] of the plain kernel."""
    center = _centers(low, high, count) - 0.5  # the center of pixel i is at i
    radius = RADIUS[kernel]
    places = np.floor(center)[:, None].astype(np.int64) + np.arange(1 - radius, radius + 1)
    weights = kernel_weights(np.abs(center[:, None] - places), kernel)
    weights /= weights.sum(axis=1, keepdims=True)  # those of lanczos do not sum to one
    inside = (max(int(np.floor(low)), 0), min(int(np.ceil(high)), limit) - 1)
    return np.clip(places, *inside).T, weights.astype(np.float32).T


def kernel_weights(x: np.ndarray, name: str) -> np.ndarray:
    """Returns the interpolation kernel at distances `x` >= 0 in pixels: bilinear, bicubic (Keys 1981) or lanczos."""
    if name == "bilinear":
        return np.maximum(1 - x, 0.0)
    if name == "bicubic":
        near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
        return np.where(x < 1, near, np.where(x < 2, far, 0.0))
    return np.where(x < 3, np.sinc(x) * np.sinc(x / 3), 0.0)


def file_bytes(path: str | Path, limits: Limits = file_limits.DEFAULT) -> bytes:
    """Returns the content of a file. Raises LimitError for one that is too large, ValueError unless it is regular."""
    limits.check_bytes(check_regular(path).st_size)
    return Path(path).read_bytes()


def read(
    data: bytes, formats: tuple[str, ...] | None = None, limits: Limits | None = file_limits.DEFAULT
) -> tuple[np.ndarray, str]:
    """Returns a decoded image file, uint8 [H, W] or [H, W, 3], or uint16 [H, W], and Pillow's name of the format.

    `formats` is as in `decode`. The format of an image that was turned upright is "" (except for TIFF), since the file
    has other pixels. Raises ValueError if the file is unreadable, truncated, or multi-page (of FIRST_FRAME, the first
    frame is read), if its mode is not in MODES, or if pixels of INTEGERS are not integers from 0 to 65535; and
    LimitError if it exceeds `limits`.
    """
    image, form = _open(data, formats, limits)
    return np.asarray(image), form


def orientation(exif: bytes) -> int:
    """Returns the orientation in an EXIF block, 1 (upright) if it is missing or damaged.

    Pillow's reader would copy the data of all tags, which in a forged file may be many times its size.
    """
    exif = exif.removeprefix(b"Exif\0\0")
    order = "<" if exif[:2] == b"II" else ">"
    try:
        (start,) = struct.unpack_from(f"{order}I", exif, 4)
        for i in range(struct.unpack_from(f"{order}H", exif, start)[0]):
            tag, value = struct.unpack_from(f"{order}H6xH", exif, start + 2 + 12 * i)
            if tag == ORIENTATION:
                return int(value)
    except struct.error:
        pass
    return 1


def conversion(data: bytes) -> str:
    """Returns the mode of a readable image file, such as "RGBA, 16 bits", if `read` loses part of it; "" otherwise."""
    with Image.open(io.BytesIO(data), formats=tuple(FORMATS.values())) as picture:
        mode = picture.mode + (" with transparency" if "transparency" in picture.info else "")
        # From the header, because Pillow reduces 16-bit color to 8 bits.
        bits = data[24] if picture.format == "PNG" else max(_tiff_tags(picture).get(258, (8,)))
        mode += f", {bits} bits" if bits > 8 and picture.mode not in INTEGERS else ""
    return "" if mode in LOSSLESS else mode


def _open(data: bytes, formats: tuple[str, ...] | None, limits: Limits | None) -> tuple[np.ndarray | Image.Image, str]:
    own = _decode_own(data)
    if own is not None:
        if limits is not None:
            limits.check_image(*extent(own))
        return own, "PNG"
    try:
        if limits is not None and data.startswith(b"\xff\xd8\xff"):
            file_limits.jpeg_segments(data)
        with Image.open(io.BytesIO(data), formats=formats or tuple(FORMATS.values())) as picture:
            if limits is not None:
                limits.check_image(*picture.size)
                tags = _tiff_tags(picture)
                limits.check_image(tags.get(322, 1), tags.get(323, 1))  # of tiles, decoded even for a small image
                if picture.format == "JPEG2000":
                    file_limits.check_jpeg2000(data, limits)
            problem = _unsupported(picture)
            if problem is None:
                picture.load()
                turn = TURNS.get(orientation(picture.info.get("exif", b"")))
                # The format is dropped, since the file has other pixels. Pillow itself turns TIFF upright.
                upright = picture if turn is None else picture.transpose(turn)
                image = upright if upright.mode == "L" else _array(upright)
                if image is not None:
                    return image, upright.format or ""
    except LimitError:
        raise
    except Image.DecompressionBombError as error:  # far above the limits
        raise LimitError(str(error).split(",")[0], "pixels") from None
    except Image.UnidentifiedImageError:
        raise ValueError(f"unrecognized image format; supported formats: {FORMAT_NAMES}") from None
    except Exception as error:  # Pillow's exceptions depend on format and damage
        raise ValueError(f"damaged or truncated image ({error})") from None
    raise ValueError(
        problem or "fractions or values outside 0 to 65535: save integers, such as Hounsfield units + 1024"
    )


def _tiff_tags(picture: Image.Image) -> Mapping[int, Any]:
    return picture.tag_v2 if picture.format == "TIFF" else {}  # type: ignore[attr-defined]


def _unsupported(picture: Image.Image) -> str | None:
    # The number of pages is unknown until all have been visited.
    if picture.format not in FIRST_FRAME and getattr(picture, "is_animated", False):
        return "several pages or frames in one file: save one image per file"
    if picture.mode in INTEGERS and _tiff_tags(picture).get(262) == 0:
        return "a 16-bit TIFF with inverted gray levels: save it with 0 as black"
    return None if picture.mode in MODES else f"pixels of mode {picture.mode}; expected gray or color"


def _array(picture: Image.Image) -> np.ndarray | None:
    """Returns the pixels of an image of MODES; None for numbers that uint16 can't represent."""
    if picture.mode in INTEGERS:
        values = np.asarray(picture)
        with np.errstate(invalid="ignore"):
            integers = values.astype(np.uint16)
        return integers if (integers == values).all() else None
    picture.info.pop("transparency", None)  # Pillow ignores it with a warning
    array = np.asarray(picture.convert("L" if picture.mode in ("1", "LA", "La") else "RGB"))
    gray_palette = picture.mode in ("P", "PA") and (array == array[..., :1]).all()
    return np.ascontiguousarray(array[..., 0]) if gray_palette else array
