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
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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
def name_disk_errors(path: Path) -> Iterator[None]:
    """Adds `path` to the error of a full disk, which names no file or a partial one."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL and (error.filename is None or PARTIAL in str(error.filename)):
            error.filename = str(path)
        raise


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields a path to write to. If the body succeeds, that file replaces `path`; otherwise, the file is removed.

    After a kill or a power loss, `path` has its old or its new content. The yielded path has the suffix of `path`.
    """
    partial = path.with_name(f"{PARTIAL}{uuid.uuid4().hex}{path.suffix}")
    try:
        with name_disk_errors(path):
            yield partial
            sync_path(partial)
            os.replace(partial, path)
            sync_path(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def atomic_write(path: Path, text: str) -> None:
    """Writes UTF-8 text with `atomic_file`; bytes of file names that are not UTF-8 become backslash escapes."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace", newline="")


def sync_path(path: Path) -> None:
    """Writes a file, or the entries of a folder, to disk, so that a new or renamed file survives a power loss."""
    handle = os.open(path, os.O_RDONLY)
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
        with name_disk_errors(path):
            yield partial
        if path.exists():
            path.rename(old)
        partial.rename(path)
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
