"""One configurable head for the networks of the five studies and the published architectures."""

from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn

from lungjax.config import HeadConfig
from lungjax.models.layers import BatchNorm
from lungjax.models.ops.conv import cpu_or_default, isolate_fusion, to_float32
from lungjax.models.ops.pooling import avg_pool_2x2

# Batch: Keras's defaults, which the studies use. Group and layer: as in the code of BiT and ConvNeXt, but without
# the fast variance (mean of squares minus square of mean), whose rounding errors the parity tests detect.
NORMS: dict[str | None, Callable[..., nn.Module]] = {
    "batch": partial(BatchNorm, momentum=0.99, epsilon=1e-3),
    "layer": partial(nn.LayerNorm, epsilon=1e-6, use_fast_variance=False),
    "group": partial(nn.GroupNorm, 32, epsilon=1e-5, use_fast_variance=False),
}
ACTIVATIONS = {"relu": nn.relu, "hard_swish": nn.hard_swish}

PLAIN = HeadConfig(
    pool="avg", norm_before_pool="none", norm_after_pool="none", hidden=(), activation="relu", hidden_dropout=0.0,
    dropout=0.0, output="softmax", zero_init=False,
)  # fmt: skip


def with_defaults(head: HeadConfig, published: HeadConfig = PLAIN) -> HeadConfig:
    """Returns `head` with each None replaced by the published value of the network, or else by that of `PLAIN`."""
    for source in (published, PLAIN):
        missing = {f.name: getattr(source, f.name) for f in fields(head) if getattr(head, f.name) is None}
        head = replace(head, **missing)
    return head


def output_count(head: HeadConfig, classes: int) -> int:
    """Returns the number of logits. Raises ValueError below two classes, and if a sigmoid output is impossible."""
    if classes < 2:
        raise ValueError(f"{classes} class(es): a classifier needs at least 2")
    if head.output == "sigmoid" and classes != 2:
        raise ValueError(f"model.head.output=sigmoid requires two classes, but the data set has {classes}; use softmax")
    if head.output == "sigmoid" and head.pool == "class_map":
        raise ValueError("model.head.output=sigmoid: the logits of pool=class_map are never negative; use softmax")
    return 1 if head.output == "sigmoid" else classes


class Head(nn.Module):
    """Norm and ReLU, pool, norm, dropout, hidden layers and the logit layer, all in float32 or wider."""

    config: HeadConfig  # fields of None take the value of `PLAIN`
    outputs: int  # logits

    @nn.compact
    def __call__(self, features: jax.Array, *, train: bool) -> jax.Array:
        """Maps the last feature map [B, h, w, c] to float32 logits [B, outputs]."""
        config = with_defaults(self.config)

        def norm(x: jax.Array, kind: str | None, name: str) -> jax.Array:
            options = {"train": train} if kind == "batch" else {}
            return NORMS[kind](name=name)(x, **options) if kind in NORMS else x

        x = norm(to_float32(features), config.norm_before_pool, "norm_before_pool")
        x = nn.relu(x) if config.norm_before_pool in ("batch", "group") else x
        x = norm(_pool(x, config.pool, train), config.norm_after_pool, "norm_after_pool")
        x = nn.Dropout(config.dropout, deterministic=not train, name="dropout")(x)
        init = nn.initializers.glorot_uniform()  # Keras's default, which all studies use
        for i, width in enumerate(config.hidden or (), 1):
            x = ACTIVATIONS[config.activation or "relu"](nn.Dense(width, kernel_init=init, name=f"hidden{i}")(x))
            x = nn.Dropout(config.hidden_dropout, deterministic=not train, name=f"hidden{i}_dropout")(x)
        init = nn.initializers.zeros_init() if config.zero_init else init
        logits = nn.Dense(self.outputs, kernel_init=init, name="dense")(x)
        return nn.relu(logits).mean((1, 2)) if config.pool == "class_map" else logits


def _pool(x: jax.Array, kind: str | None, train: bool) -> jax.Array:
    if kind == "avg":  # in prediction not fused with the activation before it, which would slow the sums on the CPU
        mean = partial(jnp.mean, axis=(1, 2))
        return mean(x) if train else cpu_or_default(x, cpu=partial(isolate_fusion, mean), default=mean)
    if kind == "max":
        return x.max((1, 2))
    if kind == "class_map":  # as in SqueezeNet: the classifier of every cell, then ReLU and the mean
        return x
    if kind == "avg2x2_flatten":
        x = avg_pool_2x2(x)  # an odd map loses its last row and column
    return x.reshape(x.shape[0], -1)
