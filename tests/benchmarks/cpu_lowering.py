"""Times the CPU forms of `lungjax.models.ops` against the plain operations, alternating between the two in one process.

python -m tests.benchmarks.cpu_lowering [--layers | --steps] [--rounds=7] [--keep_freed]
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from lungjax import models
from lungjax.config import ModelConfig
from lungjax.models import layers
from lungjax.models.ops import conv
from tests.benchmarks import harness

# kind, batch, side, channels in, channels out, kernel, stride, padding
LAYERS = [
    ("depthwise", 8, 28, 144, 144, 3, 1, "SAME"), ("depthwise", 8, 14, 672, 672, 5, 1, "SAME"),
    ("depthwise", 8, 56, 96, 96, 7, 1, "SAME"), ("pointwise", 8, 56, 64, 256, 1, 1, "SAME"),
    ("dense", 8, 56, 48, 192, 3, 1, "SAME"), ("dense", 32, 60, 32, 64, 7, 1, "VALID"),
    ("dense", 32, 9, 128, 256, 7, 1, "VALID"), ("pool", 32, 122, 32, 32, 3, 2, "VALID"),
]  # fmt: skip


def row(name: str, part: str, function: Callable, args: tuple, rounds: int) -> None:
    """Compiles the plain operations, and ours with the options for training; prints a table row with the times."""
    with conv.plain_forms():
        plain = jax.jit(function).lower(*args).compile()
    ours = jax.jit(function, compiler_options=conv.compiler_options()).lower(*args).compile()
    ms = harness.median_ms({"ours": partial(ours, *args), "plain": partial(plain, *args)}, rounds)
    values = (ms["plain"], ms["ours"], ms["plain"] / ms["ours"])
    print(harness.row(name, part, *(f"{value:.1f}" for value in values)), flush=True)


def layer_rows(rounds: int) -> None:
    """Prints the rows for the forward pass and the gradients of single layers."""
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

        def gradients(x, kernel, dy, forward=forward):
            return jax.vjp(forward, x, kernel)[1](dy)

        name = f"{kind} {size}x{size}/{stride} {padding}, {batch} x {side} px, {channels} -> {features}"
        dy = jnp.asarray(draw(size=jax.eval_shape(forward, x, kernel).shape), jnp.float32)
        row(name, "forward", forward, (x, kernel), rounds)
        row(name, "gradients", gradients, (x, kernel, dy), rounds)


def step_rows(rounds: int) -> None:
    """Prints the rows for training steps (forward pass, gradients and SGD update)."""
    cases = [("efficientnetv2_b0", 8, 128), ("efficientnet_b0", 8, 128), ("cbr_small", 32, 128), ("simple", 32, 112)]
    for name, batch, side in cases:
        module = models.build(ModelConfig(name=name), 3)
        images = jnp.asarray(np.random.default_rng(0).normal(size=(batch, side, side, 1)), jnp.float32)
        labels = jnp.arange(batch) % 3
        variables = jax.jit(partial(module.init, train=False))(jax.random.key(0), images)
        step = partial(harness.sgd_step, module, labels=labels)
        row(f"{name}, {batch} x {side} px", "training step", step, (variables, images), rounds)


def main() -> None:
    flags = harness.parse(__doc__, layers=False, steps=False, rounds=7, keep_freed=False)
    if flags.keep_freed:
        harness.keep_freed_memory()
    print(f"{harness.machine()}, float32\n")
    print(harness.header("what", "part", "plain, ms", "ours, ms", "times faster"))
    if not flags.layers:
        step_rows(flags.rounds)
    if not flags.steps:
        layer_rows(flags.rounds)


if __name__ == "__main__":
    main()
