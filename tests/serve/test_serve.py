"""The service's answers: what is said of which file, in which order, and how requests share the device."""

import io
import json
import logging
import re
import socket

import numpy as np
import pytest
from conftest import png
from PIL import Image
from services import HEAD, TOLD, Brightness, flat, picture_of, post_all, running, slices, wait_for
from test_uploads import SECRETS, scan, written

from lungjax.config.metadata import NOTICE
from lungjax.inference import records
from lungjax.serve import schemas, uploads
from lungjax.serve.app import build
from lungjax.serve.settings import Settings


@pytest.fixture(scope="module")
def service():
    with running() as made:
        yield made


# Answers


def test_several_files_are_answered_in_their_order(service):
    files = [("a.png", flat(51)), ("b.txt", b"no image at all"), ("dir/c.png", flat(204)), ("blank.png", flat(0))]
    status, said, _ = service.post("/predict", *files)
    assert status == 200 and said["notice"] == NOTICE and said["series"] == []
    assert said["model"] == {"name": "small", "dataset": "folder/mine", "classes": ["dark", "bright"]}
    first, bad, third, blank = said["results"]
    assert first == records.record(TOLD, "a.png", np.float32([0.8, 0.2]), 0.5)
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
    assert f"error {number}: RuntimeError" in caplog.text and "services.py" in caplog.text
    assert SECRETS[0] not in caplog.text + json.dumps(said)


def test_a_model_that_can_not_be_compiled_says_so():
    model, told = Brightness(), []
    model.warm = lambda: 1 / 0
    app = build(model, Settings(), told.append)
    app.state.device.start()
    app.state.device.stop()
    assert isinstance(told[0], ZeroDivisionError)
    with pytest.raises(uploads.UploadError, match="could not load"):
        app.state.device.check("predict")
