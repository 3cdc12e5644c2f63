"""Opens a report.html in a headless Chromium as a phone and a desk show it: `python tests/browser/screenshots.py RUN`.

Needs a `chromium` (Debian: apt-get install chromium) and no network. For each screen it writes SCREEN.png, what is seen
first, and SCREEN_1.png and on, the whole page in pieces; it fails if a page is wider than the screen, if a picture is
not shown, or if the browser complains about something in the page.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SCREENS = {"phone": (360, 800), "desk": (1280, 900)}  # CSS pixels
PIECE = 4000  # pixels of the page's height in one picture
# Run in a copy of the page that may run scripts. What scrolls in a box of its own may be wider than the screen.
MEASURE = """<script>addEventListener("load", () => {
  const root = document.documentElement;
  const out = [...document.querySelectorAll("body *")].filter((node) => !node.closest(".wide, pre")
    && node.getBoundingClientRect().right > root.clientWidth + 1).map((node) => node.outerHTML.slice(0, 120));
  const images = [...document.images];
  const found = {inner: innerWidth, width: root.scrollWidth, height: root.scrollHeight, out: out.slice(0, 5),
    images: images.length, broken: images.filter((image) => !image.naturalWidth).map((image) => image.alt)};
  document.body.textContent = "MEASURED" + JSON.stringify(found) + "END";
});</script>"""
POLICY = re.compile(r"<meta http-equiv=\"Content-Security-Policy\"[^>]*>")


def run(*flags: str) -> subprocess.CompletedProcess:
    """Runs Chromium without a window, for five minutes at most."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not program:
        sys.exit("no chromium found; Debian: apt-get install chromium")
    root = ["--no-sandbox"] if os.geteuid() == 0 else []
    with tempfile.TemporaryDirectory() as profile:
        command = [program, "--headless", "--disable-gpu", "--hide-scrollbars", "--disable-dev-shm-usage", *root]
        command += ["--no-first-run", "--disable-extensions", "--disable-background-networking"]
        command += ["--enable-logging=stderr", f"--user-data-dir={profile}", *flags]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)


def framed(page: Path, folder: Path, width: int, height: int, start: int, whole: int) -> str:
    """Returns the address of a page with `height` pixels from `start` on of `page`, which is `whole` pixels tall.

    In a frame, because a window can't be as narrow as a phone.
    """
    frame = folder / f"frame_{width}_{start}_{height}.html"
    box = f"width: {width}px; height: {height}px; overflow: hidden"
    inner = f"border: 0; display: block; width: {width}px; height: {whole}px; margin-top: -{start}px"
    text = f'<div style="{box}"><iframe src="{page.as_uri()}" style="{inner}"></iframe></div>'
    frame.write_text(f'<!DOCTYPE html><body style="margin: 0">{text}</body>', "utf-8")
    return frame.as_uri()


def measure(page: Path, folder: Path, width: int, height: int) -> dict:
    """Returns width and height of the whole page at a screen's width, and what sticks out."""
    copy = folder / "measured.html"
    text = POLICY.sub("", page.read_text("utf-8"))
    copy.write_text(text.replace("</body>", MEASURE + "</body>"), "utf-8")
    # A frame has an origin of its own among files, so its text is asked for by the flag that lets pages read files.
    reader = folder / "reader.html"
    reader.write_text(
        f'<!DOCTYPE html><body><iframe id="f" src="{copy.as_uri()}" style="border: 0; width: {width}px; height: '
        f'{height}px"></iframe><script>addEventListener("load", () => setTimeout(() => document.body.append('
        'document.getElementById("f").contentDocument.body.textContent), 500));</script></body>',
        "utf-8",
    )
    flags = ("--allow-file-access-from-files", "--virtual-time-budget=5000", "--dump-dom", "--window-size=1400,1000")
    said = run(*flags, reader.as_uri()).stdout
    found = re.search(r"MEASURED(\{.*\})END", said, re.S)
    if not found:
        sys.exit(f"the page could not be measured: {said[-300:]}")
    return json.loads(found[1])


def main() -> None:
    """Reads the flags, takes the pictures, and says what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path, help="a report.html, or the folder of a run")
    parser.add_argument("--out", type=Path, default=Path("screenshots"), help="folder for the pictures")
    given = parser.parse_args()
    page = (given.page / "report.html" if given.page.is_dir() else given.page).resolve()
    given.out.mkdir(parents=True, exist_ok=True)
    wrong = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for screen, (width, height) in SCREENS.items():
            found = measure(page, folder, width, height)
            print(f"{screen}: {found['width']} x {found['height']} pixels, {found['images']} pictures")
            if found["width"] > width or found["out"]:
                wrong.append(f"{screen}: {found['width']} pixels wide, wider than {width}: {found['out']}")
            if found["broken"]:
                wrong.append(f"{screen}: pictures that are not shown: {found['broken']}")
            whole = found["height"]
            pieces = {screen: (0, height, height)}
            for start in range(0, whole, PIECE):
                pieces[f"{screen}_{start // PIECE + 1}"] = (start, min(PIECE, whole - start), whole)
            for piece, (start, tall, all_of_it) in pieces.items():
                picture = (given.out / f"{piece}.png").resolve()
                flags = (f"--screenshot={picture}", f"--window-size={width},{tall}")
                said = run(*flags, framed(page, folder, width, tall, start, all_of_it)).stderr
                wrong += [
                    f"{screen}: {line[line.index('CONSOLE') :]}" for line in said.splitlines() if "CONSOLE" in line
                ]
                print(picture)
    if wrong:
        sys.exit("\n".join(dict.fromkeys(wrong)))


if __name__ == "__main__":
    main()
