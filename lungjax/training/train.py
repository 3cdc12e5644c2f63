"""A run from configuration to report: read this file first.

`run` opens the data, builds the network, resumes from the newest intact checkpoint, trains under `jit` over all devices
of all hosts, saves the best weights by a validation metric, tests them and writes the report. Everything random is a
function of `train.seed` and the step number, so a run that was killed and started again ends with exactly the weights
of an uninterrupted one.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from lungjax import config as configs
from lungjax import datasets, models
from lungjax.config import Config, metadata, overrides
from lungjax.data import folds, pipeline
from lungjax.data.prepared import Prepared
from lungjax.datasets import open_dataset, without_lungs
from lungjax.datasets.build import near_duplicates
from lungjax.evaluation import baselines, metrics, predict_split
from lungjax.evaluation.predictions import Predictions
from lungjax.explain import saliency
from lungjax.models import trees
from lungjax.models.outputs import positive_class
from lungjax.report import model_json
from lungjax.report import write as reporting
from lungjax.runtime import distributed, files, provenance, signals
from lungjax.runtime import mesh as meshes
from lungjax.runtime.checkpoint import Checkpoints, newest, restore_best
from lungjax.training import metrics_log, program, state
from lungjax.training import workdir as workdirs
from lungjax.training.early_stopping import Progress, check_monitor
from lungjax.training.program import Program
from lungjax.weights import load

MAX_REWINDS = 5  # with train.on_nan=rewind; more point to a real problem, not one bad batch
MAX_SKIPPED = 50  # consecutive steps that train.on_nan=skip skips before it gives up


@dataclass(frozen=True)
class Run:
    """The constants of a run; the training state and the progress change."""

    config: Config
    workdir: Path
    data: Prepared
    program: Program
    started: float  # time.time() at the start


class NonFiniteError(Exception):
    """The loss or gradient was not finite at `step`; `cause` names the batch, the message also says what to do."""

    def __init__(self, step: int, cause: str, advice: str):
        super().__init__(f"{cause}. {advice}")
        self.step, self.cause = step, cause


def run(config: Config, workdir: Path, data_dir: Path, mode: str = "train", weights_dir: Path | None = None) -> Path:
    """Trains or resumes, tests and reports. Returns the path of `report.md`.

    Args:
      config: checked here again, with the data set and the devices.
      workdir: created if missing; for config.json, checkpoints, metrics.jsonl, predictions, report and plots.
      data_dir: of the data sets that `lungjax.prepare` wrote.
      mode: "train", or "evaluate" to test the best weights of a finished or interrupted run again.
      weights_dir: searched first for files of `model.weights`.

    Raises ValueError for mistakes of the user, before training where possible, and `signals.Interrupted` after a
    SIGTERM or Ctrl-C, once the state is saved.
    """
    started = time.time()
    configs.check(config)
    run = distributed.run_on_all_hosts(lambda: set_up(load.resolve(config), workdir, data_dir, mode, started))
    distributed.check_same(
        {
            "the configuration": overrides.to_json(run.config),
            "lungjax's code": provenance.code(),
            "package versions": str(provenance.versions()),
            "the prepared data": run.data.fingerprint,
            "--mode": mode,
        }
    )
    with program.memory_advice(run.config, run.program.mesh.size):
        if mode == "train":
            train(run, weights_dir)
        # The only evaluation on the test split, with the best weights.
        variables, best_step = restore_best(workdir, run.program.abstract_state.variables)
        results = {split: predict(run, variables, run.data, split) for split in ("val", "test")}
        if (no_lungs := without_lungs(run.data, data_dir)) is not None:
            results["no_lungs"] = predict(run, variables, no_lungs, "test")
        if (source_only := baselines.source_only(run.data)) is not None:
            results["source_only"] = source_only
    facts = describe(run) | {"best_step": best_step, "seconds": round(time.time() - started, 1)}
    return write_report(run, results, facts, explainer(run, variables), datasets.describe(run.data, data_dir))


def set_up(config: Config, workdir: Path, data_dir: Path, mode: str, started: float) -> Run:
    """Opens the data and builds the program; raises ValueError if workdir, configuration and data are incompatible."""
    workdirs.check(workdir, config, mode)
    data = open_data(config, data_dir)
    workdirs.check_same_data(workdir, data)
    check_monitor(config, data)
    labels = data.columns["label"][pipeline.train_rows(data)]
    mesh = meshes.make_mesh(config.train.devices)
    return Run(config, workdir, data, program.build(config, data.classes, labels, mesh), started)


def open_data(config: Config, data_dir: Path) -> Prepared:
    """Returns the configured data set with its splits or folds. Raises ValueError if it is missing or unsuitable."""
    data = open_dataset(config.data.dataset, str(data_dir), config.data.protocol)
    near = near_duplicates.read(data, data_dir) if config.data.folds else np.zeros((0, 2), np.int64)
    return folds.apply(data, config, near)


def train(run: Run, weights_dir: Path | None) -> None:
    """Trains from the newest intact checkpoint, or from the start, to the last step or early stopping."""
    config, workdir, abstract_state = run.config, run.workdir, run.program.abstract_state
    # Read before anything is written, since the weights may be missing.
    fresh = distributed.broadcast_int(newest(workdir, "last") is None)
    start = distributed.run_on_all_hosts(lambda: initial_leaves(run, weights_dir)) if fresh else {}
    with (
        workdirs.lock_workdir(workdir, config, run.data, abstract_state),
        Checkpoints(workdir) as checkpoints,
        signals.watching(distributed.preempted()) as watch,
    ):
        checkpoint = checkpoints.restore(abstract_state)
        if checkpoint:
            current, progress = checkpoint[0], Progress(**checkpoint[1])
            print_line(f"Resuming from step {int(current.step)} of {run.program.steps} in {workdir}")
        else:
            current, progress = run.program.new_state(start), Progress()
            if config.train.on_nan == "rewind":  # needs a checkpoint to return to
                checkpoints.save(current, vars(progress))
        if int(current.step) < run.program.steps and not progress.stopped and distributed.is_first_host():
            workdirs.drop_reports(workdir)
        while True:
            try:
                return train_loop(run, checkpoints, current, progress, watch)
            except NonFiniteError as error:
                if config.train.on_nan != "rewind":
                    raise ValueError(str(error)) from None
                current, progress = rewind(checkpoints, abstract_state, progress, error)


def initial_leaves(run: Run, weights_dir: Path | None) -> dict[str, np.ndarray]:
    """Returns the pretrained leaves of step 0, and prints which leaves are random."""
    config, module = run.config, run.program.module
    leaves = load.leaves(config, module, weights_dir)
    if config.model.weights != "none":
        paths = models.leaf_shapes(module, (*config.input.size, config.input.network_channels))
        random = [path for path in paths if path not in leaves]
        print_line(f"Starting from {config.model.weights}; random: {shorten(random)}")
    return leaves


def train_loop(  # noqa: C901, PLR0912, PLR0915
    run: Run, checkpoints: Checkpoints, current: state.TrainState, progress: Progress, watch: signals.Watch
) -> None:
    """Trains from `current` to the last step, or until early stopping.

    Only states whose losses and gradients were finite are saved. Raises NonFiniteError and Interrupted, both with the
    last good state saved.
    """
    config, compiled, path = run.config, run.program, run.workdir / "metrics.jsonl"
    step = first = last_save = int(current.step)
    epoch_steps = len(pipeline.train_rows(run.data)) / config.train.batch_size
    if distributed.is_first_host():
        metrics_log.rewind(path, first)
    if config.train.on_nan != "skip":  # the run may have skipped steps under another setting
        current = current.replace(skipped=filled(current.skipped, 0))
    pending: list[Any] = []  # metrics of the steps since the last log line, still on the devices
    clock = time.perf_counter()

    def due(every: int) -> bool:
        return every > 0 and step > 0 and (step % every == 0 or step == compiled.steps)

    def log(row: dict[str, Any]) -> None:
        if distributed.is_first_host():
            metrics_log.append(path, {"step": step, "epoch": round(step / epoch_steps, 4), **row})

    def flush() -> None:
        """Waits for the devices, checks the pending steps and logs their mean metrics."""
        nonlocal pending, clock
        metrics_of_steps, pending = jax.device_get(pending), []
        rate = len(metrics_of_steps) * config.train.batch_size / (time.perf_counter() - clock)
        finite = check_finite(run, metrics_of_steps, step, progress)
        if finite:
            row = {f"train.{name}": float(np.mean([values[name] for values in finite])) for name in finite[0]}
            log({**row, "lr": float(compiled.schedule(step - 1)), "images_per_s": round(rate, 2)})
            bar.set_postfix_str(f"loss {row['train.loss']:.3f}, {rate:.0f} images/s")
        clock = time.perf_counter()

    with tqdm(
        total=compiled.steps, initial=first, unit="step", desc=config.name, disable=not distributed.is_first_host()
    ) as bar:
        try:
            batches = device_batches(run, first + progress.skipped_batches)
            while True:
                if due(compiled.eval_steps) and progress.last_validation < step:
                    scores = metrics.flat_levels(predict(run, current.variables, run.data, "val", watch))
                    better = progress.update(scores, config, step)
                    log({f"val.{name}": value for name, value in scores.items()})
                    print_line(
                        f"step {step}: val {config.train.monitor} {scores[config.train.monitor]:.4f}, "
                        f"accuracy {scores['slice.accuracy']:.4f}{', best so far' if better else ''}"
                    )
                    # The best weights are tested; with train.keep=last those are the newest.
                    checkpoints.save(current, vars(progress), best=better or config.train.keep == "last")
                    last_save, clock = step, time.perf_counter()
                elif due(config.train.save_steps) and last_save < step:
                    checkpoints.save(current, vars(progress))
                    last_save = step
                if progress.stopped:
                    print_line(f"No better {config.train.monitor} in {config.train.patience} validations: stopping")
                if progress.stopped or step == compiled.steps:
                    break
                if watch.should_stop(step):
                    if pending:
                        flush()
                    watch.check()
                current, values = compiled.train_step(current, next(batches))
                pending.append(values)
                step += 1
                bar.update()
                if step == first + 1:
                    jax.block_until_ready(values)
                    print_line(f"First step {time.time() - run.started:.1f} s after the start")
                if due(config.train.log_steps) or due(compiled.eval_steps) or due(config.train.save_steps):
                    flush()
            watch.check()  # for a signal during the last validation, whose state is saved
        except signals.Interrupted as stop:
            if last_save < step:
                checkpoints.save(current, vars(progress))
            checkpoints.wait()
            saved_note = "Checkpoint saved; rerun" if step else "Rerun"
            print_line(f"{stop} at step {step}. {saved_note} the same command to resume")
            raise
        except NonFiniteError as error:
            if last_save < error.step - 1 and config.train.on_nan == "stop":
                # The state has not changed since the step before.
                current = current.replace(step=filled(current.step, error.step - 1))
                checkpoints.save(current, vars(progress))
            raise


def filled(array: jax.Array, value: int) -> jax.Array:
    """Returns an array like `array`, with its sharding, that is `value` everywhere."""
    return jnp.full_like(array, value, device=array.sharding)


def check_finite(
    run: Run, metrics_of_steps: list[dict[str, Any]], last_step: int, progress: Progress
) -> list[dict[str, Any]]:
    """Returns the metrics of the finite ones among the steps up to `last_step`, without their flag.

    Raises NonFiniteError, naming the batch, for the first other one; with train.on_nan=skip after MAX_SKIPPED in a row.
    """
    for step, values in enumerate(metrics_of_steps, last_step - len(metrics_of_steps) + 1):
        progress.consecutive_bad_steps = 0 if values["finite"] else progress.consecutive_bad_steps + 1
        if values["finite"]:
            continue
        names = run.data.columns["file"][pipeline.batch_rows(run.data, run.config, step - 1 + progress.skipped_batches)]
        cause = (
            f"the loss is {values['loss']}, the gradient norm {values['grad_norm']} at step {step}; its batch: "
            f"{shorten(names)}"
        )
        if run.config.train.on_nan == "skip" and progress.consecutive_bad_steps < MAX_SKIPPED:
            print_line(f"Step skipped: {cause}")
            continue
        raise NonFiniteError(
            step,
            cause,
            f"The last good state is saved in {run.workdir}. Check these examples; a smaller optim.lr or "
            "optim.clip_norm=1 may help (in another --workdir), or --set=train.on_nan=skip or rewind in this one",
        )
    return [{k: v for k, v in values.items() if k != "finite"} for values in metrics_of_steps if values["finite"]]


def rewind(
    checkpoints: Checkpoints, abstract_state: state.TrainState, progress: Progress, error: NonFiniteError
) -> tuple[state.TrainState, Progress]:
    """Returns the last checkpoint, with the data moved past the bad batch. Raises ValueError after MAX_REWINDS."""
    if progress.rewinds == MAX_REWINDS:
        raise ValueError(f"{error}. The run was rewound {MAX_REWINDS} times already")
    checkpoint = checkpoints.restore(abstract_state)
    assert checkpoint is not None  # train.on_nan=rewind saves one at the start
    current, restored = checkpoint[0], Progress(**checkpoint[1])
    restored.rewinds = progress.rewinds + 1
    restored.skipped_batches = progress.skipped_batches + error.step - int(current.step)
    print_line(f"{error.cause}. Rewinding to step {int(current.step)}; continuing with the examples after that batch")
    return current, restored


def device_batches(run: Run, start: int) -> Iterator[dict[str, jax.Array]]:
    """Yields global batches from index `start` on, with `data.prefetch` further ones in transfer."""
    place = {"host": jax.process_index(), "hosts": jax.process_count()}
    batches = pipeline.train_batches(run.data, run.config, start=start, **place)
    ready = []
    try:
        for batch in batches:
            ready.append(meshes.to_devices(batch, run.program.mesh))
            if len(ready) > run.config.data.prefetch:
                yield ready.pop(0)
    finally:
        batches.close()  # stops its threads and processes


def predict(
    run: Run, variables: dict[str, Any], data: Prepared, split: str, watch: signals.Watch | None = None
) -> Predictions:
    """Returns predictions of a split; raises Interrupted between batches if `watch` received a signal."""
    compiled, check = run.program, watch.check if watch else lambda: None
    folded = compiled.network.fold(variables)
    return predict_split.predict(
        compiled.predict_step, folded, data, split, run.config, compiled.mesh, progress=watch is None, check=check
    )


def describe(run: Run) -> dict[str, Any]:
    """Returns the facts of a report about machine, software, data and network."""
    data = run.data
    labels = {split: data.columns["label"][data.rows(split)] for split in ("train", "val", "test")}
    return {
        **workdirs.data_facts(data),
        "counts": {
            split: dict(zip(data.classes, np.bincount(n, minlength=len(data.classes)).tolist(), strict=True))
            for split, n in labels.items()
        },
        "parameters": sum(x.size for x in trees.flatten(run.program.abstract_state.params).values()),
        "steps": run.program.steps,
        "compute_type": str(np.dtype(run.program.module.dtype)),
        **provenance.facts(),
    }


def explainer(run: Run, variables: dict[str, Any]) -> reporting.Explain | None:
    """Returns a function for Grad-CAM heat maps of images; None if no device holds all parameters."""
    if run.config.train.shard_params and run.program.mesh.size > 1:
        return None
    local = jax.tree.map(lambda leaf: leaf.addressable_data(0), variables)
    positive = positive_class(run.config, run.data.classes)
    explain = saliency.Explainer(run.program.module, local, run.config.input, positive, run.config.eval.batch_size)
    return lambda images, targets: explain.maps(images, targets)[0]


def write_report(
    run: Run,
    results: dict[str, Predictions],
    facts: dict[str, Any],
    explain: reporting.Explain | None,
    description: dict[str, Any],
) -> Path:
    """Writes predictions, report.json, .html and .md, the plots and model.json (first host only).

    `description` of the data set is that of `datasets.describe`.
    """

    def write() -> None:
        reader, rows = pipeline.Reader(run.data, run.config.input), run.data.rows("test")
        history = metrics_log.read(run.workdir / "metrics.jsonl")
        detector = model_json.fit_novelty(run.data)
        alarms = {} if detector is None else {"novelty": detector.false_alarms}
        report = reporting.write_report(
            run.workdir, run.config, results, history, facts | alarms, lambda i: reader(rows[i]), explain, **description
        )
        model = model_json.describe(run.config, run.data, results, report, detector, description)
        files.atomic_write(run.workdir / metadata.FILE, model.to_json())
        for warning in baselines.warnings(report):
            print_line(warning)

    distributed.on_first_host(write)
    return run.workdir / "report.md"


def shorten(names: Sequence[str], limit: int = 8) -> str:
    """Returns the first names with commas, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def print_line(line: str) -> None:
    """Prints a line above the progress bar, on the first host."""
    if distributed.is_first_host():
        tqdm.write(line)
