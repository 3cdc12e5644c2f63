"""The training state: all arrays that a step reads and writes."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct

from lungjax.models import trees


class TrainState(struct.PyTreeNode):
    """The arrays of a run. Random keys are not among them, since they are derived from the seed and `step`."""

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
    seed: int,
    frozen: frozenset[str] = frozenset(),
    ema: bool = False,
    start: Mapping[str, jax.Array] | None = None,
) -> TrainState:
    """Initializes a state with the variables of `init`, and averages if `ema`.

    `frozen` are paths of parameters without optimizer state or average.
    """
    variables = init(module, image_shape, seed, start)
    trained = trees.split(variables["params"], frozen)[0]
    average = {"params": trained, "batch_stats": variables["batch_stats"]} if ema else {}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        bad_steps=jnp.zeros((), jnp.int32),
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        opt_state=optimizer.init(trained),
        ema=average,
    )


def init(
    module: nn.Module, image_shape: tuple[int, ...], seed: int, start: Mapping[str, jax.Array] | None = None
) -> dict[str, Any]:
    """Returns the variables for images of [height, width, channels], random except for the leaves of `start`."""
    random, start = module.init(jax.random.key(seed), jnp.zeros((1, *image_shape)), train=False), start or {}
    leaves = {name: trees.flatten(random.get(name, {})) for name in ("params", "batch_stats")}
    return {name: trees.unflatten({p: start.get(p, x) for p, x in own.items()}) for name, own in leaves.items()}
