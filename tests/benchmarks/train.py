"""Times training steps of lungjax, Keras (on jax) and torch (timm) on the CPU; the frameworks take turns.

    python -m tests.benchmarks.train [--networks=NAME,...] [--rounds=5] [--keras_python=PYTHON] [--torch_python=PYTHON]

Keras and torch are omitted if the interpreter that has them is not given.
"""

import statistics
import sys
from typing import Any

from tests.benchmarks import harness
from tests.benchmarks.train_peers import BATCH, SIDE

NETWORKS = [
    "efficientnet_b0", "mobilenetv2", "efficientnetv2_s", "convnext_tiny", "resnet50v2", "densenet121", "cbr_larget",
]  # fmt: skip
COSTS = (("compile_seconds", 1, ".1f"), ("peak_bytes", 2**30, ".2f"), ("parameters", 1e6, ".2f"))  # unit, format


def measure(network: str, pythons: dict[str, str], rounds: int) -> dict[str, dict[str, Any]]:
    """Returns the compilation and memory costs of each framework and the timings of its turns."""
    env = harness.CPU | {"JAX_ENABLE_COMPILATION_CACHE": "false"}  # compile time is measured
    facts, processes = {}, {}
    for name, python in pythons.items():  # one after the other, so that each compiles alone
        processes[name] = harness.Process(python, "train_peers", "contender", env, name=name, network=network)
        facts[name] = processes[name].answer()
        print(f"{network}: {facts[name]['versions']}", file=sys.stderr)
    turns = harness.take_turns({name: process.ask for name, process in processes.items()}, rounds)
    for name, process in processes.items():
        process.close()
        facts[name] |= {"peak_bytes": turns[name][-1]["peak_bytes"], "turns": turns[name]}
    return facts


def main() -> None:
    args = harness.parse(__doc__, networks=NETWORKS, rounds=5, keras_python="", torch_python="")
    pythons = {"ours": sys.executable, "keras": args.keras_python, "torch": args.torch_python}
    pythons = {name: python for name, python in pythons.items() if python}
    peers = [name for name in pythons if name != "ours"]
    speeds, costs = [], []
    for network in args.networks:
        facts = measure(network, pythons, args.rounds)
        seconds = {name: [turn["seconds"] for turn in own["turns"]] for name, own in facts.items()}
        medians = {name: f"{1e3 * statistics.median(own):.1f}" for name, own in seconds.items()}
        ratios = {name: harness.ratio(own, seconds["ours"]) for name, own in seconds.items()}
        others = max(turn["others"] for own in facts.values() for turn in own["turns"])
        cells = [medians.get(name, "-") for name in pythons] + [ratios.get(name, "-") for name in peers]
        speeds.append([f"{network}, {BATCH} x {SIDE} px", *cells, f"{others:.0%}"])
        cells = [" / ".join(f"{own[key] / unit:{form}}" for own in facts.values()) for key, unit, form in COSTS]
        costs.append([network, *cells])
    heads = [*(f"{name}, ms" for name in pythons), *(f"speed / {name}" for name in peers), "others"]
    print(harness.table(["cpu, float32", *heads], speeds) + "\n")
    heads = ["seconds to compile", "peak memory, GiB", "parameters, millions"]
    print(harness.table([" / ".join(pythons), *heads], costs))


if __name__ == "__main__":
    main()
