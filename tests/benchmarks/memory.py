"""Measures memory in a long run with validations and checkpoints: python -m tests.benchmarks.memory [--steps=2000]"""

import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

from tests.benchmarks import harness


def main() -> None:
    steps = harness.parse(__doc__, steps=2000).steps
    harness.keep_freed_memory()
    from lungjax.config import Config, DataConfig, InputSpec, ModelConfig, OptimConfig, TrainConfig
    from lungjax.training import train
    from lungjax.training.metrics_log import MetricsLog

    config = Config(
        name="memory",
        data=DataConfig(dataset="phantom_ct/tiny"),
        input=InputSpec(size=(64, 64), crop="box", mean=(0.4,), std=(0.3,)),
        model=ModelConfig(name="simple"),
        optim=OptimConfig(lr=1e-3),
        train=TrainConfig(batch_size=16, monitor="slice.accuracy", steps=steps, eval_steps=100, save_steps=50),
    )
    memory: dict[int, float] = {}  # resident MiB by step
    write = MetricsLog.write

    def record(log: MetricsLog, step: int, row: dict[str, Any]) -> None:
        memory[step] = harness.resident()
        write(log, step, row)

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(MetricsLog, "write", record):
        train.run(config, Path(folder) / "run", Path(folder) / "data")

    tenths = [max(steps * tenth // 10, min(memory)) for tenth in range(1, 11)]
    shown = [max(step for step in memory if step <= end) for end in tenths]
    print("\n" + harness.table(("step", "resident, MiB"), [(step, f"{memory[step]:.1f}") for step in shown]))


if __name__ == "__main__":
    main()
