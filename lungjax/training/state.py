"""The training state: all arrays that a step reads and writes."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct

from lungjax import models
from lungjax.models import trees


class TrainState(struct.PyTreeNode):
    """The arrays of a run. Random keys are not among them, since they are derived from `seed` and `step`."""

    seed: jax.Array  # uint32 scalar; not a constant, so that runs with other seeds use the same compiled programs
    step: jax.Array  # int32 scalar, completed steps, including skipped ones
    bad_steps: jax.Array  # int32 scalar, steps without an update; see `non_finite`
    params: Any
    batch_stats: Any  # means and variances of BatchNorm, or {}
    opt_state: Any
    ema: Any  # averages of trained parameters and of batch_stats as {"params", "batch_stats"}, or {}; see `optim.ema`

    @property
    def variables(self) -> dict[str, Any]:
        """The variables to validate, save and test: the averages if there are any."""
        if not self.ema:
            return {"params": self.params, "batch_stats": self.batch_stats}
        return {**self.ema, "params": trees.merge(self.params, self.ema["params"])}  # frozen ones are not averaged


def create(
    module: nn.Module,
    optimizer: optax.GradientTransformation,
    image_shape: tuple[int, ...],
    frozen: frozenset[str],
    ema: bool,
    seed: jax.Array,
    start: Mapping[str, jax.Array],
) -> TrainState:
    """Initializes a state for images of [height, width, channels], with random variables except for those of `start`.

    `frozen` are paths of parameters without optimizer state or average; there are averages if `ema`.
    """
    random = models.random_variables(module, image_shape, jax.random.key(seed))
    leaves = (trees.flatten(random.get(name, {})) for name in ("params", "batch_stats"))
    params, batch_stats = (trees.unflatten({p: start.get(p, x) for p, x in own.items()}) for own in leaves)
    trained = trees.split(params, frozen)[0]
    average = {"params": trained, "batch_stats": batch_stats} if ema else {}
    return TrainState(
        seed=seed,
        step=jnp.zeros((), jnp.int32),
        bad_steps=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        opt_state=optimizer.init(trained),
        ema=average,
    )
