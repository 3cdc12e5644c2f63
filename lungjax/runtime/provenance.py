"""Which code, which packages, which machine: what a report needs so that its run can be repeated."""

import hashlib
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

PACKAGE = Path(__file__).parents[1]
PACKAGES = ("lungjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets")


def code() -> str:
    """Returns a digest of lungjax's own source files, 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(str(path.relative_to(PACKAGE)).encode() + path.read_bytes())
    return digest.hexdigest()


def commit() -> str:
    """Returns the git commit of the checkout that runs, with "-dirty" if files were changed since; "" if unknown."""
    if not (PACKAGE.parent / ".git").exists():
        return ""  # installed: the version and the digest say what it is
    command = ["git", "-C", str(PACKAGE.parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # no git here, or a checkout of somebody else's that it refuses
        return ""


def versions() -> dict[str, str]:
    """Returns the version of every package that decides a number."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # lungjax itself, run from a checkout
            found[name] = "not installed"
    return found


def facts() -> dict[str, Any]:
    """Returns what a report says of code and machine; its keys are described in `lungjax/report/write.py`."""
    return {
        "commit": commit(),
        "code": code(),
        "devices": [str(d) for d in jax.devices()],
        "device_kind": jax.devices()[0].device_kind,
        "hosts": jax.process_count(),
        "python": platform.python_version(),
        "versions": versions(),
    }
