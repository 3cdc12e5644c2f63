"""Two steps of a small network in each way of using eight devices: python tests/run_steps.py OUT.npz"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

sys.path.insert(0, str(Path(__file__).parent))
import conftest

from lungjax import models
from lungjax.config import Config, InputSpec, ModelConfig, OptimConfig, TrainConfig, overrides
from lungjax.data import pipeline
from lungjax.models import trees
from lungjax.models.ops import batch_norm
from lungjax.models.transfusion import Transfusion
from lungjax.runtime import mesh as meshes
from lungjax.training import program

WAYS = {
    "global": [],
    "per_device": ["train.sync_batch_norm=False"],
    "cut": ["train.shard_params=True"],
    "live": ["optim.frozen_batch_norm=with_layer"],
    "live_per_device": ["optim.frozen_batch_norm=with_layer", "train.sync_batch_norm=False"],
}
models.MODELS["wide"] = lambda: Transfusion(3, (64, 128))
data = conftest.make_small_data()
CONFIG = Config(
    input=InputSpec(size=(32, 32)),
    model=ModelConfig(name="wide"),
    optim=OptimConfig(name="sgd", lr=0.1, frozen_batch_norm="frozen"),
    train=TrainConfig(batch_size=16, steps=2),
)
mesh = meshes.make_mesh()
arrays = {}
for name, assignments in WAYS.items():
    config = CONFIG
    for assignment in assignments:
        config = overrides.override(config, assignment)
    compiled = program.build(config, data.classes, data.columns["label"][data.rows("train")], mesh)
    state = compiled.new_state({})
    if name in ("global", "cut"):
        on_one = [leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state.params)]
        arrays["bytes_whole" if name == "global" else "bytes_cut"] = sum(on_one)
    if name == "global":
        arrays |= {f"first/{path}": np.asarray(leaf) for path, leaf in trees.flatten(state.params).items()}
    for _, batch in zip(range(2), pipeline.train_batches(data, config, start=0), strict=False):
        state, _ = compiled.train_step(state, meshes.to_devices(batch, mesh))
    arrays |= {f"{name}/{path}": np.asarray(leaf) for path, leaf in trees.flatten(state.params).items()}


def both(x, dy):
    y, pull = jax.vjp(lambda x: batch_norm.batch_norm(x, jnp.ones(3), jnp.ones(3), 1e-3, nn.silu, x.dtype)[0], x)
    return y, pull(dy)[0]


draw = np.random.default_rng(0).normal
x, dy = draw(size=(2, 8, 6, 5, 3)).astype(np.float32)
x *= np.arange(1, 9, dtype=np.float32).reshape(8, 1, 1, 1)  # so that a device's own statistics would be others
spread = (jax.device_put(part, meshes.batch_sharding(mesh)) for part in (x, dy))
arrays |= {"norm/alone": np.stack(jax.jit(both)(x, dy)), "norm/spread": np.stack(jax.jit(both)(*spread))}
np.savez(sys.argv[1], **arrays)
