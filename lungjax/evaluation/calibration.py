"""Calibration: reliability bins, slope and intercept, and temperature scaling.

Temperature scaling (Guo et al., arXiv 1706.04599) divides all logits by a temperature T, fitted on the validation
split. T above 1 makes probabilities less extreme. The predicted class of an example does not change; thresholds and,
with more than two classes, the AUC of a class do. Reports, predictions_SPLIT.csv, `predict`, the service and the
exports all use the probabilities softmax(logits / T).

The slope and the intercept of each class are those of the logistic regression of "is of the class" on the log odds of
its probability (Cox, Biometrika 45:562, 1958). Perfect calibration has slope 1 and intercept 0; a slope below 1 means
probabilities that are too extreme. With two classes, both have the same slope, and intercepts of opposite sign.
"""

from dataclasses import replace
from typing import Any

import numpy as np
from scipy import optimize, sparse, special

from lungjax.evaluation import bootstrap, metrics
from lungjax.evaluation.predictions import Predictions

BOUNDS = (0.05, 20.0)  # of the temperature; without misclassified examples the optimum is zero
SCORES = ("ece", "brier", "loss")
POINTS = 500  # of the logistic regressions of a bootstrap
NEWTON_STEPS = 6


def fit_temperature(predictions: Predictions) -> float:
    """Returns the temperature, within BOUNDS, that minimizes the mean cross-entropy of the predictions.

    Without logits, log probabilities are used. Raises ValueError if there are no examples or probabilities are invalid.
    """
    p = predictions
    if not len(p):
        raise ValueError("no examples to fit a temperature to")
    logits, rows = _logits(p), np.arange(len(p))

    def loss(log_temperature: float) -> float:
        scaled = logits / np.exp(log_temperature)
        return float((special.logsumexp(scaled, axis=1) - scaled[rows, p.labels]).mean())

    # Convex in 1 / T, so unimodal in log T.
    minimum = optimize.minimize_scalar(loss, bounds=np.log(BOUNDS), method="bounded", options={"xatol": 1e-6})
    ends = {loss(np.log(t)): t for t in BOUNDS}  # the search does not reach them
    return float(np.exp(minimum.x)) if minimum.fun <= min(ends) else ends[min(ends)]


def apply_temperature(predictions: Predictions, temperature: float) -> Predictions:
    """Returns predictions with softmax(logits / temperature), float32 as in `inference`; 1 is uncalibrated.

    The logits remain unscaled. Raises ValueError for invalid probabilities.
    """
    logits = _logits(predictions) / temperature
    probabilities = special.softmax(logits, axis=1) if len(logits) else logits
    return replace(predictions, probabilities=probabilities.astype(np.float32))


def bins(predictions: Predictions) -> list[dict[str, Any]]:
    """Returns the `metrics.BINS` bins of a reliability diagram, of equal width over the highest probability.

    Each is {low, high, n, confidence, accuracy}: the edges (the upper one is included), the number of examples, their
    mean highest probability and their accuracy. The last two are None in an empty bin.
    """
    p = predictions
    top = np.asarray(p.probabilities, dtype=np.float64).max(axis=1, initial=0)
    place = metrics.confidence_bins(top)
    count = metrics.BINS
    sums = [np.bincount(place, x, count) for x in (np.ones(len(p)), top, p.predicted == p.labels)]
    result: list[dict[str, Any]] = []
    for i, (n, *totals) in enumerate(zip(*sums, strict=True)):
        confidence, accuracy = (float(total / n) if n else None for total in totals)
        edges = {"low": i / count, "high": (i + 1) / count}
        result.append({**edges, "n": int(n), "confidence": confidence, "accuracy": accuracy})
    return result


def recalibration(predictions: Predictions, draws: int = 2000) -> dict[str, dict[str, Any]]:
    """Returns {slope, intercept, intervals} by class.

    Slope and intercept are None without overlap between the log odds of the class and of the others, where the slope is
    infinite. `intervals`, {name: (low, high)}, are from a bootstrap over patients, and are missing unless
    `bootstrap.MIN_PATIENTS` have the class, and as many do not.
    """
    p = np.maximum(np.asarray(predictions.probabilities, np.float64), np.finfo(np.float32).tiny)
    keys, member = np.unique(metrics.patient_keys(predictions), return_inverse=True)
    result: dict[str, dict[str, Any]] = {}
    for i, name in enumerate(predictions.classes):
        positive, odds = predictions.labels == i, np.log(p[:, i]) - np.log(np.delete(p, i, axis=1).sum(axis=1))
        result[name] = {"slope": None, "intercept": None, "intervals": {}}
        fit = _logistic(positive, odds)
        if fit is None:
            continue
        values = dict(zip(("intercept", "slope"), fit.tolist(), strict=True))
        enough = min(len(np.unique(member[side])) for side in (positive, ~positive)) >= bootstrap.MIN_PATIENTS
        samples = _resample(fit, positive, odds, member, len(keys), draws if enough else 0)
        ends = {key: bootstrap.interval(own, values[key]) for key, own in zip(values, samples, strict=True)}
        result[name] = {**values, "intervals": {key: pair for key, pair in ends.items() if pair}}
    return result


def summary(test: Predictions, temperature: float | None, draws: int = 2000) -> dict[str, Any]:
    """Returns `calibration` of the report for calibrated predictions with logits; README.md lists the keys.

    `temperature` is that of `test`, None if the folds have their own. Raises ValueError for invalid probabilities.
    """
    result: dict[str, Any] = {"temperature": temperature, "fitted_on": "val"}
    for kind, p in (("uncalibrated", apply_temperature(test, 1.0)), ("calibrated", test)):
        level = metrics.summarize(p)
        result[kind] = {key: level[key] for key in SCORES} | {"bins": bins(p), "per_class": recalibration(p, draws)}
    return result


def _logistic(positive: np.ndarray, x: np.ndarray) -> np.ndarray | None:
    """Returns intercept and slope of the logistic regression of `positive` on `x` [N]; None if it has no optimum."""
    if positive.all() or not positive.any():
        return None
    if x[positive].min() >= x[~positive].max() or x[~positive].min() >= x[positive].max():
        return None

    def loss(beta: np.ndarray) -> tuple[float, np.ndarray]:
        z = beta[0] + beta[1] * x
        error = special.expit(z) - positive
        return float((np.logaddexp(0, z) - positive * z).mean()), np.array([error.mean(), (error * x).mean()])

    return optimize.minimize(loss, np.zeros(2), jac=True, method="BFGS", options={"gtol": 1e-9}).x


def _resample(
    fit: np.ndarray, positive: np.ndarray, x: np.ndarray, member: np.ndarray, patients: int, draws: int
) -> np.ndarray:
    """Returns intercepts and slopes [2, draws], by Newton's method from `fit`; `member` [N] is each example's patient.

    More than POINTS examples are grouped by rank of `x`, with the mean of the group.
    """
    size = min(POINTS, len(x))
    group = np.argsort(np.argsort(x, kind="stable")) * size // len(x)
    x = (np.bincount(group, x) / np.bincount(group))[:, None]
    of_class, every = (
        sparse.csr_matrix((weights, (group, member)), (size, patients))
        for weights in (1.0 * positive, np.ones(len(member)))
    )
    samples = [np.zeros((2, 0))]
    for counts in bootstrap.resample_patients(patients, draws, 256):
        k, n = of_class @ counts, every @ counts  # [size, draws]
        a, b = np.broadcast_to(fit[:, None], (2, counts.shape[1]))
        with np.errstate(invalid="ignore", divide="ignore"):
            for _ in range(NEWTON_STEPS):
                q = special.expit(a + b * x)
                error, weight = n * q - k, n * q * (1 - q)
                g0, g1 = error.sum(axis=0), (error * x).sum(axis=0)
                h00, h01, h11 = ((weight * power).sum(axis=0) for power in (1, x, x**2))
                scale = h00 * h11 - h01**2
                a, b = a - (h11 * g0 - h01 * g1) / scale, b - (h00 * g1 - h01 * g0) / scale
        samples.append(np.stack([a, b]))
    return np.concatenate(samples, axis=1)


def _logits(p: Predictions) -> np.ndarray:
    """Returns the logits, float64 [N, C], or the log probabilities if they are unknown."""
    metrics.check_probabilities(p)
    if p.logits is not None:
        return np.asarray(p.logits, dtype=np.float64)
    return np.log(np.maximum(np.asarray(p.probabilities, dtype=np.float64), np.finfo(np.float32).tiny))
