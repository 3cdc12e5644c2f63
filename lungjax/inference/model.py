"""Applies a trained model to images; `load` opens a run folder, a `model.pyz` or a `model.onnx`.

    model = lungjax.load("runs/my_run")
    model.predict(["a.png"])           # calibrated probabilities [1, classes]
    model.features(["a.png"])          # [1, F]

Preprocessing, classes, calibration and operating points come from the model's `metadata.Metadata`. Batches have a few
fixed sizes, so nothing is recompiled after `warm`.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from lungjax import models
from lungjax.config import Config, metadata, overrides
from lungjax.config.metadata import Metadata
from lungjax.data.batching import pad_batch
from lungjax.explain import saliency
from lungjax.inference import api, artifacts
from lungjax.inference.api import Boxes, Images
from lungjax.inference.artifacts import Preprocessor
from lungjax.models import outputs
from lungjax.models.batch_norm_folding import FoldedModel
from lungjax.models.inputs import CPU_BATCH, normalize, prediction_batch_size
from lungjax.models.ops import conv
from lungjax.runtime import checkpoint

Forward = Callable[[np.ndarray], dict[str, Any]]  # uint8 [B, H, W, C] -> artifacts.OUTPUTS
Saliency = Callable[[np.ndarray, np.ndarray, str], np.ndarray]  # pixels, classes int32 [B], method -> [B, H, W]


@dataclass(frozen=True, eq=False)
class Network:
    """The best network of a run."""

    config: Config
    classes: tuple[str, ...]  # in label order
    module: nn.Module
    variables: dict[str, Any]  # params and batch_stats
    step: int  # of the checkpoint


@dataclass(frozen=True, eq=False)
class Model:
    """A trained model, opened by `load`. It may be called from several threads.

    `predict`, `logits`, `features` and `explain` take one or several images, each the path of an image file or an array
    [H, W] or [H, W, 3] (uint8, uint16, or float in 0..255). `boxes` are xmin, ymin, xmax, ymax of each image in pixels;
    by default, the body is located if the model was trained on body crops. These methods raise ValueError for an image
    that can't be read or has another shape or type.
    """

    metadata: Metadata
    format: str  # run, pyz or onnx
    batch_size: int  # largest batch
    methods: tuple[str, ...]  # of `explain`, the default first; empty if the file has no saliency maps
    forward: Forward
    saliency: Saliency | None = None
    network: Network | None = None  # of a run
    lock: Any = field(default_factory=threading.Lock, repr=False)

    def predict(self, images: Images, boxes: Boxes = None) -> np.ndarray:
        """Returns calibrated probabilities float32 [B, classes], equal to those of `python -m lungjax.predict`."""
        return self.outputs(self._pixels(images, boxes))["probabilities"]

    def logits(self, images: Images, boxes: Boxes = None) -> np.ndarray:
        """Returns uncalibrated logits float32 [B, classes]; for a sigmoid output, the other logit is zero."""
        return self.outputs(self._pixels(images, boxes))["logits"]

    def features(self, images: Images, boxes: Boxes = None) -> np.ndarray:
        """Returns the spatial mean of the last feature map, float32 [B, F]."""
        return self.outputs(self._pixels(images, boxes))["features"]

    def explain(
        self, images: Images, targets: Sequence[int] | None = None, method: str | None = None, boxes: Boxes = None
    ) -> np.ndarray:
        """Returns saliency maps float32 [B, H, W] in 0..1 over the network's input.

        `targets` are class numbers, one per image; None selects the predicted classes. `method` is one of `methods`,
        by default the first.
        """
        self.check_method(method)
        pixels = self._pixels(images, boxes)
        labels = self.outputs(pixels)["probabilities"].argmax(-1) if targets is None else np.asarray(targets)
        return self.maps(pixels, labels, method)

    @cached_property
    def batch_sizes(self) -> tuple[int, ...]:
        """The compiled batch sizes: powers of two up to the largest."""
        powers = [2**n for n in range(self.batch_size.bit_length()) if 2**n < self.batch_size]
        return (*powers, self.batch_size)

    def warm(self) -> None:
        """Compiles every batch size, or loads it from the compilation cache; saliency maps compile on first use."""
        for size in self.batch_sizes:
            self.outputs(np.zeros((size, *artifacts.image_shape(self.metadata)), np.uint8))

    @cached_property
    def prepare(self) -> Preprocessor:
        """Turns a decoded image into network input: prepare(image, box=None) -> `artifacts.Input`."""
        return Preprocessor(self.metadata)

    def outputs(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        """Returns `probabilities` (calibrated), `logits` [B, classes] and `features` [B, F] of prepared pixels.

        Raises ValueError for pixels other than uint8 [B, H, W, C] of the input size.
        """
        shape = artifacts.image_shape(self.metadata)
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1:] != shape:
            expected = ", ".join(map(str, shape))
            raise ValueError(f"pixels are {pixels.dtype} {list(pixels.shape)}, expected uint8 [B, {expected}]")
        batches = []
        for at in range(0, max(len(pixels), 1), self.batch_size):
            batch = pixels[at : at + self.batch_size]
            size = next(size for size in self.batch_sizes if size >= len(batch))
            with self.lock:
                results = self.forward(pad_batch(batch, size))
            batches.append({name: np.asarray(array)[: len(batch)] for name, array in results.items()})
        return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}

    def maps(self, pixels: np.ndarray, targets: np.ndarray, method: str | None = None) -> np.ndarray:
        """Returns saliency maps, float32 [B, H, W], for prepared pixels and the class numbers `targets` [B].

        Raises ValueError for an unknown method or class, and for a format without saliency maps.
        """
        method = self.check_method(method)
        classes = len(self.metadata.classes)
        if targets.shape != (len(pixels),) or (len(targets) and not 0 <= targets.min() <= targets.max() < classes):
            raise ValueError(f"targets={targets.tolist()}: expected {len(pixels)} class indices in 0..{classes - 1}")
        assert self.saliency is not None
        maps = [np.zeros((0, *self.metadata.input.size), np.float32)]
        for i in range(len(pixels)):  # one at a time: a map takes about a forward pass, and one size compiles once
            with self.lock:
                maps.append(self.saliency(pixels[i : i + 1], targets[i : i + 1].astype(np.int32), method))
        return np.concatenate(maps)

    def check_method(self, method: str | None) -> str:
        """Returns `method`, or the first of `methods` for None. Raises ValueError unless it is one of them."""
        if not self.methods:
            raise ValueError(f"model.{self.format} has no saliency maps; use the run folder")
        method = method or self.methods[0]
        saliency.check_method(method, self.methods)
        return method

    def _pixels(self, images: Images, boxes: Boxes) -> np.ndarray:
        return np.stack([self.prepare(array, box).pixels for array, box in api.read_images(images, boxes)])


def load(path: str | Path) -> Model:
    """Opens a run, a `model.pyz`, a `model.onnx`, or a folder with one of them. Raises ValueError for anything else."""
    place = Path(path).expanduser()
    if place.is_dir() and not (place / "config.json").exists():
        place = next((place / name for name in ("model.pyz", "model.onnx") if (place / name).exists()), place)
    if place.is_dir():
        return _load_run(place)
    if not place.exists():
        raise ValueError(f"{path}: no such file or folder")
    if place.suffix == ".pyz":
        program = artifacts.read_pyz(place)
        size = prediction_batch_size(Config(input=program.metadata.input), 1, jax.default_backend())
        methods = ("gradcam",) if "gradcam" in program.programs else ()
        return Model(
            program.metadata, "pyz", size, methods, program.outputs,
            lambda pixels, targets, _: program.gradcam(pixels, targets),
        )  # fmt: skip
    if place.suffix == ".onnx":
        session = artifacts.read_onnx(place)
        return Model(session.metadata, "onnx", CPU_BATCH, (), session.outputs)
    raise ValueError(f"{path}: not a model; give a run folder, or a model.pyz or model.onnx from lungjax.export")


def load_finished(workdir: Path) -> tuple[Network, Metadata]:
    """Returns the best network of a finished run and its model.json. Raises ValueError unless both exist and agree."""
    if checkpoint.newest(workdir, "best") is None:
        raise ValueError(f"{workdir}: no trained run (no weights in checkpoints/best)")
    file = workdir / metadata.FILE
    command = f"python -m lungjax.main --mode=evaluate --workdir={workdir}"
    if not file.exists():
        raise ValueError(f"{workdir}: no {metadata.FILE}, so the run is not finished; complete it with `{command}`")
    description, data = metadata.read(file), metadata.read_data(workdir)
    config = overrides.read(workdir / "config.json")
    about = description.about
    described = (description.classes, description.input, about.get("fingerprint"))
    mismatch = f"{file} does not match the weights in checkpoints/best; rewrite it with `{command}`"
    if described != (tuple(data["classes"]), config.input, data["fingerprint"]):
        raise ValueError(mismatch)
    module = models.build(config.model, len(description.classes))
    image_shape = (*config.input.size, config.input.network_channels)
    variables, step = checkpoint.restore_best(workdir, models.abstract_variables(module, image_shape))
    if step != about.get("best_step"):
        raise ValueError(mismatch)
    variables = {"params": variables["params"], "batch_stats": variables.get("batch_stats") or {}}
    variables = jax.tree.map(jnp.asarray, variables)  # transferred to the device once, not per call
    return Network(config, description.classes, module, variables, step), description


def named_outputs(logits: jax.Array, last: jax.Array, metadata: Metadata) -> dict[str, jax.Array]:
    """Computes `artifacts.OUTPUTS` from the logits [B, outputs] and the last map [B, h, w, F] of a network."""
    probabilities = outputs.probabilities(logits, metadata.positive, metadata.temperature)
    scores = outputs.class_logits(logits, metadata.positive)
    return {"probabilities": probabilities, "logits": scores, "features": last.astype(jnp.float32).mean((1, 2))}


def _load_run(workdir: Path) -> Model:
    network, description = load_finished(workdir)
    spec = network.config.input
    folded = FoldedModel(network.module, network.variables, (*spec.size, spec.network_channels))
    variables = folded.fold(network.variables)

    def forward(variables: dict[str, Any], pixels: jax.Array) -> dict[str, jax.Array]:
        logits, features = folded(variables, normalize(pixels, spec))
        return named_outputs(logits, features["last"], description)

    compiled = jax.jit(forward, compiler_options=conv.compiler_options(train=False))
    explainer = saliency.Explainer(network.module, network.variables, spec, description.positive)
    size = prediction_batch_size(network.config, 1, jax.default_backend())
    return Model(
        description, "run", size, explainer.methods, lambda pixels: compiled(variables, pixels),
        lambda pixels, targets, method: explainer.maps(pixels, targets, method)[0], network,
    )  # fmt: skip
