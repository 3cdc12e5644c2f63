"""Lists, downloads and checks public weights: python -m lungjax.weights --list | --fetch=NAME | --check=FILE

Only --fetch accesses the network.
"""

from pathlib import Path

from absl import app, flags

from lungjax import cli
from lungjax.runtime.advice import in_user_form
from lungjax.weights import catalogue, download

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_bool("list", False, "Print the catalogue.")
    flags.DEFINE_string("match", "", "Regex of the names that --list prints.")
    flags.DEFINE_multi_string("fetch", [], "Download a file, such as efficientnet_b0.keras; repeatable.")
    flags.DEFINE_string("check", None, "Print the catalogue entry of a file, or the network that it fits.")
    flags.DEFINE_string("weights_dir", None, "Folder for weight files instead of the cache.")


def main(_: list[str]) -> None:
    """Runs --list, --fetch and --check, in this order."""
    if not (FLAGS.list or FLAGS.fetch or FLAGS.check):
        raise app.UsageError("give one of --list, --fetch=NAME or --check=FILE")
    folder = Path(FLAGS.weights_dir).expanduser() if FLAGS.weights_dir else None
    if FLAGS.list:
        print(in_user_form(catalogue.listing(FLAGS.match)))
    for record in [catalogue.find(name) for name in FLAGS.fetch]:  # all names are checked before the first download
        path = download.download(record, folder)
        note = " (not for commercial use)" if record.noncommercial else ""
        print(f"{record.name}: {path}, license {record.license}{note}")
    if FLAGS.check:
        from lungjax.weights import identify  # imports jax

        print(in_user_form(identify.identify(FLAGS.check)))


if __name__ == "__main__":
    cli.run(main, define_flags)
