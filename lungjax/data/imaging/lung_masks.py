"""Body and lung masks of CT slices in any window, found without a trained network, and the stages that apply them.

`study_masks` has the masks of the studies; `apply` supports both kinds of stages.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage
from skimage import filters

from lungjax.config import nearest
from lungjax.data.imaging import lung_outline, study_masks
from lungjax.data.imaging.images import Region, bounding_box, full_region

ROBUST = ("nobackg", "crop", "lungs_nocrop", "lungs", "no_lungs")
STAGES = (*ROBUST, *study_masks.STAGES)

SIDE = 256  # pixels; larger images are reduced to this longest side, and their mask is enlarged
BLACK = 10.0  # gray level; the area outside a round field of view is darker
FLAT = 2.0  # gray levels by which that area varies
MIN_CONTRAST = 6.0  # gray levels between air and tissue


class StageResult(NamedTuple):
    """An image preprocessed to a stage."""

    image: np.ndarray  # uint8 [h, w]
    region: Region  # of the original image
    found: bool  # False without a body or lung: `image` is then the previous stage


@dataclass(frozen=True)
class _View:
    """A slice prepared for masking, at most `SIDE` pixels on its longer side. Arrays are [h, w]."""

    shape: tuple[int, ...]  # of the reduced image, white margins included
    inside: tuple[slice, slice]  # the part within the margins: the arrays below
    smooth: np.ndarray  # float32, denoised gray levels
    level: float  # gray level between air and tissue
    dark: np.ndarray  # bool, lung or air
    outer: np.ndarray  # bool, air around the body
    body: np.ndarray  # bool


def body_mask(image: np.ndarray) -> np.ndarray:
    """Returns the body in a gray uint8 image [H, W], bool [H, W], including the lungs but not the table or arms.

    The mask is all False if body and background have no contrast. Raises ValueError unless the image is gray uint8.
    """
    view = _prepare(_check_gray(image))
    return _enlarge(view.body if view else None, view, image.shape)


def lung_mask(image: np.ndarray) -> np.ndarray:
    """Returns the lungs in a gray uint8 image [H, W], bool [H, W]; all False without lungs.

    The mask includes vessels, lesions (also at the chest wall) and large gas bubbles in the stomach or bowel, but not a
    separate trachea. The spine must be above or below the lungs. Raises ValueError like `body_mask`.
    """
    view = _prepare(_check_gray(image))
    mask, sides = (None, 0) if view is None else _lungs(view)
    # In a soft-tissue window fat is dark and joins a lung to the air outside, so a lower level is tried.
    if view is not None and sides < 2 and (deeper := _prepare(image, view.level)):
        other, other_sides = _lungs(deeper)
        if other is not None and (mask is None or (other_sides > sides and other.sum() > mask.sum())):
            mask = other
    return _enlarge(mask, view, image.shape)


def apply(image: np.ndarray, stage: str) -> StageResult:
    """Returns a grayscale uint8 image [H, W] preprocessed to a stage.

    `nobackg` is the body on black and `crop` its box without raised arms; `lungs_nocrop` is the lungs on black and
    `lungs` their box; `no_lungs` is the image with black lungs. The `study_` stages and `features` are those of
    `study_masks`. Raises ValueError for an unknown stage, or if the image is not uint8 grayscale.
    """
    if stage not in STAGES:
        raise ValueError(f"unknown stage {stage!r}; {nearest(stage, STAGES)}")
    _check_gray(image)
    if stage in study_masks.STAGES:
        return StageResult(*study_masks.apply(image, stage))
    lung = lung_mask(image) if "lungs" in stage else None
    found = lung is None or bool(lung.any())
    if lung is not None and stage == "no_lungs":
        return StageResult(np.where(lung, 0, image).astype(np.uint8), full_region(image), found)
    mask = lung if lung is not None and found else body_mask(image)
    if not mask.any():
        return StageResult(image, full_region(image), False)
    black = np.where(mask, image, 0).astype(np.uint8)
    if stage not in ("crop", "lungs"):
        return StageResult(black, full_region(image), found)
    x0, top, x1, y1 = bounding_box(mask)
    y0 = top
    if mask is not lung:  # raised arms are cut off by the CT-COV19 study's rule if it removes less than a quarter
        y0 = study_masks.without_arms(mask, (x0, top, x1, y1))[1]
        y0 = y0 if y0 - top < 0.25 * (y1 - top) else top
    return StageResult(black[y0:y1, x0:x1], (float(x0), float(y0), float(x1), float(y1)), found)


def _check_gray(image: np.ndarray) -> np.ndarray:
    if image.ndim != 2 or image.dtype != np.uint8 or not image.size:
        raise ValueError(f"masks need a gray uint8 image [H, W], got {image.dtype} {list(image.shape)}")
    return image


def _enlarge(mask: np.ndarray | None, view: _View | None, shape: tuple[int, ...]) -> np.ndarray:
    """Returns a view's mask at the image's size, with an interpolated edge."""
    full = np.zeros(shape if view is None else view.shape, bool)
    if mask is not None and view is not None:
        full[view.inside] = mask
    if full.shape == shape:
        return full
    big = Image.fromarray(full.astype(np.uint8) * 255).resize((shape[1], shape[0]), Image.Resampling.BILINEAR)
    return np.asarray(big) > 127


def _prepare(image: np.ndarray, below: float = 256.0) -> _View | None:
    """Returns the input of both masks; None if the gray levels under `below` have no contrast."""
    shrink = max(image.shape) / SIDE
    if shrink > 1:
        size = max(1, round(image.shape[1] / shrink)), max(1, round(image.shape[0] / shrink))
        image = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX))
    if min(image.shape) < 16:
        return None
    inside = _without_margins(image)
    smooth = ndimage.gaussian_filter(image[inside].astype(np.float32), 0.8)
    level = _level(smooth, below)
    if level is None:
        return None
    dark = smooth < level
    outer = _outer(dark)
    body = _body(outer, dark)
    view = None if body is None else _View(image.shape, inside, smooth, level, dark, outer, body)
    if below > 255 and (body is None or body.mean() < 0.2):
        # The level separates bone or contrast medium from the rest of the body: air is below it.
        deeper = _prepare(image, level)
        if deeper is not None and (body is None or deeper.body.sum() > 1.5 * body.sum()):
            return deeper
    return view


def _without_margins(image: np.ndarray) -> tuple[slice, slice]:
    """Returns the part of an image within the white margins of a screenshot or a journal figure."""
    white = image > 245
    ends = []
    for lines in (white, white[::-1], white.T, white.T[::-1]):
        share = lines.mean(1)
        first = int(np.argmax(share < 0.9))
        # A margin ends along its full length, a white chest wall only at the tip of a lung.
        margin = 0 < first < len(share) // 3 and share[min(first + 1, len(share) - 1)] < 0.7
        ends.append(first + 1 if margin else 0)  # one pixel more: JPEG blurs the margin
    top, bottom, left, right = ends
    return slice(top, image.shape[0] - bottom), slice(left, image.shape[1] - right)


def _level(smooth: np.ndarray, below: float) -> float | None:
    """Returns the gray level between air and tissue; None for a flat image."""
    ring = _border(smooth.shape)
    no_data = _touching(smooth <= min(np.percentile(smooth[ring], 5) + FLAT, BLACK), ring)
    values = smooth[~no_data & (smooth < below)]
    if values.size < 64 or values.max() - values.min() < MIN_CONTRAST:
        return None
    values = np.minimum(values, np.percentile(values, 99.5))  # metal
    level = float(filters.threshold_otsu(values, nbins=128))
    low, high = values[values < level], values[values >= level]
    return level if low.size and high.size and high.mean() - low.mean() >= MIN_CONTRAST else None


def _border(shape: tuple[int, ...]) -> np.ndarray:
    ring = np.ones(shape, bool)
    ring[1:-1, 1:-1] = False
    return ring


def _touching(mask: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    """Returns the connected components of `mask` that contain a pixel of `seeds`."""
    return np.asarray(ndimage.binary_propagation(seeds & mask, mask=mask))


def _outer(dark: np.ndarray) -> np.ndarray:
    """Returns the air around the body, without lungs that the image's edge cuts off."""
    ring = _border(dark.shape)
    labels, count = ndimage.label(dark)
    area = np.bincount(labels.ravel(), minlength=count + 1)
    contact = np.bincount(labels[ring], minlength=count + 1)
    # Air follows the edge; a lung touches it with a small part of its outline, joined lungs with more.
    is_lung = (contact**2 < np.where(area > 0.15 * dark.size, 4.0, 1.6) * area) & (area > 0.02 * dark.size)
    air = (contact > 0) & ~is_lung
    # Wide, flat and low: air between the back and a table as wide as the image.
    for i, place in enumerate(ndimage.find_objects(labels), 1):
        high, wide = (s.stop - s.start for s in place)
        air[i] |= wide > 2.2 * high and wide > 0.25 * dark.shape[1] and place[0].start > 0.5 * dark.shape[0]
    air[0] = False
    return air[labels]


def _body(outer: np.ndarray, dark: np.ndarray) -> np.ndarray | None:
    solid = ~outer
    # Opening removes table and leads, which are much thinner than the body.
    side = 2 * max(1, round(0.012 * max(solid.shape))) + 1
    labels, count = ndimage.label(ndimage.grey_opening(solid.view(np.uint8), (side, side), mode="nearest"))
    if not count:
        return None
    area = np.bincount(labels.ravel())
    area[0] = 0
    # Several pieces only if the body is divided, as in an image of masked lungs; arms are smaller.
    body = ndimage.binary_fill_holes((area > 0.35 * area.max())[labels])
    return body if body.mean() > 0.03 and (body & ~dark).any() else None


def _lungs(view: _View) -> tuple[np.ndarray | None, int]:
    """Returns the lungs at the view's size, or None, and the number of sides of the body that have a lung."""
    x0, _, x1, _ = bounding_box(view.body)
    width, area = x1 - x0, float(view.body.sum())
    inner = view.dark & view.body & ~view.outer
    labels, _ = ndimage.label(inner)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    large = np.flatnonzero(sizes > 0.004 * area)
    if not len(large) or sizes[large].max() < 0.01 * area:
        return None, 0
    centers = np.asarray(ndimage.center_of_mass(inner, labels, large)).reshape(-1, 2)
    boxes = ndimage.find_objects(labels)
    split = _midline(np.isin(labels, large), x0, width)
    sides = [np.zeros(inner.shape, bool), np.zeros(inner.shape, bool)]
    columns = np.arange(inner.shape[1])
    for label, (_, x) in zip(large, centers, strict=True):
        if sizes[label] < 0.12 * sizes.max() and abs(x - split) < 0.1 * width:
            continue  # small and near the midline: trachea, main bronchus or esophagus
        rows, cols = boxes[label - 1]
        piece = labels[rows, cols] == label
        left = columns[cols] < split
        halves = piece[:, left].sum(), piece[:, ~left].sum()
        if min(halves) > 0.2 * sum(halves):
            sides[0][rows, cols] |= piece & left
            sides[1][rows, cols] |= piece & ~left
        else:
            sides[int(x >= split)][rows, cols] |= piece
    skin = ndimage.maximum_filter(view.outer, 2 * round(0.03 * width) + 1, mode="constant", cval=True)
    specks = (sizes < 0.004 * area)[labels] & inner & ~skin & (np.abs(columns - split) > 0.12 * width)
    out, count = np.zeros(inner.shape, bool), 0
    for side, lung in enumerate(sides):
        if lung.sum() > 0.004 * area:
            out |= _complete(lung, specks & ((columns < split) == (side == 0)), view, 1 if side == 0 else -1, width)
            count += 1
    return (out if count else None), count


def _midline(lungs: np.ndarray, x0: int, width: int) -> float:
    """Returns the column between the lungs: the one with the least lung in the middle third of the body."""
    count = ndimage.uniform_filter1d(lungs.sum(0).astype(np.float32), max(3, width // 20))
    first, last = x0 + round(0.35 * width), x0 + round(0.65 * width) + 1
    middle = count[first:last]
    return first + float(np.mean(np.flatnonzero(middle <= middle.min() + 0.5)))


def _complete(lung: np.ndarray, specks: np.ndarray, view: _View, medial: int, width: int) -> np.ndarray:
    """Returns one lung with its hilum, vessels and lesions; `medial` is the sign of x towards the other lung.

    `specks` are small dark spots; those near the lung are air within a lesion.
    """
    radius = max(2, round(0.035 * width))
    x0, y0, x1, y1 = bounding_box(lung)
    pad = 2 * radius + 2
    around = np.s_[max(0, y0 - pad) : y1 + pad, max(0, x0 - pad) : x1 + pad]
    part, dots = np.pad(lung[around], pad), np.pad(specks[around], pad)
    if dots.any():
        # Each spot may connect the next one to the lung.
        chain = ndimage.distance_transform_edt(~(part | dots)) <= 0.8 * radius
        part |= dots & _touching(chain, part)
    far = ndimage.distance_transform_edt(~part)
    closed = ndimage.binary_fill_holes((ndimage.distance_transform_edt(far <= radius) > radius) | part)
    full = lung_outline.complete(closed, np.pad(view.smooth[around], pad, mode="edge"), medial)
    out = np.zeros(lung.shape, bool)
    out[around] = full[pad:-pad, pad:-pad]
    return out & view.body
