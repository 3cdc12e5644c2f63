"""95 % confidence intervals by bootstrap over patients: of one run, of several runs, of the difference of two.

Slices of a patient are correlated, so a draw takes patients with replacement, and all slices of each as often as it was
drawn (cluster bootstrap; Field and Welsh, J. R. Stat. Soc. B 69:369, 2007). An example without a patient counts as its
own patient. Intervals are the 2.5th to 97.5th percentiles (Efron and Tibshirani, "An Introduction to the Bootstrap",
1993, ch. 13). A draw in which a metric is undefined, such as the AUC of a class that was not drawn, does not count for
it; a metric undefined in more than half of the draws has no interval, nor has any for fewer than two patients. An
interval covers the choice of patients, not of the training seed; for that see `over_runs`.

Nothing is resampled in memory: a draw is a count per patient. All metrics but the areas under curves follow from sums
over examples, one sparse product with the counts; the areas from cumulative sums along the ranking by score, which is
computed once. Draws are processed in blocks to bound memory.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import sparse, stats

from lungjax.config import nearest
from lungjax.evaluation import metrics
from lungjax.evaluation.predictions import Predictions

UNITS = ("slice", "patient")
LEVEL = 95  # percent
ROUNDING = 1e-12  # smaller differences come from the order of summation
BLOCK = 400_000  # ranks x draws at a time


@dataclass(frozen=True)
class Difference:
    """One metric of two runs; None where it is undefined."""

    a: float | None
    b: float | None
    difference: float | None  # b - a
    low: float | None  # of the 95 % interval of the difference
    high: float | None
    p: float | None  # two-sided, see `paired_difference`


@dataclass(frozen=True)
class _Ranking:
    """A two-class problem by rank: the distinct scores of positive examples, from the highest."""

    positive: Any  # sparse [ranks, patients]: positive examples of each rank
    negative: Any  # sparse [ranks, patients]: negative ones with at least its score, and less than the rank before
    tied: Any  # sparse [ranks, patients]: negative ones with exactly its score
    negatives: np.ndarray  # [patients]


@dataclass(frozen=True)
class _Plan:
    """Predictions prepared for draws of their patients."""

    classes: tuple[str, ...]
    sums: dict[str, tuple[Any, tuple[int, ...]]]  # name: what each patient adds, sparse [size, patients]; its shape
    rankings: dict[str, _Ranking | None]  # by class index, "micro" and "logits"; None with one side only


def intervals(
    predictions: Predictions, draws: int = 2000, seed: int = 0, unit: str = "slice"
) -> dict[str, tuple[float, float]]:
    """Returns the 95 % interval (low, high) of each metric of a level, by dotted name (`metrics.numbers`).

    Metrics without an interval, see the module's docstring, are left out; with draws=0 all are.

    Args:
      predictions: of the examples.
      draws: number of samples of patients.
      seed: of the draws; the same seed draws the same patients of a data set.
      unit: "slice" for the level over examples, "patient" for the one over patients (`metrics.by_patient`).

    Raises ValueError for an unknown unit, a negative number of draws, or invalid probabilities.
    """
    p = _level_of(predictions, draws, unit)
    point = _point(p)
    ends = {name: _ends(name, values, point[name]) for name, values in _over_draws([p], draws, seed)[0].items()}
    return {name: pair for name, pair in ends.items() if pair is not None}


def over_runs(
    runs: Sequence[Predictions], names: Sequence[str], draws: int = 2000, seed: int = 0, unit: str = "slice"
) -> dict[str, tuple[float | None, float | None, float | None]]:
    """Returns (mean over the runs, low, high) of each named metric, None where undefined.

    Each draw resamples patients and runs, and averages over these runs, so the interval covers the choice of both
    patients and seeds. (Three runs say little about seeds: a bootstrap of three values underestimates their variance
    by a third.)

    Args:
      runs: predictions for the same examples, in any order.
      names: dotted names of metrics, such as "accuracy" or "study.auc_micro_logits".
      draws, seed, unit: as in `intervals`.

    Raises ValueError for no runs, different examples, an unknown name, and as `intervals`.
    """
    if not runs:
        raise ValueError("no runs to average over")
    levels = [_level_of(p, draws, unit) for p in [runs[0], *(align(runs[0], run) for run in runs[1:])]]
    points = [_point(p) for p in levels]
    _check_names(names, points[0])
    drawn = _over_draws(levels, draws, seed)
    k = len(runs)
    # A separate stream, so that the patients are those of `intervals` for any number of runs.
    weights = np.random.default_rng([seed, k]).multinomial(k, [1 / k] * k, size=draws)  # [draws, runs]
    result = {}
    for name in names:
        values = [value for point in points if (value := point[name]) is not None]
        mean = float(np.mean(values)) if len(values) == k else None
        ends: tuple[float | None, float | None] | None = None
        if name in drawn[0]:
            each = np.stack([run[name] for run in drawn], axis=1)  # [draws, runs]
            ends = _ends(name, np.where(weights > 0, weights * each, 0.0).sum(axis=1) / k, mean)
        result[name] = (mean, *(ends or (None, None)))
    return result


def paired_difference(
    a: Predictions,
    b: Predictions,
    names: Sequence[str] | None = None,
    draws: int = 2000,
    seed: int = 0,
    unit: str = "slice",
) -> dict[str, Difference]:
    """Returns the difference of two networks on the same examples, by name; each draw takes the same patients for both.

    `p` is twice the smaller share of draws with a difference of at most, or at least, zero, each counted with one draw
    more, and at most 1: the level at which the percentile interval just touches zero (Efron and Tibshirani 1993,
    ch. 15.4). With 2,000 draws it is at least 0.001. There is no correction for multiple comparisons.

    Args:
      a, b: predictions for the same examples, in any order.
      names: dotted names of metrics; None takes all.
      draws, seed, unit: as in `intervals`.

    Raises ValueError for different examples, an unknown name, and as `intervals`.
    """
    levels = [_level_of(p, draws, unit) for p in (a, align(a, b))]
    points = [_point(p) for p in levels]
    names = list(points[0]) if names is None else names
    _check_names(names, points[0])
    drawn = _over_draws(levels, draws, seed)
    result = {}
    for name in names:
        first, second = points[0][name], points[1][name]
        values = drawn[1][name] - drawn[0][name] if drawn[0] else np.zeros(0)
        values[np.abs(values) < ROUNDING] = 0.0
        ends = interval(values)
        difference = None if first is None or second is None else second - first
        p = None if ends is None else _p_value(values[~np.isnan(values)])
        low, high = ends or (None, None)
        result[name] = Difference(first, second, difference, low, high, p)
    return result


def align(a: Predictions, b: Predictions) -> Predictions:
    """Returns b with its rows in a's order. Raises ValueError with the difference if the test sets differ."""
    if a.classes != b.classes:
        raise ValueError(f"different classes: {', '.join(a.classes)} and {', '.join(b.classes)}")
    order_a, order_b = np.argsort(a.ids, kind="stable"), np.argsort(b.ids, kind="stable")
    if len(a) != len(b) or (a.ids[order_a] != b.ids[order_b]).any():
        missing = {"first": np.setdiff1d(a.ids, b.ids), "second": np.setdiff1d(b.ids, a.ids)}
        parts = [f"{len(ids)} only in the {which}, such as {ids[0]}" for which, ids in missing.items() if len(ids)]
        raise ValueError(f"different examples, {len(a)} and {len(b)}: {'; '.join(parts) or 'some are duplicates'}")
    rows = np.empty(len(a), np.int64)
    rows[order_a] = order_b
    b = take(b, rows)
    names = np.asarray(a.classes)
    for what, one, other in (("labels", names[a.labels], names[b.labels]), ("patients", a.groups, b.groups)):
        differ = np.flatnonzero(one != other)
        if len(differ):
            i = differ[0]
            raise ValueError(
                f"different {what} for {len(differ)} of {len(a)} examples, such as {a.ids[i]}: "
                f"{str(one[i])!r} and {str(other[i])!r}"
            )
    return b


def take(predictions: Predictions, rows: np.ndarray) -> Predictions:
    """Returns the predictions of rows [M] int, in that order; rows may repeat."""
    p = predictions
    columns = {name: getattr(p, name)[rows] for name in ("ids", "groups", "sources", "labels", "probabilities")}
    logits = None if p.logits is None else p.logits[rows]
    return replace(p, **columns, logits=logits, extra={name: values[rows] for name, values in p.extra.items()})


def resample_patients(patients: int, draws: int, seed: int, block: int) -> Iterator[np.ndarray]:
    """Yields how often each patient was drawn, float64 [patients, up to `block`], `draws` columns in all.

    The draws don't depend on `block`.
    """
    rng = np.random.default_rng(seed)
    for start in range(0, draws, block):
        counts = [
            np.bincount(rng.integers(0, patients, patients, dtype=np.int32), minlength=patients)
            for _ in range(min(block, draws - start))
        ]
        yield np.ascontiguousarray(np.stack(counts, axis=1), dtype=np.float64)


def wilson(count: int, n: int) -> list[float]:
    """Returns Wilson's 95 % interval of count / n (J. Am. Stat. Assoc. 22:209, 1927); [0, 1] for n = 0."""
    if not n:
        return [0.0, 1.0]
    ends = stats.binomtest(count, n).proportion_ci(0.95, "wilson")
    return [float(ends.low), float(ends.high)]


def interval(values: np.ndarray) -> tuple[float, float] | None:
    """Returns the percentile interval of the defined draws; None if they are fewer than half, or none."""
    defined = values[~np.isnan(values)]
    if not len(defined) or 2 * len(defined) < len(values):
        return None
    low, high = np.percentile(defined, [(100 - LEVEL) / 2, (100 + LEVEL) / 2])
    return float(low), float(high)


def _level_of(predictions: Predictions, draws: int, unit: str) -> Predictions:
    if unit not in UNITS:
        raise ValueError(f"unit={unit!r}: allowed are {', '.join(UNITS)}")
    if draws < 0:
        raise ValueError(f"draws={draws}: must not be negative")
    metrics.check_probabilities(np.asarray(predictions.probabilities, dtype=np.float64), predictions.ids)
    return metrics.by_patient(predictions)[0] if unit == "patient" else predictions


def _point(p: Predictions) -> dict[str, float | None]:
    return metrics.numbers(metrics.summarize(p.labels, p.probabilities, p.classes, p.ids, p.logits))


def _check_names(names: Sequence[str], known: Mapping[str, Any]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"unknown metric {name!r}; {nearest(name, known)}")


def _ends(name: str, values: np.ndarray, point: float | None) -> tuple[float, float] | None:
    """Returns the interval of a metric from its draws; for the calibration error the reflected one.

    A draw repeats examples, which moves the mean of a bin away from its confidence, so the percentiles of ECE are too
    high, often above ECE itself. The reflected ("basic") interval is as far below (Efron and Tibshirani, ch. 13.4).
    """
    ends = interval(values)
    if ends is None or name != "ece" or point is None:
        return ends
    return max(0.0, 2 * point - ends[1]), max(0.0, 2 * point - ends[0])


def _p_value(differences: np.ndarray) -> float:
    tails = (differences <= 0).sum(), (differences >= 0).sum()
    return float(min(1.0, 2 * (min(tails) + 1) / (len(differences) + 1)))


def _over_draws(levels: Sequence[Predictions], draws: int, seed: int) -> list[dict[str, np.ndarray]]:
    """Returns the metrics [draws] of each of several predictions (same rows, same patients), NaN where undefined.

    They are empty for fewer than two patients, or no draws.
    """
    keys, member = np.unique(metrics.patient_keys(levels[0]), return_inverse=True)
    plans = [_plan(p, member, len(keys)) for p in levels]
    if len(keys) < 2 or not draws:
        return [{} for _ in plans]
    ranks = [r.positive.shape[0] for plan in plans for r in plan.rankings.values() if r is not None]
    block = max(8, min(512, BLOCK // max(len(keys), *ranks)))
    blocks: list[list[dict[str, np.ndarray]]] = [[] for _ in plans]
    for counts in resample_patients(len(keys), draws, seed, block):
        for plan, own in zip(plans, blocks, strict=True):
            own.append(metrics.numbers(_level(plan, counts)))
    return [{name: np.concatenate([b[name] for b in own]) for name in own[0]} for own in blocks]


def _plan(p: Predictions, member: np.ndarray, patients: int) -> _Plan:
    n, c = len(p), len(p.classes)
    labels, scores = np.asarray(p.labels, dtype=np.int64), np.asarray(p.probabilities, dtype=np.float64)
    each = metrics.sufficient_statistics(labels, scores, p.logits)
    example, named = np.nonzero(each.named)
    hit = labels[example] == named
    zeros, everyone = np.zeros(n, np.int64), np.arange(n)
    addends: dict[str, tuple[tuple[int, ...], np.ndarray, np.ndarray, np.ndarray | None]] = {
        # Name: its shape, and of each addend its place there, its example, and its value (None is 1).
        "confusion": ((c, c), each.cells, everyone, None),
        "loss": ((), zeros, everyone, each.loss),
        "brier": ((), zeros, everyone, each.brier),
        "gaps": ((metrics.BINS,), each.bins, everyone, each.gaps),
        "rounded": ((), zeros, everyone, each.rounded),
        "named": ((c,), named, example, None),
        "named_right": ((c,), named[hit], example[hit], None),
    }
    sums = {
        name: (_sparse(place, member[of], (int(np.prod(shape)), patients), value), shape)
        for name, (shape, place, of, value) in addends.items()
    }
    is_class = labels[:, None] == np.arange(c)
    rankings = {str(i): _ranking(is_class[:, i], scores[:, i], member, patients) for i in range(c)}
    pooled = np.repeat(member, c)
    rankings["micro"] = _ranking(is_class.ravel(), scores.ravel(), pooled, patients)
    if p.logits is not None:
        rankings["logits"] = _ranking(is_class.ravel(), np.asarray(p.logits).ravel(), pooled, patients)
    return _Plan(p.classes, sums, rankings)


def _ranking(positive: np.ndarray, scores: np.ndarray, member: np.ndarray, patients: int) -> _Ranking | None:
    """Returns the ranking of a two-class problem; `positive`, `scores`, `member` (patient) [M]. None if one-sided."""
    if positive.all() or not positive.any():
        return None
    ranks = np.unique(scores[positive])[::-1]  # falling
    count = len(ranks)
    at = np.searchsorted(-ranks, -scores, side="left")  # the first rank whose score is not higher
    counted = ~positive & (at < count)  # negatives below all positives change no area
    tied = counted & (ranks[np.minimum(at, count - 1)] == scores)
    parts = [_sparse(at[rows], member[rows], (count, patients)) for rows in (positive, counted, tied)]
    return _Ranking(parts[0], parts[1], parts[2], np.bincount(member[~positive], minlength=patients).astype(np.float64))


def _sparse(row: np.ndarray, column: np.ndarray, shape: tuple[int, int], values: np.ndarray | None = None) -> Any:
    entries = np.ones(len(row)) if values is None else values.astype(np.float64)
    return sparse.csr_matrix((entries, (row, column)), shape=shape)  # sums duplicate entries


def _level(plan: _Plan, counts: np.ndarray) -> metrics.Level:
    """Returns the metrics of a level, [draws] each, for counts [patients, draws]."""
    draws = counts.shape[1]
    sums = {name: np.moveaxis((m @ counts).reshape(*shape, draws), -1, 0) for name, (m, shape) in plan.sums.items()}
    undefined = (np.full(draws, np.nan),) * 2
    both = {name: undefined if ranking is None else _areas(ranking, counts) for name, ranking in plan.rankings.items()}
    per_class = [both[str(i)] for i in range(len(plan.classes))]
    areas = {
        "auc": np.stack([auc for auc, _ in per_class], axis=-1),
        "average_precision": np.stack([precision for _, precision in per_class], axis=-1),
        "auc_micro": both["micro"][0],
        "average_precision_micro": both["micro"][1],
        "auc_micro_logits": both.get("logits", undefined)[0],
    }
    return metrics.metrics_from_statistics(sums, areas, plan.classes)


def _areas(ranking: _Ranking, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the area under the ROC curve and the average precision, [draws] each, NaN without both sides."""
    hits = ranking.positive @ counts  # [ranks, draws]
    alarms = np.cumsum(ranking.negative @ counts, axis=0)
    positives, negatives = hits.sum(axis=0), ranking.negatives @ counts  # [draws]
    defined = (positives > 0) & (negatives > 0)
    # A positive example ranks below the negatives so far, and with half weight below those of its own score.
    below = np.einsum("rd,rd->d", hits, alarms) - np.einsum("rd,rd->d", hits, ranking.tied @ counts) / 2
    auc = 1 - below / np.where(defined, positives * negatives, np.nan)
    cumulated = np.cumsum(hits, axis=0)
    precision = cumulated / np.maximum(cumulated + alarms, 1)  # counts: 0 only before the first draw of any
    return auc, np.einsum("rd,rd->d", hits, precision) / np.where(defined, positives, np.nan)
