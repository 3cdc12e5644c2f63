"""Trains and tests one experiment: python -m lungjax.main --experiment=phantom_demo

Only the flags are read here; `lungjax.train.run` does the work. Nothing imports jax until the flags are
parsed and the configuration is complete, so a typing mistake is answered at once.
"""

import os
from pathlib import Path

from absl import app, flags

from lungjax import config as configs
from lungjax import entry, experiment, machine, overrides

EXPERIMENT = flags.DEFINE_string(
    "experiment", None, "Name, name:key=value,..., a .py file, or a run's config.json; see --list."
)
SET = flags.DEFINE_multi_string("set", [], "Overrides one field, such as optim.lr=3e-4; repeatable.")
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where the run lives; default ./runs/NAME, and with --mode=evaluate where config.json lies."
)
DATA_DIR = flags.DEFINE_string("data_dir", "data", "Where lungjax.prepare wrote the data sets.")
WEIGHTS_DIR = flags.DEFINE_string("weights_dir", None, "Where downloaded weight files lie; looked at first.")
MODE = flags.DEFINE_enum("mode", "train", ["train", "evaluate"], "Train and test, or only test again.")
LIST = flags.DEFINE_bool("list", False, "Prints every experiment and ends.")
flags.adopt_module_key_flags(entry)


def main(_: list[str]) -> None:
    """Picks the experiment, applies the overrides, runs it and prints where the report is."""
    if LIST.value:
        print(experiment.listing())
        return
    if not EXPERIMENT.value:
        raise app.UsageError("--experiment=NAME is missing; --list shows the names")
    config = experiment.load(EXPERIMENT.value)
    for assignment in SET.value:
        config = overrides.override(config, assignment)
    configs.check(config)
    default = Path("runs") / config.name
    if MODE.value == "evaluate" and EXPERIMENT.value.endswith("config.json"):
        default = Path(EXPERIMENT.value).parent  # the run that this configuration was saved in
    workdir = Path(WORKDIR.value) if WORKDIR.value else default
    prepare_jax()
    from lungjax import train  # here, after the flags, since it imports jax

    weights_dir = Path(WEIGHTS_DIR.value).expanduser() if WEIGHTS_DIR.value else None
    report = train.run(config, workdir, Path(DATA_DIR.value), MODE.value, weights_dir)
    print(f"Report: {report}")


def prepare_jax() -> None:
    """Sets what jax reads when it is imported: memory that stays, and the compilation cache.

    The cache lies in the user's cache folder unless JAX_COMPILATION_CACHE_DIR says where.
    """
    machine.keep_freed_memory()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(base) / "lungjax" / "xla"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")


if __name__ == "__main__":
    entry.run(main)
