"""Logits equal to keras.applications with the same random weights and running statistics.

Needs the extra `parity` and its own command, `pytest tests/parity`. With `--write-goldens` as an argument to
`python tests/parity/test_keras.py` it also renews what the ordinary tests compare with.
"""

import os

os.environ["KERAS_BACKEND"] = "jax"  # before keras is imported: the reference needs no TensorFlow

import sys
from pathlib import Path

import jax
import keras
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from random_weights import random_images, random_variables, settled

from lungjax import models
from lungjax.config import ModelConfig
from lungjax.trees import flatten

GOLDENS = Path(__file__).parents[1] / "goldens"
CASES = {  # ours: (Keras's, image height, width). Odd and even maps, so that the padding shows.
    "efficientnetv2_b0": ("EfficientNetV2B0", 107, 96),
    "efficientnetv2_b3": ("EfficientNetV2B3", 96, 107),
    "efficientnetv2_s": ("EfficientNetV2S", 96, 107),
}
NORM = {"scale": "gamma", "bias": "beta", "mean": "moving_mean", "var": "moving_variance"}


def keras_name(path: str) -> str:
    """Ours "params/block4a/se/reduce/kernel" is Keras's "block4a_se_reduce/kernel"."""
    *layer, leaf = path.split("/")[1:]
    name = "_".join(layer).replace("_dwconv", "_dwconv2").replace("head_dense", "predictions")
    return f"{name}/{NORM[leaf] if name.endswith('bn') else leaf}"


def reference(name: str, variables: dict) -> keras.Model:
    constructor, height, width = CASES[name]
    model = getattr(keras.applications, constructor)(
        weights=None, input_shape=(height, width, 3), include_preprocessing=False, classifier_activation=None
    )
    theirs = {v.path: v for v in model.weights}
    ours = flatten(variables)
    assert {keras_name(path) for path in ours} == set(theirs)
    for path, value in ours.items():
        target = theirs[keras_name(path)]
        target.assign(value.swapaxes(2, 3) if "dwconv" in path else value)
    return model


def both(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns our logits and Keras's."""
    shape = (*CASES[name][1:], 3)
    module = models.build(ModelConfig(name=name), 1000)
    images = random_images(shape)
    variables = settled(module, random_variables(module, shape), images, decay=0.9)
    logits, _ = jax.jit(lambda v, x: module.apply(v, x, train=False))(variables, images)
    return np.asarray(logits), reference(name, variables).predict(images, verbose=0)


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_keras(name):
    logits, expected = both(name)
    # The range of what differs between the two images, so that a network that looks away can't pass. Sums of
    # float32 in another order give up to 3e-5 of it through the depth of S.
    assert np.abs(logits - expected).max() <= 1e-4 * np.ptp(expected[0] - expected[1])


if __name__ == "__main__":
    assert sys.argv[1:] == ["--write-goldens"], __doc__
    np.savez_compressed(GOLDENS / "efficientnetv2_b0.npz", logits=both("efficientnetv2_b0")[1])
