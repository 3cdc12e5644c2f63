"""Progress on stderr: a bar in a terminal, plain lines in a log file."""

import re
import sys
from typing import Any

from tqdm import tqdm

SECONDS = 15  # between lines in a log file
LINE = "{desc}: {n_fmt} of {total_fmt}, {rate_fmt}, {elapsed} elapsed, {remaining} left{postfix}"


class _Lines:
    """A file for tqdm that prints each redraw of the bar as a line."""

    def write(self, text: str) -> None:
        line = " ".join(text.split())
        if line and not re.search(r"(^|: )0(\.0+)? of ", line):  # not the empty bar at the start
            print(line, file=sys.stderr, flush=True)


def progress_bar(*args: Any, **options: Any) -> tqdm:
    """Returns `tqdm(*args, **options)`; unless stderr is a terminal, it prints a line every SECONDS."""
    if not sys.stderr.isatty():
        options |= {"file": _Lines(), "bar_format": LINE, "mininterval": SECONDS, "maxinterval": SECONDS, "miniters": 1}
    return tqdm(*args, **options)
