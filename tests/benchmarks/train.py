"""Times training steps of lungjax, Keras (on jax) and torch (timm) side by side, as ratios.

    python -m tests.benchmarks.train --peers=keras,torch --out=FOLDER [--platform=gpu] [--cells=REGEX] [--seconds=540]
    python -m tests.benchmarks.train --out=FOLDER --table            # the results as markdown tables

A cell is one framework on one network, image size, batch size and dtype. The cells of one network form a group: each
framework runs in its own process (`train_peers.py`), which compiles while the others are idle; then they take turns, so
that a machine that slows down slows all of them. A ratio is computed within each round.

Every cell writes FOLDER/CELL.json, also on errors, and is skipped if that exists (--retry repeats failed ones); the
missing cells of a group are timed next to "ours" again. With --seconds the script ends before that limit, so a long
list can be run in pieces; unfinished groups are skipped. The exit code is 0 also if cells failed.

A peer may run in another interpreter (--keras_python, --torch_python).
"""

import argparse
import contextlib
import json
import os
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tests.benchmarks.train_table import tables

ROOT = Path(__file__).parent.parent.parent
CPU_NETWORKS = (
    "efficientnet_b0", "mobilenetv2", "efficientnetv2_s", "convnext_tiny", "resnet50v2", "densenet121", "cbr_larget",
)  # fmt: skip
GPU_NETWORKS = ("efficientnetv2_s", "convnext_tiny", "resnet50v2", "densenet121")
WARM_STEPS = 3  # before the first turn, after the first step: torch tunes its kernels for some steps


@dataclass(frozen=True)
class Cell:
    """One framework on one training step."""

    platform: str  # "cpu" or "gpu"
    network: str
    size: int  # pixels
    batch: int
    dtype: str
    contender: str  # "ours", "keras" or "torch"

    @property
    def group(self) -> tuple[str, str, int, int]:
        """The fields shared by cells that are timed together."""
        return self.platform, self.network, self.size, self.batch

    @property
    def key(self) -> str:
        """The name of the file, and what --cells matches."""
        return f"{self.platform}-{self.network}-{self.size}px-b{self.batch}-{self.dtype}-{self.contender}"


def all_cells() -> list[Cell]:
    """Returns the cells of both platforms."""
    shapes = [("cpu", name, 224, 8) for name in CPU_NETWORKS]
    shapes += [("gpu", name, 224, 256) for name in GPU_NETWORKS] + [("gpu", name, 512, 64) for name in GPU_NETWORKS[:2]]
    cells = []
    for platform, network, size, batch in shapes:
        ours = Cell(platform, network, size, batch, "float32" if platform == "cpu" else "bfloat16", "ours")
        cells += [ours, *(replace(ours, contender=name) for name in ("keras", "torch"))]
    return cells


class Stopped(Exception):
    """The time limit of --seconds has passed."""


class Process:
    """A framework in its own process, idle until it gets a request."""

    def __init__(self, cell: Cell, args: argparse.Namespace, log: Path):
        python = getattr(args, f"{cell.contender}_python", "") or sys.executable
        gpu = cell.platform == "gpu"
        env = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "PYTHONSAFEPATH": "1",  # modules of this folder must not hide a library
            "BENCHMARK_DEVICE": "gpu" if gpu else "cpu",
            "JAX_PLATFORMS": "cuda" if gpu else "cpu",
            "JAX_ENABLE_COMPILATION_CACHE": "false",  # compile time is measured
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # the processes of a group share the device
            "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95",
            "TF_CPP_MIN_LOG_LEVEL": "3",
        }
        if not gpu:
            env["CUDA_VISIBLE_DEVICES"] = ""
        command = [python, str(Path(__file__).with_name("train_peers.py")), f"--cell={json.dumps(asdict(cell))}"]
        self.cell, self.log, self.deadline = cell, log, args.deadline
        with log.open("w") as stderr:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True, env=env
            )
        self.lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put("")

    def answer(self) -> dict[str, Any]:
        """Returns the next answer; raises RuntimeError with an error of the process, Stopped past the deadline."""
        try:
            line = self.lines.get(timeout=max(self.deadline - time.monotonic(), 0.01))
        except queue.Empty:
            raise Stopped from None
        if not line:
            end = " | ".join(self.log.read_text(errors="replace").splitlines()[-4:])
            raise RuntimeError(f"ended with code {self.process.wait()}: {end[-600:]}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def ask(self, **request: Any) -> dict[str, Any]:
        """Sends a request and returns the answer; raises as `answer`."""
        with contextlib.suppress(BrokenPipeError):  # the process has ended, and `answer` raises its error
            print(json.dumps(request), file=self.process.stdin, flush=True)
        return self.answer()

    def close(self) -> None:
        """Kills the process."""
        self.process.kill()
        self.process.wait()


def run_group(cells: list[Cell], args: argparse.Namespace) -> None:
    """Times the cells in turns and writes their files; raises Stopped, with nothing written, past the deadline."""
    running: dict[Cell, Process] = {}
    results: dict[Cell, dict[str, Any]] = {cell: asdict(cell) | {"seconds": [], "others": []} for cell in cells}

    def attempt(cell: Cell, step: Any) -> None:
        try:
            step(running[cell], results[cell])
        except RuntimeError as error:
            print(f"  {cell.key}: {error}", flush=True)
            results[cell]["error"] = str(error)
            running.pop(cell).close()

    def warm_up(process: Process, facts: dict[str, Any]) -> None:
        facts |= process.answer()
        print(f"  {process.cell.key}: compiled in {facts['compile_seconds']:.1f} s", flush=True)
        facts["steps"] = max(1, round(args.turn_seconds / process.ask(steps=WARM_STEPS)["seconds"]))

    def take_turn(process: Process, facts: dict[str, Any]) -> None:
        turn = process.ask(steps=facts["steps"])
        facts["seconds"].append(turn["seconds"])
        facts["others"].append(round(turn["others"], 3))
        facts["loss"] = turn["loss"]

    def end(process: Process, facts: dict[str, Any]) -> None:
        facts |= process.ask(end=True)

    try:
        for cell in cells:  # one after the other: each compiles alone
            running[cell] = Process(cell, args, args.out / f"{cell.key}.log")
            attempt(cell, warm_up)
        for step in (*[take_turn] * args.rounds, end):
            for cell in list(running):
                attempt(cell, step)
    finally:
        for process in running.values():
            process.close()
    ours = results[cells[0]]
    for cell, facts in results.items():
        if "error" not in facts:
            (args.out / f"{cell.key}.log").unlink(missing_ok=True)
        if cell is cells[0] and is_done(cell, args):
            continue  # it was timed only for the ratios of the others
        if cell is not cells[0] and "error" not in ours:
            facts["ours_seconds"] = ours["seconds"]  # of the same rounds
        facts |= {"rounds": args.rounds, "time": time.strftime("%Y-%m-%d %H:%M")}
        partial = args.out / f"{cell.key}.json.partial"
        partial.write_text(json.dumps(facts, indent=1) + "\n")
        partial.replace(args.out / f"{cell.key}.json")


def missing_groups(cells: list[Cell], args: argparse.Namespace) -> Iterator[list[Cell]]:
    """Yields the cells to run, group by group, "ours" first: the others are compared with it."""
    for group in dict.fromkeys(cell.group for cell in cells):
        missing = [cell for cell in cells if cell.group == group and not is_done(cell, args)]
        if missing:
            first = Cell(*group, "float32" if group[0] == "cpu" else "bfloat16", "ours")
            yield [first, *(cell for cell in missing if cell != first)]


def is_done(cell: Cell, args: argparse.Namespace) -> bool:
    """Returns whether a cell has a file, with --retry one without an error."""
    path = args.out / f"{cell.key}.json"
    return path.is_file() and not (args.retry and "error" in json.loads(path.read_text()))


def main() -> None:
    """Runs the missing cells, or prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--peers", default="keras,torch", help="frameworks next to ours; may be empty")
    parser.add_argument("--platform", choices=("cpu", "gpu"), default="cpu", help="whose cells to run")
    parser.add_argument("--cells", default="", help="regex: run only cells whose name contains it")
    parser.add_argument("--table", action="store_true", help="print the tables of the results")
    parser.add_argument("--seconds", type=float, default=1e9, help="time limit")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--turn_seconds", type=float, default=2.0, help="length of a turn; at least one step")
    parser.add_argument("--retry", action="store_true", help="repeat failed cells")
    parser.add_argument("--keras_python", default="", help="an interpreter with Keras and jax")
    parser.add_argument("--torch_python", default="", help="an interpreter with torch and timm")
    args = parser.parse_args()
    args.deadline = time.monotonic() + args.seconds
    args.out.mkdir(parents=True, exist_ok=True)
    if args.table:
        print(tables([asdict(cell) | {"key": cell.key} for cell in all_cells()], args.out))
        return
    contenders = ["ours", *filter(None, args.peers.split(","))]
    if set(contenders) - {"ours", "keras", "torch"}:
        raise SystemExit(f"--peers={args.peers}: allowed are keras and torch, separated by a comma")
    cells = [cell for cell in all_cells() if cell.contender in contenders and cell.platform == args.platform]
    groups, longest = list(missing_groups([cell for cell in cells if re.search(args.cells, cell.key)], args)), 0.0
    for number, group in enumerate(groups):
        start = time.monotonic()
        print(f"{' '.join(map(str, group[0].group))}: {len(group)} cells", flush=True)
        try:
            if start + longest > args.deadline:
                raise Stopped
            run_group(group, args)
        except Stopped:
            print(f"time limit: {len(groups) - number} groups remain")
            return
        longest = max(longest, time.monotonic() - start)
        print(f"  {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
