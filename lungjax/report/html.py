"""HTML of a plain page: every text is escaped here, and nothing is fetched from elsewhere.

The pages need no script, and fit a phone as well as a desk: what is wider than the screen (a table, a picture with
small writing) scrolls in a box of its own. Headings, tables and figures come back as text, to be joined by `page`.
"""

import base64
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

STYLE = """* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { font: 16px/1.5 sans-serif; color: #222; background: #fff; max-width: 1080px; margin: 1.5em auto; padding: 0 1em;
  overflow-wrap: anywhere; }
h1 { line-height: 1.2; } h2 { margin-top: 2.2em; border-bottom: 1px solid #ccc; } h3 { margin: 1.8em 0 0.4em; }
img { display: block; max-width: 100%; height: auto; }
figure { margin: 1.2em 0; } figcaption { color: #555; font-size: 0.9em; margin-top: 0.3em; }
.wide { overflow-x: auto; margin: 0.8em 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
td, th { padding: 0.2em 0.7em; border-bottom: 1px solid #ddd; text-align: right; vertical-align: top; }
th { vertical-align: bottom; }
td:first-child, th:first-child, .text td, .text th { text-align: left; }
td:first-child, th:first-child { position: sticky; left: 0; background: #fff; padding-left: 0; min-width: 6.5em;
  max-width: 24em; overflow-wrap: anywhere; }
small { color: #555; white-space: nowrap; font-size: 0.82em; } td small { display: block; line-height: 1.2; }
code, pre { font-size: 0.9em; overflow-wrap: anywhere; } pre { overflow-x: auto; white-space: pre; }
nav { display: flex; flex-wrap: wrap; gap: 0.3em 1.1em; border: solid #ccc; border-width: 1px 0; padding: 0.5em 0; }
.note { border-left: 5px solid #0072b2; background: #eef5fa; padding: 0.6em 1em; margin: 1em 0; }
.warning { border-left: 5px solid #d55e00; background: #fdf1e9; padding: 0.6em 1em; margin: 1em 0; }
.note > :first-child, .warning > :first-child { margin-top: 0; }
.note > :last-child, .warning > :last-child { margin-bottom: 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(102px, 1fr)); gap: 0.6em; margin: 1em 0; }
.tiles div { border: 1px solid #ddd; border-radius: 4px; padding: 0.4em 0.6em; }
.tiles b { display: block; font-size: 1.55em; line-height: 1.3; }
.tiles span { display: block; font-size: 0.85em; color: #555; }
ul { padding-left: 1.3em; } summary { cursor: pointer; }
@media (max-width: 600px) { body { margin: 0.5em auto; padding: 0 0.75em; } h1 { font-size: 1.45em; }
  h2 { font-size: 1.25em; margin-top: 1.6em; } .tiles b { font-size: 1.3em; } td, th { padding: 0.2em 0.45em; }
  td:first-child, th:first-child { max-width: 9em; } }
@media print { .wide { overflow: visible; } h2, h3 { break-after: avoid; } figure { break-inside: avoid; } }"""
# What a sealed page may do: show its own pictures in its own style. A browser then refuses all else.
SEALED = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
READABLE = 0.6  # of a picture's own size, below which its writing can't be read
NARROW = 420  # pixels; a picture that is as small at READABLE fits any screen
CONTROL = {code: "\ufffd" for code in (*range(9), 11, 12, *range(14, 32), 127)}  # HTML forbids them
LINK = re.compile(r"https?://[^\s<>\"']*[^\s<>\"'.,;:)\]]")


class Markup(str):
    """HTML that is escaped already; tables take it as it is."""


def text(words: Any) -> str:
    """Returns `words` as HTML that shows them, whatever signs they have."""
    return escape(str(words).translate(CONTROL))


def page(title: str, sections: Sequence[str], sealed: bool = False) -> str:
    """Returns a whole page of HTML `sections`; a `sealed` one has all in itself, and browsers are told so."""
    head = [
        '<meta charset="utf-8">',
        *([f'<meta http-equiv="Content-Security-Policy" content="{SEALED}">'] if sealed else []),
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{text(title)}</title>",
        f"<style>{STYLE}</style>",
    ]
    lines = ["<!DOCTYPE html>", '<html lang="en"><head>', *head, "</head>", "<body>", *sections, "</body></html>"]
    return "\n".join(lines) + "\n"


def heading(words: str, level: int, anchor: str = "") -> str:
    """Returns a heading; `level` 1 is the page's own. `anchor` is the id that `contents` leads to."""
    own = f' id="{text(anchor)}"' if anchor else ""
    return f"<h{level}{own}>{text(words)}</h{level}>"


def contents(anchors: dict[str, str]) -> str:
    """Returns links to places of the page, {anchor: what it is}."""
    links = "\n".join(f'<a href="#{text(anchor)}">{text(words)}</a>' for anchor, words in anchors.items())
    return f"<nav>\n{links}\n</nav>"


def paragraph(words: str) -> str:
    """Returns a paragraph."""
    return f"<p>{text(words)}</p>"


def linked(words: str) -> str:
    """Returns a paragraph in which web addresses are links; for lungjax's own texts, not for a user's."""
    parts, end = [], 0
    for found in LINK.finditer(words):
        address = text(found[0])
        parts += [text(words[end : found.start()]), f'<a href="{address}" rel="noreferrer">{address}</a>']
        end = found.end()
    return f"<p>{''.join(parts)}{text(words[end:])}</p>"


def bullets(lines: Sequence[str], strong: bool = False) -> str:
    """Returns a list, "" without `lines`."""
    opened, closed = ("<strong>", "</strong>") if strong else ("", "")
    items = "".join(f"<li>{opened}{text(line)}{closed}</li>" for line in lines)
    return f"<ul>{items}</ul>" if items else ""


def box(kind: str, *parts: str) -> str:
    """Returns HTML `parts` set apart; `kind` is "note" or "warning"."""
    return f'<div class="{kind}">{"".join(parts)}</div>'


def tiles(numbers: Sequence[tuple[str, str, str]]) -> str:
    """Returns headline numbers side by side: (number, what it is, more)."""
    shown = "\n".join(
        f"<div><b>{text(number)}</b><span>{text(what)}</span><span>{text(more)}</span></div>"
        for number, what, more in numbers
    )
    return f'<div class="tiles">\n{shown}\n</div>'


def table(head: Sequence[str], rows: Sequence[Sequence[Any]], words: bool = False) -> str:
    """Returns a table; the first cell of a row is its name, and stays in sight where the others scroll.

    Whole numbers get commas, `Markup` stays as it is. `words`: the cells are text, on the left.
    """
    top = "".join(f"<th>{text(name)}</th>" for name in head)
    body = "".join(f"<tr>{''.join(f'<td>{_cell(cell)}</td>' for cell in row)}</tr>\n" for row in rows)
    above = f"<thead><tr>{top}</tr></thead>\n" if any(head) else ""
    # A keyboard can scroll what it can reach.
    kind = "wide text" if words else "wide"
    return f'<div class="{kind}" tabindex="0"><table>{above}<tbody>{body}</tbody></table></div>'


def _cell(value: Any) -> str:
    if isinstance(value, Markup):
        return value
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else text(value)


def details(summary: str, *parts: str) -> str:
    """Returns HTML `parts` that unfold at a click."""
    return f"<details><summary>{text(summary)}</summary>{''.join(parts)}</details>"


def preformatted(words: str) -> str:
    """Returns text in lines as they are, such as JSON."""
    return f'<pre tabindex="0">{text(words)}</pre>'


def figure(file: str, caption: str, names: Sequence[str] = ()) -> str:
    """Returns a picture of the page's own folder; `names` of the files it shows can be unfolded."""
    return _figure(f'<img src="{text(file)}" alt="{text(caption)}">', caption, names)


def embedded(path: Path, caption: str, names: Sequence[str] = ()) -> str:
    """Returns a picture that is part of the page, from a PNG file; a big one scrolls where it can't be read.

    `names` of the files it shows can be unfolded. Raises ValueError if the file is no PNG.
    """
    data = path.read_bytes()
    if data[:8] != b"\x89PNG\r\n\x1a\n" or len(data) < 24:
        raise ValueError(f"{path} is not a PNG picture, which a page embeds")
    width, height = (int.from_bytes(data[i : i + 4], "big") for i in (16, 20))  # of the first chunk, IHDR
    least = round(READABLE * width)
    style = f' style="min-width: {least}px"' if least > NARROW else ""
    source = f"data:image/png;base64,{base64.b64encode(data).decode('ascii')}"
    picture = f'<img src="{source}" width="{width}" height="{height}" alt="{text(caption)}"{style}>'
    return _figure(f'<div class="wide" tabindex="0">{picture}</div>', caption, names)


def _figure(picture: str, caption: str, names: Sequence[str]) -> str:
    lines = "<br>".join(map(text, names))
    more = f"<details><summary>File names in full</summary><code>{lines}</code></details>" if names else ""
    return f"<figure>{picture}<figcaption>{text(caption)}{more}</figcaption></figure>"
