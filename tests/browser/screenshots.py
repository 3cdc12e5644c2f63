"""Screenshots of a report.html in headless Chromium: python tests/browser/screenshots.py RUN

Needs the extra `browser` and Chromium (Debian: apt-get install chromium). Writes SCREEN.png, the first view, and
SCREEN_full.png for each screen. Fails if the page is wider than the screen, if an image is missing, or if the browser
logs an error.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "serve"))
from visits import OVERFLOW, launch, watch_errors

SCREENS = {"phone": (360, 800), "desk": (1280, 900)}  # CSS pixels
BROKEN = "[...document.images].filter((image) => !image.naturalWidth).map((image) => image.alt)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path, help="a report.html, or the folder of a run")
    parser.add_argument("--out", type=Path, default=Path("screenshots"), help="folder for the images")
    args = parser.parse_args()
    path = (args.page / "report.html" if args.page.is_dir() else args.page).resolve()
    if not path.is_file():
        sys.exit(f"{path}: no such file")
    problems = []
    with launch() as browser:
        for screen, (width, height) in SCREENS.items():
            page = browser.new_page(viewport={"width": width, "height": height})
            errors = watch_errors(page)
            page.goto(path.as_uri())
            for name, full in ((screen, False), (f"{screen}_full", True)):
                page.screenshot(path=args.out / f"{name}.png", full_page=full)
            findings = {"too wide": page.evaluate(OVERFLOW), "missing images": page.evaluate(BROKEN), "errors": errors}
            problems += [f"{screen}: {kind}: {values[:5]}" for kind, values in findings.items() if values]
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
