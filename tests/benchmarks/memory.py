"""Memory of a long `lungjax.training.train.run` of a tiny network stays flat, validations and checkpoints on.

    python -m tests.benchmarks.memory [--steps=2000] [--eval_steps=100] [--save_steps=50]

Trains the "Simple" CNN at 64 px on the drawn data set phantom_ct/tiny and prints the process's resident memory at ten
points of the run, as markdown, and how much it grew from a quarter of the run to its end (wanted: nothing to speak
of). Pages of files that are mapped (libraries, records) come and go as the kernel likes, so the process's own data
stand beside the whole. Memory that XLA freed stays with the process, as in every run.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock


def resident() -> tuple[float, float]:
    """Returns this process's resident memory in MiB, all of it and its own data alone (Linux)."""
    lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
    found = {words[0]: int(words[1]) / 1024 for words in lines if words and words[0] in ("VmRSS:", "RssAnon:")}
    return found["VmRSS:"], found["RssAnon:"]


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
        train=TrainConfig(
            batch_size=16,
            steps=args.steps,
            eval_steps=args.eval_steps,
            save_steps=args.save_steps,
            monitor="slice.accuracy",
        ),
    )
    held: dict[int, tuple[float, float]] = {}  # step -> what `resident` said
    append = metrics_log.append

    def watch(path: Path, row: dict[str, Any]) -> None:
        held[row["step"]] = resident()
        append(path, row)

    with tempfile.TemporaryDirectory() as made, mock.patch.object(metrics_log, "append", watch):
        start = time.perf_counter()
        train.run(config, Path(made) / "run", Path(made) / "data")
        seconds = time.perf_counter() - start
    if args.steps not in held:
        raise SystemExit(
            "the run's log lines were not seen: lungjax.training.train no longer writes them by metrics_log.append"
        )

    def at(step: float) -> tuple[float, float]:
        return held[max(known for known in held if known <= max(step, min(held)))]

    print("\n| step | resident, MiB | its own data, MiB |\n| ---: | ---: | ---: |")
    for tenth in range(1, 11):
        whole, own = at(args.steps * tenth / 10)
        print(f"| {args.steps * tenth // 10} | {whole:.1f} | {own:.1f} |")
    quarter = args.steps // 4
    whole, own = (end - start for start, end in zip(at(quarter), at(args.steps), strict=True))
    validations, saves = args.steps // args.eval_steps, args.steps // args.save_steps
    each = own / (args.steps - quarter) * 1e3
    grown = f"{whole:+.1f} MiB, of its own data {own:+.1f} ({each:+.2f} for 1,000 steps)"
    print(f"\nFrom step {quarter} to {args.steps}: {grown}.")
    print(f"{validations} validations, {saves} checkpoints, {seconds:.0f} s in all.")


if __name__ == "__main__":
    main()
