"""Times training steps of lungjax, Keras (on jax) and torch (timm) side by side, as ratios.

    python -m tests.benchmarks.train --peers=keras,torch --out=FOLDER [--platform=gpu] [--cells=REGEX] [--seconds=540]
    python -m tests.benchmarks.train --out=FOLDER --table            # the markdown tables of what is there
    python -m tests.benchmarks.train --out=FOLDER --smoke            # both lists with tiny images on the CPU

A cell is one contender on one network, image size, batch and type. The cells of one network form a group: each has a
process of its own (`train_peers.py`), which builds, compiles and warms up while the others sleep; then they train in
turns, A B C A B C, so that a machine that slows down slows all of them. A ratio is taken within each round.

Every cell leaves FOLDER/CELL.json, errors too, and is not run again while that is there (--retry repeats failed ones);
cells that are missing in a group are timed beside "ours" again. With --seconds the script ends before that limit, so a
long list can be worked off in pieces; what is unfinished then is left out. Exits with 0 also when cells failed.

A peer may live in another interpreter (--keras_python, --torch_python), or in a folder for PYTHONPATH (--keras_path),
such as one made by `pip install --target=FOLDER --no-deps keras optree rich markdown-it-py mdurl pygments`.
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
EXTRA = ("efficientnetv2_s", "resnet50v2")  # of the GPU list at 224 px, also augmented and in float32
WARM = 3  # steps before the first turn, after the first step: torch's kernels settle in some steps
SMOKE = [("cpu", "cbr_larget", 224, 2), ("gpu", "mobilenetv2", 64, 2)]


@dataclass(frozen=True)
class Cell:
    """One contender on one training step."""

    platform: str  # "cpu" or "gpu": which list it is of
    network: str
    size: int  # pixels
    batch: int
    dtype: str
    contender: str  # "ours", "augmented" (ours with the preset covidnet_ct), "keras" or "torch"

    @property
    def group(self) -> tuple[str, str, int, int]:
        """What cells that are timed together share."""
        return self.platform, self.network, self.size, self.batch

    @property
    def key(self) -> str:
        """The name of its file, and what --cells is matched with."""
        return f"{self.platform}-{self.network}-{self.size}px-b{self.batch}-{self.dtype}-{self.contender}"


def all_cells(smoke: bool) -> list[Cell]:
    """Returns both lists; with `smoke` tiny images and batches of few networks, for either list."""
    shapes = [("cpu", name, 224, 8) for name in CPU_NETWORKS]
    shapes += [("gpu", name, 224, 256) for name in GPU_NETWORKS] + [("gpu", name, 512, 64) for name in GPU_NETWORKS[:2]]
    found = []
    for platform, network, size, batch in SMOKE if smoke else shapes:
        mine = Cell(platform, network, size, batch, "float32" if platform == "cpu" else "bfloat16", "ours")
        found += [mine, *(replace(mine, contender=name) for name in ("keras", "torch"))]
        if platform == "gpu" and (smoke or (network in EXTRA and size == 224)):
            found += [replace(mine, contender="augmented"), replace(mine, dtype="float32")]
    return found


class Stopped(Exception):
    """The time given by --seconds is over."""


class Process:
    """A contender in its own process, which sleeps until it is asked."""

    def __init__(self, cell: Cell, args: argparse.Namespace, log: Path):
        python, path = sys.executable, [str(ROOT)]
        if cell.contender in ("keras", "torch"):
            python = getattr(args, f"{cell.contender}_python") or python
        if cell.contender == "keras" and args.keras_path:
            path.append(str(Path(args.keras_path).absolute()))
        gpu = cell.platform == "gpu" and not args.smoke
        env = os.environ | {
            "PYTHONPATH": os.pathsep.join([*path, *filter(None, [os.environ.get("PYTHONPATH")])]),
            "PYTHONSAFEPATH": "1",  # this folder's own names must not hide a library's
            "BENCHMARK_DEVICE": "gpu" if gpu else "cpu",
            "JAX_PLATFORMS": "cuda" if gpu else "cpu",
            "JAX_ENABLE_COMPILATION_CACHE": "false",  # seconds to compile are measured
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # the contenders of a group share the device
            "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95",
            "TF_CPP_MIN_LOG_LEVEL": "3",
        }
        if not gpu:
            env["CUDA_VISIBLE_DEVICES"] = ""
        if args.smoke:  # half the seconds to compile
            env["XLA_FLAGS"] = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
        command = [python, str(Path(__file__).with_name("train_peers.py")), f"--cell={json.dumps(asdict(cell))}"]
        command += ["--smoke"] * args.smoke
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
        """Returns the next line; raises RuntimeError with what went wrong there, and Stopped past the deadline."""
        try:
            line = self.lines.get(timeout=max(self.deadline - time.monotonic(), 0.01))
        except queue.Empty:
            raise Stopped from None
        if not line:
            end = " | ".join(self.log.read_text(errors="replace").splitlines()[-4:])
            raise RuntimeError(f"ended with code {self.process.wait()}: {end[-600:]}")
        found = json.loads(line)
        if "error" in found:
            raise RuntimeError(found["error"])
        return found

    def ask(self, **what: Any) -> dict[str, Any]:
        """Sends a request and returns the answer; errors are those of `answer`."""
        with contextlib.suppress(BrokenPipeError):  # it has ended, and `answer` says why
            print(json.dumps(what), file=self.process.stdin, flush=True)
        return self.answer()

    def close(self) -> None:
        """Ends the process, whatever it is doing."""
        self.process.kill()
        self.process.wait()


def run_group(cells: list[Cell], args: argparse.Namespace) -> None:
    """Times the cells in turns and writes their files; raises Stopped, with nothing written, past the deadline."""
    running: dict[Cell, Process] = {}
    found: dict[Cell, dict[str, Any]] = {cell: asdict(cell) for cell in cells}

    def attempt(cell: Cell, step: Any) -> None:
        try:
            step(running[cell], found[cell])
        except RuntimeError as error:
            print(f"  {cell.key}: {error}", flush=True)
            found[cell]["error"] = str(error)
            running.pop(cell).close()

    def warm(process: Process, facts: dict[str, Any]) -> None:
        facts |= process.answer()
        print(f"  {process.cell.key}: compiled in {facts['compile_seconds']:.1f} s", flush=True)
        seconds = process.ask(steps=1 if args.smoke else WARM)["seconds"]
        facts |= {"steps": 2 if args.smoke else max(1, round(args.turn_seconds / seconds)), "seconds": [], "others": []}

    def one_turn(process: Process, facts: dict[str, Any]) -> None:
        measured = process.ask(steps=facts["steps"])
        facts["seconds"].append(measured["seconds"])
        facts["others"].append(round(measured["others"], 3))
        facts["loss"] = measured["loss"]

    def end(process: Process, facts: dict[str, Any]) -> None:
        facts |= process.ask(end=True)

    try:
        for cell in cells:  # one after the other: each compiles alone
            running[cell] = Process(cell, args, args.out / f"{cell.key}.log")
            attempt(cell, warm)
        for _ in range(2 if args.smoke else args.rounds):
            for cell in list(running):
                attempt(cell, one_turn)
        for cell in list(running):
            attempt(cell, end)
    finally:
        for process in running.values():
            process.close()
    yardstick = found[cells[0]]
    for cell, facts in found.items():
        if "error" not in facts:
            (args.out / f"{cell.key}.log").unlink(missing_ok=True)
        if cell is cells[0] and is_done(cell, args):
            continue  # it ran as the others' measure
        if cell is not cells[0] and "error" not in yardstick:
            facts["ours_seconds"] = yardstick["seconds"]  # of the same rounds
        facts |= {"rounds": 2 if args.smoke else args.rounds, "time": time.strftime("%Y-%m-%d %H:%M")}
        partial = args.out / f"{cell.key}.json.partial"
        partial.write_text(json.dumps(facts, indent=1) + "\n")
        partial.replace(args.out / f"{cell.key}.json")


def missing_groups(cells: list[Cell], args: argparse.Namespace) -> Iterator[list[Cell]]:
    """Yields the cells to run, group by group, "ours" first: the others are measured against it."""
    for group in dict.fromkeys(cell.group for cell in cells):
        members = [cell for cell in cells if cell.group == group]
        lacking = [cell for cell in members if not is_done(cell, args)]
        if lacking:
            dtype = "float32" if group[0] == "cpu" else "bfloat16"
            first = Cell(*group, dtype, "ours")
            yield [first, *(cell for cell in lacking if cell != first)]


def is_done(cell: Cell, args: argparse.Namespace) -> bool:
    """Says whether a cell's file is there, and with --retry whether it holds no error."""
    path = args.out / f"{cell.key}.json"
    return path.is_file() and not (args.retry and "error" in json.loads(path.read_text()))


def parse() -> argparse.Namespace:
    """Returns the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where the cells' files go")
    parser.add_argument("--peers", default="keras,torch", help="which of them to run beside ours; may be empty")
    parser.add_argument("--platform", choices=("cpu", "gpu"), default="cpu", help="which list to run")
    parser.add_argument("--cells", default="", help="regex: only cells whose name holds it")
    parser.add_argument("--list", action="store_true", help="name the cells and say which are done")
    parser.add_argument("--table", action="store_true", help="print the tables of what is done")
    parser.add_argument("--smoke", action="store_true", help="tiny images, two rounds, both lists on the CPU")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop before so many have passed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--turn_seconds", type=float, default=2.0, help="about how long a turn takes; at least a step")
    parser.add_argument("--retry", action="store_true", help="run cells that failed again")
    parser.add_argument("--keras_python", default="", help="an interpreter that has Keras and jax")
    parser.add_argument("--torch_python", default="", help="an interpreter that has torch and timm")
    parser.add_argument("--keras_path", default="", help="a folder with Keras, for PYTHONPATH")
    args = parser.parse_args()
    args.deadline = time.monotonic() + args.seconds
    return args


def main() -> None:
    """Runs what is missing, or lists, or prints the tables."""
    args = parse()
    args.out.mkdir(parents=True, exist_ok=True)
    listed = all_cells(args.smoke)
    if args.table:
        print(tables([asdict(cell) | {"key": cell.key} for cell in listed], args.out))
        return
    peers = [name for name in args.peers.split(",") if name]
    if set(peers) - {"keras", "torch"}:
        raise SystemExit(f"--peers={args.peers}: allowed are keras and torch, with a comma")
    cells = [cell for cell in listed if cell.contender in ("ours", "augmented", *peers)]
    cells = [
        cell for cell in cells if (args.smoke or cell.platform == args.platform) and re.search(args.cells, cell.key)
    ]
    if args.list:
        for cell in cells:
            print(f"{cell.key}{' done' if is_done(cell, args) else ''}")
        return
    groups, longest = list(missing_groups(cells, args)), 0.0
    for number, group in enumerate(groups):
        start = time.monotonic()
        if start + longest > args.deadline:
            print(f"{len(groups) - number} groups are left for another call")
            return
        print(f"{' '.join(map(str, group[0].group))}: {len(group)} cells", flush=True)
        try:
            run_group(group, args)
        except Stopped:
            print(
                f"--seconds are over in the middle of a group; {len(groups) - number} groups are left for another call"
            )
            return
        longest = max(longest, time.monotonic() - start)
        print(f"  {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
