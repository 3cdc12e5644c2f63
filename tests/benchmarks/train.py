"""Times training steps of lungjax, Keras (on jax) and torch (timm) side by side, as ratios.

    python -m tests.benchmarks.train --out=FOLDER [--platform=gpu] [--seconds=540] [--rounds=5]
        [--keras_python=PYTHON] [--torch_python=PYTHON]
    python -m tests.benchmarks.train --out=FOLDER --table            # the results as markdown tables

Each training step writes FOLDER/STEP.json, also if a framework fails, and is skipped if that exists. With --seconds the
script ends before that limit, so a long list can be run in pieces; an unfinished step is measured anew.
"""

import json
import statistics
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from tests.benchmarks import harness

CPU_NETWORKS = (
    "efficientnet_b0", "mobilenetv2", "efficientnetv2_s", "convnext_tiny", "resnet50v2", "densenet121", "cbr_larget",
)  # fmt: skip
GPU_NETWORKS = ("efficientnetv2_s", "convnext_tiny", "resnet50v2", "densenet121")
STEPS = {  # network, pixels, batch
    "cpu": [(name, 224, 8) for name in CPU_NETWORKS],
    "gpu": [(name, 224, 256) for name in GPU_NETWORKS] + [(name, 512, 64) for name in GPU_NETWORKS[:2]],
}
DTYPES = {"cpu": "float32", "gpu": "bfloat16"}
CONTENDERS = ("ours", "keras", "torch")
PEAK_FLOPS = 989e12  # per second: dense bfloat16 of an H200, from its data sheet
Facts = dict[str, Any]


def measure(platform: str, step: tuple[str, int, int], args: Namespace) -> dict[str, Facts]:
    """Returns the facts of each framework, and its turns; raises TimeoutError past the deadline."""
    env = {
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # compile time is measured
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # the processes share the device
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95",
    } | (harness.CPU if platform == "cpu" else {"JAX_PLATFORMS": "cuda"})
    case = dict(zip(("network", "side", "batch"), step, strict=True)) | {"dtype": DTYPES[platform]}
    results: dict[str, Facts] = {}
    running: dict[str, harness.Process] = {}

    def ask(name: str, **request: Any) -> Facts:
        seconds = max(args.deadline - time.monotonic(), 0.01)
        try:
            return running[name].ask(seconds, **request) if request else running[name].answer(seconds)
        except RuntimeError as error:
            print(f"  {name}: {error}", flush=True)
            running.pop(name).close()
            return {"error": str(error)}

    try:
        for name in CONTENDERS:  # one after the other: each compiles alone
            python = getattr(args, f"{name}_python", "")
            running[name] = harness.Process(python, "train_peers", "contender", env, name=name, case=case)
            results[name] = ask(name) | {"turns": []}
        for _ in range(args.rounds):
            for name in list(running):
                results[name]["turns"].append(ask(name, end=False))
        for name in list(running):
            results[name] |= ask(name, end=True)
    finally:
        for process in running.values():
            process.close()
    for facts in results.values():
        if facts["turns"] and "error" in facts["turns"][-1]:
            facts["error"] = facts["turns"][-1]["error"]
    return results


def tables(folder: Path) -> str:
    """Returns the results of both platforms as markdown."""
    parts, versions = [], set()
    for platform, steps in STEPS.items():
        results: dict[str, dict[str, Facts]] = {}
        for network, side, batch in steps:
            path = result_file(folder, platform, (network, side, batch))
            facts = json.loads(path.read_text()) if path.exists() else {}
            results[f"{network}, {batch} x {side} px"] = facts
            versions |= {one["versions"] for one in facts.values() if "versions" in one}
        heads = ["ours, ms", "Keras, ms", "torch, ms", "speed / Keras", "speed / torch", "others"]
        rows = [[title, *speeds(facts)] for title, facts in results.items()]
        parts.append(harness.table([f"{platform}, {DTYPES[platform]}", *heads], rows))
        if platform == "gpu":
            rows = [[title, *arithmetic(facts)] for title, facts in results.items()]
            parts.append(harness.table(["ours, bfloat16", "GFLOP per step", "of 989 TFLOP/s"], rows))
        heads = ["ours / Keras / torch", "seconds to compile", "peak memory, GiB", "parameters, millions"]
        parts.append(harness.table(heads, [[title, *costs(facts)] for title, facts in results.items()]))
    return "\n\n".join([*parts, f"Versions: {'; '.join(sorted(versions)) or 'not measured'}."])


def missing(results: dict[str, Facts], name: str) -> str:
    """Returns why a framework has no times; empty if it has."""
    if name not in results:
        return "not measured"
    return f"failed: {results[name]['error'][:60]}" if "error" in results[name] else ""


def seconds_of(facts: Facts) -> list[float]:
    return [turn["seconds"] for turn in facts["turns"]]


def speeds(results: dict[str, Facts]) -> list[str]:
    """Returns milliseconds, the speed of ours relative to the peers, and the use of the cores by other processes."""
    cells = [
        missing(results, name) or f"{1e3 * statistics.median(seconds_of(results[name])):.1f}" for name in CONTENDERS
    ]
    for name in CONTENDERS[1:]:
        failure = missing(results, name) or missing(results, "ours")
        cells.append(failure or harness.ratio(seconds_of(results[name]), seconds_of(results["ours"])))
    others = [turn["others"] for facts in results.values() for turn in facts["turns"] if "others" in turn]
    return [*cells, f"{max(others):.0%}" if others else ""]


def arithmetic(results: dict[str, Facts]) -> list[str]:
    """Returns XLA's count of our operations, and the share of the device's arithmetic that our step uses."""
    if failure := missing(results, "ours"):
        return [failure] * 2
    flops = results["ours"]["flops"] or float("nan")
    return [f"{flops / 1e9:.1f}", f"{flops / statistics.median(seconds_of(results['ours'])) / PEAK_FLOPS:.1%}"]


def costs(results: dict[str, Facts]) -> list[str]:
    cells = []
    for key, unit, form in (("compile_seconds", 1, ".1f"), ("peak_bytes", 2**30, ".2f"), ("parameters", 1e6, ".2f")):
        values = [results.get(name, {}).get(key) for name in CONTENDERS]
        cells.append(" / ".join("-" if value is None else f"{value / unit:{form}}" for value in values))
    return cells


def result_file(folder: Path, platform: str, step: tuple[str, int, int]) -> Path:
    return folder / f"{'-'.join(map(str, (platform, *step)))}.json"


def main() -> None:
    args = harness.parse(
        __doc__, ["out"], out=Path, platform="cpu", table=False, seconds=1e9, rounds=5, keras_python="", torch_python=""
    )
    if args.platform not in STEPS:
        sys.exit(f"--platform={args.platform}: allowed are {' and '.join(STEPS)}")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.table:
        print(tables(args.out))
        return
    args.deadline, longest = time.monotonic() + args.seconds, 0.0
    files = {step: result_file(args.out, args.platform, step) for step in STEPS[args.platform]}
    steps = [step for step, file in files.items() if not file.exists()]
    for number, step in enumerate(steps):
        start = time.monotonic()
        print(args.platform, *step, flush=True)
        try:
            if start + longest > args.deadline:
                raise TimeoutError
            results = measure(args.platform, step, args)
        except TimeoutError:
            print(f"time limit: {len(steps) - number} training steps remain")
            return
        files[step].write_text(json.dumps(results, indent=1) + "\n")
        longest = max(longest, time.monotonic() - start)
        print(f"  {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
