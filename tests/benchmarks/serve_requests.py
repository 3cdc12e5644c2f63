"""Requests of `serve_load`, valid and malformed, and runs with random weights."""

import gzip
import io
import json
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lungjax.datasets.phantom.slices import CLASSES
from tests import scans
from tests.benchmarks import harness

SIDE = 512
BOUNDARY = b"boundary-of-a-part"
FORM = f"multipart/form-data; boundary={BOUNDARY.decode()}"
Request = bytes | list[tuple[bytes, float]]  # parts, each with the seconds until the next


def request(body: bytes, kind: str, path: str = "/predict") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def form(*files: bytes, path: str = "/predict", end: bytes = b"--" + BOUNDARY + b"--\r\n") -> bytes:
    head = b'--%s\r\nContent-Disposition: form-data; name="files"; filename="f"\r\n\r\n' % BOUNDARY
    return request(b"".join(head + file + b"\r\n" for file in files) + end, FORM, path)


def encoded(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def pictures(folder: Path | None, count: int = 24) -> list[Image.Image]:
    """Returns grayscale images of 512 px: of the files in `folder`, or phantoms."""
    if folder is not None:
        files = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".png", ".jpg", ".jpeg"))
        chosen = [files[i] for i in np.linspace(0, len(files) - 1, count).astype(int)]
        return [Image.open(path).convert("L").resize((SIDE, SIDE)) for path in chosen]
    drawn = (harness.phantom(CLASSES[seed % len(CLASSES)], seed)[0] for seed in range(count))
    return [Image.fromarray(image).resize((SIDE, SIDE)) for image in drawn]


def scan(picture: Image.Image, series: str, **tags: Any) -> Any:
    pixels = np.asarray(picture, np.uint16) * 6
    rescale = {"RescaleSlope": 1, "RescaleIntercept": -1024}
    return scans.dataset(pixels, "CT", SeriesInstanceUID=series, **rescale, **tags)


def written(data: Any) -> bytes:
    buffer = io.BytesIO()
    data.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width: int, height: int, *more: bytes, pixels: bytes = b"") -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(pixels, 9))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + body + chunk(b"IEND", b"")


def valid(images: list[Image.Image]) -> dict[str, tuple[float, list[bytes]]]:
    """Returns weight and requests of each kind of valid request."""
    one = [encoded(image) for image in images]
    slices = [written(scan(image, "1.2.3.4")) for image in images[:6]]
    jpegs = [encoded(image, "JPEG", quality=90) for image in images[:6]]
    return {
        "PNG": (6, [request(data, "image/png") for data in one]),
        "JPEG": (2, [form(data) for data in jpegs]),
        "TIFF, BMP": (1, [form(encoded(images[0], "TIFF", compression="tiff_lzw")), form(encoded(images[1], "BMP"))]),
        "DICOM": (1, [request(data, "application/dicom") for data in slices]),
        "DICOM series of 6": (0.5, [form(*slices)]),
        "four PNGs, one bad": (0.5, [form(*one[:3], b"no image")]),
        "explain": (0.5, [form(data, path="/explain") for data in one[:4]]),
    }


def malformed(images: list[Image.Image]) -> dict[str, list[Request]]:
    from pydicom.encaps import encapsulate
    from pydicom.uid import DeflatedExplicitVRLittleEndian, RLELossless

    whole, small = encoded(images[0]), Image.fromarray(np.zeros((40, 40), np.uint8))
    jpeg, slice_of = encoded(images[0], "JPEG"), written(scan(images[0], "1.2"))
    zeros = zlib.compress(bytes(200 * 2**20), 9)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(100 * 2**20))
    deflated = scan(small, "1.2")
    deflated.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    deflated.add_new((0x0009, 0x0010), "LO", "X")
    deflated.add_new((0x0009, 0x1001), "OB", bytes(200 * 2**20))
    runs = scan(small, "1.2")
    runs.compress(RLELossless, generate_instance_uid=False)
    runs.PixelData = encapsulate([struct.pack("<16I", 2, 64, 64 + 10_000_000, *[0] * 13) + b"\x81\0" * 10_000_000])
    claims = bytearray(jpeg)
    at = claims.index(b"\xff\xc0") + 5
    claims[at : at + 4] = struct.pack(">HH", 60_000, 60_000)
    tags = [struct.pack("<HHII", 40_000 + i, 7, 10**6, 8) for i in range(300)]
    sides = struct.pack("<HHIIHHII", 256, 4, 1, 40, 257, 4, 1, 40)
    tiff = b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags) + 2) + sides + b"".join(tags) + bytes(2 * 10**6)
    wide = np.zeros((10, 60_000), np.uint8)
    cuts = [(whole, "image/png"), (jpeg, "image/jpeg"), (slice_of, "application/dicom")]
    elements = slice_of + b"\xf1\x7f\x10\0SQ\0\0\xff\xff\xff\xff" + b"\xfe\xff\0\xe0\0\0\0\0" * 10**6
    head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"
    mebibyte = b"100000\r\n" + bytes(2**20) + b"\r\n"
    chunks = [head + b"Transfer-Encoding: chunked\r\n\r\n", *[mebibyte] * 80, b"0\r\n\r\n"]
    return {
        "truncated": [request(data[: int(len(data) * f)], kind) for data, kind in cuts for f in (0.002, 0.3, 0.9)],
        "huge, declared": [head + b"Content-Length: 3000000000\r\n\r\n" + bytes(2**20)],
        "huge, chunked": [[(part, 0) for part in chunks]],
        "ZIP bomb": [form(packed.getvalue())],
        "gzip bomb": [form(gzip.compress(bytes(50 * 2**20)))],
        "PNG text bomb": [form(png(40, 40, chunk(b"zTXt", b"Title\0\0" + zeros), pixels=bytes(40 * 41)))],
        "PNG profile bomb": [form(png(40, 40, chunk(b"iCCP", b"name\0\0" + zeros), pixels=bytes(40 * 41)))],
        "PNG of 900 megapixels": [form(png(30_000, 30_000, pixels=bytes(10**6)))],
        "JPEG with 60,000 px in its header": [form(bytes(claims))],
        "60,000 px wide": [form(encoded(Image.fromarray(wide))), form(encoded(Image.fromarray(wide), "TIFF"))],
        "one pixel": [form(encoded(Image.fromarray(np.zeros((1, 1), np.uint8))))],
        "TIFF of overlapping tags": [form(tiff)],
        "deflated DICOM bomb": [form(written(deflated))],
        "run-length DICOM bomb": [form(written(runs))],
        "DICOM of many elements": [form(elements)],
        "multi-frame DICOM": [form(written(scan(small, "1.2", NumberOfFrames=40)))],
        "wrong type": [*map(form, (b"%PDF-1.7\n", b"<html></html>", b"a,b\n")), request(b"{}", "application/json")],
        "noise": [form(np.random.default_rng(i).bytes(10_000)) for i in range(4)],
        "empty": [form(b""), form(), request(b"", "image/png")],
        "bad multipart": [
            form(whole, end=b""), request(b"--other\r\n\r\n", FORM), request(whole, "multipart/form-data")
        ],
        "slow body": [[(head + b"Content-Length: 900\r\n\r\n", 0), *[(b"x", 0.5)] * 60]],
    }  # fmt: skip


def random_run(name: str, folder: Path, images: list[Image.Image]) -> str:
    """Writes a run with random weights, as fast as a trained one; returns its folder."""
    from lungjax import models
    from lungjax.config import Config, DataConfig, InputSpec, ModelConfig, overrides
    from lungjax.config.metadata import Metadata
    from lungjax.evaluation import novelty
    from lungjax.runtime import checkpoint
    from lungjax.training import state

    workdir, classes = folder / name, ("Normal", "Pneumonia", "COVID-19")
    size = InputSpec(size=(224, 224), channels=1, mean=(0.4,) * 3, std=(0.3,) * 3)
    config = Config(name=name, data=DataConfig(dataset="phantom_ct"), input=size, model=ModelConfig(name=name))
    variables = state.init(models.build(config.model, len(classes)), (224, 224, 3), 0)
    best = state.TrainState(np.asarray(1), np.asarray(0), variables["params"], variables["batch_stats"], {})
    workdir.mkdir(parents=True)
    (workdir / "config.json").write_text(overrides.to_json(config))
    (workdir / "data.json").write_text(json.dumps({"classes": classes, "fingerprint": ""}))
    extra = {"novelty": novelty.fit(images, images[:8], []).to_dict(), "about": {"best_step": 1, "fingerprint": ""}}
    (workdir / "model.json").write_text(Metadata(name, classes, size, "phantom_ct", **extra).to_json())
    with checkpoint.Checkpoints(workdir) as checkpoints:
        checkpoints.save(best, {"step": 1, "best_step": 1}, best=True)
    return str(workdir)
