"""A run from configuration to report. Read this file first, then `step.py`.

All randomness is a function of `train.seed`, the step and the position in the data, so a run that is killed and
restarted ends with exactly the weights of an uninterrupted one.
"""

import time
from contextlib import ExitStack, closing
from pathlib import Path

import jax
import numpy as np

from lungjax import config as configs
from lungjax import models
from lungjax.config import Config, overrides
from lungjax.data import pipeline
from lungjax.datasets import without_lungs
from lungjax.evaluation import baselines, metrics
from lungjax.report.templating import listed
from lungjax.runtime import distributed, environment, provenance, signals
from lungjax.runtime.checkpoint import Checkpoints, newest, restore_best
from lungjax.runtime.distributed import print_once
from lungjax.runtime.profiler import Profiler
from lungjax.training import final_report, non_finite, program, setup
from lungjax.training import workdir as workdirs
from lungjax.training.metrics_log import MetricsLog
from lungjax.training.non_finite import NonFiniteError
from lungjax.training.progress import Progress
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
    """Trains or resumes, tests and reports; returns the path of `report.md`.

    `data_dir` has the prepared data sets; `weights_dir` is searched first for `model.weights`. `mode` is "train", or
    "evaluate" to test the best weights again. `profile` has the first and last step of a trace in WORKDIR/profile.

    Raises ValueError for user errors, and `signals.Interrupted` after SIGTERM or Ctrl-C, once the state is saved.
    """
    started = time.time()
    configs.check(config)

    # ---- Data and program; user errors are raised before anything is written
    run = distributed.run_on_all_hosts(lambda: setup.set_up(config, workdir, data_dir, mode, started, weights_dir))
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

    Changes nothing before it has the lock. With more steps or patience than before, a finished run continues.
    """
    config, abstract_state = run.config, run.program.abstract_state
    policy, pretrained = config.train.on_nan, dict[str, np.ndarray]()
    if distributed.broadcast_int(newest(run.workdir, "last") is None):
        pretrained = distributed.run_on_all_hosts(lambda: load.leaves(config, run.program.module, weights_dir))
        if config.model.weights != "none":
            paths = models.leaf_shapes(run.program.module, (*config.input.size, config.input.network_channels))
            random = [path for path in paths if path not in pretrained]
            print_once(f"Starting from {config.model.weights}; randomly initialized: {listed(random)}")
    with (
        workdirs.lock_workdir(run.workdir, config, run.data, abstract_state),
        Checkpoints(run.workdir) as checkpoints,
        signals.watching(distributed.preempted()) as watch,
        Profiler(run.workdir / "profile", profile) as profiler,
    ):
        checkpoint = checkpoints.restore(abstract_state)
        if checkpoint:
            state, progress = checkpoint[0], Progress(**checkpoint[1])
            progress.update_stop(config)
            print_once(f"Resuming from step {int(state.step)} of {run.program.steps}")
            if progress.stopped:
                print_once("The run has stopped early; raise train.patience to continue")
        else:
            state, progress = run.program.new_state(pretrained), Progress()
            if policy == "rewind":  # needs a checkpoint to return to
                checkpoints.save(state, vars(progress))
        if progress.last_validation < run.program.steps and not progress.stopped and distributed.is_first_host():
            workdirs.drop_reports(run.workdir)
        while True:
            if policy != "skip":  # bad steps would disable all later ones
                state = non_finite.with_counters(state, bad_steps=0)
            error = train_loop(run, checkpoints, state, progress, watch, profiler)
            if error is None:
                return
            if policy != "rewind":
                raise error
            state, progress = non_finite.rewind(checkpoints, abstract_state, progress, error)


def train_loop(
    run: Run, checkpoints: Checkpoints, state: TrainState, progress: Progress, watch: signals.Watch, profiler: Profiler
) -> NonFiniteError | None:
    """Trains from `state` to the last step or early stopping; returns an error if a loss or gradient is not finite.

    Only finite states are saved. Raises Interrupted after a signal, once the state is saved.
    """
    config, built = run.config.train, run.program
    on_cpu = built.mesh.devices.flat[0].platform == "cpu"
    first = step = int(state.step)

    def due(every: int) -> bool:
        return every > 0 and step > 0 and (step % every == 0 or step == built.steps)

    with (
        MetricsLog(run, step, progress.last_validation) as log,
        closing(run.batches(step + progress.skipped_batches)) as batches,
        ExitStack() as stack,
    ):
        try:
            while True:
                # ---- Validate and save; first, since a resumed run may still have to validate its last step
                if due(built.eval_steps) and progress.last_validation < step:
                    better = validate(run, state, step, progress, log, watch)
                    checkpoints.save(state, vars(progress), best=better or config.keep == "last")
                    log.reset_clock()
                elif due(config.save_steps) and checkpoints.last_step < step:
                    checkpoints.save(state, vars(progress))
                    log.reset_clock()

                # ---- Stop
                if progress.stopped or step >= built.steps:
                    watch.check()  # for a signal during the last validation
                    return None
                interrupted = watch.should_stop(step)

                # ---- Train; the host runs ahead of GPUs and TPUs. On a CPU this would allocate the memory of the next
                # step during this one, and make both slower.
                if not interrupted:
                    state, step_metrics = profiler.call(step + 1, built.train_step, state, next(batches))
                    if on_cpu:
                        jax.block_until_ready(step_metrics)
                    if step == first:
                        stack.enter_context(environment.trimming())  # without the memory of the compiler
                    step += 1
                    log.add(step_metrics)

                # ---- Log and check; the host waits for the devices
                if interrupted or due(config.log_steps) or due(built.eval_steps) or due(config.save_steps):
                    error = write_steps(run, log, step, progress)
                    if error:
                        if config.on_nan == "stop" and checkpoints.last_step < error.step - 1:
                            before = non_finite.with_counters(state, step=error.step - 1)
                            checkpoints.save(before, vars(progress))
                        return error
                if interrupted:
                    watch.check()  # raises Interrupted
        except signals.Interrupted as stop:
            if checkpoints.last_step < step:
                checkpoints.save(state, vars(progress))
            checkpoints.wait()
            saved_note = "Checkpoint saved; rerun" if step else "Rerun"
            print_once(f"{stop} at step {step}. {saved_note} the same command to resume")
            raise


def validate(run: Run, state: TrainState, step: int, progress: Progress, log: MetricsLog, watch: signals.Watch) -> bool:
    """Scores the val split, logs the scores and updates the progress; returns whether they are the best so far."""
    monitor = run.config.train.monitor
    scores = metrics.flat_levels(run.predict(state.variables, "val", watch=watch))
    better = progress.update(scores, run.config, step)
    log.write(step, {f"val.{name}": value for name, value in scores.items()})
    note = ", best so far" if better else ""
    print_once(f"step {step}: val {monitor} {scores[monitor]:.4f}, accuracy {scores['slice.accuracy']:.4f}{note}")
    if progress.stopped:
        print_once(f"No better {monitor} in {run.config.train.patience} validations: stopping")
    return better


def write_steps(run: Run, log: MetricsLog, step: int, progress: Progress) -> NonFiniteError | None:
    """Logs the mean metrics of the steps since the last row; returns the error of `non_finite.check_steps`."""

    def names(step: int) -> str:
        rows = pipeline.batch_rows(run.data, run.config, step - 1 + progress.skipped_batches)
        return listed(run.data.columns["file"][rows])

    finite, error = non_finite.check_steps(run.config.train.on_nan, log.fetch(), step, progress, names)
    log.write_steps(error.step - 1 if error else step, finite)
    return error
