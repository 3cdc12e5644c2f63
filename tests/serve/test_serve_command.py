"""The command that serves: a real network, ports, tokens, and the end of the process."""

import json
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from absl.testing import flagsaver
from conftest import small_bn
from services import TOKEN, Brightness, Service, post_all, running, wait_for

from lungjax import models
from lungjax.config import Config, EvalConfig, InputSpec, ModelConfig
from lungjax.config.metadata import NOTICE, Metadata
from lungjax.data.imaging import images
from lungjax.inference import api, predictor
from lungjax.serve import __main__ as command


@pytest.fixture(scope="module")
def service():
    with running() as made:
        yield made


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
sys.path[:0] = ["tests", "tests/serve"]
import test_serve_command
from lungjax.runtime import environment
from lungjax.inference import predictor
environment.prepare_jax = lambda: None
predictor.open_model = lambda path: test_serve_command.Slow()
from lungjax import cli
from lungjax.serve import __main__ as command
cli.run(command.main, command.define_flags)
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
