"""Times the training loop fed from files against the same compiled step on one batch in memory.

    python -m tests.benchmarks.end_to_end [--work=FOLDER] [--source=FOLDER] [--networks=cbr_small,efficientnet_b0]
        [--batch=16] [--rounds=3] [--seconds=10] [--drawn=1000]

--source has one folder of JPEG or PNG files per class; without it 512 x 512 PNG slices are drawn. They are prepared
unmodified ("source") and as a copy at 224 x 224 ("copy"). The loop is that of `lungjax.training.train`:
`train.device_batches`, the step, and metrics fetched every `train.log_steps`; the third contender repeats one batch
("memory"). They take turns in one process, with one compiled step; a turn starts with uncounted steps, so that batches
read ahead during other turns are used up. Prints markdown: images per second (median), and the fraction of the rate in
memory that each reaches in the same round (target: 0.95).
"""

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.benchmarks import input_pipeline
from tests.benchmarks.input_pipeline import NAME, SIDE
from tests.benchmarks.train_peers import busy_seconds

NAMES = {"source": NAME, "copy": f"{NAME}-{SIDE}"}


class Loop:
    """The training loop of one network: a state that continues from turn to turn, and its sources of batches."""

    def __init__(self, network: str, batch: int, work: Path):
        import jax

        from lungjax.config import Config, DataConfig, InputSpec, ModelConfig, TrainConfig
        from lungjax.training import train

        self.config = Config(
            data=DataConfig(dataset=NAME),
            input=InputSpec(size=(SIDE, SIDE)),
            model=ModelConfig(name=network),
            train=TrainConfig(batch_size=batch, steps=10**6, monitor="slice.accuracy"),
        )
        runs = {}
        for name, dataset in NAMES.items():
            config = replace(self.config, data=DataConfig(dataset=dataset))
            runs[name] = train.set_up(config, work / "run", work / "data", "train", time.time())
        # One compiled step for all: the configurations differ only in the name of the data set.
        self.program = runs["source"].program
        batches = {name: train.device_batches(replace(run, program=self.program), 0) for name, run in runs.items()}
        memory = next(batches["source"])
        self.batches: dict[str, Iterator[dict[str, Any]]] = {"memory": itertools.repeat(memory), **batches}
        start = time.perf_counter()
        self.current, values = self.program.train_step(self.program.new_state({}), memory)
        jax.block_until_ready(values)
        print(f"{network}: {time.perf_counter() - start:.1f} s to compile and run one step", flush=True)

    def steps(self, name: str, count: int) -> None:
        """Trains on `count` batches of a contender and fetches the metrics once, as the loop does for a log line."""
        import jax

        pending = []
        for batch in itertools.islice(self.batches[name], count):
            self.current, values = self.program.train_step(self.current, batch)
            pending.append(values)
        jax.device_get(pending)

    def turn(self, name: str, seconds: float) -> tuple[float, float]:
        """Returns images per second over at least `seconds`, and the fraction of the cores used by other processes."""
        from lungjax.runtime import environment

        log_steps = self.config.train.log_steps
        self.steps(name, environment.cores() + 3 + self.config.data.prefetch)  # batches read ahead, and one more
        busy, used, start, count = busy_seconds(), time.process_time(), time.perf_counter(), 0
        while not count or time.perf_counter() - start < seconds:
            self.steps(name, log_steps)
            count += log_steps
        wall = time.perf_counter() - start
        others = (busy_seconds() - busy - (time.process_time() - used)) / wall / environment.cores()
        return count * self.config.train.batch_size / wall, max(others, 0.0)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, help="one folder of images per class; drawn if omitted")
    parser.add_argument("--work", type=Path, help="folder for the data; kept, so a second run is faster")
    parser.add_argument("--networks", default="cbr_small,efficientnet_b0")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0, help="minimum length of a turn")
    parser.add_argument("--drawn", type=int, default=1000)
    args = parser.parse_args()

    from lungjax.runtime import environment

    environment.keep_freed_memory()  # as in lungjax.main, before jax is imported
    heads = ["images/s", "memory", "source", "fraction", "copy", "fraction", "others"]
    lines = [f"| {' | '.join(heads)} |", f"| --- |{' ---: |' * (len(heads) - 1)}"]
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        source = args.source or work / "drawn"
        if not source.exists():
            input_pipeline.draw(source, args.drawn)
        input_pipeline.prepare(source, work)
        for network in args.networks.split(","):
            loop = Loop(network, args.batch, work)
            rates: dict[str, list[float]] = {name: [] for name in loop.batches}
            busiest = 0.0
            for name in [*rates] * args.rounds:
                rate, others = loop.turn(name, args.seconds)
                rates[name].append(rate)
                busiest = max(busiest, others)
                print(f"  {name}: {rate:.2f} images/s, others {others:.0%}", file=sys.stderr, flush=True)
            cells = [f"{network}, {args.batch} x {SIDE} px", f"{statistics.median(rates['memory']):.1f}"]
            for name in NAMES:
                parts = [a / b for a, b in zip(rates[name], rates["memory"], strict=True)]
                cells.append(f"{statistics.median(rates[name]):.1f}")
                cells.append(f"{statistics.median(parts):.3f} ({min(parts):.3f}..{max(parts):.3f})")
            lines.append(f"| {' | '.join([*cells, f'{busiest:.0%}'])} |")
    print("\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
