"""Smoke test of every cell of every table, without data.

Each cell must have a valid experiment, known data set, classes and weights, compatible shapes of network, optimizer and
loss, augmented images of the right size, and a defined metric. Each distinct combination of network, head and frozen
parameters makes two Adam steps with finite losses and one prediction, from random weights on the smallest images.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

from lungjax import config as configs
from lungjax import datasets, models
from lungjax.config import AugmentConfig, Config, experiments
from lungjax.data import augment
from lungjax.evaluation import metrics
from lungjax.evaluation.predictions import Predictions
from lungjax.models import trees
from lungjax.report.templating import count
from lungjax.runtime import mesh as meshes
from lungjax.tables import cells
from lungjax.tables.cells import Cell, Table
from lungjax.training import optim, program
from lungjax.weights import load

LABELS = 64  # of a simulated train split
BATCH = 8  # images per step; with fewer, batch norm over single cells makes deep networks diverge


def run(tables: Mapping[str, Table], chosen: Mapping[str, Table], say: Callable[[str], None]) -> list[str]:
    """Tests every cell of the `chosen` among all `tables` and reports to `say`; returns one line per failure."""
    started, tested = time.monotonic(), 0
    failures: list[str] = []
    train_and_predict.cache_clear()
    for table in chosen.values():
        say(f"{table.name}: {table.title}")
        for row in table.rows:
            parameters: dict[str, None] = {}
            errors, trained = [], train_and_predict.cache_info().misses
            row_cells = [cell for cell in table.cells if cell.row == row]
            for cell in row_cells:
                try:
                    config, classes = check(cell)
                    parameters[f"{count_parameters(config, classes):,}"] = None
                    error = train_and_predict(smallest(config), classes)
                except Exception as caught:
                    error = _one_line(caught)
                if error:
                    errors.append(f"{table.name}: {cell.row}, {cell.column}: {cell.experiment}: {error}")
            failures, tested = failures + errors, tested + len(row_cells)
            trained = train_and_predict.cache_info().misses - trained
            state = f"{len(errors)} FAILED" if errors else "ok"
            sizes, minutes = ", ".join(parameters) or "?", (time.monotonic() - started) / 60
            new = f", {trained} trained" if trained else ""
            say(f"  {row}: {count(len(row_cells), 'cell')} {state}; {sizes} parameters{new} [{minutes:.1f} min]")
            for error in errors:
                say(f"    {error}")
        try:
            cells.experiments(table, tables)
        except ValueError as error:
            failures.append(str(error))
            say(f"    {error}")
    trained = train_and_predict.cache_info().misses
    total = f"{tested} cells of {count(len(chosen), 'table')}, {count(trained, 'distinct network')} trained"
    say(f"{total}: {count(len(failures), 'failure')} in {(time.monotonic() - started) / 60:.1f} minutes")
    return failures


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


@lru_cache(maxsize=1024)
def complete(name: str) -> tuple[Config, tuple[str, ...]]:
    """Returns the configuration of an experiment, completed for its weights, and the classes of its data set.

    Random weights replace those of another run. Raises ValueError for an invalid configuration.
    """
    config = experiments.load(name)
    configs.check(config)
    classes = datasets.classes(config.data.dataset) or ("a", "b")  # those of `folder` depend on its images
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
    numbers, name = _numbers(classes), f"{cell.unit}.{cell.name}"
    if numbers.get(name) is None:
        raise ValueError(f"metric {cell.metric!r}: {configs.nearest(name, numbers)}")
    _check_augmentation(config.augment, config.input)
    return config, classes


@lru_cache(maxsize=16)
def _numbers(classes: tuple[str, ...]) -> dict[str, Any]:
    """Returns the metrics of random predictions in which every class occurs and is predicted."""
    labels = np.arange(6 * len(classes)) % len(classes)
    logits = np.random.default_rng(0).normal(size=(len(labels), len(classes))) + 1.5 * np.eye(len(classes))[labels]
    shares = special.softmax(logits, axis=1)
    ids = np.arange(len(labels)).astype(str)
    return metrics.numbers(metrics.unit_levels(Predictions(ids, ids, ids, labels, shares, classes, logits=logits)))


@lru_cache(maxsize=256)
def _check_augmentation(settings: AugmentConfig, spec: configs.InputSpec) -> None:
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


def count_parameters(config: Config, classes: tuple[str, ...]) -> int:
    """Traces the program of an experiment with its own image size; returns the number of parameters."""
    optim.class_weights(config.optim.class_weights, np.arange(LABELS) % len(classes), classes)
    # Fields that do not change shapes are set to one value, so that cells share a cache entry.
    train = replace(config.train, seed=0, monitor="", patience=0, eval_steps=0, save_steps=0)
    settings = replace(config.optim, class_weights="none")
    params = _build(Config(input=config.input, model=config.model, optim=settings, train=train), classes)
    return sum(leaf.size for leaf in trees.flatten(params).values())


@lru_cache(maxsize=1024)
def _build(config: Config, classes: tuple[str, ...]) -> Any:
    labels = np.arange(LABELS) % len(classes)
    return program.build(config, classes, labels, meshes.make_mesh(1)).abstract_state.params


def smallest(config: Config) -> Config:
    """Returns a configuration of the same network, head and frozen parameters for two steps on the smallest images."""
    optim = {name: getattr(config.optim, name) for name in ("tune", "freeze", "frozen_batch_norm")}
    size, mean = models.minimum_size(config.model), (0.0,) * config.input.network_channels
    return Config(
        input=configs.InputSpec(size=size, channels=config.input.channels, mean=mean),
        model=replace(config.model, weights="none"),
        # A small rate: on the smallest images a feature map is one cell, whose batch norm gradients can be huge.
        optim=configs.OptimConfig(lr=1e-6, **optim),
        train=configs.TrainConfig(batch_size=BATCH, steps=2),
    )


@lru_cache(maxsize=1024)
def train_and_predict(config: Config, classes: tuple[str, ...]) -> str:
    """Trains the two steps of `smallest` and predicts once; returns the error, or ""."""
    try:
        compiled = program.build(config, classes, np.arange(LABELS) % len(classes), meshes.make_mesh(1))
        state = compiled.new_state(random_leaves(compiled.abstract_state.variables))
        shape = (BATCH, *config.input.size, config.input.channels)
        images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        rows = np.arange(BATCH, dtype=np.int32)
        batch = {"image": images, "label": rows % len(classes), "place": rows.astype(np.uint32)}
        for number in (1, 2):
            state, values = compiled.train_step(state, batch)
            if not bool(values["finite"]):
                return f"training: loss {values['loss']}, gradient {values['grad_norm']} at step {number}"
        variables = compiled.network.fold(state.variables)
        predicted = np.asarray(compiled.predict_step(variables, {"image": images, "row": rows})["probabilities"])
        if predicted.shape != (BATCH, len(classes)) or not np.allclose(predicted.sum(axis=1), 1, atol=1e-3):
            return f"training: predictions of shape {predicted.shape} with sums {predicted.sum(axis=1)}"
    except Exception as error:
        return f"training: {_one_line(error)}"
    return ""


def random_leaves(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns initial values by path: He normal for kernels, 1 for scales and variances, else 0.

    In NumPy, because compiling the initialization of a deep network takes as long as compiling its step.
    """
    rng, leaves = np.random.default_rng(0), {}
    for path, leaf in (item for tree in variables.values() for item in trees.flatten(tree).items()):
        if len(leaf.shape) > 1:
            std = np.sqrt(2 / np.prod(leaf.shape[:-1]))
            leaves[path] = (std * rng.standard_normal(leaf.shape, np.float32)).astype(leaf.dtype)
        else:
            one = path.rpartition("/")[2] in ("scale", "var", "layer_scale")
            leaves[path] = np.full(leaf.shape, float(one), leaf.dtype)
    return leaves
