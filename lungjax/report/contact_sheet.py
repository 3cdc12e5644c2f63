"""Contact sheets of images with text, mask contours or heat maps; gray levels are not rescaled."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lungjax.report import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CONTOURS = ((style.COLORS[5], (0, (4, 1.5))), (style.COLORS[4], "-"))  # of the first and the second mask of a tile
WIDTH, GAP, PAIR_GAP = 2.05, 0.12, 0.35  # inches: a tile with its gap, the gap, the extra gap between pairs
TITLE, HEAD, LINE = 0.42, 0.24, 0.155  # heights in inches: a section's title, a tile's head, a line below a tile
FONT_SIZE = 8.2  # points, of the lines
FRAME = "#999999"


@dataclass(frozen=True)
class Tile:
    """One image of a contact sheet."""

    image: np.ndarray  # uint8 [h, w], [h, w, 1] or [h, w, 3]
    lines: Sequence[str] = ()  # below it; the first one, usually a file name, is muted
    head: str = ""  # above it
    masks: Mapping[str, np.ndarray] = field(default_factory=dict)  # name: bool [h, w], drawn as contours
    heat: np.ndarray | None = None  # [h, w] in 0..1, drawn over the image
    frame: str = FRAME  # color
    wide: bool = False  # the lines may extend below the next tile


@dataclass(frozen=True)
class Section:
    """Tiles below an optional title."""

    tiles: Sequence[Tile]
    title: str = ""
    color: str = style.INK


def draw(sections: Sequence[Section], path: Path, columns: int, paired: bool = False, aspect: float = 1.2) -> None:
    """Draws sections of tiles, `columns` per row, with a legend for at most two masks.

    `paired` groups the tiles in pairs. Images taller than `aspect` times the width of a tile are scaled down.
    """
    side, pair_gap = WIDTH - GAP, PAIR_GAP if paired else 0.0
    masks = list(dict.fromkeys(name for section in sections for tile in section.tiles for name in tile.masks))
    legend = 0.34 if masks else 0.0
    width = columns * WIDTH + GAP + pair_gap * ((columns - 1) // 2)
    rows = [[s.tiles[i : i + columns] for i in range(0, len(s.tiles), columns)] for s in sections]
    sizes = [[_row_height(row, side, aspect) for row in each] for each in rows]
    height = legend + TITLE * sum(bool(s.title) for s in sections) + sum(map(sum, itertools.chain(*sizes))) + 0.04
    figure = style.figure(width, height, layout="none")
    top = height - legend
    for section, section_rows, heights in zip(sections, rows, sizes, strict=True):
        if section.title:
            place = (GAP / width, (top - 0.3) / height)
            figure.text(*place, section.title, fontsize=13, color=section.color, weight="bold")
            top -= TITLE
        for row, (head, tall, text) in zip(section_rows, heights, strict=True):
            bottom = top - head - tall
            for i, tile in enumerate(row):
                x = GAP + i * WIDTH + pair_gap * (i // 2)
                box = (x / width, bottom / height, side / width, tall / height)
                _show(figure.add_axes(box, anchor="N" if head else "S"), tile, masks)
                if tile.head:
                    line = fit(tile.head, side, 9.5, "bold")
                    place = (x / width, (bottom + tall + 0.07) / height)
                    figure.text(*place, line, fontsize=9.5, color=style.INK, weight="bold")
                for j, line in enumerate(tile.lines):
                    place = (x / width, (bottom - 0.17 - LINE * j) / height)
                    line = fit(line, side + WIDTH * tile.wide, FONT_SIZE)
                    figure.text(*place, line, fontsize=FONT_SIZE, color=style.INK if j else style.MUTED)
            top = bottom - text
    if masks:
        from matplotlib.lines import Line2D

        lines = [Line2D([], [], color=color, linestyle=dashes, linewidth=2) for color, dashes in CONTOURS[: len(masks)]]
        figure.legend(
            lines, masks, loc="upper left", bbox_to_anchor=(GAP / width, 1.0), ncols=2, frameon=False, fontsize=10,
            borderaxespad=0.2, borderpad=0.2, handlelength=3,
        )  # fmt: skip
    style.save(figure, path)


def _row_height(row: Sequence[Tile], side: float, aspect: float) -> tuple[float, float, float]:
    """Returns the heights in inches of the heads, the images and the lines of a row of tiles."""
    tall = max(tile.image.shape[0] / tile.image.shape[1] for tile in row)
    head = HEAD if any(tile.head for tile in row) else 0.0
    return head, min(tall, aspect) * side, 0.2 + LINE * max(len(tile.lines) for tile in row)


def _show(axis: "Axes", tile: Tile, masks: Sequence[str]) -> None:
    image = tile.image[..., 0] if tile.image.shape[-1:] == (1,) else tile.image
    axis.imshow(image, cmap="gray", vmin=0, vmax=255)
    if tile.heat is not None:
        axis.imshow(tile.heat, cmap="viridis", vmin=0, vmax=1, alpha=0.5)  # as `saliency.overlay`
    axis.spines[:].set(color=tile.frame, linewidth=0.8 if tile.frame == FRAME else 2)
    for name, mask in tile.masks.items():
        color, dashes = CONTOURS[masks.index(name)]
        if mask.any():
            # An empty border closes the contours of a mask that reaches the edge of the image.
            x, y = (np.arange(-1, n + 1) for n in mask.shape[::-1])
            axis.contour(x, y, np.pad(mask, 1), levels=[0.5], colors=color, linestyles=[dashes], linewidths=1.3)
    axis.set(xticks=[], yticks=[], xlim=(-0.5, image.shape[1] - 0.5), ylim=(image.shape[0] - 0.5, -0.5))


def fit(text: str, inches: float, size: float, weight: str = "normal") -> str:
    """Shortens `text` in the middle to a width of at most `inches` at font size `size` in points."""
    from matplotlib.backends.backend_agg import RendererAgg
    from matplotlib.font_manager import FontProperties

    renderer, font = RendererAgg(1, 1, style.DPI), FontProperties(size=size, weight=weight)

    def width(part: str) -> Any:
        return renderer.get_text_width_height_descent(part, font, ismath=False)[0] / style.DPI

    length = len(text) + 1
    while length > 3 and width(style.short(text, length)) > inches:
        length -= 1
    return style.short(text, length)
