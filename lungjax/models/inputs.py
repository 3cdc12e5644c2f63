"""Network input: normalization of pixels, and the batch size of predictions."""

import jax
import jax.numpy as jnp

from lungjax.config import Config, InputSpec
from lungjax.models.ops.conv import to_float32

CPU_BATCH = 8  # images per device
MAX_PIXELS = 64 * 224 * 224  # per batch and device on an accelerator
MAX_IMAGES = 256  # per device
MULTIPLE = 8  # of the batch size; accelerators compute in tiles of this size


def normalize(images: jax.Array, spec: InputSpec) -> jax.Array:
    """Maps images [B, H, W, C] in 0..255 to float32 (x / 255 - mean) / std; None stands for mean 0 or std 1.

    Grayscale images become [B, H, W, 3] if mean or std has three numbers.
    """
    mean, std = (jnp.asarray(x, jnp.float32) for x in (spec.mean or (0.0,), spec.std or (1.0,)))
    return (to_float32(images) / 255.0 - mean) / std


def prediction_batch_size(config: Config, devices: int, platform: str) -> int:
    """Returns the prediction batch size over all devices: `eval.batch_size`, or a default if that is 0.

    `platform` is "cpu", "gpu" or "tpu". On accelerators, the largest maps take 0.4 GB in bfloat16.
    """
    if config.eval.batch_size:
        return config.eval.batch_size
    if platform == "cpu":
        return CPU_BATCH * devices
    height, width = config.input.size
    images = min(MAX_PIXELS // (height * width), MAX_IMAGES)
    return devices * (images // MULTIPLE * MULTIPLE or max(images, 1))
