"""Screenshots of a report.html in headless Chromium: python tests/browser/screenshots.py RUN

Needs `chromium` (Debian: apt-get install chromium). For each screen it writes SCREEN.png, the first view, and
SCREEN_1.png and further pieces of the page. It fails if the page is wider than the screen, if a picture is missing, or
if the browser logs an error.
"""

import argparse
import sys
from pathlib import Path

import chromium

SCREENS = {"phone": (360, 800), "desk": (1280, 900)}  # CSS pixels
PIECE = 4000  # pixels of the page's height per picture
# Scrollable boxes may be wider than the screen.
MEASURE = """(() => {
  const root = document.documentElement;
  const out = [...document.querySelectorAll("body *")].filter((node) => !node.closest(".wide, pre")
    && node.getBoundingClientRect().right > root.clientWidth + 1).map((node) => node.outerHTML.slice(0, 120));
  const images = [...document.images];
  return {width: root.scrollWidth, height: root.scrollHeight, out: out.slice(0, 5), images: images.length,
    broken: images.filter((image) => !image.naturalWidth).map((image) => image.alt)};
})()"""


def capture(browser: chromium.Browser, address: str, screen: str, out: Path) -> list[str]:
    """Writes the pictures of one screen and returns the problems."""
    width, height = SCREENS[screen]
    page = browser.open(address, width, height)
    page_size = page.run(MEASURE)
    print(f"{screen}: {page_size['width']} x {page_size['height']} pixels, {page_size['images']} pictures")
    pieces = {screen: (0, height)}
    for start in range(0, page_size["height"], PIECE):
        pieces[f"{screen}_{start // PIECE + 1}"] = (start, min(PIECE, page_size["height"] - start))
    for piece, (start, tall) in pieces.items():
        path = (out / f"{piece}.png").resolve()
        page.screenshot(path, (0, start, width, tall))
        print(path)
    problems = []
    if page_size["width"] > width or page_size["out"]:
        problems.append(f"{screen}: {page_size['width']} pixels wide, wider than {width}: {page_size['out']}")
    if page_size["broken"]:
        problems.append(f"{screen}: missing pictures: {page_size['broken']}")
    problems += [f"{screen}: {event['entry']['text']}" for event in page.events("Log.entryAdded")]
    problems += [f"{screen}: {event['exceptionDetails']['text']}" for event in page.events("Runtime.exceptionThrown")]
    page.close()
    return problems


def main() -> None:
    """Reads the flags, writes the pictures, and prints the problems."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path, help="a report.html, or the folder of a run")
    parser.add_argument("--out", type=Path, default=Path("screenshots"), help="folder for the pictures")
    args = parser.parse_args()
    page = (args.page / "report.html" if args.page.is_dir() else args.page).resolve()
    if not page.is_file():
        sys.exit(f"{page}: no such file")
    args.out.mkdir(parents=True, exist_ok=True)
    if chromium.program() is None:
        sys.exit(chromium.MISSING)
    with chromium.Browser() as browser:
        problems = [line for screen in SCREENS for line in capture(browser, page.as_uri(), screen, args.out)]
    if problems:
        sys.exit("\n".join(dict.fromkeys(problems)))


if __name__ == "__main__":
    main()
