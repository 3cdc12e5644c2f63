"""Checks that memory stays flat over a long `lungjax.training.train.run` with validations and checkpoints.

    python -m tests.benchmarks.memory [--steps=2000] [--eval_steps=100] [--save_steps=50]

Trains the "Simple" CNN at 64 px on the synthetic data set phantom_ct/tiny and prints the process's resident memory at
ten points of the run, as markdown, and its growth from a quarter of the run to the end. Pages of mapped files
(libraries, records) come and go, so private memory is listed separately. Memory freed by XLA stays with the process.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock


def resident() -> tuple[float, float]:
    """Returns the resident and the private memory of this process in MiB (Linux)."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) / 1024, int(fields["RssAnon"].split()[0]) / 1024


def main() -> None:
    """Runs and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--eval_steps", type=int, default=100)
    parser.add_argument("--save_steps", type=int, default=50)
    args = parser.parse_args()

    from lungjax.runtime import environment

    environment.keep_freed_memory()  # as lungjax.main does, before jax is imported
    from lungjax.config import Config, DataConfig, InputSpec, ModelConfig, OptimConfig, TrainConfig
    from lungjax.training import metrics_log, train

    config = Config(
        name="memory",
        data=DataConfig(dataset="phantom_ct/tiny"),
        input=InputSpec(size=(64, 64), crop="box", mean=(0.4,), std=(0.3,)),
        model=ModelConfig(name="simple"),
        optim=OptimConfig(lr=1e-3),
        train=TrainConfig(batch_size=16, monitor="slice.accuracy", **vars(args)),
    )
    memory: dict[int, tuple[float, float]] = {}  # by step
    append = metrics_log.append

    def record(path: Path, row: dict[str, Any]) -> None:
        memory[row["step"]] = resident()
        append(path, row)

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(metrics_log, "append", record):
        start = time.perf_counter()
        train.run(config, Path(folder) / "run", Path(folder) / "data")
        seconds = time.perf_counter() - start
    if args.steps not in memory:
        raise SystemExit("no log lines: lungjax.training.train no longer writes them by metrics_log.append")

    def at(step: float) -> tuple[float, float]:
        return memory[max(logged for logged in memory if logged <= max(step, min(memory)))]

    print("\n| step | resident, MiB | private, MiB |\n| ---: | ---: | ---: |")
    for tenth in range(1, 11):
        resident_mib, private = at(args.steps * tenth / 10)
        print(f"| {args.steps * tenth // 10} | {resident_mib:.1f} | {private:.1f} |")
    quarter = args.steps // 4
    growth, private = (end - start for start, end in zip(at(quarter), at(args.steps), strict=True))
    rate = private / (args.steps - quarter) * 1e3
    print(f"\nFrom step {quarter}: {growth:+.1f} MiB, private {private:+.1f} ({rate:+.2f} per 1,000 steps).")
    print(f"{args.steps // args.eval_steps} validations, {args.steps // args.save_steps} checkpoints, {seconds:.0f} s.")


if __name__ == "__main__":
    main()
