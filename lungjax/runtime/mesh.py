"""The device mesh: each batch is sharded over the devices, parameters are replicated or sharded too.

One axis, "data", over all devices of all hosts. Under `jit` XLA inserts the collectives, so BatchNorm sees the global
batch and a step on eight devices equals the step on one.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXIS = "data"
MIN_SHARDED_SIZE = 2**14  # elements; smaller arrays are replicated, since each sharded one costs a collective


def make_mesh(count: int = 0, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns the mesh over `devices` (None: all of all hosts), or over the first `count` of them.

    Raises ValueError if there are fewer, or if a host would have none.
    """
    devices = list(jax.devices() if devices is None else devices)
    if count > len(devices):
        raise ValueError(f"train.devices={count}: allowed are 1 to {len(devices)}, the devices here, or 0 for all")
    if count and count < len(devices) and jax.process_count() > 1:
        raise ValueError(f"train.devices={count}: a run on {jax.process_count()} hosts uses all devices; leave it 0")
    devices = devices[: count or None]
    # Auto axes: linen layers carry no output shardings, which explicit axes would ask for.
    return jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def platform(mesh: Mesh) -> str:
    """Returns "cpu", "gpu" or "tpu", the kind of the mesh's devices, which may not be those of this machine."""
    return mesh.devices.flat[0].platform


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of metrics, and of parameters by default: a copy on each device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch, over its first axis."""
    return NamedSharding(mesh, PartitionSpec(AXIS))


def state_sharding(shapes: Any, mesh: Mesh, shard: bool) -> Any:
    """Returns a tree like `shapes` of shardings: replicated, or with `shard` over the longest axis of large arrays.

    Only an axis that the devices divide evenly is sharded; an array without one is replicated.
    """

    def one(leaf: Any) -> NamedSharding:
        sides = [(side, axis) for axis, side in enumerate(leaf.shape) if side % mesh.size == 0]
        if not shard or not sides or leaf.size < MIN_SHARDED_SIZE:
            return replicated(mesh)
        return NamedSharding(mesh, PartitionSpec(*[None] * max(sides)[1], AXIS))

    return jax.tree.map(one, shapes)


def check_batch(batch_size: int, mesh: Mesh, field: str, parts: int = 1) -> None:
    """Raises ValueError if a global batch can't be split evenly into `parts` micro-batches over the mesh."""
    unit = mesh.size * parts
    if batch_size % unit:
        below = batch_size // unit * unit
        near = f"{below} or {below + unit}" if below else f"{unit}"
        micro = f" and train.accumulate={parts} micro-batches" if parts > 1 else ""
        raise ValueError(f"{field}={batch_size} can't be split over {mesh.size} devices{micro}; set it to {near}")


def per_device_gradients(gradients: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """Computes gradients on each device's part of the batch and averages all results, as with `jax.pmap`.

    `gradients(params, frozen_params, batch_stats, batch, key)` is that of the training step. Each device has its own
    key, and mixes (mixup, cutmix) only its own images.
    """

    def local(params: Any, frozen_params: Any, batch_stats: Any, batch: Any, key: jax.Array) -> Any:
        key = jax.random.fold_in(key, jax.lax.axis_index(AXIS))
        return jax.lax.pmean(gradients(params, frozen_params, batch_stats, batch, key), AXIS)

    copy, part = PartitionSpec(), PartitionSpec(AXIS)
    # check_vma=False: differentiation would otherwise sum the gradients over the devices before the mean.
    return jax.shard_map(local, mesh=mesh, in_specs=(copy, copy, copy, part, copy), out_specs=copy, check_vma=False)


def with_gathered_params(gradients: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """Gathers sharded parameters on every device, and shards their gradients again.

    The constraints keep the compiler from sharding the convolutions themselves.
    """

    def wrapped(params: Any, frozen_params: Any, batch_stats: Any, batch: Any, key: jax.Array) -> Any:
        params, frozen_params = jax.lax.with_sharding_constraint((params, frozen_params), replicated(mesh))
        grads, batch_stats, metrics = gradients(params, frozen_params, batch_stats, batch, key)
        shardings = state_sharding(grads, mesh, shard=True)
        return jax.lax.with_sharding_constraint(grads, shardings), batch_stats, metrics

    return wrapped


def to_devices(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, Any]:
    """Returns global arrays from this host's part of a batch; the transfer continues in the background."""
    sharding = batch_sharding(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}
