"""Runs a command in this process, as `python -m lungjax.X ARGUMENTS` does in its own."""

from absl import flags

from lungjax import cli


def run(command, *arguments, positional=()) -> int:
    """Returns the exit code of a command's module, such as `lungjax.prepare`; capsys captures the output.

    `positional` are the names of the arguments that the command takes besides flags. The flags of the command are
    removed again, so that several commands run in one process.
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
