"""The device mesh: each batch cut over the devices, parameters on every one or cut as well.

One axis, "data", over all devices of all hosts. Under `jit` XLA puts in the collectives, so BatchNorm sees
the global batch and a step on eight devices equals the step on one.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXIS = "data"
MIN_SHARDED_SIZE = 2**14  # numbers of an array that is worth cutting; smaller ones would cost a collective each


def make_mesh(count: int = 0, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns the mesh over `devices` (None: all of all hosts), or the first `count` of them.

    Raises ValueError if there are not so many, or if some host would be left without one.
    """
    devices = list(jax.devices() if devices is None else devices)
    if count > len(devices):
        raise ValueError(f"train.devices={count}: there are {len(devices)}; allowed is 1 to that, or 0 for all")
    if count and count < len(devices) and jax.process_count() > 1:
        raise ValueError(f"train.devices={count}: {jax.process_count()} hosts work together with all their devices; 0")
    devices = devices[: count or None]
    # Auto axes: linen layers carry no output shardings, which explicit axes would ask for.
    return jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def platform(mesh: Mesh) -> str:
    """Returns "cpu", "gpu" or "tpu": what the mesh's devices are, which may not be this machine's."""
    return mesh.devices.flat[0].platform


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of metrics, and of parameters by default: a whole copy on each device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: its first axis cut over the devices."""
    return NamedSharding(mesh, PartitionSpec(AXIS))


def state_sharding(shapes: Any, mesh: Mesh, cut: bool) -> Any:
    """Returns a tree like `shapes` of shardings: copies, or with `cut` each large array cut along its longest axis.

    Only an axis that the devices divide evenly is cut; an array without one is copied.
    """

    def one(leaf: Any) -> NamedSharding:
        sides = [(side, axis) for axis, side in enumerate(leaf.shape) if side % mesh.size == 0]
        if not cut or not sides or leaf.size < MIN_SHARDED_SIZE:
            return replicated(mesh)
        axis = max(sides)[1]
        return NamedSharding(mesh, PartitionSpec(*(AXIS if i == axis else None for i in range(leaf.ndim))))

    return jax.tree.map(one, shapes)


def check_batch(batch_size: int, mesh: Mesh, field: str, parts: int = 1) -> None:
    """Raises ValueError if a global batch, worked off in `parts`, can't be cut evenly over the mesh."""
    unit = mesh.size * parts
    if batch_size % unit:
        below = batch_size // unit * unit
        near = f"{below} or {below + unit}" if below else f"{unit}"
        over = f"{mesh.size} devices" + (f" in train.accumulate={parts} parts" if parts > 1 else "")
        raise ValueError(f"{field}={batch_size} can't be cut over {over}; set it to {near}")


def per_device_gradients(gradients: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """Makes each device work on its own part of the batch, and averages all results: what `jax.pmap` was for.

    `gradients(trained, kept, batch_stats, batch, key)` is that of the training step. Each device has a key of its own,
    and mixes (mixup, cutmix) its own images alone.
    """

    def local(trained: Any, kept: Any, batch_stats: Any, batch: Any, key: jax.Array) -> Any:
        key = jax.random.fold_in(key, jax.lax.axis_index(AXIS))
        return jax.lax.pmean(gradients(trained, kept, batch_stats, batch, key), AXIS)

    whole, part = PartitionSpec(), PartitionSpec(AXIS)
    # Unchecked: differentiation would otherwise add up the parameters' gradients by itself, before the mean does.
    return jax.shard_map(
        local, mesh=mesh, in_specs=(whole, whole, whole, part, whole), out_specs=whole, check_vma=False
    )


def with_gathered_params(gradients: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """Has every device gather parameters that are cut, and keep its own share of their gradients.

    Said here, since the compiler might cut the convolutions themselves instead.
    """

    def wrapped(trained: Any, kept: Any, batch_stats: Any, batch: Any, key: jax.Array) -> Any:
        whole = jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, replicated(mesh)), (trained, kept))
        grads, batch_stats, metrics = gradients(*whole, batch_stats, batch, key)
        shares = state_sharding(grads, mesh, cut=True)
        return jax.tree.map(jax.lax.with_sharding_constraint, grads, shares), batch_stats, metrics

    return wrapped


def to_devices(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, Any]:
    """Makes global arrays of this host's part of a batch; the transfer goes on in the background."""
    sharding = batch_sharding(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}
