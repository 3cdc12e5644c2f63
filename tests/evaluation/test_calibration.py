"""Calibration against scikit-learn and SciPy."""

import numpy as np
import pytest
from random_predictions import make_predictions, random_predictions
from scipy import optimize, special
from sklearn import calibration as sk_calibration
from sklearn import metrics as sk
from sklearn.linear_model import LogisticRegression

from lungjax.evaluation import bootstrap, calibration, metrics


def make(n=4000, sharpness=1.0, c=3, seed=0, logits=True):
    """Returns predictions softmax(z * sharpness) with labels drawn from softmax(z)."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, c)) * 1.5
    true = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    labels = (rng.random((n, 1)) > true.cumsum(axis=1)).sum(axis=1).clip(0, c - 1)
    return make_predictions(labels, np.exp(z * sharpness), logits=z * sharpness + 7.0 if logits else None)


def test_temperature_against_sharpening():
    for sharpness, logits in ((0.5, True), (1.0, False), (3.0, True), (3.0, False)):
        p = make(sharpness=sharpness, logits=logits)
        temperature = calibration.fit_temperature(p)

        def loss(t, p=p):
            q = p.probabilities ** (1 / t)
            return sk.log_loss(p.labels, q / q.sum(axis=1, keepdims=True), labels=range(3))

        assert temperature == pytest.approx(sharpness, rel=0.08)
        assert temperature == pytest.approx(optimize.brent(loss, brack=(0.2, sharpness, 9)), rel=1e-4)
        scaled = calibration.apply_temperature(p, temperature)
        np.testing.assert_array_equal(scaled.predicted, p.predicted)
        before, after = metrics.summarize(p), metrics.summarize(scaled)
        assert after["loss"] == pytest.approx(loss(temperature)) and after["ece"] < 0.03
        if sharpness != 1:
            assert before["ece"] > 0.08 and after["brier"] < before["brier"]


def test_bounds_and_certain_predictions():
    labels = make(50).labels
    for shift, bound in enumerate(calibration.BOUNDS):  # all correct, all wrong
        p = make_predictions(labels, 0.1 * np.eye(3)[(labels + shift) % 3] + 0.3)
        assert calibration.fit_temperature(p) == bound
    # Probabilities of exactly 0 and 1, one of them wrong, remain finite.
    certain = make_predictions(labels, np.eye(3)[np.where(np.arange(50) == 0, (labels + 1) % 3, labels)])
    assert np.isfinite(calibration.apply_temperature(certain, 5.0).probabilities).all()
    none = make_predictions([], np.zeros((0, 3)))
    with pytest.raises(ValueError, match="no examples"):
        calibration.fit_temperature(none)
    assert len(calibration.apply_temperature(none, 2.0)) == 0 and all(b["n"] == 0 for b in calibration.bins(none))


def test_bins_against_scikit_learn():
    p = make(900, 2.0)
    bins = calibration.bins(p)
    right, top = p.predicted == p.labels, p.probabilities.max(axis=1)
    shares, means = sk_calibration.calibration_curve(right, top, n_bins=15)
    full = [b for b in bins if b["n"]]
    assert len(bins) == 15 and len(full) < 15 and sum(b["n"] for b in bins) == 900
    np.testing.assert_allclose([b["accuracy"] for b in full], shares)
    np.testing.assert_allclose([b["confidence"] for b in full], means)
    assert all(b["accuracy"] is b["confidence"] is None for b in bins if not b["n"])
    assert all(b["low"] <= b["confidence"] <= b["high"] for b in full)
    ece = sum(b["n"] / 900 * abs(b["accuracy"] - b["confidence"]) for b in bins if b["n"])
    assert metrics.summarize(p)["ece"] == pytest.approx(ece)


def test_summary_of_val_and_test():
    val, test = make(600, 3.0, seed=1), make(500, 3.0, seed=2)
    temperature = calibration.fit_temperature(val)
    scaled = calibration.apply_temperature(test, temperature)
    np.testing.assert_array_equal(scaled.logits, test.logits)
    summary = calibration.summary(scaled, temperature)
    assert summary["temperature"] == temperature and summary["fitted_on"] == "val"
    for kind, p in (("uncalibrated", test), ("calibrated", scaled)):
        brier = sum(sk.brier_score_loss(test.labels == i, p.probabilities[:, i]) for i in range(3))
        assert summary[kind]["brier"] == pytest.approx(brier, abs=1e-6)
        assert summary[kind]["loss"] == pytest.approx(sk.log_loss(p.labels, p.probabilities), abs=1e-6)
    assert summary["calibrated"]["bins"] == calibration.bins(scaled) != summary["uncalibrated"]["bins"]


def regression(p, i, weights=None):
    """Returns calibration-in-the-large of class i by a root search, and the slope by scikit-learn."""
    odds = np.log(p.probabilities[:, i] / (1 - p.probabilities[:, i]))[:, None]
    fit = LogisticRegression(C=np.inf, solver="newton-cholesky", tol=1e-9).fit(odds, p.labels == i, weights)
    n = np.ones(len(p)) if weights is None else weights
    difference = lambda a: n @ (special.expit(a + odds[:, 0]) - (p.labels == i))  # noqa: E731
    return optimize.brentq(difference, -30, 30), fit.coef_[0, 0]


def test_recalibration_against_scikit_learn():
    for p in (random_predictions(400, 90, seed=1), make(900, 3.0, c=2)):
        result = calibration.recalibration(p, draws=40)
        keys, member = np.unique(metrics.patient_keys(p), return_inverse=True)
        for i, name in enumerate(p.classes):
            own = result[name]
            assert [own["intercept"], own["slope"]] == pytest.approx(regression(p, i), abs=1e-5)
            draws = [regression(p, i, w[member]) for w in next(bootstrap.resample_patients(len(keys), 40, 40)).T]
            ends = np.percentile(draws, [2.5, 97.5], axis=0).T
            np.testing.assert_allclose([own["intervals"][key] for key in ("intercept", "slope")], ends, atol=4e-3)
    slope, intercept = ([result[name][key] for name in "ab"] for key in ("slope", "intercept"))
    assert slope == pytest.approx([1 / 3, 1 / 3], abs=0.06) and slope[0] == pytest.approx(slope[1], abs=1e-5)
    assert intercept[0] == pytest.approx(-intercept[1], abs=1e-5)


def test_recalibration_without_optimum():
    """Separated classes, a class with few patients, probabilities of exactly 0 and 1, one class and no examples."""
    scores = np.linspace(0.1, 0.9, 40)
    separated = make_predictions(scores < 0.5, np.stack([scores, 1 - scores], axis=1))
    none = {"slope": None, "intercept": None, "intervals": {}}
    few_draws = random_predictions(60, 20, seed=3, spread=3.5)  # some draws separate a class, so its slope has no limit
    assert "slope" not in calibration.recalibration(few_draws)["a"]["intervals"]
    assert np.isfinite(calibration.recalibration(few_draws)["a"]["intervals"]["intercept"]).all()
    tied = np.where(np.arange(40) < 22, np.minimum(scores, scores[18]), scores)  # both classes at one value
    tied = make_predictions(np.arange(40) < 20, np.stack([tied, 1 - tied], axis=1))
    for p in (separated, tied):
        assert all(
            own["slope"] is None and "slope" not in own["intervals"] for own in calibration.recalibration(p).values()
        )
    assert calibration.recalibration(make_predictions([0, 0], np.full((2, 2), 0.5)))["a"] == none
    assert calibration.recalibration(make_predictions([], np.zeros((0, 2))))["a"] == none
    few = make_predictions(np.arange(40) % 10 == 0, np.stack([scores, 1 - scores], axis=1))
    assert calibration.recalibration(few)["b"]["slope"] is not None
    assert calibration.recalibration(few)["b"]["intervals"] == {}
    certain = make_predictions(np.arange(40) % 2, np.eye(2)[np.arange(40) // 3 % 2])
    odds = np.log(np.finfo(np.float32).tiny)  # two groups: the fit is their log odds
    own = calibration.recalibration(certain)["a"]
    ends = [np.mean(certain.labels[certain.probabilities[:, 0] == value] == 0) for value in (1, 0)]
    logits = [np.log(q / (1 - q)) for q in ends]
    assert own["slope"] == pytest.approx((logits[0] - logits[1]) / (-2 * odds), abs=1e-6)
