"""The service, and actions on its page."""

import json
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, expect
from services import running

import lungjax

expect.set_options(timeout=60_000)
# Elements that are wider than the window, except in scrollable boxes.
OVERFLOW = """(() => {
  const width = document.documentElement.clientWidth;
  const out = (node) => { const b = node.getBoundingClientRect(); return b.right > width + 1 || b.left < -1; };
  return [...document.querySelectorAll("body *")].filter((node) => node.checkVisibility() && out(node)
    && !node.closest(".wide, pre, .unseen, .skip")).map((node) => node.outerHTML.slice(0, 150));
})()"""
CARD = """(() => {
  const cards = [...document.querySelectorAll("#cards > .card")];
  const node = cards.find((one) => one.querySelector(".name").textContent == %s);
  const text = (selector) => node.querySelector(selector)?.innerText ?? null;
  const wide = (row, selector) => row.querySelector(selector).getBoundingClientRect().width;
  return {warning: text(".warning"), best: text(".top-class"), words: node.innerText,
    elements: node.querySelectorAll("h3 *").length,
    bars: [...node.querySelectorAll(".bars li")].map((row) => [row.children[0].textContent,
      parseFloat(row.children[1].textContent), row.children[2].textContent.includes("positive"),
      row.querySelector(".track b") ? 100 * wide(row, ".track b") / wide(row, ".track") : null])};
})()"""


@contextmanager
def served(run: Path, token: str = "") -> Iterator[str]:
    """Serves a run on a free port; yields the address."""
    with running(lungjax.load(run), token=token) as service:
        yield f"http://127.0.0.1:{service.port}/"


def post(address: str, path: Path) -> Any:
    """Returns the answer to a request with the file as its body."""
    request = urllib.request.Request(address, path.read_bytes(), {"Content-Type": "application/octet-stream"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def drop(page: Page, *paths: Path, results: int = 0) -> None:
    """Drops files or folders on the page and waits for the number of results, by default one per path."""
    ready(page)
    drop_zone = page.locator("#drop")
    drop_zone.scroll_into_view_if_needed()
    box, before = drop_zone.bounding_box(), page.locator("#cards > .card").count()
    place = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
    data = {"items": [], "files": list(map(str, paths)), "dragOperationsMask": 1}
    session = page.context.new_cdp_session(page)
    for kind in ("dragEnter", "dragOver", "drop"):
        session.send("Input.dispatchDragEvent", {"type": kind, **place, "data": data})
    finished(page, before + (results or len(paths)))


def ready(page: Page) -> None:
    """Waits until the page shows the model."""
    page.locator("#layout").wait_for()


def finished(page: Page, count: int) -> None:
    """Waits until there are `count` cards with results."""
    expect(page.locator("#cards > .card")).to_have_count(count)
    page.wait_for_function("() => { const bar = document.getElementById('progress'); return bar.value == bar.max; }")


def card(page: Page, path: Path) -> dict[str, Any]:
    """Returns the content of a card; each of `bars` has class, percentage, whether positive, and width in percent."""
    return page.evaluate(CARD % json.dumps(path.name))


def wait_for_map(page: Page) -> None:
    """Waits for the first saliency map."""
    page.wait_for_function("() => [...document.querySelectorAll('.heat')].some((map) => map.naturalWidth)")
