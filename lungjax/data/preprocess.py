"""What a data set keeps of an image, its stage and size, and how one image then becomes a network's input.

Preparing a data set and predicting go through the same steps here: a 16-bit image is shrunk before its window is
applied, and windowed before a stage is cut out.
"""

from typing import Any

import numpy as np

from lungjax.config.metadata import Metadata
from lungjax.data.imaging import images

Box = tuple[float, float, float, float]  # xmin, ymin, xmax, ymax in pixels, max exclusive


def version(array: np.ndarray, box: Box, stage: str, size: tuple[int, int] | None) -> tuple[np.ndarray, Box, Box, bool]:
    """Returns an image in a stage (gray uint8 [H, W] then) and shrunk to a size, both or neither.

    Also the box in its pixels, what of the original it shows (xmin, ymin, xmax, ymax), and whether the stage found
    a body or lung. `array` is uint8, uint16, or float32 in 0..255.
    """
    whole = (0.0, 0.0, float(array.shape[1]), float(array.shape[0]))
    region, found = whole, True
    if stage:
        # Here: scikit-image takes a second, and most data sets need none of it.
        from lungjax.data.imaging import lung_masks

        staged = lung_masks.apply(array, stage)
        array, region, found = staged.image, staged.region, staged.found
        box = moved(box, region, array.shape)
    if size:
        box = moved(box, (0.0, 0.0, float(array.shape[1]), float(array.shape[0])), size)
        array = _shrunk(array, size)
    return array, box, region, found


def keep(
    array: np.ndarray,
    box: Any = None,
    stage: str = "",
    size: tuple[int, int] | None = None,
    window: tuple[float, float] | None = None,
) -> tuple[np.ndarray, np.ndarray, bool]:
    """Returns what a data set keeps of an image, for `images.to_input`: image, box, and whether a stage was found.

    Args:
      array: [H, W] or [H, W, 3], uint8, uint16, or float32 in 0..255.
      box: xmin, ymin, xmax, ymax in its pixels; None is the whole image.
      stage: such as "lungs"; "" is the image as it is.
      size: height and width of the stored copy; None leaves it.
      window: of 16-bit images, which become float32 in 0..255.

    Raises ValueError for a 16-bit image without a window.
    """
    place = (0.0, 0.0, float(array.shape[1]), float(array.shape[0])) if box is None else tuple(map(float, box))
    if array.dtype == np.uint16 and window is None:
        raise ValueError(
            "a 16-bit image, and the network was trained on 8-bit ones: which of its values are black and white is not "
            "known; lungjax.predict takes --window=low,high"
        )
    found = True
    if stage:
        array = images.gray(_plain(array, window))
    elif size and array.dtype != np.uint16:
        array = _plain(array, window)
    if stage or size:
        array, place, _, found = version(array, place, stage, size)  # type: ignore[arg-type]
    if array.dtype == np.uint16 and window:
        array = images.show(array, window)
    return array, np.asarray(place, np.float32), found


def picture(
    array: np.ndarray, told: Metadata, box: Box | None = None, prepared: bool = False
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Returns an image as a trained network's input, uint8 [H, W, C], what was kept of it before, and warnings.

    Args:
      array: as in `keep`.
      told: what the network says of itself.
      box: of the body in pixels; None finds it where the network was trained on it and it can be found.
      prepared: the image is cut out already as the training images were.

    Raises ValueError as `keep`.
    """
    warnings: list[str] = []
    if box is None and told.box and not prepared:
        box = body_box(_plain(array, told.window)) if told.box == "body" else None
        if box is None:
            warnings.append("the network was trained on the body's box, which is not known here: it gets all of it")
    stage, stored = ("", None) if prepared else (told.stage, told.stored)
    kept, place, found = keep(array, box, stage, stored, told.window)
    if not found:
        warnings.append(f"no body or lung was found in it, so it is shown as it is and not as {stage!r}")
    return images.to_input(kept, place, told.input, 0.0), kept, warnings


def body_box(array: np.ndarray) -> Box | None:
    """Returns the box around the body in a CT slice; None if nothing stands out from the background."""
    from lungjax.data.imaging import lung_masks  # as above

    found = np.argwhere(lung_masks.body_mask(images.gray(array)))
    if not len(found):
        return None
    (top, left), (bottom, right) = found.min(0), found.max(0) + 1
    return float(left), float(top), float(right), float(bottom)


def moved(box: Box, region: Box, shape: tuple[int, ...]) -> Box:
    """Returns `box` in the pixels of a picture of `shape` (height, width) that shows `region`; all of it if apart."""
    down, across = shape[0] / (region[3] - region[1]), shape[1] / (region[2] - region[0])
    # Clipped after scaling, since 256 * (224 / 256) may be a little more than 224, which TFDS refuses.
    left, right = (min(max((v - region[0]) * across, 0.0), float(shape[1])) for v in (box[0], box[2]))
    top, bottom = (min(max((v - region[1]) * down, 0.0), float(shape[0])) for v in (box[1], box[3]))
    if right - left < 1 or bottom - top < 1:
        return (0.0, 0.0, float(shape[1]), float(shape[0]))
    return (left, top, right, bottom)


def _plain(array: np.ndarray, window: tuple[float, float] | None) -> np.ndarray:
    """Returns 8 bits: of 16 by the window, where there is one."""
    if array.dtype == np.uint16 and window:
        array = images.show(array, window)
    return array if array.dtype in (np.uint8, np.uint16) else np.rint(array).astype(np.uint8)


def _shrunk(array: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    whole = (0.0, 0.0, float(array.shape[1]), float(array.shape[0]))
    if array.dtype == np.uint8:
        return images.resize(array, whole, size, "bilinear", True)
    return np.rint(images.resize(array.astype(np.float32), whole, size, "bilinear", True)).astype(np.uint16)
