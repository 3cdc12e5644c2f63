"""A service on a free port, a model by hand behind it, and what asks it; for the tests of `lungjax.serve`."""

import base64
import http.client
import io
import json
import os
import socket
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import scans
import uvicorn
from conftest import png
from lungjax.inference.predictor import Picture
from PIL import Image
from test_uploads import written

from lungjax.config import InputSpec
from lungjax.config.metadata import Metadata
from lungjax.data import preprocess
from lungjax.serve import __main__ as command
from lungjax.serve import protocol
from lungjax.serve.app import build
from lungjax.serve.settings import Settings

POINT = {"youden": {"threshold": 0.4, "sensitivity": 0.9, "specificity": 0.8, "ppv": 0.7, "npv": 0.6}}
TOLD = Metadata(
    "small",
    ("dark", "bright"),
    InputSpec(size=(8, 8)),
    "folder/mine",
    window=(0, 65535),
    points={"slice": {"bright": POINT}, "patient": {"bright": {"youden": POINT["youden"] | {"threshold": 0.9}}}},
)
HEAD = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"
TOKEN = "a-token-of-more-than-16-signs"
DISK = {"watched": False, "written": []}


def watch(event, arguments):
    if event == "open" and DISK["watched"]:
        path, mode, flags = arguments
        if (isinstance(mode, str) and set(mode) & set("wax+")) or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            DISK["written"].append(str(path))


sys.addaudithook(watch)


BLANK = np.zeros((1, *TOLD.input.size, 1), np.uint8)


class Brightness:
    """A model by hand: the probability of "bright" is the mean gray level. `gate` holds the device back."""

    metadata, sizes, methods = TOLD, (1, 2, 4), ("gradcam", "occlusion")

    def __init__(self, **told):
        self.metadata = replace(TOLD, **told)
        self.gate, self.entered = threading.Event(), threading.Event()
        self.gate.set()
        self.done, self.error = [], None  # what was computed, in order

    def warm(self):
        self.gate.wait(10)

    def blank(self):
        return BLANK

    def picture(self, decoded, box=None):
        dark = decoded.mean() < 1
        pixels, *_ = preprocess.picture(decoded, self.metadata, box)
        return Picture(pixels, 2.5 if dark else 0.5, ("blank",) if dark else ())

    def __call__(self, pixels):
        self.entered.set()
        self.gate.wait(10)
        self.done.append(len(pixels))
        if self.error:
            raise self.error
        p = pixels.mean((1, 2, 3), dtype=np.float64) / 255
        return np.stack([1 - p, p], axis=1).astype(np.float32)

    def explain(self, pixels, targets=None, method="gradcam"):
        if pixels is BLANK:  # to compile it; nobody asked
            return None
        self.entered.set()
        self.gate.wait(10)
        self.done.append(method)
        self.targets = targets
        p = pixels.mean((1, 2, 3), dtype=np.float64) / 255
        return pixels[..., 0].astype(np.float32) / 255, np.stack([1 - p, p], axis=1).astype(np.float32)


class Service:
    """A running service, asked over its port."""

    def __init__(self, model, app, port):
        self.model, self.app, self.port = model, app, port

    def ask(self, method, path, body=None, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        kind = answer.headers.get("content-type", "")
        return answer.status, json.loads(content) if "json" in kind else content, answer.headers

    def post(self, path, *files, **headers):
        body, kind = form(*files)
        return self.ask("POST", path, body, content_type=kind, **headers)

    def metric(self, name):
        text = self.ask("GET", "/metrics")[1].decode()
        return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name))


def form(*files):
    """A multipart body of (name, bytes) under the field `files`."""
    parts = [
        b'--edge\r\nContent-Disposition: form-data; name="files"; filename="%s"\r\n\r\n%s\r\n' % (n.encode(), data)
        for n, data in files
    ]
    return b"".join(parts) + b"--edge--\r\n", "multipart/form-data; boundary=edge"


@contextmanager
def running(model=None, warm=True, **settings):
    model = model or Brightness()
    app = build(model, Settings(**settings))
    config = uvicorn.Config(app, log_config=None, access_log=False, http=protocol.Patient, lifespan="on", ws="none")
    server, listening = uvicorn.Server(config), command.listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    service = Service(model, app, listening.getsockname()[1])
    try:
        wait_for(lambda: server.started)
        if warm:
            assert app.state.device.ready.wait(20)
        yield service
    finally:
        model.gate.set() if hasattr(model, "gate") else None
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def flat(value, shape=(20, 30)):
    return png(np.full(shape, value, np.uint8))


def slices(level, uid, count=3):
    pixels = np.full((16, 16), level, np.uint16)
    return [
        written(scans.dataset(pixels, "CT", RescaleSlope=1, RescaleIntercept=-1024, SeriesInstanceUID=uid))
        for _ in range(count)
    ]


def picture_of(url):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,")))))


def post_all(service, count, path="/predict"):
    found = [None] * count
    threads = []
    for i in range(count):
        one = threading.Thread(target=lambda i=i: found.__setitem__(i, service.post(path, (f"{i}", flat(i)))))
        one.start()
        threads.append(one)
    return found, threads


def wait_for(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def raw(service, text, *more, pause=0.0, wait=5):
    """Sends bytes by hand and returns status and body of the answer."""
    with socket.create_connection(("127.0.0.1", service.port), timeout=wait) as one:
        one.sendall(text)
        for part in more:
            time.sleep(pause)
            one.sendall(part)
        answer = http.client.HTTPResponse(one)
        answer.begin()
        return answer.status, json.loads(answer.read())
