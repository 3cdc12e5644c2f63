"""Network input: pixels in 0..255 normalized as the weights require."""

import jax
import jax.numpy as jnp

from lungjax.config import InputSpec
from lungjax.models.ops.conv import to_float32


def normalize(images: jax.Array, spec: InputSpec) -> jax.Array:
    """Maps [B, H, W, C] in 0..255 to float32 (x / 255 - mean) / std; a mean or std of None is 0 or 1.

    A grayscale image becomes [B, H, W, 3] if mean or std have three numbers.
    """
    mean, std = (jnp.asarray(x, jnp.float32) for x in (spec.mean or (0.0,), spec.std or (1.0,)))
    return (to_float32(images) / 255.0 - mean) / std
