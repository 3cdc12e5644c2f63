"""The service, and actions on its page."""

import json
import os
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from chromium import Page
from services import running

import lungjax

READY = "!document.getElementById('layout').hidden"
# Runs before the page's scripts: counts violations of the content policy, and layout shifts.
WATCH = """window.violations = []; window.shift = 0;
addEventListener("securitypolicyviolation", (event) => violations.push(event.violatedDirective + event.blockedURI));
new PerformanceObserver((list) => {
  for (const entry of list.getEntries()) if (!entry.hadRecentInput) shift += entry.value;
}).observe({type: "layout-shift", buffered: true});"""
# Elements that are wider than the window, except in scrollable boxes.
OUT = """(() => {
  const width = document.documentElement.clientWidth;
  const out = (node) => { const b = node.getBoundingClientRect(); return b.right > width + 1 || b.left < -1; };
  return [...document.querySelectorAll("body *")].filter((node) => node.checkVisibility() && out(node)
    && !node.closest(".wide, .unseen, .skip")).map((node) => node.outerHTML.slice(0, 150));
})()"""
# Controls and pictures without a name for screen readers.
NAMELESS = """[...document.querySelectorAll("img, button, input, select")].filter((node) => node.checkVisibility()
  && !node.getAttribute("alt") && !node.innerText?.trim() && !node.getAttribute("aria-label") && !node.labels?.length)
  .map((node) => node.outerHTML)"""
CARD = """(() => {
  const cards = [...document.querySelectorAll("#cards > .card")];
  const node = cards.find((one) => one.querySelector(".name").textContent == %s);
  const text = (selector) => node.querySelector(selector)?.innerText ?? null;
  const wide = (row, selector) => row.querySelector(selector).getBoundingClientRect().width;
  return {warning: text(".warning"), best: text(".top-class"), problem: text(".problem"), words: node.innerText,
    inside: node.querySelectorAll("h3 *").length,
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


def drop(page: Page, *paths: Path) -> None:
    """Drops files on the page, and waits for the results."""
    page.until(READY)
    page.run("scrollTo(0, 0)")
    before = page.run("document.querySelectorAll('#cards > .card').length")
    box = "document.getElementById('drop').getBoundingClientRect()"
    middle = page.run(f"(() => {{ const b = {box}; return [b.x + b.width / 2, b.y + b.height / 2]; }})()")
    page.drop(middle, list(paths))
    finished(page, before + len(paths))


def finished(page: Page, count: int) -> None:
    """Waits until there are `count` cards with results."""
    page.until(f"document.querySelectorAll('#cards > .card').length == {count}")
    page.until("document.getElementById('progress').value == document.getElementById('progress').max")


def card(page: Page, path: Path) -> dict[str, Any]:
    """Returns the content of a card; `bars` has class, percentage, called positive, width in percent."""
    return page.run(CARD % json.dumps(path.name))


def change(page: Page, selector: str, value: str, event: str = "change") -> None:
    """Sets the value of a control."""
    page.run(f"""(() => {{ const node = document.querySelector({json.dumps(selector)});
      node.value = {json.dumps(value)}; node.dispatchEvent(new Event("{event}")); }})()""")


def click(page: Page, selector: str) -> None:
    """Clicks the first match of a selector."""
    page.run(f"document.querySelector({json.dumps(selector)}).click()")


def wait_for_map(page: Page) -> None:
    """Waits for the first saliency map."""
    page.until("[...document.querySelectorAll('.heat')].some((image) => image.complete && image.naturalWidth)")


def picture(page: Page, name: str) -> None:
    """Keeps a screenshot if LUNGJAX_SCREENSHOTS is set."""
    folder = os.environ.get("LUNGJAX_SCREENSHOTS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(Path(folder) / f"{name}.png")
