"""Converts the logits of a softmax, sigmoid or multilabel head to probabilities in label order."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lungjax.config import Config
from lungjax.models.ops.conv import to_float32

Temperature = float | tuple[float, ...]  # the latter with one value per finding
EACH = -1  # in place of the positive class: every class is a finding with a probability of its own


def resolve(config: Config, labels: np.ndarray) -> Config:
    """Returns `config` with the output that suits the labels, [N] or [N, C]. Raises ValueError for another one."""
    head, several = config.model.head, labels.ndim == 2
    if several and head.output not in (None, "multilabel"):
        raise ValueError(f"model.head.output={head.output}: the images may have several findings; use multilabel")
    if not several and head.output == "multilabel":
        raise ValueError("model.head.output=multilabel needs a column of labels per finding; each image has one class")
    return replace(config, model=replace(config.model, head=replace(head, output="multilabel"))) if several else config


def positive_class(config: Config, classes: tuple[str, ...]) -> int | None:
    """Returns the positive class of a sigmoid head, None for softmax, EACH for multilabel; ValueError if unknown."""
    if config.model.head.output == "multilabel":
        return EACH
    name = config.model.head.positive_class
    if not name:
        return None
    if name not in classes:
        raise ValueError(f"model.head.positive_class={name!r}: the data set has {', '.join(classes)}")
    return classes.index(name)


def class_logits(logits: jax.Array, positive: int | None) -> jax.Array:
    """Returns float32 logits [B, C] in label order; for a sigmoid head (`positive` is set), the other class has 0."""
    logits = to_float32(logits)
    if positive in (None, EACH):
        return logits
    pair = jnp.concatenate([jnp.zeros_like(logits), logits], axis=-1)
    return pair if positive == 1 else pair[:, ::-1]


def probabilities(logits: jax.Array, positive: int | None, temperature: Temperature = 1.0) -> jax.Array:
    """Returns probabilities [B, C] in label order ([B, 2] for a sigmoid head), calibrated by `temperature`.

    Those of findings (EACH) are independent, and `temperature` may have one value for each.
    """
    scaled = class_logits(logits, positive) / jnp.asarray(temperature, jnp.float32)
    return jax.nn.sigmoid(scaled) if positive == EACH else jax.nn.softmax(scaled)


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
