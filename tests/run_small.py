"""A small run in a process of its own: python tests/run_small.py OUT [FIELD=VALUE ...] [--host=I --hosts=N --port=P]

Trains a small network with BatchNorm for three steps and saves test predictions as OUT.npz; with --tune a new head
on it as well. --pause waits before each step, for tests that end it. With --hosts several of these are one run.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import conftest

from lungjax import models
from lungjax.config import Config, EvalConfig, InputSpec, ModelConfig, OptimConfig, TrainConfig, overrides
from lungjax.evaluation import predictions
from lungjax.models import trees
from lungjax.report import write
from lungjax.runtime import distributed, signals
from lungjax.runtime.checkpoint import restore_best
from lungjax.training import metrics_log, train


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("fields", nargs="*")
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--fail_at", type=int, default=0)  # step whose batch can't be read on this host
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--host", type=int, default=0)
    parser.add_argument("--hosts", type=int, default=1)
    parser.add_argument("--port", type=int)
    flags = parser.parse_intermixed_args()
    if flags.hosts > 1:
        distributed.start(f"localhost:{flags.port}", flags.hosts, flags.host)
    elif "SLURM_JOB_ID" in os.environ:
        distributed.start()

    data = conftest.make_small_data()
    models.MODELS["small_bn"] = conftest.small_bn()
    train.open_dataset = lambda name, *_, **__: data
    write.draw = lambda *_, **__: {}  # half of the time of so small a run
    config = Config(
        input=InputSpec(size=(32, 32)),
        model=ModelConfig(name="small_bn"),
        optim=OptimConfig(name="sgd", lr=1e-2),
        train=TrainConfig(batch_size=16, steps=3, eval_steps=3, log_steps=1, monitor="slice.accuracy"),
        eval=EvalConfig(batch_size=8, examples=1, draws=0),
    )
    if flags.pause or flags.fail_at:
        real = train.device_batches

        def slowly(this, start):
            for step, batch in enumerate(real(this, start), start + 1):
                time.sleep(flags.pause)
                if step == flags.fail_at:
                    raise ValueError("7.png can't be read")
                yield batch

        train.device_batches = slowly
    for assignment in flags.fields:
        config = overrides.override(config, assignment)

    out = flags.out
    try:
        with distributed.abort_all_on_error():
            train.run(config, out, out.parent)
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except signals.Interrupted as stop:
        sys.exit(128 + stop.number)
    found = predictions.read(out / "predictions_test.csv")
    tuned = None
    if flags.tune:
        then = out.with_name(out.name + "_tuned")
        for assignment in (f"model.weights=run:{out}", "optim.tune=head"):
            config = overrides.override(config, assignment)
        train.run(config, then, out.parent)
        tuned = predictions.read(then / "predictions_test.csv").probabilities
    statistics = trees.flatten(restore_best(out)[0]["batch_stats"])
    if distributed.is_first_host():
        np.savez(
            out.with_suffix(".npz"),
            ids=found.ids,
            probabilities=found.probabilities,
            tuned=np.zeros(0) if tuned is None else tuned,
            losses=[row["train.loss"] for row in metrics_log.read(out / "metrics.jsonl") if "train.loss" in row],
            mean=next((v for k, v in statistics.items() if k.endswith("mean")), np.zeros(0)),
            devices=jax.device_count(),
        )


if __name__ == "__main__":  # reading processes import this file as well
    main()
