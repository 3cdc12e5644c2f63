"""Writes files and folders atomically and durably: under a temporary name in the same folder, then renamed."""

import errno
import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

PARTIAL = ".partial-"  # prefix of unfinished files


def lock(file: IO[str], message: str) -> None:
    """Locks an open file until it is closed. Raises ValueError with `message` if another process holds the lock."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(message) from None
    except OSError as error:  # a file system without locks, such as a mounted bucket
        if error.errno not in (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK):
            raise


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields a path to write to. If the body succeeds, that file replaces `path`; otherwise, the file is removed.

    After a kill or a power loss, `path` has its old or its new content. The yielded path has the suffix of `path`.
    """
    partial = path.with_name(f"{PARTIAL}{uuid.uuid4().hex}{path.suffix}")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def atomic_write(path: Path, text: str) -> None:
    """Writes UTF-8 text with `atomic_file`; bytes of file names that are not UTF-8 become backslash escapes."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace", newline="")


def sync_folder(folder: Path) -> None:
    """Writes the entries of a folder to disk, so that a new or renamed file survives a power loss."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def atomic_folder(path: Path, mark: str) -> Iterator[Path]:
    """Yields an empty folder. If the body succeeds, the folder replaces `path`; if it fails, the folder is removed.

    Raises ValueError for an existing folder without the file `mark`, so that no other files are lost. One of the two
    folders is always complete.
    """
    if path.exists() and not (path / mark).exists():
        raise ValueError(f"{path} exists but does not contain {mark}, so it is not an export: choose another --out")
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
