"""Calibration: reliability bins, and temperature scaling.

Temperature scaling (Guo et al., arXiv 1706.04599) divides all logits by a temperature T, fitted on the validation
split. T above 1 makes probabilities less extreme. The predicted class of an example does not change; thresholds and,
with more than two classes, the AUC of a class do. Reports, predictions_SPLIT.csv, `predict`, the service and the
exports all use the probabilities softmax(logits / T).
"""

from dataclasses import replace
from typing import Any

import numpy as np
from scipy import optimize, special

from lungjax.evaluation import metrics
from lungjax.evaluation.predictions import Predictions

BOUNDS = (0.05, 20.0)  # of the temperature; without misclassified examples the optimum is zero
SCORES = ("ece", "brier", "loss")


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


def summary(test: Predictions, temperature: float | None) -> dict[str, Any]:
    """Returns `calibration` of the report for calibrated predictions with logits; README.md lists the keys.

    `temperature` is that of `test`, None if the folds have their own. Raises ValueError for invalid probabilities.
    """
    result: dict[str, Any] = {"temperature": temperature, "fitted_on": "val"}
    for kind, p in (("uncalibrated", apply_temperature(test, 1.0)), ("calibrated", test)):
        level = metrics.summarize(p)
        result[kind] = {key: level[key] for key in SCORES} | {"bins": bins(p)}
    return result


def _logits(p: Predictions) -> np.ndarray:
    """Returns the logits, float64 [N, C], or the log probabilities if they are unknown."""
    metrics.check_probabilities(p)
    if p.logits is not None:
        return np.asarray(p.logits, dtype=np.float64)
    return np.log(np.maximum(np.asarray(p.probabilities, dtype=np.float64), np.finfo(np.float32).tiny))
