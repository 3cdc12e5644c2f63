"""Two steps of a small network on all devices in each parallel mode: python tests/run_steps.py OUT.npz"""

import sys
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import conftest
import small_runs as runs

from lungjax import models
from lungjax.data import pipeline
from lungjax.models import trees
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
    runs.PLAIN, "model.name=wide", "model.head.dropout=0", "optim.name=sgd", "optim.lr=0.1", "train.batch_size=16",
    "augment=ct_cov19_original",
)  # fmt: skip


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


if __name__ == "__main__":
    arrays = {f"{mode}/{name}": array for mode in MODES if mode != "frozen" for name, array in steps(mode).items()}
    np.savez(sys.argv[1], **arrays)
