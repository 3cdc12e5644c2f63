"""The training step and the prediction step, pure functions of state and batch; needs only jax, flax and optax."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from lungjax.config import Config
from lungjax.data import augment
from lungjax.models import outputs, trees
from lungjax.models.inputs import normalize
from lungjax.models.layers import BatchNorm
from lungjax.models.ops.conv import to_float32
from lungjax.training import non_finite, optim
from lungjax.training.state import TrainState

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    apply: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    config: Config,
    class_weights: jax.Array,
    positive: int | None = None,
    frozen: frozenset[str] = frozenset(),
    axis_name: str | None = None,
) -> tuple[TrainState, Metrics]:
    """Returns the state after one batch of `pipeline.train_batches`, and the metrics of the batch.

    Metrics are float32 scalars `loss`, `accuracy` and `grad_norm`, and the bool `finite`. The keyword arguments are
    constants of the run: `apply` of the module, `class_weights` of `optim.class_weights`, the `positive` class of the
    output, paths of `frozen` parameters, and the mesh axis `axis_name` if called by `mesh.per_device`.

    If `train.accumulate` is above one, the batch is split into micro-batches whose gradients are averaged. The result
    equals that of the full batch if BatchNorm is frozen or absent and dropout is off.
    """
    augment_key, dropout_key = jax.random.split(jax.random.key(state.seed))
    dropout_key = jax.random.fold_in(dropout_key, state.step)
    if axis_name is not None:
        dropout_key = jax.random.fold_in(dropout_key, jax.lax.axis_index(axis_name))

    # ---- 1. Augment, depending on the seed and the position of the example in the sequence, not on the step
    labels, place = batch["label"], batch.get("place")
    images = augment.augment(
        batch["image"], place, augment_key, config.augment, config.input.size, batch.get("box"), batch.get("body")
    )
    images, mixed_labels, share = augment.mix(images, labels, place, augment_key, config.augment)
    examples = {"image": images, "label": labels, "mixed_label": mixed_labels, "share": share}

    # ---- 2. Forward pass and loss; frozen parameters are not differentiated, so the lowest need no backward pass
    params, frozen_params = trees.split(state.params, frozen)

    def loss_fn(params: Any, batch_stats: Any, examples: Batch, dropout_key: jax.Array) -> tuple[jax.Array, Any]:
        with frozen_batch_norm(config.optim.frozen_batch_norm, frozen):
            (logits, _), mutated = apply(
                {"params": trees.merge(params, frozen_params), "batch_stats": batch_stats},
                normalize(examples["image"], config.input),
                train=True,
                rngs={"dropout": dropout_key},
                mutable=["batch_stats"],
            )
        options = {"class_weights": class_weights, "label_smoothing": config.optim.label_smoothing}
        loss_of = binary_cross_entropy if positive == outputs.EACH else partial(cross_entropy, positive=positive)
        losses = [loss_of(logits, examples[k], **options) for k in ("label", "mixed_label")]
        loss = (examples["share"] * losses[0] + (1 - examples["share"]) * losses[1]).mean()
        accuracy = _accuracy(outputs.probabilities(logits, positive), examples["label"])
        return loss, (accuracy, mutated.get("batch_stats", batch_stats))

    # ---- 3. Gradients, averaged over micro-batches and, with `axis_name`, over devices
    grad_fn = accumulated(jax.value_and_grad(loss_fn, has_aux=True), config.train.accumulate)
    result = grad_fn(params, state.batch_stats, examples, dropout_key)
    if axis_name is not None:
        result = jax.lax.pmean(result, axis_name)
    (loss, (accuracy, batch_stats)), grads = result

    # ---- 4. Update, unless the loss or the gradient is not finite
    updates, opt_state = optimizer.update(grads, state.opt_state, params)
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    updated = state.replace(
        step=state.step + 1,
        params=trees.merge(optax.apply_updates(params, updates), frozen_params),
        batch_stats=batch_stats,
        opt_state=opt_state,
    )
    if config.optim.ema:
        variables = {"params": trees.split(updated.params, frozen)[0], "batch_stats": batch_stats}
        good_steps = state.step - state.bad_steps
        updated = updated.replace(ema=optim.average(config.optim.ema, good_steps, state.ema, variables))
    state = non_finite.select(config.train.on_nan, finite, updated, state)
    return state, {"loss": loss, "accuracy": accuracy, "grad_norm": grad_norm, "finite": finite}


def cross_entropy(
    logits: jax.Array, labels: jax.Array, *, class_weights: jax.Array, label_smoothing: float, positive: int | None
) -> jax.Array:
    """Returns the weighted loss per example, float32 [B], of logits [B, C] ([B, 1] for a sigmoid output).

    Losses are multiplied by the `class_weights` [C] of the `labels` [B], without division by the sum of weights, as
    with `class_weight` in Keras (PyTorch divides by it). `label_smoothing` in 0..1 is the fraction of the target that
    is spread evenly over the classes (arXiv 1512.00567); `positive` is the positive class of a sigmoid output.
    """
    targets = optax.smooth_labels(jax.nn.one_hot(labels, class_weights.shape[0]), label_smoothing)
    return optax.softmax_cross_entropy(outputs.class_logits(logits, positive), targets) * class_weights[labels]


def binary_cross_entropy(
    logits: jax.Array, labels: jax.Array, *, class_weights: jax.Array, label_smoothing: float
) -> jax.Array:
    """Returns the loss per example, float32 [B], of findings with logits [B, C] and labels [B, C] (-1 is unknown).

    It is the mean over the findings of the binary cross-entropy, zero where the label is unknown, so that an example
    counts in proportion to its known labels. `class_weights` [2, C] multiply the losses of absent and present findings.
    """
    targets = (labels == 1) * (1 - label_smoothing) + label_smoothing / 2
    losses = optax.sigmoid_binary_cross_entropy(to_float32(logits), targets)
    return (losses * jnp.where(labels == 1, class_weights[1], class_weights[0]) * (labels >= 0)).mean(axis=-1)


def _accuracy(probabilities: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the share of correct predictions: of classes, or of known findings at a probability of one half."""
    if labels.ndim == 1:
        return (probabilities.argmax(-1) == labels).mean()
    return ((probabilities > 0.5) == labels).sum() / jnp.maximum((labels >= 0).sum(), 1)


def accumulated(grad_fn: Callable[..., Any], micro_batches: int) -> Callable[..., Any]:
    """Returns `grad_fn` averaged over consecutive micro-batches, each with the statistics of the previous one.

    `grad_fn(params, batch_stats, examples, key)` returns ((loss, (accuracy, batch_stats)), gradients).
    """
    if micro_batches == 1:
        return grad_fn

    def mean_over_micro_batches(params: Any, batch_stats: Any, examples: Batch, key: jax.Array) -> Any:
        def add(carry: Any, xs: Any) -> tuple[Any, None]:
            sums, batch_stats = carry
            index, micro_batch = xs
            part_key = jax.random.fold_in(key, index)
            (loss, (accuracy, batch_stats)), grads = grad_fn(params, batch_stats, micro_batch, part_key)
            return (jax.tree.map(jnp.add, sums, (loss, accuracy, grads)), batch_stats), None

        # Strided, so that each micro-batch stays distributed over all devices.
        stacked = jax.tree.map(lambda x: x.reshape(-1, micro_batches, *x.shape[1:]).swapaxes(0, 1), examples)
        zeros = (jnp.zeros(()), jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        (sums, batch_stats), _ = jax.lax.scan(add, (zeros, batch_stats), (jnp.arange(micro_batches), stacked))
        loss, accuracy, grads = jax.tree.map(lambda x: x / micro_batches, sums)
        return (loss, (accuracy, batch_stats)), grads

    return mean_over_micro_batches


def frozen_batch_norm(choice: str, frozen: frozenset[str]) -> AbstractContextManager[None]:
    """Returns a context in which BatchNorm of `frozen` paths is in evaluation mode; see `optim.frozen_batch_norm`."""

    def call(method: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        if isinstance(context.module, BatchNorm) and context.method_name == "__call__":
            scale = "/".join((*context.module.path, "scale"))
            if choice == "frozen" or (choice == "with_layer" and scale in frozen):
                kwargs = {**kwargs, "train": False}
        return method(*args, **kwargs)

    return nn.intercept_methods(call)


def predict_step(
    variables: dict[str, Any],
    batch: Batch,
    *,
    network: Callable[[dict[str, Any], jax.Array], tuple[jax.Array, Any]],
    config: Config,
    positive: int | None = None,
) -> dict[str, jax.Array]:
    """Returns `probabilities`, `logits` [B, C] and `row` [B]; `network` is a `FoldedModel` or `apply` (train=False)."""
    logits, _ = network(variables, normalize(batch["image"], config.input))
    return {
        "probabilities": outputs.probabilities(logits, positive),
        "logits": outputs.class_logits(logits, positive),
        "row": batch["row"],
    }
