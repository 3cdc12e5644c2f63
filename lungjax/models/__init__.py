"""Networks by name. Each is called as `module(images, train=...)` and returns (logits, features)."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from lungjax import config as configs
from lungjax.config import ModelConfig
from lungjax.models.efficientnet import EFFICIENTNET
from lungjax.models.head import fill, outputs
from lungjax.models.transfusion import TRANSFUSION

# Called without arguments, a constructor gives the published network with its 1000-class head.
MODELS: dict[str, Callable[[], Any]] = {**TRANSFUSION, **EFFICIENTNET}


def build(config: ModelConfig, classes: int, remat: bool = False) -> nn.Module:
    """Returns the network of `config` with one output a class, or one logit for a sigmoid head.

    Args:
      config: what it is; a field left None takes the architecture's published value.
      classes: of the data set, at least 2.
      remat: recompute each block's activations in the backward pass.

    The module maps images [B, H, W, C], normalised float32, to (logits [B, outputs] in float32, features);
    `features["last"]` is the last map [B, h, w, c], which the submodule `head` turns into the logits.

    Raises ValueError for an unknown name or dtype, for a padding or drop_path that the network doesn't leave
    open, and for a sigmoid with any but two classes.
    """
    if config.name not in MODELS:
        raise ValueError(f"model.name={config.name!r}: unknown network; {configs.nearest(config.name, MODELS)}")
    if config.dtype not in configs.DTYPES:
        raise ValueError(f"model.dtype={config.dtype!r}: allowed are {', '.join(configs.DTYPES)}")
    network = MODELS[config.name]()
    options = {"padding": config.padding, "drop_path": config.drop_path}
    given = {name: value for name, value in options.items() if value is not None}
    for name, value in given.items():
        if not hasattr(network, name):
            raise ValueError(f"model.{name}={value!r}: {config.name} has no such choice; leave it None")
    head = fill(config.head, network.head)
    return network.clone(
        head=head,
        outputs=outputs(head, classes),
        freeze_norm=config.freeze_norm,
        remat=remat,
        dtype=jnp.dtype(config.dtype),
        **given,
    )


def minimum_size(config: ModelConfig) -> tuple[int, int]:
    """Returns the least height and width in pixels that the network and its head work on."""
    return build(config, classes=2).minimum_size()
