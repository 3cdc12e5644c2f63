"""Figure of one image and its saliency map: image, map and overlay, with the prediction."""

import itertools
from collections.abc import Sequence
from pathlib import Path, PurePath

import numpy as np

from lungjax.data.imaging import images
from lungjax.explain import saliency
from lungjax.report import style

NAMES = ("Grad-CAM", "Grad-CAM, positive gradients", "Grad-CAM++", "Integrated gradients", "Occlusion")
TITLES = dict(zip(saliency.METHODS, NAMES, strict=True))


def draw(
    path: Path,
    name: str,
    image: np.ndarray,
    heat: np.ndarray,
    probabilities: np.ndarray,
    classes: Sequence[str],
    target: int,
    method: str,
) -> None:
    """Writes the figure of the class `target` as PNG, atomically.

    `image` is uint8 [H, W, 1 or 3], `heat` [H, W] in 0..1, `probabilities` [C], `method` one of `saliency.METHODS`.
    """
    clipped = visible(heat, method)
    heading = f"{prediction(probabilities, classes)}  ·  {style.short(name, 60)}"
    empty = "" if heat.any() else ": no evidence"
    titles = ("Image", f"{TITLES[method]} for {style.short(classes[target], 22)}{empty}", "Overlay")
    tall = image.shape[0] / image.shape[1]
    figure = style.figure(10.2, 3.2 * tall + 0.9, layout="compressed")
    figure.suptitle(heading, fontsize=11, color=style.INK)
    plain = image[..., 0] if image.shape[-1] == 1 else image
    pictures = (plain, saliency.heat_colors(clipped), saliency.overlay(image, clipped))
    for axis, picture, title in zip(figure.subplots(1, 3), pictures, titles, strict=True):
        axis.imshow(picture, cmap="gray", vmin=0, vmax=255)
        axis.set_title(title, fontsize=9.5, color=style.INK)
        axis.set_axis_off()
    style.save(figure, path)


def visible(heat: np.ndarray, method: str) -> np.ndarray:
    """Returns the map for drawing; integrated gradients are clipped, since single pixels dominate them."""
    if method != "integrated_gradients" or not heat.any():
        return heat
    return np.minimum(heat / np.percentile(heat[heat > 0], 98), 1)


def prediction(probabilities: np.ndarray, classes: Sequence[str]) -> str:
    """Returns the predicted class and its probability, such as "COV 93%"."""
    best = int(probabilities.argmax())
    return f"{style.short(classes[best], 24)} {style.percent(float(probabilities[best]))}"


def file_name(name: str, used: set[str]) -> str:
    """Returns a file name for an image that is not in `used`, and adds it there."""
    parts = [part for part in PurePath(name).parts if part not in ("/", "..")]
    stem = "_".join(parts).removesuffix(next((end for end in images.SUFFIXES if name.lower().endswith(end)), ""))
    plain = "".join(c if c.isalnum() or c in "-_.#" else "_" for c in stem) or "image"
    numbered = (f"{plain}_{number}" for number in itertools.count(2))
    unique = next(each for each in itertools.chain([plain], numbered) if each not in used)
    used.add(unique)
    return unique
