"""The numbers of a report, from labels and probabilities, in numpy alone and in float64.

Definitions, per class against the rest, with TP, FP, FN, TN from the confusion matrix and the predicted class
the one of the highest probability (the first of equals):

    precision (positive predictive value)  TP / (TP + FP)      recall (sensitivity)  TP / (TP + FN)
    npv (negative predictive value)        TN / (TN + FN)      specificity           TN / (TN + FP)
    f1                                     2 TP / (2 TP + FP + FN)
    auc                 area under the ROC curve: the chance that an example of the class has a higher
                        probability for it than one of the rest, ties one half (Hanley and McNeil,
                        Radiology 143:29, 1982)
    average_precision   sum over thresholds of (recall step) x precision, without interpolation

`_macro` is the plain mean over the classes, `_weighted` the mean weighted by the classes' true counts, and
`_micro` pools all example-class pairs into one two-class problem. `balanced_accuracy` is the mean recall, so
it equals `recall_macro`. `loss` is the mean of -log(probability of the true class) in nats, probabilities no
smaller than 2.2e-16.

A number that has no definition is None and never a made-up one: the recall of a class with no example, the
precision of a class never predicted, an AUC or average precision without both sides. Means are over the
classes where the number is defined, and None where it is for none. These are scikit-learn's definitions with
`zero_division=nan`. By them a class without examples has precision and F1 zero once it is predicted, which
draws their means down.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lungjax.predictions import Predictions

Level = dict[str, Any]

# Per class, in the report's order; each gets a mean over classes with _macro after its name.
PER_CLASS = ("precision", "recall", "specificity", "npv", "f1", "auc", "average_precision")
WEIGHTED = ("precision", "recall", "f1", "auc", "average_precision")


def summarize(
    labels: np.ndarray, probabilities: np.ndarray, classes: Sequence[str], ids: np.ndarray | None = None
) -> Level:
    """Returns all numbers of one set of examples, JSON-ready: one "level" of the report.

    Keys: `n`, `loss`, `accuracy`, `balanced_accuracy`, each of PER_CLASS with `_macro`, each of WEIGHTED with
    `_weighted`, `auc_micro`, `average_precision_micro`, `confusion` (C lists of C counts, a row a true
    class), `per_class`: {class name: {`n`, ...PER_CLASS}}. Rates are 0..1 or None, see the top of the file.

    Args:
      labels: [N] int, 0..C-1. N may be 0.
      probabilities: [N, C], each row summing to 1.
      classes: C names.
      ids: [N] names for the error messages.

    Raises ValueError naming the examples whose probabilities are NaN, outside 0..1 or don't sum to 1.
    """
    labels = np.asarray(labels, dtype=np.int64)
    scores = np.asarray(probabilities, dtype=np.float64).reshape(len(labels), len(classes))
    check_probabilities(scores, ids)
    n, c = scores.shape
    predicted = scores.argmax(axis=1) if n else labels
    confusion = confusion_matrix(labels, predicted, c)
    counts = confusion.sum(axis=1)
    is_class = labels[:, None] == np.arange(c)  # [N, C]
    rates = confusion_rates(confusion)
    rates["auc"] = np.array([auc(is_class[:, i], scores[:, i]) for i in range(c)])
    rates["average_precision"] = np.array([average_precision(is_class[:, i], scores[:, i]) for i in range(c)])
    true_score = scores[np.arange(n), labels]
    level: Level = {
        "n": n,
        "loss": float(-np.log(np.maximum(true_score, np.finfo(np.float64).eps)).mean()) if n else None,
        "accuracy": float(confusion.trace() / n) if n else None,
        "balanced_accuracy": _mean(rates["recall"]),
    }
    for name in PER_CLASS:
        level[f"{name}_macro"] = _mean(rates[name])
        if name in WEIGHTED:
            level[f"{name}_weighted"] = _mean(rates[name], counts)
    level["auc_micro"] = _number(auc(is_class.ravel(), scores.ravel()))
    level["average_precision_micro"] = _number(average_precision(is_class.ravel(), scores.ravel()))
    level["confusion"] = confusion.tolist()
    level["per_class"] = {
        name: {"n": int(counts[i]), **{rate: _number(rates[rate][i]) for rate in PER_CLASS}}
        for i, name in enumerate(classes)
    }
    return level


def report_levels(predictions: Predictions) -> dict[str, Any]:
    """Returns {"slice": level, "patient": level with "mixed_groups", "by_source": {source: level}}.

    `slice` is over all examples, `patient` over the groups (see `by_patient`), `by_source` over the examples
    of each source; it is empty if no source is known, and examples without one are "unknown" otherwise.
    Raises ValueError as `summarize` does.
    """
    p = predictions
    levels: dict[str, Any] = {**whole_levels(p), "by_source": {}}
    if (p.sources != "").any():
        names, member = np.unique(np.where(p.sources == "", "unknown", p.sources), return_inverse=True)
        order = np.argsort(member, kind="stable")
        rows_of = np.split(order, np.cumsum(np.bincount(member))[:-1])
        levels["by_source"] = {
            str(name): summarize(p.labels[rows], p.probabilities[rows], p.classes, p.ids[rows])
            for name, rows in zip(names, rows_of, strict=True)
        }
    return levels


def whole_levels(predictions: Predictions) -> dict[str, Any]:
    """Returns the levels `slice` and `patient` of `report_levels` alone."""
    p = predictions
    patients, mixed = by_patient(p)
    return {
        "slice": summarize(p.labels, p.probabilities, p.classes, p.ids),
        "patient": summarize(patients.labels, patients.probabilities, p.classes, patients.ids)
        | {"mixed_groups": mixed},
    }


def flat_levels(predictions: Predictions) -> dict[str, float | None]:
    """Returns the numbers of the slice and patient levels by dotted name, such as "slice.auc_macro"."""
    return {
        f"{level}.{name}": value
        for level, values in whole_levels(predictions).items()
        for name, value in values.items()
        if value is None or isinstance(value, (int, float))
    }


def by_patient(predictions: Predictions) -> tuple[Predictions, int]:
    """Returns one prediction a group, and the number of groups left out because their labels are mixed.

    The probability is the mean over the group's examples, in float64; ids and groups are the group's name,
    sources its source ("several" if it has more), rows sorted by name, no extra columns. An example with the
    group "" is a group of its own, named by its id. Raises ValueError for NaN probabilities, as `summarize`.
    """
    p = predictions
    check_probabilities(np.asarray(p.probabilities, dtype=np.float64), p.ids)
    # A group's name and an example's id live apart: id "7" without a group is not patient "7".
    alone = p.groups == ""
    keys = np.where(alone, np.char.add("1", p.ids), np.char.add("0", p.groups))
    names, first, member, counts = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
    n = len(names)
    mixed = np.zeros(n, bool)
    mixed[member[p.labels != p.labels[first][member]]] = True
    several = np.zeros(n, bool)
    several[member[p.sources != p.sources[first][member]]] = True
    means = np.stack(
        [
            np.bincount(member, weights=p.probabilities[:, i], minlength=n) / np.maximum(counts, 1)
            for i in range(len(p.classes))
        ],
        axis=1,
    )
    kept = ~mixed
    shown = np.where(alone, p.ids, p.groups)[first][kept]
    patients = Predictions(
        ids=shown,
        groups=shown,
        sources=np.where(several, "several", p.sources[first])[kept],
        labels=p.labels[first][kept],
        probabilities=means[kept],
        classes=p.classes,
    )
    return patients, int(mixed.sum())


def check_probabilities(probabilities: np.ndarray, ids: np.ndarray | None = None) -> None:
    """Raises ValueError naming the examples whose row [N, C] is not made of probabilities."""
    p = probabilities
    for what, bad in (
        ("are NaN or infinite", ~np.isfinite(p).all(axis=1)),
        ("are outside 0..1", ((p < -1e-6) | (p > 1 + 1e-6)).any(axis=1)),
        ("don't sum to 1", np.abs(p.sum(axis=1) - 1) > 1e-3),
    ):
        if bad.any():
            rows = np.flatnonzero(bad)
            named = [f"row {row}" if ids is None else str(ids[row]) for row in rows[:5]]
            more = f" and {len(rows) - 5} more" if len(rows) > 5 else ""
            raise ValueError(
                f"the probabilities of {len(rows)} of {len(p)} examples {what}: {', '.join(named)}{more}; "
                "the weights that made them have probably diverged"
            )


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Returns counts [C, C] int64: entry i, j is the number of examples of class i taken for class j."""
    return np.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes)


def confusion_rates(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """Returns precision, recall, specificity, npv and f1 of each class, [C] each, NaN where undefined."""
    hits = np.diag(confusion).astype(np.float64)
    true, taken, n = confusion.sum(axis=1), confusion.sum(axis=0), confusion.sum()
    true_negative = n - true - taken + hits
    pairs = {
        "precision": (hits, taken),
        "recall": (hits, true),
        "specificity": (true_negative, n - true),
        "npv": (true_negative, n - taken),
        "f1": (2 * hits, true + taken),
    }
    return {
        name: np.divide(part, whole, out=np.full(len(hits), np.nan), where=whole > 0)
        for name, (part, whole) in pairs.items()
    }


def auc(positive: np.ndarray, scores: np.ndarray) -> float:
    """Returns the area under the ROC curve by ranks (Mann-Whitney), ties one half; NaN without both sides.

    `positive` [N] bool, `scores` [N], higher meaning more likely positive.
    """
    positives = int(positive.sum())
    negatives = len(positive) - positives
    if not positives or not negatives:
        return float("nan")
    _, member, counts = np.unique(scores, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks = last - (counts - 1) / 2  # from 1; the mean rank of each set of ties
    above = ranks[member[positive]].sum() - positives * (positives + 1) / 2
    return float(above / positives / negatives)


def average_precision(positive: np.ndarray, scores: np.ndarray) -> float:
    """Returns the sum of (recall step) x precision over the thresholds; NaN without both sides.

    Without negatives it would be 1 for any scores, and say nothing. `positive` [N] bool, `scores` [N].
    """
    if positive.all() or not positive.any():
        return float("nan")
    recall, precision, _ = pr_curve(positive, scores)
    return float((np.diff(recall) * precision[1:]).sum())


def roc_curve(positive: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns false positive rate, true positive rate and threshold, one point a distinct score.

    The first point is (0, 0) at threshold infinity; an example counts as positive if its score is at least
    the threshold. NaN where a side is empty. `positive` [N] bool, `scores` [N].
    """
    hits, alarms, thresholds = _cumulated(positive, scores)
    with np.errstate(invalid="ignore"):
        return alarms / alarms[-1], hits / hits[-1], thresholds


def pr_curve(positive: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns recall (rising from 0), precision and threshold, one point a distinct score.

    The first point is (0, 1) at threshold infinity, where nothing is called positive. Recall is NaN without a
    positive example. `positive` [N] bool, `scores` [N].
    """
    hits, alarms, thresholds = _cumulated(positive, scores)
    with np.errstate(invalid="ignore"):
        recall = hits / hits[-1]
        precision = hits / (hits + alarms)
    precision[0] = 1.0
    return recall, precision, thresholds


def _cumulated(positive: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns true and false positives [T + 1] at the T distinct scores, falling, after a start of none."""
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    is_end = np.append(ranked[1:] != ranked[:-1], True)[: len(ranked)]  # the last of each set of ties
    ends = np.flatnonzero(is_end)
    hits = np.cumsum(positive[order], dtype=np.float64)[ends]
    alarms = ends + 1 - hits
    return np.append(0.0, hits), np.append(0.0, alarms), np.append(np.inf, ranked[ends])


def _mean(values: np.ndarray, weights: np.ndarray | None = None) -> float | None:
    """Returns the (weighted) mean over the defined values; None if there is none, or no weight on them."""
    defined = ~np.isnan(values)
    weights = np.ones(len(values)) if weights is None else weights
    whole = weights[defined].sum()
    return float((values[defined] * weights[defined]).sum() / whole) if whole > 0 else None


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
