"""The command `lungjax.serve`: a trained network, ports, tokens, and shutdown."""

import http.client
import json
import re
import resource
import signal
import socket
import subprocess
import sys

import commands
import pytest
from services import HEAD, TOKEN, Service, wait_for

import lungjax
from lungjax.config.metadata import NOTICE
from lungjax.serve import __main__ as serve


def test_taken_port_and_foreign_address():
    taken = serve.listen("127.0.0.1", 0)
    port = taken.getsockname()[1]
    with pytest.raises(ValueError, match=f"--port={port} .*address already in use"):
        serve.listen("127.0.0.1", port)
    taken.close()
    with pytest.raises(ValueError, match="--host=nowhere.invalid"):
        serve.listen("nowhere.invalid", 0)


def test_usage_errors(monkeypatch, capsys, tmp_path):
    cases = ([], 1, "--model"), ([f"--model={tmp_path}", "--port=0"], 2, "no trained run")
    commands.assert_errors(capsys, serve, cases)
    monkeypatch.setattr(serve, "PACKAGES", ("json", "no_such_package"))
    commands.assert_errors(capsys, serve, [(["--model=runs/mine"], 2, "no_such_package")])


def test_tokens(tmp_path, monkeypatch):
    file = tmp_path / "token"
    file.write_text(TOKEN + "\n")
    assert serve.read_token(str(file)) == TOKEN
    monkeypatch.delenv("LUNGJAX_TOKEN", raising=False)
    assert serve.read_token(None) == ""
    monkeypatch.setenv("LUNGJAX_TOKEN", "secret")
    file.write_text("")
    for path, word in ((None, "LUNGJAX_TOKEN.*16"), (str(tmp_path / "none"), "can't be read"), (str(file), "16")):
        with pytest.raises(ValueError, match=word) as error:
            serve.read_token(path)
        assert "secret" not in str(error.value)


def test_requests_in_progress_at_sigterm(trained_run):
    command = [sys.executable, "-m", "lungjax.serve", f"--model={trained_run.workdir}", "--port=0"]
    descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    command = ["sh", "-c", 'ulimit -S -n 512; exec "$@"', "sh", *command]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        lines = []
        while not lines or not lines[-1].startswith("http://"):
            lines.append(process.stdout.readline())
            assert lines[-1], process.stderr.read()
        assert re.match(r"small: .*left, middle, right.*folder/mine \(18 images\)", lines[0])
        assert lines[1] == NOTICE + "\n"
        service = Service(None, None, int(re.search(r"127\.0\.0\.1:(\d+)/", lines[-1])[1]))

        def healthy():
            try:
                return service.ask("GET", "/health")[0] == 200
            except OSError:
                return False

        wait_for(healthy, 60)
        assert resource.prlimit(process.pid, resource.RLIMIT_NOFILE) == (descriptors, descriptors)
        path = trained_run.images / "p000.png"
        status, answer, _ = service.post("/explain?class=middle", (path.name, path.read_bytes()))
        assert status == 200 and answer["results"][0]["explained"] == "middle"
        data = path.read_bytes()
        with socket.create_connection(("127.0.0.1", service.port), timeout=20) as connection:
            connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(data) + data[:100])
            wait_for(lambda: service.metric("lungjax_running_requests") == 2)
            process.send_signal(signal.SIGTERM)
            wait_for(lambda: not healthy())
            connection.sendall(data[100:])
            answer = http.client.HTTPResponse(connection)
            answer.begin()
            p = json.loads(answer.read())["results"][0]["probabilities"]
            assert list(p.values()) == pytest.approx(lungjax.load(trained_run.workdir).predict(path)[0], abs=5e-6)
        _, errors = process.communicate(timeout=20)
        assert process.returncode == 0, errors
        assert "POST /predict 200" in errors and "Traceback" not in errors
    finally:
        process.kill()
