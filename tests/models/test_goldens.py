"""Logits of one small network per family, checked against its reference, for the same random weights.

`python -m tests.parity.goldens` wrote the files, which have the logits and running statistics of the reference and the
names and shapes of its tensors. The other tensors are drawn again here, each from its name, and converted by the rules.
"""

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


def check(path: Path, jit):
    facts, tensors, images, expected = golden(path)
    module = models.build(ModelConfig(name=facts["model"], **facts["network"]), 1000)
    shapes = models.leaf_shapes(module, images.shape[1:])
    leaves = convert(tensors, layouts(facts["model"])[facts["layout"]], shapes)
    stats = {k: v for k, v in leaves.items() if k.endswith(("/mean", "/var"))}
    params = {k: v for k, v in leaves.items() if k not in stats}
    apply = jit(lambda v, x: module.apply(v, x, train=False)[0])

    def error(params, stats):
        variables = {"params": trees.unflatten(params), "batch_stats": trees.unflatten(stats)}
        return np.abs(np.asarray(apply(variables, images)) - expected).max() / np.ptp(expected, axis=1).min()

    assert error(params, stats) <= 2e-5
    # Control: scale and offset of a norm exchanged, or a bias reversed if the network has no norm.
    scales = [k for k in sorted(params) if k.endswith("/scale") and not k.startswith("head/")]
    path = (scales or [k for k in sorted(params) if k.endswith("/bias")])[0]
    other = path.replace("/scale", "/bias")
    wrong = {path: params[other], other: params[path]} if scales else {path: params[path][::-1]}
    assert error({**params, **wrong}, stats) > 1e-3


@pytest.mark.parametrize("path", GOLDENS, ids=lambda p: p.stem)
def test_logits_against_the_reference(path):
    with conv.plain_forms():
        check(path, jax.jit)


@pytest.mark.slow
@pytest.mark.parametrize("path", GOLDENS, ids=lambda p: p.stem)
def test_logits_of_the_cpu_forms_against_the_reference(path):
    check(path, lambda function: jax.jit(function, compiler_options=conv.compiler_options()))


def test_families_of_the_goldens():
    families = {models.family_of(json.loads(str(np.load(path)["facts"]))["model"]) for path in GOLDENS}
    assert families == set(models.FAMILIES) - {"transfusion", "xray_cnn"}
