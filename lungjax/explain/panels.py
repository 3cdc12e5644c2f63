"""A picture for one image and one heat map: original, map, and both in one, with what the network said."""

import itertools
from collections.abc import Sequence
from pathlib import Path, PurePath

import numpy as np

from lungjax.data.imaging import images
from lungjax.explain import saliency
from lungjax.report import style

TITLES = dict(
    zip(
        saliency.METHODS,
        ("Grad-CAM", "Guided weights", "Grad-CAM++", "Integrated gradients", "Occlusion"),
        strict=True,
    )
)


def draw(
    path: Path,
    name: str,
    image: np.ndarray,
    heat: np.ndarray,
    probabilities: np.ndarray,
    classes: Sequence[str],
    about: int,
    method: str,
) -> None:
    """Writes the picture as PNG, whole or not at all.

    Args:
      path: of the file.
      name: of the image, for the heading.
      image: uint8 [H, W, 1 or 3].
      heat: [H, W] in 0..1.
      probabilities: [classes].
      classes: names in that order.
      about: the class that the map explains.
      method: one of `saliency.METHODS`.
    """
    shown = visible(heat, method)
    heading = f"{said(probabilities, classes)}  ·  {style.short(name, 60)}"
    empty = "" if heat.any() else ": no evidence"
    titles = ("Original", f"{TITLES[method]} for {style.short(classes[about], 22)}{empty}", "Both")
    tall = image.shape[0] / image.shape[1]
    figure = style.figure(10.2, 3.2 * tall + 0.9, layout="compressed")
    figure.suptitle(heading, fontsize=11, color=style.INK)
    plain = image[..., 0] if image.shape[-1] == 1 else image
    pictures = (plain, saliency.heat_colors(shown), saliency.overlay(image, shown))
    for axis, picture, title in zip(figure.subplots(1, 3), pictures, titles, strict=True):
        axis.imshow(picture, cmap="gray", vmin=0, vmax=255)
        axis.set_title(title, fontsize=9.5, color=style.INK)
        axis.set_axis_off()
    style.save(figure, path)


def visible(heat: np.ndarray, method: str) -> np.ndarray:
    """Returns the map as it is drawn: single pixels of integrated gradients outshine all else, so they are clipped."""
    if method != "integrated_gradients" or not heat.any():
        return heat
    return np.minimum(heat / np.percentile(heat[heat > 0], 98), 1)


def said(probabilities: np.ndarray, classes: Sequence[str]) -> str:
    """Returns the predicted class and its probability, such as "COV 93%"."""
    best = int(probabilities.argmax())
    return f"{style.short(classes[best], 24)} {style.percent(float(probabilities[best]))}"


def file_name(name: str, used: set[str]) -> str:
    """Returns a plain name for the picture of an image, and adds it to `used`: two images never get the same."""
    parts = [part for part in PurePath(name).parts if part not in ("/", "..")]
    stem = "_".join(parts).removesuffix(next((end for end in images.SUFFIXES if name.lower().endswith(end)), ""))
    plain = "".join(c if c.isalnum() or c in "-_.#" else "_" for c in stem) or "image"
    free = (plain if number == 1 else f"{plain}_{number}" for number in itertools.count(1))
    found = next(other for other in free if other not in used)
    used.add(found)
    return found
