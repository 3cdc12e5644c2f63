"""The zoo from Python: networks by name with their weights, and trained runs. The same path that training uses.

A network of the zoo:

    net, variables, spec = lungjax.create("efficientnetv2_s", weights="imagenet", classes=3)
    logits, features = net.apply(variables, lungjax.preprocess(images, spec), train=False)

A finished run:

    run = lungjax.load("runs/my_run")
    run.predict(images)                # [B, classes] probabilities
    run.features(images)               # [B, F], the last map's mean
"""

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from lungjax import config as configs
from lungjax import datasets, models
from lungjax.config import Config, HeadConfig, InputSpec, ModelConfig, TrainConfig, overrides
from lungjax.data import preprocess as kept
from lungjax.data.imaging import images as image_files
from lungjax.models import folding, outputs, trees
from lungjax.models.inputs import normalize
from lungjax.models.ops import conv
from lungjax.runtime import checkpoint
from lungjax.training import state
from lungjax.training import workdir as workdirs
from lungjax.weights import catalogue
from lungjax.weights import load as loading

Images = Sequence[Any] | np.ndarray | str | Path


def list_models(match: str = "*", weights: bool | None = None) -> list[str]:
    """Returns the names of the networks.

    Args:
      match: shell pattern such as "efficientnet*".
      weights: True for those with public ImageNet weights, False for those without.
    """
    names = fnmatch.filter(models.MODELS, match)
    return [name for name in names if weights is None or bool(catalogue.records(name)) == weights]


def create(
    name: str,
    weights: str = "imagenet",
    classes: int | None = None,
    *,
    size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    gray: str = "repeat",
    head: HeadConfig | None = None,
    noncommercial: bool = False,
    weights_dir: str | Path | None = None,
    seed: int = 0,
    **fields: Any,
) -> tuple[nn.Module, dict[str, Any], InputSpec]:
    """Returns a network, its variables and the input that it wants.

    Args:
      name: one of `list_models()`.
      weights: as `model.weights`: "imagenet", a record of `python -m lungjax.weights --list`, "file:PATH",
        "run:WORKDIR", "none".
      classes: outputs of a new classifier; None keeps the weights' own, a run's whole head (without weights: 1000).
      size: height and width of the images; None takes the weights' own.
      channels: of the images, 1 or 3; None takes 3, or those of a run.
      gray: how one channel meets weights for three: "repeat", "fold" or "slice" (`model.gray`).
      head: another head than the published one.
      noncommercial: accept weights whose licence forbids commercial use.
      weights_dir: where downloaded files lie; looked at first.
      seed: of what starts at random or is drawn.
      **fields: further fields of `lungjax.config.ModelConfig`, such as padding or dtype.

    The network maps float32 images [B, H, W, C], as `preprocess` makes them, to (logits [B, classes], features),
    where features["last"] is the map [B, h, w, c] before the head.

    Raises ValueError for an unknown name or source, a missing or foreign file, too small a size, a class count
    that does not fit; nothing half loaded is returned.
    """
    options = dict(fields, gray=gray, noncommercial=noncommercial)
    model = ModelConfig(name=name, weights=weights, head=head or HeadConfig(), **options)
    models.family_of(name)  # an unknown name before anything else
    source = loading.parse(model)
    wanted = InputSpec(size=(224, 224), channels=3)
    own_classes = 1000
    if source.record:
        wanted, own_classes = source.record.input, source.record.classes
    elif source.run:
        old = overrides.from_json((source.run / "config.json").read_text())
        wanted, own_classes = old.input, len(workdirs.read_data(source.run)["classes"])
        if classes is None and head is None:
            model = replace(model, head=old.model.head)
    sides = (size, size) if isinstance(size, int) else size
    channels = wanted.channels if channels is None else channels
    spec = replace(wanted, size=sides or wanted.size, channels=channels, mean=None, std=None)
    config = Config(model=model, input=spec, train=TrainConfig(seed=seed))
    configs.check(config)
    config = loading.resolve(config)
    module = models.build(config.model, own_classes if classes is None else classes)
    least = module.minimum_size()
    if any(have < need for have, need in zip(spec.size, least, strict=True)):
        raise ValueError(f"size={spec.size} is too small for {name}: it takes {least} (height, width) or more")
    start = loading.leaves(config, module, Path(weights_dir) if weights_dir else None, keep_head=classes is None)
    return module, fill(module, config.input, start, seed), config.input


def fill(module: nn.Module, spec: InputSpec, start: dict[str, np.ndarray], seed: int) -> dict[str, Any]:
    """Returns variables with the leaves of `start`, which is emptied on the way; only what is missing is drawn."""
    shape = (*spec.size, spec.network_channels)
    wanted = models.leaf_shapes(module, shape)
    leaves = {path: jnp.asarray(start.pop(path)) for path in list(start)}  # so that each is held once
    if len(leaves) < len(wanted):

        @jax.jit
        def missing() -> dict[str, jax.Array]:  # the compiler leaves out what is not returned
            drawn = state.init(module, shape, seed)
            flat = trees.flatten(drawn["params"]) | trees.flatten(drawn["batch_stats"])
            return {path: leaf for path, leaf in flat.items() if path not in leaves}

        leaves |= missing()
    running = {path for path in leaves if path.endswith(("/mean", "/var"))}
    return {
        "params": trees.unflatten({path: leaves[path] for path in wanted if path not in running}),
        "batch_stats": trees.unflatten({path: leaves[path] for path in wanted if path in running}),
    }


def preprocess(images: Images, spec: InputSpec, boxes: Sequence[Any] | None = None) -> np.ndarray:
    """Returns float32 [B, H, W, C] for the network: cut, resized and normalised as `spec` says.

    Args:
      images: one or several, each a file's path or an array [H, W] or [H, W, 3] of uint8, or float in 0..255.
      spec: of `create`, or `load(...).config.input`.
      boxes: xmin, ymin, xmax, ymax of each image, where `spec.crop` is "box"; None takes whole images.

    Raises ValueError for an image that can't be read, or of another kind.
    """
    return np.asarray(normalize(jnp.asarray(read(images, spec, boxes)), spec))


def read(
    images: Images, spec: InputSpec, boxes: Sequence[Any] | None = None, trained_on: datasets.DatasetName | None = None
) -> np.ndarray:
    """As `preprocess`, without the normalisation: uint8 [B, H, W, channels].

    Each image first becomes what the data set `trained_on` keeps of it: its stage (lungs alone, ...) and size.
    """
    # An array with few columns is one image with its channels last, not a stack of narrow gray ones.
    alone = isinstance(images, np.ndarray) and (images.ndim == 2 or (images.ndim == 3 and images.shape[-1] <= 4))
    if alone or isinstance(images, str | Path):
        images = [images]
    if not len(images):
        raise ValueError("no image was given")
    if boxes is not None and len(boxes) != len(images):
        raise ValueError(f"{len(images)} images with {len(boxes)} boxes; give one box an image")
    found = []
    for number, image in enumerate(images):
        array = _pixels(image, f"image {number}")
        if spec.channels == 1 and array.ndim == 3:
            array = np.rint(array).astype(np.uint8)  # colours become gray as in the pipeline, which has 8 bits
        box = None if boxes is None else boxes[number]
        stage, size = (trained_on.stage, trained_on.size) if trained_on else ("", None)
        array, place, _ = kept.keep(array, box, stage, size)
        found.append(image_files.to_input(array, place, spec, 0.0))
    return np.stack(found)


def _pixels(image: Any, what: str) -> np.ndarray:
    """Returns a file's or an array's pixels, [H, W] or [H, W, 3], uint8 or float32 in 0..255."""
    if isinstance(image, str | Path):
        try:
            return image_files.decode(Path(image).read_bytes(), None)
        except (ValueError, OSError) as error:
            raise ValueError(f"{image}: {error}") from None
    array = np.asarray(image)
    array = array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] != 3) or not array.size:
        raise ValueError(f"{what}: shape {np.shape(image)}; allowed are [H, W], [H, W, 1] and [H, W, 3]")
    if array.dtype == np.uint8:
        return array
    least, most = (array.min(), array.max()) if array.dtype.kind == "f" else (-1, -1)
    if not (least >= 0 and most <= 255) or 0 < most <= 1:
        found = f"{array.dtype}" + (f" from {least:g} to {most:g}" if array.dtype.kind == "f" else "")
        raise ValueError(f"{what}: {found}; allowed are uint8, and float in 0..255")
    return array.astype(np.float32)


def load(workdir: str | Path) -> "Trained":
    """Returns a run's best network. Raises ValueError if there is no trained run in `workdir`."""
    path = Path(workdir)
    if checkpoint.newest(path, "best") is None:
        raise ValueError(f"{path}: no trained run there (no weights in checkpoints/best)")
    config = overrides.from_json((path / "config.json").read_text(), str(path / "config.json"))
    classes = tuple(workdirs.read_data(path)["classes"])
    variables, step_number = checkpoint.restore_best(path)
    variables = {"params": variables["params"], "batch_stats": variables.get("batch_stats") or {}}
    variables = jax.tree.map(jnp.asarray, variables)  # to the device once, not with every call
    return Trained(config, classes, models.build(config.model, len(classes)), variables, step_number)


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained network with everything that its input and output mean."""

    config: Config
    classes: tuple[str, ...]  # in the order of the probabilities
    module: nn.Module
    variables: dict[str, Any]
    step: int  # at which validation was best

    def predict(self, images: Images, boxes: Sequence[Any] | None = None) -> np.ndarray:
        """Returns the probability of each class, float32 [B, classes]; `images` and `boxes` as in `preprocess`.

        As the network has them, so not calibrated, and of whole images without `boxes`; `lungjax.open_model` answers as
        the commands do.
        """
        return self._run(images, boxes)[0]

    def features(self, images: Images, boxes: Sequence[Any] | None = None, pool: bool = True) -> np.ndarray:
        """Returns the mean of the last map, float32 [B, F]; with `pool` False the map itself, [B, h, w, F]."""
        maps = self._run(images, boxes)[1].astype(np.float32)
        return maps.mean((1, 2)) if pool else maps

    def _run(self, images: Images, boxes: Sequence[Any] | None) -> tuple[np.ndarray, np.ndarray]:
        pixels = read(images, self.config.input, boxes, datasets.resolve(self.config.data.dataset)[0])
        parts, size = [], min(folding.batch_size(self.config, 1, jax.default_backend()), len(pixels))
        for at in range(0, len(pixels), size):
            part = pixels[at : at + size]
            filled = np.concatenate([part, np.zeros((size - len(part), *part.shape[1:]), np.uint8)])
            parts.append([np.asarray(x)[: len(part)] for x in self._compiled(self._folded, filled)])
        probabilities, maps = zip(*parts, strict=True)
        return np.concatenate(probabilities), np.concatenate(maps)

    @cached_property
    def _network(self) -> folding.FoldedModel:
        shape = (*self.config.input.size, self.config.input.network_channels)
        return folding.FoldedModel(self.module, self.variables, shape)

    @cached_property
    def _folded(self) -> dict[str, Any]:
        return self._network.fold(self.variables)

    @cached_property
    def _compiled(self) -> Any:
        positive = outputs.positive_class(self.config, self.classes)

        def run(folded: dict[str, Any], pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
            logits, features = self._network(folded, normalize(pixels, self.config.input))
            return outputs.probabilities(logits, positive), features["last"]

        return jax.jit(run, compiler_options=conv.compiler_options(train=False))
