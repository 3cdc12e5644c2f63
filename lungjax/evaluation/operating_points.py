"""From a probability to a decision: operating points, predictive values elsewhere, and whether deciding is of use.

A class is decided against the rest: an example is called positive if the class's probability is at least a threshold.
Thresholds are chosen on the validation split and their numbers come from the test split, so a test number is nobody's
best choice in hindsight. Rules:

    youden             the highest sensitivity + specificity (Youden, Cancer 3:32, 1950), of equals the highest
    sensitivity_0.95   the highest threshold whose sensitivity on val is at least 0.95 (or another number)

Predictive values depend on how common the class is. `ppv` and `npv` are the test split's own; `ppv_at` and `npv_at` are
what Bayes' rule gives for the same sensitivity and specificity at a stated prevalence.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lungjax.evaluation import bootstrap, metrics
from lungjax.evaluation.predictions import Predictions

RATES = ("sensitivity", "specificity", "ppv", "npv", "ppv_at", "npv_at")
COUNTS = ("tp", "fp", "fn", "tn")


def choose(predictions: Predictions, class_index: int, rule: str) -> float:
    """Returns the threshold, one of the class's probabilities in `predictions` (the val split), that a rule picks.

    Args:
      predictions: of the split to choose on.
      class_index: the class that is positive.
      rule: "youden", or "sensitivity_" and a number above 0 and up to 1.

    Raises ValueError for an unknown rule, or where the split has only examples of the class or none.
    """
    reason = _lacking(predictions, class_index)
    if reason:
        raise ValueError(reason)
    positive = predictions.labels == class_index
    fpr, tpr, thresholds = metrics.roc_curve(positive, _scores(predictions, class_index))
    fpr, tpr, thresholds = fpr[1:], tpr[1:], thresholds[1:]  # the first calls nothing positive
    if rule == "youden":
        return float(thresholds[np.argmax(tpr - fpr)])  # the first of equals
    return float(thresholds[np.argmax(tpr >= _wanted(rule))])


def metrics_at_threshold(
    predictions: Predictions,
    class_index: int,
    threshold: float,
    prevalence: float = 0.0,
    draws: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Returns what deciding at a threshold means on `predictions` (the test split), JSON-ready.

    Keys: `threshold`; `sensitivity`, `specificity`, `ppv`, `npv`, 0..1 or None where undefined; `ppv_at` and `npv_at`
    at `at_prevalence`, all three None where that is not stated (0); the counts `tp`, `fp`, `fn`, `tn`; `intervals`,
    {name: [low, high]} of the rates, 95 % by bootstrap over patients (`lungjax.evaluation.bootstrap`), without what
    has none.

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
    """Returns `operating_points` of the report: {class: {rule: what `metrics_at_threshold` gives}}, for every class.

    A class that val can't choose for has {}; `missing_rules` says why. Raises as `choose` and `metrics_at_threshold`.
    """
    rules = ("youden", f"sensitivity_{sensitivity:g}")
    found: dict[str, dict[str, Any]] = {}
    wanted: list[tuple[int, float]] = []
    places: list[tuple[str, str]] = []
    for i, name in enumerate(val.classes):
        found[name] = {}
        if not _lacking(val, i):
            wanted += [(i, choose(val, i, rule)) for rule in rules]
            places += [(name, rule) for rule in rules]
    for (name, rule), point in zip(places, _at_all(test, wanted, prevalence, draws, seed), strict=True):
        found[name][rule] = point
    return found


def missing_rules(val: Predictions) -> list[str]:
    """Returns a sentence for each class without an operating point."""
    reasons = {name: _lacking(val, i) for i, name in enumerate(val.classes)}
    return [f"There is no operating point for {name}: {reason}." for name, reason in reasons.items() if reason]


def net_benefit(
    predictions: Predictions, class_index: int, thresholds: Sequence[float] | None = None
) -> dict[str, list[float]]:
    """Returns a decision curve (Vickers and Elkin, Medical Decision Making 26:565, 2006).

    At a threshold probability t one false alarm costs t / (1 - t) of what a true find gains, and the class is called
    where its probability is at least t: net benefit = TP / N - FP / N * t / (1 - t). It takes the probabilities at
    their word, so it means something for calibrated ones.

    Args:
      predictions: N examples, at least one.
      class_index: the class that is positive.
      thresholds: above 0 and below 1; 0.01, 0.02, ... 0.99 if None.

    Returns {"thresholds", "model", "all"}, lists of equal length; "all" calls every example positive. Calling none has
    a net benefit of zero everywhere. Raises ValueError for no example or a threshold outside.
    """
    t = np.arange(1, 100) / 100 if thresholds is None else np.asarray(thresholds, dtype=np.float64)
    if not ((t > 0) & (t < 1)).all():
        raise ValueError(f"threshold probabilities must lie above 0 and below 1, got {t.min():g} to {t.max():g}")
    n = len(predictions)
    if not n:
        raise ValueError("there is no example to make a decision on")
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


def _wanted(rule: str) -> float:
    start, _, number = rule.partition("_")
    try:
        wanted = float(number)
    except ValueError:
        wanted = 0.0
    if start != "sensitivity" or not 0 < wanted <= 1:
        raise ValueError(f"rule {rule!r}: allowed are youden, and sensitivity_X with X above 0 and up to 1")
    return wanted


def _lacking(p: Predictions, class_index: int) -> str:
    """Says why no threshold can be chosen on these examples; "" where one can."""
    positive = p.labels == class_index
    if positive.any() and not positive.all():
        return ""
    what = "nothing but" if positive.any() else "no example of"
    return f"the split that thresholds are chosen on has {what} {p.classes[class_index]}"


def _scores(p: Predictions, class_index: int) -> np.ndarray:
    return np.asarray(p.probabilities, dtype=np.float64)[:, class_index]


def _at_all(
    p: Predictions, wanted: Sequence[tuple[int, float]], prevalence: float, draws: int, seed: int
) -> list[dict[str, Any]]:
    """Returns `metrics_at_threshold` of several (class, threshold), with one set of draws for all."""
    if not 0 <= prevalence <= 1:
        raise ValueError(f"prevalence={prevalence}: allowed is 0 to 1")
    if not wanted:
        return []
    cells = np.stack([_cells(p, i, threshold) for i, threshold in wanted])  # [K, 4, N]
    keys, member = np.unique(metrics.patient_keys(p), return_inverse=True)
    of_patient = np.stack([np.bincount(member, weights=row, minlength=len(keys)) for row in cells.reshape(-1, len(p))])
    shape = (len(wanted), 4, -1)
    drawn = [
        (of_patient @ counts).reshape(shape)
        for counts in (bootstrap.resample_patients(len(keys), draws, seed, 256) if len(keys) > 1 else ())
    ]
    rates = _rates(np.moveaxis(np.concatenate(drawn, axis=2), 1, 0), prevalence) if drawn else {}
    sums = cells.sum(axis=2)
    found = []
    for k, (_, threshold) in enumerate(wanted):
        own = {name: float(value) for name, value in _rates(sums[k].astype(np.float64), prevalence).items()}
        intervals = {name: bootstrap.interval(values[k]) for name, values in rates.items()}
        found.append(
            {
                "threshold": threshold,
                **{name: None if np.isnan(value) else value for name, value in own.items()},
                "at_prevalence": prevalence or None,
                **{name: int(n) for name, n in zip(COUNTS, sums[k], strict=True)},
                "intervals": {name: list(ends) for name, ends in intervals.items() if ends is not None},
            }
        )
    return found


def _cells(p: Predictions, class_index: int, threshold: float) -> np.ndarray:
    """Returns [4, N] bool: which examples are true positives, false positives, false negatives, true negatives."""
    positive, called = p.labels == class_index, _scores(p, class_index) >= threshold
    return np.stack([positive & called, ~positive & called, positive & ~called, ~positive & ~called])


def _rates(counts: np.ndarray, prevalence: float) -> Mapping[str, np.ndarray]:
    """Returns RATES from counts [4, ...] in the order of COUNTS, [...] each, NaN where undefined."""
    tp, fp, fn, tn = counts
    with np.errstate(invalid="ignore", divide="ignore"):
        sensitivity, specificity = tp / (tp + fn), tn / (tn + fp)
        found, alarms = sensitivity * prevalence, (1 - specificity) * (1 - prevalence)
        missed, cleared = (1 - sensitivity) * prevalence, specificity * (1 - prevalence)
        nowhere = np.full_like(sensitivity, np.nan)
        return {
            "sensitivity": sensitivity,
            "specificity": specificity,
            "ppv": tp / (tp + fp),
            "npv": tn / (tn + fn),
            "ppv_at": found / (found + alarms) if prevalence else nowhere,
            "npv_at": cleared / (missed + cleared) if prevalence else nowhere,
        }
