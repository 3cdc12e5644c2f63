"""Limits and access control of the service; no upload is logged or written to disk."""

import errno
import http.client
import json
import logging
import re
import socket
import threading
import time
from contextlib import ExitStack, closing

import numpy as np
import pytest
from folders import encoded
from scans import file_bytes, scan
from services import DISK, HEAD, TOKEN, conversation, flat, form, raw, running, wait_for
from test_uploads import SECRETS, picture, secret

from lungjax.runtime import environment
from lungjax.serve import middleware, protocol, uploads
from lungjax.serve.settings import Settings


@pytest.fixture(scope="module")
def service():
    with running() as made:
        yield made


@pytest.fixture(scope="module")
def strict():
    file = uploads.Limits(bytes=5000, pixels=5_000)
    with running(file=file, request_bytes=9000, upload_bytes=12_000, files=3, read_seconds=0.4) as made:
        yield made


def test_limits_of_a_request(strict):
    status, answer = raw(strict, HEAD + b"Content-Length: 1000000000\r\nExpect: 100-continue\r\n\r\n")
    assert status == 413 and "1000000000" in answer["error"]
    chunk = b"1000\r\n" + bytes(4096) + b"\r\n"
    assert raw(strict, HEAD + b"Transfer-Encoding: chunked\r\n\r\n", chunk, chunk, chunk, b"0\r\n\r\n")[0] == 413
    for files, status in (
        ([bytes(6000)], 413), ([np.random.default_rng(0).bytes(3000)] * 3, 413), ([flat(1)] * 4, 413),
        ([flat(1)] * 3, 200), ([flat(1, (10, 600))], 413),
    ):  # fmt: skip
        assert strict.post("/predict", *(("a", data) for data in files))[0] == status
    assert strict.metric("lungjax_upload_bytes") == 0
    assert strict.metric('lungjax_refused_total{reason="bytes"}') >= 3


def test_response_before_the_body_is_read(strict):
    status, answer = raw(strict, HEAD + b"Content-Length: 4000000\r\n\r\n" + bytes(2_000_000), bytes(2_000_000))
    assert status == 413 and "4000000" in answer["error"]
    started = time.monotonic()
    status, answer = raw(strict, HEAD + b"Content-Length: 1000000\r\n\r\n", *[b"x"] * 20, pause=0.03)  # never ends
    assert status == 413 and time.monotonic() - started < 3


def test_slow_body(strict):
    started = time.monotonic()
    status, answer = raw(strict, HEAD + b"Content-Length: 500\r\n\r\n", *[b"x"] * 12, pause=0.05)
    assert status == 408 and "slowly" in answer["error"] and time.monotonic() - started < 3
    assert strict.metric("lungjax_upload_bytes") == 0


def test_incomplete_head_times_out(service, monkeypatch):
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.3)
    request = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    for first, half in ((b"", b""), (b"", b"POST /pre"), (request, b"POST /pre")):
        with socket.create_connection(("127.0.0.1", service.port), timeout=9) as one:
            one.sendall(first)
            while first and not one.recv(4096).endswith(b"}"):
                pass
            one.sendall(half)
            started = time.monotonic()
            assert one.recv(4096) == b"" and time.monotonic() - started < 3
    monkeypatch.undo()
    assert service.post("/predict", ("a", flat(1)))[0] == 200


def test_many_idle_connections():
    """The connections that have been idle for longest are closed for new ones, but no request in progress is lost."""
    with running(connections=8, read_seconds=60) as service, ExitStack() as stack:

        def connect():
            return stack.enter_context(socket.create_connection(("127.0.0.1", service.port), timeout=9))

        busy, data = connect(), flat(1)
        busy.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(data) + data[:20])
        wait_for(lambda: service.metric("lungjax_running_requests") == 2)  # with the request for the metrics
        for _ in range(3):
            idle = [connect() for _ in range(20)]
            assert service.ask("GET", "/health")[0] == 200
        assert idle[0].recv(1) == b""
        for _ in range(20):  # clients that send many requests at once, and do not read the responses
            connect().sendall(b"GET /docs HTTP/1.1\r\nHost: localhost\r\n\r\n" * 100)
            assert service.ask("GET", "/health")[0] == 200
        idle = [connect() for _ in range(20)]
        idle[-1].sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert idle[-1].recv(4096).startswith(b"HTTP/1.1 200")
        busy.sendall(data[20:])
        assert busy.recv(4096).startswith(b"HTTP/1.1 200")


def test_log_without_descriptors(service, caplog, monkeypatch):
    def accept(_):
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch, socket.socket() as one:
        patch.setattr(socket.socket, "accept", accept)
        one.connect(("127.0.0.1", service.port))
        time.sleep(1.5)  # asyncio tries again after a second, 256 times each
    (record,) = caplog.records
    assert "Too many open files" in record.getMessage() and not record.exc_info
    assert service.ask("GET", "/health")[0] == 200


def test_slow_files_of_one_request(monkeypatch):
    """While a request has many slow files, others are decoded by the remaining threads."""
    monkeypatch.setattr(environment, "cores", lambda: 4)
    gate, read = threading.Event(), uploads.read
    monkeypatch.setattr(uploads, "read", lambda data, *rest: (data[:2] != b"BM" or gate.wait(20)) and read(data, *rest))
    slow = encoded(picture(), "BMP")
    with running() as service:
        thread = threading.Thread(target=service.post, args=("/predict", *[("slow", slow)] * 12))
        thread.start()
        wait_for(lambda: service.metric("lungjax_upload_bytes") > 0)
        assert service.post("/predict", ("fast", flat(1)))[0] == 200 and not gate.is_set()
        gate.set()
        thread.join(20)


def test_pixels_of_a_request():
    with running(file=uploads.Limits(pixels=1000)) as service:
        assert service.post("/predict", *[("a", flat(1))] * 6)[0] == 200  # 3600 pixels
        status, answer, _ = service.post("/predict", *[("a", flat(1))] * 12)
        assert status == 413 and "4000 pixels" in answer["error"]
        assert service.state.budget.bytes == 0


def test_two_lengths_of_a_body(service):
    """Proxies disagree on where such a request ends; a second request may hide in its body."""
    chunk = b"%x\r\n%s\r\n0\r\n\r\n" % (len(flat(1)), flat(1))
    hidden = b"GET /model HTTP/1.1\r\nHost: localhost\r\n\r\n"
    for size in (4, len(chunk)):
        lengths = b"Content-Length: %d\r\nTransfer-Encoding: chunked\r\n\r\n" % size
        answer = conversation(service.port, HEAD, lengths, chunk, hidden)
        assert answer.startswith(b"HTTP/1.1 400") and b"Transfer-Encoding" in answer and answer.count(b"HTTP/1.1") == 1


def test_half_closed_connection(service):
    data = flat(51)
    answer = conversation(service.port, HEAD, b"Content-Length: %d\r\n\r\n" % len(data), data, end=True)
    assert answer.startswith(b"HTTP/1.1 200") and b'"bright":0.2' in answer
    assert conversation(service.port, HEAD, b"Content-Length: 500\r\n\r\nabc", end=True) == b""
    answers = conversation(service.port, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" * 3, end=True)
    assert answers.count(b"HTTP/1.1 200") == 3


def test_memory_of_all_requests(strict):
    with socket.create_connection(("127.0.0.1", strict.port)) as first:
        first.sendall(HEAD + b"Content-Length: 8900\r\n\r\n" + bytes(8000))
        wait_for(lambda: strict.metric("lungjax_upload_bytes") == 8000)
        status, answer, headers = strict.post("/predict", ("a", np.random.default_rng(0).bytes(4990)))
        assert status == 503 and "once" in answer["error"] and headers["retry-after"]
    wait_for(lambda: strict.metric("lungjax_upload_bytes") == 0)


def test_malformed_bodies(service):
    good, multipart_type = form(("a", flat(1)))[0], "multipart/form-data; boundary=edge"
    for body, kind, status in (
        (b"x", "multipart/form-data", 400),  # without a boundary
        (good[:-30], multipart_type, 400),
        (good, "multipart/form-data; boundary=other", 400),
        (b"--edge--\r\n", multipart_type, 422),  # without a file
        (good.replace(b'"files"', b'"other"'), multipart_type, 422),
        (good.replace(b'; filename="a"', b""), multipart_type, 422),
        (good.replace(b"name=", b"nom="), multipart_type, 400),
        (b"--edge\r\nX-A: " + b"a" * 20_000 + b"\r\n\r\n\r\n--edge--\r\n", multipart_type, 400),
        (b"--edge\r\n" + b"X-A: a\r\n" * 2000 + b"\r\n\r\n--edge--\r\n", multipart_type, 400),
        (b"--edge\r\n\x00\x01: a\r\n\r\n\r\n--edge--\r\n", multipart_type, 400),
        (b"{}", "application/json", 415),
        (b"", "image/png", 422),
    ):
        found, answer, _ = service.ask("POST", "/predict", body, content_type=kind)
        assert found == status and answer["error"], (body[:60], found, answer)
        assert service.state.budget.bytes == 0
    assert service.ask("POST", "/predict", b"x", content_type="image/png", content_encoding="gzip")[0] == 415


def test_disconnected_clients(service):
    for end in (b"", b"abc"):
        with socket.create_connection(("127.0.0.1", service.port)) as one:
            one.sendall(HEAD + b"Content-Length: 500\r\n\r\n" + end)
    wait_for(lambda: service.metric("lungjax_running_requests") == 1)  # the request for the metrics
    assert service.state.budget.bytes == 0 and service.post("/predict", ("a", flat(1)))[0] == 200


def test_token():
    with running(token=TOKEN) as service:
        right = {"authorization": f"Bearer {TOKEN}"}
        for path in ("/model", "/metrics"):
            status, answer, headers = service.ask("GET", path)
            assert status == 401 and headers["www-authenticate"] == "Bearer" and TOKEN not in json.dumps(answer)
            for wrong in ("Bearer ", f"Bearer {TOKEN}x", f"Basic {TOKEN}", TOKEN, "Bearer \xff"):
                assert service.ask("GET", path, authorization=wrong)[0] == 401
            assert service.ask("GET", path, **right)[0] == 200
        assert service.post("/predict", ("a", bytes(3 * 2**20)))[0] == 401  # answered, although the body was not read
        assert service.post("/predict", ("a", flat(1)), **right)[0] == 200 and service.model.calls == [1]
        assert {service.ask("GET", path)[0] for path in ("/", "/health", "/page.js", "/docs")} == {200}
        tree = service.ask("GET", "/openapi.json")[1]
        assert tree["paths"]["/predict"]["post"]["security"] == [{"token": []}]
    assert TOKEN not in repr(Settings(token=TOKEN))


def test_repeated_wrong_tokens(caplog, monkeypatch):
    monkeypatch.setattr(middleware, "TOKEN_DELAY", 0.2)
    caplog.set_level(logging.INFO)

    def ask(source, token):
        started = time.monotonic()
        with closing(http.client.HTTPConnection("127.0.0.1", service.port, 9, source_address=(source, 0))) as one:
            one.request("GET", "/metrics", headers={"authorization": f"Bearer {token}"})
            return one.getresponse().status, time.monotonic() - started

    with running(token=TOKEN) as service:
        wrong = [ask("127.0.0.1", "wrong") for _ in range(5)]
        assert {status for status, _ in wrong} == {401} and wrong[-1][1] > 1 > wrong[0][1]
        for _, seconds in (ask("127.0.0.1", TOKEN), ask("127.0.0.2", "wrong"), ask("127.0.0.1", TOKEN)):
            assert seconds < 1
    lines = [record.getMessage() for record in caplog.records if record.name == "lungjax.serve"]
    assert len(lines) == 3 and "wrong token" in lines[0] and lines[1].startswith("GET /metrics 200")


def test_host_names_and_other_sites(service):
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


def test_host_names_of_a_public_service():
    with running(host="0.0.0.0", names=("scanner.example",)) as service:
        hosts = ("10.0.0.7:8000", "scanner.example", "evil.example")
        assert [service.ask("GET", "/model", host=host)[0] for host in hosts] == [200, 200, 421]


def test_no_trace_of_uploads(caplog, capfd):
    """No file leaves a trace, even above a megabyte, where Starlette's form parser by default writes to disk."""
    caplog.set_level(logging.DEBUG)
    big = file_bytes(secret(scan(shape=(1100, 1100))))
    assert len(big) > 2**21
    tiff = encoded(picture((1500, 1500)), "TIFF", compression="tiff_lzw")
    for decoder in ("pydicom", "PIL", "python_multipart"):
        logging.getLogger(decoder).setLevel(logging.NOTSET)
    with running() as service:
        for decoder in ("pydicom", "PIL.PngImagePlugin", "python_multipart.multipart"):
            logging.getLogger(decoder).error("found %s", SECRETS[2])  # as these libraries would
        service.post("/explain", ("warm.png", flat(9)))  # matplotlib writes its own files first
        DISK["written"], DISK["watched"] = [], True
        name = "Zentinel^Otto.dcm"
        refused = [
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
            service.post("/predict", ("3", tiff)),
        ]
        metrics = service.ask("GET", "/metrics")[1].decode()
        DISK["watched"] = False
    assert [answer[0] for answer in good] == [200] * 4 and all(answer[0] >= 400 for answer in refused)
    assert DISK["written"] == []
    logged = caplog.text + "".join(capfd.readouterr()) + metrics
    answers = json.dumps([[answer[1], list(answer[2].items())] for answer in good])
    assert [word for word in SECRETS if word in logged + answers] == []
    assert [word for word in SECRETS[2:] if word in json.dumps([answer[1] for answer in refused])] == []
    lines = [record.getMessage() for record in caplog.records if record.name == "lungjax.serve"]
    assert sum(bool(re.fullmatch(r"(POST|other|GET) [/\w.]+ \d{3} \d+ ms \d images", line)) for line in lines) == 12
