"""Runs a command like `python -m lungjax.X ARGUMENTS`, but in this process."""

from absl import flags

from lungjax import cli


def run(command, *arguments, positional=()) -> int:
    """Runs the command of a module, such as `lungjax.prepare`; returns its exit code, and capsys captures its output.

    `positional` lists the names of the command's arguments that are not flags. The command's flags are removed
    afterwards, so that several commands can run in one process.
    """
    own = {"traceback"}

    def define_flags() -> None:
        before = set(flags.FLAGS)
        command.define_flags()
        own.update(set(flags.FLAGS) - before)

    try:
        cli.run(command.main, define_flags, positional, [command.__name__, *map(str, arguments)])
    except SystemExit as end:
        return end.code or 0
    finally:
        for name in own & set(flags.FLAGS):  # not those of packages that the command imported
            delattr(flags.FLAGS, name)
        flags.FLAGS.mark_as_parsed()
    return 0
