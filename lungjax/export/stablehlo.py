"""Writes `model.pyz`: StableHLO for every platform, weights, metadata and a script, in one file that Python runs."""

import io
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export

import lungjax
from lungjax import artefacts
from lungjax.export.files import replaced_file
from lungjax.export.programs import Programs, without_places
from lungjax.models import convolution

FILE = "model.pyz"
EPOCH = (1980, 1, 1, 0, 0, 0)  # of all members, so that equal models are equal files
SCRIPT = "__main__.py"
# Files of lungjax that the script reads images and words answers with, the same code and not another like it.
SHIPPED = (
    "config.py", "metadata.py", "answers.py", "artefacts.py", "familiarity.py",
    "data/images.py", "data/kept.py", "data/lungs.py", "data/lung_outline.py", "data/study_masks.py",
)  # fmt: skip
PACKAGE = "shipped"
# jax reads serialised programs with flatbuffers, which it doesn't install: a small package of Python alone travels too.
LICENCES = b"""\"\"\"Copies of files that the script needs, unchanged but for their imports.

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
    with replaced_file(path) as partial_file:
        with zipfile.ZipFile(partial_file, "w", zipfile.ZIP_STORED) as archive:
            for name, data in members(programs).items():
                archive.writestr(zipfile.ZipInfo(name, EPOCH), data)
        found = programs.check(artefacts.read_pyz(partial_file).outputs, FILE)
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
    about = {
        "artefact": "lungjax",
        "format": artefacts.FORMAT,
        "lungjax": lungjax.__version__,
        "jax": jax.__version__,
        "platforms": artefacts.PLATFORMS,
        "compiler_options": convolution.compiler_options("cpu", train=False),
    }
    return {
        SCRIPT: Path(__file__).with_name("standalone.py").read_bytes(),
        f"{PACKAGE}/__init__.py": LICENCES,
        **{f"{PACKAGE}/{Path(name).name}": _shipped(name) for name in SHIPPED},
        **{
            f"flatbuffers/{file.name}": file.read_bytes()
            for file in sorted(Path(load_packages().__file__).parent.glob("*.py"))
        },
        artefacts.ABOUT: (json.dumps(about, indent=1) + "\n").encode(),
        artefacts.MODEL: programs.metadata.to_json().encode(),
        artefacts.WEIGHTS: _arrays(programs.weights),
        **{artefacts.member(name): program for name, program in serialized(programs).items()},
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
                export.export(jax.jit(getattr(programs, name)), platforms=artefacts.PLATFORMS)(*given).serialize()
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


def _shipped(name: str) -> bytes:
    """Returns a file of lungjax whose imports of others are turned to their copies in the zip."""
    text = (Path(lungjax.__file__).parent / name).read_text("utf-8")
    text = re.sub(r"^( *)from lungjax(?:\.data)? import ", rf"\1from {PACKAGE} import ", text, flags=re.M)
    return re.sub(r"^from lungjax(?:\.data)?\.(\w+) import ", rf"from {PACKAGE}.\1 import ", text, flags=re.M).encode()
