"""One small network a family gives the logits that its reference gave for the same random weights.

`python -m tests.parity --goldens` wrote the files: the reference's logits, the names and shapes of its tensors and
its running statistics. All other tensors are drawn again here, each from its name, and go through the rules.
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
from lungjax.weights.rules import layouts

GOLDENS = sorted((Path(__file__).parents[1] / "goldens").glob("*.npz"))


def golden(path: Path):
    """Returns the facts, the tensors by the file's names, images and logits."""
    stored = np.load(path)
    facts = json.loads(str(stored["facts"]))
    tensors = {}
    for name, (drawn, shape, turned) in facts["tensors"].items():
        key = f"stat:{name}"
        value = stored[key] if key in stored else draw(drawn, tuple(shape), facts["gain"], facts["shift"])
        tensors[name] = value.transpose(2, 3, 1, 0) if turned else value
    images = np.random.default_rng(facts["side"]).normal(size=(2, facts["side"], facts["side"], 3)).astype(np.float32)
    return facts, tensors, images, stored["logits"]


@pytest.mark.parametrize("path", GOLDENS, ids=lambda p: p.stem)
def test_logits_equal_the_reference(path):
    facts, tensors, images, expected = golden(path)
    module = models.build(ModelConfig(name=facts["model"], **facts["network"]), 1000)
    shapes = models.leaf_shapes(module, images.shape[1:])
    leaves = convert(tensors, layouts(facts["model"])[facts["layout"]], shapes)
    stats = {k: v for k, v in leaves.items() if k.endswith(("/mean", "/var"))}
    params = {k: v for k, v in leaves.items() if k not in stats}
    apply = jax.jit(lambda v, x: module.apply(v, x, train=False)[0], compiler_options=conv.compiler_options())

    def error(params, stats):
        variables = {"params": trees.unflatten(params), "batch_stats": trees.unflatten(stats)}
        return np.abs(np.asarray(apply(variables, images)) - expected).max() / np.ptp(expected, axis=1).min()

    assert error(params, stats) <= 2e-5
    # The test can fail: a norm's scale and offset exchanged, or a bias reversed where there is no norm.
    scales = [k for k in sorted(params) if k.endswith("/scale") and not k.startswith("head/")]
    path = (scales or [k for k in sorted(params) if k.endswith("/bias")])[0]
    other = path.replace("/scale", "/bias")
    wrong = {path: params[other], other: params[path]} if scales else {path: params[path][::-1]}
    assert error({**params, **wrong}, stats) > 1e-3


def test_every_family_with_public_weights_has_one():
    have = {models.family_of(json.loads(str(np.load(path)["facts"]))["model"]) for path in GOLDENS}
    assert have == set(models.FAMILIES) - {"transfusion", "xray_cnn"}
