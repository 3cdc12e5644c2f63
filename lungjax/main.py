"""Trains and tests one experiment: python -m lungjax.main --experiment=phantom_demo

Only the flags are read here; `lungjax.training.train.run` does the work. Nothing imports jax until the flags are
parsed and the configuration is complete, so a typing mistake is answered at once.
"""

from pathlib import Path

from absl import app, flags

from lungjax import cli
from lungjax import config as configs
from lungjax.config import experiments, overrides
from lungjax.runtime import environment

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
FOLDS = flags.DEFINE_integer(
    "folds", None, "Cross-validation: a run for each of so many parts of the data, and a report over all of them."
)
DATASET = flags.DEFINE_string("dataset", None, "With --mode=evaluate: another prepared data set to test the run on.")
LABEL_MAP = flags.DEFINE_string(
    "label_map", "", "With --dataset: THEIRS=OURS+OURS,THEIRS=-,... where the class names differ; - leaves one out."
)
SPLIT = flags.DEFINE_enum("split", "test", ["test", "val", "train", "all"], "With --dataset: what of it is tested.")
MULTIHOST = flags.DEFINE_bool("multihost", False, "One of several hosts; the same command runs on each.")
COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where no cluster is detected.")
PROCESSES = flags.DEFINE_integer("processes", None, "How many processes there are, with --coordinator.")
PROCESS = flags.DEFINE_integer("process", None, "The number of this one, from 0, with --coordinator.")
COMPILE_FOR = flags.DEFINE_string(
    "compile_for", None, "Only compiles the training step, for TPUs that need not be here, such as v5e:4x4."
)
LIST = flags.DEFINE_bool("list", False, "Prints every experiment and ends.")
flags.adopt_module_key_flags(cli)


def main(_: list[str]) -> None:
    """Picks the experiment, applies the overrides, runs it and prints where the report is."""
    if LIST.value:
        print(experiments.listing())
        return
    check_flags()
    saved = f"{WORKDIR.value}/config.json" if MODE.value == "evaluate" and WORKDIR.value else ""
    chosen = EXPERIMENT.value or saved
    if not chosen:
        raise app.UsageError("--experiment=NAME is missing; --list shows the names")
    config = experiments.load(chosen)
    for assignment in SET.value:
        config = overrides.override(config, assignment)
    configs.check(config)
    default = Path("runs") / (config.name + (f"_folds{FOLDS.value}" if FOLDS.value is not None else ""))
    if MODE.value == "evaluate" and chosen.endswith("config.json"):
        default = Path(chosen).parent  # the run that this configuration was saved in
    workdir = Path(WORKDIR.value) if WORKDIR.value else default
    if COMPILE_FOR.value:
        environment.without_tpu()
        environment.prepare_jax()
        from lungjax.training import aot_compile

        print(aot_compile.compile_for(config, COMPILE_FOR.value, Path(DATA_DIR.value)).text())
        return
    environment.prepare_jax()
    from lungjax.runtime import distributed  # here, after the flags, since they import jax
    from lungjax.training import cross_validation, external_test, train

    address = (COORDINATOR.value, PROCESSES.value, PROCESS.value)
    if MULTIHOST.value or any(part is not None for part in address):
        distributed.start(*address)
    weights_dir = Path(WEIGHTS_DIR.value).expanduser() if WEIGHTS_DIR.value else None
    data_dir = Path(DATA_DIR.value)
    with distributed.abort_all_on_error():
        if DATASET.value:
            report = external_test.evaluate(config, workdir, data_dir, DATASET.value, LABEL_MAP.value, SPLIT.value)
        elif FOLDS.value is not None:
            report = cross_validation.run(config, FOLDS.value, workdir, data_dir, MODE.value, weights_dir)
        else:
            report = train.run(config, workdir, data_dir, MODE.value, weights_dir)
    if distributed.is_first_host():
        print(f"Report: {report.with_suffix('.html')}")


def check_flags() -> None:
    """Raises UsageError for flags that say nothing together."""
    if DATASET.value and (MODE.value != "evaluate" or FOLDS.value is not None):
        raise app.UsageError("--dataset=OTHER tests a run that is there: it needs --mode=evaluate, and not --folds")
    if MODE.value == "evaluate" and WORKDIR.value and not Path(WORKDIR.value, "config.json").is_file():
        raise ValueError(f"--workdir={WORKDIR.value}: no config.json there, so no run to test")
    given = [f"--{flag.name}" for flag in (LABEL_MAP, SPLIT) if flag.present]
    if given and not DATASET.value:
        raise app.UsageError(f"{given[0]} is of another data set: it needs --dataset=OTHER and --mode=evaluate")


if __name__ == "__main__":
    cli.run(main)
