"""Files in memory, which may be a person's: they can be read like files on disk, and no message quotes them."""

import functools
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar, cast

READS = 200_000  # of one file: each element of a DICOM file takes two, and a CT slice has some hundred elements


@dataclass(frozen=True, slots=True)
class Held:
    """A file in memory. Its name stands in messages, its content does not, not even in `repr`."""

    name: str
    data: bytes = field(repr=False)

    def __str__(self) -> str:
        """Returns its name."""
        return self.name

    def open(self) -> io.BytesIO:
        """Returns its bytes as a file that can be read READS times, and then raises ValueError.

        A few megabytes of empty elements, or of sequences inside sequences, would keep a parser busy for a minute.
        """
        return _Metered(self.data)


File = str | Held


class _Metered(io.BytesIO):
    reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads += 1
        if self.reads > READS:
            raise ValueError("too many elements")
        return super().read(size)


def quote(file: File, words: Any, instead: str = "") -> str:
    """Returns what a message says of a file's content: `words` for one on disk, `instead` for one in memory."""
    return instead if isinstance(file, Held) else " ".join(str(words).split())


class Unreadable(ValueError):
    """Why a DICOM or NIfTI file can't be read; the message starts with the file's name."""


class MissingPackage(ValueError):
    """An optional package that is not installed; the message says how to install it."""


Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def named_errors(kind: str) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """Decorates a reader of DICOM or NIfTI files such that all that a damaged file can raise becomes Unreadable.

    The reader's first argument is the file. Packages convert values when they are first used, so any access may raise,
    and with any type. The errors of pydicom quote values, which may be a person's: of a file in memory no message
    repeats them.
    """

    def decorate(read: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        @functools.wraps(read)
        def named(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            try:
                return read(*args, **kwargs)
            except (Unreadable, MissingPackage):
                raise
            except Exception as error:
                file = cast(File, args[0])
                reason = quote(file, f" ({type(error).__name__}: {error})")
                raise Unreadable(f"{file}: a damaged {kind} file{reason and ' ' + reason}") from None

        return named

    return decorate
