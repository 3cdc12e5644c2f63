"""The network, its initial state, and the jitted training and prediction steps of a configuration on a mesh."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from lungjax import models
from lungjax.config import Config
from lungjax.models import outputs, trees
from lungjax.models.batch_norm_folding import FoldedModel
from lungjax.models.ops import conv
from lungjax.runtime import mesh as meshes
from lungjax.training import optim, state, step


@dataclass(frozen=True)
class Program:
    """The compiled functions of a run, with the shardings of their arrays."""

    mesh: jax.sharding.Mesh
    module: nn.Module
    schedule: Callable[[int], Any]  # step -> learning rate
    steps: int  # of the run
    eval_steps: int  # between validations
    new_state: Callable[..., state.TrainState]  # pretrained leaves -> initial state; jitted
    abstract_state: state.TrainState  # shapes with shardings
    train_step: Callable[..., Any]  # (state, batch) -> (state, metrics); jitted, donates the state
    network: FoldedModel  # the module for prediction; folds variables for predict_step
    predict_step: Callable[..., Any]  # (folded variables, batch) -> probabilities, logits and rows; jitted
    test_step: Callable[..., Any]  # the same with eval.tta


def build(config: Config, classes: tuple[str, ...], labels: np.ndarray, mesh: jax.sharding.Mesh) -> Program:
    """Returns the program of a configuration resolved by `weights.load.resolve`; nothing is compiled yet.

    The training `labels` [N] determine the steps and the class weights. Raises ValueError for incompatible settings.
    """
    # ---- Network
    meshes.check_batch(config.train.batch_size, mesh, "train.batch_size", config.train.accumulate)
    if config.eval.batch_size:
        meshes.check_batch(config.eval.batch_size, mesh, "eval.batch_size")
    platform = mesh.devices.flat[0].platform  # not always that of this machine
    module = models.build(config.model, len(classes), remat=config.train.remat, platform=platform)

    # ---- Schedule, optimizer and initial state
    positive = outputs.positive_class(config, classes)
    steps, eval_steps = step_counts(config, len(labels))
    schedule = optim.make_schedule(config.optim, steps)
    image_shape = (*config.input.size, config.input.network_channels)
    params = models.abstract_variables(module, image_shape)["params"]
    frozen = optim.frozen_paths(config.optim, params)
    optimizer = optim.make_optimizer(config.optim, schedule, trees.split(params, frozen)[0])
    weights = optim.class_weights(config.optim.class_weights, labels, classes)
    new_state = partial(state.create, module, optimizer, image_shape, frozen, config.optim.ema > 0)
    seed = np.uint32(config.train.seed)
    quick = {"xla_backend_optimization_level": 0} if platform == "cpu" else None  # new_state runs once
    first = jax.eval_shape(new_state, seed, {})
    network = FoldedModel(module, first.variables, image_shape)

    # ---- Steps and their shardings
    replicated, batch_sharding = meshes.replicated(mesh), meshes.batch_sharding(mesh)
    state_sharding = meshes.state_sharding(first, mesh, config.train.shard_params)
    train_step: Callable[..., Any] = partial(
        step.train_step,
        apply=meshes.gather_params(module.apply, mesh) if config.train.shard_params else module.apply,
        optimizer=optimizer,
        config=config,
        class_weights=weights,
        positive=positive,
        frozen=frozen,
    )
    if not config.train.sync_batch_norm:
        train_step = meshes.per_device(train_step, mesh)

    def prediction(network: Callable[..., Any]) -> Callable[..., Any]:
        return conv.jit(
            partial(step.predict_step, network=network, config=config, positive=positive),
            platform,
            train=False,
            in_shardings=(None, batch_sharding),  # folded variables keep their own sharding
            out_shardings=replicated,
        )

    predict_step = prediction(network)
    return Program(
        mesh=mesh,
        module=module,
        schedule=schedule,
        steps=steps,
        eval_steps=eval_steps,
        new_state=partial(jax.jit(new_state, out_shardings=state_sharding, compiler_options=quick), seed),
        abstract_state=jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), first, state_sharding
        ),
        train_step=conv.jit(
            train_step,
            platform,
            in_shardings=(state_sharding, batch_sharding),
            out_shardings=(state_sharding, replicated),
            donate_argnums=0,
        ),
        network=network,
        predict_step=predict_step,
        test_step=predict_step if config.eval.tta == "none" else prediction(outputs.with_tta(network, config.eval.tta)),
    )


def step_counts(config: Config, examples: int) -> tuple[int, int]:
    """Returns the number of steps in the run, and the number between validations."""
    epoch = max(round(examples / config.train.batch_size), 1)
    steps = config.train.steps or max(round(config.train.epochs * examples / config.train.batch_size), 1)
    return steps, min(config.train.eval_steps or epoch, steps)


def smaller(config: Config, devices: int) -> list[str]:
    """Returns valid settings that reduce the memory of a training step, the cheapest first."""
    train = config.train
    unit = devices * train.accumulate
    half = train.batch_size // 2 // unit * unit
    tips = {
        f"train.accumulate={2 * train.accumulate}": train.batch_size % (2 * unit) == 0,
        "train.remat=True": not train.remat,
        "model.dtype=bfloat16": config.model.dtype == "float32",
        f"train.batch_size={half}": half > 0,
        "train.shard_params=True": devices > 1 and not train.shard_params and train.sync_batch_norm,
    }
    return [tip for tip, valid in tips.items() if valid]


@contextmanager
def memory_advice(config: Config, devices: int) -> Iterator[None]:
    """Turns out-of-memory errors on devices into ValueErrors with advice."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        text = str(error)
        if "RESOURCE_EXHAUSTED" not in text and "out of memory" not in text.lower():
            raise
        tips = [*smaller(config, devices), f"input.size={', '.join(str(n * 3 // 4) for n in config.input.size)}"]
        raise ValueError(
            f"out of memory with train.batch_size={config.train.batch_size}, input.size={config.input.size} and "
            f"{config.model.name} on {devices} device(s). Try, in this order: {'; '.join(tips)} (in prediction: "
            f"eval.batch_size={devices}). The checkpoints are intact. Device error: {text.splitlines()[0][:300]}"
        ) from error
