"""Checkpoints in a workdir: the last states to resume from, the best weights to test. Alone imports orbax.

    WORKDIR/checkpoints/last/STEP   whole training state and the progress of early stopping, two kept
    WORKDIR/checkpoints/best/STEP   parameters and statistics of the best validation, one kept

Orbax writes into a temporary folder and renames it, so a folder that bears a step number is complete.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from lungjax.state import TrainState

POLICIES = ocp.training.preservation_policies


class Checkpoints:
    """The two checkpoint folders of a run that trains; use as a context manager."""

    def __init__(self, workdir: Path):
        """Opens or makes the folders and clears away what an interrupted save left half written."""
        self.folder = workdir / "checkpoints"
        self._last = _open(self.folder / "last", keep=2)
        self._best = _open(self.folder / "best", keep=1)

    def __enter__(self) -> "Checkpoints":
        """Returns itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Closes both folders."""
        self._last.close()
        self._best.close()

    def save(self, state: TrainState, progress: dict[str, Any]) -> None:
        """Writes the whole state and `progress`, a dict of numbers.

        Raises ValueError if the disk is full; the earlier checkpoints stay.
        """
        step = int(state.step)
        with _full_disk_explained(self.folder, {"state": state}, step):
            self._last.save_checkpointables(step, {"state": state, "progress": progress}, overwrite=True)

    def save_best(self, state: TrainState) -> None:
        """Writes the weights as the best so far and drops the earlier best once they are safe."""
        step = int(state.step)
        if self._best.latest is not None and self._best.latest.step == step:
            return  # a resumed run came by here again; replacing would leave a moment without any best
        with _full_disk_explained(self.folder, state.variables, step):
            self._best.save_checkpointables(step, {"variables": state.variables})

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """Returns the newest state, laid out as `like` (shapes with shardings), and its progress; or None."""
        if self._last.latest is None:
            return None
        found = self._last.load_checkpointables(None, {"state": like, "progress": None})
        return found["state"], found["progress"]


def newest(workdir: Path, kind: str) -> int | None:
    """Returns the newest step saved in a workdir, of kind "last" or "best"; None if there is none."""
    folder = workdir / "checkpoints" / kind
    steps = [int(p.name) for p in folder.iterdir() if p.name.isdigit()] if folder.is_dir() else []
    return max(steps, default=None)


def restore_best(workdir: Path, like: dict[str, Any] | None = None) -> tuple[dict[str, Any], int]:
    """Returns a run's best variables, laid out as `like` (None: numpy arrays on this host), and their step.

    Only reads, so that it may be used on a run that is still training. Raises ValueError if there are none.
    """
    step = newest(workdir, "best")
    if step is None:
        raise ValueError(f"{workdir}: no best weights there yet; train first (--mode=train)")
    path = (workdir / "checkpoints" / "best" / str(step)).absolute()
    if like is None:  # as saved would be on the devices of the run that saved them, which this machine may not have
        saved = ocp.checkpointables_metadata(path).metadata["variables"]
        like = jax.tree.map(lambda leaf: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape), saved)
    return ocp.load_checkpointables(path, {"variables": like})["variables"], step


def _open(folder: Path, keep: int) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    return ocp.training.Checkpointer(
        folder.absolute(),
        # We decide when to save; orbax decides only what to drop.
        save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
        preservation_policy=POLICIES.LatestN(keep),
        cleanup_tmp_directories=True,
    )


@contextmanager
def _full_disk_explained(folder: Path, tree: Any, step: int) -> Iterator[None]:
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    where = f"saving the checkpoint of step {step} to {folder}"
    kept = "; the earlier checkpoints are intact: free some space and run the same command again to resume"
    free = shutil.disk_usage(folder).free
    if free < 1.05 * size + 2**20:
        raise ValueError(f"{where}: it takes {size / 2**20:.0f} MiB and {free / 2**20:.0f} MiB are free{kept}")
    try:
        yield
    except Exception as error:
        # Orbax and tensorstore wrap ENOSPC in errors of several types; what is left on the disk tells.
        if shutil.disk_usage(folder).free < size:
            raise ValueError(f"{where}: the disk is full{kept}") from error
        raise
