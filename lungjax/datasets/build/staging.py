"""Staging directory of a data set that is being written: locked, with enough disk space, published by a rename."""

import contextlib
import fcntl
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

SPARE_BYTES = 64 << 20  # disk space that must stay free


@contextlib.contextmanager
def locked(data_dir: Path, name: str) -> Iterator[Path]:
    """Yields an empty staging directory on the same disk; a second process that prepares the same name waits."""
    root = data_dir / ".staging" / name.replace("/", "-")
    root.mkdir(parents=True, exist_ok=True)
    with (root.parent / f"{root.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"Another process is preparing {name}: waiting for it ...")
            fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            shutil.rmtree(root, ignore_errors=True)  # of a killed run
            root.mkdir(parents=True)
            yield root
        finally:
            shutil.rmtree(root, ignore_errors=True)


def publish(written: Path, final: Path) -> None:
    """Moves a complete data set to `final`; an existing one is removed once the new one is in place."""
    final.parent.mkdir(parents=True, exist_ok=True)
    old = final.with_name(final.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    written.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def check_disk(needed: int, data_dir: Path, count: int, say: Callable[[str], None]) -> None:
    """Reports the bytes to be written. Raises ValueError if they and SPARE_BYTES are not free."""
    free = shutil.disk_usage(data_dir).free
    say(f"{count:,} images, about {_human(needed)} to write into {data_dir} ({_human(free)} free)")
    if needed + SPARE_BYTES > free:
        raise ValueError(
            f"{data_dir}: the records need about {_human(needed + SPARE_BYTES)}, {_human(free)} are free; "
            "choose another --data_dir"
        )


def _human(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
