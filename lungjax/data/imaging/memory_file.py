"""Uploaded files in memory, read like files on disk. Messages never quote them, since they may contain patient data."""

import functools
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

MAX_READS = 200_000  # per file; an element of a DICOM file takes two, and a CT slice has a few hundred elements


@dataclass(frozen=True, slots=True)
class MemoryFile:
    """A file in memory. Messages and `repr` contain its name, never its content."""

    name: str
    data: bytes = field(repr=False)

    def __str__(self) -> str:
        """Returns the name of the file."""
        return self.name

    def open(self) -> io.BytesIO:
        """Returns a file object that raises ValueError after MAX_READS reads.

        Without a limit, a few megabytes of empty or deeply nested elements would occupy a parser for a minute.
        """
        return _LimitedReads(self.data)


File = str | MemoryFile


class _LimitedReads(io.BytesIO):
    reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads += 1
        if self.reads > MAX_READS:
            raise ValueError("too many elements")
        return super().read(size)


def quote(file: File, text: Any, instead: str = "") -> str:
    """Returns the text to quote in a message: `text` for a file on disk, `instead` for one in memory."""
    return instead if isinstance(file, MemoryFile) else " ".join(str(text).split())


class Unreadable(ValueError):
    """An unreadable DICOM or NIfTI file; the message starts with the file's name."""


class MissingPackage(ValueError):
    """An optional package that is not installed; the message has the install command."""


Result = TypeVar("Result")


def named_errors(read: Callable[..., Result]) -> Callable[..., Result]:
    """Decorates a reader, whose first argument is the file, so that it raises Unreadable for damaged files.

    pydicom and nibabel convert values lazily, so any access may raise any exception. Their messages may quote values
    that identify a patient, and are omitted for files in memory.
    """

    @functools.wraps(read)
    def wrapper(file: File, *args: Any) -> Result:
        try:
            return read(file, *args)
        except (Unreadable, MissingPackage):
            raise
        except Exception as error:
            raise Unreadable(f"{file}: a damaged file {quote(file, f'({type(error).__name__}: {error})')}") from None

    return wrapper
