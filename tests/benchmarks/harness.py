"""Flags, timing, processes that take turns, parallel commands, and Markdown tables for the benchmarks.

    python -m tests.benchmarks.harness MODULE FUNCTION        # the child process of `Process`

Other frameworks may run in other interpreters, so this module needs only the standard library.
"""

import argparse
import contextlib
import csv
import importlib
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent

CPU = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}  # environment of processes that compute on the CPU


def parse(doc: str | None, required: Iterable[str] = (), **defaults: Any) -> argparse.Namespace:
    """Parses the command line; each keyword defines a flag by its default value.

    False defines a switch, a list a comma-separated flag, and a type a flag without a default.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in defaults.items():
        if default is False:
            parser.add_argument(f"--{name}", action="store_true")
        elif isinstance(default, list):
            item = type(default[0])
            parser.add_argument(
                f"--{name}", default=default, type=lambda text, item=item: [item(part) for part in text.split(",")]
            )
        else:
            kind, value = (default, None) if isinstance(default, type) else (type(default), default)
            parser.add_argument(f"--{name}", type=kind, default=value, required=name in required)
    return parser.parse_args()


def keep_freed_memory() -> None:
    """Makes the process keep freed memory, as `lungjax.main` does. Call this before importing jax."""
    from lungjax.runtime import environment

    environment.keep_freed_memory()


def phantom(seed: int) -> tuple[str, Any]:
    """Returns the class of a synthetic CT slice and its image of 512 x 512 pixels."""
    from PIL import Image

    from lungjax.datasets.phantom import slices

    patient = slices.new_patient(seed, slices.CLASSES[seed % len(slices.CLASSES)])
    drawn = slices.draw_slice(patient, slices.levels(patient, 5)[seed % 5])
    image = Image.fromarray(slices.gray(drawn.hu, patient.window))
    return patient.finding, image.resize((512, 512), Image.Resampling.BICUBIC)


def write_labels(source: Path, target: Path, rows: Sequence[dict[str, str]]) -> None:
    """Writes `rows` to labels.csv in the new folder `target`, which links the image folders of `source`."""
    target.mkdir(parents=True)
    for folder in source.iterdir():
        if folder.is_dir():
            (target / folder.name).symlink_to(folder.resolve())
    with (target / "labels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def timed(call: Callable[[], Any]) -> float:
    """Returns the seconds that a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def take_turns(calls: Mapping[Any, Callable[[], Any]], rounds: int) -> dict[Any, list[Any]]:
    """Runs the calls in turns, after a warm-up round; returns the results of each call, one per round."""
    results: dict[Any, list[Any]] = {key: [] for key in calls}
    for number in range(rounds + 1):
        for key, call in calls.items():
            result = call()
            if number:
                results[key].append(result)
    return results


def busy_seconds() -> float:
    """Returns the busy seconds of the cores that this process may use, including work of other processes."""
    names = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    times = [line.split() for line in Path("/proc/stat").read_text().splitlines() if line.split()[0] in names]
    # user, nice, system, irq, softirq (not idle, iowait); guests are part of user
    return sum(int(t[i]) for t in times for i in (1, 2, 3, 6, 7)) / os.sysconf("SC_CLK_TCK")


def peak_bytes() -> int:
    """Returns the peak resident memory of this process."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def resident(pid: int | str = "self") -> float:
    """Returns the resident memory of a process in MiB."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


class Watch:
    """Measures wall time, processor time and the load from other processes since its creation."""

    def __init__(self, processor: Callable[[], float] = time.process_time):
        """Starts measuring; `processor` returns the processor seconds of the measured processes."""
        self.processor = processor
        self.start = (time.perf_counter(), processor(), busy_seconds())

    def read(self) -> tuple[float, float, float]:
        """Returns wall seconds, processor seconds, and the fraction of the cores used by other processes."""
        now = (time.perf_counter(), self.processor(), busy_seconds())
        wall, used, busy = (b - a for a, b in zip(self.start, now, strict=True))
        return wall, used, max((busy - used) / wall / cores(), 0.0)


class Process:
    """A process that runs a function of a module in this folder and is idle between requests.

    The function returns facts and a function that maps a request to its answer. Facts, requests and answers are JSON.
    """

    def __init__(self, python: str, module: str, function: str, env: Mapping[str, str] = CPU, **arguments: Any):
        """Starts the process with `python` (default: this interpreter); the first `answer` returns the facts."""
        env = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "PYTHONSAFEPATH": "1",  # modules in this folder must not shadow libraries
            "TF_CPP_MIN_LOG_LEVEL": "3",
            **env,
        }
        self.python = python or sys.executable
        command = [self.python, "-m", "tests.benchmarks.harness", module, function]
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.log}
        self.process = subprocess.Popen(command, text=True, env=env, **pipes)
        self._send(arguments)

    def _send(self, request: dict[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError):  # the process has ended; `answer` raises its error
            print(json.dumps(request), file=self.process.stdin, flush=True)

    def answer(self) -> Any:
        """Returns the next answer; exits with the error of the process if it failed."""
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            end = " | ".join(self.log.read().splitlines()[-4:])
            sys.exit(f"{self.python} ended with code {self.process.wait()}: {end[-600:]}")
        answer = json.loads(line)
        if isinstance(answer, dict) and "error" in answer:
            sys.exit(f"{self.python}: {answer['error']}")
        return answer

    def ask(self, **request: Any) -> Any:
        """Sends a request and returns its answer."""
        self._send(request)
        return self.answer()

    def close(self) -> None:
        """Kills the process."""
        self.process.kill()
        self.process.wait()


def main() -> None:
    """Answers requests until the input ends or an error occurs; the error is sent as the last answer."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of libraries must not mix with the answers
    module, function = sys.argv[1:]
    try:
        start = getattr(importlib.import_module(f"tests.benchmarks.{module}"), function)
        facts, reply = start(**json.loads(sys.stdin.readline()))
        print(json.dumps(facts), file=out, flush=True)
        for line in sys.stdin:
            print(json.dumps(reply(**json.loads(line))), file=out, flush=True)
    except Exception as error:
        traceback.print_exc()
        print(json.dumps({"error": f"{type(error).__name__}: {error}"[:600]}), file=out, flush=True)
    os._exit(0)  # exits without waiting for threads of libraries


def run_commands(commands: Mapping[Path, Sequence[str]], jobs: int) -> None:
    """Runs commands of the package (module, argument, ...), `jobs` at a time on separate cores; output goes to a log.

    `commands` are named by their log files. Prints the time and peak memory of each, and exits if one failed, after all
    have run. When stopped by Ctrl-C or SIGTERM, it stops the commands with SIGTERM, so that training saves its state.
    """
    own, queue, failed = sorted(os.sched_getaffinity(0)), list(commands.items()), []
    if not 1 <= jobs <= len(own):
        sys.exit(f"--jobs={jobs}: expected 1 to {len(own)}, the number of cores")
    free = [own[i::jobs] for i in range(jobs)]
    running: dict[int, tuple[list[int], float, Path]] = {}  # cores, start and log by process
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        while queue or running:
            while queue and free:
                log, (module, *arguments) = queue.pop(0)
                log.parent.mkdir(parents=True, exist_ok=True)
                os.sched_setaffinity(0, free[0])  # the child inherits it
                with log.open("a") as file:
                    # In a new session, so that Ctrl-C reaches only this process.
                    command, session = [sys.executable, "-m", module, *arguments], {"start_new_session": True}
                    process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, **session)
                running[process.pid] = free.pop(0), time.time(), log
            os.sched_setaffinity(0, own)
            pid, status, usage = os.wait3(0)
            cores, start, log = running.pop(pid)
            free.append(cores)
            failed += [log] * (status != 0)
            seconds = f"{time.time() - start:.0f} s, {usage.ru_utime + usage.ru_stime:.0f} s of CPU time"
            memory = f"{usage.ru_maxrss / 2**20:.2f} GiB"
            code = os.waitstatus_to_exitcode(status)
            print(f"{log.stem}: {seconds}, {memory}, exit code {code}; {len(queue)} to go", flush=True)
    finally:
        for pid in running:
            os.kill(pid, signal.SIGTERM)
        for pid in running:
            os.waitpid(pid, 0)
    if failed:
        sys.exit(f"{len(failed)} of {len(commands)} commands failed, see {', '.join(map(str, failed))}")


def ratio(values: Sequence[float], units: Sequence[float]) -> str:
    """Returns the "median (lowest..highest)" of the ratios of each round."""
    ratios = [a / b for a, b in zip(values, units, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}..{max(ratios):.2f})"


def table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Returns a Markdown table whose first column is left-aligned and whose others are right-aligned."""
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)


if __name__ == "__main__":
    main()
