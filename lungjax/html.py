"""HTML of a plain page: every text is escaped here, and nothing is fetched from elsewhere."""

from collections.abc import Sequence
from html import escape
from typing import Any

STYLE = """body { font: 16px/1.5 sans-serif; color: #222; max-width: 1080px; margin: 2em auto; padding: 0 1em; }
h2 { margin-top: 2.2em; border-bottom: 1px solid #ccc; } img { max-width: 100%; }
figure { margin: 1em 0; } figcaption { color: #555; font-size: 0.9em; }
table { border-collapse: collapse; margin: 1em 0; } td, th { padding: 0.2em 0.8em; border-bottom: 1px solid #ddd; }
td { text-align: right; } td:first-child, th:first-child { text-align: left; } code { overflow-wrap: anywhere; }"""


def page(title: str, sections: Sequence[str]) -> str:
    """Returns a whole page of HTML `sections`."""
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    body = "\n".join(sections)
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def heading(text: str, level: int) -> str:
    """Returns a heading; `level` 1 is the page's own."""
    return f"<h{level}>{escape(text)}</h{level}>"


def paragraph(text: str) -> str:
    """Returns a paragraph."""
    return f"<p>{escape(text)}</p>"


def bullets(lines: Sequence[str], strong: bool = False) -> str:
    """Returns a list, "" without `lines`."""
    opened, closed = ("<strong>", "</strong>") if strong else ("", "")
    items = "".join(f"<li>{opened}{escape(line)}{closed}</li>" for line in lines)
    return f"<ul>{items}</ul>" if items else ""


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Returns a table; the first cell of a row is its name."""
    top = "".join(f"<th>{escape(text)}</th>" for text in head)
    cells = [[f"{cell:,}" if isinstance(cell, int) else escape(str(cell)) for cell in row] for row in rows]
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>\n" for row in cells)
    return f"<table><thead><tr>{top}</tr></thead>\n<tbody>{body}</tbody></table>"


def figure(file: str, caption: str, names: Sequence[str] = ()) -> str:
    """Returns a picture of the page's own folder; `names` of the files it shows can be unfolded."""
    lines = "<br>".join(map(escape, names))
    more = f"<details><summary>File names in full</summary><code>{lines}</code></details>" if names else ""
    words = f"<figcaption>{escape(caption)}{more}</figcaption>"
    return f'<figure><img src="{escape(file)}" alt="{escape(caption)}">{words}</figure>'
