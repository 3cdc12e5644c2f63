"""Entry point of every command. A user error prints a message and exits with code 2; a bug prints its traceback."""

import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags, logging

from lungjax.data.imaging.limits import BYTES_PER_PIXEL, DEFAULT, Limits
from lungjax.data.safe_text import printable
from lungjax.runtime import signals
from lungjax.runtime.advice import in_user_form
from lungjax.runtime.files import DISK_FULL

# Help of --model, after the kinds of models that a command accepts.
MODEL_HELP = "{}; several, separated by commas, or a folder of runs are an ensemble."
USER_ERRORS = (*DISK_FULL, errno.EACCES, errno.EROFS, errno.ENOENT, errno.EEXIST, errno.ENOTDIR)


def run(
    main: Callable[[list[str]], None],
    define_flags: Callable[[], None],
    arguments: Sequence[str] = (),
    argv: list[str] | None = None,
    resumable: bool = False,
) -> None:
    """Defines and parses the flags, runs `main` and ends the process with its exit code.

    `arguments` are the names of positional arguments: a last name with "..." stands for one or more, and a name in
    brackets is optional. `argv` replaces sys.argv; `resumable` means that a rerun continues an interrupted command. A
    function defines the flags, so that importing a command's module defines none.
    """
    variadic = bool(arguments) and arguments[-1].endswith("...")

    def check_arguments(argv: list[str]) -> None:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # orbax logs dozens of lines per checkpoint
        values = argv[1:]
        if len(values) > len(arguments) and not variadic:
            usage = f"{' '.join(arguments)} and flags, which start with --" if arguments else "flags start with --"
            raise app.UsageError(f"unexpected argument {values[len(arguments)]!r}: {usage}")
        if len(values) < sum(not name.startswith("[") for name in arguments):
            raise app.UsageError(f"{' '.join(arguments[len(values) :])} missing: give {' '.join(arguments)}")
        main(argv)

    program = sys.modules["__main__"]
    program.__doc__ = program.__doc__ and in_user_form(program.__doc__)  # printed by --help
    signals.repeat_ignored_interrupts()
    define_flags()
    flags.DEFINE_bool("traceback", False, "Show the traceback of an error.", module_name=main.__module__)
    try:
        app.run(check_arguments, argv)
    except signals.Interrupted as stop:  # the training loop has saved and printed a message
        sys.exit(128 + stop.number)
    except KeyboardInterrupt:
        print(f"lungjax: interrupted{'; rerun the same command to resume' if resumable else ''}", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader, such as `| head`, has exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would report it at exit
        sys.exit(128 + signal.SIGPIPE)
    except (ValueError, OSError) as error:
        if flags.FLAGS.traceback or not _is_user_error(error):
            raise
        print(printable(in_user_form(f"lungjax: {error}"), keep="\n"), file=sys.stderr)
        sys.exit(2)


def define_window_flags() -> None:
    """Defines --window and --hu_window, which `windows` reads."""
    flags.DEFINE_string("window", None, "Window of 16-bit images as low,high; default: that of the training images.")
    flags.DEFINE_string("hu_window", None, "CT window in HU, as center/width; default: that of the training images.")


def windows() -> dict[str, Any]:
    """Returns the fields of `Metadata` that --window and --hu_window replace."""
    values: dict[str, Any] = {"window": read_window(flags.FLAGS.window)} if flags.FLAGS.window else {}
    return values | ({"hu_windows": (read_hu_window(flags.FLAGS.hu_window),)} if flags.FLAGS.hu_window else {})


def out_folder(places: Sequence[Path], name: str) -> Path:
    """Returns --out, by default the folder `name` in the only run. Raises UsageError if there are several runs."""
    if not flags.FLAGS.out and (len(places) > 1 or not places[0].is_dir()):
        raise app.UsageError("--out=FOLDER is missing; it has a default only for the folder of a single run")
    return Path(flags.FLAGS.out).expanduser() if flags.FLAGS.out else places[0] / name


def define_limit_flags(volumes: bool = True) -> None:
    """Defines --max_megapixels and, with `volumes`, --max_megavoxels, which `limits` reads."""
    pixels, voxels = DEFAULT.pixels / 1e6, DEFAULT.voxels / 1e6
    # Pillow opens no larger image.
    flags.DEFINE_float("max_megapixels", pixels, "Maximum number of pixels of an image, in millions.", 0.0001, 178)
    if volumes:
        flags.DEFINE_float("max_megavoxels", voxels, "Maximum number of voxels of a volume, in millions.", 0.0001)


def limits() -> Limits:
    """Returns the limits of a file that --max_megapixels and --max_megavoxels set."""
    pixels, voxels = int(flags.FLAGS.max_megapixels * 1e6), int(flags.FLAGS.max_megavoxels * 1e6)
    return Limits(pixels, voxels, max(BYTES_PER_PIXEL * pixels, DEFAULT.bytes))


def read_window(text: str) -> tuple[float, float]:
    """Parses "low,high". Raises ValueError for anything else."""
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--window={text}: expected two numbers low,high, such as --window=-160,240") from None
    if not low < high:
        raise ValueError(f"--window={text}: low must be below high")
    return low, high


def read_hu_window(text: str) -> tuple[float, float]:
    """Parses "center/width". Raises ValueError for anything else."""
    try:
        center, width = (float(part) for part in text.split("/"))
    except ValueError:
        raise ValueError(f"--hu_window={text}: expected center/width in HU, such as -600/1500") from None
    if width <= 0:
        raise ValueError(f"--hu_window={text}: the width must be above zero")
    return center, width


def _is_user_error(error: ValueError | OSError) -> bool:
    if isinstance(error, OSError):
        return error.errno in USER_ERRORS
    # A ValueError from a file of lungjax is a message for the user; one from a library is a bug.
    frames = traceback.extract_tb(error.__traceback__)
    return Path(frames[-1].filename).is_relative_to(Path(__file__).parent)
