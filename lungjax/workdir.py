"""A run's folder: whose it is, and which data the run began on."""

import json
from pathlib import Path
from typing import Any

from lungjax import overrides
from lungjax.checkpoint import newest
from lungjax.config import Config
from lungjax.data.prepared import Prepared

# Fields that change neither the weights nor the data order: a run may go on with other values.
FREE_FIELDS = (
    "data.workers",
    "data.threads",
    "data.prefetch",
    "train.log_steps",
    "eval.batch_size",
    "eval.examples",
)


def check(workdir: Path, config: Config, mode: str) -> None:
    """Raises ValueError if the workdir holds a trained run of another configuration, or foreign files."""
    path = workdir / "config.json"
    if not path.exists():
        if mode == "evaluate":
            raise ValueError(f"{workdir}: no config.json there, so no run to evaluate; train first (--mode=train)")
        if workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
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


def claim(workdir: Path, config: Config, data: Prepared) -> None:
    """Writes config.json and data.json; to be called by the first host once every check has passed."""
    workdir.mkdir(parents=True, exist_ok=True)
    _replace(workdir / "config.json", overrides.to_json(config))
    _replace(workdir / "data.json", json.dumps(data_facts(data), indent=2) + "\n")


def _replace(path: Path, text: str) -> None:
    # Whole or not at all: a resumed run killed here must find the file that it had.
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(path)
