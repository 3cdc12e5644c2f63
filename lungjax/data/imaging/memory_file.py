"""Files on disk, and uploads in memory, whose content no message quotes, since they may contain patient data."""

import functools
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from lungjax.data.imaging.limits import LimitError

MAX_READS = 200_000  # per upload; an element of a DICOM file takes two, and a CT slice has a few hundred elements
MAX_DISK_READS = 500_000  # per file on disk; an enhanced CT of 1500 slices needs some hundred thousand


@dataclass(frozen=True, slots=True)
class MemoryFile:
    """A file in memory. Messages and `repr` contain its name, never its content."""

    name: str
    data: bytes = field(repr=False)

    def __str__(self) -> str:
        """Returns the name of the file."""
        return self.name


File = str | MemoryFile


class LimitedReader(io.BufferedReader):
    """A file that raises ValueError after `max_reads` reads, and for a read of more than `max_bytes` or of the rest.

    Otherwise a few megabytes of empty or deeply nested elements would occupy a parser for a minute. pydicom reads the
    rest only to inflate it, without a limit.
    """

    name = ""  # for pydicom; a file in memory has none

    def __init__(self, raw: Any, max_bytes: int, max_reads: int) -> None:
        super().__init__(raw)
        self.max_bytes, self.max_reads = max_bytes, max_reads

    def read(self, size: int | None = -1, /) -> bytes:
        """Returns the next `size` bytes."""
        self.max_reads -= 1
        if self.max_reads < 0:
            raise ValueError("too many elements")
        if size is None or not 0 <= size <= self.max_bytes:
            raise ValueError("an element is too large")
        return super().read(size)


def open_limited(file: File, max_bytes: int) -> LimitedReader:
    """Opens a file on disk or in memory."""
    if isinstance(file, MemoryFile):
        return LimitedReader(io.BytesIO(file.data), max_bytes, MAX_READS)
    return LimitedReader(io.FileIO(file), max_bytes, MAX_DISK_READS)


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
    def wrapper(file: File, *args: Any, **kwargs: Any) -> Result:
        try:
            return read(file, *args, **kwargs)
        except (Unreadable, MissingPackage):
            raise
        except LimitError as error:
            raise LimitError(f"{file}: {str(error).removeprefix(f'{file}: ')}", error.reason) from None
        except Exception as error:
            raise Unreadable(f"{file}: a damaged file {quote(file, f'({type(error).__name__}: {error})')}") from None

    return wrapper
