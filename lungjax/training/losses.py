"""Cross-entropy of logits."""

import jax
import optax

from lungjax.models import outputs


def cross_entropy(
    logits: jax.Array, labels: jax.Array, *, class_weights: jax.Array, label_smoothing: float, positive: int | None
) -> jax.Array:
    """Returns the weighted loss per example, [B] float32.

    Args:
      logits: [B, C] for softmax, or [B, 1] for one sigmoid logit.
      labels: [B] int class numbers.
      class_weights: [C]; the loss of an example is multiplied by the weight of its class and not divided by the sum of
        weights, as with Keras's `class_weight` (PyTorch's `weight` divides).
      label_smoothing: 0..1, the fraction of the target spread evenly over the classes (arXiv 1512.00567).
      positive: positive class of the sigmoid output; None for softmax.
    """
    targets = optax.smooth_labels(jax.nn.one_hot(labels, class_weights.shape[0]), label_smoothing)
    return optax.softmax_cross_entropy(outputs.class_logits(logits, positive), targets) * class_weights[labels]
