"""Random weights for any framework, drawn by numpy with a seed from each tensor's name.

Running statistics are random too, because their initial 0 and 1 could hide a swap of mean and variance.
"""

import re
import zlib
from typing import Any

import numpy as np

SCALES = r"(scale|gamma|weight|variable(_\d+)?|var|running_var|moving_variance)$"


def random_variables(module: Any, image_shape: tuple[int, ...]) -> dict[str, Any]:
    """Returns random variables of a linen network for images of shape `image_shape`."""
    from lungjax import models  # here: `draw` is also called in environments with torch alone
    from lungjax.models.trees import flatten, unflatten

    shapes = models.abstract_variables(module, image_shape)
    return unflatten({path: draw(path, leaf.shape) for path, leaf in flatten(shapes).items()})


def draw(name: str, shape: tuple[int, ...], gain: float = 1.0, shift: float = 0.0) -> np.ndarray:
    """Returns a float32 array: kernels have variance gain / inputs; scales and variances are in 0.5..1.5.

    `shift` is added to biases. If norms keep every map at mean 0 and variance 1, a shift of about 1 activates most
    units; with half of them inactive, a deep random network doubles rounding errors every few layers.
    """
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if len([n for n in shape if n > 1]) >= 2 and not re.search(r"grn", name):
        if re.search(r"weight$", name):  # torch: outputs first
            inputs = np.prod(shape[1:])
        else:  # a depthwise kernel of Keras is [h, w, C, 1]
            inputs = np.prod(shape[:2] if len(shape) == 4 and shape[-1] == 1 else shape[:-1])
        values = rng.standard_normal(shape, np.float32) * np.float32(np.sqrt(gain / inputs))
    elif re.search(SCALES, name):
        values = rng.uniform(0.5, 1.5, shape)
    else:  # bias, mean
        values = 0.1 * rng.standard_normal(shape) + (shift if re.search(r"(bias|beta)$", name) else 0.0)
    return np.asarray(values, np.float32)


def random_images(shape: tuple[int, ...]) -> np.ndarray:
    """Returns two images of `shape`."""
    return np.random.default_rng(1).normal(size=(2, *shape)).astype(np.float32)
