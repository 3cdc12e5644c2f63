"""Lists the files below a folder. An exported model.pyz contains this module: it imports only the standard library."""

import os
import stat
from collections import deque
from collections.abc import Callable
from pathlib import Path

HIDDEN = (".", "__MACOSX")  # prefixes of names that are skipped
SPECIAL = "a device, pipe or socket; expected a regular file"


def list_files(folder: Path, on_error: Callable[[str, str], None] | None = None) -> list[str]:
    """Returns the files below `folder`, relative to it with "/", sorted, without hidden files and folders.

    Links to folders are followed, but each folder is listed once, so that links can't multiply the files; broken links
    are listed, so that reading them raises an error with the name. `on_error` receives the path of an unreadable
    folder, a link to a listed folder, or a file that is not a regular one, and the reason; None raises ValueError.
    """

    def fail(path: str, reason: str) -> None:
        if on_error is None:
            raise ValueError(f"{path}: {reason}")
        on_error(path, reason)

    def visit(path: str, prefix: str) -> None:
        real = os.path.realpath(path)
        if real in visited:
            fail(path, "a link to a folder that is listed already")
            return
        visited.add(real)
        try:
            entries = [entry for entry in os.scandir(path) if not is_hidden(entry.name)]
        except OSError as error:
            fail(path, error.strerror or "can't be read")
            return
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.is_dir(follow_symlinks=False):
                visit(entry.path, f"{prefix}{entry.name}/")
            elif os.path.isdir(entry.path):
                links.append((entry.path, f"{prefix}{entry.name}/"))
            elif entry.is_file(follow_symlinks=False) or os.path.isfile(entry.path) or not os.path.exists(entry.path):
                files.append(prefix + entry.name)
            else:
                fail(entry.path, SPECIAL)

    files: list[str] = []
    visited: set[str] = set()  # real paths
    links = deque([(str(folder), "")])  # followed after the folders themselves, which keeps the shorter names
    while links:
        visit(*links.popleft())
    return sorted(files)


def check_regular(path: str | Path) -> os.stat_result:
    """Returns the status of a file or folder. Raises ValueError for anything else, whose reading might never end."""
    status = os.stat(path)
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        raise ValueError(SPECIAL)
    return status


def is_hidden(name: str) -> bool:
    """Returns whether a file or folder is skipped: a dotfile, or metadata that macOS adds to zip archives."""
    return name.startswith(HIDDEN)
