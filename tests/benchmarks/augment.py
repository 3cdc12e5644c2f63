"""Times `lungjax.data.augment` against the preprocessing layers of Keras on its JAX backend, in one process.

    KERAS_BACKEND=jax python tests/benchmarks/augment.py [--rounds=5] [--no_step]

Needs the extra "parity". Prints markdown tables: images per second for a batch of 64 uint8 images of 224 x 224 with
flip, rotation, zoom and shift (constant fill, bilinear), one jitted call each, in turns, medians; the largest
gray-level difference for the parameters drawn by each Keras layer; and the time added to a training step.
"""

import argparse
import math
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
from keras import layers

from lungjax import models
from lungjax.config import AugmentConfig, ModelConfig
from lungjax.data.augment import affine, augment, warp
from lungjax.models.ops.conv import compiler_options
from lungjax.runtime import environment

BATCH, SIDE = 64, 224
CONFIG = AugmentConfig(flip_horizontal=0.5, rotation=0.1, zoom=(-0.2, 0.2), shift=(0.1, 0.1))


def medians(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Returns the median milliseconds of each call; they take turns, after one warm-up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            if turn:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def noise(channels: int, batch: int = BATCH) -> jax.Array:
    """Returns uint8 [batch, 224, 224, channels]."""
    return jnp.asarray(np.random.default_rng(0).integers(0, 256, (batch, SIDE, SIDE, channels), np.uint8))


def keras_layers() -> list[layers.Layer]:
    """Returns CONFIG as layers."""
    fill = {"fill_mode": "constant", "interpolation": "bilinear"}
    return [
        layers.RandomFlip("horizontal", seed=1),
        layers.RandomRotation(0.1, **fill, seed=2),
        layers.RandomZoom((-0.2, 0.2), **fill, seed=3),
        layers.RandomTranslation(0.1, 0.1, **fill, seed=4),
    ]


def rate_rows(rounds: int) -> None:
    """Prints the rates of Keras and of lungjax."""
    print("| channels | Keras, images/s | lungjax, images/s | times faster |\n| --- | ---: | ---: | ---: |")
    for channels in (3, 1):
        images = noise(channels)
        model = keras.Sequential(keras_layers())
        model.build(images.shape)
        theirs = jax.jit(lambda state, x, model=model: model.stateless_call([], state, x, training=True))
        seeds = [variable.value for variable in model.non_trainable_variables]
        ours = jax.jit(partial(augment, config=CONFIG, size=(SIDE, SIDE)))
        places = jnp.arange(BATCH, dtype=jnp.uint32)
        calls = {"keras": partial(theirs, seeds, images), "ours": partial(ours, images, places, jax.random.key(0))}
        ms = medians(calls, rounds)
        rates = {name: 1e3 * BATCH / value for name, value in ms.items()}
        print(f"| {channels} | {rates['keras']:.0f} | {rates['ours']:.0f} | {ms['keras'] / ms['ours']:.1f} |")


def agreement_rows() -> None:
    """Prints the difference between the warp and each layer, for the parameters that the layer drew."""
    print("\n| layer | largest difference, gray levels |\n| --- | ---: |")
    images = noise(3, 4)
    size = (SIDE, SIDE)
    for layer in keras_layers():
        parameters = layer.get_random_transformation(images, training=True)
        theirs = layer.transform_images(jnp.asarray(images, jnp.float32), parameters, training=True)
        if "angle" in parameters:
            ours = {"angle": parameters["angle"] * (math.pi / 180)}
        elif "height_zoom" in parameters:
            ours = {"zoom": jnp.concatenate([parameters["height_zoom"], parameters["width_zoom"]], 1)}
        elif "translations" in parameters:
            ours = {"shift": parameters["translations"][:, ::-1] / SIDE}
        else:
            left_right = parameters["flips"].reshape(-1)
            ours = {"flip": jnp.stack([jnp.zeros_like(left_right), left_right], -1)}
        image = warp(images, affine(size, size, **ours), size, "constant", 0.0)
        print(f"| {type(layer).__name__} | {float(jnp.abs(image - theirs).max()):.3f} |", flush=True)


def step_rows(rounds: int) -> None:
    """Prints the time of a training step of EfficientNet-Lite0 with and without augmentation."""
    batch = 16
    module = models.build(ModelConfig(name="efficientnet_lite0"), 3)
    images, labels = noise(3, batch), jnp.arange(batch) % 3
    places, key = jnp.arange(batch, dtype=jnp.uint32), jax.random.key(0)
    variables = jax.jit(partial(module.init, train=False))(key, jnp.zeros((1, SIDE, SIDE, 3)))

    def step(variables: Any, images: jax.Array, config: AugmentConfig) -> Any:
        x = augment(images, places, key, config, (SIDE, SIDE)) / 255

        def loss(params: Any) -> Any:
            network = {**variables, "params": params}
            (logits, _), updates = module.apply(
                network, x, train=True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(1)}
            )
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), updates

        (value, updates), grads = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        params = jax.tree.map(lambda p, g: p - 1e-3 * g, variables["params"], grads)
        return value, {"params": params, **updates}

    options = compiler_options()
    compiled = jax.jit(step, static_argnums=2, compiler_options=options)
    alone = jax.jit(lambda images: augment(images, places, key, CONFIG, (SIDE, SIDE)), compiler_options=options)
    times = medians(
        {
            "without": partial(compiled, variables, images, AugmentConfig()),
            "with": partial(compiled, variables, images, CONFIG),
            "augment alone": partial(alone, images),
        },
        rounds,
    )
    print(f"\n| efficientnet_lite0, {batch} x {SIDE} px, 3 channels | ms |\n| --- | ---: |")
    for name, ms in times.items():
        print(f"| {name} | {ms:.1f} |")
    print(f"| share of the step | {100 * times['augment alone'] / times['with']:.1f} % |")


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="calls of each, after a warm-up")
    parser.add_argument("--no_step", action="store_true", help="skip the training step")
    flags = parser.parse_args()
    if keras.backend.backend() != "jax":
        parser.error(f"Keras runs on {keras.backend.backend()}: set KERAS_BACKEND=jax")
    environment.keep_freed_memory()  # as training runs
    cores = len(os.sched_getaffinity(0))
    print(f"jax {jax.__version__}, keras {keras.__version__}, {jax.default_backend()}, {cores} cores\n")
    rate_rows(flags.rounds)
    agreement_rows()
    if not flags.no_step:
        step_rows(flags.rounds)


if __name__ == "__main__":
    main()
