"""Valid and malformed requests for `serve_load`."""

import itertools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.benchmarks import harness

sys.path += [str(harness.ROOT / "tests"), str(harness.ROOT / "tests/serve")]
import scans
from folders import encoded
from services import form as encode
from test_uploads import bombs, png, written

SIDE = 512
MULTIPART = {"Content-Type": "multipart/form-data; boundary=edge"}
# The path; the body, or a function that returns its parts; and the headers.
Request = tuple[str, bytes | Callable[[], Iterator[bytes]], dict[str, str]]


def request(body: Any, kind: str, **headers: str) -> Request:
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    return "/predict", body, {"Content-Type": kind, **headers}


def form(*files: bytes, path: str = "/predict") -> Request:
    return path, encode(*(("f", file) for file in files))[0], MULTIPART


def pictures(folder: Path | None, count: int = 24) -> list[Image.Image]:
    """Returns grayscale images of 512 px from the files in `folder`, or phantoms."""
    if folder is not None:
        files = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".png", ".jpg", ".jpeg"))
        chosen = [files[i] for i in np.linspace(0, len(files) - 1, count).astype(int)]
        return [Image.open(path).convert("L").resize((SIDE, SIDE)) for path in chosen]
    return [harness.phantom(seed)[1] for seed in range(count)]


def scan(picture: Image.Image, **tags: Any) -> bytes:
    rescale = {"RescaleSlope": 1, "RescaleIntercept": -1024}
    return written(scans.dataset(np.asarray(picture, np.uint16) * 6, "CT", **rescale, **tags))


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
        **{f"bomb: {name}": [form(data)] for name, data in bombs() if name in ("zTXt", "iTXt", "iCCP", "tags")},
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
        ],
        "slow body": [request(slowly, "image/png", Content_Length="900")],
    }  # fmt: skip
