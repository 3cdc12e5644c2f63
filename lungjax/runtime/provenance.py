"""Records code, package versions and machine in reports, so that runs can be repeated."""

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
    """Returns a digest of the source files of lungjax, 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for path in sorted([*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.toml")]):
        digest.update(str(path.relative_to(PACKAGE)).encode() + path.read_bytes())
    return digest.hexdigest()


def commit() -> str:
    """Returns the git commit of this checkout, with "-dirty" if files were changed; "" if unknown."""
    if not (PACKAGE.parent / ".git").exists():
        return ""  # installed: version and digest identify the code
    command = ["git", "-C", str(PACKAGE.parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # no git, or a checkout owned by another user, which git refuses
        return ""


def version(package: str) -> str:
    """Returns the version of a package, or "" if it is not installed, as when lungjax runs from a checkout."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def versions() -> dict[str, str]:
    """Returns the versions of the packages that affect results."""
    return {name: version(name) or "not installed" for name in PACKAGES}


def facts() -> dict[str, Any]:
    """Returns facts about code and machine for a report; `lungjax/evaluation/README.md` describes the keys."""
    return {
        "commit": commit(),
        "code": code(),
        "devices": [str(d) for d in jax.devices()],
        "device_kind": jax.devices()[0].device_kind,
        "hosts": jax.process_count(),
        "python": platform.python_version(),
        "versions": versions(),
    }
