"""Trains and tests one experiment: python -m lungjax.main --experiment=phantom_demo"""

import json
from pathlib import Path

from absl import app, flags

from lungjax import cli
from lungjax import config as configs
from lungjax.config import experiments, overrides
from lungjax.runtime import environment

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_string("experiment", None, "Experiment: NAME, NAME:key=value,..., a .py file, or a run's config.json.")
    flags.DEFINE_multi_string("set", [], "Override a field, such as optim.lr=3e-4; repeatable.")
    flags.DEFINE_string("workdir", None, "Run folder; default ./runs/NAME, or that of config.json in --mode=evaluate.")
    runs = cli.MODEL_HELP.format("Runs to test as an ensemble, with --mode=evaluate and a new --workdir")
    flags.DEFINE_list("model", [], runs)
    flags.DEFINE_string("data_dir", "data", "Folder of the prepared data sets.")
    flags.DEFINE_string("weights_dir", None, "Folder of downloaded weight files, searched first.")
    flags.DEFINE_enum("mode", "train", ["train", "evaluate"], "Train and test, or only test again.")
    folds = "Cross-validation, one run per fold and a combined report: a number of folds, or source to leave out each."
    flags.DEFINE_string("folds", None, folds)
    flags.DEFINE_string("dataset", None, "Another prepared data set to test on, with --mode=evaluate.")
    flags.DEFINE_string("label_map", "", "Classes of --dataset, as THEIRS=OURS+OURS,THEIRS=-; - ignores a class.")
    flags.DEFINE_enum("split", "test", ["test", "val", "train", "all"], "Split of --dataset to test on.")
    shared = "Action for patients of --dataset that are in train or val of the run: drop excludes them."
    flags.DEFINE_enum("overlap", "refuse", ["refuse", "drop"], shared)
    flags.DEFINE_bool("multihost", False, "Run on several hosts; start the same command on each of them.")
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, if no cluster is detected.")
    flags.DEFINE_integer("processes", None, "Number of processes, with --coordinator.")
    flags.DEFINE_integer("process", None, "Index of this process from 0, with --coordinator.")
    flags.DEFINE_string("compile_for", None, "Only compile the step for a TPU slice such as v5e:4x4; needs no TPU.")
    flags.DEFINE_string("profile", None, "Steps START:STOP to trace with jax.profiler, into WORKDIR/profile.")
    flags.DEFINE_bool("list", False, "List the experiments and exit.")


def main(_: list[str]) -> None:
    """Loads the experiment, applies the overrides, runs it, and prints the test scores and the path of the report."""
    if FLAGS.list:
        print(experiments.listing())
        return
    check_flags()
    runs: list[Path] = []
    if FLAGS.model:
        from lungjax.inference import ensembles  # here, since it imports numpy

        runs = ensembles.find(FLAGS.model)
    run = runs[0] if runs else FLAGS.workdir
    saved = f"{run}/config.json" if FLAGS.mode == "evaluate" and run else ""
    experiment = FLAGS.experiment or saved
    if not experiment:
        raise app.UsageError("--experiment=NAME is missing; --list shows the names")
    config = experiments.load(experiment)
    for assignment in FLAGS.set:
        config = overrides.override(config, assignment)
    configs.check(config)
    profile = read_steps(FLAGS.profile) if FLAGS.profile else None
    default = Path("runs") / (config.name + (f"_{FLAGS.folds}_folds" if FLAGS.folds is not None else ""))
    if FLAGS.mode == "evaluate" and experiment.endswith("config.json"):
        default = Path(experiment).parent
    workdir = Path(FLAGS.workdir) if FLAGS.workdir else default
    if FLAGS.compile_for:
        environment.without_tpu()
        environment.prepare_jax()
        from lungjax.training import aot_compile

        print(aot_compile.compile_for(config, FLAGS.compile_for, Path(FLAGS.data_dir)))
        return
    environment.prepare_jax()
    from lungjax.report import context  # here, after the flags, since they import jax
    from lungjax.runtime import distributed
    from lungjax.training import cross_validation, ensemble_test, external_test, train

    address = (FLAGS.coordinator, FLAGS.processes, FLAGS.process)
    if FLAGS.multihost or any(part is not None for part in address):
        distributed.start(*address)
    weights_dir = Path(FLAGS.weights_dir).expanduser() if FLAGS.weights_dir else None
    data_dir = Path(FLAGS.data_dir)
    with distributed.abort_all_on_error():
        options = (FLAGS.dataset, FLAGS.label_map, FLAGS.split, FLAGS.overlap == "drop") if FLAGS.dataset else ()
        if runs:
            report = ensemble_test.evaluate(config, runs, workdir, data_dir, *options)
        elif options:
            report = external_test.evaluate(config, workdir, data_dir, *options)
        elif FLAGS.folds is not None:
            kind = FLAGS.folds if FLAGS.folds == "source" else int(FLAGS.folds)
            report = cross_validation.run(config, kind, workdir, data_dir, FLAGS.mode, weights_dir)
        else:
            report = train.run(config, workdir, data_dir, FLAGS.mode, weights_dir, profile)
    if distributed.is_first_host():
        print(f"Test scores{', 95 % intervals in parentheses' if config.eval.draws else ''}:")
        for where, scores in context.headline(json.loads(report.with_suffix(".json").read_text("utf-8"))).items():
            print(f"  {where}: " + "; ".join(f"{name} {score}" for name, score in scores.items()))
        print(f"Report: {report.with_suffix('.html')}")


def read_steps(text: str) -> tuple[int, int]:
    """Returns the first and last step of "START:STOP". Raises UsageError for anything else."""
    start, _, stop = text.partition(":")
    if not (start.isdecimal() and stop.isdecimal() and 1 <= int(start) <= int(stop)):
        raise app.UsageError(f"--profile={text}: expected START:STOP with 1 <= START <= STOP, such as 10:20")
    return int(start), int(stop)


def check_flags() -> None:
    """Raises UsageError for incompatible flags."""
    if FLAGS.dataset and (FLAGS.mode != "evaluate" or FLAGS.folds is not None):
        raise app.UsageError("--dataset=OTHER tests an existing run: it needs --mode=evaluate, without --folds")
    if FLAGS.model:
        if FLAGS.mode != "evaluate" or not FLAGS.workdir or FLAGS.experiment or FLAGS.folds is not None:
            reason = "it needs --mode=evaluate and a new --workdir, without --experiment and --folds"
            raise app.UsageError(f"--model=RUN,RUN tests an ensemble of finished runs: {reason}")
        for field in FLAGS.set:
            if not field.startswith("eval.") or field.startswith("eval.tta"):
                advice = "first test each run with --mode=evaluate --workdir=RUN --set=..."
                raise app.UsageError(f"--set={field} changes the members of the ensemble: {advice}")
    elif FLAGS.mode == "evaluate" and FLAGS.workdir and not Path(FLAGS.workdir, "config.json").is_file():
        raise ValueError(f"--workdir={FLAGS.workdir}: no config.json, so there is no run to test")
    if FLAGS.profile and (FLAGS.mode != "train" or FLAGS.folds is not None):
        raise app.UsageError("--profile traces the training of one run: it needs --mode=train, without --folds")
    if FLAGS.folds is not None and FLAGS.folds != "source" and not FLAGS.folds.isdecimal():
        raise app.UsageError(
            f"--folds={FLAGS.folds}: expected a number such as 5, or source to leave out each source once"
        )
    for name in ("label_map", "split", "overlap"):
        if FLAGS[name].present and not FLAGS.dataset:
            raise app.UsageError(f"--{name} applies to another data set: it needs --dataset=OTHER and --mode=evaluate")


if __name__ == "__main__":
    cli.run(main, define_flags, resumable=True)
