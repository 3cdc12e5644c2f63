"""Writes TensorBoard events of finished or interrupted runs: python -m lungjax.tensorboard RUN...

With --set=train.tensorboard=True, training writes events continuously. Both need the `tensorboard` extra.
"""

from pathlib import Path

from lungjax import cli


def define_flags() -> None:
    """This command has no flags."""


def main(argv: list[str]) -> None:
    """Writes the events of each run, and prints the command that shows them."""
    from lungjax.training import event_files

    folders = [event_files.write(Path(name)) for name in argv[1:]]
    specification = ",".join(f"{Path(name).name}:{folder}" for name, folder in zip(argv[1:], folders, strict=True))
    print(f"tensorboard --logdir_spec={specification}" if len(folders) > 1 else f"tensorboard --logdir={folders[0]}")


if __name__ == "__main__":
    cli.run(main, define_flags, ("RUN...",))
