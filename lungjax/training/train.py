"""The run, from configuration to report: read this file first.

`run` opens the data, builds the network, goes on from the newest good checkpoint if there is one, trains under
`jit` over every device of every host, keeps the best weights by a validation metric, tests those and writes the
report. Everything random follows from `train.seed` and the step number, so a run killed anywhere and started again
ends with the very weights of the run that was left alone.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
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

MOST_REWINDS = 5  # of train.on_nan=rewind; a run that needs more has another problem than a bad batch
MOST_SKIPPED = 50  # steps in a row that train.on_nan=skip leaves out before it gives up


@dataclass(frozen=True)
class Run:
    """Everything fixed for one run; the state and the progress are what changes."""

    config: Config
    workdir: Path
    data: Prepared
    program: Program
    started: float  # time.time() at the start


class NotFinite(Exception):
    """A loss or gradient was no number at `step`; `what` says where, the message also what to do."""

    def __init__(self, step: int, what: str, advice: str):
        super().__init__(f"{what}. {advice}")
        self.step, self.what = step, what


def run(config: Config, workdir: Path, data_dir: Path, mode: str = "train", weights_dir: Path | None = None) -> Path:
    """Trains (or goes on), tests and reports. Returns the path of `report.md`.

    Args:
      config: checked here once more, with the data set and the devices at hand.
      workdir: made if missing; holds config.json, checkpoints, metrics.jsonl, predictions, report and plots.
      data_dir: where `lungjax.prepare` wrote the data sets.
      mode: "train", or "evaluate" to test the best weights of a finished or interrupted run again.
      weights_dir: where files of `model.weights` are looked for first.

    Raises ValueError for anything the user can put right, before training where possible, and
    `signals.Interrupted` once the state is saved if the process was asked to end.
    """
    started = time.time()
    configs.check(config)
    this = distributed.run_on_all_hosts(lambda: set_up(load.resolve(config), workdir, data_dir, mode, started))
    distributed.check_same(
        {
            "the configuration": overrides.to_json(this.config),
            "lungjax's code": provenance.code(),
            "package versions": str(provenance.versions()),
            "the prepared data": this.data.fingerprint,
            "--mode": mode,
        }
    )
    with program.memory_explained(this.config, this.program.mesh.size):
        if mode == "train":
            train(this, weights_dir)
        # The best weights meet the test split once, here.
        variables, best_step = restore_best(workdir, this.program.abstract_state.variables)
        results = {split: predict(this, variables, this.data, split) for split in ("val", "test")}
        dark = without_lungs(this.data, data_dir)
        if dark is not None:
            results["no_lungs"] = predict(this, variables, dark, "test")
        alone = baselines.source_only(this.data)
        if alone is not None:
            results["source_only"] = alone
    facts = describe(this) | {"best_step": best_step, "seconds": round(time.time() - started, 1)}
    return write_report(this, results, facts, explainer(this, variables), datasets.describe(this.data, data_dir))


def set_up(config: Config, workdir: Path, data_dir: Path, mode: str, started: float) -> Run:
    """Opens the data and builds what will be compiled; raises ValueError for what doesn't fit together."""
    workdirs.check(workdir, config, mode)
    data = open_data(config, data_dir)
    workdirs.check_same_data(workdir, data)
    check_monitor(config, data)
    labels = data.columns["label"][pipeline.train_rows(data)]
    mesh = meshes.make_mesh(config.train.devices)
    return Run(config, workdir, data, program.build(config, data.classes, labels, mesh), started)


def open_data(config: Config, data_dir: Path) -> Prepared:
    """Returns the run's data set with the splits that its configuration asks for; raises ValueError as its parts do."""
    data = open_dataset(config.data.dataset, str(data_dir), config.data.protocol)
    near = near_duplicates.read(data, data_dir) if config.data.folds else np.zeros((0, 2), np.int64)
    return folds.apply(data, config, near)


def train(this: Run, weights_dir: Path | None) -> None:
    """Trains from the newest good checkpoint, or from the start, until the last step or until patience ends."""
    compiled, workdir, config = this.program, this.workdir, this.config
    fresh = distributed.broadcast_int(newest(workdir, "last") is None)
    start = (
        distributed.run_on_all_hosts(lambda: first_leaves(this, weights_dir)) if fresh else {}
    )  # before anything is written
    mine = workdirs.lock_workdir(workdir, config, this.data, compiled.abstract_state)
    with mine, Checkpoints(workdir) as checkpoints, signals.watching(distributed.preempted()) as watch:
        found = checkpoints.restore(compiled.abstract_state)
        if found:
            current, progress = found[0], Progress.restored(found[1])
            tell(f"Going on from step {int(current.step)} of {compiled.steps} in {workdir}")
        else:
            current, progress = compiled.new_state(start), Progress()
            if config.train.on_nan == "rewind":  # there must be something to go back to
                checkpoints.save(current, progress.saved())
        if int(current.step) < compiled.steps and not progress.stopped and distributed.is_first_host():
            workdirs.drop_reports(workdir)
        while True:
            try:
                return train_loop(this, checkpoints, current, progress, watch)
            except NotFinite as bad:
                if config.train.on_nan != "rewind":
                    raise ValueError(str(bad)) from None
                current, progress = rewind(checkpoints, compiled.abstract_state, progress, bad)


def first_leaves(this: Run, weights_dir: Path | None) -> dict[str, np.ndarray]:
    """Returns what step 0 starts from other than random numbers, and says what that leaves at random."""
    config, module = this.config, this.program.module
    start = load.leaves(config, module, weights_dir)
    if config.model.weights != "none":
        paths = models.leaf_shapes(module, (*config.input.size, config.input.network_channels))
        fresh = [path for path in paths if path not in start]
        tell(f"Starts from {config.model.weights}; at random: {', '.join(fresh[:8])}{' ...' * (len(fresh) > 8)}")
    return start


def train_loop(  # noqa: C901, PLR0912, PLR0915
    this: Run, checkpoints: Checkpoints, current: state.TrainState, progress: Progress, watch: signals.Watch
) -> None:
    """Trains from `current` to the last step, or until validation has stopped getting better.

    Only a state that losses and gradients up to it speak for is saved. Raises NotFinite and Interrupted, both with
    the last good state saved.
    """
    config, compiled, path = this.config, this.program, this.workdir / "metrics.jsonl"
    done = first = saved = int(current.step)
    epoch_steps = len(pipeline.train_rows(this.data)) / config.train.batch_size
    if distributed.is_first_host():
        metrics_log.rewind(path, first)
    if config.train.on_nan != "skip":
        current = current.replace(skipped=current.skipped * 0)  # of a run that was told to skip before
    waiting: list[Any] = []  # metrics of the steps since the last log line, still on the devices
    clock = time.perf_counter()

    def due(every: int) -> bool:
        return every > 0 and done > 0 and (done % every == 0 or done == compiled.steps)

    def log(row: dict[str, Any]) -> None:
        if distributed.is_first_host():
            metrics_log.append(path, {"step": done, "epoch": round(done / epoch_steps, 4), **row})

    def catch_up() -> None:
        """Waits for the devices, checks the steps since the last time and logs their means."""
        nonlocal waiting, clock
        seen, waiting = jax.device_get(waiting), []
        rate = len(seen) * config.train.batch_size / (time.perf_counter() - clock)
        good = check_finite(this, seen, done, progress)
        if good:
            row = {f"train.{name}": float(np.mean([values[name] for values in good])) for name in good[0]}
            log({**row, "lr": float(compiled.schedule(done - 1)), "images_per_s": round(rate, 2)})
            bar.set_postfix_str(f"loss {row['train.loss']:.3f}, {rate:.0f} images/s")
        clock = time.perf_counter()

    with tqdm(
        total=compiled.steps, initial=first, unit="step", desc=config.name, disable=not distributed.is_first_host()
    ) as bar:
        try:
            batches = device_batches(this, first + progress.skipped_batches)
            while True:
                if due(compiled.eval_steps) and progress.validated < done:
                    scored = predict(this, current.variables, this.data, "val", watch)
                    scores = metrics.flat_levels(scored)
                    better = progress.update(scores, config, done)
                    log({f"val.{name}": value for name, value in scores.items()})
                    tell(
                        f"step {done}: val {config.train.monitor} {scores[config.train.monitor]:.4f}, "
                        f"accuracy {scores['slice.accuracy']:.4f}{', best so far' if better else ''}"
                    )
                    # What is tested lies with the best weights; with keep="last" that is the newest of them.
                    checkpoints.save(current, progress.saved(), best=better or config.train.keep == "last")
                    saved, clock = done, time.perf_counter()
                elif due(config.train.save_steps) and saved < done:
                    checkpoints.save(current, progress.saved())
                    saved = done
                if progress.stopped:
                    tell(f"No better {config.train.monitor} in {config.train.patience} validations: stopping")
                if progress.stopped or done == compiled.steps:
                    break
                if watch.asked(done):
                    if waiting:
                        catch_up()
                    watch.check()
                current, values = compiled.train_step(current, next(batches))
                waiting.append(values)
                done += 1
                bar.update()
                if done == first + 1:
                    jax.block_until_ready(values)
                    tell(f"First step {time.time() - this.started:.1f} s after the start")
                if due(config.train.log_steps) or due(compiled.eval_steps) or due(config.train.save_steps):
                    catch_up()
            watch.check()  # of a signal during the last validation; what it left is saved
        except signals.Interrupted as stop:
            if saved < done:
                checkpoints.save(current, progress.saved())
            checkpoints.wait()
            tell(f"{stop} at step {done}{', which is saved' * (done > 0)}; the same command goes on from there")
            raise
        except NotFinite as bad:
            if saved < bad.step - 1 and config.train.on_nan == "stop":  # the state has stood still since then
                step = current.step * 0 + bad.step - 1  # in the layout that it has
                checkpoints.save(current.replace(step=step), progress.saved())
            raise


def check_finite(this: Run, seen: list[dict[str, Any]], done: int, progress: Progress) -> list[dict[str, Any]]:
    """Returns the metrics of the steps up to `done` that were numbers, without their flag.

    Raises NotFinite for the first other one, naming its batch; with train.on_nan=skip for MOST_SKIPPED in a row.
    """
    config, before = this.config, done - len(seen)
    for step, values in enumerate(seen, before + 1):
        progress.consecutive_bad_steps = 0 if values["finite"] else progress.consecutive_bad_steps + 1
        if values["finite"]:
            continue
        rows = pipeline.batch_rows(this.data, config, step - 1 + progress.skipped_batches)
        names = this.data.columns["file"][rows]
        what = (
            f"the loss is {values['loss']}, the gradient's norm {values['grad_norm']} at step {step}; its batch: "
            f"{', '.join(names[:8])}{f' and {len(names) - 8} more' * (len(names) > 8)}"
        )
        if config.train.on_nan == "skip" and progress.consecutive_bad_steps < MOST_SKIPPED:
            tell(f"Left out: {what}")
            continue
        raise NotFinite(
            step,
            what,
            f"The last good state is kept in {this.workdir}. Look at these examples; a smaller optim.lr or "
            "optim.clip_norm=1 may help (in another --workdir), or --set=train.on_nan=skip or rewind in this one",
        )
    return [{k: v for k, v in values.items() if k != "finite"} for values in seen if values["finite"]]


def rewind(
    checkpoints: Checkpoints, like: state.TrainState, progress: Progress, bad: NotFinite
) -> tuple[state.TrainState, Progress]:
    """Returns the last checkpoint's state, with the data moved on past the bad batch. Raises ValueError if in vain."""
    if progress.rewinds == MOST_REWINDS:
        raise ValueError(f"{bad}. The run went back {MOST_REWINDS} times already")
    found = checkpoints.restore(like)
    assert found is not None  # there is one from the start with train.on_nan=rewind
    current, then = found[0], Progress.restored(found[1])
    then.rewinds = progress.rewinds + 1
    then.skipped_batches = progress.skipped_batches + bad.step - int(current.step)
    tell(f"{bad.what}. Going back to step {int(current.step)}, and on with the examples after that batch")
    return current, then


def device_batches(this: Run, start: int) -> Iterator[dict[str, jax.Array]]:
    """Yields global batches from number `start` on, `data.prefetch` further ones already on their way."""
    place = {"host": jax.process_index(), "hosts": jax.process_count()}
    batches = pipeline.train_batches(this.data, this.config, start=start, **place)
    ready = []
    try:
        for batch in batches:
            ready.append(meshes.to_devices(batch, this.program.mesh))
            if len(ready) > this.config.data.prefetch:
                yield ready.pop(0)
    finally:
        batches.close()  # ends its threads and processes


def predict(
    this: Run, variables: dict[str, Any], data: Prepared, split: str, watch: signals.Watch | None = None
) -> Predictions:
    """Returns predictions of a split; between batches `watch` may end it."""
    return predict_split.predict(
        this.program.predict_step,
        this.program.network.fold(variables),
        data,
        split,
        this.config,
        this.program.mesh,
        progress=watch is None,
        check=watch.check if watch else lambda: None,
    )


def describe(this: Run) -> dict[str, Any]:
    """Returns what the report says of machine, software, data and network."""
    data = this.data
    counts = {
        split: np.bincount(data.columns["label"][data.rows(split)], minlength=len(data.classes)).tolist()
        for split in ("train", "val", "test")
    }
    return {
        **workdirs.data_facts(data),
        "counts": {split: dict(zip(data.classes, n, strict=True)) for split, n in counts.items()},
        "parameters": sum(x.size for x in trees.flatten(this.program.abstract_state.params).values()),
        "steps": this.program.steps,
        "compute_type": str(np.dtype(this.program.module.dtype)),
        **provenance.facts(),
    }


def explainer(this: Run, variables: dict[str, Any]) -> reporting.Explain | None:
    """Returns what draws Grad-CAM heat maps of images for classes; None if no device holds the whole network."""
    if this.config.train.shard_params and this.program.mesh.size > 1:
        return None
    mine = jax.tree.map(lambda leaf: leaf.addressable_data(0), variables)
    positive = positive_class(this.config, this.data.classes)
    made = saliency.Explainer(this.program.module, mine, this.config.input, positive, this.config.eval.batch_size)
    return lambda images, targets: made.maps(images, targets)[0]


def write_report(
    this: Run, results: dict[str, Predictions], facts: dict[str, Any], explain: reporting.Explain | None, told: Any
) -> Path:
    """Writes predictions, report.json, .html and .md, the plots and model.json (first host only).

    `told` is of `datasets.describe`.
    """

    def write() -> None:
        reader, rows = pipeline.Reader(this.data, this.config.input), this.data.rows("test")
        history = metrics_log.read(this.workdir / "metrics.jsonl")
        known = model_json.look(this.data)
        found = facts | ({} if known is None else {"familiarity": known.false_alarms})
        said = reporting.write_report(
            this.workdir, this.config, results, history, found, lambda i: reader(rows[i]), explain, **told
        )
        described = model_json.describe(this.config, this.data, results, said, known, told)
        files.atomic_write(this.workdir / metadata.FILE, described.to_json())
        for line in baselines.warnings(said):
            tell(line)

    distributed.run_on_all_hosts(lambda: write() if distributed.is_first_host() else None)
    return this.workdir / "report.md"


def tell(line: str) -> None:
    """Prints a line above the progress bar, on the first host."""
    if distributed.is_first_host():
        tqdm.write(line)
