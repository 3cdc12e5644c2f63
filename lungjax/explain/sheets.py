"""Saliency maps of files and of a whole split as figures, and their quality as a page."""

import csv
import json
import math
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from lungjax import datasets
from lungjax.config import Config
from lungjax.data import pipeline
from lungjax.data.prepared import Prepared
from lungjax.explain import panels, quality
from lungjax.explain.saliency import Explainer
from lungjax.report import style
from lungjax.report.contact_sheet import FRAME, Section, Tile, draw

TILES = (4, 7)  # columns and rows of a sheet
CHUNK = 64  # images in memory at a time


def explain_images(
    explainer: Explainer,
    pictures: Iterable[tuple[str, np.ndarray]],
    classes: Sequence[str],
    methods: Sequence[str],
    target: int | None,
    out: Path,
    save_maps: bool = False,
) -> int:
    """Writes NAME_METHOD.png for each image and method into the folder `out`; returns the number of images.

    `pictures` are name and network input uint8 [H, W, C] of each. `target` is the class to explain, None for the
    predicted one. `save_maps` also writes NAME_METHOD.npy.
    """
    used: set[str] = set()
    count, rest = 0, iter(pictures)
    while chunk := list(islice(rest, CHUNK)):
        names = [panels.file_name(name, used) for name, _ in chunk]
        stack = np.stack([pixels for _, pixels in chunk])
        for method in methods:
            maps, probabilities = explainer.maps(stack, target, method)
            for name, image, heat, p in zip(names, stack, maps, probabilities, strict=True):
                explained = int(p.argmax()) if target is None else target
                panels.draw(out / f"{name}_{method}.png", name, image, heat, p, classes, explained, method)
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
    """Writes index.csv and page_001.png, ... of a split by falling confidence; returns the unreadable images.

    With `count` only that many images, evenly spaced in that order. Wrong predictions are framed. Raises ValueError if
    no image of the split can be read.
    """
    bad: list[str] = []
    reader = pipeline.Reader(data, explainer.spec)
    scores: dict[int, np.ndarray] = {}
    split_rows = np.unique(data.rows(split)).tolist()
    for start in range(0, len(split_rows), CHUNK):
        pixels, rows = _read_rows(reader, split_rows[start : start + CHUNK], bad)
        if rows:
            scores.update(zip(rows, explainer.probabilities(np.stack(pixels)), strict=True))
    if not scores:
        raise ValueError(f"{data.name}: no image of the {split} split could be read\n  " + "\n  ".join(bad))
    order = _evenly_spaced(sorted(scores, key=lambda row: -float(scores[row].max())), count or len(scores))
    out.mkdir(parents=True, exist_ok=True)
    columns, classes, size = data.columns, data.classes, TILES[0] * TILES[1]
    names, pages = ("file", "group", "source"), math.ceil(len(order) / size)
    with (out / "index.csv").open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["rank", "page", *names, "label", "predicted", "wrong", *(f"p_{name}" for name in classes)])
        for page in range(pages):
            rows = order[page * size : (page + 1) * size]
            pixels = [reader(row) for row in rows]
            maps, _ = explainer.maps(np.stack(pixels), target, method)
            tiles = []
            for rank, (row, image, heat) in enumerate(zip(rows, pixels, maps, strict=True), page * size + 1):
                p, label, ids = scores[row], columns["label"][row], [str(columns[name][row]) for name in names]
                wrong = int(p.argmax()) != label
                verdict = [classes[label], classes[p.argmax()], "yes" if wrong else "no"]
                writer.writerow([rank, f"page_{page + 1:03}.png", *ids, *verdict, *(f"{value:.6g}" for value in p)])
                frame = style.WRONG if wrong else FRAME
                lines = (
                    ids[0],
                    panels.prediction(p, classes),
                    f"wrong, true: {classes[label]}" if wrong else "correct",
                )
                tiles += [Tile(image, lines, frame=frame, wide=True)]
                tiles += [Tile(image, heat=panels.visible(heat, method), frame=frame)]
            explained = "the predicted class" if target is None else classes[target]
            title = f"{data.name}, {split}: {panels.TITLES[method]} for {explained}, page {page + 1} of {pages}"
            section = Section(tiles, f"{title}, by falling confidence")
            draw([section], out / f"page_{page + 1:03}.png", 2 * TILES[0], paired=True, aspect=2.0)
    return bad


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
) -> list[str]:
    """Writes quality.json and quality.md into `out`; returns the unreadable images.

    Measures on `count` evenly spaced images of the test split of `data`, without the pointing game. If `data` is None,
    for a network of phantom_ct, on synthetic slices of as many new patients with lesion masks. `config`, `classes` and
    `step` are those of the run.
    """
    bad: list[str] = []
    if data is None:
        name = datasets.resolve(config.data.dataset)[0]
        slices = quality.draw_slices(classes, explainer.spec, name, count)
        rows = quality.measure(explainer, slices.images, None, methods, slices)
        what = f"{count} synthetic slices with a lesion, each of a new patient"
    else:
        row_numbers = _evenly_spaced(np.unique(data.rows("test")).tolist(), count)
        pixels, _ = _read_rows(pipeline.Reader(data, explainer.spec), row_numbers, bad)
        if not pixels:
            raise ValueError(f"{data.name}: no image of the test split could be read\n  " + "\n  ".join(bad))
        rows = quality.measure(explainer, np.stack(pixels), target, methods)
        what = f"{len(pixels)} images of the test split of {data.name}, without lesion masks"
    content = {"name": config.name, "step": step, "images": what, "methods": rows}
    (out / "quality.json").write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", "utf-8")
    page = quality.markdown(config.name, what, rows)
    (out / "quality.md").write_text(page, "utf-8")
    print(page)
    return bad


def _evenly_spaced(items: Sequence[int], count: int) -> list[int]:
    return [items[i] for i in np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)]


def _read_rows(reader: pipeline.Reader, rows: Sequence[int], bad: list[str]) -> tuple[list[np.ndarray], list[int]]:
    """Returns pixels and row of each readable image."""
    pixels, readable = [], []
    for row in rows:
        try:
            pixels.append(reader(row))
            readable.append(row)
        except ValueError as error:
            bad.append(str(error))
    return pixels, readable
