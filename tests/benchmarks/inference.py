"""Inference speed by batch size, and with folded against plain batch norms, optionally next to torch.

    python -m tests.benchmarks.inference [--batch_sizes | --folding] [--networks=NAME,...] [--rounds=5]
        [--torch_python=PYTHON]

`PYTHON` needs torch and torchvision.
"""

import contextlib
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from tests.benchmarks import harness
from tests.benchmarks.harness import Times, timed

NETWORKS = ["efficientnet_b0", "resnet50", "convnext_tiny", "cbr_small"]
SIZES = (1, 2, 4, 8, 16, 32, 64)
SIDE, BATCH = 224, 8
TORCHVISION = {  # its names
    "efficientnetv2_s": "efficientnet_v2_s", "mobilenetv2": "mobilenet_v2",
    **{name: name for name in ("efficientnet_b0", "resnet18", "resnet50", "convnext_tiny", "densenet121", "vgg16")},
}  # fmt: skip


def torch_network(name: str) -> tuple[str, Callable[[int], Times]]:
    """Returns the version of torch, and a function from a batch size to the times of a call."""
    import torch

    from tests.parity.references import import_torchvision

    torch.set_num_threads(harness.cores())
    network = getattr(import_torchvision(torch).models, name)
    model = network(weights=None).eval().to(memory_format=torch.channels_last)
    images: dict[int, Any] = {}

    def call(size: int) -> Times:
        with torch.inference_mode():
            if size not in images:
                images[size] = torch.randn(size, 3, SIDE, SIDE).contiguous(memory_format=torch.channels_last)
                model(images[size])
            return timed(lambda: model(images[size]))

    return f"torch {torch.__version__}", call


@contextlib.contextmanager
def torch_process(python: str, name: str) -> Iterator[tuple[str, Any]]:
    """Yields the version of torch and a function from a batch size to the times of a call; None without torch."""
    if not python or name not in TORCHVISION:
        yield "", None
        return
    process = harness.Process(python, "inference", "torch_network", name=TORCHVISION[name])
    try:
        yield process.answer(), lambda size: process.ask(size=size)
    finally:
        process.close()


class Network:
    """One network with random weights, plain and folded."""

    def __init__(self, name: str) -> None:
        import jax
        import jax.numpy as jnp

        from lungjax import models
        from lungjax.models.batch_norm_folding import FoldedModel
        from tests.random_weights import random_variables

        self.module = models.MODELS[name]()
        self.variables = jax.tree.map(jnp.asarray, random_variables(self.module, (SIDE, SIDE, 3)))
        self.folded = FoldedModel(self.module, self.variables, (SIDE, SIDE, 3))
        self.trace = timed(lambda: self.folded.pairs)[0]
        self.first_fold = timed(lambda: self.folded.fold(self.variables))[0]
        self.fold = timed(lambda: self.folded.fold(self.variables))[0]
        self.prepared = self.folded.fold(self.variables)

    def compile(self, size: int, plain: bool = False) -> tuple[Callable[[], Times], float]:
        """Returns a function with the times of a batch, and the seconds of compilation."""
        import jax
        import numpy as np

        from lungjax.models.ops import conv

        function = partial(self.module.apply, train=False) if plain else self.folded
        variables = self.variables if plain else self.prepared
        images = jax.device_put(np.random.default_rng(0).normal(size=(size, SIDE, SIDE, 3)).astype(np.float32))
        lowered = jax.jit(function, compiler_options=conv.compiler_options()).lower(variables, images)
        start = time.perf_counter()
        program = lowered.compile()
        return lambda: timed(lambda: program(variables, images)), time.perf_counter() - start


def batch_sizes(args: Namespace) -> None:
    print(harness.header("images per second, relative to the best", "best", *map(str, SIZES)))
    for name in args.networks:
        network = Network(name)
        calls: dict[Any, Any] = {("lungjax", size): network.compile(size)[0] for size in SIZES}
        with torch_process(args.torch_python, name) as (version, torch):
            calls |= {(version, size): partial(torch, size) for size in SIZES if torch}
            times = harness.take_turns(calls, args.rounds)
        for library in dict.fromkeys(library for library, _ in calls):
            for which, unit in enumerate(("s", "processor second")):
                rates = [size / statistics.median(t[which] for t in times[library, size]) for size in SIZES]
                shares = (f"{rate / max(rates):.2f}" for rate in rates)
                print(harness.row(f"{name}, {library}", f"{max(rates):.1f} per {unit}", *shares), flush=True)


def folded_and_plain(args: Namespace) -> None:
    heads = (
        f"{BATCH} x {SIDE} px", "folded norms", "plain, ms", "folded, ms", "plain / folded", "torch / folded",
        "compile plain, s", "folded, s", "find pairs, s", "first fold, s", "fold, ms",
    )  # fmt: skip
    print(harness.header(*heads))
    for name in args.networks:
        network = Network(name)
        plain, plain_seconds = network.compile(BATCH, plain=True)
        folded, folded_seconds = network.compile(BATCH)
        calls: dict[Any, Any] = {"plain": plain, "folded": folded}
        with torch_process(args.torch_python, name) as (_, torch):
            calls |= {"torch": partial(torch, BATCH)} if torch else {}
            times = harness.take_turns(calls, args.rounds)
        ratios = {}
        for key in calls:
            pairs = list(zip(times[key], times["folded"], strict=True))
            ratios[key] = ", ".join(f"{statistics.median(a[i] / b[i] for a, b in pairs):.2f}" for i in (0, 1))
        ms = [f"{1e3 * statistics.median(wall for wall, _ in times[key]):.0f}" for key in ("plain", "folded")]
        cells = [name, len(network.folded.pairs), *ms, ratios["plain"], ratios.get("torch", "-")]
        cells += [f"{plain_seconds:.1f}", f"{folded_seconds:.1f}", f"{network.trace:.2f}", f"{network.first_fold:.2f}"]
        print(harness.row(*cells, f"{1e3 * network.fold:.0f}"), flush=True)


def main() -> None:
    args = harness.parse(__doc__, batch_sizes=False, folding=False, networks=NETWORKS, rounds=5, torch_python="")
    harness.keep_freed_memory()
    print(f"{harness.machine()}, float32\n")
    if not args.folding:
        batch_sizes(args)
        print()
    if not args.batch_sizes:
        folded_and_plain(args)


if __name__ == "__main__":
    main()
