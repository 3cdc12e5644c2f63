"""Lists the files below a folder. An exported model.pyz contains this module, so it imports only os and pathlib."""

import os
from collections.abc import Callable
from pathlib import Path

HIDDEN = (".", "__MACOSX")  # prefixes of names that are skipped


def list_files(folder: Path, on_error: Callable[[str, str], None] | None = None) -> list[str]:
    """Returns the files below `folder`, relative to it with "/", sorted, without hidden files and folders.

    Links to folders are followed; broken links are listed, so that reading them raises an error with the name.
    `on_error` receives the path of an unreadable folder or circular link, and the reason; None raises ValueError.
    """

    def fail(path: str, reason: str) -> None:
        if on_error is None:
            raise ValueError(f"{path}: {reason}")
        on_error(path, reason)

    def visit(path: str, prefix: str, parents: frozenset[str]) -> None:
        real = os.path.realpath(path)
        if real in parents:
            fail(path, "a link to one of its parent folders")
            return
        try:
            entries = [entry for entry in os.scandir(path) if not is_hidden(entry.name)]
        except OSError as error:
            fail(path, error.strerror or "can't be read")
            return
        for entry in entries:
            if entry.is_dir():
                visit(entry.path, f"{prefix}{entry.name}/", parents | {real})
            elif entry.is_file() or entry.is_symlink():
                files.append(prefix + entry.name)

    files: list[str] = []
    visit(str(folder), "", frozenset())
    return sorted(files)


def is_hidden(name: str) -> bool:
    """Returns whether a file or folder is skipped: a dotfile, or metadata that macOS adds to zip archives."""
    return name.startswith(HIDDEN)
