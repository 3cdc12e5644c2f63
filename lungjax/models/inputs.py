"""What a network is fed: 0..255 to the float32 it was trained on."""

import jax
import jax.numpy as jnp

from lungjax.config import InputSpec


def normalize(images: jax.Array, spec: InputSpec) -> jax.Array:
    """Turns [B, H, W, C] in 0..255 into the float32 that the network wants, (x / 255 - mean) / std.

    A gray image becomes [B, H, W, 3] where mean or std have three numbers. 0 and 1 stand for None.
    """
    mean = jnp.asarray((0.0,) if spec.mean is None else spec.mean, jnp.float32)
    std = jnp.asarray((1.0,) if spec.std is None else spec.std, jnp.float32)
    return (images.astype(jnp.promote_types(images.dtype, jnp.float32)) / 255.0 - mean) / std
