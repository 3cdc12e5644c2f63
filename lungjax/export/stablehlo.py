"""Writes `model.pyz`: StableHLO for every platform, weights, metadata and a script in one file that Python runs."""

import dataclasses
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import flatbuffers
import jax
import numpy as np
from jax import export

import lungjax
from lungjax.export.functions import Check, Exportable, without_source_paths
from lungjax.inference import artifacts
from lungjax.models.ops import conv
from lungjax.runtime.files import atomic_file

FILE = "model.pyz"
EPOCH = (1980, 1, 1, 0, 0, 0)  # of all members, so that equal models give equal files
SCRIPT = "__main__.py"
# Files of lungjax that the script imports to read images and to write records.
PACKED = (
    "config/__init__.py", "config/metadata.py", "config/schema.py", "config/validate.py",
    "data/__init__.py", "data/batching.py", "data/folder_walk.py", "data/imaging/__init__.py",
    "data/imaging/images.py", "data/imaging/limits.py", "data/imaging/lung_masks.py", "data/imaging/lung_outline.py",
    "data/imaging/study_masks.py", "data/preprocess.py", "data/safe_text.py",
    "evaluation/__init__.py", "evaluation/aggregation.py", "evaluation/novelty.py",
    "inference/__init__.py", "inference/artifacts.py", "inference/records.py",
)  # fmt: skip
# jax reads serialized programs with flatbuffers but does not depend on it, so this small Python package is packed too.
LICENSES = b"""\"\"\"Copies of files that the script needs.

lungjax: Apache-2.0. flatbuffers, in the folder next to this one: Copyright Google Inc., Apache-2.0,
https://github.com/google/flatbuffers. The license: https://www.apache.org/licenses/LICENSE-2.0
\"\"\"
"""


def write(functions: Exportable, folder: Path) -> tuple[Path, Check]:
    """Writes FILE into `folder` and reads it back; returns its path and the result of `Functions.check`."""
    path = folder / FILE
    with atomic_file(path) as partial_file:
        with zipfile.ZipFile(partial_file, "w", zipfile.ZIP_STORED) as archive:
            for name, data in members(functions).items():
                archive.writestr(zipfile.ZipInfo(name, EPOCH), data)
        check = functions.check(artifacts.read_pyz(partial_file).outputs, FILE)
    return path, check


def members(functions: Exportable) -> dict[str, bytes]:
    """Returns the contents of model.pyz as {file name: bytes}."""
    package, reader = Path(lungjax.__file__).parent, Path(flatbuffers.__file__).parent
    programs, weights = serialized(functions), io.BytesIO()
    np.savez(weights, allow_pickle=False, **functions.weights)
    about = {
        "lungjax": lungjax.__version__,
        "jax": jax.__version__,
        "networks": [dataclasses.asdict(config) for config in functions.configs],
        "platforms": artifacts.PLATFORMS,
        "programs": list(programs),
        "compiler_options": conv.compiler_options("cpu", train=False),
    }
    return {
        SCRIPT: Path(__file__).with_name("standalone.py").read_bytes(),
        "lungjax/__init__.py": LICENSES,
        **{f"lungjax/{name}": (package / name).read_bytes() for name in PACKED},
        **{f"flatbuffers/{file.name}": file.read_bytes() for file in sorted(reader.glob("*.py"))},
        artifacts.ABOUT: (json.dumps(about, indent=1) + "\n").encode(),
        artifacts.MODEL: functions.metadata.to_json().encode(),
        artifacts.WEIGHTS: weights.getvalue(),
        **{artifacts.member(name): program for name, program in programs.items()},
    }


def serialized(functions: Exportable) -> dict[str, bytes]:
    """Returns each function as `jax.export` bytes, for all platforms and any number of images."""
    weights = {path: jax.ShapeDtypeStruct(array.shape, array.dtype) for path, array in functions.weights.items()}
    (batch,) = export.symbolic_shape("b")
    pixels = jax.ShapeDtypeStruct((batch, *artifacts.image_shape(functions.metadata)), np.uint8)
    targets = jax.ShapeDtypeStruct((batch,), np.int32)

    def convert(function: Any, *arguments: Any) -> bytes:
        return bytes(export.export(jax.jit(function), platforms=artifacts.PLATFORMS)(*arguments).serialize())

    with without_source_paths():
        programs = {"predict": convert(functions.predict, weights, pixels)}
        if "gradcam" in functions.methods:
            programs["gradcam"] = convert(functions.gradcam, weights, pixels, targets)
    return programs
