"""Whether a probability of 0.8 means eight of ten: reliability, and one temperature that mends the most of it.

Temperature scaling (Guo et al., arXiv 1706.04599) divides all logits by one number T that is fitted on the validation
split: above 1 it makes a network less sure of itself, below 1 surer. The predicted class stays what it was. ECE and
Brier score are defined in `lungjax.evaluation.metrics`.
"""

from dataclasses import replace
from typing import Any

import numpy as np
from scipy import optimize, special

from lungjax.evaluation import metrics
from lungjax.evaluation.predictions import Predictions

BOUNDS = (0.05, 20.0)  # of the temperature; a split without mistakes would want zero
SCORES = ("ece", "brier", "loss")


def fit_temperature(predictions: Predictions) -> float:
    """Returns the temperature, within BOUNDS, at which the predictions' mean cross-entropy is smallest.

    From the logits where they are known, and from the logarithms of the probabilities otherwise, which are the logits
    but for a constant of each example (and where a probability is zero). Raises ValueError without any example, or for
    probabilities that are none.
    """
    p = predictions
    if not len(p):
        raise ValueError("there is no example to fit a temperature on")
    logits, rows = _logits(p), np.arange(len(p))

    def loss(log_temperature: float) -> float:
        scaled = logits / np.exp(log_temperature)
        return float((special.logsumexp(scaled, axis=1) - scaled[rows, p.labels]).mean())

    # Convex in 1 / T, so with one minimum along log T too.
    found = optimize.minimize_scalar(loss, bounds=np.log(BOUNDS), method="bounded", options={"xatol": 1e-6})
    ends = {loss(np.log(t)): t for t in BOUNDS}  # which the search comes near to and does not reach
    return float(np.exp(found.x)) if found.fun <= min(ends) else ends[min(ends)]


def apply_temperature(predictions: Predictions, temperature: float) -> Predictions:
    """Returns the predictions with their logits divided by the temperature, in float64, probabilities to match.

    Raises ValueError for a temperature that is not above zero, or probabilities that are none.
    """
    if not (temperature > 0 and np.isfinite(temperature)):
        raise ValueError(f"temperature={temperature}: must be above zero")
    logits = _logits(predictions) / temperature
    return replace(
        predictions,
        probabilities=special.softmax(logits, axis=1) if len(logits) else logits,
        logits=None if predictions.logits is None else logits,
    )


def bins(predictions: Predictions, count: int = metrics.BINS) -> list[dict[str, Any]]:
    """Returns the reliability diagram's bins of the highest probability, `count` of equal width from 0 to 1.

    Each is {low, high, n, confidence, accuracy}: its edges (the upper one belongs to it), its examples, their mean
    highest probability and the share of right ones, both None in an empty bin.
    """
    p = predictions
    probabilities = np.asarray(p.probabilities, dtype=np.float64)
    top = probabilities.max(axis=1, initial=0)
    right = p.predicted == p.labels
    place = metrics.confidence_bins(top, count)
    n = np.bincount(place, minlength=count)
    confidence, hits = (np.bincount(place, weights=x, minlength=count) for x in (top, right))
    return [
        {
            "low": i / count,
            "high": (i + 1) / count,
            "n": int(n[i]),
            "confidence": float(confidence[i] / n[i]) if n[i] else None,
            "accuracy": float(hits[i] / n[i]) if n[i] else None,
        }
        for i in range(count)
    ]


def summary(val: Predictions, test: Predictions) -> dict[str, Any]:
    """Returns `calibration` of the report: a temperature fitted on val, and what it does to the test split.

    Keys: `temperature`, `fitted_on`, `test` and `test_scaled` with `ece`, `brier` and `loss` each, `bins` and
    `bins_scaled` of the test split. Raises as `fit_temperature`.
    """
    temperature = fit_temperature(val)
    after = apply_temperature(test, temperature)
    levels = {
        name: metrics.summarize(p.labels, p.probabilities, p.classes, p.ids)
        for name, p in (("test", test), ("test_scaled", after))
    }
    return {
        "temperature": temperature,
        "fitted_on": "val",
        **{name: {key: level[key] for key in SCORES} for name, level in levels.items()},
        "bins": bins(test),
        "bins_scaled": bins(after),
    }


def _logits(p: Predictions) -> np.ndarray:
    """Returns float64 [N, C] whose softmax are the probabilities."""
    probabilities = np.asarray(p.probabilities, dtype=np.float64)
    metrics.check_probabilities(probabilities, p.ids)
    if p.logits is not None:
        return np.asarray(p.logits, dtype=np.float64)
    return np.log(np.maximum(probabilities, np.finfo(np.float32).tiny))
