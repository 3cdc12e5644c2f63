"""What all pictures share: colours, fonts, and how a file is saved.

Drawn with matplotlib's Figure alone: no pyplot, no state shared between pictures, no display; matplotlib is
imported when the first picture is drawn. Every file appears whole, by a rename. The colours are those of
Okabe and Ito ("Color Universal Design", 2008) without yellow, told apart by the colour-blind too, and line
styles change where colours repeat.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from lungjax.runtime.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7F5F3F")
DASHES = (0, (5, 2))
STYLES = ("-", DASHES, (0, (1, 1.2)))
RIGHT, WRONG, INK, QUIET = "#009E73", "#D55E00", "#222222", "#767676"
DPI = 130


def figure(width: float, height: float, layout: str = "constrained") -> "Figure":
    """Returns an empty figure, `width` x `height` inches."""
    from matplotlib.figure import Figure  # here, so that importing this file stays cheap

    return Figure(figsize=(width, height), dpi=DPI, layout=layout, facecolor="white")  # type: ignore[arg-type]


def style(axis: "Axes") -> None:
    """Gives an axis a quiet grid and frame."""
    axis.grid(color="#E4E4E4", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color("#999999")
    axis.tick_params(colors=INK, labelsize=9)


def legend_beside(axis: "Axes", classes: int) -> None:
    """Puts the legend of `classes` lines right of the axis, where it hides nothing."""
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
    """Returns "93%", and "<1%" or ">99%" where rounding would hide the few exceptions."""
    if 0 < share < 0.005:
        return "<1%"
    return ">99%" if 0.995 < share < 1 else f"{100 * share:.0f}%"


def short(text: str, most: int) -> str:
    """Cuts out the middle of a name longer than `most`; file names differ at their ends."""
    text = " ".join(text.split())
    if len(text) > most:
        end = (most - 1) // 2
        text = text[: most - 1 - end] + "…" + text[-end:]
    return plain(text)


def plain(text: str) -> str:
    """Keeps matplotlib from reading $ as mathematics, and from bytes of a file's name that are no text."""
    return text.encode("utf-8", "replace").decode().replace("$", r"\$")
