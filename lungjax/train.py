"""The run, from configuration to report: read this file first.

`run` opens the data, builds the network, goes on from the newest checkpoint if there is one, trains under
`jit` over every device, keeps the best weights by a validation metric, tests those and writes the report.
Everything random follows from `train.seed` and the step number, so a run killed anywhere and started again
ends with the very weights of the run that was left alone.
"""

import math
import platform
import time
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from lungjax import config as configs
from lungjax import evaluate, logs, models, optim, report, sharding, state, step, trees
from lungjax import workdir as workdirs
from lungjax.checkpoint import Checkpoints, newest, restore_best
from lungjax.config import Config
from lungjax.data import pipeline
from lungjax.data.prepared import Prepared
from lungjax.datasets import open_dataset, without_lungs
from lungjax.models import convolution
from lungjax.predictions import Predictions
from lungjax.weights import load


@dataclass(frozen=True)
class Run:
    """Everything fixed for one run; the state and the progress are what changes."""

    config: Config
    workdir: Path
    data: Prepared
    mesh: jax.sharding.Mesh
    schedule: Any  # step -> learning rate
    steps: int
    eval_steps: int
    module: Any
    new_state: Any  # leaves to start from -> TrainState
    train_step: Any  # jitted
    predict_step: Any  # jitted
    started: float  # time.time() at the start


def run(config: Config, workdir: Path, data_dir: Path, mode: str = "train", weights_dir: Path | None = None) -> Path:
    """Trains (or goes on), tests and reports. Returns the path of `report.md`.

    Args:
      config: checked here once more, with the data set and the devices at hand.
      workdir: made if missing; holds config.json, checkpoints, metrics.jsonl, predictions, report and plots.
      data_dir: where `lungjax.prepare` wrote the data sets.
      mode: "train", or "evaluate" to test the best weights of a finished or interrupted run again.
      weights_dir: where files of `model.weights` are looked for first.

    Raises ValueError for anything the user can put right, before training where possible.
    """
    started = time.time()
    configs.check(config)
    config = load.resolve(config)
    workdirs.check(workdir, config, mode)
    data = open_dataset(config.data.dataset, str(data_dir), config.data.protocol)
    workdirs.check_same_data(workdir, data)
    this = set_up(config, workdir, data, started)
    shapes = jax.eval_shape(this.new_state, {})
    everywhere = sharding.replicated(this.mesh)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), shapes)
    if mode == "train":
        fresh = newest(workdir, "last") is None
        start = first_leaves(this, weights_dir) if fresh else {}  # before anything is written
        if jax.process_index() == 0:
            workdirs.claim(workdir, config, data)
        with Checkpoints(workdir) as checkpoints:
            found = None if fresh else checkpoints.restore(like)
            if found:
                current, progress = found
                print(f"Going on from step {int(current.step)} of {this.steps} in {workdir}")
            else:
                current = jax.jit(this.new_state, out_shardings=everywhere)(start)
                progress = new_progress()
            train_loop(this, checkpoints, current, progress)
    # The best weights meet the test split once, here.
    variables, best_step = restore_best(workdir, like.variables)
    results = {
        split: evaluate.predict(this.predict_step, variables, data, split, config, this.mesh, progress=True)
        for split in ("val", "test")
    }
    dark = without_lungs(data, data_dir)
    if dark is not None:
        results["nolungs"] = evaluate.predict(
            this.predict_step, variables, dark, "test", config, this.mesh, progress=True
        )
    facts = describe(this, shapes.params)
    facts |= {"best_step": best_step, "seconds": round(time.time() - started, 1)}
    return write_report(this, results, facts)


def set_up(config: Config, workdir: Path, data: Prepared, started: float) -> Run:
    """Builds network, optimiser and compiled steps on shapes alone; raises ValueError for what doesn't fit."""
    mesh = sharding.make_mesh()
    micro = config.train.batch_size // config.train.accumulate
    sharding.check_batch(micro, mesh, "train.batch_size / train.accumulate")
    sharding.check_batch(config.eval.batch_size, mesh, "eval.batch_size")
    module = models.build(config.model, len(data.classes), remat=config.train.remat)
    smallest = models.minimum_size(config.model)
    if any(have < need for have, need in zip(config.input.size, smallest, strict=True)):
        raise ValueError(
            f"input.size={config.input.size} is too small for {config.model.name}: it takes {smallest} "
            "(height, width) or more"
        )
    check_monitor(config, data)
    positive = step.positive_class(config, data.classes)
    train_rows = pipeline.train_rows(data)
    steps, eval_steps = step_counts(config, len(train_rows))
    schedule = optim.make_schedule(config.optim, steps)
    image_shape = (*config.input.size, config.input.network_channels)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, *image_shape)), train=False))
    frozen = optim.frozen_paths(config.optim, shapes["params"])
    optimizer = optim.make_optimizer(config.optim, schedule, trees.split(shapes["params"], frozen)[0])
    weights = optim.class_weights(config.optim.class_weights, data.columns["label"][train_rows], data.classes)
    everywhere, cut = sharding.replicated(mesh), sharding.split_batch(mesh)
    return Run(
        config=config,
        workdir=workdir,
        data=data,
        mesh=mesh,
        schedule=schedule,
        steps=steps,
        eval_steps=eval_steps,
        module=module,
        new_state=partial(state.create, module, optimizer, image_shape, config.train.seed, frozen),
        train_step=jax.jit(
            step.make_train_step(module, optimizer, config, weights, positive, frozen),
            in_shardings=(everywhere, cut),
            out_shardings=everywhere,
            donate_argnums=0,
            compiler_options=convolution.compiler_options(),
        ),
        predict_step=jax.jit(
            step.make_predict_step(module, config, positive),
            in_shardings=(everywhere, cut),
            out_shardings=everywhere,
            compiler_options=convolution.compiler_options(),
        ),
        started=started,
    )


def first_leaves(this: Run, weights_dir: Path | None) -> dict[str, np.ndarray]:
    """Returns what step 0 starts from other than random numbers, and says what that leaves at random."""
    start = load.leaves(this.config, this.module, weights_dir)
    if this.config.model.weights != "none" and jax.process_index() == 0:
        paths = load.leaf_shapes(this.module, (*this.config.input.size, this.config.input.network_channels))
        fresh = [path for path in paths if path not in start]
        print(f"Starts from {this.config.model.weights}; at random: {', '.join(fresh[:8])}{' ...' * (len(fresh) > 8)}")
    return start


def train_loop(this: Run, checkpoints: Checkpoints, current: state.TrainState, progress: dict[str, Any]) -> None:
    """Trains from `current` to the last step, or until validation has stopped getting better."""
    config, first = this.config, int(current.step)
    main_host = jax.process_index() == 0
    log_path = this.workdir / "metrics.jsonl"
    epoch_steps = len(pipeline.train_rows(this.data)) / config.train.batch_size
    if main_host:
        logs.rewind(log_path, first)
    if first >= this.steps or progress["stopped"]:
        return

    def log(done: int, row: dict[str, Any]) -> None:
        if main_host:
            logs.append(log_path, {"step": done, "epoch": round(done / epoch_steps, 4), **row})

    batches = pipeline.train_batches(
        this.data, config, start_step=first, host=jax.process_index(), hosts=jax.process_count()
    )
    waiting: list[Any] = []  # metrics of the steps since the last log line, still on the devices
    ready = [next_batch(batches, this.mesh) for _ in range(config.data.prefetch)]
    clock = time.perf_counter()
    with tqdm(total=this.steps, initial=first, unit="step", desc=config.name, disable=not main_host) as bar:
        for done in range(first + 1, this.steps + 1):
            ready.append(next_batch(batches, this.mesh))
            current, values = this.train_step(current, ready.pop(0))
            waiting.append(values)
            bar.update()
            at_eval = done % this.eval_steps == 0 or done == this.steps
            if done == first + 1:
                jax.block_until_ready(values)
                tqdm.write(f"First step {time.time() - this.started:.1f} s after the start")
            if done % config.train.log_steps == 0 or at_eval:
                seen = {k: np.asarray([v[k] for v in jax.device_get(waiting)]) for k in values}
                check_finite(seen["loss"], done, checkpoints)
                rate = len(waiting) * config.train.batch_size / (time.perf_counter() - clock)
                row = {f"train.{k}": float(v.mean()) for k, v in seen.items()}
                log(done, {**row, "lr": float(this.schedule(done - 1)), "images_per_s": round(rate, 2)})
                bar.set_postfix_str(f"loss {row['train.loss']:.3f}, {rate:.0f} images/s")
                waiting, clock = [], time.perf_counter()
            if at_eval:
                scored = evaluate.predict(this.predict_step, current.variables, this.data, "val", config, this.mesh)
                scores = evaluate.flat_levels(scored)
                log(done, {f"val.{k}": v for k, v in scores.items()})
                better = judge(progress, scores, config, done)
                tqdm.write(
                    f"step {done}: val {config.train.monitor} {scores[config.train.monitor]:.4f}, "
                    f"accuracy {scores['slice.accuracy']:.4f}{', best so far' if better else ''}"
                )
                if better:
                    checkpoints.save_best(current)
            if at_eval or (config.train.save_steps and done % config.train.save_steps == 0):
                checkpoints.save(current, progress)
                clock = time.perf_counter()
            if progress["stopped"]:
                tqdm.write(f"No better {config.train.monitor} in {config.train.patience} validations: stopping")
                break


def next_batch(batches: Any, mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """Takes the next host batch and starts its way to the devices."""
    return sharding.to_devices(next(batches), mesh)


def step_counts(config: Config, examples: int) -> tuple[int, int]:
    """Returns the steps of the run and the steps between validations."""
    epoch = max(round(examples / config.train.batch_size), 1)
    steps = config.train.steps or max(round(config.train.epochs * examples / config.train.batch_size), 1)
    return steps, min(config.train.eval_steps or epoch, steps)


def new_progress() -> dict[str, Any]:
    """What early stopping remembers, saved with every checkpoint."""
    return {"best": math.nan, "best_step": 0, "waited": 0, "stopped": 0}


def judge(progress: dict[str, Any], scores: dict[str, float | None], config: Config, done: int) -> bool:
    """Compares a validation with the best so far, in place; returns whether it is better."""
    score = scores[config.train.monitor]
    if score is None:
        raise ValueError(
            f"train.monitor={config.train.monitor} is not defined on the val split (a class is missing there); "
            "choose another, such as slice.accuracy"
        )
    best = progress["best"]
    better = math.isnan(best) or (score > best if config.train.maximize else score < best)
    if better:
        progress |= {"best": float(score), "best_step": done, "waited": 0}
    else:
        progress["waited"] += 1
        if config.train.patience and progress["waited"] >= config.train.patience:
            progress["stopped"] = 1
    return better


def check_finite(losses: np.ndarray, done: int, checkpoints: Checkpoints) -> None:
    """Raises ValueError naming the first step whose loss is not a number."""
    bad = np.flatnonzero(~np.isfinite(losses))
    if len(bad):
        raise ValueError(
            f"the loss is {losses[bad[0]]} at step {done - len(losses) + 1 + int(bad[0])}; the checkpoints in "
            f"{checkpoints.folder} are from before. A smaller optim.lr or optim.clip_norm=1 may help; "
            "start in another --workdir"
        )


def check_monitor(config: Config, data: Prepared) -> None:
    """Raises ValueError before training if `train.monitor` is no validation metric."""
    n, classes = 2 * len(data.classes), len(data.classes)
    sample = Predictions(
        ids=np.arange(n).astype(str),
        groups=np.arange(n).astype(str),
        sources=np.full(n, ""),
        labels=np.arange(n) % classes,
        probabilities=np.full((n, classes), 1 / classes),
        classes=data.classes,
        extra={},
    )
    known = evaluate.flat_levels(sample)
    if config.train.monitor not in known:
        raise ValueError(f"train.monitor={config.train.monitor!r}: {configs.nearest(config.train.monitor, known)}")


def describe(this: Run, params: Any) -> dict[str, Any]:
    """Returns what the report says of machine, software, data and network."""
    data = this.data
    counts = {
        split: np.bincount(data.columns["label"][data.rows(split)], minlength=len(data.classes)).tolist()
        for split in ("train", "val", "test")
    }
    packages = (
        "lungjax",
        "jax",
        "jaxlib",
        "flax",
        "optax",
        "orbax-checkpoint",
        "grain",
        "tensorflow-datasets",
    )
    return {
        **workdirs.data_facts(data),
        "counts": {split: dict(zip(data.classes, n, strict=True)) for split, n in counts.items()},
        "parameters": sum(x.size for x in trees.flatten(params).values()),
        "steps": this.steps,
        "devices": [str(d) for d in jax.devices()],
        "hosts": jax.process_count(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in packages},
    }


def write_report(this: Run, results: dict[str, Predictions], facts: dict[str, Any]) -> Path:
    """Writes predictions, report.json, report.md and the plots (first host only)."""
    if jax.process_index() == 0:
        reader = pipeline.Reader(this.data, this.config.input)
        rows = this.data.rows("test")
        history = logs.read(this.workdir / "metrics.jsonl")
        report.write_report(this.workdir, this.config, results, history, facts, lambda i: reader(rows[i]))
    return this.workdir / "report.md"
