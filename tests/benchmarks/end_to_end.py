"""Times the training loop fed from files, relative to the same compiled step on one batch in memory.

    python -m tests.benchmarks.end_to_end [--work=FOLDER] [--networks=cbr_small,efficientnet_b0] [--rounds=3]
        [--drawn=1000]

Each turn begins with untimed steps that consume the batches read during other turns.
"""

import itertools
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.benchmarks import harness, input_pipeline
from tests.benchmarks.input_pipeline import NAME, NAMES, SIDE

BATCH = 16
SECONDS = 10.0  # minimum length of a turn


class Loop:
    """The training loop of one network with several sources of batches; its state persists between turns."""

    def __init__(self, network: str, work: Path):
        import jax

        from lungjax.config import Config, DataConfig, InputSpec, ModelConfig, TrainConfig
        from lungjax.training import setup

        self.config = Config(
            data=DataConfig(dataset=NAME),
            input=InputSpec(size=(SIDE, SIDE)),
            model=ModelConfig(name=network),
            train=TrainConfig(batch_size=BATCH, steps=10**6, monitor="slice.accuracy"),
        )
        runs = {}
        for name, dataset in NAMES.items():
            config = replace(self.config, data=DataConfig(dataset=dataset))
            runs[name] = setup.set_up(config, work / "run", work / "data", "train", time.time())
        # All share one compiled step, since the configurations differ only in the name of the data set.
        self.program = runs["source"].program
        batches = {name: replace(run, program=self.program).batches(0) for name, run in runs.items()}
        memory = next(batches["source"])
        self.batches: dict[str, Iterator[dict[str, Any]]] = {"memory": itertools.repeat(memory), **batches}
        start = time.perf_counter()
        self.current, values = self.program.train_step(self.program.new_state({}), memory)
        jax.block_until_ready(values)
        print(f"{network}: {time.perf_counter() - start:.1f} s to compile and run one step", flush=True)

    def steps(self, name: str, count: int) -> None:
        """Trains on `count` batches of a source and fetches the metrics once, like the training loop for a log line."""
        import jax

        pending = []
        for batch in itertools.islice(self.batches[name], count):
            self.current, values = self.program.train_step(self.current, batch)
            pending.append(values)
        jax.device_get(pending)

    def turn(self, name: str) -> tuple[float, float]:
        """Returns images per second, and the fraction of the cores used by other processes."""
        log_steps, count = self.config.train.log_steps, 0
        self.steps(name, harness.cores() + 3 + self.config.data.prefetch)  # batches read ahead, plus one
        watch, until = harness.Watch(), time.perf_counter() + SECONDS
        while not count or time.perf_counter() < until:
            self.steps(name, log_steps)
            count += log_steps
        wall, _, others = watch.read()
        print(f"  {name}: {count * BATCH / wall:.2f} images/s, others {others:.0%}", file=sys.stderr, flush=True)
        return count * BATCH / wall, others


def main() -> None:
    args = harness.parse(__doc__, work=Path, networks=["cbr_small", "efficientnet_b0"], rounds=3, drawn=1000)
    harness.keep_freed_memory()
    rows = []
    with harness.folder(args.work) as work:
        if not (work / "drawn").exists():
            input_pipeline.draw(work / "drawn", args.drawn)
        input_pipeline.prepare(work / "drawn", work)
        for network in args.networks:
            loop = Loop(network, work)
            turns = [(name, *loop.turn(name)) for name in [*loop.batches] * args.rounds]
            rates = {name: [rate for other, rate, _ in turns if other == name] for name in loop.batches}
            cells = [f"{network}, {BATCH} x {SIDE} px", f"{statistics.median(rates['memory']):.1f}"]
            for name in NAMES:
                cells += [f"{statistics.median(rates[name]):.1f}", harness.ratio(rates[name], rates["memory"], 3)]
            rows.append([*cells, f"{max(others for *_, others in turns):.0%}"])
    print("\n" + harness.table(("images/s", "memory", "source", "fraction", "copy", "fraction", "others"), rows))


if __name__ == "__main__":
    main()
