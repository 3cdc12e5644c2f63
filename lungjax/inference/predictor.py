"""A trained network ready to be asked: a run's folder, or a file that `lungjax.export` made of one.

Everything that its input and output mean comes from its own `metadata.Metadata`. Predictions are computed in batches
of a few fixed sizes, so that nothing is compiled again once `warm` has been called.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lungjax.config import metadata, nearest
from lungjax.config.metadata import Metadata
from lungjax.data import preprocess
from lungjax.data.imaging import images as image_files
from lungjax.evaluation import novelty
from lungjax.evaluation.novelty import Familiarity
from lungjax.explain import saliency
from lungjax.inference import api, artifacts
from lungjax.models import folding, outputs
from lungjax.models.inputs import normalize
from lungjax.models.ops import conv
from lungjax.training import workdir as workdirs

Predict = Callable[[np.ndarray], np.ndarray]  # uint8 [B, H, W, C] -> calibrated probabilities float32 [B, classes]
Explain = Callable[[np.ndarray, np.ndarray, str], np.ndarray]  # and classes int32 [B], -1 for the predicted; a method


@dataclass(frozen=True, eq=False)
class Picture:
    """One image as the network gets it."""

    pixels: np.ndarray  # uint8 [H, W, C]
    unlike: float | None = None  # above 1: unlike the training images; None where the model can't tell
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Predictor:
    """One network and what it says of itself; made by `open_model`. Several threads may call it."""

    metadata: Metadata
    source: str  # run, pyz or onnx
    platform: str  # cpu, gpu or tpu
    largest: int  # images at once
    methods: tuple[str, ...]  # of `explain`; () if it can't
    run: Predict
    maps: Explain | None = None

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """The batch sizes that are compiled: powers of two up to the largest."""
        powers = [1]
        while powers[-1] < self.largest:
            powers.append(min(2 * powers[-1], self.largest))
        return tuple(powers)

    @cached_property
    def _lock(self) -> Any:
        return threading.Lock()

    @cached_property
    def _familiar(self) -> Familiarity | None:
        known = self.metadata.familiarity
        return None if known is None else novelty.from_dict(known)

    def predict(self, images: Sequence[Any]) -> np.ndarray:
        """Returns calibrated probabilities float32 [B, classes], as `python -m lungjax.predict` has them.

        Args:
          images: paths of image files (`images.FORMATS`), or arrays as `picture` takes.

        Raises ValueError for an image that can't be read.
        """
        found = [self.picture(_read(image) if isinstance(image, str | Path) else image).pixels for image in images]
        return self(np.stack(found) if found else self.blank()[:0])

    def warm(self) -> None:
        """Compiles every batch size, or reads it from the compilation cache; heat maps only at their first use."""
        for size in self.sizes:
            self(np.repeat(self.blank(), size, axis=0))

    def blank(self) -> np.ndarray:
        """Returns an empty image, uint8 [1, H, W, C]."""
        return np.zeros((1, *self.metadata.input.size, self.metadata.input.channels), np.uint8)

    def picture(self, decoded: Any, box: tuple[float, float, float, float] | None = None) -> Picture:
        """Returns a decoded image as the network's input, and whether it looks like the training images.

        Args:
          decoded: [H, W] or [H, W, 3], uint8 or uint16 as `images.read` gives it, or float32 in 0..255.
          box: xmin, ymin, xmax, ymax of the body in pixels; None finds it, for networks that were trained on it.

        Raises ValueError for a 16-bit image if the model knows no window for it.
        """
        pixels, stored, warnings = preprocess.picture(np.asarray(decoded), self.metadata, box)
        unlike = None if self._familiar is None else self._familiar.unlike(stored)
        if self._familiar is not None and unlike is not None and unlike > 1:
            warnings.append(f"unlike the training images: {self._familiar.why(stored)}")
        return Picture(pixels, unlike, tuple(warnings))

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """Returns calibrated probabilities float32 [B, classes] of uint8 [B, H, W, C] as `picture` makes them.

        Raises ValueError for pixels of another shape or dtype.
        """
        shape = (*self.metadata.input.size, self.metadata.input.channels)
        if pixels.dtype != np.uint8 or pixels.shape[1:] != shape:
            wanted = ", ".join(map(str, shape))
            raise ValueError(f"pixels are {pixels.dtype} {list(pixels.shape)}, wanted uint8 [B, {wanted}]")
        parts = [np.zeros((0, len(self.metadata.classes)), np.float32)]
        for at in range(0, len(pixels), self.largest):
            part = pixels[at : at + self.largest]
            size = next(size for size in self.sizes if size >= len(part))
            filled = (
                np.concatenate([part, np.zeros((size - len(part), *shape), np.uint8)]) if size > len(part) else part
            )
            with self._lock:
                parts.append(self.run(filled)[: len(part)])
        return np.concatenate(parts)

    def explain(self, pixels: np.ndarray, targets: np.ndarray | None = None, method: str = "gradcam") -> Any:
        """Returns heat maps float32 [B, H, W] in 0..1 and calibrated probabilities [B, classes].

        Args:
          pixels: uint8 [B, H, W, C].
          targets: int [B], the class each map is about; None takes the predicted one.
          method: one of `methods`.

        Raises ValueError for another method, and where the model has none.
        """
        if self.maps is None:
            raise ValueError(f"model.{self.source} has no heat maps: give the run's folder or a model.pyz")
        if method not in self.methods:
            raise ValueError(f"method={method!r}: {nearest(method, self.methods)}")
        maps, probabilities = self.maps, self(pixels)
        classes = len(self.metadata.classes)
        chosen = probabilities.argmax(-1) if targets is None else np.asarray(targets)
        if chosen.shape != (len(pixels),) or (len(chosen) and not 0 <= chosen.min() <= chosen.max() < classes):
            raise ValueError(f"targets={chosen.tolist()}: wanted {len(pixels)} numbers from 0 to {classes - 1}")
        made = [np.zeros((0, *self.metadata.input.size), np.float32)]
        for i in range(len(pixels)):  # one at a time: a map costs about a forward pass, and one size compiles once
            with self._lock:
                made.append(maps(pixels[i : i + 1], chosen[i : i + 1].astype(np.int32), method))
        return np.concatenate(made), probabilities


def open_model(path: str | Path) -> Predictor:
    """Returns the predictor of a run's folder, a `model.pyz`, a `model.onnx`, or a folder with one of these.

    Raises ValueError for what is none of them, or a run without model.json.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        for name in ("model.pyz", "model.onnx"):
            if not (place / "config.json").exists() and (place / name).exists():
                return open_model(place / name)
        return _of_run(place)
    if not place.exists():
        raise ValueError(f"--model={path}: no such file or folder")
    if place.suffix == ".pyz":
        program = artifacts.read_pyz(place)

        def explain(pixels: np.ndarray, targets: np.ndarray, method: str) -> np.ndarray:
            return program.gradcam(pixels, targets)[0]

        return Predictor(
            program.metadata,
            "pyz",
            jax.default_backend(),
            _largest(program.metadata),
            ("gradcam",),
            program.predict,
            explain,
        )
    if place.suffix == ".onnx":
        session = artifacts.read_onnx(place)
        return Predictor(session.metadata, "onnx", "cpu", folding.CPU_BATCH, (), session.predict)
    raise ValueError(f"--model={path}: wanted a run's folder, or a model.pyz or model.onnx of lungjax.export")


def _read(path: str | Path) -> np.ndarray:
    try:
        return image_files.read(Path(path).read_bytes())[0]
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: {error}") from None


def _largest(told: Metadata) -> int:
    return folding.batch_size(folding.Config(input=told.input), 1, jax.default_backend())


def load_run(workdir: Path) -> tuple[api.Trained, Metadata]:
    """Returns a finished run's best network and what it says of itself.

    Raises ValueError if there is no trained run, or no model.json of it, which runs of an older lungjax lack.
    """
    trained = api.load(workdir)
    file = workdir / metadata.FILE
    if not file.exists():
        raise ValueError(
            f"{workdir}: no {metadata.FILE} there: the run isn't finished, or is of an older lungjax. "
            f"python -m lungjax.main --mode=evaluate --workdir={workdir} tests it and writes the file"
        )
    told = metadata.read(file)
    data = workdirs.read_data(workdir)
    own = (trained.classes, trained.config.input, trained.step, data.get("fingerprint"))
    if own != (told.classes, told.input, told.about.get("best_step"), told.about.get("fingerprint")):
        raise ValueError(
            f"{file} is not of these weights: python -m lungjax.main --mode=evaluate --workdir={workdir} writes it anew"
        )
    return trained, told


def _of_run(workdir: Path) -> Predictor:
    trained, told = load_run(workdir)
    spec, positive = trained.config.input, told.positive
    network = folding.FoldedModel(trained.module, trained.variables, (*spec.size, spec.network_channels))
    folded = network.fold(trained.variables)

    def forward(folded: dict[str, Any], pixels: jax.Array) -> jax.Array:
        logits, _ = network(folded, normalize(pixels, spec))
        return jax.nn.softmax(outputs.class_logits(logits, positive) / told.temperature)

    compiled = jax.jit(forward, compiler_options=conv.compiler_options(train=False))
    explainer = saliency.Explainer(trained.module, trained.variables, spec, positive)
    # One cell can't be told from another: those methods would show an even gray.
    blind = saliency.CAMS if max(explainer.map_size) == 1 else ()
    return Predictor(
        told,
        "run",
        jax.default_backend(),
        folding.batch_size(trained.config, 1, jax.default_backend()),
        tuple(method for method in saliency.METHODS if method not in blind),
        lambda pixels: np.asarray(compiled(folded, pixels)),
        lambda pixels, targets, method: explainer.maps(pixels, targets, method)[0],
    )
