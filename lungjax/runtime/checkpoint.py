"""Checkpoints of a run: the last states for resuming and the best weights for testing. Only this module imports orbax.

    WORKDIR/checkpoints/last/STEP   complete training state and progress of early stopping
    WORKDIR/checkpoints/best/STEP   parameters and statistics of the best validations

Orbax writes STEP.partial in the background, one part per host. The first host then adds progress.json, syncs all files
to the disk, adds checksums.json and renames the folder; only then are older checkpoints deleted. A damaged checkpoint
is renamed to STEP.damaged when a run resumes from the one before it; it is then never read or deleted.
"""

import errno
import json
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from lungjax.config.schema import parse_json
from lungjax.runtime import distributed
from lungjax.runtime.files import atomic_write, sync_path

PROGRESS = "progress.json"
CHECKSUMS = "checksums.json"  # {file: [bytes, crc32]} of all other files of a checkpoint
MAX_TO_KEEP = 2  # of each kind: if the newest is damaged, the one before is used
KINDS = ("last", "best")
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
DISK_ADVICE = "the earlier checkpoints are intact: make room or the folder writable, and rerun the command to resume"

StateT = TypeVar("StateT")


class Checkpoints(AbstractContextManager["Checkpoints"]):
    """The checkpoint folders of a run in training; use as a context manager, on every host."""

    def __init__(self, workdir: Path):
        """Creates the folders and cleans up an interrupted save. Raises ValueError if the folders are read-only."""
        self.folder = workdir / "checkpoints"
        self.last_step = 0  # of the last save or restore
        self._worker = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None
        distributed.on_first_host(lambda: _open(self.folder))

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Waits for this host's part of a pending save. If the save fails, raises its error or adds it to `error`."""
        try:
            self._finish_pending()  # not `wait`, which other hosts might not join
        except Exception as save_error:
            if error is None:
                raise
            error.add_note(f"Also: {save_error}")
        finally:
            self._worker.shutdown()

    def save(self, state: Any, progress: dict[str, Any], best: bool = False) -> None:
        """Starts writing the state and `progress` (numbers by name); `best` also saves the weights as the best.

        `state` is a tree of arrays with the attributes `step`, a scalar, and `variables` for prediction. Returns once
        the values are copied. First waits for the previous save and raises ValueError if that failed on a full or
        read-only disk, or if this one does not fit. Call on every host with the same arguments.
        """
        self.wait()
        step = int(state.step)
        text = json.dumps(progress)  # now, since the caller changes it later
        trees = {"last": {"state": state}} | ({"best": {"variables": state.variables}} if best else {})
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(trees))
        with _disk_errors(self.folder, step):
            distributed.on_first_host(lambda: _make_room(self.folder, step, size))
            # Orbax copies the values before it returns. On a CPU it may keep the buffers, which XLA then copies.
            context = ocp.Context()
            # Orbax would wait five minutes for folders that can't be created in the background.
            context.asynchronous.create_directories_asynchronously = False
            with context:
                writes = {
                    kind: ocp.save_checkpointables_async((self.folder / kind / f"{step}.partial").absolute(), tree)
                    for kind, tree in trees.items()
                }
        self.last_step = step
        self._pending = self._worker.submit(self._finish, step, text, writes)

    def wait(self) -> None:
        """Waits until the pending save is on the disk; raises the error that `save` would. Call on every host."""
        distributed.run_on_all_hosts(self._finish_pending)

    def _finish_pending(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _finish(self, step: int, progress: str, writes: dict[str, Any]) -> None:
        """Waits for orbax, commits the new folders and deletes old ones; runs in the worker thread."""
        with _disk_errors(self.folder, step):
            with ExitStack() as stack:  # even if one write fails, the other must finish
                for write in writes.values():
                    stack.callback(write.result)
            if distributed.is_first_host():
                (self.folder / "last" / f"{step}.partial" / PROGRESS).write_text(progress)
                for kind in sorted(writes):  # best before last: a state must not refer to a missing best
                    _commit(self.folder / kind, step)
                for kind in writes:
                    for old in _steps(self.folder / kind)[:-MAX_TO_KEEP]:
                        _remove(self.folder / kind / str(old))

    def restore(self, abstract_state: StateT) -> tuple[StateT, dict[str, Any]] | None:
        """Returns the newest intact state, in the layout of `abstract_state` (shapes with shardings), and its progress.

        Returns None if nothing was saved yet. Newer damaged states are renamed, and best weights newer than the state
        are deleted, since training will reach them again. Raises ValueError, and changes nothing, if all states are
        damaged or the state belongs to another network or version of lungjax.
        """
        self.wait()
        folder = self.folder / "last"
        step, damaged = _newest_valid(folder)
        if step is None:
            return None
        path = folder / str(step)
        _check_same(path, "state", abstract_state)
        progress = json.loads((path / PROGRESS).read_text())
        try:
            state = ocp.load_checkpointables(path.absolute(), {"state": abstract_state})["state"]
        except (KeyError, ValueError) as error:  # the files are intact and their arrays fit: other fields
            raise ValueError(f"{path} was written by another version of lungjax. Choose another --workdir") from error
        if distributed.is_first_host():
            for bad in damaged:
                others = len(list(folder.glob(f"{bad.name}.damaged*")))
                bad.rename(bad.with_suffix(f".damaged{others or ''}"))
            bests = _steps(self.folder / "best")
            newer = [best for best in bests if best > step]
            # If the state refers to a best and all are newer, one is better than none.
            for best in newer[1:] if newer == bests and progress.get("best_step") else newer:
                _remove(self.folder / "best" / str(best))
        self.last_step = step
        return state, progress


def is_begun(workdir: Path) -> bool:
    """Returns whether a workdir has a complete checkpoint, even if a kill prevented the renaming of its folder."""
    return any((workdir / "checkpoints" / "last").glob(f"*/{CHECKSUMS}"))


def newest(workdir: Path, kind: str) -> int | None:
    """Returns the newest step saved in a workdir, of kind "last" or "best", intact or not; None without checkpoints."""
    return max(_steps(workdir / "checkpoints" / kind), default=None)


def restore_best(workdir: Path, abstract_variables: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """Returns a run's best variables and their step; reports and skips a damaged checkpoint. Call on all hosts.

    Changes no files, so the run may still be training. `abstract_variables` are shapes with shardings; without
    shardings, numpy arrays are restored on this host. Raises ValueError if no checkpoint is intact, or if it belongs to
    another network.
    """
    folder = workdir / "checkpoints" / "best"
    step, _ = _newest_valid(folder)
    if step is None:
        raise ValueError(f"{workdir}: no best weights yet; train first (--mode=train)")
    path = folder / str(step)
    _check_same(path, "variables", abstract_variables)
    if any(leaf.sharding is None for leaf in jax.tree.leaves(abstract_variables)):
        # Orbax would restore to the devices of that run, which may not exist here.
        abstract_variables = jax.tree.map(
            lambda leaf: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape), _metadata(path, "variables")
        )
    return ocp.load_checkpointables(path.absolute(), {"variables": abstract_variables})["variables"], step


def check_network(workdir: Path, abstract_state: Any) -> None:
    """Raises ValueError if the newest intact state does not match `abstract_state`. Call on the first host only."""
    folder = workdir / "checkpoints" / "last"
    step, _ = _inspect(folder)
    _check_same(folder / str(step), "state", abstract_state)


def _steps(folder: Path) -> list[int]:
    """Returns the steps of the checkpoints in a folder in ascending order, intact or damaged; ignores other names."""
    entries = folder.iterdir() if folder.is_dir() else ()
    return sorted(int(p.name) for p in entries if re.fullmatch("0|[1-9][0-9]*", p.name) and p.is_dir())


def _newest_valid(folder: Path) -> tuple[int | None, list[Path]]:
    """Returns the first host's newest intact step or None, and newer damaged ones; raises ValueError if all are."""
    step, damaged = distributed.on_first_host(lambda: _inspect(folder)) or (None, [])
    step = distributed.broadcast_int(-1 if step is None else step)
    return None if step < 0 else step, damaged


def _inspect(folder: Path) -> tuple[int | None, list[Path]]:
    damaged: dict[Path, str] = {}
    for step in reversed(_steps(folder)):
        path = folder / str(step)
        reason = _corruption(path)
        if reason is None:
            for bad, why in damaged.items():
                print(f"{bad} is damaged ({why}): using {path} instead")
            return step, list(damaged)
        damaged[path] = reason
    if damaged:
        reasons = "; ".join(f"{path.name}: {reason}" for path, reason in damaged.items())
        raise ValueError(f"{folder}: no intact checkpoint ({reasons}). Restore a backup, or choose another --workdir")
    return None, []


def _corruption(path: Path) -> str | None:
    """Returns how a checkpoint is damaged, or None if it is intact."""
    name = CHECKSUMS
    try:
        checksums = parse_json((path / CHECKSUMS).read_bytes(), CHECKSUMS)
        files = [(name, int(size), int(checksum)) for name, (size, checksum) in checksums.items()]
        present = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file() and p.name[0] != "."}
        if unlisted := sorted(present - checksums.keys() - {CHECKSUMS}):
            return f"{unlisted[0]} is not in {CHECKSUMS}"
        if not files or any(Path(name).is_absolute() or ".." in Path(name).parts for name in checksums):
            return f"{CHECKSUMS} is empty or names files outside of the checkpoint"
        for name, size, checksum in files:
            length = (path / name).stat().st_size
            if length != size:
                return f"{name} has {length} bytes instead of {size}"
            if _checksum(path / name) != checksum:
                return f"the checksum of {name} is wrong"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} can't be read: {error.strerror}"
    except (ValueError, TypeError):  # unexpected content
        return f"{CHECKSUMS} can't be read"
    return None


def _checksum(path: Path, sync: bool = False) -> int:
    """Returns a file's CRC-32, the fastest check for accidental damage in the standard library."""
    checksum = 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(2**22):
            checksum = zlib.crc32(block, checksum)
        if sync:
            os.fsync(file.fileno())
    return checksum


def _commit(folder: Path, step: int) -> None:
    """Syncs STEP.partial to the disk, adds its checksums and renames it to STEP."""
    path = folder / f"{step}.partial"
    files = sorted(p for p in path.rglob("*") if p.is_file())
    checksums = {p.relative_to(path).as_posix(): [p.stat().st_size, _checksum(p, sync=True)] for p in files}
    for parent in path.rglob("*/"):
        sync_path(parent)
    atomic_write(path / CHECKSUMS, json.dumps(checksums, indent=1))
    _install(path)


def _install(path: Path) -> None:
    """Renames a complete STEP.partial to STEP, in place of another checkpoint of that step."""
    final = path.with_suffix("")
    if final.exists():
        _remove(final)
    path.rename(final)
    sync_path(path.parent)


def _remove(path: Path) -> None:
    """Deletes a checkpoint; renames it first, so that a partly deleted one is never read."""
    doomed = path.with_suffix(".deleted")
    path.rename(doomed)
    shutil.rmtree(doomed) if doomed.is_dir() else doomed.unlink()


def _open(folder: Path) -> None:
    """Creates the folders of KINDS, checks that they are writable, and cleans up after interruptions."""
    try:
        for kind in KINDS:
            (folder / kind).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder / kind):
                _clear(folder / kind)
    except OSError as error:
        raise ValueError(f"{folder} can't be written ({error.strerror}); choose another --workdir") from error


def _clear(folder: Path) -> None:
    """Finishes or removes the remains of an interrupted save or deletion."""
    for path in folder.iterdir():
        if path.suffix == ".partial" and (path / CHECKSUMS).exists():
            _install(path)
        elif path.is_dir() and (path.suffix in (".partial", ".deleted") or path.name.endswith(".orbax-checkpoint-tmp")):
            shutil.rmtree(path)


def _make_room(folder: Path, step: int, size: int) -> None:
    """Removes the remains of a failed save; raises ValueError if `size` bytes still don't fit."""
    for kind in KINDS:
        _clear(folder / kind)
    free = shutil.disk_usage(folder).free
    if free < 1.05 * size + 2**20:
        sizes = f"it takes {size / 2**20:.0f} MiB, but only {free / 2**20:.0f} MiB are free"
        raise ValueError(f"saving the checkpoint of step {step} to {folder}: {sizes}; {DISK_ADVICE}")


def _metadata(path: Path, name: str) -> Any:
    """Returns the shapes and types of a tree in a checkpoint, without its values. Raises ValueError if damaged."""
    try:
        return ocp.checkpointables_metadata(path.absolute()).metadata[name]
    except Exception as error:  # of many types
        raise ValueError(f"{path}: not a checkpoint of lungjax ({str(error) or repr(error):.200})") from error


def _check_same(path: Path, name: str, abstract_tree: Any) -> None:
    """Raises ValueError if the names or shapes in a checkpoint differ from those of `abstract_tree`."""

    def describe(tree: Any) -> dict[str, str]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(p, simple=True, separator="/"): f"{x.dtype} {list(x.shape)}" for p, x in leaves}

    saved, here = describe(_metadata(path, name)), describe(abstract_tree)
    for key in here | saved:
        if here.get(key) != saved.get(key):
            change = f"{key} is {saved.get(key, 'missing')} there and {here.get(key, 'missing')} here"
            raise ValueError(f"{path} belongs to another network: {change}. Choose another --workdir")


@contextmanager
def _disk_errors(folder: Path, step: int) -> Iterator[None]:
    """Turns the errors of a full or read-only disk into ValueError."""
    try:
        yield
    except Exception as error:
        # Orbax and tensorstore wrap the system's error in several types, which quote it.
        messages, inner = "", error
        while inner is not None:
            messages, inner = f"{messages}{inner}\n", inner.__cause__ or inner.__context__  # type: ignore[assignment]
        for reason in map(os.strerror, DISK_ERRORS):
            if reason in messages:
                message = f"saving the checkpoint of step {step} to {folder}: {reason}; {DISK_ADVICE}"
                raise ValueError(message) from error
        raise
