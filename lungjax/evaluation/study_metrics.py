"""Metrics as the reproduced studies define them, for comparison with their tables: the key `study` of a level.

The studies do not calibrate, so these metrics use the logits and softmax(logits). Without logits, as for patients, they
use the (calibrated) probabilities.

f1_weighted         CT-COV19: TensorFlow Addons' F1Score(average="weighted") of the network's outputs (logits if known).
                    All classes tied for the highest output count as predicted, and 0 / 0 is 0.
auc_micro_logits    CT-COV19: micro-average AUC of the raw logits, which are comparable only within an image.
f1_macro_harmonic   COVIDx CT: harmonic mean of macro precision and macro recall; None if undefined for a class.
accuracy_rounded    ictcf: accuracy of the argmax after rounding the probabilities to 0 or 1 (0.5 to 0): the first class
                    if no probability exceeds 0.5.
"""

from collections.abc import Mapping

import numpy as np


def highest(outputs: np.ndarray) -> np.ndarray:
    """Returns [N, C] bool: the classes that TensorFlow Addons 0.23 predicts from outputs [N, C].

    These have the highest output, unless it is zero ("make sure [0, 0, 0] doesn't become [1, 1, 1]").
    """
    return (outputs == outputs.max(axis=1, keepdims=True, initial=-np.inf)) & (np.abs(outputs) > 1e-12)


def argmax_of_rounded(probabilities: np.ndarray) -> np.ndarray:
    """Returns the argmax [N] of rounded probabilities [N, C]; halves round to even, as in NumPy and TensorFlow."""
    return np.round(probabilities).argmax(axis=1) if len(probabilities) else np.zeros(0, np.int64)


def values(
    sums: Mapping[str, np.ndarray], rates: Mapping[str, np.ndarray], auc_micro_logits: np.ndarray
) -> dict[str, np.ndarray]:
    """Returns the metrics of the module's docstring, NaN if undefined; arguments as in `metrics.metrics_from_sums`."""
    counts, n = sums["confusion"].sum(axis=-1), sums["confusion"].sum(axis=(-2, -1))
    hits = np.diagonal(sums["highest"], axis1=-2, axis2=-1)
    precision, recall = ratio(hits, sums["highest"].sum(axis=-2), 0.0), ratio(hits, counts, 0.0)
    f1 = ratio(2 * precision * recall, precision + recall, 0.0)
    mean_precision, mean_recall = rates["precision"].mean(axis=-1), rates["recall"].mean(axis=-1)
    return {
        "f1_weighted": ratio((f1 * counts).sum(axis=-1), n),
        "auc_micro_logits": auc_micro_logits,
        "f1_macro_harmonic": ratio(2 * mean_precision * mean_recall, mean_precision + mean_recall),
        "accuracy_rounded": ratio(sums["rounded"], n),
    }


def ratio(part: np.ndarray, total: np.ndarray, undefined: float = np.nan) -> np.ndarray:
    """Returns part / total, `undefined` where the total is zero."""
    part = np.asarray(part, dtype=np.float64)
    return np.divide(part, total, out=np.full(part.shape, undefined), where=np.asarray(total) != 0)
