"""Progress on stderr: a bar in a terminal, plain lines in a log file."""

import sys
import time
from typing import Any

from tqdm import tqdm

SECONDS = 15  # between lines in a log file
LINE = "{desc}: {n_fmt} of {total_fmt}, {rate_fmt}, {elapsed} elapsed, {remaining} left{postfix}"


class ProgressBar(tqdm):
    """tqdm that prints one line every SECONDS, and one at the end unless `leave=False`, if stderr is no terminal."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.plain = not sys.stderr.isatty()
        self.last_line = time.monotonic()
        super().__init__(*args, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Draws the bar, or prints a line if the last one is SECONDS old."""
        if not self.plain:
            super().display(msg, pos)
        elif time.monotonic() - self.last_line >= SECONDS:
            self._print_line()

    def clear(self, nolock: bool = False) -> None:
        """Removes the bar from the terminal."""
        if not self.plain:
            super().clear(nolock)

    def close(self) -> None:
        """Ends the progress."""
        if self.plain and not self.disable:
            if self.leave:
                self._print_line()
            self.sp = None  # tqdm then writes no control characters
        super().close()

    def _print_line(self) -> None:
        self.last_line = time.monotonic()
        line = self.format_meter(**self.format_dict | {"bar_format": LINE, "ncols": None})
        print(" ".join(line.split()), file=self.fp, flush=True)
