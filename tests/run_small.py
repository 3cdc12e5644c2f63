"""Trains cbr_tiny three steps on the small data of conftest.py and saves the test predictions: OUT.npz."""

import sys
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import conftest

from lungjax import predictions, train, trees
from lungjax.checkpoint import Checkpoints
from lungjax.config import Config, EvalConfig, InputSpec, ModelConfig, OptimConfig, TrainConfig

data = conftest.make_small_data()
train.open_dataset = lambda name, data_dir: data
config = Config(
    input=InputSpec(size=(64, 64)),
    model=ModelConfig(name="cbr_tiny"),
    optim=OptimConfig(name="sgd", lr=1e-2),
    train=TrainConfig(batch_size=16, steps=3, eval_steps=3, monitor="slice.accuracy"),
    eval=EvalConfig(batch_size=8, examples=1),
)
out = Path(sys.argv[1])
train.run(config, out, out.parent)
found = predictions.read(out / "predictions_test.csv")
with Checkpoints(out) as checkpoints:
    statistics = trees.flatten(checkpoints.restore_best(None)[0]["batch_stats"])
np.savez(
    out.with_suffix(".npz"),
    ids=found.ids,
    probabilities=found.probabilities,
    mean=next(v for k, v in statistics.items() if k.endswith("mean")),
    devices=jax.device_count(),
)
