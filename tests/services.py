"""A service on a free port with a known model, and a client, for the tests of `lungjax.serve`."""

import http.client
import json
import os
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace

import numpy as np
import scans
from folders import encoded

from lungjax.config import InputSpec
from lungjax.config.metadata import Metadata
from lungjax.data import preprocess
from lungjax.inference.artifacts import Input
from lungjax.inference.model import Model
from lungjax.serve import __main__ as command
from lungjax.serve.app import build
from lungjax.serve.settings import Settings

POINT = {"youden": {"threshold": 0.4, "sensitivity": 0.9, "specificity": 0.8, "ppv": 0.7, "npv": 0.6}}
METADATA = Metadata(
    "small", ("dark", "bright"), InputSpec(size=(8, 8)), "folder/mine", window=(0, 65535),
    points={"slice": {"bright": POINT}, "patient": {"bright": {"youden": POINT["youden"] | {"threshold": 0.9}}}},
)  # fmt: skip
HEAD = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"
TOKEN = "a-token-of-more-than-16-characters"
DISK = {"watched": False, "written": []}


def watch(event, arguments):
    if event == "open" and DISK["watched"]:
        path, mode, flags = arguments
        if (isinstance(mode, str) and set(mode) & set("wax+")) or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            DISK["written"].append(str(path))


sys.addaudithook(watch)


class Brightness:
    """A model whose probability of "bright" is the mean gray level; clearing `gate` blocks the device."""

    batch_sizes, methods, check_method = (1, 2, 4), ("gradcam", "occlusion"), Model.check_method

    def __init__(self, **fields):
        self.metadata = replace(METADATA, **fields)
        self.gate, self.entered = threading.Event(), threading.Event()
        self.gate.set()
        self.calls, self.error = [], None  # batch sizes and methods, in order

    def warm(self):
        self.gate.wait(10)

    def prepare(self, decoded, box=None, modality=""):
        dark = decoded.mean() < 1
        pixels, *_ = preprocess.picture(decoded, self.metadata, box)
        return Input(pixels, 2.5 if dark else 0.5, (*["blank"] * int(dark), *self.metadata.modality_warnings(modality)))

    def outputs(self, pixels):
        self.entered.set()
        self.gate.wait(10)
        self.calls.append(len(pixels))
        if self.error:
            raise self.error
        p = pixels.mean((1, 2, 3), dtype=np.float64) / 255
        return {"probabilities": np.stack([1 - p, p], axis=1).astype(np.float32)}

    def maps(self, pixels, targets, method):
        if pixels.any():  # not the compilation
            self.calls.append(method)
            self.targets = targets
        return pixels[..., 0].astype(np.float32) / 255


class Service:
    """A running service, queried through its port."""

    def __init__(self, model, app, port):
        self.model, self.app, self.port = model, app, port
        self.state = app.state.service if app else None

    def ask(self, method, path, body=None, **headers):
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)) as connection:
            connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
            answer = connection.getresponse()
            content = answer.read()
        kind = answer.headers.get("content-type", "")
        return answer.status, json.loads(content) if "json" in kind else content, answer.headers

    def post(self, path, *files, **headers):
        body, kind = form(*files)
        return self.ask("POST", path, body, content_type=kind, **headers)

    def metric(self, name):
        text = self.ask("GET", "/metrics")[1].decode()
        return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name))


def form(*files):
    """Returns a multipart body with each (name, bytes) in the field `files`, and its content type."""
    head = b'--edge\r\nContent-Disposition: form-data; name="files"; filename="%s"\r\n\r\n%s\r\n'
    parts = [head % (name.encode(), data) for name, data in files]
    return b"".join(parts) + b"--edge--\r\n", "multipart/form-data; boundary=edge"


@contextmanager
def running(model=None, warm=True, **settings):
    model = model or Brightness()
    settings = Settings(**settings)
    app = build(model, settings)
    server, listening = command.make_server(app, settings), command.listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    service = Service(model, app, listening.getsockname()[1])
    try:
        wait_for(lambda: server.started)
        if warm:
            wait_for(lambda: app.state.service.device.ready, 20)
        yield service
    finally:
        model.gate.set() if hasattr(model, "gate") else None
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def flat(value, shape=(20, 30)):
    return encoded(np.full(shape, value, np.uint8))


def slices(level, uid, count=3):
    pixels = np.full((16, 16), level, np.uint16)
    data = scans.dataset(pixels, "CT", RescaleSlope=1, RescaleIntercept=-1024, SeriesInstanceUID=uid)
    return [scans.file_bytes(data)] * count


def post_all(service, count, path="/predict"):
    """Posts images of gray level 0, 1, ... in parallel; returns the futures of the responses."""
    pool = ThreadPoolExecutor(count)
    return [pool.submit(service.post, path, (f"{i}", flat(i))) for i in range(count)]


def wait_for(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def conversation(port, *parts, end=False):
    """Sends bytes and, if `end`, shuts down the sending side; returns everything until the service closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=120) as one:
        one.sendall(b"".join(parts))
        if end:
            one.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: one.recv(65536), b""))


def raw(service, *parts, pause=0.0):
    """Sends bytes over a socket and returns the status and body of the response."""
    with socket.create_connection(("127.0.0.1", service.port), timeout=5) as one:
        for part in parts:
            one.sendall(part)
            time.sleep(pause)
        answer = http.client.HTTPResponse(one)
        answer.begin()
        return answer.status, json.loads(answer.read())
