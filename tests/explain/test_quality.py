"""Checks of saliency maps (pointing game, deletion curve and sanity check) and their synthetic slices."""

import numpy as np
from conftest import small_bn
from random_weights import random_variables
from scipy import stats

from lungjax import datasets
from lungjax.config import InputSpec
from lungjax.datasets.phantom import slices
from lungjax.explain import quality
from lungjax.explain.saliency import Explainer

SIDE = 16
SPEC = InputSpec(size=(SIDE, SIDE), channels=3, mean=(0.2, 0.3, 0.4), std=(0.5, 0.4, 0.3))


def test_pointing_game_by_hand():
    masks = np.zeros((4, 10, 10), bool)
    masks[:, 2:4, 2:4] = True
    maps = np.zeros((4, 10, 10))
    maps[0, 3, 3] = 1  # on the lesion
    maps[1, 3, 6] = 1  # three pixels away
    maps[2, 2, 2] = maps[2, 9, 9] = 1  # a tie; the last map is empty
    np.testing.assert_array_equal(quality.hits(maps, masks), [1, 0, 0.5, 0])
    left = np.broadcast_to(np.arange(20) < 8, (400, 20, 20))
    random = quality.hits(quality.random_maps(400, (20, 20), (20, 20), 0), left)
    assert abs(random.mean() - 0.4) < 0.08


class FirstCell:
    """A fake `Explainer`: the probability of class 0 is the mean of the first 4 x 4 pixels."""

    def probabilities(self, images):
        p = images[:, :4, :4].mean((1, 2, 3)) / 255
        return np.stack([p, 1 - p], axis=1)


def test_deletion_curve_by_hand(monkeypatch):
    monkeypatch.setattr(quality, "DELETIONS", 16)  # a sixteenth at a time
    images = np.zeros((1, SIDE, SIDE, 3), np.uint8)
    images[:, :4, :4] = 255
    right = np.zeros((1, SIDE, SIDE))
    right[:, :4, :4] = 1
    fill = round(255 / 16) / 255
    curve = quality.deletion(FirstCell(), images, right, np.zeros(1, int))
    np.testing.assert_allclose(curve[0, :3], [1, fill, fill])
    wrong = quality.deletion(FirstCell(), images, 1 - right, np.zeros(1, int))
    np.testing.assert_allclose(wrong[0, [0, 15, 16]], [1, 1, fill])
    assert curve.mean() < wrong.mean()


def test_rank_correlation_against_scipy():
    a, b = np.random.default_rng(1).integers(0, 5, (2, 3, 6, 6)).astype(float)
    expected = [stats.spearmanr(x.ravel(), y.ravel()).statistic for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(quality.rank_correlation(a, b), expected)
    assert quality.rank_correlation(a, 0 * b).tolist() == [0, 0, 0]


class Brightness(Explainer):
    """A fake `Explainer` whose maps are the brightness of the image, for any weights."""

    def maps(self, images, targets=None, method="gradcam"):
        return images.mean(-1).astype(np.float32) / 255, None

    def with_variables(self, variables):
        return self


def test_sanity_check_of_gradcam_and_of_brightness():
    module = small_bn()(outputs=3, padding="same")
    variables = random_variables(module, (SIDE, SIDE, 3))
    images = np.random.default_rng(2).integers(0, 256, (8, SIDE, SIDE, 3), dtype=np.uint8)
    good = quality.sanity(Explainer(module, variables, SPEC), images, "gradcam")
    bad = quality.sanity(Brightness(module, variables, SPEC), images, "gradcam")
    assert good["passed"] and not bad["passed"]
    assert [stage["correlation"] for stage in bad["stages"]] == [1.0] * len(bad["stages"])
    assert [stage["shuffled"] for stage in good["stages"]] == ["the head", "all weights"]


def test_masks_of_synthetic_slices_against_images():
    classes, name = slices.CLASSES[::-1], datasets.resolve("phantom_ct")[0]
    plain, boxed = InputSpec(size=(96, 96), channels=1), InputSpec(size=(64, 48), channels=1, crop="box")
    full, cropped = (quality.draw_slices(classes, spec, name, 2) for spec in (plain, boxed))
    assert [classes[i] for i in full.labels] == [c for c in slices.CLASSES if c != "Normal"]
    assert full.images.shape == (2, 96, 96, 1) and cropped.lesions.shape == (2, 64, 48)

    def center(mask):
        return np.asarray([axis.mean() + 0.5 for axis in np.nonzero(mask)])

    for i in range(2):
        patient = slices.new_patient(quality.FIRST_SEED + i, classes[full.labels[i]])
        level = np.random.default_rng([patient.seed, 30]).permutation(quality.LEVELS)[0]
        phantom = slices.draw_slice(patient, slices.levels(patient, quality.LEVELS)[level])
        left, top, right, bottom = phantom.box
        box = (cropped, (top, left), (bottom - top, right - left))
        for drawn, start, extent in ((full, (0, 0), phantom.lesion.shape), box):
            place = center(drawn.lesions[i]) / drawn.lesions[i].shape
            np.testing.assert_allclose(place, (center(phantom.lesion) - start) / np.asarray(extent), atol=0.01)
        assert (cropped.lesions[i] & ~cropped.lungs[i]).mean() < 0.005
