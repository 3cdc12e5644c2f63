"""Checkpoints in a workdir: the last states to resume from, the best weights to test. Alone imports orbax.

    WORKDIR/checkpoints/last/STEP   whole training state and the progress of early stopping, two kept
    WORKDIR/checkpoints/best/STEP   parameters and statistics of the best validations, two kept

Orbax writes STEP.partial in the background, every host its part. The first host then adds progress.json, has all of
it on the disk, adds checksums.json and renames the folder: what bears a step number was whole once, and whether it
still is can be told. Only then are older ones dropped. STEP.damaged is one that was passed over when resuming; nothing
here reads or removes it. STEP.old is one whose replacement was cut short.
"""

import errno
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeVar

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from lungjax.runtime import distributed
from lungjax.runtime.files import sync_folder

PROGRESS = "progress.json"
SUMS = "checksums.json"  # {file: [bytes, crc32]} of all other files of a checkpoint
MAX_TO_KEEP = 2  # of each kind: should the newest turn out damaged, there is the one before
NOTHING = -1  # in place of a step
FULL = (errno.ENOSPC, errno.EDQUOT)
KEPT_NOTE = "the earlier checkpoints are intact: {} and run the same command again to resume"
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)

StateT = TypeVar("StateT")


class State(Protocol):
    """A tree of arrays that knows its step and what of it predicts."""

    @property
    def step(self) -> Any:
        """Steps done, a scalar."""

    @property
    def variables(self) -> dict[str, Any]:
        """Parameters and statistics, what prediction takes."""


class Checkpoints:
    """The two checkpoint folders of a run that trains; use as a context manager, on every host."""

    def __init__(self, workdir: Path):
        """Opens or makes the folders and clears away what an interrupted save left half written.

        Raises ValueError if they can't be written.
        """
        self.folder = workdir / "checkpoints"
        self._worker = ThreadPoolExecutor(1, "checkpoint")
        self._saving: Future[None] | None = None
        distributed.run_on_all_hosts(self._open)

    def _open(self) -> None:
        if distributed.is_first_host():
            try:
                for kind in ("last", "best"):
                    (self.folder / kind).mkdir(parents=True, exist_ok=True)
                    with tempfile.TemporaryFile(dir=self.folder / kind):
                        _clear(self.folder / kind)
            except OSError as error:
                raise ValueError(
                    f"{self.folder} can't be written ({error.strerror}); choose another --workdir"
                ) from error

    def __enter__(self) -> "Checkpoints":
        """Returns itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Waits for this host's part of the save in progress; what failed there is raised, or noted on `error`."""
        try:
            self._finished()  # not `wait`: other hosts may have met no exception, and not be here
        except Exception as failed:
            if error is None:
                raise
            error.add_note(f"Also: {failed}")
        finally:
            self._worker.shutdown()

    def save(self, state: State, progress: dict[str, Any], best: bool = False) -> None:
        """Starts to write the whole state and `progress`, numbers by name; `best`: the weights as the best too.

        Returns as soon as the values are safe: the next step may overwrite the state. Waits for the save before and
        raises ValueError if that one met a full or read-only disk, or if this one won't fit; the earlier checkpoints
        stay. To be called by every host, with the same arguments.
        """
        self.wait()
        step = int(state.step)
        text = json.dumps(progress)  # now: the caller goes on changing it
        trees = {"last": {"state": state}} | ({"best": {"variables": state.variables}} if best else {})
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(trees))
        with _explained(self.folder, step):
            distributed.run_on_all_hosts(
                lambda: _make_room(self.folder, step, size) if distributed.is_first_host() else None
            )
            # Orbax takes the values before it returns. On a CPU that may be by holding on to the buffers; XLA then
            # doesn't donate those but copies them.
            context = ocp.Context()
            # If folders that are to be made in the background can't be, orbax waits five minutes for them.
            context.asynchronous.create_directories_asynchronously = False
            with context:
                writes = {
                    kind: ocp.save_checkpointables_async((self.folder / kind / f"{step}.partial").absolute(), tree)
                    for kind, tree in trees.items()
                }
        self._saving = self._worker.submit(self._finish, step, text, writes)

    def wait(self) -> None:
        """Waits until what was saved is on the disk; raises what `save` would raise next. For every host."""
        distributed.run_on_all_hosts(self._finished)

    def _finished(self) -> None:
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def restore(self, like: StateT) -> tuple[StateT, dict[str, Any]] | None:
        """Returns the newest good state, laid out as `like` (shapes with shardings), and its progress.

        None if nothing was saved yet. Newer ones that are damaged are named and set aside as STEP.damaged, and best
        weights newer than the state are dropped: they will be found again. Raises ValueError, and changes nothing,
        if all are damaged or if the state is one of another network.
        """
        self.wait()
        folder = self.folder / "last"
        step, damaged = _newest_valid(folder)
        if step == NOTHING:
            return None
        path = _place(folder, step)
        _check_same(path, "state", like)
        progress = json.loads((path / PROGRESS).read_text())
        found = ocp.load_checkpointables(path.absolute(), {"state": like})["state"]
        if distributed.is_first_host():
            for bad in damaged:
                _set_aside(bad)
            self._drop_bests_after(step, bool(progress.get("best_step")))
        return found, progress

    def _drop_bests_after(self, step: int, had_best: bool) -> None:
        """Drops the bests after `step`, but for one if a best is known to have been and no other is left."""
        steps = sorted(_found(self.folder / "best"))
        newer = [s for s in steps if s > step]
        for gone in newer[had_best and len(newer) == len(steps) :]:
            _remove(_place(self.folder / "best", gone))

    def _finish(self, step: int, progress: str, writes: dict[str, Any]) -> None:
        """What the worker does: waits for orbax, then makes the new folders count and drops older ones."""
        with _explained(self.folder, step):
            failed = []
            for write in writes.values():
                try:
                    write.result()
                except Exception as error:  # the other write is still to be waited for
                    failed.append(error)
            if failed:
                raise failed[0]
            if distributed.is_first_host():
                (self.folder / "last" / f"{step}.partial" / PROGRESS).write_text(progress)
                for kind in sorted(writes):  # best before last: a state must not speak of a best that isn't there
                    _commit(self.folder / kind, step)
                for kind in writes:
                    for old in sorted(_found(self.folder / kind))[:-MAX_TO_KEEP]:
                        _remove(_place(self.folder / kind, old))


def newest(workdir: Path, kind: str) -> int | None:
    """Returns the newest step saved in a workdir, of kind "last" or "best"; None if there is none.

    Doesn't look whether it is damaged.
    """
    return max(_found(workdir / "checkpoints" / kind), default=None)


def restore_best(workdir: Path, like: dict[str, Any] | None = None) -> tuple[dict[str, Any], int]:
    """Returns a run's best variables, laid out as `like` (None: numpy arrays on this host), and their step.

    The best before, if the newest is damaged; this is said. Only reads, so that it may be used on a run that is still
    training; where there are several hosts, by all of them. Raises ValueError if there are none, or none is good, or
    they are of another network than `like`.
    """
    folder = workdir / "checkpoints" / "best"
    step, _ = _newest_valid(folder)
    if step == NOTHING:
        raise ValueError(f"{workdir}: no best weights there yet; train first (--mode=train)")
    path = _place(folder, step)
    if like is None:  # as saved would be on the devices of the run that saved them, which this machine may not have
        like = jax.tree.map(
            lambda leaf: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape), _saved(path)["variables"]
        )
    else:
        _check_same(path, "variables", like)
    return ocp.load_checkpointables(path.absolute(), {"variables": like})["variables"], step


def check_network(workdir: Path, abstract_state: State) -> None:
    """Raises ValueError if the newest intact checkpoint of a workdir has other names or shapes than `abstract_state`.

    For the first host alone.
    """
    folder = workdir / "checkpoints" / "last"
    step, _ = _inspect(folder)
    _check_same(_place(folder, step), "state", abstract_state)


def _found(folder: Path) -> set[int]:
    """Returns the steps that a folder has a checkpoint of, good or damaged."""
    names = [p.name.removesuffix(".old") for p in folder.iterdir()] if folder.is_dir() else []
    return {int(name) for name in names if name.isdigit()}


def _place(folder: Path, step: int) -> Path:
    path = folder / str(step)
    return path if path.exists() or not path.with_suffix(".old").exists() else path.with_suffix(".old")


def _newest_valid(folder: Path) -> tuple[int, list[Path]]:
    """Returns the newest good step, or NOTHING, and the damaged ones after it. The first host looks for all.

    Raises ValueError if there are some but none is good.
    """
    step, damaged = distributed.run_on_all_hosts(
        lambda: _inspect(folder) if distributed.is_first_host() else (NOTHING, [])
    )
    return distributed.broadcast_int(step), damaged


def _inspect(folder: Path) -> tuple[int, list[Path]]:
    paths = [_place(folder, step) for step in sorted(_found(folder), reverse=True)]
    damaged: dict[Path, str] = {}
    for path in paths:
        wrong = _corruption(path)
        if wrong is None:
            for bad, why in damaged.items():
                print(f"{bad} is damaged ({why}): taking {path} instead")
            return int(path.stem), list(damaged)
        damaged[path] = wrong
    if damaged:
        each = "; ".join(f"{path.name}: {wrong}" for path, wrong in damaged.items())
        raise ValueError(
            f"{folder}: no checkpoint there is good ({each}). Put back a copy of one, or choose another --workdir to "
            "start over"
        )
    return NOTHING, []


def _corruption(path: Path) -> str | None:
    """Returns what is wrong with a checkpoint, None if it is as it was written."""
    try:
        found = json.loads((path / SUMS).read_text())
        sums = [(name, int(size), int(checksum)) for name, (size, checksum) in found.items()]
    except FileNotFoundError:
        return f"{SUMS} is missing"
    except (OSError, ValueError, TypeError, AttributeError):  # the last three for what is not the JSON written there
        return f"{SUMS} can't be read"
    for name, size, checksum in sums:
        try:
            length = (path / name).stat().st_size
            if length != size:
                return f"{name} has {length} bytes instead of {size}"
            if _checksum(path / name) != checksum:
                return f"the checksum of {name} is wrong"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} can't be read: {error.strerror}"
    return None


def _checksum(path: Path, sync: bool = False) -> int:
    """Returns a file's CRC-32; it need only tell accidents, and is the fastest that Python brings along."""
    checksum = 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(2**22):
            checksum = zlib.crc32(block, checksum)
        if sync:
            os.fsync(file.fileno())
    return checksum


def _seal(path: Path) -> None:
    """Has all of a checkpoint on the disk, and its checksums with it."""
    files = sorted(p for p in path.rglob("*") if p.is_file())
    sums = {p.relative_to(path).as_posix(): [p.stat().st_size, _checksum(p, sync=True)] for p in files}
    partial = path / f"{SUMS}.partial"
    with partial.open("w") as file:
        json.dump(sums, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path / SUMS)
    for folder in (*(p for p in path.rglob("*") if p.is_dir()), path):
        sync_folder(folder)


def _commit(folder: Path, step: int) -> None:
    """Seals what orbax wrote and gives it the name under which it counts, in the place of another of that step."""
    partial, final = folder / f"{step}.partial", folder / str(step)
    _seal(partial)
    if final.exists():
        final.rename(final.with_suffix(".old"))
    partial.rename(final)
    sync_folder(folder)
    _clear(folder)


def _clear(folder: Path) -> None:
    """Deletes what was being written or deleted, and what was replaced; puts back what was about to be."""
    for path in folder.iterdir():
        if path.suffix == ".old" and not path.with_suffix("").exists():
            path.rename(path.with_suffix(""))
        elif path.suffix in (".old", ".partial") or path.name.endswith(".orbax-checkpoint-tmp"):
            shutil.rmtree(path)


def _remove(path: Path) -> None:
    """Deletes a checkpoint; half deleted, it bears no step number."""
    going = path.with_suffix(".partial")
    path.rename(going)
    shutil.rmtree(going)


def _set_aside(path: Path) -> None:
    """Renames a damaged checkpoint so that it isn't met again."""
    others = len(list(path.parent.glob(f"{path.stem}.damaged*")))
    path.rename(path.with_suffix(f".damaged{others or ''}"))


def _saved(path: Path) -> dict[str, Any]:
    """Returns the names, shapes and types in a checkpoint, without its values."""
    return ocp.checkpointables_metadata(path.absolute()).metadata


def _check_same(path: Path, name: str, like: Any) -> None:
    """Raises ValueError if a checkpoint has other names or shapes than `like`."""

    def described(tree: Any) -> dict[str, str]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(p, simple=True, separator="/"): f"{x.dtype} {list(x.shape)}" for p, x in leaves}

    saved, here = described(_saved(path)[name]), described(like)
    different = [key for key in here | saved if here.get(key) != saved.get(key)]
    if different:
        lines = [f"{key}: saved {saved.get(key, 'nothing')}, here {here.get(key, 'nothing')}" for key in different[:5]]
        more = f"\n  and {len(different) - 5} more" if len(different) > 5 else ""
        raise ValueError(
            f"{path} is of another network:\n  " + "\n  ".join(lines) + more + "\nIt was left as it is: choose another "
            "--workdir, or configure the network that it was saved from"
        )


def _make_room(folder: Path, step: int, size: int) -> None:
    """Clears away what a failed save left; raises ValueError if `size` bytes won't fit even so."""
    for kind in ("last", "best"):
        _clear(folder / kind)
    free = shutil.disk_usage(folder).free
    if free < 1.05 * size + 2**20:
        raise ValueError(
            f"saving the checkpoint of step {step} to {folder}: it takes {size / 2**20:.0f} MiB and "
            f"{free / 2**20:.0f} MiB are free; {KEPT_NOTE.format('free some space')}"
        )


@contextmanager
def _explained(folder: Path, step: int) -> Iterator[None]:
    """Turns what a full or read-only disk raises into ValueError."""
    try:
        yield
    except Exception as error:
        # Orbax and tensorstore wrap the system's error in others of several types, which quote it.
        quoted = ""
        inner: BaseException | None = error
        while inner is not None:
            quoted, inner = f"{quoted}{inner}\n", inner.__cause__ or inner.__context__
        for codes, what, remedy in (
            (FULL, "full", "free some space"),
            (READ_ONLY, "read-only", "make it writable"),
        ):
            if any(os.strerror(code) in quoted for code in codes):
                raise ValueError(
                    f"saving the checkpoint of step {step} to {folder}: the disk is {what}; {KEPT_NOTE.format(remedy)}"
                ) from error
        raise
