"""Calibration: reliability bins, slope and intercept, and temperature scaling.

Temperature scaling (Guo et al., arXiv 1706.04599) divides all logits by a temperature T, fitted on the validation
split. T above 1 makes probabilities less extreme. The predicted class of an example does not change; thresholds and,
with more than two classes, the AUC of a class do. Reports, predictions_SPLIT.csv, `predict`, the service and the
exports all use the probabilities softmax(logits / T). If images may have several findings,
each finding has its own temperature, and its probability is sigmoid(logit / T).

The slope of each class is that of the logistic regression of "is of the class" on the log odds of its probability (Cox,
Biometrika 45:562, 1958); below 1, probabilities are too extreme. The intercept is calibration-in-the-large: that of the
same regression with the slope fixed at 1 (Van Calster et al., BMC Medicine 17:230, 2019); above 0, probabilities are
too low on average. With two classes, both have the same slope, and intercepts of opposite sign.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from scipy import optimize, sparse, special

from lungjax.evaluation import bootstrap, metrics
from lungjax.evaluation.predictions import Predictions, binary

Temperature = float | tuple[float, ...]  # the latter with one value per finding
BOUNDS = (0.05, 20.0)  # of the temperature; without misclassified examples the optimum is zero
SCORES = ("ece", "brier", "loss")
POINTS = 500  # of a logistic regression in a bootstrap


def fit_temperature(predictions: Predictions) -> Temperature:
    """Returns the temperature, within BOUNDS, that minimizes the mean cross-entropy of the predictions.

    Of findings, returns one for each, 1 if no label is known. Without logits, log probabilities are used. Raises
    ValueError if there are no examples or probabilities are invalid.
    """
    p = predictions
    if p.multilabel:
        return tuple(_fit_temperature(own) if len(own) else 1.0 for own, _ in binary(p).values())
    if not len(p):
        raise ValueError("no examples to fit a temperature to")
    return _fit_temperature(p)


def _fit_temperature(p: Predictions) -> float:
    logits, rows = _logits(p), np.arange(len(p))

    def loss(log_temperature: float) -> float:
        scaled = logits / np.exp(log_temperature)
        return float((special.logsumexp(scaled, axis=1) - scaled[rows, p.labels]).mean())

    # Convex in 1 / T, so unimodal in log T.
    minimum = optimize.minimize_scalar(loss, bounds=np.log(BOUNDS), method="bounded", options={"xatol": 1e-6})
    ends = {loss(np.log(t)): t for t in BOUNDS}  # the search does not reach them
    return float(np.exp(minimum.x)) if minimum.fun <= min(ends) else ends[min(ends)]


def apply_temperature(predictions: Predictions, temperature: Temperature) -> Predictions:
    """Returns predictions with softmax(logits / temperature), float32 as in `inference`; 1 is uncalibrated.

    Of findings, these are sigmoid(logits / temperature). The logits remain unscaled. Raises ValueError for invalid
    probabilities.
    """
    logits = _logits(predictions) / np.asarray(temperature)
    softmax = special.expit if predictions.multilabel else partial(special.softmax, axis=1)
    probabilities = softmax(logits) if len(logits) else logits
    return replace(predictions, probabilities=probabilities.astype(np.float32))


def bins(predictions: Predictions) -> list[dict[str, Any]]:
    """Returns the `metrics.BINS` bins of a reliability diagram, of equal width over the highest probability.

    Each is {low, high, n, confidence, accuracy}: the edges (the upper one is included), the number of examples, their
    mean highest probability and their accuracy; of findings, every known label is an example. The last two are None in
    an empty bin.
    """
    p = predictions
    parts = [own for own, _ in binary(p).values()] if p.multilabel else [p]
    top = np.concatenate([np.asarray(own.probabilities, np.float64).max(axis=1, initial=0) for own in parts])
    right = np.concatenate([own.predicted == own.labels for own in parts])
    place = metrics.confidence_bins(top)
    count = metrics.BINS
    sums = [np.bincount(place, x, count) for x in (np.ones(len(top)), top, right)]
    result: list[dict[str, Any]] = []
    for i, (n, *totals) in enumerate(zip(*sums, strict=True)):
        confidence, accuracy = (float(total / n) if n else None for total in totals)
        edges = {"low": i / count, "high": (i + 1) / count}
        result.append({**edges, "n": int(n), "confidence": confidence, "accuracy": accuracy})
    return result


def recalibration(predictions: Predictions, draws: int = 2000) -> dict[str, dict[str, Any]]:
    """Returns {slope, intercept, intervals} by class; see the module's docstring.

    The slope is None without overlap between the log odds of the class and of the others, where it is infinite; both
    are None if all or no examples are of the class. `intervals`, {name: [low, high]}, are from a bootstrap over
    patients. They are missing unless `bootstrap.MIN_PATIENTS` have the class, and as many do not, and if a limit is
    infinite. In its draws, more than POINTS examples are grouped by rank, with the mean log odds of the group.
    """
    if predictions.multilabel:
        return {name: recalibration(own, draws)[name] for name, (own, _) in binary(predictions).items()}
    p = np.maximum(np.asarray(predictions.probabilities, np.float64), np.finfo(np.float32).tiny)
    keys, member = np.unique(metrics.patient_keys(predictions), return_inverse=True)
    size = min(POINTS, len(p))
    result: dict[str, dict[str, Any]] = {}
    for i, name in enumerate(predictions.classes):
        positive, x = predictions.labels == i, np.log(p[:, i]) - np.log(np.delete(p, i, axis=1).sum(axis=1))
        result[name] = {"slope": None, "intercept": None, "intervals": {}}
        if min(positive.sum(), (~positive).sum()) == 0:
            continue
        every = np.ones((len(x), 1))
        fits = {"intercept": (_intercept, _intercept(x, positive[:, None], every, np.zeros(1), 50))}
        if x[positive].min() < x[~positive].max() and x[~positive].min() < x[positive].max():
            fit = _logistic(x, positive[:, None], every, np.zeros((2, 1)), 50)
            if np.isfinite(fit[1, 0]):
                fits["slope"] = (lambda *args: _logistic(*args)[1], fit)
        values = {key: float(start.ravel()[-1]) for key, (_, start) in fits.items()}
        result[name] |= values
        if min(len(np.unique(member[side])) for side in (positive, ~positive)) < bootstrap.MIN_PATIENTS or not draws:
            continue
        group = np.argsort(np.argsort(x, kind="stable")) * size // len(x)
        x = np.bincount(group, x) / np.bincount(group)
        of_class, images = (
            sparse.csr_matrix((n, (group, member)), (size, len(keys))) for n in (1.0 * positive, np.ones(len(p)))
        )
        samples: dict[str, list[np.ndarray]] = {key: [] for key in fits}
        for counts in bootstrap.resample_patients(len(keys), draws, 256):
            for key, (function, start) in fits.items():
                samples[key].append(function(x, of_class @ counts, images @ counts, start, 6))
        for key, own in samples.items():
            with np.errstate(invalid="ignore"):
                ends = bootstrap.interval(np.concatenate(own), values[key])
            if ends is not None and np.isfinite(ends).all():
                result[name]["intervals"][key] = list(ends)
    return result


def summary(test: Predictions, temperature: Temperature | None, draws: int = 2000) -> dict[str, Any]:
    """Returns `calibration` of the report for calibrated predictions with logits; README.md lists the keys.

    `temperature` is that of `test`, None if the folds have their own. Raises ValueError for invalid probabilities.
    """
    result: dict[str, Any] = {"temperature": temperature, "fitted_on": "val"}
    for kind, p in (("uncalibrated", apply_temperature(test, 1.0)), ("calibrated", test)):
        level = metrics.summarize(p)
        result[kind] = {key: level[key] for key in SCORES} | {"bins": bins(p), "per_class": recalibration(p, draws)}
    return result


def _intercept(x: np.ndarray, hits: np.ndarray, n: np.ndarray, start: np.ndarray, steps: int) -> np.ndarray:
    """Returns the intercepts [D] of logistic regressions whose slope on `x` is 1; arguments as in `_logistic`."""
    a, x = start, x[:, None]
    with np.errstate(invalid="ignore", divide="ignore"):
        for _ in range(steps):
            q = special.expit(a + x)
            step = (n * q - hits).sum(axis=0) / (n * q * (1 - q)).sum(axis=0)
            a = a - np.clip(step, -2, 2)  # certain predictions would cause long steps
    return a


def _logistic(x: np.ndarray, hits: np.ndarray, n: np.ndarray, start: np.ndarray, steps: int) -> np.ndarray:
    """Returns intercept and slope [2, D] of D logistic regressions on `x` [N], by Newton's method from `start`.

    `n` [N, D] are the numbers of examples at each point, and `hits` those of the class. Without convergence, as if `x`
    separates the class from the others, the slope is infinite.
    """
    (a, b), x = start, x[:, None]
    with np.errstate(invalid="ignore", divide="ignore"):
        for _ in range(steps):
            q = special.expit(a + b * x)
            error, weight = n * q - hits, n * q * (1 - q)
            g0, g1 = error.sum(axis=0), (error * x).sum(axis=0)
            h00, h01, h11 = ((weight * power).sum(axis=0) for power in (1, x, x**2))
            scale = h00 * h11 - h01**2
            step = (h00 * g1 - h01 * g0) / scale
            a, b = a - (h11 * g0 - h01 * g1) / scale, b - step
        return np.stack([a, np.where(np.abs(step) <= 1e-3 * np.maximum(1, np.abs(b)), b, np.inf)])


def _logits(p: Predictions) -> np.ndarray:
    """Returns the logits, float64 [N, C], or the log probabilities (of findings, log odds) if they are unknown."""
    metrics.check_probabilities(p)
    if p.logits is not None:
        return np.asarray(p.logits, dtype=np.float64)
    scores = np.clip(np.asarray(p.probabilities, dtype=np.float64), np.finfo(np.float32).tiny, 1.0)
    return special.logit(np.minimum(scores, 1 - np.finfo(np.float32).epsneg)) if p.multilabel else np.log(scores)
