"""Public ImageNet weights: python -m lungjax.weights --list | --fetch=NAME | --check=FILE | --verify

Only the flags are read here. Nothing but --fetch and --verify uses the network.
"""

from pathlib import Path

from absl import app, flags

from lungjax import cli
from lungjax.weights import catalogue, download

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_bool("list", False, "Prints every record; with --match those whose name holds it.")
    flags.DEFINE_string("match", "", "Regex over the names of records, for --list and --verify.")
    flags.DEFINE_multi_string("fetch", [], "Downloads a record, such as efficientnet_b0.keras; repeatable.")
    flags.DEFINE_string("check", None, "Says which record a file is, or which network it fits.")
    flags.DEFINE_bool("verify", False, "Downloads small records and checks that they agree and see a cat.")
    flags.DEFINE_string("weights_dir", None, "Where files lie and downloads go, in place of the cache.")


def main(_: list[str]) -> None:
    """Does what the flags ask for, in the order list, fetch, check, verify."""
    if not (FLAGS.list or FLAGS.fetch or FLAGS.check or FLAGS.verify):
        raise app.UsageError("one of --list, --fetch=NAME, --check=FILE, --verify is missing")
    folder = Path(FLAGS.weights_dir).expanduser() if FLAGS.weights_dir else None
    if FLAGS.list:
        print(catalogue.listing(FLAGS.match))
    wanted = [catalogue.find(name) for name in FLAGS.fetch]  # all names are looked at before anything is fetched
    for record in wanted:
        path = download.download(record, folder)
        note = " (not for commercial use)" if record.noncommercial else ""
        print(f"{record.name}: {path}, licence {record.licence}{note}")
    if FLAGS.check:
        from lungjax.weights import identify  # brings jax

        print(identify.identify(FLAGS.check))
    if FLAGS.verify:
        from lungjax.weights import verify

        for line in verify.run(FLAGS.match, folder):
            print(line, flush=True)


if __name__ == "__main__":
    cli.run(main, define_flags)
