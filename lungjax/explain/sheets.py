"""Pictures of what a network looked at, for files and for a whole split, and what its maps are worth."""

import csv
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lungjax import datasets
from lungjax.config import nearest
from lungjax.config.metadata import Metadata
from lungjax.data import pipeline, preprocess
from lungjax.data.prepared import Prepared
from lungjax.explain import panels, quality, saliency
from lungjax.explain.saliency import Explainer
from lungjax.inference.api import Trained
from lungjax.inference.inputs import Intake
from lungjax.models import outputs
from lungjax.report import style
from lungjax.training import train

TILES = (4, 7)  # columns and rows of a sheet
READ = 64  # images of a split in memory at a time
TO_MEASURE = 100  # images, for --quality


def make_explainer(run: Trained) -> Explainer:
    """Returns the maps' maker for a trained run."""
    positive = outputs.positive_class(run.config, run.classes)
    return Explainer(run.module, run.variables, run.config.input, positive, run.config.eval.batch_size)


def class_number(run: Trained, name: str | None) -> int | None:
    """Returns the number of a class, None for None. Raises ValueError for an unknown one, with the nearest."""
    if name is not None and name not in run.classes:
        raise ValueError(f"--class={name}: {nearest(name, run.classes)}")
    return None if name is None else run.classes.index(name)


def explain_files(
    run: Trained,
    explainer: Explainer,
    found: Intake,
    told: Metadata,
    methods: Sequence[str],
    target: int | None,
    out: Path,
    save_maps: bool = False,
) -> list[str]:
    """Writes a picture of each image and method; returns what could not be read and why.

    Args:
      run: whose network, input and classes they are.
      explainer: of that network.
      found: the images.
      told: what the network says of itself, or what is known of that.
      methods: of METHODS.
      target: number of the class explained, None for the predicted one.
      out: a folder that is there.
      save_maps: writes NAME_METHOD.npy too.

    Raises ValueError if no image is left.
    """
    bad = [f"{name}: {why}" for name, why in found.bad]
    used: set[str] = set()
    for items in _chunks(found.items):
        pixels, names = [], []
        for item in items:
            try:
                pixels.append(preprocess.picture(item.read(), told)[0])
                names.append(panels.file_name(item.short, used))
            except (ValueError, OSError) as error:
                bad.append(str(error) if item.name in str(error) else f"{item.name}: {error}")
        if not names:
            continue
        stack = np.stack(pixels)
        targets = None if target is None else np.full(len(stack), target)
        for method in methods:
            maps, probabilities = explainer.maps(stack, targets, method)
            for name, image, heat, p in zip(names, stack, maps, probabilities, strict=True):
                about = int(p.argmax()) if target is None else target
                panels.draw(out / f"{name}_{method}.png", name, image, heat, p, run.classes, about, method)
                if save_maps:
                    np.save(out / f"{name}_{method}.npy", heat)
    if not used:
        raise ValueError("no image could be read:\n  " + "\n  ".join(bad or ["there is none in the folders given"]))
    return bad


def explain_split(
    run: Trained,
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
    reader = pipeline.Reader(data, run.config.input)
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
        writer.writerow(["rank", "page", *names, "label", "predicted", "wrong", *(f"p_{name}" for name in run.classes)])
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
                writer.writerow([*place, *told, run.classes[label], run.classes[said], wrong, *chances])
                tiles.append((told[0], pixels[i], panels.visible(maps[i], method), label, found[row]))
            about = "the predicted class" if target is None else run.classes[target]
            heading = (
                f"{data.name}, {split}: {panels.TITLES[method]} for {about}, page {page + 1} of {pages}, surest first"
            )
            sheet(out / f"page_{page + 1:03}.png", heading, tiles, run.classes)
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
    run: Trained,
    explainer: Explainer,
    data_dir: Path,
    methods: Sequence[str],
    target: int | None,
    out: Path,
    count: int,
    say: Callable[[str], None] = print,
) -> list[str]:
    """Writes quality.json and quality.md into `out`; returns what could not be read.

    A network of phantom_ct is measured on `count` new drawn patients with true lesion masks, any other on images of
    its test split, at even distances, and then without the pointing game.
    """
    bad: list[str] = []
    name = datasets.resolve(run.config.data.dataset)[0]
    if name.base == "phantom_ct":
        slices = quality.draw_slices(run.classes, run.config.input, name, count)
        found = quality.measure(explainer, slices.images, None, methods, slices, say=say)
        what = f"{count} drawn slices with a lesion, each of a new patient"
    else:
        data = train.open_data(run.config, data_dir)
        rows = np.unique(data.rows("test"))
        rows = rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int)]
        pixels, _ = _read_rows(pipeline.Reader(data, run.config.input), rows.tolist(), bad)
        if not pixels:
            raise ValueError(f"{data.name}: no image of the test split could be read\n  " + "\n  ".join(bad))
        targets = None if target is None else np.full(len(pixels), target)
        found = quality.measure(explainer, np.stack(pixels), targets, methods, say=say)
        what = f"{len(pixels)} images of the test split of {data.name}, whose lesions nobody marked"
    content = {"name": run.config.name, "step": run.step, "images": what, "methods": found}
    (out / "quality.json").write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", "utf-8")
    page = quality.markdown(run.config.name, what, found)
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
