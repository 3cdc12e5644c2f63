"""The device mesh with one axis over all devices of all hosts: sharded batches, replicated or sharded parameters."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXIS = "data"
MIN_SHARDED_SIZE = 2**14  # elements; smaller arrays are replicated, since each sharded one costs a collective


def make_mesh(count: int = 0, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns the mesh over the first `count` (0: all) of `devices` (None: all). Raises ValueError for too few."""
    devices = list(jax.devices() if devices is None else devices)
    if count > len(devices):
        raise ValueError(f"train.devices={count}: expected 1 to {len(devices)}, the devices here, or 0 for all")
    if count and count < len(devices) and jax.process_count() > 1:
        raise ValueError(f"train.devices={count}: a run on {jax.process_count()} hosts uses all devices; leave it at 0")
    devices = devices[: count or None]
    # Auto axes: explicit ones would require output shardings, which linen layers lack.
    return jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of metrics and, by default, of parameters: a copy on each device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch over its first axis."""
    return NamedSharding(mesh, PartitionSpec(AXIS))


def state_sharding(shapes: Any, mesh: Mesh, shard: bool) -> Any:
    """Returns shardings with the structure of `shapes`: arrays are replicated; with `shard`, large ones are split.

    An array is split along the longest axis that is divisible by the number of devices, if there is one.
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


def per_device(train_step: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """Runs `train_step(state, batch, axis_name=...)` on each device's part of the batch, as with `jax.pmap`.

    The step averages gradients, metrics and BatchNorm statistics over that axis, and mixes (mixup, cutmix) per device.
    """
    copy, part = PartitionSpec(), PartitionSpec(AXIS)
    # check_vma=False: differentiation would otherwise sum the gradients over the devices before the mean.
    return jax.shard_map(
        partial(train_step, axis_name=AXIS), mesh=mesh, in_specs=(copy, part), out_specs=copy, check_vma=False
    )


def gather_params(apply: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """Gathers sharded parameters on every device before a network's `apply`, so that no convolution is sharded."""

    def wrapped(variables: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        params = jax.lax.with_sharding_constraint(variables["params"], replicated(mesh))
        return apply({**variables, "params": params}, *args, **kwargs)

    return wrapped


def to_devices(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, Any]:
    """Returns global arrays from this process's shard of a batch; the transfer is asynchronous."""
    sharding = batch_sharding(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}
