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


def assert_errors(capsys, command, cases, positional=()) -> None:
    """Asserts that each (arguments, exit code, words) prints the words, without a traceback.

    A wrong value (code 2) is reported in one line, the last one; wrong usage (code 1) after the help of the command.
    """
    for arguments, code, words in cases:
        assert run(command, *arguments, positional=positional) == code, arguments
        output = capsys.readouterr()
        assert words in output.out + output.err and "Traceback" not in output.err, (arguments, output)
        assert code == 1 or output.err.splitlines()[-1].startswith("lungjax: "), arguments
