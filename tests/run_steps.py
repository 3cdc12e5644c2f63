"""Two steps of a small network on all devices in each parallel mode: python tests/run_steps.py OUT.npz"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

sys.path.insert(0, str(Path(__file__).parent))
import conftest
import small_runs as runs

from lungjax import models
from lungjax.data import pipeline
from lungjax.models import trees
from lungjax.models.ops import batch_norm
from lungjax.models.transfusion import Transfusion
from lungjax.runtime import mesh as meshes
from lungjax.training import program

FROZEN = "optim.frozen_batch_norm=frozen"
MODES = {
    "global": [],
    "sharded": ["train.shard_params=True"],
    "per_device": ["train.sync_batch_norm=False"],
    "frozen_per_device": [FROZEN, "train.sync_batch_norm=False"],
    "frozen": [FROZEN],
}
CONFIG = runs.changed(
    runs.PLAIN, "model.name=wide", "model.head.dropout=0", "optim.name=sgd", "optim.lr=0.1", "train.batch_size=16"
)


def steps(mode: str) -> dict[str, np.ndarray]:
    """Returns the parameters after two steps by path, and the bytes of the initial ones on the first device."""
    models.MODELS["wide"] = lambda: Transfusion(3, (32, 64))
    config = runs.changed(CONFIG, *MODES[mode])
    data, mesh = conftest.make_small_data(), meshes.make_mesh()
    built = program.build(config, data.classes, data.columns["label"][data.rows("train")], mesh)
    state = built.new_state({})
    arrays = {"bytes": sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state.params))}
    for _, batch in zip(range(2), pipeline.train_batches(data, config, start=0), strict=False):
        state, _ = built.train_step(state, meshes.to_devices(batch, mesh))
    return arrays | {path: np.asarray(leaf) for path, leaf in trees.flatten(state.params).items()}


def norm_outputs() -> dict[str, np.ndarray]:
    """Returns BatchNorm's outputs and input gradients with the batch on one device and sharded over all."""

    def both(x: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
        y, pull = jax.vjp(lambda x: batch_norm.batch_norm(x, jnp.ones(3), jnp.ones(3), 1e-3, nn.silu, x.dtype)[0], x)
        return y, pull(dy)[0]

    draw = np.random.default_rng(0).normal
    x, dy = draw(size=(2, 8, 6, 5, 3)).astype(np.float32)
    x *= np.arange(1, 9, dtype=np.float32).reshape(8, 1, 1, 1)  # each device has different statistics
    sharded = (jax.device_put(part, meshes.batch_sharding(meshes.make_mesh())) for part in (x, dy))
    return {"one": np.stack(jax.jit(both)(x, dy)), "sharded": np.stack(jax.jit(both)(*sharded))}


if __name__ == "__main__":
    arrays = {f"{mode}/{name}": array for mode in MODES if mode != "frozen" for name, array in steps(mode).items()}
    np.savez(sys.argv[1], **arrays, **{f"norm/{name}": array for name, array in norm_outputs().items()})
