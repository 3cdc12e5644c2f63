"""Figures of saliency maps: one image with its map and the overlay."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

import numpy as np

from lungjax.data.imaging import images
from lungjax.data.safe_text import cut
from lungjax.explain import saliency
from lungjax.explain.saliency import Explainer
from lungjax.report import style

if TYPE_CHECKING:  # the service imports this file, but not grain
    from lungjax.data.pipeline import Reader

CHUNK = 64  # images in memory at a time


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
    best = int(probabilities.argmax())
    predicted = f"{style.short(classes[best], 24)} {style.percent(float(probabilities[best]))}"  # such as "COV 93%"
    empty = "" if heat.any() else ": no evidence"
    titles = ("Image", f"{saliency.TITLES[method]} for {style.short(classes[target], 22)}{empty}", "Overlay")
    tall = image.shape[0] / image.shape[1]
    figure = style.figure(10.2, 3.2 * tall + 0.9, layout="compressed")
    figure.suptitle(f"{predicted}  ·  {style.short(name, 60)}", fontsize=11, color=style.INK)
    plain = image[..., 0] if image.shape[-1] == 1 else image
    pictures = (plain, saliency.heat_colors(clipped), saliency.overlay(image, clipped))
    for axis, picture, title in zip(figure.subplots(1, 3), pictures, titles, strict=True):
        axis.imshow(picture, cmap="gray", vmin=0, vmax=255)
        axis.set_title(title, fontsize=9.5, color=style.INK)
        axis.set_axis_off()
    style.save(figure, path)


def visible(heat: np.ndarray, method: str) -> np.ndarray:
    """Returns the map to draw: integrated gradients are clipped, because single pixels dominate them."""
    if method != "integrated_gradients" or not heat.any():
        return heat
    return np.minimum(heat / np.percentile(heat[heat > 0], 98), 1)


def file_name(name: str, used: set[str]) -> str:
    """Returns a file name, not yet in `used`, for an image, and adds it to `used`."""
    parts = [part for part in PurePath(name).parts if part not in ("/", "..")]
    stem = "_".join(parts).removesuffix(next((end for end in images.SUFFIXES if name.lower().endswith(end)), ""))
    plain = cut("".join(c if c.isalnum() or c in "-_.#" else "_" for c in stem)) or "image"
    numbered = (f"{plain}_{number}" for number in itertools.count(2))
    unique = next(each for each in itertools.chain([plain], numbered) if each not in used)
    used.add(unique)
    return unique


def draw_images(
    explainer: Explainer,
    pictures: Iterable[tuple[str, np.ndarray]],
    classes: Sequence[str],
    methods: Sequence[str],
    target: int | None,
    out: Path,
    bad: list[str],
) -> int:
    """Writes NAME_METHOD.png for each image and method into the folder `out`; returns the number of images.

    Adds the errors of figures that can't be written to `bad`.

    `pictures` yields the name and the network input, uint8 [H, W, C], of each image. `target` is the class to explain,
    or None for the predicted one.
    """
    used: set[str] = set()
    count, remaining = 0, iter(pictures)
    while chunk := list(itertools.islice(remaining, CHUNK)):
        names = [file_name(name, used) for name, _ in chunk]
        stack = np.stack([pixels for _, pixels in chunk])
        for method in methods:
            maps, probabilities = explainer.maps(stack, target, method)
            for name, image, heat, p in zip(names, stack, maps, probabilities, strict=True):
                explained = int(p.argmax()) if target is None else target
                try:
                    draw(out / f"{name}_{method}.png", name, image, heat, p, classes, explained, method)
                except OSError as error:
                    bad.append(str(error))
        count += len(chunk)
    return count


def split_pictures(reader: "Reader", split: str, count: int | None, bad: list[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields CLASS/FILE and pixels of `count` evenly spaced images of a split (None: all).

    Adds the errors of unreadable images to `bad`.
    """
    data, rows = reader.data, np.unique(reader.data.rows(split))
    for i in np.linspace(0, len(rows) - 1, min(count or len(rows), len(rows))).round().astype(int):
        row = int(rows[i])
        try:
            yield f"{data.classes[data.columns['label'][row]]}/{data.columns['file'][row]}", reader(row)
        except ValueError as error:
            bad.append(str(error))
