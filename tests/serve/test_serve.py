"""Answers of the service, their order, and how requests share the device."""

import asyncio
import base64
import json
import logging
import re
import socket
from pathlib import Path

import numpy as np
import pytest
import scans
from folders import encoded
from services import HEAD, METADATA, Brightness, flat, post_all, running, slices, wait_for
from test_uploads import SECRETS

from lungjax.config.metadata import NOTICE
from lungjax.data.imaging import images
from lungjax.inference import records
from lungjax.serve import schemas, uploads
from lungjax.serve.app import build
from lungjax.serve.settings import Settings


@pytest.fixture(scope="module")
def service():
    with running() as made:
        yield made


def test_results_in_order(service):
    files = [("a.png", flat(51)), ("b.txt", b"no image at all"), ("dir/c.png", flat(204)), ("blank.png", flat(0))]
    status, answer, _ = service.post("/predict", *files)
    assert status == 200 and answer["notice"] == NOTICE and answer["series"] == []
    assert answer["model"] == {"name": "small", "dataset": "folder/mine", "classes": ["dark", "bright"]}
    first, bad, third, blank = answer["results"]
    assert first == records.record(METADATA, "a.png", np.float32([0.8, 0.2]), 0.5)
    assert third["file"] == "c.png" and third["predicted"] == "bright" and third["decisions"]["bright"]["called"]
    assert bad["file"] == "b.txt" and "format" in bad["error"]
    assert blank["warnings"] == ["blank"] and blank["novelty"] == 2.5
    schemas.Predictions.model_validate(answer)


def test_raw_bodies(service):
    gray = np.full((20, 30), 102, np.uint8)
    for kind, body, bright in (
        ("image/jpeg", encoded(gray, "JPEG"), 0.4),
        ("image/png", encoded(np.full((20, 30), 13107, np.uint16)), 0.2),
        ("application/dicom", slices(1099, "1.2.3")[0], 0.95),
    ):
        status, answer, _ = service.ask("POST", "/predict", body, content_type=kind)
        result = answer["results"][0]
        assert status == 200 and result["file"] == "file"
        assert result["probabilities"]["bright"] == pytest.approx(bright, abs=0.003)


def test_status_if_all_files_fail(service):
    status, answer, _ = service.post("/predict", ("a.zip", b"PK\x03\x04....."), ("b.png", flat(3)[:50]))
    assert status == 415 and [r["file"] for r in answer["results"]] == ["a.zip", "b.png"]
    schemas.Problem.model_validate(answer)
    assert service.post("/predict", ("b.png", flat(3)[:50]))[0] == 422


def test_series(service):
    # The window from -1350 to 150 HU: 1024 + 75 is 0.95, 1024 - 600 is 0.5.
    series = slices(1099, "1.2.3.1") + slices(424, "1.2.3.2", 2)
    files = [("x.png", flat(255)), *((f"{i}.dcm", data) for i, data in enumerate(series))]
    status, answer, _ = service.post("/predict", *files)
    assert status == 200 and len(answer["results"]) == 6
    first, second = answer["series"]
    assert (first["series"], first["files"], second["files"]) == ("series 1", 3, 2)
    assert first["probabilities"]["bright"] == pytest.approx(0.95, abs=0.003)
    assert first["decisions"]["bright"]["called"] and first["decisions"]["bright"]["threshold"] == 0.9  # of patients
    assert not second["decisions"]["bright"]["called"] and answer["results"][-1]["decisions"]["bright"]["called"]
    schemas.Predictions.model_validate(answer)
    assert service.post("/predict", files[0], files[1])[1]["series"] == []


def test_enhanced_ct(service, tmp_path):
    hu = np.full((3, 8, 8), 75, np.int16)
    hu[2] = -600
    data = Path(scans.enhanced(tmp_path / "e.dcm", hu)).read_bytes()
    status, answer, _ = service.post("/predict", ("e.dcm", data), ("x.png", flat(255)))
    assert status == 200 and [result["file"] for result in answer["results"]] == ["e.dcm", "x.png"]
    schemas.Predictions.model_validate(answer)
    (series,) = answer["series"]
    assert series["files"] == 3 and series["probabilities"] == answer["results"][0]["probabilities"]
    assert series["probabilities"]["bright"] == pytest.approx((2 * 0.95 + 0.5) / 3, abs=0.003)
    answer = service.post("/explain", ("e.dcm", data), ("x.png", flat(255)))[1]
    assert "3 frames" in answer["results"][0]["error"] and "heat" in answer["results"][1]


def test_modality_of_scans(tmp_path):
    frames = Path(scans.enhanced(tmp_path / "e.dcm", np.full((3, 8, 8), 75, np.int16))).read_bytes()
    files = [("x.dcm", scans.file_bytes(scans.scan("CR"))), ("e.dcm", frames)]
    for modality, expected in (("ct", [True, False]), ("xray", [False, True])):
        with running(Brightness(modality=modality)) as service:
            results = service.post("/predict", *files)[1]["results"]
        assert [any(w.startswith("modality ") for w in result["warnings"]) for result in results] == expected


def test_explain(service):
    pixels = np.tile(np.linspace(0, 255, 8).astype(np.uint8), (8, 1))
    status, answer, _ = service.post("/explain?class=dark&method=occlusion", ("a.png", encoded(pixels)), ("b", b"\0"))
    assert status == 200 and "error" in answer["results"][1] and service.model.targets.tolist() == [0]
    result = answer["results"][0]
    assert (result["explained"], result["method"], result["predicted"]) == ("dark", "occlusion", "dark")
    image, heat, overlay = (images.read(base64.b64decode(result[key][22:]))[0] for key in ("image", "heat", "overlay"))
    np.testing.assert_array_equal(image, pixels)
    assert heat.shape == overlay.shape == (8, 8, 3) and (heat[:, 0] != heat[:, -1]).any()
    schemas.Explanations.model_validate(answer)
    assert service.post("/explain", ("a.png", flat(250)))[1]["results"][0]["explained"] == "bright"
    for path, word in (
        ("/explain?class=brigth", "bright"), ("/explain?method=gradcan", "did you mean gradcam"),
        ("/explain?method=gradcam%2B%2B", "impossible"), ("/explain?method=gradcam_positive", "gradcam, occlusion"),
        ("/predict?rule=youdem", "youden"),
    ):  # fmt: skip
        status, answer, _ = service.post(path, ("a.png", flat(9)))
        assert status == 422 and word in answer["error"]


def test_model_health_and_unknown_routes(service):
    answer = service.ask("GET", "/model")[1]
    assert answer["classes"] == ["dark", "bright"] and answer["methods"] == ["gradcam", "occlusion"]
    assert answer["notice"] == NOTICE and answer["limits"]["file_bytes"] == 64 * 2**20
    assert service.ask("GET", "/health")[:2] == (200, {"status": "ok"})
    for path, status in (("/none", 404), ("/predict", 405)):
        assert service.ask("GET", path)[0] == status and "error" in service.ask("GET", path)[1]


def test_page_and_headers(service):
    for path in ("/", "/page.js", "/page.css"):
        status, content, headers = service.ask("GET", path)
        assert status == 200 and len(content) > 100
        policy = headers["content-security-policy"]
        assert "script-src 'self'" in policy and "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff" and headers["cache-control"] == "no-store"
    for script in re.findall(rb'(?:src|href)="([\w./]+\.(?:js|css))"', service.ask("GET", "/")[1]):
        assert service.ask("GET", "/" + script.decode())[0] == 200
    assert service.ask("GET", "/page/../app.py")[0] == 404


def test_openapi_and_docs(service):
    tree = service.ask("GET", "/openapi.json")[1]
    assert set(tree["paths"]) == {"/predict", "/explain", "/model", "/health", "/metrics"}
    for path in ("/predict", "/explain"):
        operation = tree["paths"][path]["post"]
        assert {"multipart/form-data", "application/dicom"} <= set(operation["requestBody"]["content"])
        assert {"200", "400", "413", "504"} <= set(operation["responses"]) and operation["description"]
    text = service.ask("GET", "/docs")[1].decode()
    assert "/explain" in text and "<script" not in text and not re.findall(r'(?:src|href)="https?:', text)


def test_alternating_batches_and_saliency_maps():
    with running() as service:
        model = service.model
        model.gate.clear()
        post_all(service, 1)
        assert model.entered.wait(10)
        futures = post_all(service, 9) + post_all(service, 2, "/explain")
        wait_for(lambda: service.metric("lungjax_queue_images") == 11)
        model.gate.set()
        answers = [future.result() for future in futures]
        # A map takes the probabilities first.
        assert [call for call in model.calls if call != "gradcam"] == [1, 1, 4, 1, 4, 1]
        for i, (status, answer, _) in enumerate(answers[:9]):
            p = answer["results"][0]["probabilities"]["bright"]
            assert status == 200 and p == pytest.approx(i / 255, abs=1e-6)
        assert service.metric("lungjax_batch_images_sum") == 10 and service.metric("lungjax_batch_images_count") == 4


def test_full_queue_and_too_many_requests():
    with running(queue=3, requests=6) as service:
        model = service.model
        model.gate.clear()
        futures = post_all(service, 1)
        assert model.entered.wait(10)
        futures += post_all(service, 3)
        wait_for(lambda: service.metric("lungjax_queue_images") == 3)
        status, answer, headers = service.post("/predict", ("a", flat(1)))
        assert status == 503 and headers["retry-after"] == "1" and "waiting" in answer["error"]
        model.gate.set()
        assert {future.result()[0] for future in futures} == {200}
        assert service.post("/predict", *[("a", flat(1))] * 4)[0] == 413  # more than the queue can hold
        sockets = [socket.create_connection(("127.0.0.1", service.port)) for _ in range(7)]
        for one in sockets:
            one.sendall(HEAD + b"Content-Length: 9\r\n\r\n")
        wait_for(lambda: service.metric("lungjax_running_requests") > 6)
        assert service.post("/predict", ("a", flat(1)))[0] == 503
        assert service.ask("GET", "/health")[0] == 200
        for one in sockets:
            one.close()


def test_time_limit_and_abandoned_images():
    with running(seconds=0.5) as service:
        model = service.model
        model.gate.clear()
        futures = post_all(service, 1)
        assert model.entered.wait(10)
        answers = [future.result() for future in futures + post_all(service, 3)]
        assert {answer[0] for answer in answers} == {504} and "0.5 seconds" in answers[0][1]["error"]
        model.gate.set()
        wait_for(lambda: not service.metric("lungjax_queue_images"))
        assert model.calls == [1]  # the one in progress
        wait_for(lambda: service.post("/predict", ("a", flat(255)))[0] == 200)


def test_starting_then_ready():
    model = Brightness()
    model.gate.clear()
    with running(model, warm=False) as service:
        assert service.ask("GET", "/health")[:2] == (503, {"status": "starting"})
        status, answer, headers = service.post("/predict", ("a", flat(1)))
        assert status == 503 and "starting" in answer["error"] and headers["retry-after"]
        model.gate.set()
        wait_for(lambda: service.ask("GET", "/health")[0] == 200)
        assert service.post("/predict", ("a", flat(1)))[0] == 200


def test_number_of_a_model_error(caplog):
    caplog.set_level(logging.INFO, "lungjax.serve")
    with running() as service:
        service.model.error = RuntimeError(f"of {SECRETS[0]}")
        status, answer, _ = service.post("/predict", ("Zentinel.png", flat(1)))
        number = re.search(r"ID (\w{8}) in the log", answer["error"])[1]
        service.model.error = None
        assert status == 500 and service.post("/predict", ("a", flat(1)))[0] == 200
    assert f"error {number}: RuntimeError" in caplog.text and "services.py" in caplog.text
    assert SECRETS[0] not in caplog.text + json.dumps(answer)


def test_failed_compilation():
    model, errors = Brightness(), []
    model.warm = lambda: 1 / 0
    device = build(model, Settings(), errors.append).state.service.device
    asyncio.run(device.run())
    assert isinstance(errors[0], ZeroDivisionError)
    with pytest.raises(uploads.UploadError, match="could not load"):
        device.check("predict")
