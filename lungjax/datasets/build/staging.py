"""The staging directory of a data set, which is locked, checked for disk space, and published by renaming."""

import contextlib
import fcntl
import shutil
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from lungjax.data import prepared
from lungjax.runtime.files import name_disk_errors, sync_path

SPARE_BYTES = 64 << 20  # disk space that must stay free


@contextlib.contextmanager
def locked(data_dir: Path, name: str) -> Iterator[Path]:
    """Yields an empty staging directory on the same disk; other processes that prepare this name wait."""
    root = data_dir / ".staging" / name.replace("/", "-")
    root.mkdir(parents=True, exist_ok=True)
    with (root.parent / f"{root.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"Waiting for another process that prepares {name} ...")
            fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            shutil.rmtree(root, ignore_errors=True)  # of a killed run
            root.mkdir(parents=True)
            with name_disk_errors(root):
                yield root
        finally:
            shutil.rmtree(root, ignore_errors=True)


def publish(written: Path, final: Path) -> None:
    """Syncs a complete data set to the disk and moves it to `final`; an existing one is removed last.

    After a kill between the two renames, `prepared.directory` returns the old one.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    for path in (*written.rglob("*"), written):
        sync_path(path)
    old = final.with_name(final.name + prepared.OLD)
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    written.rename(final)
    sync_path(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def check_disk(needed: int, data_dir: Path) -> str:
    """Returns the size of the data to write as text. Raises ValueError unless SPARE_BYTES more than it are free."""
    disk = shutil.disk_usage(data_dir).free
    free, size, total = (tqdm.format_sizeof(n, "B") for n in (disk, needed, needed + SPARE_BYTES))
    if needed + SPARE_BYTES > disk:
        raise ValueError(f"{data_dir}: the records need about {total}, but {free} are free; choose another --data_dir")
    return f"about {size} to write to {data_dir} ({free} free)"
