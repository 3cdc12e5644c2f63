"""Time of saliency maps, in forward passes.

    python tests/benchmarks/saliency.py [--networks=NAME,...] [--methods=NAME,...] [--images=64] [--side=224]
        [--rounds=3]

The unit is the prediction of the same images by the folded network in the same batches. Maps and prediction alternate,
after compilation. Prints, as markdown, the seconds of a prediction and each method's ratio to it in wall-clock and
processor time (medians of the rounds). Images are in memory; nothing is read or written.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from lungjax import models
from lungjax.config import InputSpec, ModelConfig
from lungjax.explain.saliency import Explainer
from lungjax.runtime import environment
from lungjax.training import state

NETWORKS = "efficientnet_b0,resnet50v2,cbr_small"
METHODS = "gradcam,gradcam_positive,gradcam++"


def timed(function: Callable[[], Any]) -> tuple[float, float]:
    """Returns the seconds that a call takes, and the processor seconds of all its threads."""
    start, used = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - start, time.process_time() - used


def measure(name: str, methods: list[str], count: int, side: int, rounds: int) -> str:
    """Returns a network's row of the table."""
    module = models.build(ModelConfig(name=name), classes=3)
    spec = InputSpec(size=(side, side), channels=3)
    variables = state.init(module, (side, side, 3), 0)
    explainer = Explainer(module, variables, spec)
    images = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    calls: dict[str, Callable[[], Any]] = {"": lambda: explainer.probabilities(images)}
    calls |= {method: lambda method=method: explainer.maps(images, None, method) for method in methods}
    for call in calls.values():
        call()
    times: dict[str, list[tuple[float, float]]] = {what: [] for what in calls}
    for _ in range(rounds):
        for what, call in calls.items():
            times[what].append(timed(call))
    unit, used = (statistics.median(part) for part in zip(*times[""], strict=True))
    cells = [name, f"{unit:.2f} s"]
    for method in methods:
        clock, work = (statistics.median(part) for part in zip(*times[method], strict=True))
        cells.append(f"{clock / unit:.2f} ({work / used:.2f})")
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=NETWORKS)
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    methods = options.methods.split(",")
    print(f"{options.images} images of {options.side} px, {jax.default_backend()}, {environment.cores()} cores\n")
    print("| network | one prediction | " + " | ".join(methods) + " |")
    print("| --- | --- |" + " --- |" * len(methods), flush=True)
    for name in options.networks.split(","):
        print(measure(name, methods, options.images, options.side, options.rounds), flush=True)


if __name__ == "__main__":
    main()
