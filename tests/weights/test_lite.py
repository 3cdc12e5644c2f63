"""Real ImageNet weights: EfficientNet-Lite 0 to 2, from packages of the `test` extra, recognize three photographs.

`lite_logits.npz` has the logits [3, 1000] of each variant, computed with the same checkpoints by their original
network (efficientnet-lite-pytorch 0.1.0, in PyTorch).
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from skimage import data

import lungjax
from lungjax.models.ops import conv
from lungjax.weights import catalogue, download

PHOTOGRAPHS = {"chelsea": 285, "coffee": 967, "camera": 872}  # Egyptian cat, espresso, tripod


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("LUNGJAX_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("LUNGJAX_WEIGHTS_URL", "http://127.0.0.1:9")


def center(image):
    """Returns the largest central square of an image."""
    side = min(image.shape[:2])
    top, left = ((length - side) // 2 for length in image.shape[:2])
    return image[top : top + side, left : left + side]


@pytest.mark.parametrize("lite", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in (1, 2))])
def test_logits_of_photographs(lite):
    net, variables, spec = lungjax.create(f"efficientnet_lite{lite}", weights="imagenet")
    images = lungjax.preprocess([center(getattr(data, name)()) for name in PHOTOGRAPHS], spec)
    assert images.shape == (3, *catalogue.find(f"efficientnet_lite{lite}").input.size, 3)
    run = conv.jit(partial(net.apply, train=False))
    logits = np.asarray(run(variables, images)[0])
    assert dict(zip(PHOTOGRAPHS, logits.argmax(1), strict=True)) == PHOTOGRAPHS
    expected = np.load(Path(__file__).parents[1] / "lite_logits.npz")[str(lite)]
    np.testing.assert_allclose(logits, expected, atol=1e-5 * np.ptp(expected))
    # The gray photograph through one channel is the same image.
    np.testing.assert_array_equal(lungjax.preprocess(center(data.camera()), replace(spec, channels=1))[0], images[2])


def test_checkpoint_of_another_variant():
    path = download.locate(catalogue.find("efficientnet_lite1"))
    for lite in (0, 2):  # variant 0 has fewer blocks, and 2 has other shapes
        with pytest.raises(ValueError, match=r"does not fit(.|\n)*efficientnet_lite1.pypi \(the published checksum\)"):
            lungjax.create(f"efficientnet_lite{lite}", f"file:{path}")
