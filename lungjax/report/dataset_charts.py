"""The pictures of a data set's page, each one function from arrays to a PNG file.

Drawn in the style of a report's pictures, see `lungjax.report.style`. Images are shown in their own gray levels, 0
black and 255 white, never stretched: a source that is darker than another must look darker.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lungjax.report import style

CONTOURS = ((style.COLORS[5], (0, (4, 1.5))), (style.COLORS[4], "-"))  # of the first and the second mask of a tile
LEVELS = 4  # gray levels of a histogram's bin
FLOOR = 1e-4  # share of the pixels below which a histogram's line leaves the picture
WIDTH, GAP = 2.05, 0.12  # inches: a tile with the gap beside it, the gap
TALLEST = 1.2  # height of a tile by its width; a taller image is shown smaller
SIZE, LINE = 8.2, 0.155  # points and inches of a line of text under a tile


@dataclass(frozen=True)
class Tile:
    """One picture of a sheet."""

    image: np.ndarray  # uint8 [h, w] or [h, w, 3]
    lines: tuple[str, ...] = ()  # under it; the first is darker
    head: str = ""  # above it
    masks: Mapping[str, np.ndarray] = field(default_factory=dict)  # name: bool [h, w], drawn as contours


def split_bars(counts: Mapping[str, Mapping[str, Sequence[int]]], classes: Sequence[str], path: Path) -> None:
    """Draws a bar for each class and split: the images on the left, the patients on the right.

    `counts` is {split: {what: number of each class}}, `what` the same for all splits, such as images and patients.
    """
    columns = list(next(iter(counts.values())))
    figure = style.figure(9.6, sum(0.42 + 0.24 * len(classes) for _ in counts) + 0.5)
    axes = figure.subplots(len(counts), len(columns), sharex="col", squeeze=False)
    names = [style.short(name, 26) for name in classes]
    places, colors = np.arange(len(classes)), [style.COLORS[i % len(style.COLORS)] for i in range(len(classes))]
    for (split, held), row in zip(counts.items(), axes, strict=True):
        for axis, what in zip(row, columns, strict=True):
            values = np.asarray(held[what])
            style.style(axis)
            axis.grid(visible=False, axis="y")
            axis.barh(places, values, color=colors, height=0.72)
            axis.set_yticks(places, names if axis is row[0] else [""] * len(names))
            axis.tick_params(axis="y", length=0)
            axis.set_ylim(len(classes) - 0.4, -0.6)
            for place, value in zip(places, values, strict=True):
                share = f"  ({style.percent(value / values.sum())})" if values.sum() and axis is row[0] else ""
                axis.text(value, place, f" {value:,}{share}", va="center", fontsize=9, color=style.INK)
            title = f"{split}: {values.sum():,} {what}" if axis is row[0] else f"{split}: {what} of each class"
            axis.set_title(style.plain(title), loc="left", fontsize=10.5, color=style.INK)
    for i, what in enumerate(columns):
        most = max(max(held[what]) for held in counts.values())
        axes[0, i].set_xlim(0, max(most, 1) * (1.42 if i == 0 else 1.18))
        axes[-1, i].set_xlabel(f"Number of {style.plain(what)}", color=style.INK)
        axes[-1, i].locator_params(axis="x", nbins=5, integer=True)
        axes[-1, i].xaxis.set_major_formatter("{x:,.0f}")
    style.save(figure, path)


def source_bars(counts: Mapping[str, Sequence[int]], classes: Sequence[str], path: Path) -> None:
    """Draws the share of each class in each source as one bar; `counts` is {source: images of each class}."""
    figure = style.figure(8.4, 1.0 + 0.34 * len(counts) + 0.06 * len(classes))
    axis = figure.subplots()
    style.style(axis)
    axis.grid(visible=False)
    values = np.asarray(list(counts.values()), np.float64)
    shares = values / np.maximum(values.sum(axis=1, keepdims=True), 1)
    left = np.cumsum(shares, axis=1) - shares
    for i, name in enumerate(classes):
        look: dict[str, Any] = {"color": style.COLORS[i % len(style.COLORS)], "edgecolor": "white", "linewidth": 1}
        hatch = "//" if i >= len(style.COLORS) else None  # colours repeat
        axis.barh(range(len(counts)), shares[:, i], 0.7, left[:, i], label=style.short(name, 26), hatch=hatch, **look)
    for place, total in enumerate(values.sum(axis=1)):
        axis.text(1.01, place, f"{total:,.0f}", va="center", fontsize=9, color=style.INK)
    axis.text(1.01, -0.75, "images", va="center", fontsize=9, color=style.QUIET)
    axis.set_yticks(range(len(counts)), [style.short(name, 28) for name in counts])
    axis.set_ylim(len(counts) - 0.5, -0.9)
    axis.set_xlim(0, 1)
    axis.set_xticks(np.linspace(0, 1, 6), [f"{20 * i}%" for i in range(6)])
    axis.set_xlabel("Share of the source's images", color=style.INK)
    axis.tick_params(axis="y", length=0)
    _legend_over(axis, [style.short(name, 26) for name in classes])
    style.save(figure, path)


def size_bubbles(width: np.ndarray, height: np.ndarray, labels: np.ndarray, classes: Sequence[str], path: Path) -> None:
    """Draws width and height of the images of each class in a panel of its own, with the same axes.

    `width`, `height` and `labels` [N] int. The area of a bubble is the share of the class's images of that size.
    """
    columns = min(len(classes), 4 if len(classes) != 3 else 3)
    rows = math.ceil(len(classes) / columns)
    most_wide, most_high = int(width.max()), int(height.max())
    wide = 8.8 / max(columns, 2) - 0.15  # inches
    figure = style.figure(
        9.6 if columns > 1 else 5, rows * (wide * min(max(most_high / most_wide, 0.6), 1.4) + 0.6) + 0.5
    )
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for i, axis in enumerate(axes.flat):
        if i >= len(classes):
            axis.set_visible(False)
            continue
        style.style(axis)
        mine = labels == i
        sizes, count = np.unique(np.column_stack([width[mine], height[mine]]), axis=0, return_counts=True)
        look: dict[str, Any] = {
            "color": style.COLORS[i % len(style.COLORS)],
            "alpha": 0.5,
            "edgecolor": style.INK,
            "linewidth": 0.4,
        }
        axis.axline((0, 0), slope=1, color=style.QUIET, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        axis.scatter(sizes[:, 0], sizes[:, 1], 8 + 900 * count / max(count.sum(), 1), **look)
        said = f"{len(sizes):,} size{'' if len(sizes) == 1 else 's'}"
        axis.set_title(f"{fit(classes[i], wide, 10.5)}\n{said}", loc="left", fontsize=10.5, color=style.INK)
        axis.set_xlim(0, most_wide * 1.12)
        axis.set_ylim(0, most_high * 1.12)
        axis.locator_params(nbins=5)
    figure.supxlabel("Width in pixels (dashed: square images)", fontsize=10, color=style.INK)
    figure.supylabel("Height in pixels", fontsize=10, color=style.INK)
    style.save(figure, path)


def histograms(panels: Mapping[str, Mapping[str, np.ndarray]], path: Path) -> None:
    """Draws gray-level histograms, a panel for each title: {title: {name: share of the pixels at each level [256]}}."""
    figure = style.figure(8.8, 3.1 * len(panels) + 0.2)
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    edges = np.arange(0, 257, LEVELS)
    for axis, (title, curves) in zip(axes, panels.items(), strict=True):
        style.style(axis)
        for i, (name, shares) in enumerate(curves.items()):
            binned = np.asarray(shares).reshape(-1, LEVELS).sum(axis=1)
            again, color = divmod(i, len(style.COLORS))
            axis.stairs(
                np.maximum(binned, FLOOR / 10),
                edges,
                baseline=None,
                label=style.short(name, 26),
                color=style.COLORS[color],
                linestyle=style.STYLES[again % len(style.STYLES)],
                linewidth=1.6,
            )
        axis.set_yscale("log")
        axis.set_ylim(FLOOR, 1)
        axis.set_yticks([1e-4, 1e-3, 1e-2, 1e-1, 1], ["0.01%", "0.1%", "1%", "10%", "100%"])
        axis.minorticks_off()
        axis.set_ylabel("Share of the pixels", color=style.INK)
        axis.set_title(style.plain(title), loc="left", fontsize=11, color=style.INK)
        style.legend_beside(axis, len(curves))
    axes[-1].set_xlim(0, 256)
    axes[-1].set_xticks([*range(0, 256, 32), 255])
    axes[-1].set_xlabel(f"Gray level, 0 is black and 255 is white ({LEVELS} levels a step)", color=style.INK)
    style.save(figure, path)


def sheet(tiles: Sequence[Tile], path: Path, columns: int, paired: bool = False) -> None:
    """Draws images beside each other with words under and above them and masks as contours, `columns` in a row.

    With `paired`, two and two stand together. The legend on top names the masks, at most two.
    """
    masks = list(dict.fromkeys(name for tile in tiles for name in tile.masks))
    side, space = WIDTH - GAP, 0.35 if paired else 0.0
    columns = min(columns, len(tiles))
    rows = [tiles[i : i + columns] for i in range(0, len(tiles), columns)]
    tall = [min(max(t.image.shape[0] / t.image.shape[1] for t in row), TALLEST) * side for row in rows]
    above = [0.24 if any(t.head for t in row) else 0.0 for row in rows]
    under = [0.08 + LINE * max(len(t.lines) for t in row) + 0.12 for row in rows]
    legend = 0.34 if masks else 0.0
    whole = columns * WIDTH + GAP + space * ((columns - 1) // 2)
    height = legend + sum(tall) + sum(above) + sum(under) + 0.04
    figure = style.figure(whole, height, layout="none")
    top = height - legend
    for row, tile_height, head, text in zip(rows, tall, above, under, strict=True):
        bottom = top - head - tile_height
        for i, tile in enumerate(row):
            x = GAP + i * WIDTH + space * (i // 2)
            axis = figure.add_axes(
                (x / whole, bottom / height, side / whole, tile_height / height), anchor="N" if head else "S"
            )
            _show(axis, tile, masks)
            if tile.head:
                place = (x / whole, (bottom + tile_height + 0.07) / height)
                figure.text(*place, fit(tile.head, side, 9.5, "bold"), fontsize=9.5, color=style.INK, weight="bold")
            for j, line in enumerate(tile.lines):
                place = (x / whole, (bottom - 0.17 - LINE * j) / height)
                figure.text(*place, fit(line, side, SIZE), fontsize=SIZE, color=style.QUIET if j else style.INK)
        top = bottom - text
    if masks:
        from matplotlib.lines import Line2D

        lines = [Line2D([], [], color=CONTOURS[i][0], linestyle=CONTOURS[i][1], linewidth=2) for i in range(len(masks))]
        place = (GAP / whole, 1.0)
        figure.legend(
            lines, masks, loc="upper left", bbox_to_anchor=place, ncols=2, frameon=False, fontsize=10,
            borderaxespad=0.2, borderpad=0.2, handlelength=3,
        )  # fmt: skip
    style.save(figure, path)


def _show(axis: Any, tile: Tile, masks: Sequence[str]) -> None:
    axis.imshow(tile.image, cmap="gray", vmin=0, vmax=255)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set(color="#999999", linewidth=0.8)
    for name, mask in tile.masks.items():
        color, style = CONTOURS[masks.index(name)]
        if mask.any():
            # A border of nothing closes the contours of a mask that reaches the image's edge.
            x, y = (np.arange(-1, n + 1) for n in mask.shape[::-1])
            axis.contour(x, y, np.pad(mask, 1), levels=[0.5], colors=color, linestyles=[style], linewidths=1.3)
    axis.set_xlim(-0.5, tile.image.shape[1] - 0.5)
    axis.set_ylim(tile.image.shape[0] - 0.5, -0.5)


def fit(text: str, inches: float, size: float, weight: str = "normal") -> str:
    """Returns `text` with so much cut out of its middle that in points `size` it is no wider than `inches`."""
    from matplotlib.backends.backend_agg import RendererAgg
    from matplotlib.font_manager import FontProperties

    renderer, font = RendererAgg(1, 1, style.DPI), FontProperties(size=size, weight=weight)

    def wide(part: str) -> bool:
        return bool(renderer.get_text_width_height_descent(part, font, ismath=False)[0] > inches * style.DPI)

    short = style.short(text, len(text) + 1)
    most = len(text)
    while most > 3 and wide(short):
        most -= 1
        short = style.short(text, most)
    return short


def _legend_over(axis: Any, names: Sequence[str]) -> None:
    longest = max(len(name) for name in names) * 0.08 + 0.5  # inches, about
    axis.legend(
        frameon=False, fontsize=9, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=max(1, int(5.6 / longest)),
        borderaxespad=0.1, handlelength=1.4,
    )  # fmt: skip
