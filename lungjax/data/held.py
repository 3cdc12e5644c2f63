"""Files in memory, which may be a person's: they can be read like files on disk, and no message quotes them."""

import io
from dataclasses import dataclass, field
from typing import Any

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
