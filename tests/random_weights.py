"""Random variables that any framework can be given: drawn by numpy, each from its own path.

Running statistics are drawn too: their initial 0 and 1 would hide a swapped mean and variance.
"""

import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from lungjax.trees import flatten, unflatten


def random_variables(module: nn.Module, image_shape: tuple[int, ...]) -> dict[str, Any]:
    """Returns variables for images of [1, *image_shape]; deep networks want `settled` statistics as well."""
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, *image_shape)), train=False))
    return unflatten({path: draw(path, leaf.shape) for path, leaf in flatten(shapes).items()})


def draw(path: str, shape: tuple[int, ...]) -> np.ndarray:
    rng = np.random.default_rng(zlib.crc32(path.encode()))
    kind = path.rpartition("/")[2]
    if kind == "kernel":
        values = rng.normal(size=shape) / np.sqrt(np.prod(shape[:-1]))
    elif kind in ("scale", "var"):
        values = rng.uniform(0.5, 1.5, shape)
        if path.endswith("project_bn/scale"):
            values *= 0.1  # quiet residual branches, or rounding errors double at every few blocks
    else:  # bias, mean
        values = 0.1 * rng.normal(size=shape)
    return values.astype(np.float32)


def random_images(shape: tuple[int, ...]) -> np.ndarray:
    """Returns two images of `shape`."""
    return np.random.default_rng(1).normal(size=(2, *shape)).astype(np.float32)


def settled(module: nn.Module, variables: dict[str, Any], images: np.ndarray, decay: float) -> dict[str, Any]:
    """Moves the running statistics to those of `images`.

    Without it random weights make the activations of a deep network fade, and all images alike, or explode.
    """
    empty = variables | {"batch_stats": jax.tree.map(np.zeros_like, variables["batch_stats"])}

    @jax.jit
    def run(empty):
        rngs = {"dropout": jax.random.key(0)}
        whole = module.clone(drop_path=0.0)
        return whole.apply(empty, images, train=True, rngs=rngs, mutable=["batch_stats"])[1]

    batch = run(empty)["batch_stats"]
    return variables | {"batch_stats": jax.tree.map(lambda new: np.asarray(new / (1 - decay)), batch)}
