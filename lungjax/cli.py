"""What the entry files share: a user's mistake ends in a message and exit code 2, a bug in its traceback."""

import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import app, flags, logging

from lungjax.runtime import signals

USER_ERRORS = (
    errno.ENOSPC, errno.EACCES, errno.EROFS, errno.ENOENT, errno.EDQUOT, errno.EEXIST, errno.ENOTDIR,
)  # fmt: skip


def run(
    main: Callable[[list[str]], None],
    define_flags: Callable[[], None],
    arguments: Sequence[str] = (),
    argv: list[str] | None = None,
) -> None:
    """Defines and parses the flags, runs `main` and ends the process with its exit code.

    `define_flags` defines the command's flags, so that importing its module defines none. `argv` replaces sys.argv.

    `arguments` are the names of what must stand there besides flags, in order; `main` gets it after the program's name,
    and nothing may be left over, unless the last name ends with "..." and stands for one or more.
    """
    many = bool(arguments) and arguments[-1].endswith("...")

    def quietly(argv: list[str]) -> None:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # orbax logs dozens of lines a checkpoint
        given = argv[1:]
        if given[len(arguments) :] and not many:
            what = f"{' '.join(arguments)} and flags, which start with --" if arguments else "every flag starts with --"
            raise app.UsageError(f"unexpected argument {given[len(arguments)]!r}: {what}")
        if len(given) < len(arguments):
            raise app.UsageError(f"{' '.join(arguments[len(given) :])} missing: give {' '.join(arguments)}")
        main(argv)

    define_flags()
    flags.DEFINE_bool("traceback", False, "Shows where in lungjax an error was raised.", module_name=main.__module__)
    try:
        app.run(quietly, argv)
    except signals.Interrupted as stop:  # saved, and said so
        sys.exit(128 + stop.number)
    except KeyboardInterrupt:
        print("lungjax: stopped; give the same command again to go on", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # of `| head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more at its end
        sys.exit(128 + signal.SIGPIPE)
    except (ValueError, OSError) as error:
        if flags.FLAGS.traceback or not _for_the_user(error):
            raise
        print(f"lungjax: {error}", file=sys.stderr)
        sys.exit(2)


def read_window(text: str) -> tuple[float, float]:
    """Returns low and high of "low,high". Raises ValueError for anything else."""
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--window={text}: wanted two numbers low,high such as --window=-160,240") from None
    if not low < high:
        raise ValueError(f"--window={text}: low must be below high")
    return low, high


def read_hu_window(text: str) -> tuple[float, float]:
    """Returns centre and width of "centre/width". Raises ValueError for anything else."""
    try:
        centre, width = (float(part) for part in text.split("/"))
    except ValueError:
        raise ValueError(f"--hu_window={text}: wanted centre/width in HU such as -600/1500") from None
    if width <= 0:
        raise ValueError(f"--hu_window={text}: the width must be above zero")
    return centre, width


def _for_the_user(error: ValueError | OSError) -> bool:
    if isinstance(error, OSError):
        return error.errno in USER_ERRORS
    # A ValueError raised in a file of ours is a message; one from a library below is a bug to be seen.
    frames = traceback.extract_tb(error.__traceback__)
    return Path(frames[-1].filename).is_relative_to(Path(__file__).parent)
