"""Times inference at several batch sizes, and compares folded with plain batch norms.

python -m tests.benchmarks.inference [--batch_sizes | --folding] [--networks=NAME,...] [--rounds=5]
"""

import statistics
import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from lungjax import models
from lungjax.models.batch_norm_folding import FoldedModel
from lungjax.models.ops import conv
from tests.benchmarks import harness
from tests.benchmarks.harness import Times, timed
from tests.random_weights import random_variables

SIZES = (1, 2, 4, 8, 16, 32, 64)
SIDE, BATCH = 224, 8


class Network:
    """A network with random weights, plain and folded."""

    def __init__(self, name: str) -> None:
        self.module = models.MODELS[name]()
        self.variables = jax.tree.map(jnp.asarray, random_variables(self.module, (SIDE, SIDE, 3)))
        self.folded = FoldedModel(self.module, self.variables, (SIDE, SIDE, 3))
        self.first_fold = timed(lambda: self.folded.fold(self.variables))[0]
        self.fold = timed(lambda: self.folded.fold(self.variables))[0]
        self.folded_variables = self.folded.fold(self.variables)

    def compile(self, size: int, plain: bool = False) -> tuple[Callable[[], Times], float]:
        """Returns a function that times a batch, and the compilation time in seconds."""
        function = partial(self.module.apply, train=False) if plain else self.folded
        variables = self.variables if plain else self.folded_variables
        images = jax.device_put(np.random.default_rng(0).normal(size=(size, SIDE, SIDE, 3)).astype(np.float32))
        lowered = jax.jit(function, compiler_options=conv.compiler_options()).lower(variables, images)
        start = time.perf_counter()
        program = lowered.compile()
        return lambda: timed(lambda: program(variables, images)), time.perf_counter() - start


def batch_sizes(args: Namespace) -> None:
    print(harness.header("images per CPU second, relative to the best", "best", *map(str, SIZES)))
    for name in args.networks:
        network = Network(name)
        times = harness.take_turns({size: network.compile(size)[0] for size in SIZES}, args.rounds)
        rates = [size / statistics.median(used for _, used in times[size]) for size in SIZES]
        print(harness.row(name, f"{max(rates):.1f}", *(f"{rate / max(rates):.2f}" for rate in rates)), flush=True)


def folded_and_plain(args: Namespace) -> None:
    heads = (
        f"{BATCH} x {SIDE} px", "folded norms", "plain / folded, CPU time", "compile plain, s",
        "compile folded, s", "first fold, s", "fold, ms",
    )  # fmt: skip
    print(harness.header(*heads))
    for name in args.networks:
        network = Network(name)
        plain, plain_seconds = network.compile(BATCH, plain=True)
        folded, folded_seconds = network.compile(BATCH)
        times = harness.take_turns({"plain": plain, "folded": folded}, args.rounds)
        ratio = harness.ratio(*([used for _, used in times[key]] for key in ("plain", "folded")))
        cells = [name, len(network.folded.pairs), ratio, f"{plain_seconds:.1f}", f"{folded_seconds:.1f}"]
        print(harness.row(*cells, f"{network.first_fold:.2f}", f"{1e3 * network.fold:.0f}"), flush=True)


def main() -> None:
    networks = ["efficientnet_b0", "resnet50", "convnext_tiny", "cbr_small"]
    args = harness.parse(__doc__, batch_sizes=False, folding=False, networks=networks, rounds=5)
    harness.keep_freed_memory()
    print(f"{harness.machine()}, float32\n")
    if not args.folding:
        batch_sizes(args)
        print()
    if not args.batch_sizes:
        folded_and_plain(args)


if __name__ == "__main__":
    main()
