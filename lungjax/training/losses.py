"""Cross-entropy loss."""

import jax
import optax

from lungjax.models import outputs


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
