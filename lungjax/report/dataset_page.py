"""The page of a data set: its order, and the sections that count. Each draws its figures and returns HTML."""

import dataclasses
import itertools
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from lungjax.config import PROTOCOLS, AugmentConfig, presets
from lungjax.data import statistics
from lungjax.data.prepared import Prepared
from lungjax.report import dataset_charts, dataset_sheets, html
from lungjax.report.dataset_sheets import View
from lungjax.runtime import environment

MOST = 2000  # images that the histograms read
SHOWN = 10  # sources with a curve, sizes in the table
SOURCES = 24  # sources with a bar


def check_free(out: Path) -> None:
    """Raises ValueError if something lies in `out` already."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out={out} is not empty: name a new folder, or remove that one")


def write(
    data: Prepared,
    data_dir: Path,
    out: Path,
    chosen: Mapping[str, AugmentConfig],
    stages: bool | None = None,
    seed: int = 0,
    samples: int = 12,
) -> Path:
    """Writes figures and index.html into `out`, which appears when it is complete; returns the page.

    `chosen` are the augmentations to show, {} for the usual one; `stages` says whether body and lungs can be found in
    the images, None asks whether the set was prepared with masks; `samples` are the images shown of each class.

    Raises ValueError if `out` is not empty, an augmentation needs masks of the body that the set has not, or an image
    can't be read.
    """
    masks = data.body if stages is None else stages
    usual = "covidnet_ct" if data.body else "ct_cov19_original" if masks else "xray_covid_online"
    chosen = chosen or {usual: presets.preset(usual)}
    for name, config in chosen.items():
        if config.exterior and not data.body:
            raise ValueError(f"--augment={name} needs masks of the body, which CT sets have and {data.name} has not")
    check_free(out)
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # what a killed run left
    partial.mkdir(parents=True)
    view = View(data, data_dir, partial, seed, masks)
    sections = [_start(view), _classes(view), _sources(view), _sizes(view), _gray_levels(view)]
    sections += [
        dataset_sheets.samples(view, samples),
        dataset_sheets.stages(view),
        dataset_sheets.augmented(view, chosen),
        dataset_sheets.twice(view),
    ]
    (partial / "index.html").write_text(html.page(data.name, sections), "utf-8")
    if out.exists():
        out.rmdir()
    partial.rename(out)
    return out / "index.html"


def _start(view: View) -> str:
    """What the set is, and what to know before training on it."""
    told, data = view.summary, view.data
    groups, named = len(np.unique(data.columns["group"])), told["group_name"]
    other = f"; it has the study's splits as well: {told['study']}" if told["study"] else ""
    parts = [
        html.heading(data.name, 1),
        html.paragraph(
            f"{len(data.columns['label']):,} images of {groups:,} {named} in {len(data.classes)} classes: "
            f"{', '.join(data.classes)}. Train, val and test below are those of "
            f"protocol={data.protocol}{other}."
        ),
        html.heading("Before you train on it", 2),
        html.bullets(told["warnings"], strong=True) or html.paragraph("No warning."),
        html.bullets(told["notes"]),
    ]
    for key, words in (("unstaged", "Nothing found by the stage in"), ("skipped", "Skipped:")):
        if told[key]:
            parts.append(html.paragraph(f"{words} {len(told[key]):,} images, such as {'; '.join(told[key][:SHOWN])}."))
    return "\n".join(parts)


def _classes(view: View) -> str:
    """Images and groups of each class and split, of each protocol, and the weights of the classes."""
    named, classes = view.summary["group_name"], view.data.classes
    parts = [html.heading(f"Classes and {named}", 2)]
    for protocol in PROTOCOLS if view.summary["study"] else PROTOCOLS[:1]:
        data = dataclasses.replace(view.data, protocol=protocol)
        counts = statistics.count_splits(data, named)
        dataset_charts.split_bars(counts, classes, view.out / f"classes_{protocol}.png")
        head = ["split", *classes, "images", *(f"{c}, {named}" for c in classes), named]
        groups = {split: len(np.unique(data.columns["group"][data.rows(split)])) for split in counts}
        rows = [[s, *held["images"], sum(held["images"]), *held[named], groups[s]] for s, held in counts.items()]
        unused = int((statistics.cells(data) == "").sum())
        parts += [
            html.heading(f"protocol={protocol}", 3),
            html.table(head, rows),
            html.paragraph(f"{unused:,} of {len(data.columns['label']):,} images are in no split of this protocol."),
            view.figure(f"classes_{protocol}.png", f"Images and {named} of each class; a row for each split."),
        ]
    train = np.bincount(view.data.columns["label"][view.data.rows("train")], minlength=len(classes))
    weights = [f"{train.sum() / (len(classes) * n):.3f}" if n else "-" for n in train]
    ratio = f"{train.max() / train.min():.1f}" if train.min() else "endless"
    words = (
        f"The biggest class of train (protocol={view.data.protocol}) has {ratio} times the images of the smallest. "
        "--set=optim.class_weights=balanced multiplies the loss of each image by the weight of its class:"
    )
    table = html.table(["", *classes], [["train images", *train.tolist()], ["class weight", *weights]])
    return "\n".join([*parts, html.heading("Imbalance", 3), html.paragraph(words), table])


def _sources(view: View) -> str:
    """Sources and their classes, and how well the class is guessed without looking at the lungs."""
    classes, columns = view.data.classes, view.data.columns
    names, table = statistics.count_values(columns["source"], columns["label"], len(classes))
    counts = {str(name) or "(none)": row for name, row in zip(names, table.tolist(), strict=True)}
    parts = [html.heading("Sources", 2)]
    if len(counts) == 1:
        parts.append(
            html.paragraph("The set names one source only, so nothing can be said of differences between sources.")
        )
    else:
        few = dict(itertools.islice(counts.items(), SOURCES))
        alone = [
            f"Every image of source {name} is {classes[int(np.argmax(row))]} ({sum(row):,} images): to recognise "
            "the source is to name the class, without looking at the lungs."
            for name, row in few.items()
            if np.count_nonzero(row) == 1
        ]
        dataset_charts.source_bars(few, classes, view.out / "sources.png")
        more = f" The {SOURCES} biggest of {len(counts)} sources." if len(counts) > SOURCES else ""
        parts += [
            html.table(["source", *classes], [[name, *row] for name, row in few.items()]),
            html.bullets(alone, strong=True),
            view.figure("sources.png", f"The classes within each source; bars should look alike.{more}"),
        ]
    found = statistics.shortcuts(view.data)
    parts.append(html.heading("What can be guessed without the lungs", 3))
    if None in found.values():
        return "\n".join([*parts, html.paragraph("Can't be scored: train or test lacks a class.")])
    rows = [*found.items(), ("nothing (chance)", 1 / len(classes))]
    words = (
        f"The mean recall on the {len(view.data.rows('test')):,} test images if each gets the class that is most "
        "typical, in train, of images that are alike in one property. A network finds these properties too; its "
        "score means something only as far as it lies above them."
    )
    return "\n".join(
        [
            *parts,
            html.paragraph(words),
            html.table(["guessed from", "mean recall"], [[k, f"{v:.3f}"] for k, v in rows]),
        ]
    )


def _sizes(view: View) -> str:
    """Width and height of the images of each class."""
    columns, classes = view.data.columns, view.data.classes
    pairs = np.column_stack([columns["width"], columns["height"]])
    sizes, counts = statistics.count_values(pairs, columns["label"], len(classes))
    heading = html.heading("Image sizes", 2)
    if len(sizes) == 1:
        return f"{heading}\n{html.paragraph(f'All images are {sizes[0, 0]} x {sizes[0, 1]} pixels (width x height).')}"
    total = np.maximum(counts.sum(axis=0), 1)
    rows = [
        [f"{w} x {h}", *(f"{n:,} ({100 * n / t:.0f}%)" for n, t in zip(of, total, strict=True))]
        for (w, h), of in zip(sizes[:SHOWN].tolist(), counts[:SHOWN].tolist(), strict=True)
    ]
    dataset_charts.size_bubbles(columns["width"], columns["height"], columns["label"], classes, view.out / "sizes.png")
    caption = "The area of a bubble is the share of the class's images of that size. Panels should look alike."
    parts = [
        heading,
        html.paragraph(
            "A mix of sizes that differs by class is a shortcut: resized images keep it as sharpness and aspect."
        ),
        view.figure("sizes.png", caption),
        html.paragraph(f"The most common of {len(sizes):,} sizes, and how much of each class has them:"),
        html.table(["width x height", *classes], rows),
    ]
    return "\n".join(parts)


def _gray_levels(view: View) -> str:
    """Histograms of the pixels by class and by source."""
    labels, sources, classes = view.data.columns["label"], view.data.columns["source"], view.data.classes
    by_class = [np.flatnonzero(labels == label) for label in range(len(classes))]
    drawn = [np.sort(view.rng.permutation(rows)[: MOST // len(classes)]) for rows in by_class]
    rows = np.concatenate(drawn)
    # Every class has as many images here, so an image of a big one stands for more in the mean of a source.
    stands_for = [len(a) / max(len(b), 1) for a, b in zip(by_class, drawn, strict=True)]
    weights = np.repeat(stands_for, [len(b) for b in drawn])
    with ThreadPoolExecutor(min(environment.cores(), 8)) as pool:
        found = np.stack(list(pool.map(lambda row: _histogram(view.gray(row)), rows)))
    named = np.asarray(classes)[labels[rows]]
    of = statistics.mean_histograms(found, named, weights, len(classes))
    panels = {"By class": {name: of[name] for name in classes if name in of}}
    several = len(np.unique(sources[rows]))
    if several > 1:
        panels["By source"] = statistics.mean_histograms(found, sources[rows], weights, SHOWN)
    dataset_charts.histograms(panels, view.out / "gray_levels.png")
    every = "all images" if len(rows) == len(labels) else f"{len(rows):,} of {len(labels):,} images, drawn by seed"
    more = f"; the {SHOWN} biggest of {several} sources" if several > SHOWN else ""
    caption = f"From {every}, each image counted alike{more}. The axis of shares is logarithmic."
    words = "Curves that lie apart are a shortcut: windows, black frames or masks that differ by class or source."
    return "\n".join([html.heading("Gray levels", 2), html.paragraph(words), view.figure("gray_levels.png", caption)])


def _histogram(gray: np.ndarray) -> np.ndarray:
    return np.bincount(gray.ravel(), minlength=256) / gray.size
