"""A run from configuration to report: read this file first, then `step.py`.

`run` opens the data, builds the program, restores the newest intact checkpoint, trains under `jit` over all devices of
all hosts, tests the best weights and writes the report. Everything random is a function of `train.seed` and the step
number, so a run that was killed and started again ends with exactly the weights of an uninterrupted one.
"""

import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lungjax import config as configs
from lungjax.config import Config, overrides
from lungjax.datasets import without_lungs
from lungjax.evaluation import baselines, metrics
from lungjax.runtime import distributed, provenance, signals
from lungjax.runtime.checkpoint import Checkpoints, newest, restore_best
from lungjax.runtime.distributed import print_once
from lungjax.runtime.profiler import Profiler
from lungjax.training import final_report, non_finite, program, setup
from lungjax.training import workdir as workdirs
from lungjax.training.early_stopping import Progress
from lungjax.training.metrics_log import MetricsLog
from lungjax.training.setup import Run
from lungjax.training.state import TrainState
from lungjax.weights import load


def run(
    config: Config,
    workdir: Path,
    data_dir: Path,
    mode: str = "train",
    weights_dir: Path | None = None,
    profile: tuple[int, int] | None = None,
) -> Path:
    """Trains or resumes, tests and reports. Returns the path of `report.md`.

    Args:
      config: checked here again, with the data set and the devices.
      workdir: created if missing; for config.json, checkpoints, metrics.jsonl, predictions, report and plots.
      data_dir: of the data sets that `lungjax.prepare` wrote.
      mode: "train", or "evaluate" to test the best weights of a finished or interrupted run again.
      weights_dir: searched first for files of `model.weights`.
      profile: first and last step of a `jax.profiler` trace in WORKDIR/profile.

    Raises ValueError for mistakes of the user, before training where possible, and `signals.Interrupted` after a
    SIGTERM or Ctrl-C, once the state is saved.
    """
    started = time.time()
    configs.check(config)

    # ---- Data and program; nothing is written, so a mistake leaves no trace
    run = distributed.run_on_all_hosts(lambda: setup.set_up(load.resolve(config), workdir, data_dir, mode, started))
    distributed.check_same(
        {
            "the configuration": overrides.to_json(run.config),
            "lungjax's code": provenance.code(),
            "package versions": str(provenance.versions()),
            "the prepared data": run.data.fingerprint,
            "--mode": mode,
        }
    )
    print_once(setup.summary(run))

    with program.memory_advice(run.config, run.program.mesh.size):
        # ---- Restore and train
        if mode == "train":
            train(run, weights_dir, profile)

        # ---- Test: the only evaluation on the test split, with the best weights
        variables, best_step = restore_best(workdir, run.program.abstract_state.variables)
        results = {split: run.predict(variables, split) for split in ("val", "test")}
        if (no_lungs := without_lungs(run.data, data_dir)) is not None:
            results["no_lungs"] = run.predict(variables, "test", no_lungs)
        if (source_only := baselines.source_only(run.data)) is not None:
            results["source_only"] = source_only

    # ---- Report
    facts = {"best_step": best_step, "seconds": round(time.time() - started, 1)}
    return final_report.write(run, results, variables, facts, data_dir)


def train(run: Run, weights_dir: Path | None, profile: tuple[int, int] | None = None) -> None:
    """Trains from the newest intact checkpoint, or from the start, to the last step or early stopping.

    The order of a resume, so that the end is that of an uninterrupted run and an error changes nothing:

    1. Without a checkpoint, the pretrained weights are read, since they may be missing.
    2. The workdir is locked; config.json and data.json are compared or written.
    3. The newest intact checkpoint gives the state and the progress; damaged ones are set aside.
    4. Without one, the state comes from the seed and the pretrained weights.
    5. Reports of earlier weights are deleted, if steps are left.
    6. metrics.jsonl is cut back to the step of the state.
    7. Batches continue at index step + skipped_batches; the keys of dropout and augmentation derive from the seed.
    """
    config, abstract_state = run.config, run.program.abstract_state
    pretrained: dict[str, Any] = {}
    if distributed.broadcast_int(newest(run.workdir, "last") is None):  # 1
        pretrained, random = distributed.run_on_all_hosts(lambda: setup.pretrained_leaves(run, weights_dir))
        if config.model.weights != "none":
            print_once(f"Starting from {config.model.weights}; random: {setup.shorten(random)}")
    with (
        workdirs.lock_workdir(run.workdir, config, run.data, abstract_state),  # 2
        Checkpoints(run.workdir) as checkpoints,
        signals.watching(distributed.preempted()) as watch,
    ):
        checkpoint = checkpoints.restore(abstract_state)
        if checkpoint:  # 3
            state, progress = checkpoint[0], Progress(**checkpoint[1])
            print_once(f"Resuming from step {int(state.step)} of {run.program.steps}")
        else:  # 4
            state, progress = run.program.new_state(pretrained), Progress()
            if config.train.on_nan == "rewind":  # needs a checkpoint to return to
                checkpoints.save(state, vars(progress))
        if int(state.step) < run.program.steps and not progress.stopped and distributed.is_first_host():  # 5
            workdirs.drop_reports(run.workdir)
        with Profiler(run.workdir / "profile", profile) as profiler:
            while True:
                try:
                    return train_loop(run, checkpoints, state, progress, watch, profiler)
                except non_finite.NonFiniteError as error:
                    if config.train.on_nan != "rewind":
                        raise
                    state, progress = non_finite.rewind(checkpoints, abstract_state, progress, error)


def train_loop(
    run: Run, checkpoints: Checkpoints, state: TrainState, progress: Progress, watch: signals.Watch, profiler: Profiler
) -> None:
    """Trains from `state` to the last step, or until early stopping.

    Only states whose losses and gradients were finite are saved. Raises NonFiniteError and Interrupted, both with the
    last good state saved.
    """
    config, built = run.config, run.program
    step = last_save = int(state.step)
    if config.train.on_nan != "skip":  # the run may have skipped steps under another setting
        state = state.replace(skipped=filled(state.skipped, 0))

    def due(every: int) -> bool:
        return every > 0 and step > 0 and (step % every == 0 or step == built.steps)

    def save(best: bool = False) -> int:
        checkpoints.save(state, vars(progress), best)
        return step

    with MetricsLog(run, step) as log:  # 6
        try:
            batches = run.batches(step + progress.skipped_batches)  # 7
            while True:
                # ---- Validate and save
                if due(built.eval_steps) and progress.last_validation < step:
                    better = validate(run, state, step, progress, log, watch)
                    # The best weights are tested; with train.keep=last those are the newest.
                    last_save = save(best=better or config.train.keep == "last")
                    log.reset_clock()
                elif due(config.train.save_steps) and last_save < step:
                    last_save = save()

                # ---- Stop
                if progress.stopped or step == built.steps:
                    watch.check()  # for a signal during the last validation, whose state is saved
                    return
                if watch.should_stop(step):
                    write_steps(run, log, step, progress)
                    watch.check()

                # ---- Train; the host runs ahead of the devices
                profiler.before_step(step + 1)
                state, step_metrics = built.train_step(state, next(batches))
                step += 1
                log.add(step_metrics)
                profiler.after_step(step, step_metrics)

                # ---- Log; the host waits for the devices
                if due(config.train.log_steps) or due(built.eval_steps) or due(config.train.save_steps):
                    write_steps(run, log, step, progress)
        except signals.Interrupted as stop:
            if last_save < step:
                save()
            checkpoints.wait()
            saved_note = "Checkpoint saved; rerun" if step else "Rerun"
            print_once(f"{stop} at step {step}. {saved_note} the same command to resume")
            raise
        except non_finite.NonFiniteError as error:
            if last_save < error.step - 1 and config.train.on_nan == "stop":
                # The state has not changed since the step before.
                state = state.replace(step=filled(state.step, error.step - 1))
                save()
            raise


def validate(run: Run, state: TrainState, step: int, progress: Progress, log: MetricsLog, watch: signals.Watch) -> bool:
    """Scores the val split, writes the scores and updates the progress; returns whether they are the best so far."""
    monitor = run.config.train.monitor
    scores = metrics.flat_levels(run.predict(state.variables, "val", watch=watch))
    better = progress.update(scores, run.config, step)
    log.write(step, {f"val.{name}": value for name, value in scores.items()})
    print_once(
        f"step {step}: val {monitor} {scores[monitor]:.4f}, accuracy {scores['slice.accuracy']:.4f}"
        f"{', best so far' if better else ''}"
    )
    if progress.stopped:
        print_once(f"No better {monitor} in {run.config.train.patience} validations: stopping")
    return better


def write_steps(run: Run, log: MetricsLog, step: int, progress: Progress) -> None:
    """Writes the metrics of the steps since the last row. Raises NonFiniteError as `non_finite.finite_steps`."""
    rows = log.fetch()
    finite = non_finite.finite_steps(
        run.config.train.on_nan, rows, step, progress, lambda s: run.batch_names(s - 1 + progress.skipped_batches)
    )
    log.write_steps(step, finite, len(rows))


def filled(array: jax.Array, value: int) -> jax.Array:
    """Returns an array like `array`, with its sharding, that is `value` everywhere."""
    return jnp.full_like(array, value, device=array.sharding)
