"""Times the CPU forms of `lungjax.models.ops` against the plain operations, side by side in one process.

    python tests/benchmarks/cpu_lowering.py [--layers | --steps] [--rounds=7] [--keep_freed]

Prints a markdown table: milliseconds, medians over interleaved rounds. "plain" is `conv.plain_forms()` under `jax.jit`
with default options; "ours" is compiled as in training.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lungjax import models
from lungjax.config import ModelConfig
from lungjax.models import layers
from lungjax.models.ops import conv
from lungjax.runtime import environment

# kind, batch, side, channels in, channels out, kernel, stride, padding
LAYERS = [
    ("depthwise", 8, 28, 144, 144, 3, 1, "SAME"),
    ("depthwise", 8, 56, 144, 144, 3, 2, "SAME"),
    ("depthwise", 8, 14, 672, 672, 5, 1, "SAME"),
    ("depthwise", 8, 56, 96, 96, 7, 1, "SAME"),
    ("pointwise", 8, 56, 64, 256, 1, 1, "SAME"),
    ("pointwise", 8, 7, 1280, 320, 1, 1, "SAME"),
    ("dense", 8, 224, 3, 24, 3, 2, "SAME"),
    ("dense", 8, 112, 24, 24, 3, 1, "SAME"),
    ("dense", 8, 112, 24, 96, 3, 2, "SAME"),
    ("dense", 8, 56, 48, 192, 3, 1, "SAME"),
    ("dense", 32, 128, 1, 32, 7, 1, "VALID"),
    ("dense", 32, 60, 32, 64, 7, 1, "VALID"),
    ("dense", 32, 26, 64, 128, 7, 1, "VALID"),
    ("dense", 32, 9, 128, 256, 7, 1, "VALID"),
    ("pool", 32, 122, 32, 32, 3, 2, "VALID"),
]


def interleaved(ours: Callable, plain: Callable, args: tuple, rounds: int) -> tuple[float, float]:
    """Returns the median milliseconds of two compiled functions, called in turns."""
    times: tuple[list[float], list[float]] = [], []
    for _ in range(rounds + 1):
        for function, measured in zip((ours, plain), times, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(function(*args))
            measured.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[0][1:]), statistics.median(times[1][1:])  # the first is a warm-up


def compiled(function: Callable, args: tuple, plain: bool) -> Callable:
    """Compiles the plain operations, or ours as in training."""
    options = {} if plain else conv.compiler_options()
    with conv.plain_forms() if plain else nullcontext():
        return jax.jit(function, compiler_options=options).lower(*args).compile()


def row(name: str, part: str, function: Callable, args: tuple, rounds: int) -> None:
    """Prints one line of the table."""
    ours, plain = interleaved(*(compiled(function, args, plain) for plain in (False, True)), args, rounds)
    print(f"| {name} | {part} | {plain:.1f} | {ours:.1f} | {plain / ours:.1f} |", flush=True)


def layer_rows(rounds: int) -> None:
    """Prints forward and gradients of single layers."""
    draw = np.random.default_rng(0).normal
    for kind, batch, side, channels, features, size, stride, padding in LAYERS:
        depth = 1 if kind == "depthwise" else channels
        x = jnp.asarray(draw(size=(batch, side, side, channels)), jnp.float32)
        kernel = jnp.asarray(draw(size=(size, size, depth, features)), jnp.float32)
        fields = {"kernel_size": size, "strides": stride, "padding": padding}
        module = layers.Conv(features, groups=-1 if kind == "depthwise" else 1, **fields)

        def forward(x, kernel, module=module, kind=kind, size=size, stride=stride, padding=padding):
            if kind == "pool":
                return layers.max_pool(x, size, stride, padding)
            return module.apply({"params": {"kernel": kernel}}, x)

        def gradients(x, kernel, dy, forward=forward, image=channels <= 3):
            if image:  # training needs no gradient of the image
                return jax.vjp(lambda kernel: forward(x, kernel), kernel)[1](dy)
            return jax.vjp(forward, x, kernel)[1](dy)

        name = f"{kind} {size}x{size}/{stride} {padding}, {batch} x {side} px, {channels} -> {features}"
        dy = jnp.asarray(draw(size=jax.eval_shape(forward, x, kernel).shape), jnp.float32)
        row(name, "forward", forward, (x, kernel), rounds)
        row(name, "gradients", gradients, (x, kernel, dy), rounds)


def step_rows(rounds: int) -> None:
    """Prints whole training steps: forward, gradients, SGD."""
    cases = [("efficientnetv2_b0", 8, 128), ("efficientnet_b0", 8, 128), ("cbr_small", 32, 128), ("simple", 32, 112)]
    for name, batch, side in cases:
        module = models.build(ModelConfig(name=name), 3)
        images = jnp.asarray(np.random.default_rng(0).normal(size=(batch, side, side, 1)), jnp.float32)
        labels = jnp.arange(batch) % 3
        variables = jax.jit(partial(module.init, train=False))(jax.random.key(0), images)

        def step(variables, images, module=module, labels=labels):
            def loss(params):
                options = {"train": True, "mutable": ["batch_stats"], "rngs": {"dropout": jax.random.key(1)}}
                (logits, _), updates = module.apply({**variables, "params": params}, images, **options)
                return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), updates

            (value, updates), grads = jax.value_and_grad(loss, has_aux=True)(variables["params"])
            params = jax.tree.map(lambda p, g: p - 1e-3 * g, variables["params"], grads)
            return value, {"params": params, **updates}

        row(f"{name}, {batch} x {side} px", "training step", step, (variables, images), rounds)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--layers", action="store_true", help="single layers only")
    only.add_argument("--steps", action="store_true", help="whole training steps only")
    parser.add_argument("--rounds", type=int, default=7, help="calls of each, after a warm-up")
    parser.add_argument("--keep_freed", action="store_true", help="keep freed memory, as in training")
    flags = parser.parse_args()
    if flags.keep_freed:
        environment.keep_freed_memory()
    print(f"jax {jax.__version__}, {jax.default_backend()}, {len(os.sched_getaffinity(0))} cores, float32\n")
    print("| what | part | plain, ms | ours, ms | times faster |\n| --- | --- | ---: | ---: | ---: |")
    if not flags.layers:
        step_rows(flags.rounds)
    if not flags.steps:
        layer_rows(flags.rounds)


if __name__ == "__main__":
    main()
