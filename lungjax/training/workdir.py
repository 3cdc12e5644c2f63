"""The folder of a run: its lock, config.json and data.json.

If config.json or data.json is lost, for example by a power loss, but the checkpoints are intact, the command that
trained the run writes it again, provided that the checkpoint has the parameters of the configured network.
"""

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax

from lungjax.config import Config, metadata, overrides
from lungjax.config.schema import parse_json
from lungjax.data.prepared import Prepared
from lungjax.runtime import distributed, files
from lungjax.runtime.checkpoint import check_network, is_begun, newest
from lungjax.training.state import TrainState

# Fields that change neither weights nor data order, so a run may resume with other values.
MUTABLE_FIELDS = (
    "data.workers", "data.threads", "data.prefetch", "train.log_steps", "train.save_steps", "train.devices",
    "train.shard_params", "train.on_nan", "train.tensorboard", "train.log_parameters",
    "eval.batch_size", "eval.examples", "eval.draws", "eval.sensitivity", "eval.prevalence",
    "eval.tta",
)  # fmt: skip
# Fields of the length, with which a finished or interrupted run may be lengthened.
LENGTH_FIELDS = ("train.epochs", "train.steps", "train.patience")


def lost_files(workdir: Path) -> list[str]:
    """Returns which of config.json and data.json are not JSON objects in a workdir with checkpoints."""
    lost = []
    for name in ("config.json", "data.json") if newest(workdir, "last") is not None else ():
        try:
            parse_json((workdir / name).read_bytes(), name)
        except (FileNotFoundError, ValueError):
            lost.append(name)
    return lost


def check(workdir: Path, config: Config, mode: str) -> None:
    """Raises ValueError if the workdir contains a trained run with another configuration, or foreign files."""
    path = workdir / "config.json"
    if "config.json" in lost_files(workdir):
        if mode == "evaluate":
            raise ValueError(f"{path} is missing or damaged; rerun the command that trained the run, which rewrites it")
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
    old = overrides.read(path)
    allowed: tuple[str, ...] = MUTABLE_FIELDS
    if mode == "train":  # `check_length` compares the steps; patience may only grow, and 0 is the longest
        before, now = (each.train.patience or math.inf for each in (old, config))
        allowed += LENGTH_FIELDS if now >= before else LENGTH_FIELDS[:2]
    else:  # it can affect the choice of the best weights, but not their test
        allowed += ("eval.aggregate",)
    changed = [line for line in overrides.difference(old, config) if line.split(":")[0] not in allowed]
    if changed:
        lines = "\n  ".join([f"{workdir} contains a run with another configuration:", *changed])
        raise ValueError(f"{lines}\nChoose another --workdir, or delete this one to start over")


def check_length(workdir: Path, steps: int) -> None:
    """Raises ValueError if the run has passed its new last step, `steps`."""
    last = newest(workdir, "last") or 0
    if steps < last:
        reason = f"its last checkpoint is of step {last}, so it can't end at step {steps}"
        raise ValueError(f"{workdir}: {reason}; set train.steps={last} or more, or choose another --workdir")


def check_same_data(workdir: Path, data: Prepared) -> None:
    """Raises ValueError if the data set has changed since the run began."""
    if newest(workdir, "last") is None or "data.json" in lost_files(workdir):
        return
    before = metadata.read_data(workdir)
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
    shared by all hosts, or if the checkpoints do not fit on the disk.
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
        if names := lost_files(workdir):
            check_network(workdir, abstract_state)
            print(
                f"{workdir}: {' and '.join(names)} was damaged or missing and is rewritten from this command. The "
                "checkpoint has the parameters of this network; other settings and the data are unverified"
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
