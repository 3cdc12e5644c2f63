"""Uploaded files in memory, read like files on disk. They may be a patient's: no message quotes their content."""

import functools
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

MAX_READS = 200_000  # per file; an element of a DICOM file takes two, and a CT slice has a few hundred elements


@dataclass(frozen=True, slots=True)
class MemoryFile:
    """A file in memory. Messages contain its name, never its content; nor does `repr`."""

    name: str
    data: bytes = field(repr=False)

    def __str__(self) -> str:
        """Returns its name."""
        return self.name

    def open(self) -> io.BytesIO:
        """Returns a file object that raises ValueError after MAX_READS reads.

        A few megabytes of empty or deeply nested elements would keep a parser busy for a minute.
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
    """Returns what a message may say about a file's content: `text` for a file on disk, else `instead`."""
    return instead if isinstance(file, MemoryFile) else " ".join(str(text).split())


class Unreadable(ValueError):
    """A DICOM or NIfTI file that can't be read; the message starts with the file's name."""


class MissingPackage(ValueError):
    """An optional package that is not installed; the message says how to install it."""


Result = TypeVar("Result")


def named_errors(kind: str) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Decorates a reader of DICOM or NIfTI files so that any error of a damaged file becomes Unreadable.

    The reader's first argument is the file. Packages convert values lazily, so any access may raise any exception.
    pydicom's errors quote values, which may identify a patient: for a file in memory they are left out.
    """

    def decorate(read: Callable[..., Result]) -> Callable[..., Result]:
        @functools.wraps(read)
        def wrapper(file: File, *args: Any) -> Result:
            try:
                return read(file, *args)
            except (Unreadable, MissingPackage):
                raise
            except Exception as error:
                reason = quote(file, f" ({type(error).__name__}: {error})")
                raise Unreadable(f"{file}: a damaged {kind} file{reason and ' ' + reason}") from None

        return wrapper

    return decorate
