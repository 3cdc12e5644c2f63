"""Every cell of every table, tried without data: what a run needs is checked, and each network trains two steps.

For each cell: the experiment loads and makes sense, its data set and classes are known, its weights have a record,
the network, optimiser, schedule and loss fit together (shapes alone, nothing is compiled), the augmentation gives
images of the right size, and the metric exists and has a value. For each distinct network with its head and its
frozen parameters: random weights, the smallest images that it takes, two training steps with finite losses, and one
prediction. What does not matter to that is left out: image stage, augmentation, class weights, ImageNet weights.
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
from lungjax.tables.cells import Cell, Table
from lungjax.training import optim, program
from lungjax.weights import load

LABELS = 64  # of a train split that isn't there
RATE = 1e-6  # of the two steps
BATCH = 8  # images of the two steps: fewer, and norms over single cells blow up a deep network
UNKNOWN = ("a", "b")  # classes of a data set whose images say which (folder)


def run(tables: Mapping[str, Table], chosen: Mapping[str, Table], say: Callable[[str], None]) -> list[str]:
    """Tries every cell of the `chosen` ones of all `tables`; returns the failures, one line each.

    `say` gets a line for each row of each table as it goes, and a summary.
    """
    started, failures, tried = time.monotonic(), [], 0
    steps: dict[str, str] = {}  # of a network, as `distinct` names it: what training it said, "" if all is well
    for table in chosen.values():
        say(f"{table.name}: {table.title}")
        for row in table.rows:
            parameters: dict[int, None] = {}
            wrong, trained = [], 0
            for cell in (cell for cell in table.cells if cell.row == row):
                tried += 1
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
        problem = _chooses(table, tables)
        if problem:
            failures.append(problem)
            say(f"    {problem}")
    minutes = (time.monotonic() - started) / 60
    say(
        f"{tried} cells of {len(chosen)} tables, {len(steps)} distinct networks trained: {len(failures)} failures in "
        f"{minutes:.1f} minutes"
    )
    return failures


def _chooses(table: Table, tables: Mapping[str, Table]) -> str:
    from lungjax.tables import cells

    try:
        for cell in table.cells:
            cells.candidates(table, cell, tables)
    except ValueError as error:
        return str(error)
    return ""


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


@lru_cache(maxsize=1024)
def complete(name: str) -> tuple[Config, tuple[str, ...]]:
    """Returns an experiment's configuration with what its weights demand, and the data set's classes.

    Weights of a run that is yet to be made are taken for none. Raises ValueError for what a run would refuse.
    """
    config = experiments.load(name)
    configs.check(config)
    classes = datasets.classes(config.data.dataset) or UNKNOWN
    if config.model.weights.removeprefix("meanvar:").startswith("run:"):
        config = replace(config, model=replace(config.model, weights="none"))
    config = load.resolve(config)
    source = load.parse(config.model)
    if config.model.weights != "none" and source.record is None:
        raise ValueError(f"model.weights={config.model.weights} has no record")
    return config, classes


def check(cell: Cell) -> tuple[Config, tuple[str, ...]]:
    """Returns a cell's configuration and classes. Raises ValueError for what doesn't fit, its metric included."""
    config, classes = complete(cell.experiment)
    sheet = _predictions(classes)
    value = bootstrap.over_runs([sheet], [cell.name], draws=2, seed=0, unit=cell.unit).get(cell.name)
    if value is None or None in value:
        raise ValueError(f"metric {cell.metric!r}: {configs.nearest(cell.name, _names(classes))}")
    _augmented(config.augment, config.input)
    return config, classes


@lru_cache(maxsize=16)
def _predictions(classes: tuple[str, ...]) -> Predictions:
    """Returns made-up predictions in which every class is met and called."""
    labels = np.arange(6 * len(classes)) % len(classes)
    logits = np.random.default_rng(0).normal(size=(len(labels), len(classes))) + 1.5 * np.eye(len(classes))[labels]
    logits = logits.astype(np.float32)
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    ids = np.asarray([str(i) for i in range(len(labels))])
    return Predictions(ids, ids, np.full(len(ids), ""), labels, shares, classes, logits=logits)


@lru_cache(maxsize=16)
def _names(classes: tuple[str, ...]) -> list[str]:
    return sorted(bootstrap.intervals(_predictions(classes), draws=2))


@lru_cache(maxsize=256)
def _augmented(settings: AugmentConfig, spec: configs.InputSpec) -> None:
    """Raises ValueError if augmented images would not be of the network's size."""
    height, width = (round(side * (1 + 2 * spec.box_margin)) for side in spec.size)
    image = jax.ShapeDtypeStruct((BATCH, height, width, spec.channels), jnp.uint8)
    place = jax.ShapeDtypeStruct((BATCH,), jnp.uint32)
    box = jax.ShapeDtypeStruct((BATCH, 4), jnp.float32) if spec.box_margin else None
    body = jax.ShapeDtypeStruct((BATCH, height, width), jnp.uint8) if settings.exterior else None
    made = jax.eval_shape(
        lambda *parts: augment.augment(parts[0], parts[1], jax.random.key(0), settings, spec.size, *parts[2:]),
        image, place, box, body,
    )  # fmt: skip
    if made.shape != (BATCH, *spec.size, spec.channels):
        raise ValueError(f"augmented images are {made.shape}, the network takes {spec.size} and {spec.channels}")


def shapes(config: Config, classes: tuple[str, ...]) -> int:
    """Builds an experiment's program on shapes alone; returns how many parameters it has."""
    optim.class_weights(config.optim.class_weights, np.arange(LABELS) % len(classes), classes)
    # What the program's shapes don't depend on is set to one value, so that one answer serves many cells.
    kept = replace(config.train, seed=0, monitor="", patience=0, eval_steps=0, save_steps=0)
    settings = replace(config.optim, class_weights="none")
    return _shapes(Config(input=config.input, model=config.model, optim=settings, train=kept), classes)


@lru_cache(maxsize=1024)
def _shapes(config: Config, classes: tuple[str, ...]) -> int:
    mesh = meshes.make_mesh(1)
    labels = np.arange(LABELS) % len(classes)
    return count(program.build(config, classes, labels, mesh).abstract_state.params)


def count(params: Any) -> int:
    """Returns how many numbers a tree of arrays or shapes holds."""
    return sum(leaf.size for leaf in trees.flatten(params).values())


def smallest(config: Config) -> Config:
    """Returns the configuration of a two-step trial: the smallest images, a small batch, random weights.

    What decides which program is compiled stays: the network, its head and norms, the optimiser and what is frozen.
    """
    return Config(
        input=replace(
            config.input, size=models.minimum_size(config.model), crop="none", crop_size=(0, 0), box_margin=0.0
        ),
        model=replace(config.model, weights="none"),
        # Images of the smallest size make maps of one cell, whose batch norms give gradients of any size: a small rate.
        optim=replace(
            config.optim, lr=RATE, class_weights="none", schedule="constant", warmup_steps=0, schedule_steps=0
        ),
        train=configs.TrainConfig(batch_size=BATCH, steps=2),
    )


def distinct(config: Config, classes: tuple[str, ...]) -> str:
    """Returns what tells apart the networks that are trained; equal for cells of one network and freezing."""
    small = smallest(config)
    trained = (small.optim.tune, small.optim.freeze, small.optim.frozen_batch_norm)
    outputs = len(classes)
    channels = config.input.network_channels
    return repr((small.model, trained, small.input.size, channels, outputs, small.model.head.positive_class))


def attempt(config: Config, classes: tuple[str, ...]) -> str:
    """Trains two steps and predicts once; returns what went wrong, "" for nothing."""
    small = smallest(config)
    try:
        labels = np.arange(LABELS) % len(classes)
        compiled = program.build(small, classes, labels, meshes.make_mesh(1))
        state = compiled.new_state(random_leaves(compiled.abstract_state.variables))
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (BATCH, *small.input.size, small.input.channels), dtype=np.uint8)
        batch = {
            "image": images,
            "label": np.arange(BATCH, dtype=np.int32) % len(classes),
            "place": np.arange(BATCH, dtype=np.uint32),
        }
        for number in (1, 2):
            state, values = compiled.train_step(state, batch)
            if not bool(values["finite"]):
                return f"loss {values['loss']}, gradient {values['grad_norm']} at step {number}"
        row = {"image": images, "row": np.arange(BATCH, dtype=np.int32)}
        found = np.asarray(compiled.predict_step(compiled.network.fold(state.variables), row)["probabilities"])
        if found.shape != (BATCH, len(classes)) or not np.allclose(found.sum(axis=1), 1, atol=1e-3):
            return f"predictions of shape {found.shape} with sums {found.sum(axis=1)}"
    except Exception as error:
        return _one_line(error)
    return ""


def random_leaves(like: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns random numbers for every leaf by path: He's for kernels, 1 for scales and variances, else 0.

    Made here, since compiling a deep network's own start takes about as long as compiling its step.
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
