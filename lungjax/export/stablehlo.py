"""Writes `model.pyz`: StableHLO for every platform, weights, metadata and a script, in one file that Python runs."""

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export

import lungjax
from lungjax.export.functions import Programs, without_places
from lungjax.inference import artifacts
from lungjax.models.ops import conv
from lungjax.runtime.files import atomic_file

FILE = "model.pyz"
EPOCH = (1980, 1, 1, 0, 0, 0)  # of all members, so that equal models are equal files
SCRIPT = "__main__.py"
# Files of lungjax that the script reads images and words answers with, under their own names.
PACKED = (
    "config/__init__.py", "config/metadata.py", "config/schema.py", "config/validate.py",
    "data/__init__.py", "data/imaging/__init__.py", "data/imaging/images.py", "data/imaging/lung_masks.py",
    "data/imaging/lung_outline.py", "data/imaging/study_masks.py", "data/preprocess.py",
    "evaluation/__init__.py", "evaluation/novelty.py",
    "inference/__init__.py", "inference/artifacts.py", "inference/records.py",
)  # fmt: skip
# jax reads serialised programs with flatbuffers, which it doesn't install: a small package of Python alone travels too.
LICENCES = b"""\"\"\"Copies of files that the script needs.

lungjax: Apache-2.0. flatbuffers, in the folder beside this one: Copyright Google Inc., Apache-2.0,
https://github.com/google/flatbuffers. The licence: https://www.apache.org/licenses/LICENSE-2.0
\"\"\"
"""


def write(programs: Programs, folder: Path) -> tuple[Path, float]:
    """Writes FILE into `folder`, reads it back and compares it with the network.

    Returns its path, and the largest difference of the logits by their range. Raises ValueError, and leaves no file, if
    that is too large.
    """
    path = folder / FILE
    with atomic_file(path) as partial_file:
        with zipfile.ZipFile(partial_file, "w", zipfile.ZIP_STORED) as archive:
            for name, data in members(programs).items():
                archive.writestr(zipfile.ZipInfo(name, EPOCH), data)
        found = programs.check(artifacts.read_pyz(partial_file).outputs, FILE)
    return path, found


def load_packages() -> Any:
    """Returns flatbuffers, with which jax serialises. Raises ValueError where it is missing."""
    try:
        import flatbuffers
    except ImportError:
        raise ValueError(f"{FILE} needs the package flatbuffers: pip install flatbuffers") from None
    return flatbuffers


def members(programs: Programs) -> dict[str, bytes]:
    """Returns the files in the zip, by name."""
    package = Path(lungjax.__file__).parent
    about = {
        "artefact": "lungjax",
        "format": artifacts.FORMAT,
        "lungjax": lungjax.__version__,
        "jax": jax.__version__,
        "platforms": artifacts.PLATFORMS,
        "compiler_options": conv.compiler_options("cpu", train=False),
    }
    return {
        SCRIPT: Path(__file__).with_name("standalone.py").read_bytes(),
        "lungjax/__init__.py": LICENCES,
        **{f"lungjax/{name}": (package / name).read_bytes() for name in PACKED},
        **{
            f"flatbuffers/{file.name}": file.read_bytes()
            for file in sorted(Path(load_packages().__file__).parent.glob("*.py"))
        },
        artifacts.ABOUT: (json.dumps(about, indent=1) + "\n").encode(),
        artifacts.MODEL: programs.metadata.to_json().encode(),
        artifacts.WEIGHTS: _arrays(programs.weights),
        **{artifacts.member(name): program for name, program in serialized(programs).items()},
    }


def serialized(programs: Programs) -> dict[str, bytes]:
    """Returns each program as `jax.export` bytes, for all platforms and any number of images."""
    weights = {path: jax.ShapeDtypeStruct(array.shape, array.dtype) for path, array in programs.weights.items()}
    (batch,) = export.symbolic_shape("b")
    pixels = jax.ShapeDtypeStruct((batch, *programs.image_shape), np.uint8)
    targets = jax.ShapeDtypeStruct((batch,), np.int32)
    arguments: dict[str, tuple[Any, ...]] = {"predict": (weights, pixels), "gradcam": (weights, pixels, targets)}
    with without_places():
        return {
            name: bytes(
                export.export(jax.jit(getattr(programs, name)), platforms=artifacts.PLATFORMS)(*given).serialize()
            )
            for name, given in arguments.items()
        }


def _arrays(weights: dict[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:  # np.savez stamps each array with the time
        for name, array in weights.items():
            one = io.BytesIO()
            np.lib.format.write_array(one, np.ascontiguousarray(array), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy", EPOCH), one.getbuffer())
    return buffer.getvalue()
