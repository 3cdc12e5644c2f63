"""Calibration: reliability bins, and temperature scaling.

Temperature scaling (Guo et al., arXiv 1706.04599) divides all logits by a temperature T, fitted on the validation
split. T above 1 makes probabilities less extreme. The predicted class does not change.
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
    """Returns float64 predictions at a temperature. Raises ValueError for invalid temperatures or probabilities."""
    if not (temperature > 0 and np.isfinite(temperature)):
        raise ValueError(f"temperature={temperature}: must be above zero")
    logits = _logits(predictions) / temperature
    return replace(
        predictions,
        probabilities=special.softmax(logits, axis=1) if len(logits) else logits,
        logits=None if predictions.logits is None else logits,
    )


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


def summary(val: Predictions, test: Predictions) -> dict[str, Any]:
    """Returns `calibration` of the report: the temperature from val, and SCORES and bins of test before and after it.

    `report.write` lists the keys. Raises ValueError if val has no examples or probabilities are invalid.
    """
    temperature = fit_temperature(val)
    result: dict[str, Any] = {"temperature": temperature, "fitted_on": "val"}
    for suffix, p in (("", test), ("_scaled", apply_temperature(test, temperature))):
        level = metrics.summarize(p)
        result |= {f"test{suffix}": {key: level[key] for key in SCORES}, f"bins{suffix}": bins(p)}
    return result


def _logits(p: Predictions) -> np.ndarray:
    """Returns logits, float64 [N, C], for the probabilities."""
    metrics.check_probabilities(p)
    if p.logits is not None:
        return np.asarray(p.logits, dtype=np.float64)
    return np.log(np.maximum(np.asarray(p.probabilities, dtype=np.float64), np.finfo(np.float32).tiny))
