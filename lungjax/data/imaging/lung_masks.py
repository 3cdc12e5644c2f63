"""Body and lung masks of a CT slice, and the pictures made with them (stages).

The masks here are the robust ones: no learned part, one slice at a time, gray levels of any window. What the
studies themselves did lies in `study_masks`; `apply` makes both kinds of stage by name.
"""

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image
from scipy import ndimage
from skimage import filters

from lungjax.config import nearest
from lungjax.data.imaging import lung_outline, study_masks

ROBUST = ("nobackg", "crop", "lungs_nocrop", "lungs", "no_lungs")
STAGES = (*ROBUST, *study_masks.STAGES)

SIDE = 256  # pixels; longer images are masked at this longest side, and the mask is enlarged again
BLACK = 10.0  # gray level; outside the round field of view it is darker, and within FLAT of the darkest there
FLAT = 2.0  # gray levels
CONTRAST = 6.0  # gray levels between air and tissue below which there is nothing to tell apart

Region = tuple[float, float, float, float]


@dataclass(frozen=True)
class Staged:
    """A stage of an image.

    `image` is uint8 [h, w]. `region` says what of the original it shows: xmin, ymin, xmax, ymax in pixels of the
    original, max exclusive. With `found` False there was no body or lung, and `image` is the stage before.
    """

    image: np.ndarray
    region: Region
    found: bool


@dataclass(frozen=True)
class _View:
    """A slice made ready for masking, at most `SIDE` pixels long. Arrays are [h, w]."""

    shape: tuple[int, ...]  # of the reduced image, white margins included
    inside: tuple[slice, slice]  # what of it lies within the margins: the arrays below
    smooth: np.ndarray  # float32, gray levels, noise smoothed away
    level: float  # gray level between air and tissue
    dark: np.ndarray  # bool, lung or air
    outer: np.ndarray  # bool, air around the body
    body: np.ndarray  # bool


def body_mask(image: np.ndarray) -> np.ndarray:
    """Returns where the body is in a gray uint8 image [H, W], as bool [H, W]; lungs count, table and arms do not.

    All False where nothing stands out from the background. Raises ValueError for anything but a gray uint8 image.
    """
    view = _look(_gray(image))
    return _enlarge(view.body if view else None, view, image.shape)


def lung_mask(image: np.ndarray) -> np.ndarray:
    """Returns where the lungs are in a gray uint8 image [H, W], as bool [H, W]; all False where there is no lung.

    Vessels, lesions inside a lung and lesions at the chest wall count. The windpipe does not where it lies apart
    from the lungs; a large bubble in stomach or bowel does, as nothing in its gray level tells it from a lung. The
    spine is taken to be above or below, not at a side. Raises ValueError for anything but a gray uint8 image.
    """
    view = _look(_gray(image))
    mask, sides = (None, 0) if view is None else _lungs(view)
    if view is not None and sides < 2:
        # In a window for soft tissue fat is dark too, and joins a lung to the air outside: look below it.
        deeper = _look(image, view.level)
        again, more = (None, 0) if deeper is None else _lungs(deeper)
        if again is not None and (mask is None or (more > sides and again.sum() > mask.sum())):
            mask = again
    return _enlarge(mask, view, image.shape)


def apply(image: np.ndarray, stage: str) -> Staged:
    """Returns a stage of a gray uint8 image [H, W].

    The robust stages keep the image's own pixels: `nobackg` blacks out all but the body, `crop` cuts that to the
    body's box without raised arms, `lungs_nocrop` blacks out all but the lungs, `lungs` cuts that to the lungs'
    box, `no_lungs` blacks out the lungs alone. The `study_` ones and `features` are those of `study_masks`.

    Raises ValueError for an unknown stage and for anything but a gray uint8 image.
    """
    if stage not in STAGES:
        raise ValueError(f"unknown stage {stage!r}; {nearest(stage, STAGES)}")
    _gray(image)
    if stage in study_masks.STAGES:
        return Staged(*study_masks.apply(image, stage))
    if stage in ("nobackg", "crop"):
        return _body_stage(image, body_mask(image), stage == "crop")
    lung = lung_mask(image)
    if stage == "no_lungs":
        return Staged(np.where(lung, 0, image).astype(np.uint8), _whole(image), bool(lung.any()))
    if not lung.any():
        return replace(_body_stage(image, body_mask(image), stage == "lungs"), found=False)
    kept = np.where(lung, image, 0).astype(np.uint8)
    return _cut(kept, _box(lung)) if stage == "lungs" else Staged(kept, _whole(image), True)


def _body_stage(image: np.ndarray, body: np.ndarray, cut: bool) -> Staged:
    if not body.any():
        return Staged(image, _whole(image), False)
    kept = np.where(body, image, 0).astype(np.uint8)
    return _cut(kept, _chest_box(body)) if cut else Staged(kept, _whole(image), True)


def _chest_box(body: np.ndarray) -> tuple[int, int, int, int]:
    """Returns the body's box without raised arms, by the CT-COV19 study's rule, which may not take half the body."""
    box = _box(body)
    chest = study_masks.without_arms(body, box)
    return chest if chest[1] - box[1] < 0.25 * (box[3] - box[1]) else box


def _whole(image: np.ndarray) -> Region:
    return 0.0, 0.0, float(image.shape[1]), float(image.shape[0])


def _box(mask: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _cut(image: np.ndarray, box: tuple[int, int, int, int]) -> Staged:
    x0, y0, x1, y1 = box
    return Staged(image[y0:y1, x0:x1], (float(x0), float(y0), float(x1), float(y1)), True)


def _gray(image: np.ndarray) -> np.ndarray:
    if image.ndim != 2 or image.dtype != np.uint8 or not image.size:
        raise ValueError(f"masks want a gray uint8 image [H, W], got {image.dtype} {list(image.shape)}")
    return image


def _enlarge(mask: np.ndarray | None, view: _View | None, shape: tuple[int, ...]) -> np.ndarray:
    """Returns a view's mask at the image's size; its edge is interpolated, so that it stays a smooth line."""
    full = np.zeros(shape if view is None else view.shape, bool)
    if mask is not None and view is not None:
        full[view.inside] = mask
    if full.shape == shape:
        return full
    big = Image.fromarray(full.astype(np.uint8) * 255).resize((shape[1], shape[0]), Image.Resampling.BILINEAR)
    return np.asarray(big) > 127


def _look(image: np.ndarray, below: float = 256.0) -> _View | None:
    """Returns what both masks start from, or None where no two gray levels stand apart `below` a level."""
    shrink = max(image.shape) / SIDE
    if shrink > 1:
        size = max(1, round(image.shape[1] / shrink)), max(1, round(image.shape[0] / shrink))
        image = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX))
    if min(image.shape) < 16:
        return None
    inside = _inside(image)
    smooth = ndimage.gaussian_filter(image[inside].astype(np.float32), 0.8)
    level = _level(smooth, below)
    if level is None:
        return None
    dark = smooth < level
    outer = _outer(dark)
    body = _body(outer, dark)
    view = None if body is None else _View(image.shape, inside, smooth, level, dark, outer, body)
    if below > 255 and (body is None or body.mean() < 0.2):
        # Bone or contrast medium stands out against the rest of the body: the air lies below this level.
        deeper = _look(image, level)
        if deeper is not None and (body is None or deeper.body.sum() > 1.5 * body.sum()):
            return deeper
    return view


def _inside(image: np.ndarray) -> tuple[slice, slice]:
    """Returns the part of an image within the white margins of a screen capture or a journal figure."""
    white = image > 245
    ends = []
    for lines in (white, white[::-1], white.T, white.T[::-1]):
        share = lines.mean(1)
        first = int(np.argmax(share < 0.9))
        # A white chest wall ends at the tip of a lung, a margin ends all along.
        margin = 0 < first < len(share) // 3 and share[min(first + 1, len(share) - 1)] < 0.7
        ends.append(first + 1 if margin else 0)  # JPEG blurs the margin by a pixel
    top, bottom, left, right = ends
    return slice(top, image.shape[0] - bottom), slice(left, image.shape[1] - right)


def _level(smooth: np.ndarray, below: float) -> float | None:
    """Returns the gray level between air and tissue, or None in a flat image."""
    ring = _border(smooth.shape)
    unseen = _touching(smooth <= min(np.percentile(smooth[ring], 5) + FLAT, BLACK), ring)
    seen = smooth[~unseen & (smooth < below)]
    if seen.size < 64 or seen.max() - seen.min() < CONTRAST:
        return None
    seen = np.minimum(seen, np.percentile(seen, 99.5))  # metal
    level = float(filters.threshold_otsu(seen, nbins=128))
    low, high = seen[seen < level], seen[seen >= level]
    return level if low.size and high.size and high.mean() - low.mean() >= CONTRAST else None


def _border(shape: tuple[int, ...]) -> np.ndarray:
    ring = np.ones(shape, bool)
    ring[1:-1, 1:-1] = False
    return ring


def _touching(mask: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    labels, count = ndimage.label(mask)
    hit = np.zeros(count + 1, bool)
    hit[labels[seeds]] = True
    hit[0] = False
    return hit[labels]


def _filled(mask: np.ndarray) -> np.ndarray:
    return ~_touching(~mask, _border(mask.shape))


def _outer(dark: np.ndarray) -> np.ndarray:
    """Returns the air around the body. A lung that the image's edge cuts off is not part of it."""
    ring = _border(dark.shape)
    labels, count = ndimage.label(dark)
    area = np.bincount(labels.ravel(), minlength=count + 1)
    contact = np.bincount(labels[ring], minlength=count + 1)
    # Air lies along the edge; a lung meets it with a small part of its outline, both lungs with more.
    cut = (contact**2 < np.where(area > 0.15 * dark.size, 4.0, 1.6) * area) & (area > 0.02 * dark.size)
    air = (contact > 0) & ~cut
    # The air between the back and a table that runs from edge to edge: wide, flat and low.
    for i, place in enumerate(ndimage.find_objects(labels), 1):
        high, wide = (s.stop - s.start for s in place)
        air[i] |= wide > 2.2 * high and wide > 0.25 * dark.shape[1] and place[0].start > 0.5 * dark.shape[0]
    air[0] = False
    return air[labels]


def _body(outer: np.ndarray, dark: np.ndarray) -> np.ndarray | None:
    solid = ~outer
    # Opening takes the table and the leads off the skin; the body is far thicker than they are.
    radius = max(1, round(0.012 * max(solid.shape)))
    opened = _open(solid, radius)
    labels, count = ndimage.label(opened)
    if not count:
        return None
    area = np.bincount(labels.ravel())
    area[0] = 0
    # More than one only where the body is cut up, as in a picture of lungs that were masked before; arms are smaller.
    body = _filled((area > 0.35 * area.max())[labels])
    return body if body.mean() > 0.03 and (body & ~dark).any() else None


def _open(mask: np.ndarray, radius: int) -> np.ndarray:
    """Opens a mask with a square; what lies beyond the image's edge counts as more of the same."""
    side = 2 * radius + 1
    core = ndimage.minimum_filter(mask.view(np.uint8), side, mode="nearest")
    return ndimage.maximum_filter(core, side, mode="nearest").view(bool)


def _lungs(view: _View) -> tuple[np.ndarray | None, int]:
    """Returns the lungs at the view's size, or None, and on how many sides of the body there is one."""
    x0, _, x1, _ = _box(view.body)
    width, area = x1 - x0, float(view.body.sum())
    inner = view.dark & view.body & ~view.outer
    labels, count = ndimage.label(inner)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    sizes[0] = 0
    keep = np.flatnonzero(sizes > 0.004 * area)
    if not len(keep) or sizes[keep].max() < 0.01 * area:
        return None, 0
    centres = np.asarray(ndimage.center_of_mass(inner, labels, keep)).reshape(-1, 2)
    split = _midline(np.isin(labels, keep), x0, width)
    sides = [np.zeros(inner.shape, bool), np.zeros(inner.shape, bool)]
    columns = np.arange(inner.shape[1])
    for label, (_, x), (rows, cols) in zip(keep, centres, _slices(labels, keep), strict=True):
        if _windpipe(sizes[label] / sizes.max(), x - split, width):
            continue
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
    out, found = np.zeros(inner.shape, bool), 0
    for side, lung in enumerate(sides):
        if lung.sum() > 0.004 * area:
            out |= _complete(lung, specks & ((columns < split) == (side == 0)), view, 1 if side == 0 else -1, width)
            found += 1
    return (out if found else None), found


def _slices(labels: np.ndarray, keep: np.ndarray) -> list[tuple[slice, slice]]:
    found = ndimage.find_objects(labels)
    return [found[label - 1] for label in keep]


def _windpipe(size: float, off: float, width: int) -> bool:
    """Air in the middle of the body that is small beside the larger lung: windpipe, main bronchus, gullet."""
    return size < 0.12 and abs(off) < 0.1 * width


def _midline(lungs: np.ndarray, x0: int, width: int) -> float:
    """Returns the column between the lungs: the one with least lung in the middle third of the body."""
    count = ndimage.uniform_filter1d(lungs.sum(0).astype(np.float32), max(3, width // 20))
    first, last = x0 + round(0.35 * width), x0 + round(0.65 * width) + 1
    middle = count[first:last]
    return first + float(np.mean(np.flatnonzero(middle <= middle.min() + 0.5)))


def _complete(lung: np.ndarray, specks: np.ndarray, view: _View, medial: int, width: int) -> np.ndarray:
    """Returns one lung with its hilum, vessels and lesions; `medial` is the sign of x towards the other lung.

    `specks` are small dark spots; those near the lung are air in a lesion that is cut off from the rest.
    """
    radius = max(2, round(0.035 * width))
    x0, y0, x1, y1 = _box(lung)
    pad = 2 * radius + 2
    rows = slice(max(0, y0 - pad), min(lung.shape[0], y1 + pad))
    columns = slice(max(0, x0 - pad), min(lung.shape[1], x1 + pad))
    part = np.pad(lung[rows, columns], pad)
    dots = np.pad(specks[rows, columns], pad)
    if dots.any():
        # From the lung on, each spot is reached from the one before.
        chain = ndimage.distance_transform_edt(~(part | dots)) <= 0.8 * radius
        part |= dots & _touching(chain, part)
    far = ndimage.distance_transform_edt(~part)
    closed = _filled((ndimage.distance_transform_edt(far <= radius) > radius) | part)
    full = lung_outline.complete(closed, np.pad(view.smooth[rows, columns], pad, mode="edge"), medial)
    out = np.zeros(lung.shape, bool)
    out[rows, columns] = full[pad:-pad, pad:-pad]
    return out & view.body
