"""The training state: one plain struct of arrays, everything a step reads and writes."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct


class TrainState(struct.PyTreeNode):
    """Arrays of one run. Random keys are not here: they follow from the seed and `step`."""

    step: jax.Array  # int32 scalar, steps done
    params: Any
    batch_stats: Any  # BatchNorm means and variances; {} for networks without
    opt_state: Any

    @property
    def variables(self) -> dict[str, Any]:
        """What `module.apply` takes."""
        return {"params": self.params, "batch_stats": self.batch_stats}


def create(
    module: nn.Module, optimizer: optax.GradientTransformation, image_shape: tuple[int, ...], seed: int
) -> TrainState:
    """Initialises a state for images of [height, width, channels]; pure, so it can be jitted."""
    variables = module.init(jax.random.key(seed), jnp.zeros((1, *image_shape)), train=False)
    params = variables["params"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=variables.get("batch_stats", {}),
        opt_state=optimizer.init(params),
    )
