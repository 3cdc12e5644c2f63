"""What the studies call by these names, to compare with their tables and for nothing else: `study` of a level.

f1_weighted         CT-COV19: TensorFlow Addons' F1Score(average="weighted") on the network's outputs (logits where
                    they are known). Every class that has the highest output counts as named, ties twice, and
                    0 / 0 is 0.
auc_micro_logits    CT-COV19: micro-average AUC over the raw logits, which have one scale within an image only.
f1_macro_harmonic   COVIDx CT: the harmonic mean of macro precision and macro recall; None where a class has none.
accuracy_rounded    ictcf: the predicted class is the first of the highest after the probabilities are rounded to 0
                    or 1, a half to 0; so it is the first class of all where none is above a half.
"""

from collections.abc import Mapping

import numpy as np


def named(outputs: np.ndarray) -> np.ndarray:
    """Returns [N, C] bool: the classes that TensorFlow Addons 0.23 takes an example for, by its outputs [N, C].

    Those of the highest output, unless it is zero ("make sure [0, 0, 0] doesn't become [1, 1, 1]").
    """
    return (outputs == outputs.max(axis=1, keepdims=True, initial=-np.inf)) & (np.abs(outputs) > 1e-12)


def rounded(probabilities: np.ndarray) -> np.ndarray:
    """Returns [N] int: the class once probabilities [N, C] are rounded, as numpy and TensorFlow do, halves to even."""
    return np.round(probabilities).argmax(axis=1) if len(probabilities) else np.zeros(0, np.int64)


def values(
    sums: Mapping[str, np.ndarray], rates: Mapping[str, np.ndarray], auc_micro_logits: np.ndarray
) -> dict[str, np.ndarray]:
    """Returns the numbers described at the top of the file, NaN where undefined, for any leading axes [...].

    Args:
      sums: "confusion" [..., C, C] and "rounded" [...], the right ones by `rounded`; "named" [..., C] by `named`, and
        "named_right" [..., C] by those of the class.
      rates: "precision" and "recall" [..., C], NaN where undefined.
      auc_micro_logits: [...], passed on.
    """
    counts = sums["confusion"].sum(axis=-1)
    n = counts.sum(axis=-1)
    precision, recall = _no_nan(sums["named_right"], sums["named"]), _no_nan(sums["named_right"], counts)
    f1 = _no_nan(2 * precision * recall, precision + recall)
    mean_precision, mean_recall = rates["precision"].mean(axis=-1), rates["recall"].mean(axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return {
            "f1_weighted": (f1 * counts).sum(axis=-1) / n,
            "auc_micro_logits": auc_micro_logits,
            "f1_macro_harmonic": 2 * mean_precision * mean_recall / (mean_precision + mean_recall),
            "accuracy_rounded": np.asarray(sums["rounded"], dtype=np.float64) / n,
        }


def _no_nan(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    part = np.asarray(part, dtype=np.float64)
    return np.divide(part, whole, out=np.zeros_like(part), where=np.asarray(whole) != 0)
