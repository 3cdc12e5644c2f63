"""Times `lungjax.data.augment` against the preprocessing layers of Keras on its JAX backend, in one process.

    KERAS_BACKEND=jax python tests/benchmarks/augment.py [--rounds=5] [--no_step] [--forms]

Needs the extra "parity". Prints markdown tables: images per second of a batch of 64 uint8 images of 224 x 224 under
flip, rotation, zoom and shift (constant fill, bilinear), each side one jitted call, called in turns, medians; the
largest gray-level difference of the two for numbers that Keras drew, layer by layer; and what the augmentation adds
to a training step. `--forms` times other ways to write the warp.
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
    """Returns the median milliseconds of each call, made in turns after one to warm up."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            if turn:
                taken[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(times) for name, times in taken.items()}


def pictures(channels: int, batch: int = BATCH) -> jax.Array:
    """Returns uint8 [batch, 224, 224, channels] of noise."""
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
        images = pictures(channels)
        model = keras.Sequential(keras_layers())
        model.build(images.shape)
        theirs = jax.jit(lambda state, x, model=model: model.stateless_call([], state, x, training=True))
        seeds = [variable.value for variable in model.non_trainable_variables]
        ours = jax.jit(partial(augment, config=CONFIG, size=(SIDE, SIDE)))
        places = jnp.arange(BATCH, dtype=jnp.uint32)
        calls = {
            "keras": partial(theirs, seeds, images),
            "ours": partial(ours, images, places, jax.random.key(0)),
        }
        taken = medians(calls, rounds)
        rates = {name: 1e3 * BATCH / ms for name, ms in taken.items()}
        print(f"| {channels} | {rates['keras']:.0f} | {rates['ours']:.0f} | {taken['keras'] / taken['ours']:.1f} |")


def agreement_rows() -> None:
    """Prints how far the warp is from each layer, for the numbers that the layer drew."""
    print("\n| layer | largest difference, gray levels |\n| --- | ---: |")
    images = pictures(3, 4)
    size = (SIDE, SIDE)
    for layer in keras_layers():
        drawn = layer.get_random_transformation(images, training=True)
        theirs = layer.transform_images(jnp.asarray(images, jnp.float32), drawn, training=True)
        if "angle" in drawn:
            ours = {"angle": drawn["angle"] * (math.pi / 180)}
        elif "height_zoom" in drawn:
            ours = {"zoom": jnp.concatenate([drawn["height_zoom"], drawn["width_zoom"]], 1)}
        elif "translations" in drawn:
            ours = {"shift": drawn["translations"][:, ::-1] / SIDE}
        else:
            left_right = drawn["flips"].reshape(-1)
            ours = {"flip": jnp.stack([jnp.zeros_like(left_right), left_right], -1)}
        image = warp(images, affine(size, size, **ours), size, "constant", 0.0)
        print(f"| {type(layer).__name__} | {float(jnp.abs(image - theirs).max()):.3f} |", flush=True)


def step_rows(rounds: int) -> None:
    """Prints a training step of EfficientNet-Lite0 without and with the augmentation."""
    batch = 16
    module = models.build(ModelConfig(name="efficientnet_lite0"), 3)
    images, labels = pictures(3, batch), jnp.arange(batch) % 3
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
    taken = medians(
        {
            "without": partial(compiled, variables, images, AugmentConfig()),
            "with": partial(compiled, variables, images, CONFIG),
            "augment alone": partial(alone, images),
        },
        rounds,
    )
    print(f"\n| efficientnet_lite0, {batch} x {SIDE} px, 3 channels | ms |\n| --- | ---: |")
    for name, ms in taken.items():
        print(f"| {name} | {ms:.1f} |")
    print(f"| share of the step | {100 * taken['augment alone'] / taken['with']:.1f} % |")


def form_rows(rounds: int) -> None:
    """Prints other forms of the warp beside the one that is used; constant fill of 0."""
    print("\n| form | 3 channels, ms | 1 channel, ms |\n| --- | ---: | ---: |")
    table: dict[str, list[float]] = {}
    for channels in (3, 1):
        images = pictures(channels)
        angles = jnp.linspace(-0.6, 0.6, BATCH)
        matrix = affine((SIDE, SIDE), (SIDE, SIDE), angle=angles, zoom=jnp.linspace(0.8, 1.2, 2 * BATCH).reshape(-1, 2))
        forms = {
            "used: four gathers of uint8": lambda i, m: warp(i, m, (SIDE, SIDE), "constant", 0.0),
            "four gathers of float32": lambda i, m: warp(i.astype(jnp.float32), m, (SIDE, SIDE), "constant", 0.0),
            "one gather of 2 x 2 windows": partial(_windowed, pack=False),
            "2 x 2 uint8 in one uint32, one gather": partial(_windowed, pack=True),
            "lax.map over the batch": lambda i, m: jax.lax.map(
                lambda one: warp(one[0][None], one[1][None], (SIDE, SIDE), "constant", 0.0)[0], (i, m)
            ),
        }
        wanted = forms["used: four gathers of uint8"](images, matrix)
        calls = {}
        for name, form in forms.items():
            call = jax.jit(form)
            assert float(jnp.abs(call(images, matrix) - wanted).max()) < 0.01, name
            calls[name] = partial(call, images, matrix)
        for name, ms in medians(calls, rounds).items():
            table.setdefault(name, []).append(ms)
    for name, (three, one) in table.items():
        print(f"| {name} | {three:.1f} | {one:.1f} |")


def _windowed(images: jax.Array, matrix: jax.Array, pack: bool) -> jax.Array:
    """The warp with one gather a pixel, of a 2 x 2 window: a slice, or one word for each channel."""
    h, w, channels = images.shape[1:]
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    bits = 28 - max(h, w).bit_length()
    steps = jnp.round(matrix * 2.0**bits).astype(jnp.int32)[:, :, :, None, None]
    ys, xs = jnp.arange(h)[:, None], jnp.arange(w)
    places, weights = [], []
    for row, length in enumerate((h, w)):
        at = jnp.clip(steps[:, row, 0] * ys + steps[:, row, 1] * xs + steps[:, row, 2], -(1 << bits), length << bits)
        places.append(jnp.minimum(at >> bits, length - 1) + 1)
        weights.append((at - ((places[-1] - 1) << bits)).astype(jnp.float32)[..., None] * 2.0**-bits)
    if pack:
        p = padded.astype(jnp.uint32)
        words = p[:, :-1, :-1] | p[:, :-1, 1:] << 8 | p[:, 1:, :-1] << 16 | p[:, 1:, 1:] << 24
        words = words.reshape(images.shape[0], -1, channels)
        at = places[0] * (w + 1) + places[1]
        found = jax.vmap(lambda image, at: image.at[at].get(mode="promise_in_bounds"))(words, at)
        corners = [(found >> shift & 255).astype(jnp.int32).astype(jnp.float32) for shift in (0, 8, 16, 24)]
    else:
        numbers = jax.lax.GatherDimensionNumbers((2, 3, 4), (), (0, 1))
        found = jax.vmap(lambda i, at: jax.lax.gather(i, at, numbers, (2, 2, channels), mode="promise_in_bounds"))(
            padded, jnp.stack(places, -1)
        ).astype(jnp.float32)
        corners = [found[..., y, x, :] for y in (0, 1) for x in (0, 1)]
    upper = corners[0] + weights[1] * (corners[1] - corners[0])
    lower = corners[2] + weights[1] * (corners[3] - corners[2])
    return upper + weights[0] * (lower - upper)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="calls of each, after one to warm up")
    parser.add_argument("--no_step", action="store_true", help="leave the training step out")
    parser.add_argument("--forms", action="store_true", help="time other forms of the warp, too")
    flags = parser.parse_args()
    if keras.backend.backend() != "jax":
        parser.error(f"Keras runs on {keras.backend.backend()}: set KERAS_BACKEND=jax")
    environment.keep_freed_memory()  # as training runs
    cores = len(os.sched_getaffinity(0))
    print(f"jax {jax.__version__}, keras {keras.__version__}, {jax.default_backend()}, {cores} cores\n")
    rate_rows(flags.rounds)
    agreement_rows()
    if flags.forms:
        form_rows(flags.rounds)
    if not flags.no_step:
        step_rows(flags.rounds)


if __name__ == "__main__":
    main()
