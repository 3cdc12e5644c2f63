"""The masks of two studies as published, for `protocol=study`; `lung_masks` has more robust ones.

CT-COV19 (github.com/marta-0/covid-ct): body mask from OpenCV contours and lung mask from a snake, both at 512 x 512.
iCTCF (github.com/kaclewtak/Classifying-CT-Scans-for-COVID-19-Classification): "preprocessed" images from a local
threshold. OpenCV's steps are reimplemented with scikit-image and scipy, following the actual effect of the published
arguments, not their intent (erosion and dilation run once, not ten times and twice).
"""

import numpy as np
from PIL import Image
from scipy import ndimage, spatial
from skimage import draw, filters, measure, segmentation, transform
from skimage.morphology import closing, disk, erosion

from lungjax.data.imaging.images import Region, bounding_box, full_region

STAGES = ("study_nobackg", "study_crop", "study_lungs_nocrop", "study_lungs", "features")

SIDE = 512
THRESHOLD = 150
MARGIN = int(0.05 * SIDE)
CANNY = (240, 255)
SQUARE = np.ones((3, 3), bool)
Box = tuple[int, int, int, int]  # xmin, ymin, xmax, ymax in pixels, max exclusive


def apply(image: np.ndarray, stage: str) -> tuple[np.ndarray, Region, bool]:
    """Returns a stage (uint8 [h, w]) of a gray uint8 image [H, W], its region, and whether body or lungs were found.

    `stage` is one of `STAGES`. CT-COV19's stages show the image at 512 x 512, `features` at its own size, but at most
    512 x 512. If the body or lungs were not found, the result is the previous stage.
    """
    region = full_region(image)
    if stage == "features":
        picture = features(image)
        return (picture, region, True) if picture.any() else (image, region, False)
    square = resize(image)
    body = body_mask(square)
    if body is None or not (picture := np.where(body, square, 0).astype(np.uint8)).any():
        return square, region, False
    box, found = without_arms(picture, bounding_box(body)), True
    if "lungs" in stage:
        lung = snake_mask(picture)
        inside = np.where(lung, picture, 0).astype(np.uint8)
        if found := bool(inside.any()):
            picture, box = inside, bounding_box(lung)
    if stage in ("study_nobackg", "study_lungs_nocrop"):
        return picture, region, found
    x0, y0, x1, y1 = box
    across, down = image.shape[1] / SIDE, image.shape[0] / SIDE
    return picture[y0:y1, x0:x1], (x0 * across, y0 * down, x1 * across, y1 * down), found


def without_arms(picture: np.ndarray, box: Box) -> Box:
    """Returns a body's box with its top at the first non-zero pixel of the middle column, which drops raised arms."""
    column = np.flatnonzero(picture[:, picture.shape[1] // 2])
    x0, y0, x1, y1 = box
    return x0, (int(np.clip(column[0], y0, y1 - 1)) if len(column) else y0), x1, y1


def resize(image: np.ndarray) -> np.ndarray:
    """Returns a gray uint8 image resized to 512 x 512, bilinearly and without antialiasing, as in OpenCV."""
    if image.shape == (SIDE, SIDE):
        return image
    big = transform.resize(image, (SIDE, SIDE), order=1, mode="edge", anti_aliasing=False, preserve_range=True)
    return np.rint(big).astype(np.uint8)


def body_mask(square: np.ndarray) -> np.ndarray | None:
    """Returns the CT-COV19 study's body mask of a gray image [h, w], without its unused repair; None without edges.

    The steps are threshold 150, margin, erosion, Canny, dilation, and the longest contour, filled.
    """
    bright = np.pad(square > THRESHOLD, MARGIN)
    bright = ndimage.binary_erosion(bright, SQUARE, border_value=1)
    lines = ndimage.binary_dilation(canny(np.where(bright, 0, 255).astype(np.uint8), *CANNY), SQUARE)
    best = longest_contour(lines)
    return None if best is None else best[MARGIN:-MARGIN, MARGIN:-MARGIN]


def canny(image: np.ndarray, low: float, high: float) -> np.ndarray:
    """Returns OpenCV's Canny edges, bool [h, w]: 3x3 Sobel, L1 norm; scikit-image smooths, and uses the L2 norm."""
    values = image.astype(np.int32)
    dx = ndimage.sobel(values, axis=1, mode="nearest")
    dy = ndimage.sobel(values, axis=0, mode="nearest")
    size = np.abs(dx) + np.abs(dy)
    p = np.pad(size, 1)

    def at(down: int, right: int) -> np.ndarray:
        return p[1 + down : 1 + down + size.shape[0], 1 + right : 1 + right + size.shape[1]]

    flat = np.abs(dy) < np.tan(np.pi / 8) * np.abs(dx)
    steep = np.abs(dy) > np.tan(3 * np.pi / 8) * np.abs(dx)
    falling = (dx < 0) ^ (dy < 0)
    across = (size > at(0, -1)) & (size >= at(0, 1))
    down = (size > at(-1, 0)) & (size >= at(1, 0))
    slant = np.where(falling, (size > at(-1, 1)) & (size > at(1, -1)), (size > at(-1, -1)) & (size > at(1, 1)))
    crest = np.where(flat, across, np.where(steep, down, slant))
    return filters.apply_hysteresis_threshold(np.where(crest, size, 0), low, high)


def longest_contour(lines: np.ndarray) -> np.ndarray | None:
    """Returns the filled contour that the study selects, bool [h, w]; None without contours.

    Contours are the outlines of components and of holes, without hierarchy. Processed in order, a contour replaces the
    best one so far if its closed length or the perimeter of its convex hull is greater.
    """
    best: tuple[float, float, tuple[slice, slice], np.ndarray] | None = None
    for place, filled in _contours(lines):
        length, around = measure.perimeter(filled, neighborhood=4), _hull_length(filled)
        if best is None or length > best[0] or around > best[1]:
            best = length, around, place, filled
    if best is None:
        return None
    out = np.zeros(lines.shape, bool)
    out[best[2]] = best[3][1:-1, 1:-1]
    return out


def _contours(lines: np.ndarray) -> list[tuple[tuple[slice, slice], np.ndarray]]:
    """Returns each contour's box and its filled area with a margin of one pixel, from the bottom up as OpenCV does."""
    components = measure.regionprops(measure.label(lines, connectivity=2))
    out = [(region.slice, np.pad(region.image_filled, 1)) for region in components]
    # OpenCV's outline of a hole consists of the pixels around it, so it includes them.
    holes = segmentation.clear_border(measure.label(~lines, connectivity=1))
    for region in measure.regionprops(holes):
        rows, columns = (slice(s.start - 1, s.stop + 1) for s in region.slice)
        filled = np.pad(ndimage.binary_dilation(np.pad(region.image_filled, 1)), 1)
        out.append(((rows, columns), filled))
    return sorted(out, key=lambda c: (-c[0][0].start, -c[0][1].start))


def _hull_length(filled: np.ndarray) -> float:
    points = np.argwhere(filled)
    if (np.ptp(points, 0) == 0).any():
        return 2.0 * float(np.ptp(points, 0).max())
    return float(spatial.ConvexHull(points).area)  # in two dimensions, scipy's "area" is the perimeter


def snake_mask(bare: np.ndarray, iterations: int = 2500) -> np.ndarray:
    """Returns the CT-COV19 study's lung mask, bool 512 x 512, of a body without background, uint8 512 x 512.

    A snake of 500 points shrinks from a circle of radius 250 around the body; it includes the tissue between the
    lungs. The study corrected some masks by hand, which can't be reproduced.
    """
    height, width = bare.shape
    column, row = np.flatnonzero(bare[:, width // 2]), np.flatnonzero(bare[height // 2])
    y = (column[0] + column[-1]) / 2 if len(column) else height / 2
    x = (row[0] + row[-1]) / 2 if len(row) else width / 2
    turn = np.linspace(0, 2 * np.pi, 500)
    circle = np.stack([y + 250 * np.sin(turn), x + 250 * np.cos(turn)], 1)
    snake = segmentation.active_contour(
        filters.gaussian(bare, 3), circle, alpha=0.1, beta=10, gamma=0.001, w_line=1, w_edge=1, max_num_iter=iterations
    )
    rows, columns = draw.polygon(*snake.astype(int).T, shape=bare.shape)
    mask = np.zeros(bare.shape, bool)
    mask[rows, columns] = True
    return mask


def features(image: np.ndarray) -> np.ndarray:
    """Returns the iCTCF study's "preprocessed" image of a gray uint8 image [H, W], uint8.

    Images with a side above 512 are resized to 512 x 512 (bicubic). A local Gaussian threshold over 401 pixels, erosion
    with disk(4), closing with disk(6), Roberts edges and hole filling give a mask, from which the largest bright
    component, the tissue of the body, is removed. Pixels outside the mask become black. The published "small regions"
    step, which has no effect, and the JPEG compression between steps are omitted.
    """
    if max(image.shape) > SIDE:
        image = np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    gray = image / 255.0
    bright = gray > filters.threshold_local(gray, 401, method="gaussian")
    if not bright.any():
        return np.zeros_like(image)
    solid = closing(erosion(bright, disk(4)), disk(6))
    inside = ndimage.binary_fill_holes(filters.roberts(solid) > 0)
    labels = measure.label(bright, connectivity=1)
    tissue = labels == np.bincount(labels[bright]).argmax()
    return np.where(inside & ~tissue, image, 0).astype(np.uint8)
