"""Operating points: thresholds of class probabilities, their metrics, and decision curves.

Each class is decided against the rest: an example is called positive if the class's probability is at least the
threshold. Thresholds are chosen on the validation split and evaluated on the test split. Rules:

    youden             the highest sensitivity + specificity (Youden, Cancer 3:32, 1950), the highest such threshold
    sensitivity_0.95   the highest threshold whose sensitivity on val is at least 0.95 (or another number)

Predictive values depend on the prevalence. `ppv` and `npv` are those of the test split; `ppv_at` and `npv_at` follow by
Bayes' rule from the same sensitivity and specificity at a stated prevalence.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lungjax.evaluation import bootstrap, metrics
from lungjax.evaluation.predictions import Predictions

RATES = ("sensitivity", "specificity", "ppv", "npv", "ppv_at", "npv_at")
COUNTS = ("tp", "fp", "fn", "tn")


def choose(predictions: Predictions, class_index: int, rule: str) -> float:
    """Returns the threshold that a rule chooses among the class's probabilities in `predictions` (the val split).

    Args:
      predictions: of the split to choose on.
      class_index: the positive class.
      rule: "youden", or "sensitivity_" and a number above 0 and up to 1.

    Raises ValueError for an unknown rule, or a split without examples of the class, or without others.
    """
    if reason := _one_sided(predictions, class_index):
        raise ValueError(reason)
    positive = predictions.labels == class_index
    fpr, tpr, thresholds = metrics.roc_curve(positive, _scores(predictions, class_index))
    fpr, tpr, thresholds = fpr[1:], tpr[1:], thresholds[1:]  # without the threshold infinity
    if rule == "youden":
        return float(thresholds[np.argmax(tpr - fpr)])  # the first of equals
    return float(thresholds[np.argmax(tpr >= _sensitivity(rule))])


def metrics_at_threshold(
    predictions: Predictions,
    class_index: int,
    threshold: float,
    prevalence: float = 0.0,
    draws: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Returns the metrics of a threshold on `predictions` (the test split), JSON-ready.

    Keys: `threshold`; `sensitivity`, `specificity`, `ppv`, `npv`, 0..1 or None if undefined; `ppv_at` and `npv_at` at
    `at_prevalence`, all three None if it is 0 (unknown); the counts `tp`, `fp`, `fn`, `tn`; `intervals`, {name: [low,
    high]} of the rates, 95 % by bootstrap over patients (`lungjax.evaluation.bootstrap`), if defined.

    Raises ValueError for a prevalence outside 0..1.
    """
    return _at_all(predictions, [(class_index, threshold)], prevalence, draws, seed)[0]


def points(
    val: Predictions,
    test: Predictions,
    sensitivity: float = 0.95,
    prevalence: float = 0.0,
    draws: int = 2000,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Returns `operating_points` of the report, {class: {rule: metrics_at_threshold(...)}}, for every class.

    {} for a class that val is one-sided for; `missing_rules` says why. Raises as `choose` and `metrics_at_threshold`.
    """
    rules = ("youden", f"sensitivity_{sensitivity:g}")
    keys = [(i, rule) for i in range(len(val.classes)) if not _one_sided(val, i) for rule in rules]
    thresholds = [(i, choose(val, i, rule)) for i, rule in keys]
    result: dict[str, dict[str, Any]] = {name: {} for name in val.classes}
    for (i, rule), point in zip(keys, _at_all(test, thresholds, prevalence, draws, seed), strict=True):
        result[val.classes[i]][rule] = point
    return result


def missing_rules(val: Predictions) -> list[str]:
    """Returns a sentence for each class without an operating point."""
    reasons = {name: _one_sided(val, i) for i, name in enumerate(val.classes)}
    return [f"There is no operating point for {name}: {reason}." for name, reason in reasons.items() if reason]


def net_benefit(
    predictions: Predictions, class_index: int, thresholds: Sequence[float] | None = None
) -> dict[str, list[float]]:
    """Returns a decision curve (Vickers and Elkin, Medical Decision Making 26:565, 2006).

    At a threshold probability t a false positive costs t / (1 - t) of the gain of a true positive, and examples with a
    probability of at least t are called positive: net benefit = TP / N - FP / N * t / (1 - t). Use calibrated
    probabilities.

    Args:
      predictions: N examples, at least one.
      class_index: the positive class.
      thresholds: above 0 and below 1; 0.01, 0.02, ... 0.99 if None.

    Returns {"thresholds", "model", "all"}, lists of equal length; "all" calls every example positive. Calling none
    positive has a net benefit of zero. Raises ValueError for no example or a threshold out of range.
    """
    t = np.arange(1, 100) / 100 if thresholds is None else np.asarray(thresholds, dtype=np.float64)
    if not ((t > 0) & (t < 1)).all():
        raise ValueError(f"threshold probabilities from {t.min():g} to {t.max():g}: must be above 0 and below 1")
    n = len(predictions)
    if not n:
        raise ValueError("no example for a decision curve")
    positive = predictions.labels == class_index
    scores = _scores(predictions, class_index)
    hits, alarms = (
        side.sum() - np.searchsorted(np.sort(scores[side]), t, side="left") for side in (positive, ~positive)
    )
    odds = t / (1 - t)
    share = positive.mean()
    return {
        "thresholds": t.tolist(),
        "model": ((hits - alarms * odds) / n).tolist(),
        "all": (share - (1 - share) * odds).tolist(),
    }


def _sensitivity(rule: str) -> float:
    try:
        sensitivity = float(rule.removeprefix("sensitivity_"))
    except ValueError:
        sensitivity = 0.0
    if not rule.startswith("sensitivity_") or not 0 < sensitivity <= 1:
        raise ValueError(f"rule {rule!r}: allowed are youden, and sensitivity_X with X above 0 and up to 1")
    return sensitivity


def _one_sided(p: Predictions, class_index: int) -> str:
    """Returns why no threshold can be chosen on these examples, "" if one can."""
    positive = p.labels == class_index
    if positive.any() and not positive.all():
        return ""
    what = "only examples" if positive.any() else "no example"
    return f"the validation split has {what} of {p.classes[class_index]}"


def _scores(p: Predictions, class_index: int) -> np.ndarray:
    return np.asarray(p.probabilities, dtype=np.float64)[:, class_index]


def _at_all(
    p: Predictions, thresholds: Sequence[tuple[int, float]], prevalence: float, draws: int, seed: int
) -> list[dict[str, Any]]:
    """Returns `metrics_at_threshold` of each (class, threshold), with one set of draws for all."""
    if not 0 <= prevalence <= 1:
        raise ValueError(f"prevalence={prevalence}: allowed is 0 to 1")
    if not thresholds:
        return []
    cells = np.stack([_cells(p, i, threshold) for i, threshold in thresholds])  # [K, 4, N]
    keys, member = np.unique(metrics.patient_keys(p), return_inverse=True)
    of_patient = np.stack([np.bincount(member, weights=row, minlength=len(keys)) for row in cells.reshape(-1, len(p))])
    shape = (len(thresholds), 4, -1)
    drawn = [
        (of_patient @ counts).reshape(shape)
        for counts in (bootstrap.resample_patients(len(keys), draws, seed, 256) if len(keys) > 1 else ())
    ]
    rates = _rates(np.moveaxis(np.concatenate(drawn, axis=2), 1, 0), prevalence) if drawn else {}
    sums = cells.sum(axis=2)
    points = []
    for k, (_, threshold) in enumerate(thresholds):
        own = {name: float(value) for name, value in _rates(sums[k].astype(np.float64), prevalence).items()}
        intervals = {name: bootstrap.interval(values[k]) for name, values in rates.items()}
        points.append(
            {
                "threshold": threshold,
                **{name: None if np.isnan(value) else value for name, value in own.items()},
                "at_prevalence": prevalence or None,
                **{name: int(n) for name, n in zip(COUNTS, sums[k], strict=True)},
                "intervals": {name: list(ends) for name, ends in intervals.items() if ends is not None},
            }
        )
    return points


def _cells(p: Predictions, class_index: int, threshold: float) -> np.ndarray:
    """Returns [4, N] bool: true positives, false positives, false negatives, true negatives."""
    positive, called = p.labels == class_index, _scores(p, class_index) >= threshold
    return np.stack([positive & called, ~positive & called, positive & ~called, ~positive & ~called])


def _rates(counts: np.ndarray, prevalence: float) -> Mapping[str, np.ndarray]:
    """Returns RATES from counts [4, ...] in the order of COUNTS, [...] each, NaN where undefined."""
    tp, fp, fn, tn = counts
    with np.errstate(invalid="ignore", divide="ignore"):
        sensitivity, specificity = tp / (tp + fn), tn / (tn + fp)
        ill, well = prevalence or np.nan, 1 - prevalence
        return {
            "sensitivity": sensitivity,
            "specificity": specificity,
            "ppv": tp / (tp + fp),
            "npv": tn / (tn + fn),
            "ppv_at": sensitivity * ill / (sensitivity * ill + (1 - specificity) * well),
            "npv_at": specificity * well / ((1 - sensitivity) * ill + specificity * well),
        }
