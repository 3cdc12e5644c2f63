"""Trains a small network with BatchNorm for three steps, then a new head on it; saves test predictions as OUT.npz."""

import sys
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import conftest

from lungjax import models, overrides, predictions, train, trees
from lungjax.checkpoint import restore_best
from lungjax.config import Config, EvalConfig, InputSpec, ModelConfig, OptimConfig, TrainConfig

data = conftest.make_small_data()
models.MODELS["small_bn"] = conftest.small_bn()
train.open_dataset = lambda name, *_, **__: data
config = Config(
    input=InputSpec(size=(32, 32)),
    model=ModelConfig(name="small_bn"),
    optim=OptimConfig(name="sgd", lr=1e-2),
    train=TrainConfig(batch_size=16, steps=3, eval_steps=3, monitor="slice.accuracy"),
    eval=EvalConfig(batch_size=8, examples=1),
)
out = Path(sys.argv[1])
train.run(config, out, out.parent)
found = predictions.read(out / "predictions_test.csv")
tuned = config
for assignment in (f"model.weights=run:{out}", "optim.tune=head"):
    tuned = overrides.override(tuned, assignment)
then = out.with_name(out.name + "_tuned")
train.run(tuned, then, out.parent)
statistics = trees.flatten(restore_best(out)[0]["batch_stats"])
np.savez(
    out.with_suffix(".npz"),
    ids=found.ids,
    probabilities=found.probabilities,
    tuned=predictions.read(then / "predictions_test.csv").probabilities,
    mean=next(v for k, v in statistics.items() if k.endswith("mean")),
    devices=jax.device_count(),
)
