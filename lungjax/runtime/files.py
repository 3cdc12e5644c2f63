"""Files and folders that are there whole or not at all: written beside their place, then put into it."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """Yields a path to write to; after the body the file replaces `path`, after an error it is removed.

    It ends as `path` does, for readers that look at that.
    """
    partial = path.with_name(f".{uuid.uuid4().hex}{path.suffix}")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def replaced_folder(path: Path, mark: str) -> Iterator[Path]:
    """Yields an empty folder to fill; after the body it replaces `path`, after an error it is removed.

    Raises ValueError for a folder that is there without the file `mark`, so that nobody's files are lost. The old
    folder stays in a hidden place while the new one moves in, so that one of them is always whole.
    """
    if path.exists() and not (path / mark).exists():
        raise ValueError(f"{path} is there and has no {mark}, so it is no export: choose another --out")
    token = uuid.uuid4().hex
    partial, old = path.with_name(f".{token}"), path.with_name(f".{token}.old")
    partial.mkdir()
    try:
        yield partial
        if path.exists():
            path.rename(old)
        partial.rename(path)
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
