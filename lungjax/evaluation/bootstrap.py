"""95 % confidence intervals by bootstrap over patients: for one run, several runs, and the difference between two.

Slices from the same patient are correlated, so a draw samples patients with replacement, with all their slices (cluster
bootstrap; Field and Welsh, J. R. Stat. Soc. B 69:369, 2007). An example without a patient counts as its own patient.
Intervals are the 2.5th to 97.5th percentiles (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, ch. 13).
Draws in which a metric is undefined, such as the AUC of a class that was not drawn, are ignored for that metric.

A metric has no interval if it is undefined in more than half of the draws or if there are fewer than two patients. AUC
and average precision have none if a class, or its complement, has fewer than MIN_PATIENTS. The calibration error has
none: repeated examples move the accuracy of a bin away from its confidence, so its draws are too high. If the draws do
not vary, such as those of a recall of 1, a proportion has Wilson's interval for the number of patients in its
denominator, and other metrics have none. Intervals cover the variation between patients; only those of `over_runs` also
cover the variation between seeds.

A draw is a vector of counts per patient; no examples are copied. The areas under curves follow from cumulative sums in
the order of the scores, all other metrics from sums over examples. Draws are processed in blocks to bound memory.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse, special

from lungjax.data import labels
from lungjax.evaluation import metrics
from lungjax.evaluation.predictions import Predictions, finding, take

UNITS = ("slice", "patient")
MIN_PATIENTS = 5  # of a class and of the others, for the interval of an area under a curve
AREAS = ("auc", "average_precision")
ROUNDING = 1e-12  # smaller differences come from the order of summation
BLOCK = 400_000  # examples x draws at a time


@dataclass(frozen=True)
class Difference:
    """The difference of one metric between two runs; undefined values are None."""

    a: float | None
    b: float | None
    difference: float | None  # b - a
    low: float | None  # of the 95 % interval of the difference
    high: float | None
    p: float | None  # two-sided, see `paired_difference`


def intervals(predictions: Predictions, draws: int = 2000, unit: str = "slice") -> dict[str, tuple[float, float]]:
    """Returns the 95 % interval (low, high) of each metric, by dotted name (`metrics.numbers`).

    Metrics without an interval (see the module's docstring) are omitted; draws=0 omits all. `unit` selects metrics over
    examples ("slice") or over patients ("patient", `metrics.by_patient`). Raises ValueError for invalid probabilities.
    """
    (point,), (samples,), patients = _evaluate([predictions], draws, unit)
    ends = {name: interval(values, point[name], patients.get(name, 0)) for name, values in samples.items()}
    return {name: pair for name, pair in ends.items() if pair is not None}


def over_runs(
    runs: Sequence[Predictions],
    names: Sequence[str] | None = None,
    draws: int = 2000,
    unit: str = "slice",
    size: int = 0,
) -> dict[str, tuple[float | None, float | None, float | None]]:
    """Returns (mean over the runs, low, high) of each named metric, with None for undefined values.

    Each draw resamples patients and runs and averages over the runs, so the interval covers the variation between
    patients and between seeds. With three runs it underestimates the variance between seeds by a third. `runs` are
    predictions for the same examples, in any order; `names` are dotted, and None selects all metrics. Raises ValueError
    for different examples or invalid probabilities.

    With `size`, the interval is that of a score published for one run on `size` random examples: each draw is one of
    the runs on `size` examples, drawn without replacement. The mean remains that over all examples.
    """
    points, samples, patients = _evaluate(runs, draws, unit, size)
    k = len(runs)
    per_draw = 1 if size else k
    # A separate random stream, so that the patients are those of `intervals` for any number of runs.
    weights = np.random.default_rng([0, k]).multinomial(per_draw, [1 / k] * k, size=draws)  # [draws, runs]
    result = {}
    for name in points[0] if names is None else names:
        values = [value for point in points if (value := point[name]) is not None]
        mean = float(np.mean(values)) if len(values) == k else None
        each = np.stack([run[name] for run in samples], axis=1)  # [draws, runs]
        values_of_draws = np.where(weights > 0, weights * each, 0.0).sum(axis=1) / per_draw
        ends = _percentiles(values_of_draws) if size else interval(values_of_draws, mean, patients.get(name, 0))
        result[name] = (mean, *(ends or (None, None)))
    return result


def paired_difference(
    a: Predictions, b: Predictions, names: Sequence[str] | None = None, draws: int = 2000, unit: str = "slice"
) -> dict[str, Difference]:
    """Returns the difference between two networks by metric name; each draw uses the same patients for both.

    `p` is twice the smaller share of draws with a difference <= 0 or >= 0, with one draw added to each count, capped at
    1. It is the level at which the percentile interval touches zero (Efron and Tibshirani 1993, ch. 15.4), at least
    0.001 with 2,000 draws and not corrected for multiple comparisons. Other arguments are as in `over_runs`.
    """
    points, samples, _ = _evaluate([a, b], draws, unit)
    result = {}
    for name in points[0] if names is None else names:
        first, second = points[0][name], points[1][name]
        values = samples[1][name] - samples[0][name]
        values[np.abs(values) < ROUNDING] = 0.0
        ends = _percentiles(values)
        difference = None if first is None or second is None else second - first
        p = None
        if ends is not None:
            tails = (values <= 0).sum(), (values >= 0).sum()
            p = float(min(1.0, 2 * (min(tails) + 1) / (np.isfinite(values).sum() + 1)))
        low, high = ends or (None, None)
        result[name] = Difference(first, second, difference, low, high, p)
    return result


def align(a: Predictions, b: Predictions) -> Predictions:
    """Returns `b` with its rows in the order of `a`. Raises ValueError if examples, labels or patients differ."""
    if a.classes != b.classes:
        raise ValueError(f"different classes: {', '.join(a.classes)} and {', '.join(b.classes)}")
    order_a, order_b = np.argsort(a.ids, kind="stable"), np.argsort(b.ids, kind="stable")
    if len(a) != len(b) or (a.ids[order_a] != b.ids[order_b]).any():
        ids = np.setxor1d(a.ids, b.ids)
        reason = f"{len(ids)} of them are in only one, such as {ids[0]}" if len(ids) else "some are duplicates"
        raise ValueError(f"different examples, {len(a)} and {len(b)}: {reason}")
    rows = np.empty(len(a), np.int64)
    rows[order_a] = order_b
    b = take(b, rows)
    if a.multilabel != b.multilabel:
        raise ValueError("only one of the two has several findings per image")
    for what, one, other in (("labels", a.labels, b.labels), ("patients", a.groups, b.groups)):
        differ = np.flatnonzero((one != other).any(axis=tuple(range(1, one.ndim))))
        if len(differ):
            i = differ[0]
            texts = [labels.text(x[i], a.classes) if what == "labels" else str(x[i]) for x in (one, other)]
            values = f"{a.ids[i]}: {texts[0]!r} and {texts[1]!r}"
            raise ValueError(f"different {what} for {len(differ)} of {len(a)} examples, such as {values}")
    return b


def resample_patients(patients: int, draws: int, block: int, size: int = 0) -> Iterator[np.ndarray]:
    """Yields how often each patient was drawn, float64 [patients, up to `block`]; draws do not depend on `block`.

    With `size`, each draw has `size` patients, without replacement.
    """
    rng = np.random.default_rng(0)
    for start in range(0, draws, block):
        counts = [
            np.bincount(
                rng.permutation(patients)[:size] if size else rng.integers(0, patients, patients, dtype=np.int32),
                minlength=patients,
            )
            for _ in range(min(block, draws - start))
        ]
        yield np.ascontiguousarray(np.stack(counts, axis=1), dtype=np.float64)


def wilson(count: float, n: int) -> list[float]:
    """Returns Wilson's 95 % interval of count / n (J. Am. Stat. Assoc. 22:209, 1927); [0, 1] for n = 0."""
    if not n:
        return [0.0, 1.0]
    p, z = count / n, float(special.ndtri(0.975))
    center, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return [max(0.0, (center - half) / (1 + z**2 / n)), min(1.0, (center + half) / (1 + z**2 / n))]


def interval(values: np.ndarray, point: float | None, patients: int = 0) -> tuple[float, float] | None:
    """Returns the interval of a metric from its draws, or None; `patients` is a proportion's denominator, or 0."""
    ends = _percentiles(values)
    if ends is None or point is None or ends[1] - ends[0] > ROUNDING:
        return ends
    low, high = wilson(point * patients, patients)
    return (low, high) if patients else None


def _percentiles(values: np.ndarray) -> tuple[float, float] | None:
    """Returns the percentile interval of the defined draws, or None if fewer than half are defined."""
    defined = values[~np.isnan(values)]
    if not len(defined) or 2 * len(defined) < len(values):
        return None
    low, high = np.percentile(defined, [2.5, 97.5])
    return float(low), float(high)


def _evaluate(
    runs: Sequence[Predictions], draws: int, unit: str, size: int = 0
) -> tuple[list[dict[str, float | None]], list[dict[str, np.ndarray]], dict[str, int]]:
    """Returns the metrics of each run, their draws, {metric: [draws]}, and the patients behind each proportion.

    Draws are NaN for undefined values and for metrics without an interval. Runs are aligned with the first. With
    `size`, a draw has that many examples, without replacement. Raises ValueError if there are fewer.
    """
    levels = [runs[0], *(align(runs[0], run) for run in runs[1:])]
    levels = [metrics.by_patient(p)[0] for p in levels] if unit == "patient" else levels
    points = [metrics.numbers(metrics.summarize(p)) for p in levels]
    keys, member = np.unique(metrics.patient_keys(levels[0]), return_inverse=True)
    if size:
        keys = member = np.arange(len(levels[0]))
        if size > len(keys):
            raise ValueError(f"a draw of {size:,} examples needs as many; there are {len(keys):,}")
    if len(keys) < 2 or not draws:
        return points, [dict.fromkeys(point, np.full(draws, np.nan)) for point in points], {}
    samplers = [_sampler(p, member, len(keys)) for p in levels]
    block = max(8, min(512, BLOCK // len(levels[0])))
    blocks = [
        [metrics.numbers(sampler(counts)) for sampler in samplers]
        for counts in resample_patients(len(keys), draws, block, size)
    ]
    each = zip(*blocks, strict=True)
    samples = [{name: np.concatenate([own[name] for own in run]) for name in run[0]} for run in each]
    sizes = [_denominators(p, member) for p in levels]
    patients = {name: min(size[name] for size in sizes) for name in sizes[0]}
    without = {"ece"}
    for name in levels[0].classes:
        fewer = min(patients[f"per_class.{name}.{side}"] for side in ("recall", "specificity"))
        if 0 < fewer < MIN_PATIENTS:
            without |= {n for area in AREAS for n in (f"per_class.{name}.{area}", f"{area}_macro", f"{area}_weighted")}
    for run in samples:
        run |= dict.fromkeys(without, np.full(draws, np.nan))
    return points, samples, patients


def _denominators(p: Predictions, member: np.ndarray) -> dict[str, int]:
    """Returns the number of patients in the denominator of each proportion; `member` [N] is each example's patient."""
    result: dict[str, int] = {}
    if p.multilabel:
        for i, name in enumerate(p.classes):
            known = _denominators(finding(p, i), member[p.labels[:, i] >= 0])
            result |= {key: n for key, n in known.items() if key.startswith(f"per_class.{name}.")}
        return result
    result = dict.fromkeys(("accuracy", "study.accuracy_rounded"), int(member.max(initial=-1)) + 1)
    for i, name in enumerate(p.classes):
        true, called = p.labels == i, p.predicted == i
        rates = {"recall": true, "specificity": ~true, "precision": called, "npv": ~called}
        result |= {f"per_class.{name}.{rate}": len(np.unique(member[rows])) for rate, rows in rates.items()}
    return result


def _sampler(p: Predictions, member: np.ndarray, patients: int) -> Callable[[np.ndarray], metrics.Level]:
    """Returns a function from counts [patients, draws] to metrics [draws]; `member` [N] is each example's patient."""
    if p.multilabel:
        known = [np.flatnonzero(column >= 0) for column in p.labels.T]
        samplers = [_sampler(finding(p, i), member[rows], patients) for i, rows in enumerate(known)]
        return lambda counts: metrics.over_findings([sampler(counts) for sampler in samplers], p.classes)
    totals = {  # sparse [size, patients]: each patient's contribution to a sum
        name: (_sparse(part.places, member[part.rows], (math.prod(part.shape), patients), part.values), part.shape)
        for name, part in metrics.addends(p).items()
    }
    c, scores = len(p.classes), np.asarray(p.probabilities, dtype=np.float64)
    is_class, pooled = p.labels[:, None] == np.arange(c), np.repeat(member, c)
    per_class = [_area_sampler(is_class[:, i], scores[:, i], member, patients) for i in range(c)]
    outputs = [scores] if p.logits is None else [scores, np.asarray(p.logits)]
    micro = [_area_sampler(is_class.ravel(), values.ravel(), pooled, patients) for values in outputs]

    def level(counts: np.ndarray) -> metrics.Level:
        draws = counts.shape[1]
        sums = {name: np.moveaxis((m @ counts).reshape(*shape, draws), -1, 0) for name, (m, shape) in totals.items()}
        auc, average_precision = np.stack([areas(counts) for areas in per_class], axis=-1)
        (auc_micro, precision_micro), *logits = [areas(counts) for areas in micro]
        of_curves = {
            "auc": auc,
            "average_precision": average_precision,
            "auc_micro": auc_micro,
            "average_precision_micro": precision_micro,
            "auc_micro_logits": logits[0][0] if logits else np.full(draws, np.nan),
        }
        return metrics.metrics_from_sums(sums, of_curves, p.classes)

    return level


def _area_sampler(
    positive: np.ndarray, scores: np.ndarray, member: np.ndarray, patients: int
) -> Callable[[np.ndarray], np.ndarray]:
    """Returns a function from counts [patients, draws] to AUC and average precision [2, draws]; arguments are [M]."""
    if positive.all() or not positive.any():
        return lambda counts: np.full((2, counts.shape[1]), np.nan)
    ranks = np.unique(scores[positive])[::-1]  # distinct scores of positive examples, in descending order
    count = len(ranks)
    at = np.searchsorted(-ranks, -scores, side="left")  # the first rank whose score is not higher
    counted = ~positive & (at < count)  # negatives below all positives do not affect the areas
    tied = counted & (ranks[np.minimum(at, count - 1)] == scores)
    # Sparse [ranks, patients]: examples of each rank.
    hit, alarm, tie = (_sparse(at[rows], member[rows], (count, patients)) for rows in (positive, counted, tied))
    negative = np.bincount(member[~positive], minlength=patients).astype(np.float64)

    def areas(counts: np.ndarray) -> np.ndarray:
        hits, alarms = hit @ counts, alarm @ counts  # [ranks, draws]
        np.cumsum(alarms, axis=0, out=alarms)  # in place, here and below: memory traffic dominates
        positives, negatives = hits.sum(axis=0), negative @ counts  # [draws]
        defined = (positives > 0) & (negatives > 0)
        # A positive example ranks below the negatives so far; ties count one half.
        below = np.einsum("rd,rd->d", hits, alarms) - np.einsum("rd,rd->d", hits, tie @ counts) / 2
        auc = 1 - below / np.where(defined, positives * negatives, np.nan)
        precision = np.cumsum(hits, axis=0)
        alarms += precision
        np.divide(precision, np.maximum(alarms, 1, out=alarms), out=precision)  # 0 / 0 only without hits so far
        return np.stack([auc, np.einsum("rd,rd->d", hits, precision) / np.where(defined, positives, np.nan)])

    return areas


def _sparse(row: np.ndarray, column: np.ndarray, shape: tuple[int, int], values: np.ndarray | None = None) -> Any:
    entries = np.ones(len(row)) if values is None else values
    return sparse.csr_matrix((entries, (row, column)), shape=shape)  # sums duplicate entries
