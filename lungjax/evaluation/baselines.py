"""Shortcut baselines that a trained network must beat, and warnings where they do well."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from lungjax.data import statistics
from lungjax.data.prepared import Prepared
from lungjax.evaluation.predictions import Predictions

# AUC from which a baseline is mentioned; 0.5 is chance. Class frequencies may differ between sources without a
# shortcut: two sources of equal size give 0.6 with 60 % and 40 % of a class, and 0.7 with 70 % and 30 %.
WARNING_AUC = {"no_lungs": 0.6, "source_only": 0.7}


def source_only(data: Prepared, split: str = "test") -> Predictions | None:
    """Returns predictions from the source of an image alone: the class frequencies of this source in the train split.

    If the source is unknown or missing from train, the frequencies are those of all training images (smoothing: see
    `statistics.frequencies`). Returns None if the training images have fewer than two known sources, or none of
    those of the split.
    """
    train, rows = data.rows("train"), data.rows(split)
    sources, labels, classes = data.columns["source"], data.columns["label"], len(data.classes)
    named = train[sources[train] != ""]
    in_train = np.isin(sources[rows], sources[named])
    if len(np.unique(sources[named])) < 2 or not in_train.any():
        return None

    def guess(labels: np.ndarray, classes: int) -> np.ndarray:
        known, use = (part[labels[part] >= 0] for part in (named, train))
        overall = np.bincount(labels[use], minlength=classes) / max(len(use), 1)
        return np.where(in_train[:, None], statistics.frequencies(sources, labels, known, rows, classes), overall)

    if labels.ndim == 1:
        probabilities = guess(labels, classes)
    else:
        probabilities = np.stack([guess(column, 2)[:, 1] for column in labels.T], axis=1)
    ids, groups = data.columns["file"][rows], data.columns["group"][rows]
    return Predictions(ids, groups, sources[rows], labels[rows], probabilities, data.classes)


def warnings(report: Mapping[str, Any]) -> Iterator[str]:
    """Yields what the baselines say about the network; `report` is the content of report.json.

    It is better than `source_only` if the interval of the gain in AUC (or, without one, the gain) is above zero.
    """
    network = report["test"]["slice"]["auc_macro"]
    reference = "undefined" if network is None else f"{network:.3f}"
    no_lungs, source = (report["controls"].get(name, {}) for name in WARNING_AUC)
    auc = no_lungs.get("auc_macro")
    if auc is not None and auc >= WARNING_AUC["no_lungs"]:
        yield (
            f"With the lungs blacked out, the network still reaches a test AUC of {auc:.3f} ({reference} with them): "
            "it uses image content outside the lungs."
        )
    auc, gain = source.get("auc_macro"), source.get("gain", {})
    low = gain.get("difference") if gain.get("low") is None else gain["low"]
    if low is not None and low <= 0:
        ends = "" if gain["low"] is None else f" ({gain['low']:+.3f} to {gain['high']:+.3f})"
        yield (
            f"The network is no better than the source of an image alone: the test AUC is {reference}, that of the "
            f"source {auc:.3f}, and the difference {gain['difference']:+.3f}{ends}."
        )
    elif auc is not None and auc >= WARNING_AUC["source_only"]:
        yield f"The source of an image alone gives a test AUC of {auc:.3f} (network: {reference})."
