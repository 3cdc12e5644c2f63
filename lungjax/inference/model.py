"""Applies a trained model to images; `load` opens a run folder, a `model.pyz` or a `model.onnx`, or several of them.

    model = lungjax.load("runs/my_run")
    model.predict(["a.png"])           # calibrated probabilities [1, classes]
    model.features(["a.png"])          # [1, F]
    lungjax.load(["runs/a", "runs/b"]) # an ensemble, which averages calibrated probabilities

Preprocessing, classes, calibration and operating points come from the model's `metadata.Metadata`. Batches have a few
fixed sizes, so nothing is recompiled after `warm`.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
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
from lungjax.explain.saliency import TITLES
from lungjax.inference import api, artifacts, ensembles
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
    format: str  # run, pyz, onnx or ensemble
    batch_size: int  # largest batch
    methods: tuple[str, ...]  # of `explain`, the default first; empty if the file has no saliency maps
    forward: Forward
    saliency: Saliency | None = None
    describe: Callable[[str], str] = TITLES.__getitem__  # a saliency method -> its title and feature map
    network: Network | None = None  # of a run
    lock: Any = field(default_factory=threading.Lock, repr=False)

    def predict(self, images: Images, boxes: Boxes = None) -> np.ndarray:
        """Returns calibrated probabilities float32 [B, classes], equal to those of `python -m lungjax.predict`."""
        return self.outputs(self._pixels(images, boxes))["probabilities"]

    def logits(self, images: Images, boxes: Boxes = None) -> np.ndarray:
        """Returns uncalibrated logits float32 [B, classes]; for a sigmoid output, the other logit is zero.

        Those of an ensemble are the logarithms (of findings, the log odds) of the mean uncalibrated probabilities.
        """
        return self.outputs(self._pixels(images, boxes))["logits"]

    def features(self, images: Images, boxes: Boxes = None) -> np.ndarray:
        """Returns the spatial mean of the last feature map, float32 [B, F]; an ensemble joins those of its members."""
        return self.outputs(self._pixels(images, boxes))["features"]

    def explain(
        self, images: Images, targets: Sequence[int] | None = None, method: str | None = None, boxes: Boxes = None
    ) -> np.ndarray:
        """Returns saliency maps float32 [B, H, W] in 0..1 over the network's input.

        `targets` are class numbers, one per image; None selects the predicted class (the most probable finding) of each
        image. `method` is one of `methods`, by default the first.
        """
        self.check_method(method)
        pixels = self._pixels(images, boxes)
        if targets is None:
            return self.explain_pixels(pixels, None, method)[0]
        return self.maps(pixels, np.asarray(targets), method)

    def explain_pixels(
        self, pixels: np.ndarray, targets: Sequence[int] | int | None = None, method: str | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns maps and probabilities of prepared pixels; `targets` as in `explain`, or one class for all images."""
        probabilities = self.outputs(pixels)["probabilities"]
        labels = probabilities.argmax(-1) if targets is None else np.asarray(targets)
        labels = np.full(len(pixels), labels) if labels.ndim == 0 else labels
        return self.maps(pixels, labels, method), probabilities

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

        Raises ValueError for pixels other than uint8 [B, *`artifacts.image_shape`].
        """
        shape = artifacts.image_shape(self.metadata)
        if pixels.dtype != np.uint8 or pixels.shape[1:] != shape:
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
            if self.metadata.members:
                raise ValueError("this ensemble has no saliency maps, since a member has none or shows another region")
            raise ValueError(f"model.{self.format} has no saliency maps; use the run folder")
        method = method or self.methods[0]
        saliency.check_method(method, self.methods)
        return method

    def _pixels(self, images: Images, boxes: Boxes) -> np.ndarray:
        return np.stack([self.prepare(array, box).pixels for array, box in api.read_images(images, boxes)])


def load(path: str | Path | Sequence[str | Path]) -> Model:
    """Opens a run, a `model.pyz`, a `model.onnx`, a folder with one of them, or an ensemble of several.

    Several paths, or a folder of runs such as that of `--folds`, are an ensemble. Raises ValueError for anything else,
    and for members with different classes.
    """
    places = ensembles.find(path)
    models = [_load_one(place) for place in places]
    return _ensemble(places, models) if len(models) > 1 else models[0]


def _load_one(place: Path) -> Model:
    if place.is_dir():
        return _load_run(place)
    if not place.exists():
        raise ValueError(f"{place}: no such file or folder")
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
    raise ValueError(f"{place}: not a model; give a run folder, or a model.pyz or model.onnx from lungjax.export")


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


def mean_outputs(members: Sequence[Mapping[str, Any]], metadata: Metadata) -> dict[str, jax.Array]:
    """Returns the `artifacts.OUTPUTS` of an ensemble from those of its members; see `ensemble.mean`."""
    tiny, scores = np.finfo(np.float32).tiny, jnp.stack([jnp.asarray(each["logits"]) for each in members])
    if metadata.multilabel:
        present, absent = (jnp.maximum(jax.nn.sigmoid(sign * scores).mean(0), tiny) for sign in (1, -1))
        logits = jnp.log(present) - jnp.log(absent)
    else:
        logits = jnp.log(jnp.maximum(jax.nn.softmax(scores).mean(0), tiny))
    return {
        "probabilities": jnp.stack([jnp.asarray(each["probabilities"]) for each in members]).mean(0),
        "logits": logits,
        "features": jnp.concatenate([jnp.asarray(each["features"]) for each in members], axis=-1),
    }


def mean_maps(maps: Sequence[Any], size: tuple[int, int]) -> jax.Array:
    """Returns the mean of the maps [B, H, W] of the members, each resized to `size`."""
    resized = [jax.vmap(lambda one: jax.image.resize(one, size, "linear"))(jnp.asarray(each)) for each in maps]
    return jnp.stack(resized).mean(0)


def _ensemble(places: Sequence[Path], members: Sequence[Model]) -> Model:
    description = ensembles.describe(places, [member.metadata for member in members])

    def forward(pixels: np.ndarray) -> dict[str, Any]:
        parts = artifacts.member_pixels(description, pixels)
        each = [member.forward(part) for member, part in zip(members, parts, strict=True)]
        return mean_outputs(each, description)

    def maps(pixels: np.ndarray, targets: np.ndarray, method: str) -> np.ndarray:
        parts = artifacts.member_pixels(description, pixels)
        each = [m.saliency(part, targets, method) for m, part in zip(members, parts, strict=True) if m.saliency]
        return np.asarray(mean_maps(each, description.input.size))

    shared = [method for method in members[0].methods if all(method in member.methods for member in members)]
    methods = tuple(shared) if ensembles.same_region(description) else ()
    size = min(member.batch_size for member in members)
    titles = {method: f"{TITLES[method]}, mean over {len(members)} networks" for method in methods}
    return Model(description, "ensemble", size, methods, forward, maps, titles.__getitem__)


def _load_run(workdir: Path) -> Model:
    network, description = load_finished(workdir)
    spec = network.config.input
    folded = FoldedModel(network.module, network.variables, (*spec.size, spec.network_channels))
    variables, predictor = folded.fold(network.variables), outputs.with_tta(folded, description.tta)

    def forward(variables: dict[str, Any], pixels: jax.Array) -> dict[str, jax.Array]:
        logits, features = predictor(variables, normalize(pixels, spec))
        return named_outputs(logits, features["last"], description)

    compiled = conv.jit(forward, train=False)
    explainer = saliency.Explainer(network.module, network.variables, spec, description.positive, tta=description.tta)
    size = prediction_batch_size(network.config, 1, jax.default_backend())
    return Model(
        description, "run", size, explainer.methods, lambda pixels: compiled(variables, pixels),
        lambda pixels, targets, method: explainer.maps(pixels, targets, method)[0], explainer.describe, network,
    )  # fmt: skip
