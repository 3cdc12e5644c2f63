"""Random predictions, predictions from labels and scores, and their metrics, computed by scikit-learn."""

import numpy as np
from sklearn import metrics as sk

from lungjax.evaluation.predictions import Predictions


def make_predictions(labels, scores, groups=None, sources=None, logits=None, ids=None) -> Predictions:
    """Returns predictions whose probabilities are `scores` [N, C], normalized; classes are a, b, c, ..."""
    scores = np.asarray(scores, np.float64)
    n, c = scores.shape
    return Predictions(
        ids=np.array([f"i{i}" for i in range(n)], np.str_) if ids is None else ids,
        groups=np.full(n, "") if groups is None else np.asarray(groups, np.str_),
        sources=np.full(n, "") if sources is None else np.asarray(sources, np.str_),
        labels=np.asarray(labels, np.int64),
        probabilities=scores / scores.sum(axis=1, keepdims=True) if n else scores,
        classes=tuple("abcdefg"[:c]),
        logits=logits,
    )


def random_predictions(n=90, patients=25, seed=0, ties=True, spread=1.2) -> Predictions:
    """Returns predictions of three classes, of which c is rare.

    Labels are the same for every seed; some examples have no patient.
    """
    rng, fixed = np.random.default_rng(seed), np.random.default_rng(99)
    patient = fixed.integers(0, patients, n)
    labels = np.where(fixed.random(patients) < 0.08, 2, np.arange(patients) % 2)[patient]
    logits = rng.normal(size=(n, 3)).astype(np.float32)
    logits[np.arange(n), labels] += spread
    if ties:
        logits = np.round(logits * 1.5)
    groups = np.where(np.arange(n) % 11 == 0, "", np.array([f"p{i}" for i in patient]))
    return make_predictions(labels, np.exp(logits.astype(np.float64)), groups, logits=logits)


def random_findings(seed=0, n=240, patients=60, names=("edema", "mass", "no_ne"), unknown=0.2) -> Predictions:
    """Returns predictions of findings, of which a fifth is unknown; labels are the same for every seed."""
    fixed, rng = np.random.default_rng(5), np.random.default_rng(seed)
    patient = fixed.integers(0, patients, n)
    labels = (fixed.random((patients, len(names))) < (0.5, 0.3, 0.7)).astype(int)[patient]
    labels[fixed.random(labels.shape) < unknown] = -1
    logits = (rng.normal(size=labels.shape) + 1.5 * (labels == 1) - 0.5).astype(np.float32)
    ids = np.array([f"{i}.png" for i in range(n)])
    groups = np.array([f"p{i}" for i in patient])
    return Predictions(ids, groups, ids, labels, 1 / (1 + np.exp(-logits)), names, {"view": ids}, logits)


def guesses(labels, classes, seed=0, skill=1.5, slices=3, tag="t", sources=("",)) -> Predictions:
    """Returns predictions that improve with `skill`; every `slices` successive images belong to one patient."""
    rng, n = np.random.default_rng(seed), len(labels)
    logits = (rng.normal(size=(n, len(classes))) + skill * np.eye(len(classes))[labels]).astype(np.float32)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    ids = np.array([f"{tag}_{i:03}.png" for i in range(n)])
    groups = np.array([f"{tag}{i // slices}" for i in range(n)])
    return Predictions(ids, groups, rng.choice(sources, n), np.asarray(labels), probabilities, classes, logits=logits)


def by_scikit_learn(p: Predictions, rows: np.ndarray | slice = slice(None)) -> dict[str, float]:
    """Returns all metrics of a level over `rows`, NaN where they are undefined."""
    labels, s = p.labels[rows], p.probabilities[rows]
    z = s if p.logits is None else p.logits[rows]
    predicted, c = s.argmax(axis=1), len(p.classes)
    one_hot = np.eye(c)[labels]
    two_sided = [0 < one_hot[:, i].sum() < len(labels) for i in range(c)]
    shares = one_hot.mean(axis=0)
    result = {"accuracy": (predicted == labels).mean(), "loss": sk.log_loss(labels, s, labels=range(c))}
    result["brier"] = ((s - one_hot) ** 2).sum(axis=1).mean()
    place = np.ceil(s.max(axis=1) * 15 - 1e-12)
    result["ece"] = sum(abs((s.max(axis=1) - (predicted == labels))[place == b].sum()) for b in range(16)) / len(labels)
    each = sk.precision_recall_fscore_support(labels, predicted, labels=range(c), zero_division=np.nan)
    rates = dict(zip(("precision", "recall", "f1"), each, strict=False))
    for name, score in (("auc", sk.roc_auc_score), ("average_precision", sk.average_precision_score)):
        rates[name] = np.array([score(one_hot[:, i], s[:, i]) if two_sided[i] else np.nan for i in range(c)])
        result[f"{name}_micro"] = score(one_hot.ravel(), s.ravel())
    rest = [
        sk.precision_recall_fscore_support(labels != i, predicted != i, labels=[True], zero_division=np.nan)
        for i in range(c)
    ]
    rates["npv"], rates["specificity"] = (np.array([r[k][0] for r in rest]) for k in (0, 1))
    for name, values in rates.items():
        result |= {f"per_class.{p.classes[i]}.{name}": values[i] for i in range(c)}
        result[f"{name}_macro"] = np.nanmean(values)
        if name not in ("npv", "specificity"):
            defined = ~np.isnan(values)
            result[f"{name}_weighted"] = np.average(values[defined], weights=shares[defined])
    result["balanced_accuracy"] = result["recall_macro"]
    highest = (z == z.max(axis=1, keepdims=True)) & (z != 0)  # TensorFlow Addons: all classes of a tie
    result["study.f1_weighted"] = sk.f1_score(one_hot, highest, average="weighted", zero_division=0)
    logits_auc = np.nan if p.logits is None else sk.roc_auc_score(one_hot.ravel(), z.ravel())
    result["study.auc_micro_logits"] = logits_auc
    precision, recall = rates["precision"].mean(), rates["recall"].mean()
    result["study.f1_macro_harmonic"] = 2 * precision * recall / (precision + recall)
    result["study.accuracy_rounded"] = (np.round(s).argmax(axis=1) == labels).mean()
    return result
