"""Turns an image into network input: orientation, stage, stored size and window of the data set, then crop and resize.

Preparation and prediction share these steps. A 16-bit window is applied before a stage; without a stage, after resizing
to the stored size. Images are upright already: `images.read` applies the EXIF orientation.
"""

import numpy as np

from lungjax.config.metadata import Metadata
from lungjax.data.imaging import images

Box = tuple[float, float, float, float]  # xmin, ymin, xmax, ymax in pixels, max exclusive


def apply_stage(
    array: np.ndarray, box: Box, stage: str, size: tuple[int, int] | None
) -> tuple[np.ndarray, Box, Box, bool]:
    """Returns an image after a stage, resized to `size` (height, width); stage "" or size None skips that step.

    Also returns the box in pixels of the result, the region of the original that it shows, and whether the stage
    detected a body or lung. `array` is uint8 [H, W] or [H, W, 3], or uint16 [H, W]; a stage requires uint8 [H, W].
    """
    region, found = images.full_region(array), True
    if stage:
        from lungjax.data.imaging import lung_masks  # takes a second, for scikit-image

        array, region, found = lung_masks.apply(array, stage)
        box = move_box(box, region, array.shape)
    if size:
        full = images.full_region(array)
        box = move_box(box, full, size)
        values = array if array.dtype == np.uint8 else array.astype(np.float32)
        small = images.resize(values, full, size, "bilinear", True)
        array = small if small.dtype == np.uint8 else np.rint(small).astype(np.uint16)
    return array, box, region, found


def check_window(array: np.ndarray, window: tuple[float, float] | None) -> None:
    """Raises ValueError for a 16-bit image without a window."""
    if array.dtype == np.uint16 and window is None:
        raise ValueError("16-bit image, but the model has no window; pass --window=low,high to lungjax.predict")


def picture(
    array: np.ndarray, metadata: Metadata, box: Box | None = None, prepared: bool = False
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Returns the network input, uint8 [H, W, C], the image before its crop, and warnings.

    `array` is [H, W] or [H, W, 3], uint8, uint16, or float32 in 0..255. The second image is as the data set would store
    it, except that the window maps uint16 to float32 in 0..255. `box` is in pixels of `array`; if it is None, a network
    trained on body boxes gets a detected one. `prepared` images already have the stage and the stored size. Raises
    ValueError for a 16-bit image if the model has no window.
    """
    window, warnings, found = metadata.window, list[str](), True
    check_window(array, window)
    if box is None and metadata.box and not prepared:
        box = body_box(_to_8_bit(array, window)) if metadata.box == "body" else None
        if box is None:
            warnings.append("no body box: the network was trained on body boxes but gets the full image")
    box = box or images.full_region(array)
    if metadata.orientation == "rotated":
        array, box = images.rotate(array, box)
    stage, size = ("", None) if prepared else (metadata.stage, metadata.stored)
    if stage:
        array = images.gray(_to_8_bit(array, window))
    elif size and array.dtype != np.uint16:
        array = _to_8_bit(array, window)
    if stage or size:
        array, box, _, found = apply_stage(array, box, stage, size)
    if not found:
        warnings.append(f"no body or lung detected: the image is used without the stage {stage!r}")
    if array.dtype == np.uint16 and window:
        array = images.show(array, window)
    return images.to_input(array, np.asarray(box, np.float32), metadata.input, 0.0), array, warnings


def body_box(array: np.ndarray) -> Box | None:
    """Returns the box of the body in a CT slice, or None if the body has no contrast with the background."""
    from lungjax.data.imaging import lung_masks  # as above

    mask = lung_masks.body_mask(images.gray(array))
    if not mask.any():
        return None
    left, top, right, bottom = map(float, images.bounding_box(mask))
    return left, top, right, bottom


def move_box(box: Box, region: Box, shape: tuple[int, ...]) -> Box:
    """Returns `box` in pixels of an image of `shape` that shows `region`; the full image if `box` is outside it."""
    down, across = shape[0] / (region[3] - region[1]), shape[1] / (region[2] - region[0])
    # Clipped after scaling: 256 * (224 / 256) may exceed 224, which TFDS refuses.
    left, right = (min(max((v - region[0]) * across, 0.0), float(shape[1])) for v in (box[0], box[2]))
    top, bottom = (min(max((v - region[1]) * down, 0.0), float(shape[0])) for v in (box[1], box[3]))
    if right - left < 1 or bottom - top < 1:
        return (0.0, 0.0, float(shape[1]), float(shape[0]))
    return (left, top, right, bottom)


def _to_8_bit(array: np.ndarray, window: tuple[float, float] | None) -> np.ndarray:
    """Returns 8-bit pixels; 16-bit pixels are unchanged without a window."""
    if array.dtype == np.uint16 and window:
        array = images.show(array, window)
    return array if array.dtype in (np.uint8, np.uint16) else np.rint(array).astype(np.uint8)
