"""Figures of saliency maps: one image with its map and the overlay, and contact sheets of a split."""

import csv
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

import numpy as np

from lungjax.config.metadata import Metadata
from lungjax.data.imaging import images
from lungjax.data.safe_text import csv_row, cut
from lungjax.explain import saliency
from lungjax.explain.saliency import Explainer
from lungjax.report import contact_sheet, style
from lungjax.report.contact_sheet import FRAME, Section, Tile

if TYPE_CHECKING:  # the service imports this file, but not grain
    from lungjax.data.pipeline import Reader

Explain = Callable[[np.ndarray, int | None, str], tuple[np.ndarray, np.ndarray]]  # as `Explainer.maps`

TILES = (4, 7)  # columns and rows of a contact sheet
CHUNK = 64  # images in memory at a time


def draw(
    stem: Path,
    name: str,
    image: np.ndarray,
    heat: np.ndarray,
    probabilities: np.ndarray,
    metadata: Metadata,
    target: int,
    method: str,
) -> None:
    """Writes STEM_METHOD.png with the map of the class `target`, or STEM_FINDING_METHOD.png, atomically.

    `image` is uint8 [H, W, 1 or 3], `heat` [H, W] in 0..1, `probabilities` [C], `method` one of `saliency.METHODS`.
    """
    clipped = visible(heat, method)
    classes, shown = metadata.classes, target if metadata.multilabel else int(probabilities.argmax())
    heading = f"{_with_percent(classes, probabilities, shown)}  ·  {style.short(name, 60)}"
    empty = "" if heat.any() else ": no evidence"
    titles = ("Image", f"{saliency.TITLES[method]} for {style.short(classes[target], 22)}{empty}", "Overlay")
    tall = image.shape[0] / image.shape[1]
    figure = style.figure(10.2, 3.2 * tall + 0.9, layout="compressed")
    figure.suptitle(heading, fontsize=11, color=style.INK)
    plain = image[..., 0] if image.shape[-1] == 1 else image
    pictures = (plain, saliency.heat_colors(clipped), saliency.overlay(image, clipped))
    for axis, picture, title in zip(figure.subplots(1, 3), pictures, titles, strict=True):
        axis.imshow(picture, cmap="gray", vmin=0, vmax=255)
        axis.set_title(title, fontsize=9.5, color=style.INK)
        axis.set_axis_off()
    of = f"_{file_name(classes[target], set())}" if metadata.multilabel else ""
    style.save(figure, stem.with_name(f"{stem.name}{of}_{method}.png"))


def visible(heat: np.ndarray, method: str) -> np.ndarray:
    """Returns the map to draw: integrated gradients are clipped, because single pixels dominate them."""
    if method != "integrated_gradients" or not heat.any():
        return heat
    return np.minimum(heat / np.percentile(heat[heat > 0], 98), 1)


def _with_percent(classes: Sequence[str], probabilities: np.ndarray, index: int) -> str:
    return f"{style.short(classes[index], 24)} {style.percent(float(probabilities[index]))}"


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
    explain: Explain,
    pictures: Iterable[tuple[str, np.ndarray, np.ndarray]],
    metadata: Metadata,
    methods: Sequence[str],
    target: int | None,
    out: Path,
    bad: list[str],
) -> int:
    """Writes the figures of `draw` for each image and method into the folder `out`; returns the number of images.

    `pictures` yields the name of each image, the network input, and the image to draw, uint8 [H, W, C]; `target` is the
    class to explain; None is the predicted one, or every finding. Adds the errors of figures that
    can't be written to `bad`.
    """
    used: set[str] = set()
    count, remaining = 0, iter(pictures)
    targets = range(len(metadata.classes)) if target is None and metadata.multilabel else [target]
    while chunk := list(itertools.islice(remaining, CHUNK)):
        names = [file_name(name, used) for name, *_ in chunk]
        stack = np.stack([pixels for _, pixels, _ in chunk])
        for method, chosen in itertools.product(methods, targets):
            maps, probabilities = explain(stack, chosen, method)
            for name, (*_, image), heat, p in zip(names, chunk, maps, probabilities, strict=True):
                explained = int(p.argmax()) if chosen is None else chosen
                try:
                    draw(out / name, name, image, heat, p, metadata, explained, method)
                except OSError as error:
                    bad.append(str(error))
        count += len(chunk)
    return count


def draw_split(
    explainer: Explainer,
    reader: "Reader",
    split: str,
    method: str,
    target: int | None,
    out: Path,
    count: int | None = None,
) -> list[str]:
    """Writes index.csv and page_001.png, ... for a split, most confident first; returns errors of unreadable images.

    `count` limits the number of images, which are evenly spaced in this order. Wrong predictions have a colored frame.
    Several findings need a `target`, on which they are judged. Raises ValueError if no image of the split can be read.
    """
    bad: list[str] = []
    data = reader.data
    scores: dict[int, np.ndarray] = {}
    split_rows, labels, classes = np.unique(data.rows(split)), data.columns["label"], data.classes
    if labels.ndim == 2:
        if target is None:
            raise ValueError(f"--split={split}: choose a finding with --class, one of {', '.join(classes)}")
        labels, classes = labels[:, target], (f"no {classes[target]}", classes[target])
        split_rows = split_rows[labels[split_rows] >= 0]
    for start in range(0, len(split_rows), CHUNK):
        pixels, rows = read_rows(reader, split_rows[start : start + CHUNK].tolist(), bad)
        if rows:
            p = explainer.probabilities(np.stack(pixels))
            p = p if data.columns["label"].ndim == 1 else np.stack([1 - p[:, target], p[:, target]], axis=1)
            scores.update(zip(rows, p, strict=True))
    if not scores:
        raise ValueError("\n  ".join([f"{data.name}: no image of the {split} split could be read", *bad]))
    order = evenly_spaced(sorted(scores, key=lambda row: -float(scores[row].max())), count or len(scores))
    out.mkdir(parents=True, exist_ok=True)
    columns, size = data.columns, TILES[0] * TILES[1]
    names, pages = ("file", "group", "source"), math.ceil(len(order) / size)
    with (out / "index.csv").open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file, lineterminator="\n")
        head = ["rank", "page", *names, "label", "predicted", "wrong", *(f"p_{name}" for name in classes)]
        writer.writerow(csv_row(head))
        for page in range(pages):
            rows = order[page * size : (page + 1) * size]
            pixels = [reader(row) for row in rows]
            maps, _ = explainer.maps(np.stack(pixels), target, method)
            tiles = []
            for rank, (row, image, heat) in enumerate(zip(rows, pixels, maps, strict=True), page * size + 1):
                p, label, ids = scores[row], labels[row], [str(columns[name][row]) for name in names]
                wrong = int(p.argmax()) != label
                verdict = [classes[label], classes[p.argmax()], "yes" if wrong else "no"]
                cells = [rank, f"page_{page + 1:03}.png", *ids, *verdict, *(f"{value:.6g}" for value in p)]
                writer.writerow(csv_row(cells))
                frame, truth = (style.WRONG, f"wrong, true: {classes[label]}") if wrong else (FRAME, "correct")
                tiles += [
                    Tile(image, (ids[0], _with_percent(classes, p, int(p.argmax())), truth), frame=frame, wide=True)
                ]
                tiles += [Tile(image, heat=visible(heat, method), frame=frame)]
            explained = "the predicted class" if target is None else data.classes[target]
            title = f"{data.name}, {split}: {saliency.TITLES[method]} for {explained}, page {page + 1} of {pages}"
            section = Section(tiles, f"{title}, most confident first")
            contact_sheet.draw([section], out / f"page_{page + 1:03}.png", 2 * TILES[0], paired=True, aspect=2.0)
    return bad


def evenly_spaced(items: Sequence[int], count: int) -> list[int]:
    """Returns at most `count` of the items, including the first and the last one."""
    return [items[i] for i in np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)]


def read_rows(reader: "Reader", rows: Sequence[int], bad: list[str]) -> tuple[list[np.ndarray], list[int]]:
    """Returns the pixels and rows of the readable images; adds the errors of the others to `bad`."""
    pixels, readable = [], []
    for row in rows:
        try:
            pixels.append(reader(row))
            readable.append(row)
        except ValueError as error:
            bad.append(str(error))
    return pixels, readable
