"""All metrics of a level, computed by scikit-learn."""

import numpy as np
from sklearn import metrics as sk

from lungjax.evaluation.predictions import Predictions


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
