"""A run's folder: whose it is, and which data the run began on.

A power loss may leave config.json or data.json empty or missing while the checkpoints are intact. Such a run is not
lost: where the checkpoint has the parameters of the configured network, both files are written anew from the command.
"""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from lungjax.config import Config, metadata, overrides
from lungjax.data.prepared import Prepared
from lungjax.runtime import distributed, files
from lungjax.runtime.checkpoint import check_network, newest
from lungjax.training import state
from lungjax.training.state import TrainState

# Fields that change neither the weights nor the data order: a run may go on with other values.
MUTABLE_FIELDS = (
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


def unreadable(workdir: Path) -> list[str]:
    """Returns which of config.json and data.json are missing or damaged in a workdir that holds checkpoints."""
    if newest(workdir, "last") is None:
        return []
    return [name for name in ("config.json", "data.json") if _read_json(workdir / name) is None]


def read_data(workdir: Path) -> dict[str, Any]:
    """Returns a run's data.json: dataset, classes, fingerprint. Raises ValueError if it is missing or damaged."""
    content = _read_json(workdir / "data.json")
    if content is None:
        raise ValueError(
            f"{workdir / 'data.json'} is missing or damaged; the command that trained the run writes it anew"
        )
    return content


def _read_json(path: Path) -> dict[str, Any] | None:
    """Returns the JSON object in a file, None if the file is missing or holds anything else."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def check(workdir: Path, config: Config, mode: str) -> None:
    """Raises ValueError if the workdir holds a trained run of another configuration, or foreign files."""
    path = workdir / "config.json"
    if "config.json" in unreadable(workdir):
        return  # nothing to compare with; before it is written anew, the checkpoint's parameters are compared
    if not path.exists():
        if mode == "evaluate":
            raise ValueError(f"{workdir}: no config.json there, so no run to evaluate; train first (--mode=train)")
        if workdir.exists() and (not workdir.is_dir() or any(_is_foreign(p.name) for p in workdir.iterdir())):
            raise ValueError(f"{workdir} is not empty and holds no lungjax run; choose another --workdir")
        return
    if newest(workdir, "last") is None:
        return  # nothing was trained, so nothing can be lost
    old = overrides.from_json(path.read_text(), str(path))
    changed = [line for line in overrides.difference(old, config) if line.split(":")[0] not in MUTABLE_FIELDS]
    if changed:
        raise ValueError(
            f"{workdir} holds a run of another configuration:\n  " + "\n  ".join(changed) + "\nChoose another "
            "--workdir, or delete that one to start over"
        )


def _is_foreign(name: str) -> bool:
    """Returns whether a file is none of those that are left where a run was killed before it saved anything."""
    return name != "lock" and not name.startswith(files.PARTIAL)


def check_same_data(workdir: Path, data: Prepared) -> None:
    """Raises ValueError if the data set was prepared anew since the run began."""
    if newest(workdir, "last") is None or "data.json" in unreadable(workdir):
        return
    before = read_data(workdir)
    if before != data_facts(data):
        name, fingerprint = before.get("dataset"), str(before.get("fingerprint"))[:12]
        raise ValueError(
            f"{workdir}: this run began on {name} with fingerprint {fingerprint}, "
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
def lock_workdir(workdir: Path, config: Config, data: Prepared, abstract_state: TrainState) -> Iterator[None]:
    """Makes the folder this run's for a while: nobody else trains there, config.json and data.json are written.

    To be entered by every host once all else has been checked. Raises ValueError, on every host, if another run is
    training there, if the folder can't be written or has no room for the checkpoints (at most two states like
    `abstract_state`, two of best weights, and another of each while it is written), or is not the same on all hosts.
    """
    with ExitStack() as held:
        distributed.run_on_all_hosts(
            lambda: _claim(workdir, config, data, abstract_state, held) if distributed.is_first_host() else None
        )
        distributed.run_on_all_hosts(lambda: _check_shared(workdir))
        yield


def _claim(workdir: Path, config: Config, data: Prepared, abstract_state: TrainState, held: ExitStack) -> None:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        _lock(held.enter_context((workdir / "lock").open("a")), workdir)
        check(workdir, config, "train")  # again: between the first time and the lock another run may have been here
        check_same_data(workdir, data)
        lost = unreadable(workdir)
        if lost:
            check_network(workdir, abstract_state)
        for name in lost:
            print(
                f"{workdir / name} was missing or damaged, as after a power loss: written anew from this command. The "
                "checkpoint has the parameters of this network; other settings and the data can't be compared"
            )
        files.atomic_write(workdir / "config.json", overrides.to_json(config))
        files.atomic_write(workdir / "data.json", json.dumps(data_facts(data), indent=2) + "\n")
    except OSError as error:
        raise ValueError(f"{workdir} can't be written ({error.strerror}); choose another --workdir") from error
    needed = 4 * state.size(abstract_state)
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
