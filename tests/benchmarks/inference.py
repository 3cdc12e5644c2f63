"""Inference speed by batch size, and with folded against plain batch norms, optionally next to torch.

    python -m tests.benchmarks.inference [--batch_sizes | --folding] [--networks=NAME,...] [--sizes=1,2,4,...]
        [--rounds=5] [--side=224] [--torch_python=PYTHON]

Everything that is compared is compiled first and then called in turns. The first table has images per second of the
folded network by batch size, divided by its best, by wall time and by processor time. The second compares folded and
plain norms at one batch size: milliseconds per call; the median ratio over rounds, by wall time and by processor time;
seconds to compile both, to find the pairs, to fold for the first time and (ms) again. With `PYTHON`, which needs torch
and torchvision, torch takes a turn in both: eager, channels last, evaluation mode, `inference_mode`, one thread per
core, in a separate process that is idle otherwise. Prints markdown.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

NETWORKS = "efficientnet_b0,resnet50,convnext_tiny,cbr_small"
SIZES = "1,2,4,8,16,32,64"
TORCHVISION = {  # names that differ
    "efficientnetv2_s": "efficientnet_v2_s",
    "mobilenetv2": "mobilenet_v2",
}
WITH_TORCH = ("efficientnet_b0", "efficientnetv2_s", "resnet18", "resnet50", "convnext_tiny", "mobilenetv2",
              "densenet121", "vgg16")  # fmt: skip

Times = tuple[float, float]  # wall seconds, and processor seconds of all threads


def timed(function: Callable[[], Any]) -> Times:
    """Returns the times of a call."""
    start, used = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - start, time.process_time() - used


def serve_torch(name: str, side: int, threads: int) -> None:
    """Answers each line with a batch size by a line with the times of a call."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of libraries must not come between
    import torch

    # A CPU build of torch may lack operators that torchvision declares at import; none is used here.
    operators = torch.library.Library("torchvision", "DEF")
    pools = ("roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d")
    signatures = {"nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"}
    signatures |= dict.fromkeys(
        [*pools, *(f"_{pool}_backward" for pool in pools), "qroi_align", "qnms"], "(...) -> ..."
    )
    for operator, signature in signatures.items():
        with contextlib.suppress(RuntimeError):
            operators.define(operator + signature)
    import torchvision

    torch.set_num_threads(threads)
    network = getattr(torchvision.models, TORCHVISION.get(name, name))
    model = network(weights=None).eval().to(memory_format=torch.channels_last)
    print(json.dumps(f"torch {torch.__version__}"), file=out, flush=True)
    images: dict[int, Any] = {}
    with torch.inference_mode():
        for line in sys.stdin:
            size = int(line)
            if size not in images:
                images[size] = torch.randn(size, 3, side, side).contiguous(memory_format=torch.channels_last)
                model(images[size])
            print(json.dumps(timed(partial(model, images[size]))), file=out, flush=True)


@contextlib.contextmanager
def torch_process(python: str, name: str, side: int) -> Any:
    """Yields the version of torch and a function from a batch size to the times of a call; None without torch."""
    if not python or name not in WITH_TORCH:
        yield None, None
        return
    command = [python, "-m", "tests.benchmarks.inference", f"--serve={name}", f"--side={side}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        version = json.loads(process.stdout.readline())

        def call(size: int) -> Times:
            print(size, file=process.stdin, flush=True)
            return json.loads(process.stdout.readline())

        yield version, call
        process.stdin.close()


def take_turns(calls: dict[Any, Callable[[], Times]], rounds: int) -> dict[Any, list[Times]]:
    """Returns the times of each call, after one round to warm up."""
    times: dict[Any, list[Times]] = {key: [] for key in calls}
    for number in range(rounds + 1):
        for key, call in calls.items():
            taken = call()
            if number:
                times[key].append(taken)
    return times


class Network:
    """One network with random weights, plain and folded."""

    def __init__(self, name: str, side: int) -> None:
        """Draws weights, traces and folds; measures the time of each."""
        import jax
        import jax.numpy as jnp

        from lungjax import models
        from lungjax.models import folding
        from tests.random_weights import random_variables

        self.side, self.module = side, models.MODELS[name]()
        self.variables = jax.tree.map(jnp.asarray, random_variables(self.module, (side, side, 3)))
        self.folded = folding.FoldedModel(self.module, self.variables, (side, side, 3))
        self.trace = timed(lambda: self.folded.pairs)[0]
        self.first_fold = timed(lambda: jax.block_until_ready(self.folded.fold(self.variables)))[0]
        self.fold = timed(lambda: jax.block_until_ready(self.folded.fold(self.variables)))[0]
        self.prepared = self.folded.fold(self.variables)

    def compile(self, size: int, plain: bool = False) -> tuple[Callable[[], Times], float]:
        """Returns a function with the times of a batch, and the seconds of compilation."""
        import jax
        import numpy as np

        from lungjax.models.ops import conv

        function = partial(self.module.apply, train=False) if plain else self.folded
        variables = self.variables if plain else self.prepared
        images = jax.device_put(
            np.random.default_rng(0).normal(size=(size, self.side, self.side, 3)).astype(np.float32)
        )
        lowered = jax.jit(function, compiler_options=conv.compiler_options()).lower(variables, images)
        start = time.perf_counter()
        program = lowered.compile()
        seconds = time.perf_counter() - start
        return lambda: timed(lambda: jax.block_until_ready(program(variables, images))), seconds


def batch_sizes(args: argparse.Namespace) -> None:
    """Prints images per second by batch size."""
    sizes = [int(size) for size in args.sizes.split(",")]
    print("| images per second, relative to the best | best | " + " | ".join(map(str, sizes)) + " |")
    print("| --- | ---: |" + " ---: |" * len(sizes))
    for name in args.networks.split(","):
        network = Network(name, args.side)
        calls: dict[Any, Any] = {("lungjax", size): network.compile(size)[0] for size in sizes}
        with torch_process(args.torch_python, name, args.side) as (version, torch):
            calls |= {(version, size): partial(torch, size) for size in sizes if torch}
            times = take_turns(calls, args.rounds)
        for library in dict.fromkeys(library for library, _ in calls):
            for which, unit in enumerate(("s", "processor second")):
                rates = [size / statistics.median(t[which] for t in times[library, size]) for size in sizes]
                shares = " | ".join(f"{rate / max(rates):.2f}" for rate in rates)
                print(f"| {name}, {library} | {max(rates):.1f} per {unit} | {shares} |", flush=True)


def folded_and_plain(args: argparse.Namespace) -> None:
    """Prints plain and torch against folded norms."""
    columns = (
        f"{args.batch} x {args.side} px", "folded norms", "plain, ms", "folded, ms", "plain / folded", "torch / folded",
        "compile plain, s", "folded, s", "find pairs, s", "first fold, s", "fold, ms",
    )  # fmt: skip
    print(f"| {' | '.join(columns)} |\n| --- |{' ---: |' * (len(columns) - 1)}")
    for name in args.networks.split(","):
        network = Network(name, args.side)
        plain, plain_seconds = network.compile(args.batch, plain=True)
        folded, folded_seconds = network.compile(args.batch)
        calls: dict[Any, Any] = {"plain": plain, "folded": folded}
        with torch_process(args.torch_python, name, args.side) as (_, torch):
            calls |= {"torch": partial(torch, args.batch)} if torch else {}
            times = take_turns(calls, args.rounds)
        ratios = {}
        for key in calls:
            pairs = list(zip(times[key], times["folded"], strict=True))
            ratios[key] = ", ".join(f"{statistics.median(a[i] / b[i] for a, b in pairs):.2f}" for i in (0, 1))
        ms = {key: f"{1e3 * statistics.median(wall for wall, _ in taken):.0f}" for key, taken in times.items()}
        cells = [name, str(len(network.folded.pairs)), ms["plain"], ms["folded"], ratios["plain"]]
        cells += [ratios.get("torch", "-"), f"{plain_seconds:.1f}", f"{folded_seconds:.1f}", f"{network.trace:.2f}"]
        print(f"| {' | '.join(cells)} | {network.first_fold:.2f} | {1e3 * network.fold:.0f} |", flush=True)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = parser.add_mutually_exclusive_group()
    tables.add_argument("--batch_sizes", action="store_true", help="only the first table")
    tables.add_argument("--folding", action="store_true", help="only the second table")
    parser.add_argument("--networks", default=NETWORKS)
    parser.add_argument("--sizes", default=SIZES, help="batch sizes of the first table")
    parser.add_argument("--batch", type=int, default=8, help="batch size of the second table")
    parser.add_argument("--side", type=int, default=224, help="of the images, in pixels")
    parser.add_argument("--rounds", type=int, default=5, help="calls of each, after one to warm up")
    parser.add_argument("--torch_python", default="", help="an interpreter with torch and torchvision")
    parser.add_argument("--serve", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    if args.serve:
        serve_torch(args.serve, args.side, cores)
        return
    from lungjax.runtime import environment

    environment.keep_freed_memory()  # as in prediction
    import jax

    print(f"jax {jax.__version__}, {jax.default_backend()}, {cores} cores, float32\n")
    if not args.folding:
        batch_sizes(args)
        print()
    if not args.batch_sizes:
        folded_and_plain(args)


if __name__ == "__main__":
    main()
