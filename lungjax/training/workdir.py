"""The folder of a run: its lock, config.json and data.json.

If a power loss leaves config.json or data.json empty or missing while the checkpoints are intact, they are rewritten
from the command, provided that the checkpoint has the parameters of the configured network.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax

from lungjax.config import Config, metadata, overrides
from lungjax.data.prepared import Prepared
from lungjax.runtime import distributed, files
from lungjax.runtime.checkpoint import check_network, is_begun, newest
from lungjax.training.state import TrainState

# Fields that change neither weights nor data order, so a run may resume with other values.
MUTABLE_FIELDS = (
    "data.workers", "data.threads", "data.prefetch", "train.log_steps", "train.save_steps", "train.devices",
    "train.shard_params", "train.on_nan", "train.tensorboard", "train.log_parameters",
    "eval.batch_size", "eval.examples", "eval.draws", "eval.sensitivity", "eval.prevalence",
)  # fmt: skip


def unreadable(workdir: Path) -> list[str]:
    """Returns which of config.json and data.json are missing or damaged in a workdir with checkpoints."""
    if newest(workdir, "last") is None:
        return []
    return [name for name in ("config.json", "data.json") if _read_json(workdir / name) is None]


def read_data(workdir: Path) -> dict[str, Any]:
    """Returns the data.json of a run: dataset, classes, fingerprint. Raises ValueError if it is missing or damaged."""
    content = _read_json(workdir / "data.json")
    if content is None:
        raise ValueError(f"{workdir / 'data.json'} is missing or damaged; the command that trained the run rewrites it")
    return content


def _read_json(path: Path) -> dict[str, Any] | None:
    """Returns the JSON object in a file, or None if the file is missing or contains anything else."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def check(workdir: Path, config: Config, mode: str) -> None:
    """Raises ValueError if the workdir contains a trained run with another configuration, or foreign files."""
    path = workdir / "config.json"
    if "config.json" in unreadable(workdir):
        return  # `lock_workdir` compares the parameters of the checkpoint instead
    if not path.exists():
        if mode == "evaluate":
            raise ValueError(f"{workdir}: no config.json, so there is no run to evaluate; train first (--mode=train)")
        # A run that is killed before its first save leaves only the lock and partial files.
        if workdir.exists() and not (
            workdir.is_dir() and all(p.name == "lock" or p.name.startswith(files.PARTIAL) for p in workdir.iterdir())
        ):
            raise ValueError(f"{workdir} is not empty and is not a lungjax run directory; choose another --workdir")
        return
    if not is_begun(workdir):
        return  # nothing was trained yet
    old = overrides.from_json(path.read_text(), str(path))
    changed = [line for line in overrides.difference(old, config) if line.split(":")[0] not in MUTABLE_FIELDS]
    if changed:
        lines = "\n  ".join([f"{workdir} contains a run with another configuration:", *changed])
        raise ValueError(f"{lines}\nChoose another --workdir, or delete this one to start over")


def check_same_data(workdir: Path, data: Prepared) -> None:
    """Raises ValueError if the data set has changed since the run began."""
    if newest(workdir, "last") is None or "data.json" in unreadable(workdir):
        return
    before = read_data(workdir)
    if before != data_facts(data):
        name, old, new = before.get("dataset"), str(before.get("fingerprint"))[:12], data.fingerprint[:12]
        change = f"the run was started on {name} with fingerprint {old}, which is now {new}"
        raise ValueError(f"{workdir}: {change}: images, labels or splits have changed. Choose another --workdir")


def data_facts(data: Prepared) -> dict[str, Any]:
    """Returns the content of data.json: name, classes in label order and fingerprint."""
    return {"dataset": data.name, "classes": list(data.classes), "fingerprint": data.fingerprint}


def drop_reports(workdir: Path) -> None:
    """Removes the reports of earlier weights, which could be mistaken for final ones."""
    for name in ("report.json", "report.html", "report.md", metadata.FILE):
        (workdir / name).unlink(missing_ok=True)


@contextmanager
def lock_workdir(workdir: Path, config: Config, data: Prepared, abstract_state: TrainState) -> Iterator[None]:
    """Locks the folder against other runs, and writes config.json and data.json; must be entered on every host.

    Raises ValueError on every host if another run is training in the folder, if the folder is not writable or not
    shared by all hosts, or if the checkpoints, up to four times the size of `abstract_state`, do not fit on the disk.
    """
    with ExitStack() as stack:
        distributed.on_first_host(lambda: _claim(workdir, config, data, abstract_state, stack))
        distributed.run_on_all_hosts(lambda: _check_shared(workdir))
        yield


def _claim(workdir: Path, config: Config, data: Prepared, abstract_state: TrainState, stack: ExitStack) -> None:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        message = f"{workdir}: another run is training here; wait, or choose another --workdir"
        files.lock(stack.enter_context((workdir / "lock").open("a")), message)
        check(workdir, config, "train")  # again, since another run may have been here before the lock
        check_same_data(workdir, data)
        names = unreadable(workdir)
        if names:
            check_network(workdir, abstract_state)
        for name in names:
            print(
                f"{workdir / name} was missing or damaged, perhaps by power loss, and was rewritten from this command. "
                "The checkpoint has the parameters of this network; other settings and the data are unverified"
            )
        files.atomic_write(workdir / "config.json", overrides.to_json(config))
        files.atomic_write(workdir / "data.json", json.dumps(data_facts(data), indent=2) + "\n")
    except OSError as error:
        raise ValueError(f"{workdir} can't be written ({error.strerror}); choose another --workdir") from error
    needed = 4 * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract_state))
    free = shutil.disk_usage(workdir).free
    if newest(workdir, "last") is None and free < needed:
        sizes = f"the checkpoints take up to {needed / 2**20:.0f} MiB, but {free / 2**20:.0f} MiB are free"
        raise ValueError(f"{workdir}: {sizes}; choose another --workdir")


def _check_shared(workdir: Path) -> None:
    if not (workdir / "config.json").exists():
        raise ValueError(f"{workdir}: the files of host 0 are missing here; all hosts must share the --workdir")
    if not os.access(workdir, os.W_OK):
        raise ValueError(f"{workdir} is not writable on this host; every host writes a part of the checkpoints")
