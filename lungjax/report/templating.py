"""Pages from the Jinja templates in `templates/`: NAME.html.j2 and NAME.md.j2, with every value escaped.

The context of a page consists of plain values, `Number`, `Table` and `Figure`. A page in both formats has one body,
NAME.j2, which calls the macros of either format. HTML pages are self-contained and have no scripts.
"""

import base64
import numbers
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import markupsafe
from markupsafe import Markup
from PIL import Image

READABLE_SCALE = 0.6  # of a figure's width, below which its text is illegible
MIN_SCROLL_WIDTH = 420  # pixels; a figure that is legible at this width fits any screen
MAX_LISTED = 8  # names in a sentence
CONTROL_CHARACTERS = {code: "\ufffd" for code in (*range(9), 11, 12, *range(14, 32), 127)}  # invalid in HTML
# An underscore between letters or digits is not emphasis: names such as slice.auc_macro stay unmodified.
MARKDOWN = re.compile(r"[\\|*`<&\[\]$~]|(?<![^\W_])_|_(?![^\W_])")
LINK = re.compile(r"(https?://[^\s<>\"']*[^\s<>\"'.,;:)\]])")


class Number(NamedTuple):
    """A number in a table; None if undefined."""

    value: float | None
    low: float | None = None  # of the 95 % interval
    high: float | None = None

    def __str__(self) -> str:
        """Returns "0.912 (0.884 to 0.937)", or "0.912" without an interval."""
        interval = "" if self.low is None else f" ({rate(self.low)} to {rate(self.high)})"
        return f"{rate(self.value)}{interval}"


class Table(NamedTuple):
    """A table of a page; the first cell of each row names the row."""

    head: Sequence[str]  # all "" for no head
    rows: Sequence[Sequence[Any]]
    title: str = ""
    note: str = ""  # a paragraph below
    text: bool = False  # the cells are text, aligned left


@dataclass(frozen=True)
class Figure:
    """A PNG figure of a page."""

    path: str  # relative to the page
    caption: str
    names: Sequence[str] = ()  # of the image files in it
    source: str = ""  # data URI of an embedded figure; "" links to `path`
    size: tuple[str, str] = ("", "")  # width and height in pixels of an embedded figure
    min_width: str = ""  # CSS pixels below which it scrolls


def embed(path: Path, caption: str) -> Figure:
    """Returns a figure that HTML embeds and Markdown links to. Raises OSError for a file that is not a PNG image."""
    with Image.open(path, formats=["PNG"]) as image:
        width, height = image.size
    legible = round(READABLE_SCALE * width)
    return Figure(
        path=f"{path.parent.name}/{path.name}",
        caption=caption,
        source=f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode('ascii')}",
        size=(str(width), str(height)),
        min_width=str(legible) if legible > MIN_SCROLL_WIDTH else "",
    )


def render(template: str, **context: Any) -> str:
    """Renders a file of `templates/`: Markdown if its name ends in .md.j2, otherwise HTML."""
    html = not template.endswith(".md.j2")
    text = _environment(html).get_template(template).render(context, html=html)
    return text if html else re.sub(r"\n{3,}", "\n\n", text.strip()) + "\n"


@lru_cache
def _environment(html: bool) -> jinja2.Environment:
    escape = escape_html if html else escape_markdown
    link = Markup('<a href="{0}" rel="noreferrer">{0}</a>' if html else "<{0}>")

    def linked(text: str) -> Markup:
        # The pattern has one group, so every second part is an address.
        parts = enumerate(LINK.split(text.translate(CONTROL_CHARACTERS)))
        return Markup("").join(link.format(part) if i % 2 else escape(part) for i, part in parts)

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lungjax.report"),
        autoescape=True,
        finalize=lambda value: value if isinstance(value, Markup) else escape(plain(value)),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "compact": lambda text: Markup("\n".join(line for line in text.splitlines() if line.strip())),
        "count": count, "duration": duration, "linked": linked, "listed": listed, "plain": plain, "rate": rate,
        "squash": lambda text: Markup(" ".join(text.split())),
    }  # fmt: skip
    environment.tests["metric"] = lambda value: isinstance(value, Number)
    return environment


def escape_html(text: str) -> Markup:
    """Returns HTML that displays `text` literally."""
    return markupsafe.escape(text.translate(CONTROL_CHARACTERS))


def escape_markdown(text: str) -> Markup:
    """Returns one line of Markdown that displays `text` literally, including in a table cell."""
    return Markup(MARKDOWN.sub(r"\\\g<0>", re.sub(r"\s+", " ", text.translate(CONTROL_CHARACTERS))))


def plain(value: Any) -> str:
    """Formats a value: "1,234", "a, b" for a list, "jax 0.10" for a dict, "-" for None."""
    if value is None:
        return "-"
    if isinstance(value, Mapping):
        value = [f"{key} {plain(each)}" for key, each in value.items()]
    if isinstance(value, (list, tuple)) and not isinstance(value, Number):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, numbers.Integral) and not isinstance(value, bool) else str(value)


def rate(value: float | None) -> str:
    """Returns "0.931", or "-" for an undefined number."""
    return "-" if value is None else f"{value:.3f}"


def count(n: int, noun: str) -> str:
    """Returns "1 slice" or "2,000 slices"."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def listed(names: Sequence[str], word: str = "and") -> str:
    """Returns "a, b and c", or the first MAX_LISTED names and the number of the others."""
    if len(names) > MAX_LISTED:
        return f"{', '.join(names[:MAX_LISTED])} {word} {len(names) - MAX_LISTED} more"
    return f" {word} ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def duration(seconds: float) -> str:
    """Returns "3 min 5 s" or "2 h 10 min"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
