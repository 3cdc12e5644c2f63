"""The device mesh: parameters on every device, each batch cut over all of them.

One axis, "data", over all devices of all hosts. Under `jit` XLA puts in the collectives, so BatchNorm sees
the global batch and a step on eight devices equals the step on one.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def make_mesh() -> Mesh:
    """Returns the mesh over every device of every host."""
    # Auto axes: linen layers carry no output shardings, which explicit axes would ask for.
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of parameters and metrics: a whole copy on each device."""
    return NamedSharding(mesh, PartitionSpec())


def split_batch(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: its first axis cut over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def check_batch(batch_size: int, mesh: Mesh, field: str) -> None:
    """Raises ValueError if a global batch can't be cut evenly over the mesh."""
    if batch_size % mesh.size:
        raise ValueError(
            f"{field}={batch_size} can't be cut over {mesh.size} devices; set it to a multiple of {mesh.size}"
        )


def to_devices(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, Any]:
    """Makes global arrays of this host's part of a batch; the transfer goes on in the background."""
    sharding = split_batch(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}
