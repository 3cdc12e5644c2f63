"""Opens a report.html in a headless Chromium as a phone and a desk show it: `python tests/browser/screenshots.py RUN`.

Needs a `chromium` (Debian: apt-get install chromium) and no network. For each screen it writes SCREEN.png, what is seen
first, and SCREEN_1.png and on, the whole page in pieces; it fails if a page is wider than the screen, if a picture is
not shown, or if the browser complains about something in the page.
"""

import argparse
import sys
from pathlib import Path

import chromium

SCREENS = {"phone": (360, 800), "desk": (1280, 900)}  # CSS pixels
PIECE = 4000  # pixels of the page's height in one picture
# What scrolls in a box of its own may be wider than the screen.
MEASURE = """(() => {
  const root = document.documentElement;
  const out = [...document.querySelectorAll("body *")].filter((node) => !node.closest(".wide, pre")
    && node.getBoundingClientRect().right > root.clientWidth + 1).map((node) => node.outerHTML.slice(0, 120));
  const images = [...document.images];
  return {width: root.scrollWidth, height: root.scrollHeight, out: out.slice(0, 5), images: images.length,
    broken: images.filter((image) => !image.naturalWidth).map((image) => image.alt)};
})()"""


def look(browser: chromium.Browser, address: str, screen: str, out: Path) -> list[str]:
    """Writes the pictures of one screen and returns what is wrong."""
    width, height = SCREENS[screen]
    page = browser.open(address, width, height)
    found = page.run(MEASURE)
    print(f"{screen}: {found['width']} x {found['height']} pixels, {found['images']} pictures")
    pieces = {screen: (0, height)}
    for start in range(0, found["height"], PIECE):
        pieces[f"{screen}_{start // PIECE + 1}"] = (start, min(PIECE, found["height"] - start))
    for piece, (start, tall) in pieces.items():
        path = (out / f"{piece}.png").resolve()
        page.screenshot(path, (0, start, width, tall))
        print(path)
    wrong = []
    if found["width"] > width or found["out"]:
        wrong.append(f"{screen}: {found['width']} pixels wide, wider than {width}: {found['out']}")
    if found["broken"]:
        wrong.append(f"{screen}: pictures that are not shown: {found['broken']}")
    wrong += [f"{screen}: {event['entry']['text']}" for event in page.events("Log.entryAdded")]
    wrong += [f"{screen}: {event['exceptionDetails']['text']}" for event in page.events("Runtime.exceptionThrown")]
    page.close()
    return wrong


def main() -> None:
    """Reads the flags, takes the pictures, and says what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path, help="a report.html, or the folder of a run")
    parser.add_argument("--out", type=Path, default=Path("screenshots"), help="folder for the pictures")
    given = parser.parse_args()
    page = (given.page / "report.html" if given.page.is_dir() else given.page).resolve()
    if not page.is_file():
        sys.exit(f"{page}: no such file")
    given.out.mkdir(parents=True, exist_ok=True)
    if chromium.program() is None:
        sys.exit(chromium.MISSING)
    with chromium.Browser() as browser:
        wrong = [line for screen in SCREENS for line in look(browser, page.as_uri(), screen, given.out)]
    if wrong:
        sys.exit("\n".join(dict.fromkeys(wrong)))


if __name__ == "__main__":
    main()
