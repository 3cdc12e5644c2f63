"""Smoke test of every cell of every table, without data.

For each cell: the experiment is valid, its data set and classes are known, its weights are in the catalogue, network,
optimizer, schedule and loss fit together (shapes only), augmented images have the right size, the metric is defined.
For each distinct network with its head and frozen parameters: two training steps with finite losses and one prediction,
with random weights and the smallest possible images, without image stage, augmentation or class weights.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lungjax import config as configs
from lungjax import datasets, models
from lungjax.config import AugmentConfig, Config, experiments
from lungjax.data import augment
from lungjax.evaluation import bootstrap
from lungjax.evaluation.predictions import Predictions
from lungjax.models import trees
from lungjax.runtime import mesh as meshes
from lungjax.tables import cells
from lungjax.tables.cells import Cell, Table
from lungjax.training import optim, program
from lungjax.weights import load

LABELS = 64  # of a simulated train split
LEARNING_RATE = 1e-6  # of the two steps
BATCH = 8  # images per step; with fewer, batch norm over single cells makes deep networks diverge
UNKNOWN = ("a", "b")  # classes of a data set that are only known with its images (folder)


def run(tables: Mapping[str, Table], chosen: Mapping[str, Table], say: Callable[[str], None]) -> list[str]:
    """Tests every cell of the `chosen` among all `tables`; returns the failures, one line each.

    `say` is called with a line per row of each table, and a summary.
    """
    started, failures, tested = time.monotonic(), [], 0
    steps: dict[str, str] = {}  # the error of training a network, or "", by `distinct`
    for table in chosen.values():
        say(f"{table.name}: {table.title}")
        for row in table.rows:
            parameters: dict[int, None] = {}
            wrong, trained = [], 0
            for cell in (cell for cell in table.cells if cell.row == row):
                tested += 1
                where = f"{table.name}: {cell.row}, {cell.column}"
                try:
                    config, classes = check(cell)
                    parameters[shapes(config, classes)] = None
                    key = distinct(config, classes)
                    if key not in steps:
                        trained += 1
                        steps[key] = attempt(config, classes)
                    if steps[key]:
                        wrong.append(f"{where}: {cell.experiment}: training: {steps[key]}")
                except Exception as error:
                    wrong.append(f"{where}: {cell.experiment}: {_one_line(error)}")
            failures += wrong
            count = sum(cell.row == row for cell in table.cells)
            sizes = ", ".join(f"{n:,}" for n in parameters) or "?"
            state = f"{len(wrong)} FAILED" if wrong else "ok"
            new = f", {trained} trained" if trained else ""
            minutes = (time.monotonic() - started) / 60
            say(f"  {row}: {count} cell{'s' * (count != 1)} {state}; {sizes} parameters{new} [{minutes:.1f} min]")
            for line in wrong:
                say(f"    {line}")
        try:
            cells.experiments(table, tables)
        except ValueError as error:
            failures.append(str(error))
            say(f"    {error}")
    minutes = (time.monotonic() - started) / 60
    say(
        f"{tested} cells of {len(chosen)} tables, {len(steps)} distinct networks trained: {len(failures)} failures in "
        f"{minutes:.1f} minutes"
    )
    return failures


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


@lru_cache(maxsize=1024)
def complete(name: str) -> tuple[Config, tuple[str, ...]]:
    """Returns the configuration of an experiment with the requirements of its weights, and the classes of the data set.

    Weights of another run are replaced by random ones. Raises ValueError for a configuration that a run would reject.
    """
    config = experiments.load(name)
    configs.check(config)
    classes = datasets.classes(config.data.dataset) or UNKNOWN
    if config.model.weights.removeprefix("meanvar:").startswith("run:"):
        config = replace(config, model=replace(config.model, weights="none"))
    config = load.resolve(config)
    source = load.parse(config.model)
    if config.model.weights != "none" and source.record is None:
        raise ValueError(f"model.weights={config.model.weights} is not in the catalogue")
    return config, classes


def check(cell: Cell) -> tuple[Config, tuple[str, ...]]:
    """Returns the configuration and classes of a cell. Raises ValueError if it is invalid or its metric undefined."""
    config, classes = complete(cell.experiment)
    value = bootstrap.over_runs([_predictions(classes)], [cell.name], draws=2, seed=0, unit=cell.unit).get(cell.name)
    if value is None or None in value:
        names = sorted(bootstrap.intervals(_predictions(classes), draws=2))
        raise ValueError(f"metric {cell.metric!r}: {configs.nearest(cell.name, names)}")
    _augmented(config.augment, config.input)
    return config, classes


@lru_cache(maxsize=16)
def _predictions(classes: tuple[str, ...]) -> Predictions:
    """Returns random predictions in which every class occurs and is predicted."""
    labels = np.arange(6 * len(classes)) % len(classes)
    logits = np.random.default_rng(0).normal(size=(len(labels), len(classes))) + 1.5 * np.eye(len(classes))[labels]
    logits = logits.astype(np.float32)
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    ids = np.asarray([str(i) for i in range(len(labels))])
    return Predictions(ids, ids, np.full(len(ids), ""), labels, shares, classes, logits=logits)


@lru_cache(maxsize=256)
def _augmented(settings: AugmentConfig, spec: configs.InputSpec) -> None:
    """Raises ValueError if augmented images do not have the input size of the network."""
    height, width = (round(side * (1 + 2 * spec.box_margin)) for side in spec.size)
    image = jax.ShapeDtypeStruct((BATCH, height, width, spec.channels), jnp.uint8)
    place = jax.ShapeDtypeStruct((BATCH,), jnp.uint32)
    box = jax.ShapeDtypeStruct((BATCH, 4), jnp.float32) if spec.box_margin else None
    body = jax.ShapeDtypeStruct((BATCH, height, width), jnp.uint8) if settings.exterior else None
    images = jax.eval_shape(
        lambda *parts: augment.augment(parts[0], parts[1], jax.random.key(0), settings, spec.size, *parts[2:]),
        image, place, box, body,
    )  # fmt: skip
    if images.shape != (BATCH, *spec.size, spec.channels):
        raise ValueError(f"augmented images are {images.shape}, the input is {spec.size} with {spec.channels} channels")


def shapes(config: Config, classes: tuple[str, ...]) -> int:
    """Builds the program of an experiment from shapes only; returns its number of parameters."""
    optim.class_weights(config.optim.class_weights, np.arange(LABELS) % len(classes), classes)
    # Fields that do not change shapes are set to one value, so that cells share a cache entry.
    train = replace(config.train, seed=0, monitor="", patience=0, eval_steps=0, save_steps=0)
    optimizer = replace(config.optim, class_weights="none")
    return _shapes(Config(input=config.input, model=config.model, optim=optimizer, train=train), classes)


@lru_cache(maxsize=1024)
def _shapes(config: Config, classes: tuple[str, ...]) -> int:
    mesh = meshes.make_mesh(1)
    labels = np.arange(LABELS) % len(classes)
    params = program.build(config, classes, labels, mesh).abstract_state.params
    return sum(leaf.size for leaf in trees.flatten(params).values())


def smallest(config: Config) -> Config:
    """Returns a configuration for two steps on the smallest images, a small batch and random weights.

    Everything that changes the compiled program stays: network, head, norms, optimizer and frozen parameters.
    """
    size = models.minimum_size(config.model)
    # A small rate: the smallest images have feature maps of one cell, whose batch norm gradients can be huge.
    constant: dict[str, Any] = {"lr": LEARNING_RATE, "schedule": "constant", "warmup_steps": 0, "schedule_steps": 0}
    return Config(
        input=replace(config.input, size=size, crop="none", crop_size=(0, 0), box_margin=0.0),
        model=replace(config.model, weights="none"),
        optim=replace(config.optim, class_weights="none", **constant),
        train=configs.TrainConfig(batch_size=BATCH, steps=2),
    )


def distinct(config: Config, classes: tuple[str, ...]) -> str:
    """Returns a key that is equal for cells with the same network and frozen parameters."""
    small, channels = smallest(config), config.input.network_channels
    trained = (small.optim.tune, small.optim.freeze, small.optim.frozen_batch_norm)
    return repr((small.model, trained, small.input.size, channels, len(classes), small.model.head.positive_class))


def attempt(config: Config, classes: tuple[str, ...]) -> str:
    """Trains two steps and predicts once; returns the error, or ""."""
    small = smallest(config)
    try:
        labels = np.arange(LABELS) % len(classes)
        compiled = program.build(small, classes, labels, meshes.make_mesh(1))
        state = compiled.new_state(random_leaves(compiled.abstract_state.variables))
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (BATCH, *small.input.size, small.input.channels), dtype=np.uint8)
        label, place = np.arange(BATCH, dtype=np.int32) % len(classes), np.arange(BATCH, dtype=np.uint32)
        batch = {"image": images, "label": label, "place": place}
        for number in (1, 2):
            state, values = compiled.train_step(state, batch)
            if not bool(values["finite"]):
                return f"loss {values['loss']}, gradient {values['grad_norm']} at step {number}"
        row = {"image": images, "row": np.arange(BATCH, dtype=np.int32)}
        predicted = np.asarray(compiled.predict_step(compiled.network.fold(state.variables), row)["probabilities"])
        if predicted.shape != (BATCH, len(classes)) or not np.allclose(predicted.sum(axis=1), 1, atol=1e-3):
            return f"predictions of shape {predicted.shape} with sums {predicted.sum(axis=1)}"
    except Exception as error:
        return _one_line(error)
    return ""


def random_leaves(like: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns initial values by path: He normal for kernels, 1 for scales and variances, else 0.

    In NumPy, because compiling the initialization of a deep network takes as long as compiling its step.
    """
    rng, leaves = np.random.default_rng(0), {}
    for tree in like.values():
        for path, leaf in trees.flatten(tree).items():
            if len(leaf.shape) > 1:
                wide = np.sqrt(2 / np.prod(leaf.shape[:-1]))
                leaves[path] = (wide * rng.standard_normal(leaf.shape, np.float32)).astype(leaf.dtype)
            else:
                one = path.rpartition("/")[2] in ("scale", "var", "layer_scale")
                leaves[path] = np.full(leaf.shape, float(one), leaf.dtype)
    return leaves
