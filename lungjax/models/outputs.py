"""Converts the logits of a softmax or sigmoid head to class probabilities in label order."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lungjax.config import Config
from lungjax.models.ops.conv import to_float32


def positive_class(config: Config, classes: tuple[str, ...]) -> int | None:
    """Returns the label of the positive class of a sigmoid head, or None for softmax. Raises ValueError if unknown."""
    name = config.model.head.positive_class
    if not name:
        return None
    if name not in classes:
        raise ValueError(f"model.head.positive_class={name!r}: the data set has {', '.join(classes)}")
    return classes.index(name)


def class_logits(logits: jax.Array, positive: int | None) -> jax.Array:
    """Returns float32 logits [B, C] in label order; for a sigmoid head (`positive` is set), the other class has 0."""
    logits = to_float32(logits)
    if positive is None:
        return logits
    pair = jnp.concatenate([jnp.zeros_like(logits), logits], axis=-1)
    return pair if positive == 1 else pair[:, ::-1]


def probabilities(logits: jax.Array, positive: int | None, temperature: float = 1.0) -> jax.Array:
    """Returns class probabilities [B, C] in label order, calibrated by `temperature`; [B, 2] for a sigmoid head."""
    return jax.nn.softmax(class_logits(logits, positive) / jnp.float32(temperature))


def with_tta(network: Callable[[Any, jax.Array], Any], tta: str) -> Callable[[Any, jax.Array], Any]:
    """Returns `network`, a function of variables and images [B, H, W, C], with the test-time augmentation `eval.tta`.

    With "flip", logits and the last map are means over the images and their mirrors. Logits are averaged, not
    probabilities, so that the temperature applies as without augmentation.
    """
    if tta == "none":
        return network

    def averaged(variables: Any, images: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        views = [network(variables, view) for view in (images, images[:, :, ::-1])]
        logits, last = zip(*((to_float32(z), to_float32(features["last"])) for z, features in views), strict=True)
        return (logits[0] + logits[1]) / 2, {"last": (last[0] + last[1]) / 2}

    return averaged
