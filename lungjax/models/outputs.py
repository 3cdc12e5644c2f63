"""What a network's logits mean: probabilities in label order, and whose a sigmoid's logit is."""

import jax
import jax.numpy as jnp

from lungjax.config import Config


def positive_class(config: Config, classes: tuple[str, ...]) -> int | None:
    """Returns the label number that a sigmoid head's logit speaks for, None for a softmax head.

    Raises ValueError for a class name that the data set doesn't have.
    """
    name = config.model.head.positive_class
    if not name:
        return None
    if name not in classes:
        raise ValueError(f"model.head.positive_class={name!r}: the data set has {', '.join(classes)}")
    return classes.index(name)


def class_logits(logits: jax.Array, positive: int | None) -> jax.Array:
    """Returns one logit a class, [B, C] float32 in label order, whose softmax are the probabilities.

    A sigmoid logit stands against a zero. `positive` is the class that it speaks for; None for softmax.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    if positive is None:
        return logits
    pair = jnp.concatenate([jnp.zeros_like(logits), logits], axis=-1)
    return pair if positive == 1 else pair[:, ::-1]


def probabilities(logits: jax.Array, positive: int | None) -> jax.Array:
    """Returns class probabilities [B, C] in label order; [B, 2] for a sigmoid logit."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    if positive is None:
        return jax.nn.softmax(logits)
    p = jax.nn.sigmoid(logits)
    pair = jnp.concatenate([1 - p, p], axis=-1)
    return pair if positive == 1 else pair[:, ::-1]


def pooled_features(last: jax.Array) -> jax.Array:
    """Returns the spatial mean of the last map [B, h, w, F], float32 [B, F]."""
    return last.astype(jnp.float32).mean((1, 2))
