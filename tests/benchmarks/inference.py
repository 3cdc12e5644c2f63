"""Times prediction: at which batch size, with norms folded and as they are, and against torch.

    python tests/benchmarks/inference.py [--batch_sizes | --folding] [--networks=NAME,...] [--sizes=1,2,4,...]
        [--rounds=5] [--side=224] [--torch_python=PYTHON]

Everything that is compared is compiled first and then called in turns. The first table has images per second of the
folded network by batch size, divided by its best, by the clock and by processor time. The second has folded against
plain at one batch size: milliseconds of a call; the ratio in each round, median, by the clock and by processor time;
seconds to compile both, to find the pairs, to fold for the first time and (ms) again. With `PYTHON`, which needs torch
and torchvision, torch takes a turn in both: eager, channels last, evaluation mode, `inference_mode`, as many threads
as this process has cores, in a process of its own that works only in its turns. Prints markdown.
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
TORCHVISION = {  # our name: theirs; other networks are timed without torch
    "efficientnet_b0": "efficientnet_b0",
    "efficientnetv2_s": "efficientnet_v2_s",
    "resnet18": "resnet18",
    "resnet50": "resnet50",
    "convnext_tiny": "convnext_tiny",
    "mobilenetv2": "mobilenet_v2",
    "densenet121": "densenet121",
    "vgg16": "vgg16",
}

Times = tuple[float, float]  # seconds, and processor seconds of all threads


def timed(function: Callable[[], Any]) -> Times:
    """Returns the seconds that a call takes, and the processor seconds of all its threads."""
    start, used = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - start, time.process_time() - used


def torch_side(name: str, side: int, threads: int) -> None:
    """Serves turns: a line with a batch size comes in, a line with what `timed` returns goes out."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not come between
    import torch

    # A CPU build of torch may lack operators that torchvision names when it is imported; none is used here.
    operators = torch.library.Library("torchvision", "DEF")
    pools = ("roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d")
    with contextlib.suppress(RuntimeError):
        operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    for operator in (*pools, *(f"_{pool}_backward" for pool in pools), "qroi_align", "qnms"):
        with contextlib.suppress(RuntimeError):
            operators.define(f"{operator}(...) -> ...")
    import torchvision

    torch.set_num_threads(threads)
    model = getattr(torchvision.models, name)(weights=None).eval().to(memory_format=torch.channels_last)
    print(json.dumps({"versions": f"torch {torch.__version__}"}), file=out, flush=True)
    images: dict[int, Any] = {}
    with torch.inference_mode():
        for line in sys.stdin:
            size = int(line)
            if size not in images:
                drawn = torch.randn(size, 3, side, side).contiguous(memory_format=torch.channels_last)
                images[size] = drawn
                model(drawn)
            print(json.dumps(timed(partial(model, images[size]))), file=out, flush=True)


class Torch:
    """The other process: called with a batch size, it returns what `timed` does."""

    def __init__(self, python: str, name: str, side: int) -> None:
        """Starts it and waits until its network is built."""
        command = [python, __file__, f"--serve={TORCHVISION[name]}", f"--side={side}"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.versions = self(None)["versions"]

    def __call__(self, size: int | None) -> Any:
        """Runs one batch in it."""
        if size is not None:
            print(size, file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        """Ends it."""
        self.process.stdin.close()
        self.process.wait()


def turns(calls: dict[Any, Callable[[], Times]], rounds: int) -> dict[Any, list[Times]]:
    """Returns what each call took, called in turns after one round to warm up."""
    times: dict[Any, list[Times]] = {key: [] for key in calls}
    for turn in range(rounds + 1):
        for key, call in calls.items():
            taken = call()
            if turn:
                times[key].append(taken)
    return times


def middle(taken: list[Times], which: int) -> float:
    """Returns the median seconds (which = 0) or processor seconds (1)."""
    return statistics.median(times[which] for times in taken)


class Network:
    """One network with drawn weights, plain and folded."""

    def __init__(self, name: str, side: int) -> None:
        """Draws weights, traces and folds, and keeps how long that took."""
        import jax
        import jax.numpy as jnp

        from lungjax import models
        from lungjax.models import folding
        from tests.random_weights import random_variables

        self.side, self.module = side, models.MODELS[name]()
        self.variables = jax.tree.map(jnp.asarray, random_variables(self.module, (side, side, 3)))
        start = time.perf_counter()
        self.folded = folding.FoldedModel(self.module, self.variables, (side, side, 3))
        self.count = len(self.folded.pairs)
        self.trace = time.perf_counter() - start
        start = time.perf_counter()
        jax.block_until_ready(self.folded.fold(self.variables))
        self.first_fold = time.perf_counter() - start
        start = time.perf_counter()
        self.prepared = jax.block_until_ready(self.folded.fold(self.variables))
        self.fold = time.perf_counter() - start

    def compiled(self, size: int, plain: bool = False) -> tuple[Callable[[], Times], float]:
        """Returns a call that gives the seconds of a batch of `size`, and the seconds that compiling it took."""
        import jax
        import numpy as np

        from lungjax.models.ops import conv

        function = partial(self.module.apply, train=False) if plain else self.folded
        variables = self.variables if plain else self.prepared
        images = np.random.default_rng(0).normal(size=(size, self.side, self.side, 3)).astype(np.float32)
        images = jax.device_put(images)
        lowered = jax.jit(function, compiler_options=conv.compiler_options()).lower(variables, images)
        start = time.perf_counter()
        program = lowered.compile()
        compiling = time.perf_counter() - start

        return lambda: timed(lambda: jax.block_until_ready(program(variables, images))), compiling


def sizes_table(args: argparse.Namespace) -> None:
    """Prints images per second by batch size."""
    sizes = [int(size) for size in args.sizes.split(",")]
    print("| images a second, of the best | best | " + " | ".join(map(str, sizes)) + " |")
    print("| --- | ---: |" + " ---: |" * len(sizes))
    for name in args.networks.split(","):
        network = Network(name, args.side)
        calls: dict[Any, Any] = {("lungjax", size): network.compiled(size)[0] for size in sizes}
        torch = Torch(args.torch_python, name, args.side) if args.torch_python and name in TORCHVISION else None
        if torch:
            calls |= {(torch.versions, size): partial(torch, size) for size in sizes}
        times = turns(calls, args.rounds)
        for who in dict.fromkeys(who for who, _ in calls):
            for which, unit in enumerate(("s", "processor second")):
                rates = [size / middle(times[who, size], which) for size in sizes]
                shares = " | ".join(f"{rate / max(rates):.2f}" for rate in rates)
                print(f"| {name}, {who} | {max(rates):.1f} a {unit} | {shares} |", flush=True)
        if torch:
            torch.close()


def folding_table(args: argparse.Namespace) -> None:
    """Prints folded against plain, and both against torch."""
    size = args.batch
    print(
        f"| {size} x {args.side} px | norms folded | plain, ms | folded, ms | plain / folded | torch / folded | "
        "compile plain, s | folded, s | find pairs, s | first fold, s | fold, ms |"
    )
    print("| --- |" + " ---: |" * 10)
    for name in args.networks.split(","):
        network = Network(name, args.side)
        (plain, plain_compile), (folded, folded_compile) = network.compiled(size, plain=True), network.compiled(size)
        calls: dict[Any, Any] = {"plain": plain, "folded": folded}
        torch = Torch(args.torch_python, name, args.side) if args.torch_python and name in TORCHVISION else None
        if torch:
            calls["torch"] = partial(torch, size)
        times = turns(calls, args.rounds)
        ms = {key: 1e3 * middle(taken, 0) for key, taken in times.items()}

        def over(key: str, times: dict[str, list[Times]] = times) -> str:
            if key not in times:
                return "-"
            rounds = [
                [a / b for a, b in zip(*both, strict=True)] for both in zip(times[key], times["folded"], strict=True)
            ]
            return ", ".join(f"{statistics.median(ratio):.2f}" for ratio in zip(*rounds, strict=True))

        print(
            f"| {name} | {network.count} | {ms['plain']:.0f} | {ms['folded']:.0f} | {over('plain')} "
            f"| {over('torch')} | {plain_compile:.1f} | {folded_compile:.1f} | {network.trace:.2f} "
            f"| {network.first_fold:.2f} | {1e3 * network.fold:.0f} |",
            flush=True,
        )
        if torch:
            torch.close()


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--batch_sizes", action="store_true", help="the first table only")
    only.add_argument("--folding", action="store_true", help="the second table only")
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
        torch_side(args.serve, args.side, cores)
        return
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
    from lungjax.runtime import environment

    environment.keep_freed_memory()  # as when predicting
    import jax

    print(f"jax {jax.__version__}, {jax.default_backend()}, {cores} cores, float32\n")
    if not args.folding:
        sizes_table(args)
        print()
    if not args.batch_sizes:
        folding_table(args)


if __name__ == "__main__":
    main()
