"""What happens to one image on its way into a data set: decoded whole, checked, staged, shrunk, hashed, measured."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from lungjax.data import duplicates, preprocess, prepared
from lungjax.data.imaging import images
from lungjax.data.preprocess import Box
from lungjax.datasets.listing import Example


@dataclass(frozen=True)
class Treatment:
    """What is to be made of every image of a data set."""

    stage: str = ""  # one of config.STAGES, "" for the image as it is
    size: tuple[int, int] | None = None  # height, width
    body: bool = False  # keep a mask of the body
    window: tuple[float, float] | None = None  # 16-bit values that become 0 and 255


@dataclass(frozen=True)
class Treated:
    """What is stored of an image."""

    data: bytes  # the file's own bytes where nothing was changed (8-bit JPEG, PNG), else a PNG
    width: int
    height: int
    box: Box  # in pixels of the stored image, max exclusive; the whole image where there is no box
    pixels: str  # digest of the decoded original
    phash: int  # of the original, as the thumbnail: see data.duplicates
    thumbnail: bytes  # of duplicates.SIDE rows and columns
    mean: float  # of the stored image, gray, 0..1; if `raw`, of its 16-bit values
    std: float
    raw: bool
    histogram: np.ndarray | None  # int64 [65536] of a 16-bit image's values, None for 8 bits
    body: bytes  # packed bits, empty if not asked for
    found: bool  # False if the stage found no body or no lung in it


@dataclass(frozen=True)
class Problem:
    """Why an image can't be stored."""

    text: str
    skippable: bool  # by --on_bad_image=skip; what else is wrong, the user must put right


def treat(example: Example, treatment: Treatment) -> Treated | Problem:
    """Reads and treats one image; runs in a worker process, so nothing is raised for a bad image."""
    try:
        data = Path(example.image).read_bytes() if isinstance(example.image, str) else example.image()
        array, form = images.read(data)
    except (ValueError, OSError) as error:
        return Problem(str(error), skippable=True)
    height, width = array.shape[:2]
    outside = _outside(example.box, width, height)
    if outside:
        return Problem(outside, skippable=False)
    deep = array.dtype == np.uint16
    if deep and treatment.stage and treatment.window is None:
        return Problem(f"a 16-bit image: the stage {treatment.stage} needs --window=low,high", skippable=False)
    shown = array
    if deep and treatment.window:
        shown = np.rint(images.show(array, treatment.window)).astype(np.uint8)
    gray = images.gray(shown)
    box = example.box or (0.0, 0.0, float(width), float(height))
    stored, box, region, found = preprocess.apply_stage(gray if treatment.stage else array, box, treatment.stage, treatment.size)
    same = stored is array and not deep and form in ("JPEG", "PNG")
    raw = stored.dtype == np.uint16 and treatment.window is None
    if stored.dtype == np.uint16 and treatment.window:
        values = images.show(stored, treatment.window) / 255.0
    else:
        values = stored.astype(np.float64) if raw else images.gray(stored) / 255.0
    return Treated(
        data=data if same else images.encode(stored),
        width=stored.shape[1],
        height=stored.shape[0],
        box=box,
        pixels=images.digest(array),
        phash=duplicates.phash(gray),
        thumbnail=duplicates.thumbnail(gray).tobytes(),
        mean=float(values.mean()),
        std=float(values.std()),
        raw=raw,
        histogram=np.bincount(array.ravel(), minlength=1 << 16) if deep else None,
        body=_body(gray, region) if treatment.body else b"",
        found=found,
    )


def _outside(box: Box | None, width: int, height: int) -> str:
    if box is None:
        return ""
    xmin, ymin, xmax, ymax = box
    if 0 <= xmin < xmax <= width and 0 <= ymin < ymax <= height:
        return ""
    text = " ".join(f"{v:g}" for v in box)
    return f"box {text} lies outside the image, which is {width} x {height} (width x height)"


def _body(gray: np.ndarray, region: Box) -> bytes:
    from lungjax.data.imaging import lung_masks  # see treat

    mask = Image.fromarray(lung_masks.body_mask(gray).astype(np.uint8) * 255)
    side = prepared.BODY_SIDE
    kept = np.asarray(mask.resize((side, side), Image.Resampling.BILINEAR, box=region)) > 127
    return np.packbits(kept).tobytes()
