"""Charts of a data set's page; each function draws one PNG file."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lungjax.report import style
from lungjax.report.contact_sheet import fit

LEVELS = 4  # gray levels per bin of a histogram
FLOOR = 1e-4  # share of the pixels below which a histogram is not drawn


def split_bars(counts: Mapping[str, Mapping[str, Sequence[int]]], classes: Sequence[str], path: Path) -> None:
    """Draws one bar per class and split, with a column for each key of {split: {"images": numbers per class, ...}}."""
    columns = list(next(iter(counts.values())))
    figure = style.figure(9.6, len(counts) * (0.42 + 0.24 * len(classes)) + 0.5)
    axes = figure.subplots(len(counts), len(columns), sharex="col", squeeze=False)
    names = [style.short(name, 26) for name in classes]
    places, colors = np.arange(len(classes)), [style.COLORS[i % len(style.COLORS)] for i in range(len(classes))]
    for (split, numbers), row in zip(counts.items(), axes, strict=True):
        for axis, what in zip(row, columns, strict=True):
            values = np.asarray(numbers[what])
            title = f"{split}: {values.sum():,} {what}" if axis is row[0] else f"{split}: {what} per class"
            style.style(axis, style.plain(title), 10.5)
            axis.grid(visible=False, axis="y")
            axis.barh(places, values, color=colors, height=0.72)
            axis.set_yticks(places, names if axis is row[0] else [""] * len(names))
            axis.tick_params(axis="y", length=0)
            axis.set_ylim(len(classes) - 0.4, -0.6)
            for place, value in zip(places, values, strict=True):
                share = f"  ({style.percent(value / values.sum())})" if values.sum() and axis is row[0] else ""
                axis.text(value, place, f" {value:,}{share}", va="center", fontsize=9, color=style.INK)
    for i, what in enumerate(columns):
        longest = max(max(numbers[what]) for numbers in counts.values())
        axes[0, i].set_xlim(0, max(longest, 1) * (1.42 if i == 0 else 1.18))
        axes[-1, i].set_xlabel(f"Number of {style.plain(what)}")
        axes[-1, i].locator_params(axis="x", nbins=5, integer=True)
        axes[-1, i].xaxis.set_major_formatter("{x:,.0f}")
    style.save(figure, path)


def source_bars(counts: Mapping[str, Sequence[int]], classes: Sequence[str], path: Path) -> None:
    """Draws one bar per source with the share of each class; `counts` is {source: images per class}."""
    figure = style.figure(8.4, 1.0 + 0.34 * len(counts) + 0.06 * len(classes))
    axis = figure.subplots()
    style.style(axis)
    axis.grid(visible=False)
    values = np.asarray(list(counts.values()), np.float64)
    shares = values / np.maximum(values.sum(axis=1, keepdims=True), 1)
    left = np.cumsum(shares, axis=1) - shares
    for i, name in enumerate(classes):
        look: dict[str, Any] = {"color": style.COLORS[i % len(style.COLORS)], "edgecolor": "white", "linewidth": 1}
        hatch = "//" if i >= len(style.COLORS) else None  # colors repeat
        axis.barh(range(len(counts)), shares[:, i], 0.7, left[:, i], label=style.short(name, 26), hatch=hatch, **look)
    for place, total in enumerate(values.sum(axis=1)):
        axis.text(1.01, place, f"{total:,.0f}", va="center", fontsize=9, color=style.INK)
    axis.text(1.01, -0.75, "images", va="center", fontsize=9, color=style.MUTED)
    axis.set_yticks(range(len(counts)), [style.short(name, 28) for name in counts])
    axis.set_xticks(np.linspace(0, 1, 6), [f"{20 * i}%" for i in range(6)])
    axis.set(xlim=(0, 1), ylim=(len(counts) - 0.5, -0.9), xlabel="Share of the source's images")
    axis.tick_params(axis="y", length=0)
    longest = max(len(style.short(name, 26)) for name in classes) * 0.08 + 0.5  # approximately, in inches
    axis.legend(
        frameon=False, fontsize=9, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=max(1, int(5.6 / longest)),
        borderaxespad=0.1, handlelength=1.4,
    )  # fmt: skip
    style.save(figure, path)


def size_bubbles(sizes: np.ndarray, of_class: np.ndarray, classes: Sequence[str], path: Path) -> None:
    """Draws a bubble per image size and class; its area is the share of the class.

    `sizes`, [N, 2], are (width, height), `of_class`, [N, C], the `labels.indicators` of the images.
    """
    columns = min(len(classes), 4)
    rows = math.ceil(len(classes) / columns)
    max_width, max_height = sizes.max(axis=0).tolist()
    wide = 8.8 / max(columns, 2) - 0.15  # inches
    tall = wide * min(max(max_height / max_width, 0.6), 1.4)
    figure = style.figure(9.6 if columns > 1 else 5, rows * (tall + 0.6) + 0.5)
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for i, axis in enumerate(axes.flat):
        if i >= len(classes):
            axis.set_visible(False)
            continue
        pairs, count = np.unique(sizes[of_class[:, i] == 1], axis=0, return_counts=True)
        look: dict[str, Any] = {"color": style.COLORS[i % len(style.COLORS)], "edgecolor": style.INK, "linewidth": 0.4}
        axis.axline((0, 0), slope=1, color=style.MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        axis.scatter(*pairs.T, 8 + 900 * count / max(count.sum(), 1), alpha=0.5, **look)
        title = f"{fit(classes[i], wide, 10.5)}\n{len(pairs):,} size{'' if len(pairs) == 1 else 's'}"
        style.style(axis, title, 10.5)
        axis.set(xlim=(0, max_width * 1.12), ylim=(0, max_height * 1.12))
        axis.locator_params(nbins=5)
    figure.supxlabel("Width in pixels (dashed: square images)", fontsize=10, color=style.INK)
    figure.supylabel("Height in pixels", fontsize=10, color=style.INK)
    style.save(figure, path)


def histograms(panels: Mapping[str, Mapping[str, np.ndarray]], path: Path) -> None:
    """Draws histograms and cumulative histograms of {title: {name: share of the pixels at each gray level [256]}}."""
    figure = style.figure(12.6, 3.1 * len(panels) + 0.2)
    axes = figure.subplots(len(panels), 2, sharex=True, squeeze=False)
    edges = np.arange(0, 257, LEVELS)
    for (axis, right), (title, curves) in zip(axes, panels.items(), strict=True):
        style.style(axis, style.plain(title))
        style.style(right, style.plain(f"{title}, cumulative"))
        for i, (name, shares) in enumerate(curves.items()):
            binned = np.asarray(shares).reshape(-1, LEVELS).sum(axis=1)
            look = {**style.line_style(i), "label": style.short(name, 26), "linewidth": 1.6}
            axis.stairs(np.maximum(binned, FLOOR / 10), edges, baseline=None, **look)
            right.stairs(np.cumsum(binned), edges, baseline=None, **look)
        axis.set(yscale="log", ylim=(FLOOR, 1), ylabel="Share of the pixels")
        axis.set_yticks([1e-4, 1e-3, 1e-2, 1e-1, 1], ["0.01%", "0.1%", "1%", "10%", "100%"])
        axis.minorticks_off()
        right.set(ylim=(0, 1.02), ylabel="Share of the pixels up to a level")
        style.legend_beside(right, len(curves))
    for axis in axes[-1]:
        label = f"Gray level from black to white ({LEVELS} levels per bin)"
        axis.set(xlim=(0, 256), xticks=[*range(0, 256, 32), 255], xlabel=label)
    style.save(figure, path)
