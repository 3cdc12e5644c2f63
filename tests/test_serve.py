"""The service over real sockets: answers, batches, limits, who may ask, and that nothing of an upload stays."""

import base64
import http.client
import io
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from dataclasses import replace

import jax
import numpy as np
import pytest
import scans
import uvicorn
from absl.testing import flagsaver
from conftest import png, small_bn
from PIL import Image
from test_uploads import SECRETS, scan, secret, written

from lungjax import answers, api, models, predictor
from lungjax.config import Config, EvalConfig, InputSpec, ModelConfig
from lungjax.data import images, kept, uploads
from lungjax.metadata import NOTICE, Metadata
from lungjax.predictor import Picture
from lungjax.serve import __main__ as command
from lungjax.serve import app as serve_app
from lungjax.serve import connections, multipart, schemas
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

    def warm(self, explain=False):
        self.gate.wait(10)

    def blank(self):
        return BLANK

    def picture(self, decoded, box=None):
        dark = decoded.mean() < 1
        pixels, *_ = kept.picture(decoded, self.metadata, box)
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
    config = uvicorn.Config(app, log_config=None, access_log=False, http=connections.Patient, lifespan="on", ws="none")
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


@pytest.fixture(scope="module")
def service():
    with running() as made:
        yield made


def flat(value, shape=(20, 30)):
    return png(np.full(shape, value, np.uint8))


# Answers


def test_several_files_are_answered_in_their_order(service):
    files = [("a.png", flat(51)), ("b.txt", b"no image at all"), ("dir/c.png", flat(204)), ("blank.png", flat(0))]
    status, said, _ = service.post("/predict", *files)
    assert status == 200 and said["notice"] == NOTICE and said["series"] == []
    assert said["model"] == {"name": "small", "dataset": "folder/mine", "classes": ["dark", "bright"]}
    first, bad, third, blank = said["results"]
    assert first == answers.record(TOLD, "a.png", np.float32([0.8, 0.2]), 0.5)
    assert third["file"] == "c.png" and third["predicted"] == "bright" and third["decisions"]["bright"]["called"]
    assert bad["file"] == "b.txt" and "text file" in bad["error"]
    assert blank["warnings"] == ["blank"] and blank["unlike"] == 2.5
    schemas.Predicted.model_validate(said)


def test_one_raw_body_and_all_kinds(service):
    array = np.full((20, 30), 102, np.uint8)
    for kind, form_name in (("png", "PNG"), ("jpeg", "JPEG"), ("tiff", "TIFF"), ("bmp", "BMP")):
        buffer = io.BytesIO()
        Image.fromarray(array).save(buffer, form_name)
        status, said, _ = service.ask("POST", "/predict", buffer.getvalue(), content_type=f"image/{kind}")
        assert status == 200 and said["results"][0]["probabilities"]["bright"] == pytest.approx(0.4, abs=1e-5)
    status, said, _ = service.ask("POST", "/predict", written(scan()), content_type="application/dicom")
    assert status == 200 and said["results"][0]["file"] == "file"
    sixteen = png(np.full((20, 30), 13107, np.uint16))
    assert service.post("/predict", ("16.png", sixteen))[1]["results"][0]["probabilities"]["bright"] == 0.2


def test_all_bad_files_give_the_first_ones_status(service):
    status, said, _ = service.post("/predict", ("a.zip", b"PK\x03\x04....."), ("b.png", flat(3)[:50]))
    assert status == 415 and "ZIP" in said["error"] and [one["file"] for one in said["results"]] == ["a.zip", "b.png"]
    schemas.Problem.model_validate(said)
    assert service.post("/predict", ("b.png", flat(3)[:50]))[0] == 422


def slices(level, uid, count=3):
    pixels = np.full((16, 16), level, np.uint16)
    return [
        written(scans.dataset(pixels, "CT", RescaleSlope=1, RescaleIntercept=-1024, SeriesInstanceUID=uid))
        for _ in range(count)
    ]


def test_slices_of_a_series_get_a_summary_by_the_patients_points(service):
    # The window from -1350 to 150 HU: 1024 + 75 is 0.95, 1024 - 600 is 0.5.
    some, others = slices(1099, "1.2.3.1"), slices(424, "1.2.3.2", 2)
    files = [("x.png", flat(255)), *((f"{i}.dcm", data) for i, data in enumerate(some + others))]
    status, said, _ = service.post("/predict", *files)
    assert status == 200 and len(said["results"]) == 6
    first, second = said["series"]
    assert (first["series"], first["files"], second["files"]) == ("series 1", 3, 2)
    assert first["probabilities"]["bright"] == pytest.approx(0.95, abs=0.003)
    assert first["decisions"]["bright"]["called"] and first["decisions"]["bright"]["threshold"] == 0.9
    assert not second["decisions"]["bright"]["called"] and said["results"][-1]["decisions"]["bright"]["called"]
    schemas.Predicted.model_validate(said)
    assert service.post("/predict", files[0], files[1])[1]["series"] == []


def picture_of(url):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,")))))


def test_explain_draws_what_the_model_says(service):
    pixels = np.tile(np.linspace(0, 255, 8).astype(np.uint8), (8, 1))
    status, said, _ = service.post("/explain?class=dark&method=occlusion", ("a.png", png(pixels)), ("b", b"\0"))
    assert status == 200 and "error" in said["results"][1]
    one = said["results"][0]
    assert (one["explained"], one["method"], one["predicted"]) == ("dark", "occlusion", "dark")
    assert service.model.targets.tolist() == [0]
    np.testing.assert_array_equal(picture_of(one["image"]), pixels)
    assert picture_of(one["heat"]).shape == picture_of(one["overlay"]).shape == (8, 8, 3)
    assert not (picture_of(one["heat"])[:, 0] == picture_of(one["heat"])[:, -1]).all()
    schemas.Explanation.model_validate(said)
    assert service.post("/explain", ("a.png", flat(250)))[1]["results"][0]["explained"] == "bright"
    status, said, _ = service.post("/explain?class=brigth", ("a.png", flat(9)))
    assert status == 422 and "bright" in said["error"]
    assert service.post("/explain?method=gradcan", ("a.png", flat(9)))[0] == 422
    status, said, _ = service.post("/predict?rule=youdem", ("a.png", flat(9)))
    assert status == 422 and "youden" in said["error"]


def test_model_health_and_unknown_routes(service):
    _, said, _ = service.ask("GET", "/model")
    assert said["classes"] == ["dark", "bright"] and said["methods"] == ["gradcam", "occlusion"]
    assert said["notice"] == NOTICE and said["limits"]["file_bytes"] == 64 * 2**20 and said["limits"]["files"] == 64
    assert service.ask("GET", "/health")[:2] == (200, {"status": "ok"})
    assert service.ask("GET", "/none")[0] == 404 and "error" in service.ask("GET", "/none")[1]
    assert service.ask("GET", "/predict")[0] == 405 and "error" in service.ask("GET", "/predict")[1]


def test_the_page_and_its_headers(service):
    for path in ("/", "/page/page.js", "/page.css"):
        status, content, headers = service.ask("GET", path)
        assert status == 200 and len(content) > 100
        assert (
            "script-src 'self'" in headers["content-security-policy"]
            and "unsafe" not in headers["content-security-policy"]
        )
        assert headers["x-content-type-options"] == "nosniff" and headers["cache-control"] == "no-store"
    for script in re.findall(rb'(?:src|href)="([\w./]+\.(?:js|css))"', service.ask("GET", "/")[1]):
        assert service.ask("GET", "/" + script.decode())[0] == 200
    assert service.ask("GET", "/page/../app.py")[0] == 404


def test_the_description_is_complete_and_loads_nothing(service):
    tree = service.ask("GET", "/openapi.json")[1]
    assert set(tree["paths"]) == {"/predict", "/explain", "/model", "/health", "/metrics"}
    for path in ("/predict", "/explain"):
        told = tree["paths"][path]["post"]
        assert {"multipart/form-data", "image/png", "application/dicom"} <= set(told["requestBody"]["content"])
        assert {"200", "400", "401", "408", "413", "415", "422", "500", "503", "504"} <= set(told["responses"])
    text = service.ask("GET", "/docs")[1].decode()
    assert "/explain" in text and "multipart/form-data" in text and "class" in text
    assert "<script" not in text and not re.findall(r'(?:src|href)="https?:', text)


# Batches


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


def test_what_waits_is_computed_together_and_heat_maps_take_turns():
    with running() as service:
        model, lines = service.model, service.app.state.device._lines
        model.gate.clear()
        _, first = post_all(service, 1)
        assert model.entered.wait(10)
        found, threads = post_all(service, 9)
        _, maps = post_all(service, 2, "/explain")
        wait_for(lambda: len(lines["predict"]) == 9 and len(lines["explain"]) == 2)
        assert service.metric("lungjax_queue_images") == 11
        model.gate.set()
        for thread in (*first, *threads, *maps):
            thread.join()
        assert model.done == [1, "gradcam", 4, "gradcam", 4, 1]
        for i, (status, said, _) in enumerate(found):  # each got its own
            assert status == 200 and said["results"][0]["probabilities"]["bright"] == pytest.approx(i / 255, abs=1e-6)
        assert service.metric("lungjax_batch_images_sum") == 10 and service.metric("lungjax_batch_images_count") == 4


def test_a_full_queue_and_too_many_requests():
    with running(queue=3, requests=6) as service:
        model = service.model
        model.gate.clear()
        _, first = post_all(service, 1)
        assert model.entered.wait(10)
        found, threads = post_all(service, 3)
        wait_for(lambda: len(service.app.state.device._lines["predict"]) == 3)
        status, said, headers = service.post("/predict", ("a", flat(1)))
        assert status == 503 and headers["retry-after"] == "1" and "wait" in said["error"]
        model.gate.set()
        for thread in (*first, *threads):
            thread.join()
        assert {answer[0] for answer in found} == {200}
        stuck = []
        for _ in range(7):
            one = socket.create_connection(("127.0.0.1", service.port))
            one.sendall(HEAD + b"Content-Length: 9\r\n\r\n")
            stuck.append(one)
        wait_for(lambda: service.metric("lungjax_running_requests") > 6)
        assert service.post("/predict", ("a", flat(1)))[0] == 503
        assert service.ask("GET", "/health")[0] == 200
        for one in stuck:
            one.close()


def test_the_time_limit_and_what_nobody_waits_for():
    with running(seconds=0.5) as service:
        model = service.model
        model.gate.clear()
        _, first = post_all(service, 1)
        assert model.entered.wait(10)
        found, threads = post_all(service, 3)
        for thread in (*first, *threads):
            thread.join()
        assert {answer[0] for answer in found} == {504} and "0.5 seconds" in found[0][1]["error"]
        model.gate.set()
        wait_for(lambda: not service.app.state.device._lines["predict"])
        assert model.done == [1]  # that which was running
        wait_for(lambda: service.post("/predict", ("a", flat(255)))[0] == 200)


def test_starting_then_ready():
    model = Brightness()
    model.gate.clear()
    with running(model, warm=False) as service:
        assert service.ask("GET", "/health")[:2] == (503, {"status": "starting"})
        status, said, headers = service.post("/predict", ("a", flat(1)))
        assert status == 503 and "starting" in said["error"] and headers["retry-after"]
        model.gate.set()
        wait_for(lambda: service.ask("GET", "/health")[0] == 200)
        assert service.post("/predict", ("a", flat(1)))[0] == 200


def test_an_error_of_the_model_has_a_number_and_the_service_lives_on(caplog):
    caplog.set_level(logging.INFO, "lungjax.serve")
    with running() as service:
        service.model.error = RuntimeError(f"of {SECRETS[0]}")
        status, said, _ = service.post("/predict", ("Zentinel.png", flat(1)))
        assert status == 500
        number = re.search(r"number (\w{8}) in its log", said["error"])[1]
        service.model.error = None
        assert service.post("/predict", ("a", flat(1)))[0] == 200
    assert f"error {number}: RuntimeError" in caplog.text and "test_serve.py" in caplog.text
    assert SECRETS[0] not in caplog.text + json.dumps(said)


def test_a_model_that_can_not_be_compiled_says_so():
    model, told = Brightness(), []
    model.warm = lambda explain: 1 / 0
    app = build(model, Settings(), told.append)
    app.state.device.start()
    app.state.device.stop()
    assert isinstance(told[0], ZeroDivisionError)
    with pytest.raises(uploads.Refused, match="could not load"):
        app.state.device.check("predict")


# Limits


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


@pytest.fixture(scope="module")
def strict():
    file = uploads.Limits(bytes=5000, pixels=10_000, side=500)
    with running(file=file, request_bytes=9000, held_bytes=12_000, files=3, read_seconds=0.4) as made:
        yield made


def test_bytes_are_counted_before_and_while_they_come(strict):
    status, said = raw(strict, HEAD + b"Content-Length: 1000000000\r\nExpect: 100-continue\r\n\r\n")
    assert status == 413 and "1000000000" in said["error"]
    chunk = b"1000\r\n" + bytes(4096) + b"\r\n"
    status, said = raw(strict, HEAD + b"Transfer-Encoding: chunked\r\n\r\n", chunk, chunk, chunk, b"0\r\n\r\n")
    assert status == 413 and "more than" in said["error"]
    status, said, _ = strict.post("/predict", ("a", bytes(6000)))
    assert status == 413 and "a file of more than 5000" in said["error"]
    body, kind = form(*[("a", bytes(3300))] * 3)
    connection = http.client.HTTPConnection("127.0.0.1", strict.port, timeout=9)
    connection.request(
        "POST", "/predict", iter([body[:4000], body[4000:]]), {"content-type": kind}, encode_chunked=True
    )
    assert b"a request of more than 9000" in connection.getresponse().read()
    connection.close()
    noise = np.random.default_rng(0).bytes(3000)
    assert strict.post("/predict", ("a", noise), ("b", noise), ("c", noise))[0] == 413
    assert strict.post("/predict", *[("a", flat(1))] * 4)[:2] == (413, {"error": "more than 3 files in one request"})
    assert strict.post("/predict", *[("a", flat(1))] * 3)[0] == 200
    wide = png(np.zeros((2, 2), np.uint8))
    assert strict.post("/predict", ("a", wide))[0] == 422
    assert strict.post("/predict", ("a", flat(1, (10, 600))))[0] == 413
    assert strict.metric("lungjax_held_bytes") == 0
    assert strict.metric('lungjax_refused_total{reason="bytes"}') >= 3


def test_a_large_body_hears_why_although_it_is_still_sending(strict):
    status, said = raw(strict, HEAD + b"Content-Length: 4000000\r\n\r\n" + bytes(2_000_000), bytes(2_000_000))
    assert status == 413 and "4000000" in said["error"]


def test_slow_bodies_end(strict):
    started = time.monotonic()
    status, said = raw(strict, HEAD + b"Content-Length: 500\r\n\r\n", *[b"x"] * 12, pause=0.05)
    assert status == 408 and "slowly" in said["error"] and time.monotonic() - started < 3
    assert strict.metric("lungjax_held_bytes") == 0


def test_who_still_sends_is_not_cut_off_from_the_answer(strict, monkeypatch):
    monkeypatch.setattr(multipart, "DISCARD", (0.05, 2**25))
    for linger, part, count in (((0.8, 2**20), b"x", 12), ((30.0, 10_000), b"x" * 500, 12)):
        monkeypatch.setattr(connections, "LINGER", linger)
        with socket.create_connection(("127.0.0.1", strict.port), timeout=9) as one:
            one.sendall(HEAD + b"Content-Length: 1000000\r\n\r\n")  # too many: 413, after a moment
            time.sleep(0.2)
            for _ in range(count):  # without a lingering close the second one finds the connection reset
                one.sendall(part)
                time.sleep(0.03)
            answer = http.client.HTTPResponse(one)
            answer.begin()
            assert answer.status == 413 and "1000000" in json.loads(answer.read())["error"]
            assert one.recv(1) == b""  # and then the answer's end
            with pytest.raises(OSError):  # not for ever
                for _ in range(60):
                    one.sendall(part)
                    time.sleep(0.03)
    assert strict.ask("GET", "/health")[0] == 200


def test_half_a_head_ends(service, monkeypatch):
    monkeypatch.setattr(connections, "SECONDS", 0.3)
    for first in (b"", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"):
        for half in (b"", b"POST /pre"):
            with socket.create_connection(("127.0.0.1", service.port), timeout=9) as one:
                one.sendall(first)
                while first and not one.recv(4096).endswith(b"}"):
                    pass
                if first and not half:
                    continue  # it may stay
                one.sendall(half)
                started = time.monotonic()
                assert one.recv(4096) == b"" and time.monotonic() - started < 3
    monkeypatch.undo()
    assert service.post("/predict", ("a", flat(1)))[0] == 200


def test_memory_of_all_requests_together(strict):
    with socket.create_connection(("127.0.0.1", strict.port)) as first:
        first.sendall(
            HEAD.replace(b"image/png", b"multipart/form-data; boundary=edge") + b"Content-Length: 8900\r\n\r\n"
        )
        head = form(("a", b""))[0].partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
        first.sendall(head + bytes(4900))
        second = b"\r\n--edge" + head.removeprefix(b"--edge") + bytes(3000)
        first.sendall(second)
        wait_for(lambda: strict.metric("lungjax_held_bytes") > 7900)
        noise = np.random.default_rng(0).bytes(4990)
        status, said, headers = strict.post("/predict", ("a", noise))
        assert status == 503 and "once" in said["error"] and headers["retry-after"]
    wait_for(lambda: strict.metric("lungjax_held_bytes") == 0)


FORMS = {
    "no boundary": (b"x", "multipart/form-data", 400),
    "cut short": (form(("a", flat(1)))[0][:-30], "multipart/form-data; boundary=edge", 400),
    "another boundary": (form(("a", flat(1)))[0], "multipart/form-data; boundary=other", 400),
    "no file": (b"--edge--\r\n", "multipart/form-data; boundary=edge", 422),
    "another field": (
        form(("a", flat(1)))[0].replace(b'"files"', b'"other"'),
        "multipart/form-data; boundary=edge",
        422,
    ),
    "long headers": (
        b"--edge\r\n" + b"X-A: " + b"a" * 20_000 + b"\r\n\r\n\r\n--edge--\r\n",
        "multipart/form-data; boundary=edge",
        400,
    ),
    "bad header": (b"--edge\r\n\x00\x01: a\r\n\r\n\r\n--edge--\r\n", "multipart/form-data; boundary=edge", 400),
    "JSON": (b"{}", "application/json", 415),
    "nothing": (b"", "image/png", 422),
}


@pytest.mark.parametrize("name", FORMS)
def test_bodies_that_are_none(service, name):
    body, kind, status = FORMS[name]
    found, said, _ = service.ask("POST", "/predict", body, content_type=kind)
    assert found == status and said["error"]
    assert service.app.state.budget.now == 0


def test_a_packed_body_is_not_unpacked(service):
    assert service.ask("POST", "/predict", b"x", content_type="image/png", content_encoding="gzip")[0] == 415


def test_who_leaves_early_leaves_nothing(service):
    for end in (b"", b"abc"):
        with socket.create_connection(("127.0.0.1", service.port)) as one:
            one.sendall(HEAD + b"Content-Length: 500\r\n\r\n" + end)
    wait_for(lambda: service.metric("lungjax_running_requests") == 1)  # the one that asks
    assert service.app.state.budget.now == 0 and service.post("/predict", ("a", flat(1)))[0] == 200


# Who may ask


def test_the_token():
    with running(token=TOKEN) as service:
        right = {"authorization": f"Bearer {TOKEN}"}
        for path in ("/model", "/metrics"):
            status, said, headers = service.ask("GET", path)
            assert status == 401 and headers["www-authenticate"] == "Bearer" and TOKEN not in json.dumps(said)
            for wrong in ("Bearer ", f"Bearer {TOKEN}x", f"Basic {TOKEN}", TOKEN, "Bearer \xff"):
                assert service.ask("GET", path, authorization=wrong)[0] == 401
            assert service.ask("GET", path, **right)[0] == 200
        assert service.post("/predict", ("a", flat(1)))[0] == 401
        assert service.post("/predict", ("a", bytes(3 * 2**20)))[0] == 401  # heard, although the body was not read
        assert service.post("/predict", ("a", flat(1)), **right)[0] == 200
        assert service.model.done == [1]
        for path in ("/", "/health", "/page/page.js", "/docs"):
            assert service.ask("GET", path)[0] == 200
        tree = service.ask("GET", "/openapi.json")[1]
        assert tree["paths"]["/predict"]["post"]["security"] == [{"token": []}]
    assert TOKEN not in repr(Settings(token=TOKEN))


def test_names_and_other_sites(service):
    for host in ("evil.example", "localhost.evil.example", "10.0.0.7", "", "[::1", "127.0.0.1.nip.io:80"):
        assert service.ask("GET", "/model", host=host)[0] == 421, host
    for host in ("localhost", "LOCALHOST:99", "127.0.0.1", "[::1]:8000"):
        assert service.ask("GET", "/model", host=host)[0] == 200, host
    own = f"127.0.0.1:{service.port}"
    foreign = [{"origin": "http://evil.example"}, {"origin": "null"}, {"sec_fetch_site": "cross-site"}]
    foreign += [{"sec_fetch_site": "same-site"}, {"origin": "http://127.0.0.1:1"}]
    for headers in foreign:
        status, _, answer = service.post("/predict", ("a", flat(1)), **headers)
        assert status == 403 and "access-control-allow-origin" not in answer, headers
    assert service.post("/predict", ("a", flat(1)), origin=f"http://{own}", sec_fetch_site="same-origin")[0] == 200
    assert service.ask("OPTIONS", "/predict", origin="http://evil.example")[0] == 403


def test_open_to_others_it_may_be_called_by_numbers_and_given_names():
    from lungjax.serve.guard import Guard
    from lungjax.serve.meters import Meters

    guard = Guard(None, Settings(host="0.0.0.0", names=("scanner.example",)), Meters(), frozenset())
    assert [guard.called(host) for host in ("10.0.0.7:8000", "scanner.example", "evil.example")] == [True, True, False]


# Nothing stays


def test_memory_of_large_uploads_is_given_back(monkeypatch):
    trimmed = threading.Event()
    monkeypatch.setattr(serve_app, "_trim", trimmed.set)
    monkeypatch.setattr(multipart, "TRIM", 2000)
    with running() as service:
        for _ in range(3):
            assert not trimmed.is_set()
            service.post("/predict", ("a", np.random.default_rng(0).bytes(600)))
        assert trimmed.wait(5)


def test_memory_of_a_small_file_that_decodes_to_much_is_given_back(monkeypatch):
    trimmed = threading.Event()
    monkeypatch.setattr(serve_app, "_trim", trimmed.set)
    monkeypatch.setattr(multipart, "TRIM", 2**22)
    with running() as service:
        assert service.post("/predict", ("a", flat(100, (2100, 2100))))[0] == 200
        assert trimmed.wait(5)


def test_nothing_of_an_upload_is_logged_said_or_written(caplog, capfd, monkeypatch):
    """Also of files over the megabyte from which Starlette's own form parser writes them to the disk."""
    caplog.set_level(logging.DEBUG)

    def fail(*_, **__):
        raise AssertionError("a temporary file")

    for name in ("SpooledTemporaryFile", "TemporaryFile", "NamedTemporaryFile", "mkstemp", "mkdtemp"):
        monkeypatch.setattr(tempfile, name, fail)
    whole = secret(scan(shape=(1100, 1100)))
    big = written(whole)
    assert len(big) > 2**21
    tiff = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (1500, 1500), np.uint8)).save(
        tiff, "TIFF", compression="tiff_lzw"
    )
    for decoder in ("pydicom", "PIL", "python_multipart"):
        logging.getLogger(decoder).setLevel(logging.NOTSET)
    with running() as service:
        for decoder in ("pydicom", "PIL.PngImagePlugin", "python_multipart.multipart"):
            logging.getLogger(decoder).error("found %s", SECRETS[2])  # such as they would
        service.post("/explain", ("warm.png", flat(9)))  # matplotlib's own files
        DISK["written"], DISK["watched"] = [], True
        name = "Zentinel^Otto.dcm"
        found = [
            service.post("/predict?rule=SECRET-4711", (name, big)),
            service.post("/explain?class=Zentinel", (name, big)),
            service.post("/predict", (name, big[:-5000])),
            service.post("/predict", (name, big[:600])),
            service.ask("POST", "/Zentinel?SECRET-4711", big, content_type="application/dicom"),
            service.ask("Zentinel", "/predict"),
        ]
        good = [
            service.post("/predict", ("1", big), ("2", big)),
            service.ask("POST", "/predict", big, content_type="application/dicom"),
            service.post("/explain", ("1", big)),
            service.post("/predict", ("3", tiff.getvalue())),
        ]
        metrics = service.ask("GET", "/metrics")[1].decode()
        DISK["watched"] = False
    assert [answer[0] for answer in good] == [200] * 4 and all(answer[0] >= 400 for answer in found)
    assert DISK["written"] == []
    logged = caplog.text + "".join(capfd.readouterr()) + metrics
    said = json.dumps([[answer[1], list(answer[2].items())] for answer in good])
    assert [word for word in SECRETS if word in logged + said] == []
    assert [word for word in SECRETS[2:] if word in json.dumps([answer[1] for answer in found])] == []
    lines = [record.getMessage() for record in caplog.records if record.name == "lungjax.serve"]
    assert sum(bool(re.fullmatch(r"(POST|other|GET) [/\w.]+ \d{3} \d+ ms \d images", line)) for line in lines) == 12


# The command


def test_a_real_network_answers_as_in_python(tmp_path, monkeypatch, small_data):
    monkeypatch.setitem(models.MODELS, "small_bn", small_bn())
    size = InputSpec(size=(32, 32), mean=(0.3,), std=(0.2,))
    config = Config(input=size, model=ModelConfig(name="small_bn"), eval=EvalConfig(batch_size=2))
    net = models.build(config.model, 3)
    variables = net.init(jax.random.key(0), np.zeros((1, 32, 32, 1), np.float32), train=False)
    trained = api.Trained(config, small_data.classes, net, variables, 3)
    monkeypatch.setattr(api, "load", lambda _: trained)
    about = {"best_step": 3, "fingerprint": "0"}
    told = Metadata("run", small_data.classes, size, "folder/small", temperature=0.5, about=about)
    (tmp_path / "model.json").write_text(told.to_json())
    (tmp_path / "data.json").write_text(json.dumps({"fingerprint": "0"}))
    files = [record["image"] for record in small_data.records[:5]]
    plain = trained.predict([images.decode(data, None) for data in files]).astype(np.float64)
    wanted = plain**2 / (plain**2).sum(1, keepdims=True)  # logits over a temperature of a half
    assert np.ptp(wanted, axis=0).min() > 1e-3
    with running(predictor.open_model(tmp_path)) as service:
        status, said, _ = service.post("/predict", *((f"{i}.png", data) for i, data in enumerate(files)))
        maps = service.post("/explain?class=middle", ("0.png", files[0]))
    assert status == 200 and maps[0] == 200 and maps[1]["results"][0]["explained"] == "middle"
    found = [[one["probabilities"][name] for name in small_data.classes] for one in said["results"]]
    np.testing.assert_allclose(found, wanted, atol=5e-6)


def test_a_port_that_is_taken_and_addresses_that_are_not_here():
    taken = command.listen("127.0.0.1", 0)
    port = taken.getsockname()[1]
    taken.listen()
    with pytest.raises(ValueError, match=rf"--port={port} at 127.0.0.1 can't be had \(address already in use\)"):
        command.listen("127.0.0.1", port)
    taken.close()
    with pytest.raises(ValueError, match="--host=nowhere.invalid: no such address"):
        command.listen("nowhere.invalid", 0)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(command, "NEEDED", ("json", "no_such_package"))
    with flagsaver.flagsaver(model="runs/mine"), pytest.raises(ValueError) as caught:
        command.main([])
    assert str(caught.value) == "no_such_package not installed: pip install 'lungjax[serve]'"


def test_tokens_are_read_and_weak_ones_refused(tmp_path, monkeypatch):
    file = tmp_path / "token"
    file.write_text(TOKEN + "\n")
    assert command.read_token(str(file)) == TOKEN
    monkeypatch.setenv("LUNGJAX_TOKEN", "secret")
    with pytest.raises(ValueError, match="LUNGJAX_TOKEN: wanted at least 16") as caught:
        command.read_token(None)
    assert "secret" not in str(caught.value)
    with pytest.raises(ValueError, match="can't be read"):
        command.read_token(str(tmp_path / "none"))
    monkeypatch.delenv("LUNGJAX_TOKEN")
    assert command.read_token(None) == ""
    file.write_text("")
    with pytest.raises(ValueError, match="wanted at least 16"):
        command.read_token(str(file))


STARTED = """
import sys
sys.path.insert(0, "tests")
import test_serve
from lungjax import machine, predictor
machine.prepare_jax = lambda: None
predictor.open_model = lambda path: test_serve.Slow()
from lungjax import entry
from lungjax.serve import __main__ as command
entry.run(command.main)
"""


class Slow(Brightness):
    """Takes half a second for a batch."""

    def __call__(self, pixels):
        time.sleep(0.5)
        return super().__call__(pixels)


def test_the_process_finishes_what_runs_when_it_is_told_to_stop():
    arguments = [sys.executable, "-c", STARTED, "--model=none", "--port=0"]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        lines = []
        while not lines or not lines[-1].startswith("http://"):
            lines.append(process.stdout.readline())
            assert lines[-1], process.stderr.read()
        assert lines[:2] == ["small: tells dark, bright apart, trained on folder/mine.\n", NOTICE + "\n"]
        service = Service(None, None, int(re.search(r"127\.0\.0\.1:(\d+)/", lines[-1])[1]))

        def healthy():
            try:
                return service.ask("GET", "/health")[0] == 200
            except OSError:
                return False

        wait_for(healthy)
        found, threads = post_all(service, 1)
        wait_for(lambda: service.metric("lungjax_running_requests") == 2)
        process.send_signal(signal.SIGTERM)
        threads[0].join()
        assert found[0][0] == 200
        _, errors = process.communicate(timeout=20)
        assert process.returncode == 0, errors
        assert "POST /predict 200" in errors and "Traceback" not in errors
    finally:
        process.kill()
