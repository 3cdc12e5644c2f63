"""Random predictions for tests of metrics, reports and tables."""

import numpy as np

from lungjax.evaluation.predictions import Predictions


def guesses(labels, classes, seed=0, skill=1.5, slices=3, tag="t", sources=("",)) -> Predictions:
    """Predictions that are better the higher `skill`; `slices` successive images are of one patient."""
    rng, n = np.random.default_rng(seed), len(labels)
    logits = (rng.normal(size=(n, len(classes))) + skill * np.eye(len(classes))[labels]).astype(np.float32)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    ids = np.array([f"{tag}_{i:03}.png" for i in range(n)])
    groups = np.array([f"{tag}{i // slices}" for i in range(n)])
    return Predictions(ids, groups, rng.choice(sources, n), np.asarray(labels), probabilities, classes, logits=logits)
