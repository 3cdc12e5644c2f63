"""The training state: one plain struct of arrays, everything a step reads and writes."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct

from lungjax.models import trees


class TrainState(struct.PyTreeNode):
    """Arrays of one run. Random keys are not here: they follow from the seed and `step`."""

    step: jax.Array  # int32 scalar, steps done, the left out ones too
    skipped: jax.Array  # int32 scalar, steps that changed nothing: loss or gradient was no number
    params: Any
    batch_stats: Any  # BatchNorm means and variances; {} for networks without
    opt_state: Any

    @property
    def variables(self) -> dict[str, Any]:
        """What `module.apply` takes."""
        return {"params": self.params, "batch_stats": self.batch_stats}


def create(
    module: nn.Module,
    optimizer: optax.GradientTransformation,
    image_shape: tuple[int, ...],
    seed: int,
    frozen: frozenset[str] = frozenset(),
    start: Mapping[str, jax.Array] | None = None,
) -> TrainState:
    """Initialises a state; pure, so it can be jitted, and then makes no random numbers that `start` replaces.

    Args:
      module: the network.
      optimizer: of the parameters that are trained.
      image_shape: [height, width, channels] as the network gets it.
      seed: of the random start.
      frozen: paths of parameters that the optimiser doesn't keep anything for.
      start: leaves by path ("stem_conv/kernel", "stem_bn/mean") that take the place of random ones.
    """
    variables = init(module, image_shape, seed, start)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        opt_state=optimizer.init(trees.split(variables["params"], frozen)[0]),
    )


def init(
    module: nn.Module, image_shape: tuple[int, ...], seed: int, start: Mapping[str, jax.Array] | None = None
) -> dict[str, Any]:
    """Returns {"params", "batch_stats"} for images of [height, width, channels], the leaves of `start` put in."""
    random = module.init(jax.random.key(seed), jnp.zeros((1, *image_shape)), train=False)
    variables = {}
    for collection in ("params", "batch_stats"):
        leaves = trees.flatten(random.get(collection, {}))
        variables[collection] = trees.unflatten({path: (start or {}).get(path, leaf) for path, leaf in leaves.items()})
    return variables


def size(tree: Any) -> int:
    """Returns the bytes of a tree of arrays or their shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
