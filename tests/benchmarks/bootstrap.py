"""Compares the CPU time of 95 % intervals for all metrics with that of a scikit-learn loop over resampled rows.

OPENBLAS_NUM_THREADS=1 python -m tests.benchmarks.bootstrap [--draws=2000]

The loop runs a few draws and its time is scaled up. tests/evaluation/test_bootstrap.py compares the intervals.
"""

import numpy as np

from lungjax.evaluation import bootstrap
from lungjax.evaluation.predictions import Predictions
from tests.benchmarks import harness
from tests.random_predictions import make_predictions
from tests.scikit_metrics import by_scikit_learn

CASES = ((500, 500), (500, 60), (35_000, 35_000), (35_000, 700))  # examples, patients
CLASSES, PEER_DRAWS = 3, 5


def make(examples: int, patients: int) -> Predictions:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, examples)
    logits = rng.normal(size=(examples, CLASSES)).astype(np.float32)
    logits[np.arange(examples), labels] += 1.5
    numbers = np.arange(examples) if patients == examples else rng.integers(0, patients, examples)
    return make_predictions(labels, np.exp(logits.astype(np.float64)), [f"p{i}" for i in numbers], logits=logits)


def loop(p: Predictions) -> None:
    """Computes all metrics for PEER_DRAWS draws of patients."""
    names, patient = np.unique(p.groups, return_inverse=True)
    for counts in np.concatenate(list(bootstrap.resample_patients(len(names), PEER_DRAWS, 64)), axis=1).T:
        by_scikit_learn(p, np.repeat(np.arange(len(p)), counts.astype(int)[patient]))


def main() -> None:
    draws = harness.parse(__doc__, draws=2000).draws
    print(harness.header("examples", "patients", "metrics", "lungjax, s", "scikit-learn in a loop, s", "ratio"))
    for examples, patients in CASES:
        p = make(examples, patients)
        _, seconds = harness.timed(lambda p=p: bootstrap.intervals(p, draws))
        _, peer_seconds = harness.timed(lambda p=p: loop(p))
        peer_seconds *= draws / PEER_DRAWS
        cells = (f"{examples:,}", f"{patients:,}", len(bootstrap.intervals(p, 10)), f"{seconds:.2f}")
        print(harness.row(*cells, f"{peer_seconds:.0f}", f"{peer_seconds / seconds:.0f}"), flush=True)


if __name__ == "__main__":
    main()
