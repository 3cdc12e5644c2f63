"""Creates networks by name, with pretrained weights and preprocessing: `create`, `list_models`, `preprocess`.

net, variables, spec = lungjax.create("efficientnetv2_s", weights="imagenet", classes=3)
logits, features = net.apply(variables, lungjax.preprocess(images, spec), train=False)
"""

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from lungjax import config as configs
from lungjax import models
from lungjax.config import Config, HeadConfig, InputSpec, ModelConfig, TrainConfig, metadata, overrides
from lungjax.data import preprocess as preprocessing
from lungjax.data.imaging import images as image_files
from lungjax.models import trees
from lungjax.models.inputs import normalize
from lungjax.weights import catalogue
from lungjax.weights import load as loading

Images = Sequence[Any] | np.ndarray | str | Path
Boxes = Sequence[Any] | None


def list_models(match: str = "*", weights: bool | None = None) -> list[str]:
    """Returns the names of the networks.

    `match` is a pattern like "efficientnet*"; `weights` selects those with (True) or without (False) ImageNet weights.
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
    """Returns a network, its variables and its input specification, built as for training.

    Args:
      name: one of `list_models()`.
      weights: as in `model.weights`: "imagenet", a record of `python -m lungjax.weights --list`, "file:PATH",
        "run:WORKDIR", "none".
      classes: number of outputs of a new classifier; None keeps the classifier of the weights, or the complete head
        of a run (1000 classes without weights).
      size: height and width of the images; None takes the size of the weights.
      channels: channels of the images, 1 or 3; None takes those of the weights or run, otherwise 3.
      gray: how grayscale input is adapted to three-channel weights: "repeat", "fold" or "slice" (`model.gray`).
      head: replaces the published head.
      noncommercial: accept weights whose license forbids commercial use.
      weights_dir: folder of downloaded files, which is searched first.
      seed: seed of randomly initialized layers.
      **fields: further fields of `lungjax.config.ModelConfig`, such as padding or dtype.

    The network maps float32 images [B, H, W, C] from `preprocess` to (logits [B, classes], features);
    features["last"] is the map [B, h, w, c] before the head.

    Raises ValueError for an unknown name or source, an incompatible file, a size below the minimum, or wrong `classes`.
    """
    options = dict(fields, gray=gray, noncommercial=noncommercial)
    model = ModelConfig(name=name, weights=weights, head=head or HeadConfig(), **options)
    models.family_of(name)  # reports an unknown name first
    source = loading.parse(model)
    base, own_classes = InputSpec(size=(224, 224), channels=3), 1000
    if source.record:
        base, own_classes = source.record.input, source.record.classes
        if not own_classes and classes is None:
            raise ValueError(f"{source.record.name}: the file has no classifier; set classes")
    elif source.run:
        old = overrides.read(source.run / "config.json")
        base, own_classes = old.input, len(metadata.read_data(source.run)["classes"])
        if classes is None and head is None:
            model = replace(model, head=old.model.head)
    sides = (size, size) if isinstance(size, int) else size
    channels = base.channels if channels is None else channels
    spec = replace(base, size=sides or base.size, channels=channels, mean=None, std=None)
    config = Config(model=model, input=spec, train=TrainConfig(seed=seed))
    configs.check(config)
    config = loading.resolve(config)
    module = models.build(config.model, own_classes if classes is None else classes)
    minimum = module.minimum_size()
    if any(side < least for side, least in zip(spec.size, minimum, strict=True)):
        raise ValueError(f"size={spec.size} is too small for {name}: at least {minimum} (height, width)")
    start = loading.leaves(config, module, Path(weights_dir) if weights_dir else None, keep_head=classes is None)
    return module, _complete(module, config.input, start, seed), config.input


def _complete(module: nn.Module, spec: InputSpec, start: dict[str, np.ndarray], seed: int) -> dict[str, Any]:
    """Returns variables with the leaves of `start`, which is emptied, and newly initialized leaves for the rest."""

    def initialize() -> dict[str, jax.Array]:
        image_shape = (*spec.size, spec.network_channels)
        return trees.flatten(models.random_variables(module, image_shape, jax.random.key(seed)))

    names = {path.partition("/")[2]: path for path in jax.eval_shape(initialize)}  # without the collection
    leaves = {names[path]: jnp.asarray(start.pop(path)) for path in list(start)}  # in memory once
    missing = set(names.values()) - leaves.keys()
    if missing:  # the compiler removes what is not returned
        leaves |= jax.jit(lambda: {path: leaf for path, leaf in initialize().items() if path in missing})()
    return {"batch_stats": {}} | trees.unflatten(leaves)


def preprocess(images: Images, spec: InputSpec, boxes: Boxes = None) -> np.ndarray:
    """Crops, resizes and normalizes images for a network; returns float32 [B, H, W, C].

    Args:
      images: one or several images, each a path or an array [H, W] or [H, W, 3] of uint8, uint16 or float in 0..255.
      spec: input specification from `create`.
      boxes: xmin, ymin, xmax, ymax of each image, used if `spec.crop` is "box"; None takes complete images.

    Raises ValueError for an image that can't be read or has an unsupported shape or type.
    """
    pixels = []
    for array, box in read_images(images, boxes):
        preprocessing.check_window(array, None)
        place = image_files.full_region(array) if box is None else box
        pixels.append(image_files.to_input(array, np.asarray(place, np.float32), spec, 0.0))
    return np.asarray(normalize(jnp.asarray(np.stack(pixels)), spec))


def read_images(images: Images, boxes: Boxes = None) -> Iterator[tuple[np.ndarray, Any]]:
    """Yields each image, uint8 or uint16 [H, W] or [H, W, 3] (floats are rounded), and its box. Raises ValueError."""
    # An array with few columns is one image with the channels last, not a stack of narrow grayscale images.
    single = isinstance(images, np.ndarray) and (images.ndim == 2 or (images.ndim == 3 and images.shape[-1] <= 4))
    if single or isinstance(images, str | Path):
        images = [images]
    if not len(images):
        raise ValueError("no images given")
    if boxes is not None and len(boxes) != len(images):
        raise ValueError(f"{len(images)} images but {len(boxes)} boxes; give one box per image")
    for number, image in enumerate(images):
        yield _read(image, f"image {number}"), None if boxes is None else boxes[number]


def _read(image: Any, name: str) -> np.ndarray:
    if isinstance(image, str | Path):
        try:
            return image_files.read(image_files.file_bytes(image))[0]
        except (ValueError, OSError) as error:
            raise ValueError(f"{image}: {error}") from None
    array = np.asarray(image)
    array = array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] != 3) or not array.size:
        raise ValueError(f"{name}: shape {np.shape(image)}; expected [H, W], [H, W, 1] or [H, W, 3]")
    if array.dtype == np.uint8 or (array.dtype == np.uint16 and array.ndim == 2):
        return array
    low, high = (array.min(), array.max()) if array.dtype.kind == "f" else (-1, -1)
    if not (low >= 0 and high <= 255) or 0 < high <= 1:
        values = f"{array.dtype}" + (f" from {low:g} to {high:g}" if array.dtype.kind == "f" else "")
        raise ValueError(f"{name}: {values}; expected uint8, uint16 [H, W], or float in 0..255")
    return np.rint(array).astype(np.uint8)
