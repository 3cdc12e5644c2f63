"""The training step and the prediction step: pure functions of state and batch, to be jitted by the caller.

Imports neither grain, TFDS, orbax nor matplotlib, so that a step can be measured with jax and flax alone.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh

from lungjax.config import Config
from lungjax.data import augment
from lungjax.models import outputs, trees
from lungjax.models.inputs import normalize
from lungjax.models.layers import BatchNorm
from lungjax.runtime import mesh as meshes
from lungjax.training import losses
from lungjax.training.state import TrainState

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


def frozen_batch_norm(choice: str, frozen: frozenset[str]) -> Any:
    """Returns a context for `module.apply` in which BatchNorm of frozen layers runs in evaluation mode.

    `choice` is `optim.frozen_batch_norm`, `frozen` are paths of parameters. An interceptor, so that networks need not
    pass the choice on.
    """

    def call(method: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        if isinstance(context.module, BatchNorm) and context.method_name == "__call__":
            scale = "/".join((*context.module.path, "scale"))
            if choice == "frozen" or (choice == "with_layer" and scale in frozen):
                kwargs = {**kwargs, "train": False}
        return method(*args, **kwargs)

    return nn.intercept_methods(call)


def make_train_step(
    module: nn.Module,
    optimizer: optax.GradientTransformation,
    config: Config,
    class_weights: jax.Array,
    positive: int | None,
    frozen: frozenset[str] = frozenset(),
    mesh: Mesh | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Returns `train_step(state, batch) -> (state, metrics)`; parameters whose paths are in `frozen` are not updated.

    The batch is one of `pipeline.train_batches` and is augmented here, on the device. With `train.accumulate` above one
    it is split into micro-batches whose gradients are averaged; identical to the full-batch step if BatchNorm is frozen
    or absent and dropout and mixing are off, which are otherwise per micro-batch.

    A step whose loss or gradient is not finite changes only the counters `step` and `skipped`; unless `train.on_nan` is
    "skip", so do all steps after it, so that the state stays the last good one.

    `mesh` is required for `train.sync_batch_norm=False` and `train.shard_params`.
    """
    micro_batches = config.train.accumulate
    loss = partial(
        losses.cross_entropy,
        class_weights=class_weights,
        label_smoothing=config.optim.label_smoothing,
        positive=positive,
    )

    def inputs(batch: Batch) -> tuple[jax.Array, jax.Array | None, jax.Array | float]:
        # Augmentation depends on the seed and the example's position in the sequence, not on step, batch or device.
        key = jax.random.fold_in(jax.random.key(config.train.seed), 1)
        place, box, body = (batch.get(name) for name in ("place", "box", "body"))
        images = augment.augment(batch["image"], place, key, config.augment, config.input.size, box, body)
        if not (config.augment.mixup or config.augment.cutmix):
            return normalize(images, config.input), None, 1.0
        images, mixed_labels, share = augment.mix(images, batch["label"], place, key, config.augment)
        return normalize(images, config.input), mixed_labels, share

    def loss_fn(
        params: Any, frozen_params: Any, batch_stats: Any, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, Any]:
        images, mixed_labels, share = inputs(batch)
        with frozen_batch_norm(config.optim.frozen_batch_norm, frozen):
            (logits, _), updates = module.apply(
                {"params": trees.merge(params, frozen_params), "batch_stats": batch_stats},
                images,
                train=True,
                rngs={"dropout": key},
                mutable=["batch_stats"],
            )
        example_losses = loss(logits, batch["label"])
        if mixed_labels is not None:
            example_losses = share * example_losses + (1 - share) * loss(logits, mixed_labels)
        classes = outputs.probabilities(logits, positive).argmax(-1)
        metrics = {"loss": example_losses.mean(), "accuracy": (classes == batch["label"]).mean()}
        return metrics["loss"], (metrics, updates.get("batch_stats", batch_stats))

    grad_fn = jax.grad(loss_fn, has_aux=True)

    def gradients(
        params: Any, frozen_params: Any, batch_stats: Any, batch: Batch, key: jax.Array
    ) -> tuple[Any, Any, Metrics]:
        if micro_batches == 1:
            grads, (metrics, batch_stats) = grad_fn(params, frozen_params, batch_stats, batch, key)
            return grads, batch_stats, metrics
        # Strided, so that each micro-batch stays spread over all devices.
        stacked = jax.tree.map(lambda x: x.reshape(-1, micro_batches, *x.shape[1:]).swapaxes(0, 1), batch)

        def add_micro_batch(carry: Any, xs: Any) -> tuple[Any, Metrics]:
            sums, batch_stats = carry
            index, part = xs
            part_key = jax.random.fold_in(key, index)
            grads, (metrics, batch_stats) = grad_fn(params, frozen_params, batch_stats, part, part_key)
            return (jax.tree.map(jnp.add, sums, grads), batch_stats), metrics

        start = (jax.tree.map(jnp.zeros_like, params), batch_stats)
        (grads, batch_stats), metrics = jax.lax.scan(add_micro_batch, start, (jnp.arange(micro_batches), stacked))
        return jax.tree.map(lambda g: g / micro_batches, grads), batch_stats, jax.tree.map(jnp.mean, metrics)

    if not config.train.sync_batch_norm:
        assert mesh is not None
        gradients = meshes.per_device_gradients(gradients, mesh)
    elif config.train.shard_params:
        assert mesh is not None
        gradients = meshes.with_gathered_params(gradients, mesh)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(config.train.seed), state.step)
        # Frozen parameters are not differentiated: no backward pass below the lowest trainable layer.
        params, frozen_params = trees.split(state.params, frozen)
        grads, batch_stats, metrics = gradients(params, frozen_params, state.batch_stats, batch, key)
        metrics["grad_norm"] = optax.tree.norm(grads)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
        good = finite if config.train.on_nan == "skip" else finite & (state.skipped == 0)
        updates, opt_state = optimizer.update(grads, state.opt_state, params)
        new = (optax.apply_updates(params, updates), batch_stats, opt_state)
        old = (params, state.batch_stats, state.opt_state)
        params, batch_stats, opt_state = jax.tree.map(lambda x, y: jnp.where(good, x, y), new, old)
        state = TrainState(
            step=state.step + 1,
            skipped=state.skipped + ~good,
            params=trees.merge(params, frozen_params),
            batch_stats=batch_stats,
            opt_state=opt_state,
        )
        return state, {**metrics, "finite": finite}

    return train_step


def make_predict_step(
    network: Callable[[dict[str, Any], jax.Array], tuple[jax.Array, Any]], config: Config, positive: int | None
) -> Callable[[dict[str, Any], Batch], dict[str, jax.Array]]:
    """Returns `predict_step(variables, batch)`, a function to `probabilities` and `logits` [B, C] and `row` [B].

    `network(variables, images)` returns logits first: a `FoldedModel`, or a module's `apply` with train=False.
    """

    def predict_step(variables: dict[str, Any], batch: Batch) -> dict[str, jax.Array]:
        logits, _ = network(variables, normalize(batch["image"], config.input))
        return {
            "probabilities": outputs.probabilities(logits, positive),
            "logits": outputs.class_logits(logits, positive),
            "row": batch["row"],
        }

    return predict_step
