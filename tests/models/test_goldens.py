"""Logits of one small network per family, checked against its reference, for the same random weights.

`python -m tests.parity.goldens` wrote the files, which have the logits and running statistics of the reference and the
names and shapes of its tensors. The other tensors are drawn again here, each from its name, and converted by the rules.
"""

import contextlib
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from random_weights import draw

from lungjax import models
from lungjax.config import ModelConfig
from lungjax.models import trees
from lungjax.models.ops import conv
from lungjax.weights.convert import convert
from lungjax.weights.name_rules import layouts

GOLDENS = sorted((Path(__file__).parents[1] / "goldens").glob("*.npz"))


def golden(path: Path):
    """Returns the facts, the tensors by their name in the file, the images and the logits."""
    stored = np.load(path)
    facts = json.loads(str(stored["facts"]))
    tensors = {}
    for name, (seed_name, shape, transposed) in facts["tensors"].items():
        key = f"stat:{name}"
        value = stored[key] if key in stored else draw(seed_name, tuple(shape), facts["gain"], facts["shift"])
        tensors[name] = value.transpose(2, 3, 1, 0) if transposed else value
    images = np.random.default_rng(facts["side"]).normal(size=(2, facts["side"], facts["side"], 3)).astype(np.float32)
    return facts, tensors, images, stored["logits"]


@pytest.mark.parametrize("plain", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["plain", "cpu"])
@pytest.mark.parametrize("path", GOLDENS, ids=lambda p: p.stem)
def test_logits_against_the_reference(path, plain):
    facts, tensors, images, expected = golden(path)
    module = models.build(ModelConfig(name=facts["model"], **facts["network"]), 1000)
    shapes = models.leaf_shapes(module, images.shape[1:])
    leaves = convert(tensors, layouts(facts["model"])[facts["layout"]], shapes)
    stats = {k: v for k, v in leaves.items() if k.endswith(("/mean", "/var"))}
    params = {k: v for k, v in leaves.items() if k not in stats}
    options = None if plain else conv.compiler_options()
    apply = jax.jit(lambda v, x: module.apply(v, x, train=False)[0], compiler_options=options)

    def error(params):
        variables = {"params": trees.unflatten(params), "batch_stats": trees.unflatten(stats)}
        with conv.plain_forms() if plain else contextlib.nullcontext():
            return np.abs(np.asarray(apply(variables, images)) - expected).max() / np.ptp(expected, axis=1).min()

    assert error(params) <= 2e-5
    # Control: scale and offset of a norm exchanged, or a bias reversed if the network has no norm.
    scales = [k for k in sorted(params) if k.endswith("/scale") and not k.startswith("head/")]
    one = (scales or [k for k in sorted(params) if k.endswith("/bias")])[0]
    other = one.replace("/scale", "/bias")
    wrong = {one: params[other], other: params[one]} if scales else {one: params[one][::-1]}
    assert error(params | wrong) > 1e-3


def test_families_of_the_goldens():
    families = {models.family_of(json.loads(str(np.load(path)["facts"]))["model"]) for path in GOLDENS}
    assert families == set(models.FAMILIES) - {"transfusion", "xray_cnn"}
