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
MULTIHOST = flags.DEFINE_bool("multihost", False, "One of several hosts; the same command runs on each.")
COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where no cluster is detected.")
PROCESSES = flags.DEFINE_integer("processes", None, "How many processes there are, with --coordinator.")
PROCESS = flags.DEFINE_integer("process", None, "The number of this one, from 0, with --coordinator.")
COMPILE_FOR = flags.DEFINE_string(
    "compile_for", None, "Only compiles the training step, for TPUs that need not be here, such as v5e:4x4."
)
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
    if COMPILE_FOR.value:
        machine.without_tpu()
        prepare_jax()
        from lungjax import pod

        print(pod.compile_for(config, COMPILE_FOR.value, Path(DATA_DIR.value)).text())
        return
    prepare_jax()
    from lungjax import hosts, train  # here, after the flags, since they import jax

    address = (COORDINATOR.value, PROCESSES.value, PROCESS.value)
    if MULTIHOST.value or any(part is not None for part in address):
        hosts.start(*address)
    weights_dir = Path(WEIGHTS_DIR.value).expanduser() if WEIGHTS_DIR.value else None
    with hosts.none_left_behind():
        report = train.run(config, workdir, Path(DATA_DIR.value), MODE.value, weights_dir)
    if hosts.first():
        print(f"Report: {report}")


def prepare_jax() -> None:
    """Sets what jax reads when it is imported: memory that stays, the compilation cache, and repeatable GPU sums.

    The cache lies in the user's cache folder unless JAX_COMPILATION_CACHE_DIR says where. With it a GPU's choice of
    kernels is kept as well, so that the next run of this machine computes the same.
    """
    machine.keep_freed_memory()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(base) / "lungjax" / "xla"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
    if "xla_gpu_exclude_nondeterministic_ops" not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = (
            f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_exclude_nondeterministic_ops=true".strip()
        )


if __name__ == "__main__":
    entry.run(main)
