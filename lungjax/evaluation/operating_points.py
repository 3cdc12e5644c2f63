"""Operating points: thresholds of class probabilities, their metrics, and decision curves.

Each class or finding is decided on its own: an example is positive if the class's probability is at least the
threshold. Probabilities are calibrated. Thresholds are chosen on the validation split and evaluated on the test split.
Rules:

    youden             highest sensitivity + specificity (Youden, Cancer 3:32, 1950); the highest threshold if tied
    sensitivity_0.95   the highest threshold whose sensitivity on val is at least 0.95 (or another value)

Predictive values depend on the prevalence. `ppv` and `npv` are those of the test split; `ppv_at` and `npv_at` follow by
Bayes' rule from the same sensitivity and specificity at a given prevalence of the class.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lungjax.config import EvalConfig, schema
from lungjax.data.labels import indicators
from lungjax.evaluation import bootstrap, metrics
from lungjax.evaluation.predictions import Predictions, binary, with_rule

COUNTS = ("tp", "fp", "fn", "tn")
Points = Mapping[str, Mapping[str, Mapping[str, Mapping[str, Any]]]]  # LEVEL.CLASS.RULE, each with a threshold


def choose(predictions: Predictions, class_index: int, rule: str) -> float:
    """Returns the threshold that `rule` chooses on the val split; some but not all examples must be of the class.

    `predictions` and `class_index` are those of `predictions.binary`.
    """
    from sklearn.metrics import roc_curve  # here: it takes two seconds to import

    positive, scores = predictions.labels == class_index, _scores(predictions, class_index)
    fpr, tpr, thresholds = roc_curve(positive, scores, drop_intermediate=False)
    good = tpr - fpr if rule == "youden" else tpr >= float(rule.removeprefix("sensitivity_"))
    return float(thresholds[1 + np.argmax(good[1:])])  # the first one if tied; skips the threshold infinity


def metrics_at_thresholds(
    predictions: Predictions,
    thresholds: Sequence[tuple[int, float]],
    prevalences: Mapping[str, float] | None = None,
    draws: int = 2000,
) -> list[dict[str, Any]]:
    """Returns the metrics of each (class index, threshold) on `predictions` (the test split), JSON-ready.

    Keys: `threshold`; `sensitivity`, `specificity`, `ppv`, `npv`, 0..1 or None if undefined; `ppv_at` and `npv_at` at
    `at_prevalence`, all three None if the class is not in `prevalences`, {class: 0..1}; the counts `tp`, `fp`, `fn`,
    `tn`; `intervals`, {name: [low, high]} of the defined rates (`bootstrap`).
    """
    if not thresholds:
        return []
    p, limits = predictions, np.asarray([threshold for _, threshold in thresholds])[:, None]
    labels = p.labels if p.multilabel else indicators(p.labels, len(p.classes))
    positive, negative = (np.stack([labels[:, i] == value for i, _ in thresholds]) for value in (1, 0))  # [K, N]
    called = np.stack([_scores(p, i) for i, _ in thresholds]) >= limits
    cells = np.stack([positive & called, negative & called, positive & ~called, negative & ~called])  # as COUNTS
    keys, member = np.unique(metrics.patient_keys(p), return_inverse=True)
    of_patient = np.stack([np.bincount(member, weights=row, minlength=len(keys)) for row in cells.reshape(-1, len(p))])
    blocks = bootstrap.resample_patients(len(keys), draws if len(keys) > 1 else 0, 256)
    once = np.ones((len(keys), 1))
    samples = np.concatenate([of_patient @ counts for counts in (once, *blocks)], axis=1)  # without draw, and draws
    known = [(prevalences or {}).get(p.classes[i]) for i, _ in thresholds]
    rates = _rates(samples.reshape(4, len(thresholds), -1), np.asarray(known, np.float64)[:, None])
    tp, fp, fn, tn = of_patient.reshape(4, len(thresholds), -1) > 0
    pairs = {"sensitivity": tp | fn, "specificity": fp | tn, "ppv": tp | fp, "npv": fn | tn}
    patients = {name: pair.sum(axis=-1) for name, pair in pairs.items()}  # in the denominators
    points = []
    for k, (_, threshold) in enumerate(thresholds):
        values = {name: None if np.isnan(rate[k, 0]) else float(rate[k, 0]) for name, rate in rates.items()}
        intervals = {
            name: bootstrap.interval(rate[k, 1:], values[name], patients[name][k] if name in patients else 0)
            for name, rate in rates.items()
        }
        points.append(
            {
                "threshold": threshold,
                **values,
                "at_prevalence": known[k],
                **dict(zip(COUNTS, cells[:, k].sum(axis=1).tolist(), strict=True)),
                "intervals": {name: list(ends) for name, ends in intervals.items() if ends is not None},
            }
        )
    return points


def choose_all(val: Predictions, test: Predictions, options: EvalConfig) -> Points:
    """Returns the thresholds of all classes and rules, chosen on `val`, at the levels slice and patient.

    The latter only if a patient has several examples; a class without a threshold has {} (see `missing_rules`).
    """
    rules = ("youden", f"sensitivity_{options.sensitivity:g}")
    levels = {"slice": val}
    if any(len(np.unique(metrics.patient_keys(p))) < len(p) for p in (val, test)):
        levels["patient"] = metrics.by_patient(val)[0]
    return {
        level: {
            name: {} if _one_sided(own, i) else {rule: {"threshold": choose(own, i, rule)} for rule in rules}
            for name, (own, i) in binary(p).items()
        }
        for level, p in levels.items()
    }


def evaluate(points: Points, test: Predictions, options: EvalConfig) -> Points:
    """Returns the entry `operating_points` of the report: the metrics on `test` of each threshold in `points`."""
    levels = {"slice": test, "patient": metrics.by_patient(test)[0]}
    result: dict[str, dict[str, dict[str, Any]]] = {}
    for level, classes in points.items():
        chosen = [(test.classes.index(c), p["threshold"]) for c, rules in classes.items() for p in rules.values()]
        points_of = iter(metrics_at_thresholds(levels[level], chosen, options.prevalences(), options.draws))
        result[level] = {name: {rule: next(points_of) for rule in rules} for name, rules in classes.items()}
    return result


def choose_aggregate(val: Predictions, options: EvalConfig) -> tuple[str, dict[str, list[float | None]]]:
    """Returns the rule of `aggregation` with the highest AUC per patient on `val`, and [AUC, low, high] of each rule.

    The first rule, the mean, is chosen if the AUC is undefined. `options.aggregate` is "auto" or "auto:CLASS+CLASS".
    """
    scores: dict[str, list[float | None]] = {}
    for rule in schema.AGGREGATES:
        how = rule if rule == "mean" else options.aggregate.replace("auto", rule, 1)
        scores[how] = [
            *bootstrap.over_runs([with_rule(val, how)], ["auc_macro"], options.draws, "patient")["auc_macro"]
        ]
    return max(scores, key=lambda how: scores[how][0] or 0), scores


def missing_rules(val: Predictions) -> list[str]:
    """Returns one sentence per class without an operating point."""
    reasons = {name: _one_sided(own, i) for name, (own, i) in binary(val).items()}
    return [f"No operating point for {name}: {reason}." for name, reason in reasons.items() if reason]


def net_benefit(predictions: Predictions, class_index: int) -> dict[str, list[float]]:
    """Returns the decision curve of a class (Vickers and Elkin, Medical Decision Making 26:565, 2006).

    At a threshold probability t, examples with a probability of at least t are treated, and a false positive costs
    t / (1 - t) of the benefit of a true positive: net benefit = TP / N - FP / N * t / (1 - t), zero for treating none.
    Probabilities should be calibrated; at least one example is required. Returns lists of equal length: "thresholds"
    0.01, 0.02, ... 0.99, "model", and "all" for treating every example.
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


def _rates(counts: np.ndarray, prevalence: np.ndarray) -> Mapping[str, np.ndarray]:
    """Returns the rates [K, D] of counts [4, K, D] in the order of COUNTS, NaN where undefined; `prevalence` [K, 1]."""
    tp, fp, fn, tn = counts
    with np.errstate(invalid="ignore", divide="ignore"):
        sensitivity, specificity, ill, well = tp / (tp + fn), tn / (tn + fp), prevalence, 1 - prevalence
        return {
            "sensitivity": sensitivity,
            "specificity": specificity,
            "ppv": tp / (tp + fp),
            "npv": tn / (tn + fn),
            "ppv_at": sensitivity * ill / (sensitivity * ill + (1 - specificity) * well),
            "npv_at": specificity * well / ((1 - sensitivity) * ill + specificity * well),
        }
