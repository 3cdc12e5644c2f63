"""Encoded image files to network input: decode, window, crop, resize.

8-bit images become uint8. A 16-bit image is mapped by its data set's window to float32 in 0..255 and
rounded only after resizing; without a window it is refused, never divided by a guess. Transparency is laid
over black, a palette is looked up, CMYK becomes RGB. An EXIF orientation is ignored: boxes are given in
stored pixels, and CT exports carry none.
"""

import hashlib
import io
import math
import struct
import zlib

import numpy as np
from PIL import Image

from lungjax.config import CROPS, INTERPOLATIONS, InputSpec, nearest

SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Pillow's names of the formats that are decoded, by file suffix. Its other plugins are never tried: some start programs
# on the file (EPS starts Ghostscript), whatever its suffix.
FORMATS = {
    ".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".mpo": "JPEG", ".tif": "TIFF", ".tiff": "TIFF", ".bmp": "BMP",
    ".gif": "GIF", ".webp": "WEBP", ".jp2": "JPEG2000", ".j2k": "JPEG2000",
}  # fmt: skip
SUFFIXES = tuple(FORMATS)
FORMAT_NAMES = "PNG, JPEG, TIFF, BMP, GIF (first frame), WebP and JPEG 2000"
# Formats whose first frame is taken; other files of several pages are refused. MPO is a JPEG with further pictures.
FIRST_FRAME = ("GIF", "MPO")
KERNELS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
ALLOWED = "allowed are 8-bit gray or colour and unsigned 16-bit gray"
RADIUS = {"bilinear": 1, "bicubic": 2, "lanczos": 3}  # of the plain kernels, in source pixels


def digest(array: np.ndarray) -> str:
    """Returns a hex digest of decoded pixels; equal for exact copies, also across file formats."""
    gray = array[..., 0] if array.ndim == 3 and (array == array[..., :1]).all() else array
    made = hashlib.blake2b(f"{gray.shape}{gray.dtype}".encode(), digest_size=10)
    made.update(np.ascontiguousarray(gray).data)
    return made.hexdigest()


def encode(array: np.ndarray) -> bytes:
    """Returns uint8 [H, W] or [H, W, 3], or uint16 [H, W], as a PNG that is quick to read.

    Its rows are neither filtered nor packed. array_record packs each record itself, to about 1.4 times the size of a
    packed PNG, and `read` needs a tenth of the time (tests/benchmarks/README.md).
    """
    samples = np.ascontiguousarray(array, ">u2" if array.dtype == np.uint16 else np.uint8)
    height, width = array.shape[:2]
    rows = samples.view(np.uint8).reshape(height, -1)
    lines = np.pad(rows, ((0, 0), (1, 0)))  # a row begins with the number of its filter; 0 is none
    header = struct.pack(">IIBBBBB", width, height, 8 * samples.itemsize, 2 if array.ndim == 3 else 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines.data, 0)), (b"IEND", b""))
    whole = (
        struct.pack(">I", len(part)) + name + part + struct.pack(">I", zlib.crc32(name + part)) for name, part in chunks
    )
    return SIGNATURE + b"".join(whole)


def _unpacked(data: bytes) -> np.ndarray | None:
    """Returns the pixels of what `encode` wrote, and None for all other files and what is damaged.

    Pillow spends twice the time, most of it in Python code that decoding threads wait for: 2.2 times the rate of
    torch's DataLoader became 3.4 (tests/benchmarks/README.md). zlib checks the sum of the pixels.
    """
    if not data.startswith(SIGNATURE) or data[37:41] != b"IDAT" or data[41:43] != b"\x78\x01" or data[-8:-4] != b"IEND":
        return None
    width, height, bits, kind, *rest = struct.unpack(">IIBBBBB", data[16:29])
    if bits not in (8, 16) or kind not in (0, 2) or any(rest):
        return None
    row = 1 + width * (bits // 8) * (3 if kind == 2 else 1)
    if not 0 < height * row < len(data):  # it is packed, or not whole
        return None
    try:
        unpacker = zlib.decompressobj()
        raw = unpacker.decompress(memoryview(data)[41:-16], height * row + 1)
    except zlib.error:
        return None
    if not unpacker.eof or len(raw) != height * row or any(raw[::row]):
        return None
    rows = np.frombuffer(raw, np.uint8).reshape(height, row)[:, 1:]
    if bits == 16:
        return np.ascontiguousarray(rows).view(">u2").astype(np.uint16)
    return rows.reshape(height, width, 3) if kind == 2 else rows


def gray(array: np.ndarray) -> np.ndarray:
    """Returns an image as uint8 [H, W]: colours by their luminance, other numbers than uint8 by their own range."""
    if array.ndim == 3:
        array = np.asarray(Image.fromarray(array).convert("L"))
    if array.dtype == np.uint8:
        return array
    low, high = np.percentile(array, (0.5, 99.5))
    return np.rint(np.clip((array - low) * (255.0 / max(high - low, 1.0)), 0, 255)).astype(np.uint8)


def decode(data: bytes, window: tuple[float, float] | None, formats: tuple[str, ...] | None = None) -> np.ndarray:
    """Returns an encoded image as [H, W] (gray) or [H, W, 3] (RGB).

    uint8 for 8-bit images; float32 in 0..255 for 16-bit ones, whose values `window` become 0 and 255.
    `formats` are Pillow's names of those that may be tried; None tries all of FORMATS. Raises ValueError if the image
    can't be read, or has 16 bits and there is no window.
    """
    return np.asarray(load(data, window, formats))


def load(
    data: bytes, window: tuple[float, float] | None, formats: tuple[str, ...] | None = None
) -> np.ndarray | Image.Image:
    """As `decode`, but gray 8-bit files stay Pillow's pictures, which spares `to_input` two copies."""
    image, _ = _open(data, formats)
    if isinstance(image, Image.Image) or image.dtype == np.uint8:
        return image
    if window is None:
        raise ValueError("a 16-bit image, and the data set has no window: prepare it with --window=low,high")
    return show(image, window)


def extent(image: np.ndarray | Image.Image) -> tuple[int, int]:
    """Returns width and height."""
    return image.size if isinstance(image, Image.Image) else (image.shape[1], image.shape[0])


def show(array: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """Returns 16-bit values as float32 in 0..255, those of `window` becoming 0 and 255."""
    low, high = window
    return np.clip((array.astype(np.float32) - low) * np.float32(255.0 / (high - low)), 0.0, 255.0)


def to_input(image: np.ndarray | Image.Image, box: np.ndarray, spec: InputSpec, margin: float) -> np.ndarray:
    """Returns `image` cropped and resized for a network, uint8 [height, width, channels].

    Args:
        image: [H, W] or [H, W, 3], uint8, or float32 in 0..255; or a picture that `load` returned.
        box: xmin, ymin, xmax, ymax in pixels, max exclusive; used where spec.crop is "box".
        spec: size, channels, crop, crop_size, interpolation and antialias.
        margin: part of the box's side kept around it on each edge, clipped to the image.

    Raises ValueError for an empty box, or an unknown crop or interpolation.
    """
    if spec.crop not in CROPS:
        raise ValueError(f"input.crop={spec.crop!r}: allowed are {', '.join(CROPS)}")
    if spec.interpolation not in INTERPOLATIONS:
        raise ValueError(f"input.interpolation={spec.interpolation!r}; {nearest(spec.interpolation, INTERPOLATIONS)}")
    if spec.channels == 1 and isinstance(image, np.ndarray) and image.ndim == 3:
        image = gray(image)
    width, height = extent(image)
    region = view(box, spec, margin, width, height)
    whole = region == (0.0, 0.0, width, height) and (height, width) == tuple(spec.size)
    resized = np.asarray(image) if whole else resize(image, region, spec.size, spec.interpolation, spec.antialias)
    if resized.dtype != np.uint8:
        resized = np.clip(np.rint(resized), 0, 255).astype(np.uint8)
    if resized.ndim == 2:
        resized = resized[..., None] if spec.channels == 1 else np.repeat(resized[..., None], spec.channels, axis=-1)
    return resized


def view(box: np.ndarray, spec: InputSpec, margin: float, width: int, height: int) -> tuple[float, float, float, float]:
    """Returns what of a width x height image `to_input` shows: left, top, right, bottom in pixels."""
    if spec.crop == "center":
        return center(spec.crop_size, width, height)
    return grow(box, margin, width, height) if spec.crop == "box" else (0.0, 0.0, float(width), float(height))


def center(size: tuple[int, int], width: int, height: int) -> tuple[float, float, float, float]:
    """Returns the window of `size` (height, width) pixels around the middle of an image, clipped to it.

    Left, top, right, bottom in pixels. Where the rest is odd it goes as in torchvision's CenterCrop: half of it,
    rounded to even. torchvision pads an image that is smaller than the window; here the window shrinks to it.

    Raises ValueError for a size below one pixel.
    """
    if min(size) < 1:
        raise ValueError(f"input.crop_size={size}: give height and width of input.crop=center in pixels, above zero")
    rows, columns = min(size[0], height), min(size[1], width)
    top, left = round((height - rows) / 2), round((width - columns) / 2)
    return float(left), float(top), float(left + columns), float(top + rows)


def grow(box: np.ndarray, margin: float, width: int, height: int) -> tuple[float, float, float, float]:
    """Returns `box` with `margin` of its sides added on each edge, clipped to the image; floats, in pixels.

    Raises ValueError if less than one pixel of the image is in the box.
    """
    left, top, right, bottom = (float(v) for v in box)
    dx, dy = margin * (right - left), margin * (bottom - top)
    grown = (
        max(left - dx, 0.0),
        max(top - dy, 0.0),
        min(right + dx, float(width)),
        min(bottom + dy, float(height)),
    )
    if grown[2] - grown[0] < 1 or grown[3] - grown[1] < 1:
        raise ValueError(f"box {left:g} {top:g} {right:g} {bottom:g} holds no pixel of the {width} x {height} image")
    return grown


def resize(
    image: np.ndarray | Image.Image,
    region: tuple[float, float, float, float],
    size: tuple[int, int],
    kernel: str,
    antialias: bool,
) -> np.ndarray:
    """Returns `region` (left, top, right, bottom) of `image` resized to `size` (height, width).

    With `antialias` the kernel widens when shrinking (Pillow's resampling; it reads nothing outside the
    region). Without, each output samples the plain kernel at its centre, the region's edge repeated, as
    TensorFlow and torch resize with antialias=False. bicubic is Keys' kernel with a = -0.5 in both (torch
    itself has -0.75); lanczos has 3 lobes. "nearest" takes the pixel under the output's centre either way.
    """
    if antialias and kernel != "nearest":
        picture = image if isinstance(image, Image.Image) else Image.fromarray(np.ascontiguousarray(image))
        left, top, right, bottom = region
        edges = (int(left), int(top), math.ceil(right), math.ceil(bottom))
        # Pillow's box alone would let the kernel reach over the region's edge.
        cut = picture if edges == (0, 0, *picture.size) else picture.crop(edges)
        inside = (left - edges[0], top - edges[1], right - edges[0], bottom - edges[1])
        return np.asarray(cut.resize((size[1], size[0]), KERNELS[kernel], box=inside))
    image = np.asarray(image)
    if kernel == "nearest":
        across, down = _nearest(region, size, image.shape)
        return image[down[:, None], across[None, :]]
    across_at, across_by = _taps(region[0], region[2], size[1], image.shape[1], kernel)
    down_at, down_by = _taps(region[1], region[3], size[0], image.shape[0], kernel)
    values = image.astype(np.float32)
    rows = sum(values[down_at[:, t]] * _column(down_by[:, t], image.ndim, 0) for t in range(down_at.shape[1]))
    assert isinstance(rows, np.ndarray)
    full = sum(rows[:, across_at[:, t]] * _column(across_by[:, t], image.ndim, 1) for t in range(across_at.shape[1]))
    assert isinstance(full, np.ndarray)
    return np.clip(np.rint(full), 0, 255).astype(np.uint8) if image.dtype == np.uint8 else full


def _column(weights: np.ndarray, ndim: int, axis: int) -> np.ndarray:
    return weights.reshape([-1 if a == axis else 1 for a in range(ndim)])


def _nearest(
    region: tuple[float, float, float, float], size: tuple[int, int], shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    across = region[0] + (np.arange(size[1]) + 0.5) * (region[2] - region[0]) / size[1]
    down = region[1] + (np.arange(size[0]) + 0.5) * (region[3] - region[1]) / size[0]
    return (
        np.clip(np.floor(across).astype(np.int64), 0, shape[1] - 1),
        np.clip(np.floor(down).astype(np.int64), 0, shape[0] - 1),
    )


def _taps(low: float, high: float, count: int, limit: int, kernel: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns source places int64 [count, taps] and weights float32 [count, taps] of the plain kernel."""
    centre = low + (np.arange(count) + 0.5) * (high - low) / count - 0.5  # pixel i has its centre at i
    radius = RADIUS[kernel]
    places = np.floor(centre)[:, None].astype(np.int64) + np.arange(1 - radius, radius + 1)
    weights = kernel_weights(np.abs(centre[:, None] - places), kernel)
    weights /= weights.sum(axis=1, keepdims=True)  # lanczos does not sum to one by itself
    inside = (max(int(np.floor(low)), 0), min(int(np.ceil(high)), limit) - 1)
    return np.clip(places, *inside), weights.astype(np.float32)


def kernel_weights(x: np.ndarray, name: str) -> np.ndarray:
    """Returns the interpolation kernel at distances `x` >= 0 in pixels: bilinear, bicubic (Keys 1981) or lanczos."""
    if name == "bilinear":
        return np.maximum(1 - x, 0.0)
    if name == "bicubic":
        near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
        return np.where(x < 1, near, np.where(x < 2, far, 0.0))
    return np.where(x < 3, np.sinc(x) * np.sinc(x / 3), 0.0)


def read(data: bytes, formats: tuple[str, ...] | None = None) -> tuple[np.ndarray, str]:
    """Decodes an image file completely: uint8 [H, W] or [H, W, 3], or uint16 [H, W], and Pillow's name of the format.

    Raises ValueError if the file is unreadable or truncated, has several pages, or pixels that are neither
    8-bit nor unsigned 16-bit gray.
    """
    image, form = _open(data, formats)
    return np.asarray(image), form


def _open(data: bytes, formats: tuple[str, ...] | None = None) -> tuple[np.ndarray | Image.Image, str]:
    stored = _unpacked(data)
    if stored is not None:
        return stored, "PNG"
    try:
        with Image.open(io.BytesIO(data), formats=formats or tuple(FORMATS.values())) as picture:
            problem = _unsupported(picture, data)
            if problem is None:
                picture.load()
                plain = picture.mode == "L" and "transparency" not in picture.info
                return picture if plain else _array(picture), picture.format or ""
    except Image.UnidentifiedImageError:
        raise ValueError(f"not an image that can be read; allowed are {FORMAT_NAMES}") from None
    except Exception as error:  # what Pillow raises for a damaged file depends on format and damage
        raise ValueError(f"damaged or truncated image ({error})") from None
    raise ValueError(problem)


def _unsupported(picture: Image.Image, data: bytes) -> str | None:
    pages = 1 if picture.format in FIRST_FRAME else getattr(picture, "n_frames", 1)
    if pages > 1:
        return f"{pages} pages in one file: save one image per file"
    bits: tuple[int, ...] = ()
    if picture.format == "PNG":
        bits = (data[24],)  # of the header chunk: Pillow itself cuts 16-bit colour down to 8 bits
    if picture.format == "TIFF":
        tags = picture.tag_v2  # type: ignore[attr-defined]
        bits = tags.get(258, (1,))
        if picture.mode.startswith("I;16") and tags.get(262) == 0:
            return "a 16-bit TIFF in which 0 is white: save it with 0 as black"
        if 2 in tags.get(339, ()):
            return "signed pixel values: save it as unsigned 16-bit, such as Hounsfield units plus 1024"
    if max(bits, default=8) > 8 and not picture.mode.startswith("I;16"):
        return f"{max(bits)}-bit pixels of mode {picture.mode}; {ALLOWED}"
    if picture.mode not in (
        "1",
        "L",
        "LA",
        "P",
        "PA",
        "RGB",
        "RGBA",
        "CMYK",
        "YCbCr",
        "I;16",
        "I;16L",
        "I;16B",
    ):
        return f"pixels of mode {picture.mode}; {ALLOWED}"
    return None


def _array(picture: Image.Image) -> np.ndarray:
    if picture.mode.startswith("I;16"):
        return np.asarray(picture).astype(np.uint16)
    clear = picture.mode in ("LA", "PA", "RGBA") or "transparency" in picture.info
    if clear:
        over = np.asarray(picture.convert("RGBA"), np.uint16)
        array = ((over[..., :3] * over[..., 3:] + 127) // 255).astype(np.uint8)
    elif picture.mode == "1":
        return np.asarray(picture.convert("L"))
    else:
        array = np.asarray(picture.convert("RGB"))
    if picture.mode in ("L", "LA", "P", "PA") and (array == array[..., :1]).all():
        return np.ascontiguousarray(array[..., 0])
    return array
