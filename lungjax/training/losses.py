"""Cross-entropy of logits."""

import jax
import jax.numpy as jnp


def cross_entropy(
    logits: jax.Array,
    labels: jax.Array,
    *,
    class_weights: jax.Array,
    label_smoothing: float,
    positive: int | None,
) -> jax.Array:
    """Returns the weighted loss per example, [B] float32.

    Args:
      logits: [B, C] for softmax, or [B, 1] for one sigmoid logit.
      labels: [B] int class numbers.
      class_weights: [C]; the loss of an example is multiplied by the weight of its class and not divided by the sum of
        weights, as with Keras's `class_weight` (torch's `weight` divides).
      label_smoothing: 0..1, the fraction of the target spread evenly over the classes (arXiv 1512.00567).
      positive: positive class of the sigmoid output; None for softmax.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    classes = class_weights.shape[0]
    targets = jax.nn.one_hot(labels, classes) * (1 - label_smoothing) + label_smoothing / classes
    if positive is None:
        log_p = jax.nn.log_softmax(logits)
    else:
        log_p = jnp.concatenate([jax.nn.log_sigmoid(-logits), jax.nn.log_sigmoid(logits)], axis=-1)
        log_p = log_p if positive == 1 else log_p[:, ::-1]
    return -(targets * log_p).sum(-1) * class_weights[labels]
