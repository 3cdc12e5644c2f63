"""The metrics of a report, computed from labels and probabilities in float64.

Metrics per class compare the class with the rest; TP, FP, FN and TN are from the confusion matrix. The predicted class
is the one with the highest probability, or the first such class if tied.

    precision (positive predictive value)  TP / (TP + FP)      recall (sensitivity)  TP / (TP + FN)
    npv (negative predictive value)        TN / (TN + FN)      specificity           TN / (TN + FP)
    f1                                     2 TP / (2 TP + FP + FN)
    auc                 area under the ROC curve, ties one half (Hanley and McNeil, Radiology 143:29, 1982)
    average_precision   sum over thresholds of (recall step) x precision, without interpolation

`_macro` is the mean over the classes, `_weighted` the mean weighted by the true class counts, and `_micro` pools all
example-class pairs into one two-class problem. `balanced_accuracy` is the mean recall, so it equals `recall_macro`.
`loss` is the mean of -log(probability of the true class) in nats, with probabilities clipped at 2.2e-16. Calibration:

    ece      expected calibration error: mean over the examples of |mean probability - accuracy| of their bin, with 15
             bins of equal width of the highest probability (Guo et al., arXiv 1706.04599; bins include the upper edge)
    brier    mean over the examples of the sum over all classes of (probability - 1 or 0)^2, 0..2 (Brier, Monthly
             Weather Review 78:1, 1950; for two classes, half of this is often reported)

`study` has the metrics of the reproduced studies, without calibration; see `lungjax.evaluation.study_metrics`.

With several findings per image, every metric is the mean over the findings of the metric of "finding or not" among the
images with a known label; precision, recall, specificity, npv, f1, AUC and average precision are those of the finding.
There are no `_weighted`, `_micro` and `study` metrics, and the Brier score is that of the finding, 0..1.

An undefined metric is None: the recall of a class without examples, the precision of a class never predicted, an AUC or
average precision without positives or negatives. Means are over the classes with a defined metric, or None if there
are no such classes. These are scikit-learn's definitions with `zero_division=nan`. A class that is predicted but has no
examples has precision and F1 zero, which lowers their means.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lungjax.data import statistics
from lungjax.evaluation import aggregation, study_metrics
from lungjax.evaluation.predictions import Predictions, finding, take
from lungjax.evaluation.study_metrics import ratio

Level = dict[str, Any]

# Per class, in the report's order; each gets a mean over classes with _macro after its name.
PER_CLASS = ("precision", "recall", "specificity", "npv", "f1", "auc", "average_precision")
OVERALL = ("loss", "ece", "brier", "accuracy", "balanced_accuracy")  # not per class
WEIGHTED = ("precision", "recall", "f1", "auc", "average_precision")
BINS = 15  # of the expected calibration error
MIXED = 2  # a finding that differs between the images of a patient
OWN_COLUMNS = ("aggregate", "fold")  # of `Predictions.extra`


class Addends(NamedTuple):
    """Contributions of the examples to one of the sums that determine all metrics except the areas under curves."""

    shape: tuple[int, ...]  # of the sum
    places: np.ndarray  # [K] int, index into the flattened sum
    rows: np.ndarray  # [K] int, the example
    values: np.ndarray  # [K] float64


def summarize(predictions: Predictions) -> Level:
    """Returns all metrics of the N examples, JSON-ready: one "level" of the report. N may be 0.

    README.md lists the keys. Rates are 0..1, or None if undefined. Raises ValueError, naming the examples,
    if probabilities are NaN, outside 0..1 or don't sum to 1.
    """
    p = predictions
    check_probabilities(p)
    if p.multilabel:
        levels = [summarize(finding(p, i)) for i in range(len(p.classes))]
        level = _to_python(over_findings([_to_arrays(level) for level in levels], p.classes))
        for own, (name, values) in zip(levels, level["per_class"].items(), strict=True):
            values |= {"n": own["per_class"][name]["n"], "known": own["n"]}
        return {"n": len(p), **level}
    scores, c = np.asarray(p.probabilities, dtype=np.float64), len(p.classes)
    is_class = p.labels[:, None] == np.arange(c)  # [N, C]
    sums = {  # float64, also without examples
        name: np.bincount(part.places, part.values, math.prod(part.shape)).reshape(part.shape).astype(np.float64)
        for name, part in addends(p).items()
    }
    areas = {
        "auc": np.array([auc(is_class[:, i], scores[:, i]) for i in range(c)]),
        "average_precision": np.array([average_precision(is_class[:, i], scores[:, i]) for i in range(c)]),
        "auc_micro": auc(is_class.ravel(), scores.ravel()),
        "average_precision_micro": average_precision(is_class.ravel(), scores.ravel()),
        "auc_micro_logits": np.nan if p.logits is None else auc(is_class.ravel(), np.ravel(p.logits)),
    }
    level = _to_python(metrics_from_sums(sums, areas, p.classes))
    confusion = sums["confusion"].astype(int).tolist()
    per_class = {name: {"n": sum(confusion[i]), **level["per_class"][name]} for i, name in enumerate(p.classes)}
    return {"n": len(p), **level, "confusion": confusion, "per_class": per_class}


def addends(predictions: Predictions) -> dict[str, Addends]:
    """Returns the addends of each sum in `metrics_from_sums`."""
    p = predictions
    labels, scores, c = p.labels, np.asarray(p.probabilities, dtype=np.float64), len(p.classes)
    rows, zeros, ones = np.arange(len(p)), np.zeros(len(p), np.int64), np.ones(len(p))
    top = scores[rows, p.predicted]
    loss = -np.log(np.maximum(scores[rows, labels], np.finfo(np.float64).eps))
    brier = ((scores - (labels[:, None] == np.arange(c))) ** 2).sum(axis=1)
    outputs = raw = scores
    if p.logits is not None:
        outputs = np.asarray(p.logits, dtype=np.float64)
        powers = np.exp(outputs - outputs.max(axis=1, keepdims=True))
        raw = powers / powers.sum(axis=1, keepdims=True)
    example, highest = np.nonzero(study_metrics.highest(outputs))
    return {
        "confusion": Addends((c, c), labels * c + p.predicted, rows, ones),
        "highest": Addends((c, c), labels[example] * c + highest, example, np.ones(len(example))),
        "gaps": Addends((BINS,), confidence_bins(top), rows, top - (p.predicted == labels)),
        "loss": Addends((), zeros, rows, loss),
        "brier": Addends((), zeros, rows, brier),
        "rounded": Addends((), zeros, rows, (study_metrics.argmax_of_rounded(raw) == labels).astype(np.float64)),
    }


def confidence_bins(confidence: np.ndarray) -> np.ndarray:
    """Returns the bin index [N] of each confidence among BINS equal bins of 0..1, which include their upper edge."""
    return np.searchsorted(np.arange(1, BINS) / BINS, confidence, side="left")


def metrics_from_sums(sums: Mapping[str, Any], areas: Mapping[str, Any], classes: Sequence[str]) -> Level:
    """Returns the metrics of a level except `n` and `confusion`, NaN where undefined, for any leading axes [...].

    Used for a set of examples and for the draws of a bootstrap.

    Args:
      sums: over the examples: "confusion" [..., C, C], counts by true and predicted class; "highest" [..., C, C], the
        same with `study_metrics.highest` as prediction; "gaps" [..., BINS], highest probability - (1 if correct else
        0) per bin; "loss" and "brier" [...]; "rounded" [...], correct by `study_metrics.argmax_of_rounded`.
      areas: "auc" and "average_precision" [..., C]; "auc_micro", "average_precision_micro", "auc_micro_logits" [...].
      classes: C names.
    """
    confusion = sums["confusion"]
    counts = confusion.sum(axis=-1)
    n = counts.sum(axis=-1)
    rates = {**confusion_rates(confusion), "auc": areas["auc"], "average_precision": areas["average_precision"]}
    level: Level = {
        "loss": ratio(sums["loss"], n),
        "ece": ratio(np.abs(sums["gaps"]).sum(axis=-1), n),
        "brier": ratio(sums["brier"], n),
        "accuracy": ratio(np.trace(confusion, axis1=-2, axis2=-1), n),
        "balanced_accuracy": _mean(rates["recall"]),
    }
    for name in PER_CLASS:
        level[f"{name}_macro"] = _mean(rates[name])
        if name in WEIGHTED:
            level[f"{name}_weighted"] = _mean(rates[name], counts)
    level["auc_micro"] = areas["auc_micro"]
    level["average_precision_micro"] = areas["average_precision_micro"]
    level["per_class"] = {name: {rate: rates[rate][..., i] for rate in PER_CLASS} for i, name in enumerate(classes)}
    level["study"] = study_metrics.values(sums, rates, areas["auc_micro_logits"])
    return level


def over_findings(levels: Sequence[Level], names: Sequence[str]) -> Level:
    """Returns the level of findings, given those of the problems "finding or not"; NaN where undefined."""
    per_class = {name: level["per_class"][name] for name, level in zip(names, levels, strict=True)}
    for name, level in zip(names, levels, strict=True):
        per_class[name] = {k: per_class[name][k] for k in PER_CLASS} | {k: level[k] for k in OVERALL}
        per_class[name]["brier"] = level["brier"] / 2  # of the finding, not also of its absence
    means = {k: _mean(np.stack([values[k] for values in per_class.values()], axis=-1)) for k in (*OVERALL, *PER_CLASS)}
    return {k: means[k] for k in OVERALL} | {f"{k}_macro": means[k] for k in PER_CLASS} | {"per_class": per_class}


def numbers(level: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns a level's metrics by dotted name, such as "per_class.COV.recall", without counts and `intervals`."""
    flat: dict[str, Any] = {}
    for name, value in level.items():
        if isinstance(value, Mapping):
            flat |= numbers(value, f"{prefix}{name}.") if prefix or name != "intervals" else {}
        elif name not in ("n", "known", "confusion", "mixed_groups"):
            flat[prefix + name] = value
    return flat


def report_levels(predictions: Predictions) -> dict[str, Any]:
    """Returns {"slice": metrics, "patient": metrics and "mixed_groups", "subgroups": {column: {value: metrics}}}.

    `slice` is over all examples, `patient` over the patients of `by_patient`; `patients` of a subgroup counts its
    patients. Raises ValueError as `summarize` does.
    """
    groups = {
        column: {
            value: {"patients": len(np.unique(patient_keys(part)))} | summarize(part) for value, part in parts.items()
        }
        for column, parts in subgroups(predictions).items()
    }
    return {**unit_levels(predictions), "subgroups": groups}


def subgroups(predictions: Predictions) -> dict[str, dict[str, Predictions]]:
    """Returns the predictions by value of each column: "source", if any is known, and the kept columns.

    A kept column needs 2 to MAX_CATEGORIES `statistics.categories`; columns that lungjax adds are not subgroups.
    """
    p = predictions
    kept = {name: statistics.categories(values) for name, values in p.extra.items() if name not in OWN_COLUMNS}
    columns = {"source": np.where(p.sources == "", statistics.UNKNOWN, p.sources)} if (p.sources != "").any() else {}
    columns |= {name: v for name, v in kept.items() if 2 <= len(np.unique(v)) <= statistics.MAX_CATEGORIES}
    return {
        name: {str(value): take(p, np.flatnonzero(values == value)) for value in np.unique(values)}
        for name, values in columns.items()
    }


def unit_levels(predictions: Predictions) -> dict[str, Any]:
    """Returns the levels `slice` and `patient` of `report_levels`."""
    patients, mixed = by_patient(predictions)
    return {"slice": summarize(predictions), "patient": summarize(patients) | {"mixed_groups": mixed}}


def flat_levels(predictions: Predictions) -> dict[str, float | None]:
    """Returns the metrics of the slice and patient levels that are not per class, such as "slice.auc_macro"."""
    return {name: value for name, value in numbers(unit_levels(predictions)).items() if name.count(".") == 1}


def by_patient(predictions: Predictions) -> tuple[Predictions, int]:
    """Returns one prediction per group, and the number of groups excluded because of mixed labels.

    A finding that is present in some images of a group and absent in others is unknown, and the group remains.
    Probabilities are those of `aggregation`, by the rule in the column "aggregate" of the group's first example, or
    means. Ids and groups are the group's name, or the id of an example without a group; the source is "several" if it
    differs. Rows are sorted by name, without extra columns. Raises ValueError for invalid probabilities.
    """
    p = predictions
    check_probabilities(p)
    keys, first, member = np.unique(patient_keys(p), return_index=True, return_inverse=True)
    n = len(keys)

    def varies(values: np.ndarray) -> np.ndarray:
        return np.bincount(member, weights=values != values[first][member], minlength=n) > 0

    def of_patients(finding: np.ndarray) -> np.ndarray:
        present, absent = (np.bincount(member, weights=finding == value, minlength=n) > 0 for value in (1, 0))
        return np.where(present == absent, np.where(present, MIXED, -1), present)

    rules = p.extra.get("aggregate", np.full(len(p), "mean"))[first]
    probabilities = np.empty((n, len(p.classes)))
    for rule in np.unique(rules):  # the folds of a cross-validation may have several
        which = np.flatnonzero(rules == rule)
        rows = np.isin(member, which)
        own = np.searchsorted(which, member[rows])
        args = p.probabilities[rows], p.classes, str(rule), own
        probabilities[which] = aggregation.aggregate(*args, exclusive=not p.multilabel)
    labels = p.labels[first]
    if p.multilabel:
        labels = np.stack([of_patients(column) for column in p.labels.T], axis=1)
        mixed, uniform = (labels == MIXED).any(axis=1), np.ones(n, bool)
        labels = np.where(labels == MIXED, -1, labels)
    else:
        mixed = varies(p.labels)
        uniform = ~mixed
    names = np.where(p.groups == "", p.ids, p.groups)[first][uniform]
    patients = Predictions(
        ids=names,
        groups=names,
        sources=np.where(varies(p.sources), "several", p.sources[first])[uniform],
        labels=labels[uniform],
        probabilities=probabilities[uniform],
        classes=p.classes,
    )
    return patients, int(mixed.sum())


def patient_keys(predictions: Predictions) -> np.ndarray:
    """Returns one key per example, [N] str, equal for examples from the same patient."""
    p = predictions
    # The prefix distinguishes groups from ids: id "7" without a group is not patient "7".
    return np.where(p.groups == "", np.char.add("1", p.ids), np.char.add("0", p.groups))


def check_probabilities(predictions: Predictions) -> None:
    """Raises ValueError with the names of the examples whose rows are not probabilities."""
    p = np.asarray(predictions.probabilities, dtype=np.float64)
    for what, bad in (
        ("are NaN or infinite", ~np.isfinite(p).all(axis=1)),
        ("are outside 0..1", ((p < -1e-6) | (p > 1 + 1e-6)).any(axis=1)),
        ("don't sum to 1", (np.abs(p.sum(axis=1) - 1) > 1e-3) & (not predictions.multilabel)),
    ):
        if bad.any():
            ids = predictions.ids[bad]
            names = ", ".join(ids[:5]) + (f" and {len(ids) - 5} more" if len(ids) > 5 else "")
            raise ValueError(f"probabilities of {len(ids)} of {len(p)} examples {what}: {names}; did training diverge?")


def confusion_rates(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """Returns precision, recall, specificity, npv and f1 [..., C] of counts [..., true class, predicted class]."""
    hits = np.diagonal(confusion, axis1=-2, axis2=-1).astype(np.float64)
    true, predicted, n = confusion.sum(axis=-1), confusion.sum(axis=-2), confusion.sum(axis=(-2, -1))[..., None]
    true_negative = n - true - predicted + hits
    return {
        "precision": ratio(hits, predicted),
        "recall": ratio(hits, true),
        "specificity": ratio(true_negative, n - true),
        "npv": ratio(true_negative, n - predicted),
        "f1": ratio(2 * hits, true + predicted),
    }


def auc(positive: np.ndarray, scores: np.ndarray) -> float:
    """Returns the area under the ROC curve of `scores` [N], ties as half; NaN if `positive`, bool [N], is constant."""
    from scipy import stats  # here: it takes a second to import

    p, n = positive.sum(), (~positive).sum()
    return float(ratio(stats.rankdata(scores)[positive].sum() - p * (p + 1) / 2, p * n))


def average_precision(positive: np.ndarray, scores: np.ndarray) -> float:
    """Returns the sum of (recall step) x precision of `scores` [N]; NaN if `positive`, bool [N], is constant."""
    from sklearn.metrics import average_precision_score  # here: it takes two seconds to import

    defined = positive.any() and not positive.all()
    return float(average_precision_score(positive, scores)) if defined else float("nan")


def _mean(values: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Returns the (weighted) mean of the defined values along the last axis; NaN if the weights sum to zero."""
    defined = ~np.isnan(values)
    weights = np.where(defined, 1.0 if weights is None else weights, 0.0)
    return ratio((np.where(defined, values, 0.0) * weights).sum(axis=-1), weights.sum(axis=-1))


def _to_arrays(value: Any) -> Any:
    """Returns the inverse of `_to_python` for the metrics of a level."""
    if isinstance(value, Mapping):
        return {name: _to_arrays(inner) for name, inner in value.items()}
    return np.asarray(np.nan if value is None else value, np.float64)


def _to_python(value: Any) -> Any:
    """Returns the tree with Python floats, and None for NaN."""
    if isinstance(value, Mapping):
        return {name: _to_python(inner) for name, inner in value.items()}
    return None if np.isnan(value) else float(value)
