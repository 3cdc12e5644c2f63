"""What a configuration becomes on a mesh: the network, its first state, the compiled training and prediction step.

Built on shapes alone, so that the same program is trained here, or compiled for a machine that is elsewhere.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from lungjax import models
from lungjax.config import Config
from lungjax.models import folding, outputs, trees
from lungjax.models.ops import conv
from lungjax.runtime import mesh as meshes
from lungjax.training import optim, state, step


@dataclass(frozen=True)
class Program:
    """Everything that is compiled for one run, and where its arrays lie."""

    mesh: jax.sharding.Mesh
    module: nn.Module
    schedule: Callable[[int], Any]  # step -> learning rate
    steps: int  # of the run
    eval_steps: int  # between validations
    new_state: Callable[..., state.TrainState]  # leaves to start from -> the first state; compiled
    abstract_state: state.TrainState  # shapes of the state with its shardings
    train_step: Callable[..., Any]  # (state, batch) -> (state, metrics); compiled, takes over the state's memory
    network: folding.FoldedModel  # the module for prediction; `network.fold(variables)` is what predict_step takes
    predict_step: Callable[..., Any]  # (prepared variables, batch) -> probabilities and rows; compiled


def build(config: Config, classes: tuple[str, ...], labels: np.ndarray, mesh: jax.sharding.Mesh) -> Program:
    """Returns the program; compiles nothing yet.

    Args:
      config: complete (`weights.load.resolve`).
      classes: of the data set, in label order.
      labels: [N] of the train split, for the number of steps and the class weights.
      mesh: to run on.

    Raises ValueError for what doesn't fit together.
    """
    meshes.check_batch(config.train.batch_size, mesh, "train.batch_size", config.train.accumulate)
    if config.eval.batch_size:
        meshes.check_batch(config.eval.batch_size, mesh, "eval.batch_size")
    platform = meshes.platform(mesh)
    module = models.build(config.model, len(classes), remat=config.train.remat, platform=platform)
    smallest = models.minimum_size(config.model)
    if any(have < need for have, need in zip(config.input.size, smallest, strict=True)):
        raise ValueError(
            f"input.size={config.input.size} is too small for {config.model.name}: it takes {smallest} "
            "(height, width) or more"
        )
    positive = outputs.positive_class(config, classes)
    steps, eval_steps = step_counts(config, len(labels))
    schedule = optim.make_schedule(config.optim, steps)
    image_shape = (*config.input.size, config.input.network_channels)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, *image_shape)), train=False))
    frozen = optim.frozen_paths(config.optim, shapes["params"])
    optimizer = optim.make_optimizer(config.optim, schedule, trees.split(shapes["params"], frozen)[0])
    weights = optim.class_weights(config.optim.class_weights, labels, classes)
    new_state = partial(state.create, module, optimizer, image_shape, config.train.seed, frozen)
    first = jax.eval_shape(new_state, {})
    network = folding.FoldedModel(module, first.variables, image_shape)
    replicated, batch_sharding = meshes.replicated(mesh), meshes.batch_sharding(mesh)
    state_sharding = meshes.state_sharding(first, mesh, config.train.shard_params)
    return Program(
        mesh=mesh,
        module=module,
        schedule=schedule,
        steps=steps,
        eval_steps=eval_steps,
        new_state=jax.jit(new_state, out_shardings=state_sharding),
        abstract_state=jax.tree.map(
            lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), first, state_sharding
        ),
        train_step=jax.jit(
            step.make_train_step(module, optimizer, config, weights, positive, frozen, mesh),
            in_shardings=(state_sharding, batch_sharding),
            out_shardings=(state_sharding, replicated),
            donate_argnums=0,
            compiler_options=conv.compiler_options(platform),
        ),
        network=network,
        predict_step=jax.jit(
            step.make_predict_step(network, config, positive),
            in_shardings=(None, batch_sharding),  # folded variables keep their own sharding
            out_shardings=replicated,
            compiler_options=conv.compiler_options(platform, train=False),
        ),
    )


def step_counts(config: Config, examples: int) -> tuple[int, int]:
    """Returns the steps of the run and the steps between validations."""
    epoch = max(round(examples / config.train.batch_size), 1)
    steps = config.train.steps or max(round(config.train.epochs * examples / config.train.batch_size), 1)
    return steps, min(config.train.eval_steps or epoch, steps)


def smaller(config: Config, devices: int) -> list[str]:
    """Returns assignments that make a training step take less memory, the cheapest first; all are allowed ones."""
    train = config.train
    together = devices * train.accumulate
    tips = [f"train.accumulate={2 * train.accumulate}"] if train.batch_size % (2 * together) == 0 else []
    tips += [] if train.remat else ["train.remat=True"]
    tips += ["model.dtype=bfloat16"] if config.model.dtype == "float32" else []
    half = train.batch_size // 2 // together * together
    tips += [f"train.batch_size={half}"] if half else []
    if devices > 1 and not train.shard_params and train.sync_batch_norm:
        tips.append("train.shard_params=True")
    return tips


@contextmanager
def memory_explained(config: Config, devices: int) -> Iterator[None]:
    """Turns a device's out-of-memory error into a ValueError that says what may help."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        text = str(error)
        if "RESOURCE_EXHAUSTED" not in text and "out of memory" not in text.lower():
            raise
        tips = [*smaller(config, devices), f"input.size={', '.join(str(n * 3 // 4) for n in config.input.size)}"]
        raise ValueError(
            f"out of memory with train.batch_size={config.train.batch_size}, input.size={config.input.size} and "
            f"{config.model.name} on {devices} device(s). Try, in this order: {'; '.join(tips)} (or eval.batch_size="
            f"{devices}, if it was predicting). The checkpoints are intact. The device said: "
            f"{text.splitlines()[0][:300]}"
        ) from error
