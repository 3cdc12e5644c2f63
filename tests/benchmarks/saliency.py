"""Time of saliency maps, in forward passes of the same images.

python tests/benchmarks/saliency.py [--networks=NAME,...] [--images=64] [--rounds=3]
"""

import statistics
from functools import partial

import numpy as np

from lungjax import models
from lungjax.config import InputSpec, ModelConfig
from lungjax.explain.saliency import Explainer
from lungjax.training import state
from tests.benchmarks import harness

METHODS = ("gradcam", "gradcam_positive", "gradcam++")
SIDE = 224


def measure(name: str, count: int, rounds: int) -> str:
    module = models.build(ModelConfig(name=name), classes=3)
    explainer = Explainer(module, state.init(module, (SIDE, SIDE, 3), 0), InputSpec(size=(SIDE, SIDE), channels=3))
    images = np.random.default_rng(0).integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)
    calls = {"": partial(harness.timed, lambda: explainer.probabilities(images))}
    calls |= {m: partial(harness.timed, partial(explainer.maps, images, None, m)) for m in METHODS}
    times = harness.take_turns(calls, rounds)
    wall, used = (statistics.median(part) for part in zip(*times.pop(""), strict=True))
    medians = [[statistics.median(part) for part in zip(*values, strict=True)] for values in times.values()]
    return harness.row(name, f"{wall:.2f} s", *(f"{a / wall:.2f} ({b / used:.2f})" for a, b in medians))


def main() -> None:
    args = harness.parse(__doc__, networks=["efficientnet_b0", "resnet50v2", "cbr_small"], images=64, rounds=3)
    print(f"{args.images} images of {SIDE} px, {harness.machine()}\n")
    print(harness.header("network", "one prediction", *METHODS), flush=True)
    for name in args.networks:
        print(measure(name, args.images, args.rounds), flush=True)


if __name__ == "__main__":
    main()
