"""Latency of single images and batches of eight: lungjax against onnxruntime, in turns.

    python -m tests.benchmarks.latency --out=FOLDER [--models=efficientnet_b0,cbr_small] [--batches=1,8]
        [--rounds=9] [--turn_seconds=1] [--peer_python=PYTHON]

Needs the extra `parity`, torch, onnxscript and onnxruntime; `--peer_python` names an interpreter that has these.
onnxruntime gets the file one would deploy: the network exported by torch.onnx (timm's; CBR is written out), norms
folded, all graph optimizations, with its default number of threads and with two. lungjax loads the same weights; its
logits must agree to 1e-4 of their range.

lungjax starts from uint8 pixels, normalizes them in the program, and ends with probabilities on the host. onnxruntime
starts from float32 pixels that are already normalized and transposed, and ends with logits, which favors it.

Each contender runs in a separate process (`latency_peers.py`), which is idle except in its turns. Ratios are of the
medians within each round: median (lowest..highest), above 1 where onnxruntime is faster. The start-up of lungjax is
measured with an empty compilation cache and with the cache of that start. Prints markdown.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.train_peers import busy_seconds

ROOT = Path(__file__).parent.parent.parent
LIMIT = 1e-4  # of the range of an image's logits


class Process:
    """A contender in its own process."""

    def __init__(self, python: str, folder: Path, cache: Path, **flags: Any):
        """Starts it and waits for its `facts`. Raises RuntimeError if it fails."""
        env = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "PYTHONSAFEPATH": "1",  # names in this folder must not hide libraries
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",  # as lungjax.cli sets it
            "CUDA_VISIBLE_DEVICES": "",
        }
        command = [python, str(Path(__file__).with_name("latency_peers.py")), f"--folder={folder}"]
        command += [f"--{name}={value}" for name, value in flags.items()]
        start = time.perf_counter()
        self.log = folder / f"{flags['task']}.log"
        with self.log.open("w") as stderr:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True, env=env
            )
        self.facts = self.answer()
        self.facts["seconds"] = time.perf_counter() - start

    def answer(self) -> dict[str, Any]:
        """Returns the next line. Raises RuntimeError with the error of the process."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            end = " | ".join(self.log.read_text(errors="replace").splitlines()[-4:])
            raise RuntimeError(f"ended with code {self.process.wait()}: {end[-600:]}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def turn(self, batch: int, seconds: float) -> dict[str, Any]:
        """Returns the times of a turn, with the share of the cores that other programs used."""
        cores, start, busy = len(os.sched_getaffinity(0)), time.perf_counter(), busy_seconds()
        print(json.dumps({"batch": batch, "seconds": seconds}), file=self.process.stdin, flush=True)
        answer = self.answer()
        wall = time.perf_counter() - start
        mine = answer["processor_ms"] / 1e3 * (len(answer["ms"]) + 2)
        return answer | {"others": max((busy_seconds() - busy - mine) / wall / cores, 0.0)}

    def close(self) -> None:
        """Ends it."""
        self.process.kill()
        self.process.wait()


def distance(a: Any, b: Any) -> float:
    """Returns the largest difference of logits [B, C], relative to the range of an image's logits."""
    a, b = np.asarray(a), np.asarray(b)
    return float((np.abs(a - b).max(1) / np.ptp(b, axis=1)).max())


def run(network: str, args: argparse.Namespace) -> tuple[list[str], str]:
    """Measures one network; returns its rows of the first table and its row of the second."""
    folder = args.out / network
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "logits.npy").exists():
        Process(args.peer_python, folder, folder, task="make", network=network).close()
    expected = np.load(folder / "logits.npy")
    with tempfile.TemporaryDirectory() as cache:
        empty = Process(sys.executable, folder, Path(cache), task="ours", network=network)
        empty.close()
        mine = Process(sys.executable, folder, Path(cache), task="ours", network=network)
    peer = Process(args.peer_python, folder, folder, task="onnx", network=network)
    pair = Process(args.peer_python, folder, folder, task="onnx", network=network, threads=2)
    contenders = {"ours": mine, "onnx": peer, "onnx2": pair}
    for name, process in contenders.items():
        if (far := distance(process.facts["logits"], expected)) > LIMIT:
            raise SystemExit(f"{network}: logits of {name} differ from torch's by {far:.1e} of their range")
    off = distance(mine.facts["logits"], peer.facts["logits"])
    rows = []
    for batch in args.batches:
        turns: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
        for number in range(args.rounds + 1):  # the first warms up
            for name, process in contenders.items():
                found = process.turn(batch, args.turn_seconds if number else 0.2)
                if number:
                    turns[name].append(found)
        middle = {name: [statistics.median(t["ms"]) for t in found] for name, found in turns.items()}
        every = {name: np.concatenate([t["ms"] for t in found]) for name, found in turns.items()}
        cells = [f"{network}, {batch} x 224 px"]
        cells += [f"{np.median(times):.1f} / {np.quantile(times, 0.95):.1f}" for times in every.values()]
        for name in ("onnx", "onnx2"):
            ratios = [a / b for a, b in zip(middle["ours"], middle[name], strict=True)]
            cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f}..{max(ratios):.2f})")
        cells += [f"{min(every['ours']) / min(every['onnx']):.2f}"]
        cells += [f"{np.median([t['processor_ms'] for t in turns['ours']]):.1f}"]
        cells += [f"{max(t['others'] for found in turns.values() for t in found):.0%}"]
        rows.append(f"| {' | '.join(cells)} |")
        print(rows[-1], file=sys.stderr, flush=True)
    for process in contenders.values():
        process.close()
    cells = [network, f"{off:.1e}"]
    for process in (empty, mine):
        parts = [process.facts[f"{name}_seconds"] for name in ("import", "load", "first")]
        cells.append(f"{sum(parts):.1f} ({', '.join(f'{part:.1f}' for part in parts)})")
    versions = f"{mine.facts['versions']}, {peer.facts['versions']}"
    return rows, f"| {' | '.join(cells)} | {versions} |"


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of weights and ONNX files")
    parser.add_argument("--models", default="efficientnet_b0,cbr_small", help="comma-separated")
    parser.add_argument("--batches", default="1,8", help="batch sizes, comma-separated")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--turn_seconds", type=float, default=1.0)
    parser.add_argument("--peer_python", default=sys.executable, help="an interpreter with torch, timm and onnxruntime")
    args = parser.parse_args()
    args.batches = [int(batch) for batch in args.batches.split(",")]
    results = [run(network, args) for network in args.models.split(",")]
    columns: tuple[str, ...] = (
        "cpu, float32", "ours, ms: median / p95", "onnxruntime", "with 2 threads", "ours / onnxruntime",
        "ours / 2 threads", "of the fastest calls", "ours, processor ms", "others",
    )  # fmt: skip
    print(f"| {' | '.join(columns)} |\n| --- |{' ---: |' * (len(columns) - 1)}")
    print("\n".join(row for rows, _ in results for row in rows))
    columns = ("", "logits differ by", "first answer, s (import, load, compile and run)", "from the cache", "versions")
    print(f"\n| {' | '.join(columns)} |\n| --- |{' ---: |' * 3} --- |")
    print("\n".join(row for _, row in results))


if __name__ == "__main__":
    main()
