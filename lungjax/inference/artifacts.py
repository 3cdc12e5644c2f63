"""Reads the files that `lungjax.export` writes: `model.pyz`, and `model.onnx` where onnxruntime is installed.

A `model.pyz` is an uncompressed zip:

    artifact.json        {"lungjax", "jax": versions, "networks": [`config.ModelConfig` of each member],
                         "platforms", "programs", "compiler_options"}
    model.json           `metadata.Metadata`
    weights.npz          float32 arrays by path, batch norms folded; of an ensemble by MEMBER/path
    predict.stablehlo    `jax.export` bytes: (weights, pixels uint8 [b, *`image_shape`]) -> {"probabilities", "logits"
                         [b, classes], "features" [b, F]}
    gradcam.stablehlo    (weights, pixels, targets int32 [b], -1 for the predicted class) -> {"maps" [b, H, W]}; missing
                         if no feature map of the network is large enough for Grad-CAM
    __main__.py, lungjax/, flatbuffers/    the script that `python model.pyz scan.png` runs, with a copy of this file

Images are cropped and resized before the program runs, which normalizes them and applies temperature and softmax. This
reader unpickles nothing and runs no Python code from the file. Still, the programs are compiled code: open only files
from trusted sources. This module imports only modules that are also packed into the zip.
"""

import io
import json
import math
import re
import shlex
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lungjax.config.metadata import Metadata, from_json
from lungjax.data import preprocess
from lungjax.evaluation import novelty

ABOUT, MODEL, WEIGHTS = "artifact.json", "model.json", "weights.npz"
OUTPUTS = ("probabilities", "logits", "features")  # of the predict program, in the order of the ONNX outputs
PROGRAMS = ("predict", "gradcam")
PLATFORMS = ("cpu", "cuda", "tpu")
# Compiler options that a file may set. Others are ignored, since some make the compiler write files.
OPTIONS = ("xla_cpu_experimental_ynn_fusion_type", "xla_cpu_prefer_vector_width")
# Calls to external code, which would let a forged file jump to any address in memory.
CALLS = re.compile(r"(?:custom_call\s*@|call_target_name\s*=\s*\")([^\s(\"]+)")
SAFE_CALLS = {"shape_assertion"}  # assertion that the batch has at least one image
METADATA_KEY = "lungjax"  # in an ONNX file's metadata_props


def compatibility(version: str) -> str:
    """Returns which versions of jax are guaranteed to read a program that was exported with `version`.

    See docs.jax.dev/en/latest/export/export.html#compatibility-guarantees.
    """
    return f"jax {version}, and versions released up to 6 months after or 3 weeks before it"


def member(program: str) -> str:
    """Returns the name of a program's file in the zip."""
    return f"{program}.stablehlo"


def image_shape(metadata: Metadata) -> tuple[int, ...]:
    """Returns height, width and channels of the network's input.

    The members of an ensemble share one input if their preprocessing is equal. Otherwise the input is flat: [N], the
    pixels of each preprocessing one after the other.
    """
    shapes = list(_input_shapes(metadata).values())
    return shapes[0] if len(shapes) == 1 else (sum(map(math.prod, shapes)),)


def member_pixels(metadata: Metadata, pixels: Any) -> list[Any]:
    """Returns the input [B, H, W, C] of each member of an ensemble, numpy or jax, from `pixels` [B, *image_shape]."""
    shapes, parts, at = _input_shapes(metadata), {}, 0
    for key, shape in shapes.items():
        end = at + math.prod(shape)
        parts[key] = pixels if len(shapes) == 1 else pixels[:, at:end].reshape(pixels.shape[0], *shape)
        at = end
    return [parts[member.preprocessing] for member in metadata.members or (metadata,)]


def picture(metadata: Metadata, pixels: np.ndarray) -> np.ndarray:
    """Returns the image [H, W, C] to show for `pixels` of `image_shape`: the input of the first member."""
    return np.asarray(member_pixels(metadata, pixels[None])[0][0])


def _input_shapes(metadata: Metadata) -> dict[Any, tuple[int, int, int]]:
    members = metadata.members or (metadata,)
    return {member.preprocessing: (*member.input.size, member.input.channels) for member in members}


@dataclass(frozen=True, eq=False)
class Input:
    """One preprocessed image."""

    pixels: np.ndarray  # uint8 of `image_shape`
    novelty: float | None = None  # above 1 for images unlike the training images; None if the model has no score
    warnings: tuple[str, ...] = ()


class Preprocessor:
    """Turns decoded images into network inputs as described by the metadata of a model.

    The novelty of an image for an ensemble is the median of its members' scores, which is above 1 only if half of them
    are, so false alarms do not become more frequent with their number.
    """

    def __init__(self, metadata: Metadata) -> None:
        self.members = metadata.members or (metadata,)
        self.scores = [None if each.novelty is None else novelty.from_dict(each.novelty) for each in self.members]

    def __call__(
        self, decoded: np.ndarray, box: preprocess.Box | None = None, segmented: bool = False, modality: str = ""
    ) -> Input:
        """Returns a decoded image [H, W] or [H, W, 3], uint8 or uint16, as network input.

        `box` is xmin, ymin, xmax, ymax of the body in pixels; None locates it if the model was trained on body crops.
        `segmented` images are already in the stage of the model. `modality` is that of a DICOM file, if any. Raises
        ValueError for 16-bit images without a window.
        """
        pictures: dict[Any, tuple[np.ndarray, np.ndarray, list[str]]] = {}
        warnings, scores = list[str](), list[tuple[float, Any, np.ndarray]]()
        for member, novelty_score in zip(self.members, self.scores, strict=True):
            key = member.preprocessing
            if key not in pictures:
                pictures[key] = preprocess.picture(decoded, member, box, segmented)
            _, stored, notes = pictures[key]
            warnings += notes
            sides, size = decoded.shape[:2], member.stored or member.input.size
            if 2 * max(sides[0] / size[0], sides[1] / size[1]) <= 1:
                warnings.append(f"small image: {sides[1]} x {sides[0]} pixels for an input of {size[1]} x {size[0]}")
            warnings += member.modality_warnings(modality)
            if novelty_score is not None:
                scores.append((novelty_score.score(stored), novelty_score, stored))
        score = float(np.median([value for value, *_ in scores])) if scores else None
        if score is not None and score > 1:
            _, highest, stored = max(scores, key=lambda each: each[0])
            warnings.append(f"unlike the training images: {highest.reason(stored)}")
        inputs = [pixels for pixels, *_ in pictures.values()]
        pixels = inputs[0] if len(inputs) == 1 else np.concatenate([each.ravel() for each in inputs])
        return Input(pixels, score, tuple(dict.fromkeys(warnings)))


@dataclass(frozen=True, eq=False)
class Program:
    """A `model.pyz`, opened by `read_pyz`. Thread-safe; each new batch size is compiled once."""

    metadata: Metadata
    weights: Mapping[str, np.ndarray]
    programs: Mapping[str, Any]  # by the names of PROGRAMS: `jax.export.Exported`
    compiler_options: Mapping[str, Any]  # of the CPU

    def outputs(self, pixels: np.ndarray) -> dict[str, Any]:
        """Returns `probabilities`, `logits` [B, classes] and `features` [B, F] of uint8 [B, H, W, C], B above zero."""
        return dict(self._compiled["predict"](self._device_weights, pixels))

    def gradcam(self, pixels: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Returns Grad-CAM maps float32 [B, H, W] in 0..1 of the classes `targets` int [B]; -1 is the predicted one."""
        maps = self._compiled["gradcam"](self._device_weights, pixels, np.asarray(targets, np.int32))["maps"]
        return np.asarray(maps)

    @cached_property
    def _device_weights(self) -> dict[str, jax.Array]:
        return jax.device_put(dict(self.weights))

    @cached_property
    def _compiled(self) -> dict[str, Any]:
        options = dict(self.compiler_options) if jax.default_backend() == "cpu" else {}
        try:
            jax.jit(lambda: np.zeros((), np.float32), compiler_options=options).lower().compile()
        except jax.errors.JaxRuntimeError:  # another jaxlib, which doesn't know these options
            options = {}
        return {name: jax.jit(program.call, compiler_options=options) for name, program in self.programs.items()}


def read_pyz(path: str | Path) -> Program:
    """Opens a `model.pyz`. Raises ValueError if it is damaged, not from lungjax.export, or from an incompatible jax."""
    path = Path(path)
    metadata, weights, about = read_parts(path)
    names = [name for name in PROGRAMS if name in about["programs"]]
    files = _members(path, map(member, names))
    programs = {name: _program(files[member(name)], path, member(name), about["jax"]) for name in names}
    options = {key: value for key, value in about["compiler_options"].items() if key in OPTIONS}
    return Program(metadata, weights, programs, options)


def read_parts(path: Path) -> tuple[Metadata, dict[str, np.ndarray], dict[str, Any]]:
    """Returns metadata, weights and artifact.json of a `model.pyz` of any jax version. Raises ValueError if damaged."""
    files = _members(path, (MODEL, WEIGHTS))
    metadata = from_json(files[MODEL].decode("utf-8", "replace"), f"{path}: {MODEL}")
    return metadata, _weights(files[WEIGHTS], f"{path}: {WEIGHTS}"), read_about(path)


def read_about(path: Path) -> dict[str, Any]:
    """Returns artifact.json of a `model.pyz`. Raises the same errors as `read_parts`."""
    data = _members(path, (ABOUT,))[ABOUT]
    try:
        about = json.loads(data)
        options, programs = dict(about["compiler_options"]), list(about["programs"])
        return about | {"jax": str(about["jax"]), "compiler_options": options, "programs": programs}
    except (ValueError, LookupError, TypeError):
        raise ValueError(f"{path}: {ABOUT} is not from lungjax.export") from None


def _members(path: Path, names: Iterable[str]) -> dict[str, bytes]:
    try:
        archive = zipfile.ZipFile(path)
    except OSError:
        raise
    except Exception as error:  # zipfile raises many types for damaged data
        raise ValueError(f"{path}: not a zip, or a damaged one ({error}); copy or export it again") from None
    with archive:
        if ABOUT not in archive.namelist():
            raise ValueError(f"{path}: a zip, but not from lungjax.export (no {ABOUT})")
        contents = {}
        for name in names:
            if name in archive.namelist() and archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{path}: {name} is compressed, so the file is not from lungjax.export")
            try:
                contents[name] = archive.read(name)  # verifies its checksum
            except Exception as error:  # as above
                raise ValueError(f"{path}: {name} is missing or damaged ({error}); copy or export it again") from None
        return contents


def _weights(data: bytes, where: str) -> dict[str, np.ndarray]:
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            weights = {name: arrays[name] for name in arrays.files}
    except Exception as error:  # numpy and zipfile raise almost any exception for damaged data
        raise ValueError(f"{where} can't be read ({error})") from None
    if not weights or any(array.dtype != np.float32 for array in weights.values()):
        raise ValueError(f"{where} must contain float32 arrays only")
    return weights


def _program(data: bytes, path: Path, name: str, version: str) -> Any:
    """Returns the program `name` of a file; `version` is the version of jax that exported it."""
    from jax import export  # here: a model.onnx doesn't need it

    where = f"{path}: {name}"
    try:
        program = export.deserialize(bytearray(data))
        calls = set(CALLS.findall(program.mlir_module())) - SAFE_CALLS
    except ImportError as error:  # jax reads programs with flatbuffers, but doesn't depend on it
        raise ValueError(f"{where}: {error}") from None
    except Exception as error:  # jax raises almost any exception for damaged data
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if version == jax.__version__:
            raise ValueError(f"{where}: damaged ({reason})") from None
        raise ValueError(
            f"{where}: jax {jax.__version__} can't read it; supported versions are {compatibility(version)}. Install "
            f"one or export the model again: python -m lungjax.export --refresh={shlex.quote(str(path))} ({reason})"
        ) from None
    if calls:
        names = ", ".join(sorted(calls)[:3])
        raise ValueError(f"{where}: rejected, since it calls external code ({names}), which exports never do")
    return program


@dataclass(frozen=True, eq=False)
class Session:
    """A `model.onnx`, opened by `read_onnx`. Thread-safe."""

    metadata: Metadata
    session: Any  # onnxruntime.InferenceSession

    def outputs(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the same outputs as `Program.outputs`."""
        arrays = self.session.run(list(OUTPUTS), {"pixels": np.ascontiguousarray(pixels)})
        return dict(zip(OUTPUTS, arrays, strict=True))


def read_onnx(path: str | Path) -> Session:
    """Opens a `model.onnx` on the CPU. Raises ValueError without onnxruntime, or if it is not from lungjax.export."""
    try:
        import onnxruntime
    except ImportError:
        raise ValueError(f"{path}: reading ONNX needs onnxruntime; pip install onnxruntime") from None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        text = session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
        inputs = {value.name for value in session.get_inputs()}
        outputs = {value.name for value in session.get_outputs()}
    except Exception as error:  # onnxruntime has one class per failure, each a direct subclass of Exception
        raise ValueError(f"{path}: onnxruntime can't read it ({str(error)[:200]})") from None
    if text is None or inputs != {"pixels"} or not outputs >= set(OUTPUTS):
        raise ValueError(f"{path}: an ONNX file, but not from lungjax.export")
    return Session(from_json(text, f"{path}: metadata"), session)
