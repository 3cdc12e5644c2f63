"""Times `lungjax.data.augment` against Keras's preprocessing layers on jax, in one process.

KERAS_BACKEND=jax python -m tests.benchmarks.augment [--rounds=5]        # extra "parity"
"""

import math
import sys
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
from keras import layers

from lungjax import models
from lungjax.config import AugmentConfig, ModelConfig
from lungjax.data.augment import affine, augment, warp
from lungjax.models.ops.conv import compiler_options
from tests.benchmarks import harness

BATCH, SIDE = 64, 224
CONFIG = AugmentConfig(flip_horizontal=0.5, rotation=0.1, zoom=(-0.2, 0.2), shift=(0.1, 0.1))


def noise(channels: int, batch: int = BATCH) -> jax.Array:
    """Returns random images, uint8 [batch, 224, 224, channels]."""
    return jnp.asarray(np.random.default_rng(0).integers(0, 256, (batch, SIDE, SIDE, channels), np.uint8))


def keras_layers() -> list[layers.Layer]:
    fill = {"fill_mode": "constant", "interpolation": "bilinear"}
    zoom, shift = layers.RandomZoom((-0.2, 0.2), **fill, seed=3), layers.RandomTranslation(0.1, 0.1, **fill, seed=4)
    return [layers.RandomFlip("horizontal", seed=1), layers.RandomRotation(0.1, **fill, seed=2), zoom, shift]


def rate_rows(rounds: int) -> None:
    print(harness.header("channels", "Keras, images/s", "lungjax, images/s", "times faster"))
    for channels in (3, 1):
        images = noise(channels)
        model = keras.Sequential(keras_layers())
        model.build(images.shape)
        theirs = jax.jit(lambda state, x, model=model: model.stateless_call([], state, x, training=True))
        seeds = [variable.value for variable in model.non_trainable_variables]
        ours = jax.jit(partial(augment, config=CONFIG, size=(SIDE, SIDE)))
        places = jnp.arange(BATCH, dtype=jnp.uint32)
        calls = {"keras": partial(theirs, seeds, images), "ours": partial(ours, images, places, jax.random.key(0))}
        ms = harness.median_ms(calls, rounds)
        rates = (f"{1e3 * BATCH / value:.0f}" for value in ms.values())
        print(harness.row(channels, *rates, f"{ms['keras'] / ms['ours']:.1f}"))


def agreement_rows() -> None:
    """Prints the largest difference between our warp and each Keras layer for the layer's random parameters."""
    print("\n" + harness.header("layer", "largest difference, gray levels"))
    images = noise(3, 4)
    size = (SIDE, SIDE)
    for layer in keras_layers():
        parameters = layer.get_random_transformation(images, training=True)
        theirs = layer.transform_images(jnp.asarray(images, jnp.float32), parameters, training=True)
        match parameters:
            case {"angle": angle}:
                ours = {"angle": angle * (math.pi / 180)}
            case {"height_zoom": height, "width_zoom": width}:
                ours = {"zoom": jnp.concatenate([height, width], 1)}
            case {"translations": shifts}:
                ours = {"shift": shifts[:, ::-1] / SIDE}
            case {"flips": flips}:
                ours = {"flip": jnp.stack([jnp.zeros_like(flips), flips], -1).reshape(-1, 2)}
        image = warp(images, affine(size, size, **ours), size, "constant", 0.0)
        print(harness.row(type(layer).__name__, f"{float(jnp.abs(image - theirs).max()):.3f}"), flush=True)


def step_rows(rounds: int) -> None:
    """Prints the time of a training step of EfficientNet-Lite0 with and without augmentation."""
    batch = 16
    module = models.build(ModelConfig(name="efficientnet_lite0"), 3)
    images, labels = noise(3, batch), jnp.arange(batch) % 3
    places, key = jnp.arange(batch, dtype=jnp.uint32), jax.random.key(0)
    variables = jax.jit(partial(module.init, train=False))(key, jnp.zeros((1, SIDE, SIDE, 3)))

    def step(variables: Any, images: jax.Array, config: AugmentConfig) -> Any:
        x = augment(images, places, key, config, (SIDE, SIDE)) / 255
        return harness.sgd_step(module, variables, x, labels)

    options = compiler_options()
    compiled = jax.jit(step, static_argnums=2, compiler_options=options)
    alone = jax.jit(lambda images: augment(images, places, key, CONFIG, (SIDE, SIDE)), compiler_options=options)
    calls = {
        "without": partial(compiled, variables, images, AugmentConfig()),
        "with": partial(compiled, variables, images, CONFIG),
        "augment alone": partial(alone, images),
    }
    times = harness.median_ms(calls, rounds)
    rows = [(name, f"{ms:.1f}") for name, ms in times.items()]
    rows.append(("share of the step", f"{100 * times['augment alone'] / times['with']:.1f} %"))
    print("\n" + harness.table((f"efficientnet_lite0, {batch} x {SIDE} px, 3 channels", "ms"), rows))


def main() -> None:
    rounds = harness.parse(__doc__, rounds=5).rounds
    if keras.backend.backend() != "jax":
        sys.exit(f"Keras runs on {keras.backend.backend()}: set KERAS_BACKEND=jax")
    harness.keep_freed_memory()
    print(f"keras {keras.__version__}, {harness.machine()}\n")
    rate_rows(rounds)
    agreement_rows()
    step_rows(rounds)


if __name__ == "__main__":
    main()
