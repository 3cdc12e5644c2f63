"""95 % intervals by bootstrap over patients, for every number of a level, for several runs, and between two.

Slices of one patient are alike, so a draw takes patients with replacement, as many as there are, and all slices of
each as often as the patient came (the cluster bootstrap; Field and Welsh, J. R. Stat. Soc. B 69:369, 2007). An example
without a patient is one of its own. The interval is from the 2.5th to the 97.5th percentile over the draws (Efron and
Tibshirani, "An Introduction to the Bootstrap", 1993, ch. 13). A draw in which a number has no definition, such as the
AUC of a class that was not drawn, does not count for that number; where more than half of the draws have none there is
no interval, nor is there one for fewer than two patients. An interval says how much a number would vary with other
patients of the same kind, not with another training: for that see `over_runs`.

Nothing is resampled in memory. A draw is a count for each patient; all but the areas under curves follow from sums
over examples, which are one sparse product with the counts, and the areas from cumulated sums along the ranking by
score. The rankings are made once, equal scores being one place, and only places with an example of the class are kept.
Draws are worked off in blocks, so memory stays small.
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
LEVEL = 95  # per cent
ROUNDING = 1e-12  # what the order of rows may change in a sum; a smaller difference is none
BLOCK = 400_000  # ranked places x draws at a time


@dataclass(frozen=True)
class Difference:
    """One number of two runs; None where it is undefined."""

    a: float | None
    b: float | None
    difference: float | None  # b - a
    low: float | None  # of the 95 % interval of the difference
    high: float | None
    p: float | None  # two-sided, see `paired_difference`


@dataclass(frozen=True)
class _Ranking:
    """One two-class problem along its places: the distinct scores of positive examples, from the highest."""

    positive: Any  # sparse [places, patients]: positive examples at each place
    negative: Any  # sparse [places, patients]: negative ones down to it, those of the place before left out
    tied: Any  # sparse [places, patients]: negative ones of the very score, None where there are none
    total: np.ndarray  # [patients] negative examples


@dataclass(frozen=True)
class _Plan:
    """A set of predictions, made ready for draws of its patients."""

    classes: tuple[str, ...]
    sums: Any  # sparse [rows, patients]: what the examples of a patient add to each sum
    rows: dict[str, tuple[slice, tuple[int, ...]]]  # where in `sums` each of them lies, and its shape
    rankings: dict[str, _Ranking | None]  # by the number they give; None without both sides
    places: int  # of the longest ranking


def intervals(
    predictions: Predictions, draws: int = 2000, seed: int = 0, unit: str = "slice"
) -> dict[str, tuple[float, float]]:
    """Returns the 95 % interval, (low, high), of each number of the level by its dotted name (`metrics.numbers`).

    Names without an interval are left out, see the top of the file; with draws=0 all are.

    Args:
      predictions: of the examples.
      draws: how many samples of patients.
      seed: of the draws; the same seed draws the same patients of a data set.
      unit: "slice" for the level over examples, "patient" for the one over patients (`metrics.by_patient`).

    Raises ValueError for an unknown unit, a negative number of draws, or probabilities that are none.
    """
    p = _level_of(predictions, draws, unit)
    drawn = _over_draws([p], None, draws, seed)
    points = _points(p)
    found = {name: _ends(name, values, points[name]) for name, values in drawn[0].items()}
    return {name: ends for name, ends in found.items() if ends is not None}


def over_runs(
    runs: Sequence[Predictions], names: Sequence[str], draws: int = 2000, seed: int = 0, unit: str = "slice"
) -> dict[str, tuple[float | None, float | None, float | None]]:
    """Returns (mean over the runs, low, high) of each named number, None where undefined.

    Each draw takes patients and also runs with replacement and averages over those runs, so the interval holds both
    the choice of patients and that of seeds. (Three runs say little about seeds: the part of the variance that comes
    from them is drawn a third too small, as any bootstrap of three values.)

    Args:
      runs: predictions of the same examples; in any order of rows.
      names: dotted names of a level's numbers, such as "accuracy" or "study.auc_micro_logits".
      draws, seed, unit: as in `intervals`.

    Raises ValueError for no runs, other examples, an unknown name, and as `intervals`.
    """
    if not runs:
        raise ValueError("no runs to average over")
    levels = [_level_of(p, draws, unit) for p in [runs[0], *(align(runs[0], run) for run in runs[1:])]]
    points = [_points(p) for p in levels]
    _check_names(names, points[0])
    drawn = _over_draws(levels, set(names), draws, seed)
    k = len(runs)
    # Its own stream: the patients are those of `intervals` whatever the number of runs.
    chosen = np.random.default_rng([seed, k]).multinomial(k, [1 / k] * k, size=draws)  # [draws, runs]
    result = {}
    for name in names:
        values = [point[name] for point in points]
        defined = [v for v in values if v is not None]
        mean = float(np.mean(defined)) if len(defined) == k else None
        each = np.stack([found[name] for found in drawn], axis=1)  # [draws, runs]
        ends = _ends(name, np.where(chosen > 0, chosen * each, 0.0).sum(axis=1) / k, mean)
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
    """Returns how two networks differ on the same examples, by name; every draw takes the same patients for both.

    `p` is twice the smaller share of the draws in which the difference is at most, or at least, zero, both counted with
    one draw more, and at most 1: the level at which the percentile interval would just touch zero (Efron and
    Tibshirani 1993, ch. 15.4). With 2,000 draws it is no smaller than 0.001. Many names are many tests: nothing is
    corrected for that.

    Args:
      a, b: predictions of the same examples; in any order of rows.
      names: dotted names of a level's numbers; None is all of them.
      draws, seed, unit: as in `intervals`.

    Raises ValueError for other examples, an unknown name, and as `intervals`.
    """
    levels = [_level_of(p, draws, unit) for p in (a, align(a, b))]
    points = [_points(p) for p in levels]
    names = list(points[0]) if names is None else names
    _check_names(names, points[0])
    drawn = _over_draws(levels, set(names), draws, seed)
    result = {}
    for name in names:
        first, second = points[0][name], points[1][name]
        values = drawn[1][name] - drawn[0][name]
        values[np.abs(values) < ROUNDING] = 0.0
        ends = interval(values)
        difference = None if first is None or second is None else second - first
        p = None if ends is None else _p_value(values[~np.isnan(values)])
        low, high = ends or (None, None)
        result[name] = Difference(first, second, difference, low, high, p)
    return result


def align(a: Predictions, b: Predictions) -> Predictions:
    """Returns b with its rows in a's order. Raises ValueError saying what differs if they are not of one test set."""
    if a.classes != b.classes:
        raise ValueError(f"they have other classes: {', '.join(a.classes)} and {', '.join(b.classes)}")
    order_a, order_b = np.argsort(a.ids, kind="stable"), np.argsort(b.ids, kind="stable")
    if len(a) != len(b) or (a.ids[order_a] != b.ids[order_b]).any():
        lacking = [np.setdiff1d(x.ids, y.ids) for x, y in ((a, b), (b, a))]
        parts = [
            f"{len(ids)} only in the {which}, such as {ids[0]}"
            for which, ids in zip(("first", "second"), lacking, strict=True)
            if len(ids)
        ]
        raise ValueError(f"they are of other examples, {len(a)} and {len(b)}: {'; '.join(parts) or 'some come twice'}")
    rows = np.empty(len(a), np.int64)
    rows[order_a] = order_b
    b = take(b, rows)
    for what, one, other in (("labels", a.labels, b.labels), ("patients", a.groups, b.groups)):
        differ = np.flatnonzero(one != other)
        if len(differ):
            first = differ[0]
            shown = [str(a.classes[x]) if what == "labels" else repr(str(x)) for x in (one[first], other[first])]
            raise ValueError(
                f"they have other {what} for {len(differ)} of {len(a)} examples, such as {a.ids[first]}: "
                f"{shown[0]} and {shown[1]}"
            )
    return b


def take(predictions: Predictions, rows: np.ndarray) -> Predictions:
    """Returns the predictions of some rows, in that order; `rows` [M] int, with repetition if wanted."""
    p = predictions
    columns = {name: getattr(p, name)[rows] for name in ("ids", "groups", "sources", "labels", "probabilities")}
    logits = None if p.logits is None else p.logits[rows]
    return replace(p, **columns, logits=logits, extra={name: values[rows] for name, values in p.extra.items()})


def resample_patients(patients: int, draws: int, seed: int, block: int) -> Iterator[np.ndarray]:
    """Yields how often each patient came, float64 [patients, up to `block`], `draws` columns in all.

    The draws don't depend on `block`.
    """
    rng = np.random.default_rng(seed)
    for start in range(0, draws, block):
        counts = [
            np.bincount(rng.integers(0, patients, patients, dtype=np.int32), minlength=patients)
            for _ in range(min(block, draws - start))
        ]
        yield np.ascontiguousarray(np.stack(counts, axis=1), dtype=np.float64)


def _level_of(predictions: Predictions, draws: int, unit: str) -> Predictions:
    if unit not in UNITS:
        raise ValueError(f"unit={unit!r}: allowed are {', '.join(UNITS)}")
    if draws < 0:
        raise ValueError(f"draws={draws}: must not be negative")
    metrics.check_probabilities(np.asarray(predictions.probabilities, dtype=np.float64), predictions.ids)
    return metrics.by_patient(predictions)[0] if unit == "patient" else predictions


def _points(p: Predictions) -> dict[str, float | None]:
    return metrics.numbers(metrics.summarize(p.labels, p.probabilities, p.classes, p.ids, p.logits))


def _check_names(names: Sequence[str], known: Mapping[str, Any]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"no number {name!r}; {nearest(name, known)}")


def wilson(count: int, n: int) -> list[float]:
    """Returns Wilson's 95 % interval of the share count / n (J. Am. Stat. Assoc. 22:209, 1927); [0, 1] of none."""
    if not n:
        return [0.0, 1.0]
    found = stats.binomtest(count, n).proportion_ci(0.95, "wilson")
    return [float(found.low), float(found.high)]


def interval(values: np.ndarray) -> tuple[float, float] | None:
    """Returns the percentile interval of the defined draws; None where they are fewer than half, or none."""
    defined = values[~np.isnan(values)]
    if not len(defined) or 2 * len(defined) < len(values):
        return None
    low, high = np.percentile(defined, [(100 - LEVEL) / 2, (100 + LEVEL) / 2])
    return float(low), float(high)


def _ends(name: str, values: np.ndarray, point: float | None) -> tuple[float, float] | None:
    """Returns the interval of a number from its draws; of the calibration error the reflected one.

    A draw repeats examples, which moves the mean of a bin away from its confidence: percentiles of ECE lie too high,
    often above ECE itself. Reflected at the point (Efron and Tibshirani, ch. 13.4, "basic") they lie as far below.
    """
    ends = interval(values)
    if ends is None or name != "ece" or point is None:
        return ends
    return max(0.0, 2 * point - ends[1]), max(0.0, 2 * point - ends[0])


def _p_value(differences: np.ndarray) -> float:
    tails = (differences <= 0).sum(), (differences >= 0).sum()
    return float(min(1.0, 2 * (min(tails) + 1) / (len(differences) + 1)))


def _over_draws(
    levels: Sequence[Predictions], names: set[str] | None, draws: int, seed: int
) -> list[dict[str, np.ndarray]]:
    """Returns for each set of predictions (same rows, same patients) its numbers [draws] by name, NaN where undefined.

    `names` are those that will be read, None for all: areas that no name needs are not computed and stay NaN.
    """
    keys, member = np.unique(metrics.patient_keys(levels[0]), return_inverse=True)
    plans = [_plan(p, member, len(keys), names) for p in levels]
    block = max(8, min(512, BLOCK // max(len(keys), *(plan.places for plan in plans))))
    found: list[list[dict[str, np.ndarray]]] = [[] for _ in plans]
    for counts in resample_patients(len(keys), draws, seed, block) if len(keys) > 1 else ():
        for plan, kept in zip(plans, found, strict=True):
            kept.append(metrics.numbers(_numbers(plan, counts)))
    nothing = {name: np.full(draws, np.nan) for name in names or ()}
    return [{name: np.concatenate([b[name] for b in kept]) for name in kept[0]} if kept else nothing for kept in found]


def _plan(p: Predictions, member: np.ndarray, patients: int, names: set[str] | None) -> _Plan:
    n, c = len(p), len(p.classes)
    labels, scores = np.asarray(p.labels, dtype=np.int64), np.asarray(p.probabilities, dtype=np.float64)
    each = metrics.sufficient_statistics(labels, scores, p.logits)
    example, named = np.nonzero(each.named)
    hit = labels[example] == named
    everyone = np.arange(n)
    parts: dict[str, tuple[tuple[int, ...], np.ndarray, np.ndarray, np.ndarray | None]] = {
        # Name: its shape, and of each addend the place in it, the example, and what is added (None is 1).
        "confusion": ((c, c), each.cells, everyone, None),
        "loss": ((), np.zeros(n, np.int64), everyone, each.loss),
        "brier": ((), np.zeros(n, np.int64), everyone, each.brier),
        "gaps": ((metrics.BINS,), each.bins, everyone, each.gaps),
        "rounded": ((), np.zeros(n, np.int64), everyone, each.rounded),
        "named": ((c,), named, example, None),
        "named_right": ((c,), named[hit], example[hit], None),
    }
    rows, stacked, start = {}, [], 0
    for name, (shape, place, of, added) in parts.items():
        size = int(np.prod(shape))
        stacked.append(_sparse(place, member[of], (size, patients), added))
        rows[name] = (slice(start, start + size), shape)
        start += size
    is_class = labels[:, None] == np.arange(c)
    rankings: dict[str, _Ranking | None] = {}
    for i, name in enumerate(p.classes):
        if _wanted(names, (f"per_class.{name}.auc", f"per_class.{name}.average_precision"), ("_macro", "_weighted")):
            rankings[str(i)] = _ranking(is_class[:, i], scores[:, i], member, patients)
    pooled = np.repeat(member, c)
    if _wanted(names, ("auc_micro", "average_precision_micro")):
        rankings["micro"] = _ranking(is_class.ravel(), scores.ravel(), pooled, patients)
    if p.logits is not None and _wanted(names, ("study.auc_micro_logits",)):
        rankings["logits"] = _ranking(is_class.ravel(), np.asarray(p.logits).ravel(), pooled, patients)
    places = [r.positive.shape[0] for r in rankings.values() if r is not None]
    return _Plan(p.classes, sparse.vstack(stacked, format="csr"), rows, rankings, max(places, default=1))


def _wanted(names: set[str] | None, exact: Sequence[str], means: Sequence[str] = ()) -> bool:
    of_means = {area + end for area in ("auc", "average_precision") for end in means}
    return names is None or bool(names & ({*exact} | of_means))


def _ranking(positive: np.ndarray, scores: np.ndarray, member: np.ndarray, patients: int) -> _Ranking | None:
    """Returns the places of a two-class problem; `positive`, `scores` and `member` (patient) [M]. None if one-sided."""
    if positive.all() or not positive.any():
        return None
    places = np.unique(scores[positive])[::-1]  # falling
    count = len(places)
    # The first place whose score is no higher: positives stand at theirs, negatives come in with it.
    at = np.searchsorted(-places, -scores, side="left")
    tied = ~positive & (places[np.minimum(at, count - 1)] == scores)
    counted = ~positive & (at < count)  # negatives below all positives come too late to matter
    return _Ranking(
        positive=_sparse(at[positive], member[positive], (count, patients)),
        negative=_sparse(at[counted], member[counted], (count, patients)),
        tied=_sparse(at[tied], member[tied], (count, patients)) if tied.any() else None,
        total=np.bincount(member[~positive], minlength=patients).astype(np.float64),
    )


def _sparse(row: np.ndarray, column: np.ndarray, shape: tuple[int, int], added: np.ndarray | None = None) -> Any:
    entries = np.ones(len(row)) if added is None else added.astype(np.float64)
    return sparse.csr_matrix((entries, (row, column)), shape=shape)  # which adds up what falls on one place


def _numbers(plan: _Plan, counts: np.ndarray) -> metrics.Level:
    """Returns the numbers of a level, [draws] each, for counts [patients, draws]."""
    sums = plan.sums @ counts  # [rows, draws]
    shaped = {name: np.moveaxis(sums[rows].reshape(*shape, -1), -1, 0) for name, (rows, shape) in plan.rows.items()}
    draws = counts.shape[1]
    nothing = np.full(draws, np.nan)
    both = {
        name: (nothing, nothing) if ranking is None else _areas(ranking, counts, precision=name != "logits")
        for name, ranking in plan.rankings.items()
    }
    none = (nothing, nothing)
    per_class = [both.get(str(i), none) for i in range(len(plan.classes))]
    areas = {
        "auc": np.stack([auc for auc, _ in per_class], axis=-1),
        "average_precision": np.stack([precision for _, precision in per_class], axis=-1),
        "auc_micro": both.get("micro", none)[0],
        "average_precision_micro": both.get("micro", none)[1],
        "auc_micro_logits": both.get("logits", none)[0],
    }
    return metrics.metrics_from_statistics(shaped, areas, plan.classes)


def _areas(ranking: _Ranking, counts: np.ndarray, precision: bool) -> tuple[np.ndarray, np.ndarray]:
    """Returns the area under the ROC curve and the average precision, [draws] each, NaN without both sides."""
    hits = ranking.positive @ counts  # [places, draws], new ones at each place
    alarms = ranking.negative @ counts
    np.cumsum(alarms, axis=0, out=alarms)
    negatives = ranking.total @ counts  # [draws]
    positives = hits.sum(axis=0)
    # A positive example beats the negatives that are still to come, and half of those of its own score.
    beaten = np.einsum("pd,pd->d", hits, alarms)
    if ranking.tied is not None:
        beaten -= np.einsum("pd,pd->d", hits, ranking.tied @ counts) / 2
    defined = (positives > 0) & (negatives > 0)
    pairs = np.where(defined, positives * negatives, np.nan)
    auc = 1 - beaten / pairs
    if not precision:
        return auc, np.full_like(auc, np.nan)
    so_far = np.cumsum(hits, axis=0)
    alarms += so_far
    np.maximum(alarms, 1, out=alarms)  # counts, so only where nothing was drawn yet, and no step follows
    np.divide(so_far, alarms, out=so_far)
    return auc, np.einsum("pd,pd->d", hits, so_far) / np.where(defined, positives, np.nan)
