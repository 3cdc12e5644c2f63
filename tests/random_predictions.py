"""Random predictions, and predictions from labels and scores."""

import numpy as np

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


def guesses(labels, classes, seed=0, skill=1.5, slices=3, tag="t", sources=("",)) -> Predictions:
    """Returns predictions that improve with `skill`; every `slices` successive images belong to one patient."""
    rng, n = np.random.default_rng(seed), len(labels)
    logits = (rng.normal(size=(n, len(classes))) + skill * np.eye(len(classes))[labels]).astype(np.float32)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    ids = np.array([f"{tag}_{i:03}.png" for i in range(n)])
    groups = np.array([f"{tag}{i // slices}" for i in range(n)])
    return Predictions(ids, groups, rng.choice(sources, n), np.asarray(labels), probabilities, classes, logits=logits)
