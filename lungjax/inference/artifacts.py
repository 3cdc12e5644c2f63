"""Reads what `lungjax.export` writes: `model.pyz`, and `model.onnx` where onnxruntime is installed.

A `model.pyz` is a stored zip:

    artefact.json        {"artefact": "lungjax", "format": 1, "jax", "platforms", "compiler_options"}
    model.json           `metadata.Metadata`
    weights.npz          float32 arrays by path, those of a network with its norms folded
    predict.stablehlo    `jax.export` bytes: (weights, pixels uint8 [b, H, W, C]) -> {"probabilities", "logits"} [b, n]
    gradcam.stablehlo    (weights, pixels, targets int32 [b], -1 the predicted class) -> {"maps" [b, H, W],
                         "probabilities" [b, n]}
    __main__.py, lungjax/, flatbuffers/    the script that `python model.pyz scan.png` runs, with a copy of this file

Cropping and resizing come before the program; normalisation, temperature and probabilities are inside it. Nothing in
the file is unpickled, and nothing of it is run as Python by this reader. The programs are compiled code all the same:
open files of people you trust. This file imports jax, numpy and the metadata alone, since it also travels in the zip.
"""

import io
import json
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lungjax.config.metadata import Metadata, from_json

FORMAT = 1
ABOUT, MODEL, WEIGHTS = "artefact.json", "model.json", "weights.npz"
PROGRAMS = {"predict": ("logits", "probabilities"), "gradcam": ("maps", "probabilities")}  # and what they return
PLATFORMS = ("cpu", "cuda", "tpu")
# What a file may ask of the compiler. Others could write files, so they are left out, whoever wrote them.
OPTIONS = ("xla_cpu_experimental_ynn_fusion_type", "xla_cpu_prefer_vector_width")
# Code outside of the program that it may call; an address in memory, of a crafted one, must not be followed.
CALLED = re.compile(r"(?:custom_call\s*@|call_target_name\s*=\s*\")([^\s(\"]+)")
HARMLESS = {"shape_assertion"}  # that the batch has at least one image
METADATA_KEY = "lungjax"  # of an ONNX file's metadata_props
# What numpy, zipfile and jax raise for bytes that are not what they should be.
BROKEN = (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, EOFError, RuntimeError, MemoryError,
          zipfile.BadZipFile, zlib.error, struct.error, NotImplementedError, AssertionError)  # fmt: skip


def member(program: str) -> str:
    """Returns the name of a program's file in the zip."""
    return f"{program}.stablehlo"


@dataclass(frozen=True, eq=False)
class Exported:
    """A `model.pyz`, opened by `read_pyz`. Several threads may call it; each new batch size is compiled once."""

    metadata: Metadata
    weights: Mapping[str, np.ndarray]
    programs: Mapping[str, Any]  # of PROGRAMS: `jax.export.Exported`
    compiler_options: Mapping[str, Any]  # of the CPU

    def predict(self, pixels: np.ndarray) -> np.ndarray:
        """Returns calibrated probabilities float32 [B, classes] of uint8 [B, H, W, C], cropped and resized."""
        return np.asarray(self.outputs(pixels)["probabilities"])

    def gradcam(self, pixels: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns Grad-CAM maps float32 [B, H, W] in 0..1, and calibrated probabilities [B, classes].

        Args:
          pixels: as in `predict`.
          targets: int [B], the class each map is about; -1 is the predicted one.
        """
        found = self._call("gradcam", pixels, np.asarray(targets, np.int32))
        return np.asarray(found["maps"]), np.asarray(found["probabilities"])

    def outputs(self, pixels: np.ndarray) -> dict[str, Any]:
        """Returns `probabilities` and uncalibrated `logits` [B, classes]."""
        found: dict[str, Any] = self._call("predict", pixels)
        return found

    @property
    def platforms(self) -> tuple[str, ...]:
        """Platforms that the programs are compiled for, as jax calls them."""
        return tuple(self.programs["predict"].platforms)

    def _call(self, name: str, pixels: np.ndarray, *rest: np.ndarray) -> Any:
        shape = (*self.metadata.input.size, self.metadata.input.channels)
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1:] != shape:
            wanted = ", ".join(map(str, shape))
            raise ValueError(f"pixels are {pixels.dtype} {list(pixels.shape)}, wanted uint8 [B, {wanted}]")
        if not len(pixels):
            raise ValueError("no image was given")
        return self._compiled[name](self._placed, pixels, *rest)

    @cached_property
    def _placed(self) -> dict[str, jax.Array]:
        return jax.device_put(dict(self.weights))

    @cached_property
    def _compiled(self) -> dict[str, Any]:
        options = self._accepted
        return {name: jax.jit(program.call, compiler_options=options) for name, program in self.programs.items()}

    @cached_property
    def _accepted(self) -> dict[str, Any]:
        options = dict(self.compiler_options) if jax.default_backend() == "cpu" else {}
        try:
            jax.jit(lambda: np.zeros((), np.float32), compiler_options=options).lower().compile()
        except jax.errors.JaxRuntimeError:  # another jaxlib, which doesn't know them
            return {}
        return options


def read_pyz(path: str | Path) -> Exported:
    """Opens a `model.pyz`. Raises ValueError for a foreign, newer or damaged file, saying what is wrong."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            names = set(archive.namelist())
            if ABOUT not in names:
                raise ValueError(f"{path}: a zip, but not one of lungjax.export (it has no {ABOUT})")
            read = {name: _member(archive, name, path) for name in (ABOUT, MODEL, WEIGHTS, *map(member, PROGRAMS))}
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path}: no zip, or a damaged one ({error}); copy or export it again") from None
    about = _about(read[ABOUT], path)
    told = from_json(_text(read[MODEL], f"{path}: {MODEL}"), f"{path}: {MODEL}")
    weights = _weights(read[WEIGHTS], path)
    programs = {name: _program(read[member(name)], f"{path}: {member(name)}") for name in PROGRAMS}
    _check_fits(programs, weights, told, path)
    given = about.get("compiler_options")
    options = {key: value for key, value in (given if isinstance(given, dict) else {}).items() if key in OPTIONS}
    return Exported(told, weights, programs, options)


def _member(archive: zipfile.ZipFile, name: str, path: Path) -> bytes:
    try:
        if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{path}: {name} is compressed, which lungjax.export never does; not its file")
        return archive.read(name)  # checks its sum
    except KeyError:
        raise ValueError(f"{path}: {name} is missing in it; export it again") from None
    except (zipfile.BadZipFile, EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path}: {name} is damaged ({error}); copy or export it again") from None


def _text(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{where}: not text") from None


def _about(data: bytes, path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(_text(data, f"{path}: {ABOUT}"))
    except ValueError as error:
        raise ValueError(f"{path}: {ABOUT} is no JSON ({error})") from None
    if not isinstance(tree, dict) or tree.get("artefact") != "lungjax" or not isinstance(tree.get("format"), int):
        raise ValueError(f"{path}: {ABOUT} is not that of lungjax.export")
    if tree["format"] > FORMAT:
        raise ValueError(f"{path}: format {tree['format']} of a newer lungjax; this one reads up to {FORMAT}")
    return tree


def _weights(data: bytes, path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
    except BROKEN as error:
        raise ValueError(f"{path}: {WEIGHTS} can't be read ({error})") from None
    wrong = [name for name, array in found.items() if array.dtype != np.float32]
    if wrong or not found:
        raise ValueError(
            f"{path}: {WEIGHTS} should hold float32 arrays alone ({', '.join(wrong[:3]) or 'it is empty'})"
        )
    return found


def _program(data: bytes, where: str) -> Any:
    from jax import export  # here: a model.onnx needs none of it

    try:
        program = export.deserialize(bytearray(data))
        called = set(CALLED.findall(program.mlir_module()))
    except ImportError as error:  # jax reads programs with flatbuffers, and doesn't install it
        raise ValueError(f"{where}: {error}") from None
    except BROKEN as error:
        raise ValueError(
            f"{where} can't be read by jax {jax.__version__} ({type(error).__name__}: {str(error)[:200]}); it may be "
            "damaged, or of a newer jax"
        ) from None
    if called - HARMLESS:
        raise ValueError(
            f"{where} calls {', '.join(sorted(called - HARMLESS)[:3])} outside of it, which no export does"
        )
    return program


def _check_fits(programs: Mapping[str, Any], weights: Mapping[str, np.ndarray], told: Metadata, path: Path) -> None:
    """Raises ValueError where programs, weights and metadata are not of one model."""
    shape = (*told.input.size, told.input.channels)
    for name, program in programs.items():
        try:
            (given, pixels, *rest), _ = jax.tree.unflatten(program.in_tree, program.in_avals)
            outputs = jax.tree.unflatten(program.out_tree, program.out_avals)
            wanted = {key: (tuple(array.shape), array.dtype) for key, array in given.items()}
            fits = wanted == {key: (array.shape, array.dtype) for key, array in weights.items()}
            fits = fits and tuple(pixels.shape[1:]) == shape and pixels.dtype == np.uint8
            fits = fits and len(rest) == (name == "gradcam") and sorted(outputs) == list(PROGRAMS[name])
            fits = fits and outputs["probabilities"].shape[1:] == (len(told.classes),)
        except BROKEN:
            fits = False
        if not fits:
            raise ValueError(f"{path}: {member(name)} doesn't fit its {WEIGHTS} and {MODEL}; export it again")


@dataclass(frozen=True, eq=False)
class Session:
    """A `model.onnx`, opened by `read_onnx`. Several threads may call it."""

    metadata: Metadata
    session: Any  # onnxruntime.InferenceSession

    def predict(self, pixels: np.ndarray) -> np.ndarray:
        """Returns calibrated probabilities float32 [B, classes] of uint8 [B, H, W, C], cropped and resized."""
        return self.outputs(pixels)["probabilities"]

    def outputs(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        """Returns `probabilities` and uncalibrated `logits` [B, classes]."""
        names = ["probabilities", "logits"]
        return dict(zip(names, self.session.run(names, {"pixels": np.ascontiguousarray(pixels)}), strict=True))


def read_onnx(path: str | Path, threads: int = 0) -> Session:
    """Opens a `model.onnx` of lungjax.export on the CPU.

    Args:
      path: of the file.
      threads: of one call; 0 takes all cores.

    Raises ValueError if onnxruntime is not installed, and for a foreign or damaged file.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        import onnxruntime
    except ImportError:
        raise ValueError(f"{path}: reading ONNX needs onnxruntime; pip install onnxruntime") from None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        told = session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
        inputs = {value.name for value in session.get_inputs()}
        outputs = {value.name for value in session.get_outputs()}
    except Exception as error:  # onnxruntime has a class of its own for each failure, all straight below Exception
        raise ValueError(f"{path}: onnxruntime can't read it ({str(error)[:200]})") from None
    if told is None or inputs != {"pixels"} or not outputs >= {"probabilities", "logits"}:
        raise ValueError(f"{path}: an ONNX file, but not one of lungjax.export")
    return Session(from_json(told, f"{path}: its metadata"), session)
