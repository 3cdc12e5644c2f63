"""Operating points: thresholds of class probabilities, their metrics, and decision curves.

Each class is decided against the rest: an example is positive if the class's probability is at least the threshold.
Thresholds are chosen on the validation split and evaluated on the test split. Rules:

    youden             highest sensitivity + specificity (Youden, Cancer 3:32, 1950); the highest threshold if tied
    sensitivity_0.95   the highest threshold whose sensitivity on val is at least 0.95 (or another value)

Predictive values depend on the prevalence. `ppv` and `npv` are those of the test split; `ppv_at` and `npv_at` follow by
Bayes' rule from the same sensitivity and specificity at a given prevalence.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lungjax.config import EvalConfig
from lungjax.evaluation import bootstrap, metrics
from lungjax.evaluation.predictions import Predictions

COUNTS = ("tp", "fp", "fn", "tn")


def choose(predictions: Predictions, class_index: int, rule: str) -> float:
    """Returns the threshold that a rule chooses among the class's probabilities in `predictions` (the val split).

    Raises ValueError for an unknown rule, or if all examples or none of them belong to the class.
    """
    if reason := _one_sided(predictions, class_index):
        raise ValueError(reason)
    name, _, number = rule.partition("_")
    sensitivity = float(number) if re.fullmatch(r"[0-9.e-]+", number) else 0.0
    if rule != "youden" and not (name == "sensitivity" and 0 < sensitivity <= 1):
        raise ValueError(f"rule {rule!r}: expected youden or sensitivity_X with 0 < X <= 1")
    from sklearn.metrics import roc_curve  # here: it takes two seconds to import

    positive, scores = predictions.labels == class_index, _scores(predictions, class_index)
    fpr, tpr, thresholds = roc_curve(positive, scores, drop_intermediate=False)
    good = tpr - fpr if rule == "youden" else tpr >= sensitivity
    return float(thresholds[1 + np.argmax(good[1:])])  # the first one if tied; skips the threshold infinity


def metrics_at_thresholds(
    predictions: Predictions, thresholds: Sequence[tuple[int, float]], prevalence: float = 0.0, draws: int = 2000
) -> list[dict[str, Any]]:
    """Returns the metrics of each (class index, threshold) on `predictions` (the test split), JSON-ready.

    Keys: `threshold`; `sensitivity`, `specificity`, `ppv`, `npv`, 0..1 or None if undefined; `ppv_at` and `npv_at` at
    `at_prevalence`, all three None if `prevalence` is 0 (unknown); the counts `tp`, `fp`, `fn`, `tn`; `intervals`,
    {name: [low, high]} of the defined rates (`bootstrap`). Raises ValueError for a prevalence outside 0..1.
    """
    if not 0 <= prevalence <= 1:
        raise ValueError(f"prevalence={prevalence}: must be in 0..1")
    if not thresholds:
        return []
    p, limits = predictions, np.asarray([threshold for _, threshold in thresholds])[:, None]
    positive = p.labels == np.asarray([i for i, _ in thresholds])[:, None]  # [K, N]
    called = np.stack([_scores(p, i) for i, _ in thresholds]) >= limits
    cells = np.stack([positive & called, ~positive & called, positive & ~called, ~positive & ~called])  # as COUNTS
    keys, member = np.unique(metrics.patient_keys(p), return_inverse=True)
    of_patient = np.stack([np.bincount(member, weights=row, minlength=len(keys)) for row in cells.reshape(-1, len(p))])
    blocks = bootstrap.resample_patients(len(keys), draws if len(keys) > 1 else 0, 0, 256)
    samples = np.concatenate([np.zeros((len(of_patient), 0)), *(of_patient @ counts for counts in blocks)], axis=1)
    counts = cells.sum(axis=2)  # [4, K]
    rates, sample_rates = (
        _rates(x, prevalence) for x in (counts.astype(np.float64), samples.reshape(4, len(thresholds), -1))
    )
    points = []
    for k, (_, threshold) in enumerate(thresholds):
        intervals = {name: bootstrap.interval(values[k]) for name, values in sample_rates.items()}
        points.append(
            {
                "threshold": threshold,
                **{name: None if np.isnan(values[k]) else float(values[k]) for name, values in rates.items()},
                "at_prevalence": prevalence or None,
                **dict(zip(COUNTS, counts[:, k].tolist(), strict=True)),
                "intervals": {name: list(ends) for name, ends in intervals.items() if ends is not None},
            }
        )
    return points


def points(val: Predictions, test: Predictions, options: EvalConfig) -> dict[str, dict[str, Any]]:
    """Returns the entry `operating_points` of the report, {class: {rule: metrics at its threshold}}.

    A class without a threshold has {}; `missing_rules` gives the reason. Raises ValueError for an invalid prevalence.
    """
    rules = ("youden", f"sensitivity_{options.sensitivity:g}")
    keys = [(i, rule) for i in range(len(val.classes)) if not _one_sided(val, i) for rule in rules]
    thresholds = [(i, choose(val, i, rule)) for i, rule in keys]
    result: dict[str, dict[str, Any]] = {name: {} for name in val.classes}
    metrics_of = metrics_at_thresholds(test, thresholds, options.prevalence, options.draws)
    for (i, rule), point in zip(keys, metrics_of, strict=True):
        result[val.classes[i]][rule] = point
    return result


def missing_rules(val: Predictions) -> list[str]:
    """Returns one sentence per class without an operating point."""
    reasons = {name: _one_sided(val, i) for i, name in enumerate(val.classes)}
    return [f"No operating point for {name}: {reason}." for name, reason in reasons.items() if reason]


def net_benefit(predictions: Predictions, class_index: int) -> dict[str, list[float]]:
    """Returns the decision curve of a class (Vickers and Elkin, Medical Decision Making 26:565, 2006).

    At a threshold probability t, examples with a probability of at least t are treated, and a false positive costs
    t / (1 - t) of the benefit of a true positive: net benefit = TP / N - FP / N * t / (1 - t). Probabilities should be
    calibrated; at least one example is required. Returns lists of equal length: "thresholds" 0.01, 0.02, ... 0.99,
    "model", and "all" for treating every example. Treating none has a net benefit of zero.
    """
    t, positive = np.arange(1, 100) / 100, predictions.labels == class_index
    odds, share, scores = t / (1 - t), positive.mean(), _scores(predictions, class_index)
    hits, alarms = (side.sum() - np.searchsorted(np.sort(scores[side]), t) for side in (positive, ~positive))
    return {
        "thresholds": t.tolist(),
        "model": ((hits - alarms * odds) / len(predictions)).tolist(),
        "all": (share - (1 - share) * odds).tolist(),
    }


def _one_sided(p: Predictions, class_index: int) -> str:
    """Returns the reason why no threshold can be chosen on these examples, or ""."""
    positive = p.labels == class_index
    if positive.any() and not positive.all():
        return ""
    what = "only examples" if positive.any() else "no examples"
    return f"the validation split has {what} of {p.classes[class_index]}"


def _scores(p: Predictions, class_index: int) -> np.ndarray:
    return np.asarray(p.probabilities, dtype=np.float64)[:, class_index]


def _rates(counts: np.ndarray, prevalence: float) -> Mapping[str, np.ndarray]:
    """Returns the rates [...] of counts [4, ...] in the order of COUNTS, NaN where undefined."""
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
