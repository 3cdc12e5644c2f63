"""Times lungjax's training loop fed from files against the same compiled step on a batch that is already there.

    python -m tests.benchmarks.end_to_end [--work=FOLDER] [--source=FOLDER] [--networks=cbr_small,efficientnet_b0]
        [--batch=16] [--rounds=3] [--seconds=10] [--drawn=1000]

FOLDER of --source holds a folder of JPEG or PNG files for each class; without it 512 x 512 PNG slices are drawn. They
are prepared as they are ("source") and as a copy at 224 x 224 ("copy"). The loop is what `lungjax.training.train` runs:
`train.device_batches`, the step, and metrics fetched every `train.log_steps`; the third contender is the same but for
one batch over and over. All are called in turns in one process, with one compiled step; a turn starts with steps that
don't count, so that batches read ahead during the others' turns are used up. Prints markdown: images per second
(median), and what part of the rate on the batch that is there each reaches in the same round (wanted: 0.95).
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
    """The training loop of one network: a state that goes on from turn to turn, and where its batches come from."""

    def __init__(self, network: str, batch: int, work: Path):
        import jax

        from lungjax.config import Config, DataConfig, InputSpec, ModelConfig, TrainConfig
        from lungjax.training import train

        config = Config(
            data=DataConfig(dataset=NAME),
            input=InputSpec(size=(SIDE, SIDE)),
            model=ModelConfig(name=network),
            train=TrainConfig(batch_size=batch, steps=10**6, monitor="slice.accuracy"),
        )
        set_up = {name: replace(config, data=DataConfig(dataset=data)) for name, data in NAMES.items()}
        runs = {
            name: train.set_up(one, work / "run", work / "data", "train", time.time()) for name, one in set_up.items()
        }
        # One compiled step for all: the configurations differ in the data set's name alone.
        self.config, self.program = config, runs["source"].program
        self.batches: dict[str, Iterator[dict[str, Any]]] = {
            name: train.device_batches(replace(run, program=self.program), 0) for name, run in runs.items()
        }
        self.batches = {"there": itertools.repeat(next(self.batches["source"])), **self.batches}
        start = time.perf_counter()
        self.current = self.program.new_state({})
        self.current, values = self.program.train_step(self.current, next(self.batches["there"]))
        jax.block_until_ready(values)
        print(f"{network}: {time.perf_counter() - start:.1f} s to compile and run one step", flush=True)

    def steps(self, name: str, count: int) -> None:
        """Trains on so many batches of a contender and fetches the metrics once, as the loop does for a log line."""
        import jax

        waiting = []
        for batch in itertools.islice(self.batches[name], count):
            self.current, values = self.program.train_step(self.current, batch)
            waiting.append(values)
        jax.device_get(waiting)

    def turn(self, name: str, seconds: float) -> tuple[float, float]:
        """Returns images a second over at least so long, and the share of the cores that others took."""
        from lungjax.runtime import environment

        log_steps = self.config.train.log_steps
        ahead = environment.cores() + 2 + self.config.data.prefetch  # what reading threads and the devices hold
        self.steps(name, ahead + 1)
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
    parser.add_argument("--source", type=Path, help="a folder of images for each class; drawn if left out")
    parser.add_argument("--work", type=Path, help="where the data goes; kept, so a second run is quicker")
    parser.add_argument("--networks", default="cbr_small,efficientnet_b0")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0, help="of a turn, at least; whole log lines")
    parser.add_argument("--drawn", type=int, default=1000)
    args = parser.parse_args()

    from lungjax.runtime import environment

    environment.keep_freed_memory()  # as lungjax.main does, before jax is imported
    with tempfile.TemporaryDirectory() as made:
        work = args.work or Path(made)
        source = args.source or work / "drawn"
        if not source.exists():
            input_pipeline.draw(source, args.drawn)
        input_pipeline.prepare(source, work)
        lines = []
        for network in args.networks.split(","):
            loop = Loop(network, args.batch, work)
            rates: dict[str, list[float]] = {name: [] for name in loop.batches}
            others = 0.0
            for _ in range(args.rounds):
                for name, rate in rates.items():
                    measured, taken = loop.turn(name, args.seconds)
                    rate.append(measured)
                    others = max(others, taken)
                    print(f"  {name}: {measured:.2f} images/s, others {taken:.0%}", file=sys.stderr, flush=True)
            line = [f"{network}, {args.batch} x {SIDE} px", f"{statistics.median(rates['there']):.1f}"]
            for name in NAMES:
                parts = [a / b for a, b in zip(rates[name], rates["there"], strict=True)]
                line.append(f"{statistics.median(rates[name]):.1f}")
                line.append(f"{statistics.median(parts):.3f} ({min(parts):.3f}..{max(parts):.3f})")
            lines.append([*line, f"{others:.0%}"])
    heads = ["images/s", "batch there", "from source", "of that", "from a copy", "of that", "others"]
    print(f"\n| {' | '.join(heads)} |\n| --- |{' ---: |' * (len(heads) - 1)}")
    for line in lines:
        print(f"| {' | '.join(line)} |")


if __name__ == "__main__":
    main()
