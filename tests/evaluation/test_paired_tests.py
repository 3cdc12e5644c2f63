"""DeLong's and McNemar's tests and Holm's correction against published examples, and a direct form of Obuchowski's."""

import numpy as np
import pytest
from random_predictions import make_predictions, random_predictions

from lungjax.evaluation import metrics, paired_tests

# Albumin, total protein, Krebs-Goplerud score, and benefit of surgery of 43 patients with ovarian cancer: the example
# of DeLong et al. (1988), as in the documentation of PROC LOGISTIC of SAS.
SURGERY = """
3.0 5.8 10 0 3.2 6.3 5 1 3.9 6.8 3 1 2.8 4.8 6 0 3.2 5.8 3 1 0.9 4.0 5 0 2.5 5.7 8 0 1.6 5.6 5 1 3.8 5.7 5 1
3.7 6.7 6 1 3.2 5.4 4 1 3.8 6.6 6 1 4.1 6.6 5 1 3.6 5.7 5 1 4.3 7.0 4 1 3.6 6.7 4 0 2.3 4.4 6 1 4.2 7.6 4 0
4.0 6.6 6 0 3.5 5.8 6 1 3.8 6.8 7 1 3.0 4.7 8 0 4.5 7.4 5 1 3.7 7.4 5 1 3.1 6.6 6 1 4.1 8.2 6 1 4.3 7.0 5 1
4.3 6.5 4 1 3.2 5.1 5 1 2.6 4.7 6 1 3.3 6.8 6 0 1.7 4.0 7 0 3.7 6.1 5 1 3.3 6.3 7 1 4.2 7.7 6 1 3.5 6.2 5 1
2.9 5.7 9 0 2.1 4.8 7 1 2.8 6.2 8 0 4.0 7.0 7 1 3.3 5.7 6 1 3.7 6.9 5 1 3.6 6.6 5 1
"""


def obuchowski(positive, a, b, patients):
    """Returns the difference of the AUCs and its variance, term by term as in the paper (Biometrics 53:567)."""
    names, m, n = np.unique(patients), positive.sum(), (~positive).sum()
    areas, xs, ys = [], [], []
    for scores in (a, b):
        psi = np.array([[(x > y) + (x == y) / 2 for y in scores[~positive]] for x in scores[positive]])
        areas.append(psi.mean())
        xs.append(np.array([(psi.mean(axis=1) - psi.mean())[patients[positive] == k].sum() for k in names]))
        ys.append(np.array([(psi.mean(axis=0) - psi.mean())[patients[~positive] == k].sum() for k in names]))
    i10, i01, i = len(set(patients[positive])), len(set(patients[~positive])), len(names)

    def covariance(r, s):
        s10, s01 = i10 / (i10 - 1) / m * (xs[r] @ xs[s]), i01 / (i01 - 1) / n * (ys[r] @ ys[s])
        s11 = i / (i - 1) * (xs[r] @ ys[s] + xs[s] @ ys[r])
        return s10 / m + s01 / n + s11 / (m * n)

    return areas[1] - areas[0], covariance(0, 0) + covariance(1, 1) - 2 * covariance(0, 1)


def test_delong_on_the_published_example():
    albumin, protein, score, benefit = np.array(SURGERY.split(), float).reshape(-1, 4).T
    for scores, difference, error, low, high, chi_square, p in (
        (albumin, 0.0108, 0.0953, -0.1761, 0.1976, 0.0127, 0.9102),  # the output of SAS
        (protein, -0.0780, 0.1046, -0.2830, 0.1271, 0.5554, 0.4561),
    ):
        test = paired_tests.delong(benefit == 1, -score, scores, np.arange(43))
        numbers = (test.difference, test.error, *test.interval, (test.difference / test.error) ** 2, test.p)
        assert numbers == pytest.approx((difference, error, low, high, chi_square, p), abs=6e-5)


def test_delong_clustered():
    a, b = random_predictions(150, 40, seed=1), random_predictions(150, 40, seed=2, spread=2.0)
    mixed = np.array([f"m{i % 40}" for i in range(150)])  # patients with images of several classes
    for i, name in enumerate(a.classes[:2]):
        positive, scores = a.labels == i, (a.probabilities[:, i], b.probabilities[:, i])
        for patients in (mixed, metrics.patient_keys(a)):
            test = paired_tests.delong(positive, *scores, patients)
            assert (test.difference, test.error**2) == pytest.approx(obuchowski(positive, *scores, patients))
        assert paired_tests.test(a, b, f"slice.per_class.{name}.auc") == test
    # The same images several times add no information.
    rows = np.tile(np.arange(150), 3)
    ignored, copies = (
        paired_tests.delong(positive[rows], *(s[rows] for s in scores), keys)
        for keys in (np.arange(450), patients[rows])
    )
    assert copies.error == pytest.approx(test.error) and ignored.error < 0.7 * test.error
    same = paired_tests.delong(positive, scores[0], scores[0], patients)
    assert (same.difference, same.error, same.p) == (0, 0, 1)
    assert paired_tests.delong(np.arange(150) < 4, *scores, np.arange(150)) is None  # too few patients


def test_mcnemar():
    # Published values of the exact test (test suite of statsmodels, from vassarstats.net).
    published = {(121, 59): 0.000004, (70, 59): 0.378688, (80, 59): 0.089452, (30, 60): 0.00206, (10, 30): 0.002221}
    for (only_a, only_b), p in (published | {(10, 10): 1, (0, 0): 1}).items():
        assert paired_tests.McNemar(only_a, only_b, 200).p == pytest.approx(p, abs=6e-7)
    labels, called = np.array([0, 0, 0, 0, 1, 1, 2, 2]), ([0, 0, 1, 1, 1, 0, 2, 0], [0, 1, 1, 2, 1, 1, 0, 2])
    a, b = (make_predictions(labels, 0.1 + np.eye(3)[c]) for c in called)
    for name, expected in (
        ("accuracy", (2, 2, 8)),
        ("per_class.a.recall", (1, 0, 4)),
        ("per_class.b.recall", (0, 1, 2)),
        ("per_class.a.specificity", (1, 2, 4)),
        ("per_class.c.specificity", (1, 0, 6)),
    ):
        assert paired_tests.test(a, b, f"slice.{name}") == expected, name
    assert paired_tests.test(a, b, "slice.loss") is paired_tests.test(a, b, "slice.study.accuracy_rounded") is None
    # Pairs are patients if these have several images.
    groups = ["p", "p", "q", "q", "r", "r", "s", "s"]
    a, b = (make_predictions(labels, 0.1 + np.eye(3)[c], groups) for c in called)
    assert paired_tests.test(a, b, "slice.accuracy") is None
    assert paired_tests.test(a, b, "patient.accuracy").pairs == 4


def test_holm():
    assert paired_tests.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert paired_tests.holm([0.6, 0.5]) == [1, 1] and paired_tests.holm([]) == []
