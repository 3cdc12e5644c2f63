"""Headless Chromium, driven over its DevTools protocol through a pipe, without further packages.

    with Browser() as browser:
        page = browser.open("http://127.0.0.1:8000/", width=360, height=800)
        page.until("document.title == 'ready'")
        page.screenshot(Path("phone.png"))

Protocol: https://chromedevtools.github.io/devtools-protocol/
"""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SECONDS = 60.0  # default timeout
MISSING = "no chromium found; Debian: apt-get install chromium"
HEADLESS = ("--headless", "--disable-gpu", "--hide-scrollbars", "--disable-dev-shm-usage", "--no-first-run")
ALONE = ("--disable-extensions", "--disable-background-networking", "--disable-component-update")


def program() -> str | None:
    """Returns the path of Chromium or Chrome, or None."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next(filter(None, map(shutil.which, names)), None)


class Browser:
    """A browser with an empty profile; a context that ends it."""

    def __enter__(self) -> "Browser":
        path = program()
        if path is None:
            raise RuntimeError(MISSING)
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        # Chromium reads commands from file descriptor 3 and writes answers to 4, each followed by a zero byte.
        ends = [os.pipe(), os.pipe()]
        self._out, self._in = ends[0][1], ends[1][0]
        high = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (ends[0][0], ends[1][1])]  # neither is 3 or 4
        for end in (ends[0][0], ends[1][1]):
            os.close(end)
        root = ["--no-sandbox"] if os.geteuid() == 0 else []
        command = [path, *HEADLESS, *ALONE, *root, f"--user-data-dir={self._profile.name}", "--remote-debugging-pipe"]
        start = f'exec 3<&{high[0]} 4>&{high[1]}; exec "$0" "$@"'
        self._process = subprocess.Popen(
            ["bash", "-c", start, *command, "about:blank"],
            pass_fds=high,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in high:
            os.close(end)
        self._rest, self._number = b"", 0
        self.events: list[dict[str, Any]] = []
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.call("Browser.close")
            self._process.wait(10)
        except (RuntimeError, OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        os.close(self._in)
        os.close(self._out)
        self._profile.cleanup()

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Returns the browser's answer to a command. Raises RuntimeError for an error or no answer."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]
            self.events.append(answer)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._in], [], [], SECONDS)
            data = os.read(self._in, 1 << 20) if ready else b""
            if not data:
                raise RuntimeError(f"the browser exited, or sent nothing for {SECONDS:g} s")
            self._rest += data
        message, self._rest = self._rest.split(b"\0", 1)
        return json.loads(message)

    def open(self, address: str, width: int, height: int, dark: bool = False, before: str = "") -> "Page":
        """Opens a page in a window of width x height CSS pixels; the script `before` runs before the page's scripts."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, target, session)
        for domain in ("Page", "Runtime", "Log", "Network", "DOM"):
            page.call(f"{domain}.enable")
        page.screen(width, height, dark)
        if before:
            page.call("Page.addScriptToEvaluateOnNewDocument", source=before)
        page.call("Page.navigate", url=address)
        page.until("document.readyState == 'complete'")
        return page


class Page:
    """One page of a `Browser`."""

    def __init__(self, browser: Browser, target: str, session: str):
        self._browser, self._target, self._session = browser, target, session

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """As `Browser.call`, for this page."""
        return self._browser.call(method, self._session, **parameters)

    def screen(self, width: int, height: int, dark: bool = False, zoom: float = 1.0) -> None:
        """Sets the size of the window in CSS pixels (divided by `zoom`), and light or dark colors."""
        size = {"width": round(width / zoom), "height": round(height / zoom), "deviceScaleFactor": zoom}
        self.call("Emulation.setDeviceMetricsOverride", mobile=False, **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def run(self, script: str) -> Any:
        """Returns the value of an expression, awaiting promises. Raises RuntimeError if it throws."""
        options = {"expression": script, "returnByValue": True, "awaitPromise": True, "userGesture": True}
        found = self.call("Runtime.evaluate", **options)
        if "exceptionDetails" in found:
            thrown = found["exceptionDetails"]
            raise RuntimeError(thrown.get("exception", {}).get("description", thrown["text"]))
        return found["result"].get("value")

    def until(self, condition: str, seconds: float = SECONDS) -> None:
        """Waits until an expression is true. Raises RuntimeError, with the page's text, after `seconds`."""
        end = time.monotonic() + seconds
        while not self.run(f"Boolean({condition})"):
            if time.monotonic() > end:
                raise RuntimeError(f"timed out: {condition}; the page: {self.run('document.body.innerText')}")
            time.sleep(0.05)

    def choose(self, selector: str, files: list[Path]) -> None:
        """Chooses files in an <input type=file>."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(file) for file in files])

    def drop(self, place: Sequence[float], files: list[Path]) -> None:
        """Drops files at (x, y), with the browser's own drag events."""
        data = {"items": [], "files": [str(file) for file in files], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.call("Input.dispatchDragEvent", type=kind, x=place[0], y=place[1], data=data)

    def key(self, key: str, code: int = 0, text: str = "") -> None:
        """Presses and releases a key such as "Tab"; `code` is its Windows key code, `text` its character."""
        for kind in ("keyDown", "keyUp"):
            more = {"text": text} if text and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **more)

    def screenshot(self, path: Path, box: tuple[float, float, float, float] | None = None) -> None:
        """Writes the page, or its `box` (left, top, width, height in CSS pixels), as a PNG."""
        clip = dict(zip(("x", "y", "width", "height"), box, strict=True)) | {"scale": 1} if box else None
        given = {"clip": clip} if clip else {}
        found = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, **given)
        path.write_bytes(base64.b64decode(found["data"]))

    def events(self, method: str) -> list[dict[str, Any]]:
        """Returns the parameters of all events of a method, such as "Network.requestWillBeSent"."""
        self.run("0")  # pending events arrive first
        mine = (event for event in self._browser.events if event.get("sessionId") == self._session)
        return [event["params"] for event in mine if event["method"] == method]

    def close(self) -> None:
        """Closes the page."""
        self._browser.call("Target.closeTarget", targetId=self._target)
