"""Valid and malformed requests, and attacks, for `serve_load`."""

import itertools
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.benchmarks import harness

sys.path.append(str(harness.ROOT / "tests"))
import scans
from folders import encoded
from hostile_files import bombs, png
from services import TOKEN, conversation
from services import form as encode

SIDE = 512
MARKER = "Zentinel"  # in names, values, headers and queries of uploads; must not appear in the log
HEADERS = {"Authorization": f"Bearer {TOKEN}", "X-Patient": MARKER}
MULTIPART = {"Content-Type": "multipart/form-data; boundary=edge"}
# The path; the body, or a function that returns its parts; and the headers.
Request = tuple[str, bytes | Callable[[], Iterator[bytes]], dict[str, str]]


def request(body: Any, kind: str, **headers: str) -> Request:
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    return f"/predict?patient={MARKER}", body, {"Content-Type": kind, **headers}


def form(*files: bytes, path: str = "/predict") -> Request:
    return path, encode(*((f"{MARKER}.png", file) for file in files))[0], MULTIPART


def pictures(folder: Path | None, count: int = 24) -> list[Image.Image]:
    """Returns grayscale images of 512 px from the files in `folder`, or phantoms."""
    if folder is not None:
        files = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".png", ".jpg", ".jpeg"))
        chosen = [files[i] for i in np.linspace(0, len(files) - 1, count).astype(int)]
        return [Image.open(path).convert("L").resize((SIDE, SIDE)) for path in chosen]
    return [harness.phantom(seed)[1] for seed in range(count)]


def scan(picture: Image.Image, **tags: Any) -> bytes:
    tags |= {"PatientName": MARKER, "RescaleSlope": 1, "RescaleIntercept": -1024}
    return scans.file_bytes(scans.dataset(np.asarray(picture, np.uint16) * 6, "CT", **tags))


def valid(images: list[Image.Image]) -> dict[str, tuple[float, list[Request]]]:
    """Returns the relative frequency and the requests of each valid kind."""
    pngs, slices = list(map(encoded, images)), list(map(scan, images[:6]))
    return {
        "PNG": (6, [request(data, "image/png") for data in pngs]),
        "JPEG": (2, [form(encoded(image, "JPEG", quality=90)) for image in images[:6]]),
        "TIFF, BMP": (1, [form(encoded(images[0], "TIFF", compression="tiff_lzw")), form(encoded(images[1], "BMP"))]),
        "DICOM": (1, [request(data, "application/dicom") for data in slices]),
        "DICOM series of 6": (0.5, [form(*slices)]),
        "four PNGs, one bad": (0.5, [form(*pngs[:3], b"not an image")]),
        "explain": (0.5, [form(data, path="/explain") for data in pngs[:4]]),
    }


def malformed(images: list[Image.Image]) -> dict[str, list[Request]]:
    good, jpeg, dicom = encoded(images[0]), encoded(images[0], "JPEG"), scan(images[0])
    cuts = [(good, "image/png"), (jpeg, "image/jpeg"), (dicom, "application/dicom")]
    header = bytearray(jpeg)
    sides = header.index(b"\xff\xc0") + 5
    header[sides : sides + 4] = (60_000).to_bytes(2, "big") * 2
    elements = dicom + b"\xf1\x7f\x10\0SQ\0\0\xff\xff\xff\xff" + b"\xfe\xff\0\xe0\0\0\0\0" * 10**6
    multipart = encode(("f", good))[0]

    def slowly() -> Iterator[bytes]:
        for _ in range(60):
            time.sleep(0.5)
            yield b"x"

    return {
        "truncated": [request(data[: int(len(data) * f)], kind) for data, kind in cuts for f in (0.002, 0.3, 0.9)],
        "huge, declared": [request(bytes(2**20), "image/png", Content_Length="3000000000")],
        "huge, chunked": [request(lambda: itertools.repeat(bytes(2**20), 80), "image/png")],
        **{f"bomb: {name}": [form(data)] for name, data, _ in bombs() if name[:4] in ("zTXt", "iCCP", "tags")},
        "PNG of 900 megapixels": [form(png(30_000, 30_000, pixels=bytes(10**6)))],
        "JPEG with 60,000 px in its header": [form(bytes(header))],
        "60,000 px wide": [form(encoded(Image.new("L", (60_000, 10)), kind)) for kind in ("PNG", "TIFF")],
        "one pixel": [form(encoded(Image.new("L", (1, 1))))],
        "DICOM of many elements": [form(elements)],
        "multi-frame DICOM": [form(scan(Image.new("L", (40, 40)), NumberOfFrames=40))],
        "wrong type": [*map(form, (b"%PDF-1.7\n", b"<html></html>", b"a,b\n")), request(b"{}", "application/json")],
        "noise": [form(np.random.default_rng(i).bytes(10_000)) for i in range(4)],
        "empty": [form(b""), form(), request(b"", "image/png")],
        "bad multipart": [
            ("/predict", multipart[:-30], MULTIPART), ("/predict", b"--other\r\n\r\n", MULTIPART),
            request(good, "multipart/form-data"),
            ("/predict", multipart.replace(b'"files"', f'"{MARKER}"'.encode()), MULTIPART),
        ],
        "slow body": [request(slowly, "image/png", Content_Length="900")],
    }  # fmt: skip


def attacks(images: list[Image.Image], port: int) -> dict[str, Callable[[], str]]:
    """Returns attacks, and requests that must succeed meanwhile; each call returns a status or another outcome."""
    good = encoded(images[0])
    pixels = np.random.default_rng(0).integers(0, 256, (3000, 3000), np.uint8)
    slow = encode(*[(MARKER, encoded(pixels, "JPEG", quality=50, progressive=True))] * 16)[0]

    def connect() -> socket.socket:
        return socket.create_connection(("127.0.0.1", port), timeout=120)

    def head(method: str, path: str, **headers: Any) -> bytes:
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        headers = {"Host": "localhost", "Content-Type": "image/png"} | HEADERS | headers
        lines = [f"{name}: {value}" for name, value in headers.items()]
        return "\r\n".join([f"{method} {path}?patient={MARKER} HTTP/1.1", *lines, "\r\n"]).encode()

    def ask(*parts: bytes, half_closed: bool = False) -> str:
        return conversation(port, *parts, end=half_closed)[9:12].decode() or "closed"

    def idle() -> str:
        with ExitStack() as stack:
            for _ in range(1150):
                stack.enter_context(connect())
            time.sleep(5)
        return "opened 1,150"

    def slowly(text: bytes) -> str:
        with ExitStack() as stack:
            sockets = [stack.enter_context(connect()) for _ in range(50)]
            for i in range(60):
                for one in sockets:
                    one.sendall(text[i : i + 1])
                time.sleep(0.5)
        return "not closed"

    post, close = partial(head, "POST", "/predict", Content_Length=len(good)), {"Connection": "close"}
    body = {"Content_Type": MULTIPART["Content-Type"], "Content_Length": len(slow)}
    return {
        "good: /health": lambda: ask(head("GET", "/health", **close)),
        "good: half-closed": lambda: ask(post(), good, half_closed=True),
        "attack: idle connections": idle,
        "attack: slow heads": lambda: slowly(post()),
        "attack: slow JPEGs": lambda: ask(head("POST", "/predict", **body, **close), slow),
        "attack: two lengths": lambda: ask(post(Transfer_Encoding="chunked"), good),
        "attack: wrong token": lambda: ask(post(Authorization=f"Bearer {MARKER}", **close), good),
    }
