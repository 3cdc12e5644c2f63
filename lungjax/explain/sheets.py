"""Pictures of what a network looked at, for files and for a whole split, and what its maps are worth."""

import csv
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from lungjax import datasets
from lungjax.config import Config
from lungjax.data import pipeline
from lungjax.data.prepared import Prepared
from lungjax.explain import panels, quality, saliency
from lungjax.explain.saliency import Explainer
from lungjax.report import style

TILES = (4, 7)  # columns and rows of a sheet
READ = 64  # images of a split in memory at a time
TO_MEASURE = 100  # images, for --quality


def explain_images(
    explainer: Explainer,
    pictures: Iterable[tuple[str, np.ndarray]],
    classes: Sequence[str],
    methods: Sequence[str],
    target: int | None,
    out: Path,
    save_maps: bool = False,
) -> int:
    """Writes a picture of each image and method; returns the number of images.

    Args:
      explainer: of the network.
      pictures: name and pixels, uint8 [H, W, C] as the network gets them, of each image.
      classes: of the network.
      methods: of METHODS.
      target: number of the class explained, None for the predicted one.
      out: a folder that is there.
      save_maps: writes NAME_METHOD.npy too.
    """
    used: set[str] = set()
    count, rest = 0, iter(pictures)
    while chunk := list(islice(rest, READ)):
        names = [panels.file_name(name, used) for name, _ in chunk]
        stack = np.stack([pixels for _, pixels in chunk])
        targets = None if target is None else np.full(len(stack), target)
        for method in methods:
            maps, probabilities = explainer.maps(stack, targets, method)
            for name, image, heat, p in zip(names, stack, maps, probabilities, strict=True):
                about = int(p.argmax()) if target is None else target
                panels.draw(out / f"{name}_{method}.png", name, image, heat, p, classes, about, method)
                if save_maps:
                    np.save(out / f"{name}_{method}.npy", heat)
        count += len(chunk)
    return count


def explain_split(
    explainer: Explainer,
    data: Prepared,
    split: str,
    method: str,
    target: int | None,
    out: Path,
    count: int | None = None,
) -> list[str]:
    """Draws page_001.png, ... of a split, the surest answers first, and index.csv; returns what could not be read.

    With `count` so many images are drawn, at even distances in that order. Wrong answers are framed and named.
    Raises ValueError if the split has no image that can be read.
    """
    bad: list[str] = []
    reader = pipeline.Reader(data, explainer.spec)
    found: dict[int, np.ndarray] = {}
    for rows in _chunks(np.unique(data.rows(split)).tolist()):
        pixels, kept = _read_rows(reader, rows, bad)
        if kept:
            found.update(zip(kept, explainer.probabilities(np.stack(pixels)), strict=True))
    if not found:
        raise ValueError(f"{data.name}: no image of the {split} split could be read\n  " + "\n  ".join(bad))
    order = sorted(found, key=lambda row: -float(found[row].max()))
    order = [order[i] for i in np.linspace(0, len(order) - 1, min(count or len(order), len(order))).round().astype(int)]
    out.mkdir(parents=True, exist_ok=True)
    columns, size = data.columns, TILES[0] * TILES[1]
    names = ("file", "group", "source")
    pages = math.ceil(len(order) / size)
    with (out / "index.csv").open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(
            ["rank", "page", *names, "label", "predicted", "wrong", *(f"p_{name}" for name in data.classes)]
        )
        for page in range(pages):
            rows = order[page * size : (page + 1) * size]
            pixels = [reader(row) for row in rows]
            targets = None if target is None else np.full(len(rows), target)
            maps, _ = explainer.maps(np.stack(pixels), targets, method)
            tiles = []
            for i, row in enumerate(rows):
                label, said = int(columns["label"][row]), int(found[row].argmax())
                told = [str(columns[name][row]) for name in names]
                place = [page * size + i + 1, f"page_{page + 1:03}.png"]
                wrong = "yes" if said != label else "no"
                chances = [f"{p:.6g}" for p in found[row]]
                writer.writerow([*place, *told, data.classes[label], data.classes[said], wrong, *chances])
                tiles.append((told[0], pixels[i], panels.visible(maps[i], method), label, found[row]))
            about = "the predicted class" if target is None else data.classes[target]
            heading = (
                f"{data.name}, {split}: {panels.TITLES[method]} for {about}, page {page + 1} of {pages}, surest first"
            )
            sheet(out / f"page_{page + 1:03}.png", heading, tiles, data.classes)
    return bad


def sheet(path: Path, heading: str, tiles: Sequence[tuple[Any, ...]], classes: Sequence[str]) -> None:
    """Draws one page: of each tile (name, image, map, label, probabilities) the image and its overlay."""
    columns, rows = min(TILES[0], len(tiles)), math.ceil(len(tiles) / TILES[0])
    tall = tiles[0][1].shape[0] / tiles[0][1].shape[1]
    figure = style.figure(2.9 * max(columns, 2), (1.4 * tall + 0.62) * rows + 0.5, layout="compressed")
    figure.suptitle(style.plain(heading), fontsize=11, color=style.INK)
    axes = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, (name, image, heat, label, p) in zip(axes, tiles, strict=False):
        wrong = int(p.argmax()) != label
        both = np.concatenate([np.broadcast_to(image, (*image.shape[:2], 3)), saliency.overlay(image, heat)], axis=1)
        axis.imshow(both)
        color = style.WRONG if wrong else style.INK
        last = f"wrong, true: {style.short(classes[label], 24)}" if wrong else "right"
        axis.set_title(
            f"{style.short(name, 34)}\n{panels.said(p, classes)}\n{last}", fontsize=7.5, color=color, loc="left"
        )
        if wrong:
            axis.set_axis_on()
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[:].set(color=style.WRONG, linewidth=2.5)
    style.save(figure, path)


def measure_quality(
    explainer: Explainer,
    config: Config,
    classes: Sequence[str],
    step: int,
    data: Prepared | None,
    methods: Sequence[str],
    target: int | None,
    out: Path,
    count: int,
    say: Callable[[str], None] = print,
) -> list[str]:
    """Writes quality.json and quality.md into `out`; returns what could not be read.

    Measured is on `count` images of the test split of `data`, at even distances, without the pointing game; where
    `data` is None, for a network of phantom_ct, on as many new drawn patients with true lesion masks. `config`,
    `classes` and `step` are those of the run.
    """
    bad: list[str] = []
    if data is None:
        name = datasets.resolve(config.data.dataset)[0]
        slices = quality.draw_slices(classes, explainer.spec, name, count)
        found = quality.measure(explainer, slices.images, None, methods, slices, say=say)
        what = f"{count} drawn slices with a lesion, each of a new patient"
    else:
        rows = np.unique(data.rows("test"))
        rows = rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int)]
        pixels, _ = _read_rows(pipeline.Reader(data, explainer.spec), rows.tolist(), bad)
        if not pixels:
            raise ValueError(f"{data.name}: no image of the test split could be read\n  " + "\n  ".join(bad))
        targets = None if target is None else np.full(len(pixels), target)
        found = quality.measure(explainer, np.stack(pixels), targets, methods, say=say)
        what = f"{len(pixels)} images of the test split of {data.name}, whose lesions nobody marked"
    content = {"name": config.name, "step": step, "images": what, "methods": found}
    (out / "quality.json").write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", "utf-8")
    page = quality.markdown(config.name, what, found)
    (out / "quality.md").write_text(page, "utf-8")
    say(page)
    return bad


def _read_rows(reader: pipeline.Reader, rows: Sequence[int], bad: list[str]) -> tuple[list[np.ndarray], list[int]]:
    pixels, kept = [], []
    for row in rows:
        try:
            pixels.append(reader(row))
            kept.append(row)
        except ValueError as error:
            bad.append(str(error))
    return pixels, kept


def _chunks(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for at in range(0, len(items), READ):
        yield items[at : at + READ]
