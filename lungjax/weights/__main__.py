"""Public ImageNet weights: python -m lungjax.weights --list | --fetch=NAME | --check=FILE | --verify

Only the flags are read here. Nothing but --fetch and --verify uses the network.
"""

from pathlib import Path

from absl import app, flags

from lungjax import cli
from lungjax.weights import catalogue, download

LIST = flags.DEFINE_bool("list", False, "Prints every record; with --match those whose name holds it.")
MATCH = flags.DEFINE_string("match", "", "Regex over the names of records, for --list and --verify.")
FETCH = flags.DEFINE_multi_string("fetch", [], "Downloads a record, such as efficientnet_b0.keras; repeatable.")
CHECK = flags.DEFINE_string("check", None, "Says which record a file is, or which network it fits.")
VERIFY = flags.DEFINE_bool("verify", False, "Downloads small records and checks that they agree and see a cat.")
WEIGHTS_DIR = flags.DEFINE_string("weights_dir", None, "Where files lie and downloads go, in place of the cache.")
flags.adopt_module_key_flags(cli)


def main(_: list[str]) -> None:
    """Does what the flags ask for, in the order list, fetch, check, verify."""
    if not (LIST.value or FETCH.value or CHECK.value or VERIFY.value):
        raise app.UsageError("one of --list, --fetch=NAME, --check=FILE, --verify is missing")
    folder = Path(WEIGHTS_DIR.value).expanduser() if WEIGHTS_DIR.value else None
    if LIST.value:
        print(catalogue.listing(MATCH.value))
    wanted = [catalogue.find(name) for name in FETCH.value]  # all names are looked at before anything is fetched
    for record in wanted:
        path = download.download(record, folder)
        note = " (not for commercial use)" if record.noncommercial else ""
        print(f"{record.name}: {path}, licence {record.licence}{note}")
    if CHECK.value:
        from lungjax.weights import identify  # brings jax

        print(identify.identify(CHECK.value))
    if VERIFY.value:
        from lungjax.weights import verify

        for line in verify.run(MATCH.value, folder):
            print(line, flush=True)


if __name__ == "__main__":
    cli.run(main)
