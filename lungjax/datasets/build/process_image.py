"""Processes one image of a data set: decodes, checks, applies the stage, resizes, hashes and measures it."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from lungjax.data import duplicates, prepared, preprocess
from lungjax.data.imaging import images
from lungjax.data.imaging.limits import DEFAULT, Limits
from lungjax.data.preprocess import Box
from lungjax.datasets.listing import Example


@dataclass(frozen=True)
class ImageOptions:
    """Options for all images of a data set."""

    stage: str = ""  # one of config.STAGES, "" for unmodified images
    size: tuple[int, int] | None = None  # height, width
    body: bool = False  # store a body mask
    window: tuple[float, float] | None = None  # 16-bit values that become 0 and 255
    limits: Limits = DEFAULT


@dataclass(frozen=True)
class ProcessedImage:
    """The stored data of an image."""

    data: bytes  # the original file of an unmodified 8-bit JPEG or PNG, else a PNG
    width: int
    height: int
    box: Box  # in pixels of the stored image, max exclusive; by default the complete image
    pixels: str  # digest of the decoded original, or of its copy by Example.transform
    phash: int  # of the same image as the thumbnail; see data.duplicates
    thumbnail: bytes  # of duplicates.SIDE rows and columns
    mean: float  # of the stored image, gray, 0..1; of its values, if it has 16 bits and no window
    std: float
    deep: bool  # whether the image has 16 bits
    histogram: np.ndarray | None  # int64 [65536] of a 16-bit image's values, None for 8 bits
    body: bytes  # packed bits, empty if not requested
    found: bool  # False if the stage detected no body or no lung
    conversion: str  # the file's mode if reading it lost part of it, see images.conversion
    original: bool  # whether `data` is the file itself


def process_image(example: Example, options: ImageOptions) -> ProcessedImage | str:
    """Reads and processes one image; returns the reason if it can't be stored, since it runs in a worker process.

    Raises ValueError for a box outside the image, which is an error in a table.
    """
    try:
        file = example.image
        data = images.file_bytes(file, options.limits) if isinstance(file, str) else file()
        array, form = images.read(data, limits=options.limits)
        conversion = images.conversion(data)
    except (ValueError, OSError) as error:
        return str(error)
    height, width = array.shape[:2]
    box = example.box or (0.0, 0.0, float(width), float(height))
    if not (0 <= box[0] < box[2] <= width and 0 <= box[1] < box[3] <= height):
        text = " ".join(f"{v:g}" for v in box)
        problem = f"box {text} exceeds the image of {width} x {height} (width x height)"
        raise ValueError(f"{example.where}: {example.file}: {problem}")
    deep = array.dtype == np.uint16
    if deep and options.stage and options.window is None:
        return f"a 16-bit image: the stage {options.stage} needs --window=low,high"
    shown = np.rint(images.show(array, options.window)).astype(np.uint8) if deep and options.window else array
    gray = images.gray(shown)
    source = gray if options.stage else array
    move = example.transform
    stored, box, region, found = preprocess.apply_stage(source, box, options.stage, None if move else options.size)
    body = _body(gray, region) if options.body else np.zeros(0, np.uint8)
    if move:
        body = move(body) if options.body else body
        array, deep, form = move(shown), False, ""
        gray = images.gray(array)
        stored, box, *_ = preprocess.apply_stage(move(stored), box, "", options.size)
    original = stored is array and not deep and form in ("JPEG", "PNG")
    if stored.dtype == np.uint16:
        values = images.show(stored, options.window) / 255.0 if options.window else stored.astype(np.float64)
    else:
        values = images.gray(stored) / 255.0
    return ProcessedImage(
        data=data if original else images.encode(stored),
        width=stored.shape[1],
        height=stored.shape[0],
        box=box,
        pixels=images.digest(array),
        phash=duplicates.phash(gray),
        thumbnail=duplicates.thumbnail(gray).tobytes(),
        mean=float(values.mean()),
        std=float(values.std()),
        deep=deep,
        histogram=np.bincount(array.ravel(), minlength=1 << 16) if deep else None,
        body=np.packbits(body > 127).tobytes(),
        found=found,
        conversion=conversion,
        original=original and isinstance(example.image, str),
    )


def _body(gray: np.ndarray, region: Box) -> np.ndarray:
    from lungjax.data.imaging import lung_masks  # here: it imports scikit-image

    mask = Image.fromarray(lung_masks.body_mask(gray).astype(np.uint8) * 255)
    size = (prepared.BODY_SIDE, prepared.BODY_SIDE)
    return np.asarray(mask.resize(size, Image.Resampling.BILINEAR, box=region))
