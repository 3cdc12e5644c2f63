"""A run's folder: whose it is, and which data the run began on."""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from lungjax import hosts, metadata, overrides
from lungjax.checkpoint import newest
from lungjax.config import Config
from lungjax.data.prepared import Prepared

# Fields that change neither the weights nor the data order: a run may go on with other values.
FREE_FIELDS = (
    "data.workers",
    "data.threads",
    "data.prefetch",
    "train.log_steps",
    "train.save_steps",
    "train.devices",
    "train.shard_params",
    "train.on_nan",
    "eval.batch_size",
    "eval.examples",
    "eval.draws",
    "eval.sensitivity",
    "eval.prevalence",
)

BEGUN = ("lock", "config.partial", "data.partial")  # what is left where a run was claimed by half


def check(workdir: Path, config: Config, mode: str) -> None:
    """Raises ValueError if the workdir holds a trained run of another configuration, or foreign files."""
    path = workdir / "config.json"
    if not path.exists():
        if mode == "evaluate":
            raise ValueError(f"{workdir}: no config.json there, so no run to evaluate; train first (--mode=train)")
        if workdir.exists() and (not workdir.is_dir() or any(p.name not in BEGUN for p in workdir.iterdir())):
            raise ValueError(f"{workdir} is not empty and holds no lungjax run; choose another --workdir")
        return
    if newest(workdir, "last") is None:
        return  # nothing was trained, so nothing can be lost
    old = overrides.from_json(path.read_text(), str(path))
    changed = [line for line in overrides.difference(old, config) if line.split(":")[0] not in FREE_FIELDS]
    if changed:
        raise ValueError(
            f"{workdir} holds a run of another configuration:\n  " + "\n  ".join(changed) + "\nChoose another "
            "--workdir, or delete that one to start over"
        )


def check_same_data(workdir: Path, data: Prepared) -> None:
    """Raises ValueError if the data set was prepared anew since the run began."""
    path = workdir / "data.json"
    if path.exists() and newest(workdir, "last") is not None:
        before = json.loads(path.read_text())
        if before != data_facts(data):
            raise ValueError(
                f"{workdir}: this run began on {before['dataset']} with fingerprint {before['fingerprint'][:12]}, "
                f"now it is {data.fingerprint[:12]}: other images, labels or splits. Choose another --workdir"
            )


def data_facts(data: Prepared) -> dict[str, Any]:
    """What data.json holds: which data, and the classes in label order."""
    return {"dataset": data.name, "classes": list(data.classes), "fingerprint": data.fingerprint}


def drop_reports(workdir: Path) -> None:
    """Removes what was reported of weights that are about to be trained further: nobody must take it for the end's."""
    for name in ("report.json", "report.html", "report.md", metadata.FILE):
        (workdir / name).unlink(missing_ok=True)


@contextmanager
def claimed(workdir: Path, config: Config, data: Prepared, state_bytes: int) -> Iterator[None]:
    """Makes the folder this run's for a while: nobody else trains there, config.json and data.json are written.

    To be entered by every host once all else has been checked. Raises ValueError, on every host, if another run is
    training there, if the folder can't be written or has no room for the checkpoints (at most two states of
    `state_bytes`, two of best weights, and another of each while it is written), or is not the same on all hosts.
    """
    with ExitStack() as held:
        hosts.together(lambda: _claim(workdir, config, data, state_bytes, held) if hosts.first() else None)
        hosts.together(lambda: _check_shared(workdir))
        yield


def _claim(workdir: Path, config: Config, data: Prepared, state_bytes: int, held: ExitStack) -> None:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        _lock(held.enter_context((workdir / "lock").open("a")), workdir)
        check(workdir, config, "train")  # again: between the first time and the lock another run may have been here
        check_same_data(workdir, data)
        replace(workdir / "config.json", overrides.to_json(config))
        replace(workdir / "data.json", json.dumps(data_facts(data), indent=2) + "\n")
    except OSError as error:
        raise ValueError(f"{workdir} can't be written ({error.strerror}); choose another --workdir") from error
    needed = 4 * state_bytes
    free = shutil.disk_usage(workdir).free
    if newest(workdir, "last") is None and free < needed:
        raise ValueError(
            f"{workdir}: the checkpoints take up to {needed / 2**20:.0f} MiB, {free / 2**20:.0f} MiB are free there; "
            "free some space or choose another --workdir"
        )


def _lock(file: IO[str], workdir: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{workdir}: another run is training there; wait, or choose another --workdir") from None
    except OSError as error:  # a file system without locks, such as a mounted bucket: nobody is kept out there
        if error.errno not in (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK):
            raise


def _check_shared(workdir: Path) -> None:
    if not (workdir / "config.json").exists():
        raise ValueError(
            f"{workdir}: what host 0 wrote there is not here; --workdir must lie on storage all hosts share"
        )
    if not os.access(workdir, os.W_OK):
        raise ValueError(f"{workdir} can't be written from here; every host writes its part of the checkpoints there")


def replace(path: Path, text: str) -> None:
    """Writes a file, whole or not at all: a resumed run killed here must find the file that it had."""
    partial = path.with_suffix(".partial")
    partial.write_text(text, "utf-8")
    partial.replace(path)
