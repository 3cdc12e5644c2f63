"""Network input: pixels normalized as the weights require, in batches of a size that suits the platform."""

import jax
import jax.numpy as jnp

from lungjax.config import Config, InputSpec
from lungjax.models.ops.conv import to_float32

CPU_BATCH = 8  # images per device
MAX_PIXELS = 64 * 224 * 224  # of a batch on an accelerator, per device
MAX_IMAGES = 256  # per device
MULTIPLE = 8  # of images: accelerators compute in tiles of this size


def normalize(images: jax.Array, spec: InputSpec) -> jax.Array:
    """Maps [B, H, W, C] in 0..255 to float32 (x / 255 - mean) / std; None is a mean of 0 or a std of 1.

    A grayscale image becomes [B, H, W, 3] if mean or std have three numbers.
    """
    mean, std = (jnp.asarray(x, jnp.float32) for x in (spec.mean or (0.0,), spec.std or (1.0,)))
    return (to_float32(images) / 255.0 - mean) / std


def prediction_batch_size(config: Config, devices: int, platform: str) -> int:
    """Returns the prediction batch size over all devices: `eval.batch_size`, or if that is 0, a rule.

    It depends on image size, platform and number of devices, never on a measurement at run time, so a configuration is
    always split into the same batches on the same kind of machine.

    CPU: 8 per device. At 224 px (tests/benchmarks/inference.py) throughput with 1 image is 3 to 13 % below the best,
    with 4 to 16 at most 4 %, and with 64 up to 7 %, at eight times the memory and with more padding in the last batch.

    GPU and TPU: as many pixels per device as 64 images of 224 x 224, a multiple of 8 images, at most 256. Not measured:
    the largest maps (VGG's first, the stem of BiT R152x4) then take 0.4 GB in bfloat16, and a few are live at a time.

    Args:
      config: its `eval.batch_size` and `input.size` are used.
      devices: number of devices that share each batch.
      platform: "cpu", "gpu" or "tpu".
    """
    if config.eval.batch_size:
        return config.eval.batch_size
    if platform == "cpu":
        return CPU_BATCH * devices
    height, width = config.input.size
    images = min(MAX_PIXELS // (height * width), MAX_IMAGES)
    return devices * (images // MULTIPLE * MULTIPLE or max(images, 1))
