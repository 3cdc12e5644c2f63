"""Processor time of 95 % intervals of all metrics, and of a loop over scikit-learn that resamples rows.

    OPENBLAS_NUM_THREADS=1 python tests/benchmarks/bootstrap.py [--draws=2000]

The loop computes fewer metrics than lungjax, with the same draws; its intervals must agree, its time is scaled.
"""

import tracemalloc

import numpy as np
from sklearn import metrics as sk

from lungjax.evaluation import bootstrap
from lungjax.evaluation.predictions import Predictions
from tests.benchmarks import harness
from tests.random_predictions import make_predictions

CASES = ((500, 500), (500, 60), (35_000, 35_000), (35_000, 700))  # examples, patients
CLASSES, PEER_DRAWS = 3, 5


def make(examples: int, patients: int) -> Predictions:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, examples)
    logits = rng.normal(size=(examples, CLASSES)).astype(np.float32)
    logits[np.arange(examples), labels] += 1.5
    numbers = np.arange(examples) if patients == examples else rng.integers(0, patients, examples)
    return make_predictions(labels, np.exp(logits.astype(np.float64)), [f"p{i}" for i in numbers], logits=logits)


def by_loop(p: Predictions, draws: int) -> dict[str, tuple[float, float]]:
    """Intervals by a plain loop."""
    names, member = np.unique(p.groups, return_inverse=True)
    rows_of = np.split(np.argsort(member, kind="stable"), np.cumsum(np.bincount(member))[:-1])
    probabilities = p.probabilities.astype(np.float64)
    values_of: dict[str, list[float]] = {}
    for counts in np.concatenate(list(bootstrap.resample_patients(len(names), draws, 0, 64)), axis=1).T.astype(int):
        rows = np.concatenate([rows_of[i] for i in np.repeat(np.arange(len(names)), counts)])
        labels, s = p.labels[rows], probabilities[rows]
        predicted, one_hot = s.argmax(axis=1), np.eye(CLASSES)[labels]
        scores = sk.precision_recall_fscore_support(labels, predicted, average="macro", zero_division=0)
        values = dict(zip(("precision_macro", "recall_macro", "f1_macro"), scores, strict=False))
        values["accuracy"] = sk.accuracy_score(labels, predicted)
        values["loss"] = sk.log_loss(labels, s / s.sum(axis=1, keepdims=True))
        values["brier"] = ((s - one_hot) ** 2).sum(axis=1).mean()
        for average in ("macro", "micro"):
            values[f"auc_{average}"] = sk.roc_auc_score(one_hot, s, average=average)
            values[f"average_precision_{average}"] = sk.average_precision_score(one_hot, s, average=average)
        for name, value in values.items():
            values_of.setdefault(name, []).append(value)
    return {name: tuple(np.percentile(values, [2.5, 97.5])) for name, values in values_of.items()}


def main() -> None:
    draws = harness.parse(__doc__, draws=2000).draws
    heads = ("examples", "patients", "metrics", "lungjax, s", "memory, MB", "loop over scikit-learn, s", "ratio")
    print(harness.header(*heads))
    for examples, patients in CASES:
        p = make(examples, patients)
        _, seconds = harness.timed(lambda p=p: bootstrap.intervals(p, draws))
        tracemalloc.start()
        intervals = bootstrap.intervals(p, min(draws, 300))
        memory = tracemalloc.get_traced_memory()[1] / 2**20
        tracemalloc.stop()
        expected: dict[str, tuple[float, float]] = {}
        _, peer_seconds = harness.timed(lambda p=p, expected=expected: expected.update(by_loop(p, PEER_DRAWS)))
        same = bootstrap.intervals(p, PEER_DRAWS)
        for name, ends in expected.items():
            np.testing.assert_allclose(same[name], ends, atol=1e-6, err_msg=name)
        peer_seconds *= draws / PEER_DRAWS
        cells = (f"{examples:,}", f"{patients:,}", len(intervals), f"{seconds:.2f}", f"{memory:.0f}")
        print(harness.row(*cells, f"{peer_seconds:.0f}", f"{peer_seconds / seconds:.0f}"), flush=True)


if __name__ == "__main__":
    main()
