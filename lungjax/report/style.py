"""Style of all figures: colors, axes, legends and files.

Figures are matplotlib Figure objects without pyplot, global state or a display; matplotlib is imported when the first
one is drawn. The colors are the color-blind safe palette of Okabe and Ito ("Color Universal Design", 2008) without
yellow; line styles change where colors repeat.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lungjax.runtime.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7F5F3F")
DASHES = (0, (5, 2))
STYLES = ("-", DASHES, (0, (1, 1.2)))
CORRECT, WRONG, INK, MUTED = "#009E73", "#D55E00", "#222222", "#767676"
DPI = 130


def figure(width: float, height: float, layout: str = "constrained") -> "Figure":
    """Returns an empty figure, `width` x `height` inches."""
    from matplotlib.figure import Figure  # here, so that importing this file stays cheap

    return Figure(figsize=(width, height), dpi=DPI, layout=layout, facecolor="white")  # type: ignore[arg-type]


def style(axis: "Axes", title: str = "", size: float = 11) -> None:
    """Gives an axis a light grid and frame, and a left-aligned title of `size` points."""
    axis.grid(color="#E4E4E4", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color("#999999")
    axis.tick_params(colors=INK, labelsize=9)
    axis.xaxis.label.set_color(INK)
    axis.yaxis.label.set_color(INK)
    axis.set_title(title, loc="left", fontsize=size, color=INK)


def line_style(i: int) -> dict[str, Any]:
    """Returns color and line style of curve `i`, for `axis.plot`."""
    return {"color": COLORS[i % len(COLORS)], "linestyle": STYLES[i // len(COLORS) % len(STYLES)]}


def legend_beside(axis: "Axes", classes: int) -> None:
    """Draws the legend of `classes` lines to the right of the axis."""
    axis.legend(
        frameon=False, fontsize=9 if classes <= 10 else 7, loc="upper left", bbox_to_anchor=(1.02, 1.0),
        labelspacing=0.8, handlelength=2.8, borderaxespad=0, ncols=1 + classes // 14,
    )  # fmt: skip


def save(figure: "Figure", path: Path) -> None:
    """Writes a figure as PNG, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial:
        figure.savefig(partial, format="png", bbox_inches="tight", pad_inches=0.15, metadata={"Software": None})


def percent(share: float) -> str:
    """Returns "93%", and "<1%" or ">99%" where rounding would give 0 or 100."""
    if 0 < share < 0.005:
        return "<1%"
    return ">99%" if 0.995 < share < 1 else f"{100 * share:.0f}%"


def short(text: str, length: int) -> str:
    """Shortens a name to `length` characters by cutting its middle, since file names differ at their ends."""
    text = " ".join(text.split())
    if len(text) > length:
        end = (length - 1) // 2
        text = text[: length - 1 - end] + "…" + text[-end:]
    return plain(text)


def plain(text: str) -> str:
    """Escapes $, which starts mathtext in matplotlib, and replaces unprintable characters."""
    text = "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)
    return text.encode("utf-8", "replace").decode().replace("$", r"\$")
