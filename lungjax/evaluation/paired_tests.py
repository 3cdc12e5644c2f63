"""Significance tests of two networks on the same examples: DeLong's, McNemar's, and Holm's correction.

DeLong's test compares two areas under the ROC curve (DeLong et al., Biometrics 44:837, 1988). Its variance is that of
Obuchowski (Biometrics 53:567, 1997), which allows for the correlation of a patient's images and equals DeLong's if each
patient has one. McNemar's test compares two proportions, such as accuracy or sensitivity (Psychometrika 12:153, 1947).
It is exact (binomial), and its pairs must be independent: with several images per patient, use patients.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import special

from lungjax.evaluation import bootstrap, metrics
from lungjax.evaluation.predictions import Predictions, finding


class DeLong(NamedTuple):
    """Difference AUC(B) - AUC(A) and its standard error."""

    difference: float
    error: float

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the difference, from the normal distribution."""
        half = float(special.ndtri(0.975)) * self.error
        return self.difference - half, self.difference + half

    @property
    def p(self) -> float:
        """Two-sided p-value."""
        return float(2 * special.ndtr(-abs(self.difference) / self.error)) if self.error else 1.0


class McNemar(NamedTuple):
    """Number of pairs, and of those in which only A, or only B, is correct."""

    only_a: int
    only_b: int
    pairs: int

    @property
    def p(self) -> float:
        """Exact two-sided p-value."""
        from scipy import stats  # here: it takes a second to import

        n = self.only_a + self.only_b
        return float(stats.binomtest(self.only_a, n).pvalue) if n else 1.0


def test(a: Predictions, b: Predictions, metric: str) -> DeLong | McNemar | None:
    """Returns the test of a metric, such as "slice.per_class.COVID.auc", of aligned predictions, or None.

    DeLong's test is for the AUC of a class, and `auc_macro` of two classes, which have the same AUC; McNemar's for
    accuracy, and recall and specificity of a class, but not per slice if patients have several. Other metrics, such as
    means over findings, and classes without examples have no test.
    """
    unit, _, name = metric.partition(".")
    if unit == "patient":
        a, b = metrics.by_patient(a)[0], metrics.by_patient(b)[0]
    kind, _, rate = name.rpartition(".")
    if kind and not kind.startswith("per_class."):
        return None
    i = a.classes.index(kind.removeprefix("per_class.")) if kind else 0
    if a.multilabel:
        if not kind:
            return None
        a, b, i = finding(a, i), finding(b, i), 1
    of_class, patients = a.labels == i, metrics.patient_keys(a)
    if rate == "auc" or (rate == "auc_macro" and len(a.classes) == 2):
        return delong(of_class, a.probabilities[:, i], b.probabilities[:, i], patients)
    rows = {"accuracy": np.ones(len(a), bool), "recall": of_class, "specificity": ~of_class}.get(rate)
    if rows is None or not rows.any() or len(np.unique(patients)) < len(a):
        return None
    in_a, in_b = ((p.predicted != i if rate == "specificity" else p.predicted == p.labels)[rows] for p in (a, b))
    return McNemar(int((in_a & ~in_b).sum()), int((in_b & ~in_a).sum()), int(rows.sum()))


def delong(positive: np.ndarray, a: np.ndarray, b: np.ndarray, patients: np.ndarray) -> DeLong | None:
    """Returns the test of AUC(b) - AUC(a) for scores `a` and `b` [N], where `positive` is bool [N].

    `patients` [N] are their keys. Returns None if fewer than `bootstrap.MIN_PATIENTS` have positive, or negative,
    examples, or if the estimated variance is not positive although the AUCs differ.
    """
    member = np.unique(patients, return_inverse=True)[1]
    counts = [len(np.unique(member[side])) for side in (positive, ~positive)]
    if min(counts) < bootstrap.MIN_PATIENTS:
        return None
    (auc_a, placed_a), (auc_b, placed_b) = (_placements(positive, scores) for scores in (a, b))
    difference = auc_b - auc_a
    excess = placed_b - placed_a - difference
    x, y = (np.bincount(member, excess * side) / side.sum() for side in (positive, ~positive))  # [patients]
    of_x, of_y, of_both = (n / (n - 1) for n in (*counts, len(x)))
    variance = of_x * (x @ x) + of_y * (y @ y) + 2 * of_both * (x @ y)
    if variance <= bootstrap.ROUNDING**2:
        return None if abs(difference) > bootstrap.ROUNDING else DeLong(0.0, 0.0)
    return DeLong(difference, float(np.sqrt(variance)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns the p-values, adjusted for their number (Holm, Scand. J. Stat. 6:65, 1979)."""
    p, order = np.asarray(p_values, np.float64), np.argsort(p_values, kind="stable")
    adjusted = np.empty(len(p))
    adjusted[order] = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    return np.minimum(adjusted, 1.0).tolist()


def _placements(positive: np.ndarray, scores: np.ndarray) -> tuple[float, np.ndarray]:
    """Returns the AUC, and for each example [N] the share of those of the other kind that it is ranked correctly to."""
    placed = np.empty(len(scores))
    for side, sign in ((positive, 1), (~positive, -1)):
        own, others = sign * scores[side], np.sort(sign * scores[~side])
        placed[side] = (np.searchsorted(others, own, "left") + np.searchsorted(others, own, "right")) / 2 / len(others)
    return float(placed[positive].mean()), placed
