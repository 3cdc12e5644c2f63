"""One training step and one prediction step: pure functions of state and batch, to be jitted by the caller.

Imports neither grain, TFDS, orbax nor matplotlib, so the step runs and is measured wherever jax and flax are.
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
    """Returns the context in which a network is applied, so that BatchNorms of frozen layers run as in evaluation.

    Done from outside, so that no network has to pass it on. `choice` is `optim.frozen_batch_norm`; `frozen` holds
    parameter paths.
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
    """Returns `train_step(state, batch) -> (state, metrics)`; parameters whose paths are in `frozen` stay.

    The batch is one of `pipeline.train_batches`; it is augmented here, on the device. With `train.accumulate` above
    one it is worked off in equal parts and their gradients are averaged: the very step of the whole batch where
    BatchNorm is frozen or absent and dropout and mixing are off; otherwise those are per part.

    A step whose loss or gradient is no number changes nothing but the counters `step` and `skipped`; unless
    `train.on_nan` is "skip", neither do all steps after it, so that the state stays the last good one.

    `mesh` is needed for `train.sync_batch_norm=False` and `train.shard_params`.
    """
    parts = config.train.accumulate
    loss = partial(
        losses.cross_entropy,
        class_weights=class_weights,
        label_smoothing=config.optim.label_smoothing,
        positive=positive,
    )

    def augmented(batch: Batch) -> tuple[jax.Array, jax.Array | None, jax.Array | float]:
        # Of the seed alone: a picture depends on its place in the sequence, not on step, batch or device.
        pictures = jax.random.fold_in(jax.random.key(config.train.seed), 1)
        images = augment.augment(
            batch["image"],
            batch.get("place"),
            pictures,
            config.augment,
            config.input.size,
            batch.get("box"),
            batch.get("body"),
        )
        if not (config.augment.mixup or config.augment.cutmix):
            return normalize(images, config.input), None, 1.0
        images, mixed, share = augment.mix(images, batch["label"], batch.get("place"), pictures, config.augment)
        return normalize(images, config.input), mixed, share

    def loss_fn(trained: Any, kept: Any, batch_stats: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, Any]:
        images, mixed, share = augmented(batch)
        with frozen_batch_norm(config.optim.frozen_batch_norm, frozen):
            (logits, _), updates = module.apply(
                {"params": trees.merge(trained, kept), "batch_stats": batch_stats},
                images,
                train=True,
                rngs={"dropout": key},
                mutable=["batch_stats"],
            )
        each = loss(logits, batch["label"])
        if mixed is not None:
            each = share * each + (1 - share) * loss(logits, mixed)
        predicted = outputs.probabilities(logits, positive).argmax(-1)
        metrics = {"loss": each.mean(), "accuracy": (predicted == batch["label"]).mean()}
        return metrics["loss"], (metrics, updates.get("batch_stats", batch_stats))

    grad_fn = jax.grad(loss_fn, has_aux=True)

    def gradients(trained: Any, kept: Any, batch_stats: Any, batch: Batch, key: jax.Array) -> tuple[Any, Any, Metrics]:
        if parts == 1:
            grads, (metrics, batch_stats) = grad_fn(trained, kept, batch_stats, batch, key)
            return grads, batch_stats, metrics
        # Every part takes each parts-th example, so that it stays spread over all devices.
        micro = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)

        def one(carry: Any, xs: Any) -> tuple[Any, Metrics]:
            sums, batch_stats = carry
            number, part = xs
            grads, (metrics, batch_stats) = grad_fn(trained, kept, batch_stats, part, jax.random.fold_in(key, number))
            return (jax.tree.map(jnp.add, sums, grads), batch_stats), metrics

        start = (jax.tree.map(jnp.zeros_like, trained), batch_stats)
        (grads, batch_stats), metrics = jax.lax.scan(one, start, (jnp.arange(parts), micro))
        return jax.tree.map(lambda g: g / parts, grads), batch_stats, jax.tree.map(jnp.mean, metrics)

    if not config.train.sync_batch_norm:
        assert mesh is not None
        gradients = meshes.per_device_gradients(gradients, mesh)
    elif config.train.shard_params:
        assert mesh is not None
        gradients = meshes.with_gathered_params(gradients, mesh)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(config.train.seed), state.step)
        # Only what is trained is differentiated: below the lowest trained layer nothing runs backwards.
        trained, kept = trees.split(state.params, frozen)
        grads, batch_stats, metrics = gradients(trained, kept, state.batch_stats, batch, key)
        metrics["grad_norm"] = optax.tree.norm(grads)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
        good = finite if config.train.on_nan == "skip" else finite & (state.skipped == 0)
        updates, opt_state = optimizer.update(grads, state.opt_state, trained)
        changed = (optax.apply_updates(trained, updates), batch_stats, opt_state)
        trained, batch_stats, opt_state = jax.tree.map(
            lambda new, old: jnp.where(good, new, old), changed, (trained, state.batch_stats, state.opt_state)
        )
        state = TrainState(
            step=state.step + 1,
            skipped=state.skipped + ~good,
            params=trees.merge(trained, kept),
            batch_stats=batch_stats,
            opt_state=opt_state,
        )
        return state, {**metrics, "finite": finite}

    return train_step


def make_predict_step(
    network: Callable[[dict[str, Any], jax.Array], tuple[jax.Array, Any]], config: Config, positive: int | None
) -> Callable[[dict[str, Any], Batch], dict[str, jax.Array]]:
    """Returns `predict_step(variables, batch)` giving `probabilities` and `logits` [B, C] and the batch's `row` [B].

    `network(variables, images)` gives logits first: a `folding.FoldedModel`, or a module's `apply` with train=False.
    """

    def predict_step(variables: dict[str, Any], batch: Batch) -> dict[str, jax.Array]:
        logits, _ = network(variables, normalize(batch["image"], config.input))
        return {
            "probabilities": outputs.probabilities(logits, positive),
            "logits": outputs.class_logits(logits, positive),
            "row": batch["row"],
        }

    return predict_step
