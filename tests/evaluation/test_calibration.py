import dataclasses

import numpy as np
import pytest
from scipy import optimize
from sklearn import calibration as sk_calibration
from sklearn import metrics as sk

from lungjax.evaluation import calibration, metrics
from lungjax.evaluation.predictions import Predictions


def make(n=4000, sharpness=1.0, c=3, seed=0, logits=True, offset=0.0):
    """Labels drawn from softmax(z); the network says softmax(z * sharpness)."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, c)) * 1.5
    true = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    labels = (rng.random((n, 1)) > true.cumsum(axis=1)).sum(axis=1).clip(0, c - 1)
    said = z * sharpness + offset
    p = np.exp(z * sharpness)
    ids = np.array([f"i{i}" for i in range(n)])
    return Predictions(
        ids, ids, np.full(n, ""), labels, p / p.sum(axis=1, keepdims=True), tuple("abcdefg"[:c]),
        logits=said if logits else None,
    )  # fmt: skip


@pytest.mark.parametrize("logits", [True, False])
@pytest.mark.parametrize("sharpness", [0.5, 1.0, 3.0])
def test_the_temperature_undoes_what_sharpened_the_network(sharpness, logits):
    p = make(sharpness=sharpness, logits=logits, offset=7.0)
    found = calibration.fit_temperature(p)
    assert found == pytest.approx(sharpness, rel=0.08)

    def loss(t):
        q = p.probabilities ** (1 / t)
        return sk.log_loss(p.labels, q / q.sum(axis=1, keepdims=True), labels=range(3))

    assert found == pytest.approx(optimize.brent(loss, brack=(0.2, sharpness, 9)), rel=1e-4)
    mended = calibration.apply_temperature(p, found)
    np.testing.assert_array_equal(mended.predicted, p.predicted)
    before, after = (metrics.summarize(x.labels, x.probabilities, x.classes) for x in (p, mended))
    assert after["loss"] == pytest.approx(loss(found)) and after["loss"] <= before["loss"]
    assert after["ece"] < 0.03 and after["accuracy"] == before["accuracy"]
    if sharpness != 1:
        assert before["ece"] > 0.08 and after["brier"] < before["brier"]


def test_one_sigmoid_logit_is_scaled_too():
    p = make(500, c=2)
    z = np.stack([np.zeros(500), p.logits[:, 1] - p.logits[:, 0]], axis=1)
    found = calibration.apply_temperature(dataclasses.replace(p, logits=z), 2.0)
    np.testing.assert_allclose(found.probabilities[:, 1], 1 / (1 + np.exp(-z[:, 1] / 2)), atol=1e-12)
    np.testing.assert_allclose(found.probabilities, calibration.apply_temperature(p, 2.0).probabilities, atol=1e-12)
    np.testing.assert_array_equal(found.logits, z / 2)


def test_the_ends_of_the_range_and_certainty():
    p = dataclasses.replace(make(50), logits=None)
    right = dataclasses.replace(p, probabilities=0.1 * np.eye(3)[p.labels] + 0.3)
    assert calibration.fit_temperature(right) == calibration.BOUNDS[0]
    wrong = dataclasses.replace(p, probabilities=0.1 * np.eye(3)[(p.labels + 1) % 3] + 0.3)
    assert calibration.fit_temperature(wrong) == calibration.BOUNDS[1]
    # Probabilities of exactly 0 and 1, one of them wrong, are still finite.
    sure = np.eye(3)[np.where(np.arange(50) == 0, (p.labels + 1) % 3, p.labels)]
    found = calibration.apply_temperature(dataclasses.replace(p, probabilities=sure), 5.0)
    assert np.isfinite(found.probabilities).all() and found.logits is None
    none = dataclasses.replace(make(1), **dict.fromkeys(("ids", "groups", "sources"), np.zeros(0, str)),
                               labels=np.zeros(0, int), probabilities=np.zeros((0, 3)), logits=None)  # fmt: skip
    with pytest.raises(ValueError, match="no example to fit"):
        calibration.fit_temperature(none)
    assert len(calibration.apply_temperature(none, 2.0)) == 0 and all(b["n"] == 0 for b in calibration.bins(none))
    for bad in (0, -1, np.nan, np.inf):
        with pytest.raises(ValueError, match="must be above zero"):
            calibration.apply_temperature(p, bad)


def test_the_bins_are_scikit_learns():
    p = make(900, sharpness=2.0)
    found = calibration.bins(p, 10)
    right, top = p.probabilities.argmax(axis=1) == p.labels, p.probabilities.max(axis=1)
    shares, means = sk_calibration.calibration_curve(right, top, n_bins=10)
    full = [b for b in found if b["n"]]
    assert len(found) == 10 and len(full) < 10 and sum(b["n"] for b in found) == 900
    np.testing.assert_allclose([b["accuracy"] for b in full], shares)
    np.testing.assert_allclose([b["confidence"] for b in full], means)
    assert all(b["accuracy"] is b["confidence"] is None for b in found if not b["n"])
    assert all(b["low"] <= b["confidence"] <= b["high"] for b in full)
    ece = sum(b["n"] / 900 * abs(b["accuracy"] - b["confidence"]) for b in calibration.bins(p) if b["n"])
    assert metrics.summarize(p.labels, p.probabilities, p.classes)["ece"] == pytest.approx(ece)


def test_the_summary_fits_on_val_and_tells_of_test():
    val, test = make(600, 3.0, seed=1), make(500, 3.0, seed=2)
    found = calibration.summary(val, test)
    assert found["temperature"] == calibration.fit_temperature(val) != calibration.fit_temperature(test)
    level = metrics.summarize(test.labels, test.probabilities, test.classes)
    assert found["test"] == {name: level[name] for name in ("ece", "brier", "loss")}
    mended = calibration.apply_temperature(test, found["temperature"])
    assert found["test_scaled"]["brier"] == pytest.approx(
        sum(sk.brier_score_loss(test.labels == i, mended.probabilities[:, i]) for i in range(3))
    )
    assert found["bins"] == calibration.bins(test) and found["bins_scaled"] == calibration.bins(mended)
    assert found["fitted_on"] == "val"
