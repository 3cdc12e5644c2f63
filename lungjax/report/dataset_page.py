"""Page about a prepared data set: counts, sources, sizes, gray levels, and the figures of `dataset_images`."""

import dataclasses
import itertools
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from lungjax import datasets
from lungjax.config import PROTOCOLS, AugmentConfig, InputSpec, presets
from lungjax.data import statistics
from lungjax.data.imaging import images
from lungjax.data.labels import indicators
from lungjax.data.prepared import Prepared
from lungjax.report import context, dataset_charts, dataset_images
from lungjax.report.dataset_images import View
from lungjax.report.templating import Figure, Table, render
from lungjax.runtime import environment
from lungjax.runtime.files import atomic_folder

MAX_HISTOGRAMS = 2000  # images that the histograms read
MAX_ROWS = 10  # sources with a curve, sizes in the table
MAX_BARS = 24  # sources with a bar
COLORS = ("class", "images in color", "difference of the channels (0 to 255), mean")


def write(
    data: Prepared,
    data_dir: Path,
    out: Path,
    augmentations: Mapping[str, AugmentConfig],
    stages: bool | None = None,
    seed: int = 0,
    samples: int = 12,
) -> Path:
    """Writes figures and index.html into `out`, a new or empty folder that appears when complete; returns the page.

    `data` is prepared in `data_dir`. `augmentations` are configurations by name; {} selects the default. `stages` says
    whether to segment bodies and lungs; None: if masks were prepared. `seed` selects `samples` images per class. Raises
    ValueError if `out` is not empty, an augmentation needs missing body masks, or an image can't be read.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out={out} is not empty: choose a new folder, or delete this one")
    masks = data.body if stages is None else stages
    default = "covidnet_ct" if data.body else "ct_cov19_original" if masks else "xray_covid_online"
    augmentations = augmentations or {default: presets.preset(default)}
    for name, config in augmentations.items():
        if config.exterior and not data.body:
            raise ValueError(f"--augment={name} needs body masks, which {data.name} lacks; only CT data sets have them")
    out.mkdir(parents=True, exist_ok=True)
    out.rmdir()
    with atomic_folder(out, "index.html") as partial:
        page = _context(View(data, data_dir, partial, seed, masks), augmentations, samples)
        (partial / "index.html").write_text(render("dataset.html.j2", **page), "utf-8")
    return out / "index.html"


def _context(view: View, augmentations: Mapping[str, AugmentConfig], samples: int) -> dict[str, Any]:
    """Draws every figure and returns the context of dataset.html.j2."""
    data, summary = view.data, view.summary
    height, width = InputSpec().size
    return {
        "title": data.name,
        "summary": summary,
        "image_count": len(data.columns["label"]),
        "group_count": len(np.unique(data.columns["group"])),
        "test_count": len(data.rows("test")),
        "groups": summary["group_name"],
        "classes": data.classes,
        "protocol": data.protocol,
        "problems": {"The stage found nothing in": summary["unstaged"], "Skipped:": summary["skipped"]},
        "protocols": [_protocol(view, name) for name in (PROTOCOLS if summary["study"] else PROTOCOLS[:1])],
        "imbalance": _imbalance(data),
        "sources": _sources(view),
        "shortcuts": _shortcuts(data),
        "sizes": _sizes(view),
        **_gray_levels(view),
        "seed": str(view.seed),
        "samples": dataset_images.samples(view, samples),
        "stages": dataset_images.stages(view),
        "stage": view.masks and datasets.resolve(data.name)[0].stage,
        "augmentations": dataset_images.augmentations(view, augmentations),
        "draws": dataset_images.DRAWS,
        "width": width,
        "height": height,
        "leaks": context.leak_table(summary),
        "duplicates": dataset_images.duplicates(view),
    }


def _protocol(view: View, protocol: str) -> dict[str, Any]:
    """Returns the number of images and groups per class and split."""
    groups, classes = view.summary["group_name"], view.data.classes
    data = dataclasses.replace(view.data, protocol=protocol)
    numbers = view.summary["protocols"][protocol]
    counts = {s: {"images": [*n["images"].values()], groups: [*n["groups"].values()]} for s, n in numbers.items()}
    path = f"classes_{protocol}.png"
    dataset_charts.split_bars(counts, classes, view.out / path)
    rows = [
        [
            split,
            *n["images"],
            numbers[split]["all"],
            *n[groups],
            len(np.unique(data.columns["group"][data.rows(split)])),
        ]
        for split, n in counts.items()
    ]
    return {
        "name": protocol,
        "counts": Table(["split", *classes, "images", *(f"{c}, {groups}" for c in classes), groups], rows),
        "unused": int((statistics.cells(data) == "").sum()),
        "figure": Figure(path, f"Images and {groups} per class, one row per split."),
    }


def _imbalance(data: Prepared) -> dict[str, Any] | None:
    """Returns the imbalance of the train split and class weights; None without a train split."""
    labels = data.columns["label"][data.rows("train")]
    train = indicators(labels, len(data.classes)).sum(axis=0)
    if not train.any() or labels.ndim == 2:  # each finding has a weight per label
        return None
    weights = [f"{train.sum() / (len(train) * n):.3f}" if n else "-" for n in train]
    return {
        "ratio": f"{train.max() / train.min():.1f}" if train.min() else "infinitely many",
        "weights": Table(["", *data.classes], [["train images", *train.tolist()], ["class weight", *weights]]),
    }


def _sources(view: View) -> dict[str, Any] | None:
    """Returns the sources and their classes; None for a single source."""
    classes, columns = view.data.classes, view.data.columns
    names, table = statistics.count_values(columns["source"], columns["label"], len(classes))
    counts = {str(name) or "(none)": row for name, row in zip(names, table.tolist(), strict=True)}
    if len(counts) == 1:
        return None
    largest = dict(itertools.islice(counts.items(), MAX_BARS))
    dataset_charts.source_bars(largest, classes, view.out / "sources.png")
    more = f" The {MAX_BARS} largest of {len(counts)} sources." if len(counts) > MAX_BARS else ""
    return {
        "counts": Table(["source", *classes], [[name, *row] for name, row in largest.items()]),
        "single_class": [
            f"Every image of source {name} is {classes[int(np.argmax(row))]} ({sum(row):,} images): recognizing the "
            "source is enough to predict the class."
            for name, row in largest.items()
            if np.count_nonzero(row) == 1 and columns["label"].ndim == 1
        ],
        "figure": Figure("sources.png", f"Classes within each source; the bars should look alike.{more}"),
    }


def _shortcuts(data: Prepared) -> Table | None:
    scores = statistics.shortcuts(data)
    if None in scores.values():
        return None
    chance = 1 / len(data.classes) if data.columns["label"].ndim == 1 else 1 / 2
    rows = [*scores.items(), ("nothing (chance)", chance)]
    return Table(["predicted from", "mean recall"], [[name, f"{score:.3f}"] for name, score in rows])


def _sizes(view: View) -> dict[str, Any]:
    """Returns the width and height of the images per class."""
    columns, classes = view.data.columns, view.data.classes
    pairs = np.column_stack([columns["width"], columns["height"]])
    sizes, counts = statistics.count_values(pairs, columns["label"], len(classes))
    total = np.maximum(counts.sum(axis=0), 1)
    rows = [
        [f"{w} x {h}", *(f"{n:,} ({100 * n / t:.0f}%)" for n, t in zip(row, total, strict=True))]
        for (w, h), row in zip(sizes[:MAX_ROWS].tolist(), counts[:MAX_ROWS].tolist(), strict=True)
    ]
    figure = None
    if len(sizes) > 1:
        of_class = indicators(columns["label"], len(classes))
        dataset_charts.size_bubbles(pairs, of_class, classes, view.out / "sizes.png")
        caption = "The area of a bubble is the share of the class with that size. The panels should look alike."
        figure = Figure("sizes.png", caption)
    return {"figure": figure, "count": len(sizes), "common": Table(["width x height", *classes], rows)}


def _gray_levels(view: View) -> dict[str, Any]:
    """Returns the gray-level histograms by class and by source, and a table of color images by class."""
    sources, classes = view.data.columns["source"], view.data.classes
    by_class = [np.flatnonzero(column) for column in indicators(view.data.columns["label"], len(classes)).T]
    samples = [np.sort(view.rng.permutation(rows)[: MAX_HISTOGRAMS // len(classes)]) for rows in by_class]
    rows = np.concatenate(samples)
    # The sample is balanced by class, so the mean over a source weights each image by its class.
    class_weights = [len(a) / max(len(b), 1) for a, b in zip(by_class, samples, strict=True)]
    weights = np.repeat(class_weights, [len(b) for b in samples])
    with ThreadPoolExecutor(min(environment.cores(), 8)) as pool:
        counts, spreads = zip(*pool.map(lambda row: _measure(view.decoded(row)), rows), strict=True)
    shares = np.stack([count / count.sum() for count in counts])
    names = np.repeat(classes, [len(sample) for sample in samples])
    of_class = statistics.mean_histograms(shares, names, weights, len(classes))
    panels = {"By class": {name: of_class[name] for name in classes if name in of_class}}
    several = len(np.unique(sources[rows]))
    if several > 1:
        panels["By source"] = statistics.mean_histograms(shares, sources[rows], weights, MAX_ROWS)
    dataset_charts.histograms(panels, view.out / "gray_levels.png")
    n = len(np.unique(rows))  # an image with several findings is in each
    drawn = "all images" if n == len(sources) else f"a random {n:,} of {len(sources):,} images"
    more = f"; the {MAX_ROWS} largest of {several} sources" if several > MAX_ROWS else ""
    colors = [
        [name, f"{np.count_nonzero(own):,} of {len(own):,}", f"{own.mean():.2f}"]
        for name in classes
        if len(own := np.asarray(spreads)[names == name])
    ]
    caption = f"From {drawn}, each with equal weight{more}. The left vertical axis is logarithmic."
    return {"gray_levels": Figure("gray_levels.png", caption), "colors": Table(COLORS, colors)}


def _measure(image: np.ndarray) -> tuple[np.ndarray, float]:
    """Returns the histogram [256] of an image, and the range of its color channels, averaged over the pixels."""
    spread = float(np.ptp(image, axis=-1).mean()) if image.ndim == 3 else 0.0
    return np.bincount(images.gray(image).ravel(), minlength=256), spread
