"""Intervals compared with scikit-learn on resampled rows, and with values known in advance."""

import dataclasses

import numpy as np
import pytest
from random_predictions import by_scikit_learn, make_predictions, random_predictions
from scipy import stats

from lungjax.evaluation import bootstrap, metrics
from lungjax.evaluation.predictions import Predictions, take

DRAWS = 20
SCARCE = {"ece"} | {f"{area}_{mean}" for area in bootstrap.AREAS for mean in ("macro", "weighted")}
SCARCE |= {f"per_class.c.{area}" for area in bootstrap.AREAS}  # class c has fewer than five patients


def drawn_rows(p: Predictions, draws: int) -> list[np.ndarray]:
    """The rows in each draw, with repeats; patients are numbered in the order of their names."""
    names = ["1" + i if not g else "0" + g for i, g in zip(p.ids.tolist(), p.groups.tolist(), strict=True)]
    order = sorted(set(names))
    counts = np.concatenate(list(bootstrap.resample_patients(len(order), draws, 7)), axis=1)
    assert (counts.sum(axis=0) == len(order)).all()
    times = counts[[order.index(name) for name in names]].astype(int)
    return [np.repeat(np.arange(len(p)), of_draw) for of_draw in times.T]


def percentiles(values):
    values = np.array(values)
    values = values[~np.isnan(values)]
    return tuple(np.percentile(values, [2.5, 97.5])) if len(values) else None


def test_every_interval_against_scikit_learn():
    for p in (random_predictions(ties=True), random_predictions(ties=False)):
        rows = drawn_rows(p, DRAWS)
        assert min((p.labels[r] == 2).sum() for r in rows) == 0, "some draw lacks the rare class"
        each = [by_scikit_learn(p, r) for r in rows]
        intervals = bootstrap.intervals(p, DRAWS)
        assert len({p.groups[i] or p.ids[i] for i in np.flatnonzero(p.labels == 2)}) < 5
        assert intervals.keys() == metrics.numbers(metrics.summarize(p)).keys() - SCARCE == each[0].keys() - SCARCE
        for name, ends in intervals.items():
            low, high = percentiles([draw[name] for draw in each])
            assert low == high or ends == pytest.approx((low, high)), name


def test_draws_by_block(monkeypatch):
    p = random_predictions()
    intervals = bootstrap.intervals(p, 50)
    assert bootstrap.intervals(p, 50) == intervals
    patients = bootstrap.intervals(p, 50, unit="patient")
    assert patients == bootstrap.intervals(metrics.by_patient(p)[0], 50) != intervals
    monkeypatch.setattr(bootstrap, "BLOCK", 1)
    small = bootstrap.intervals(p, 50)
    assert small.keys() == intervals.keys()
    assert all(small[name] == pytest.approx(intervals[name], abs=1e-12) for name in intervals)


def test_intervals_of_duplicated_slices():
    p = dataclasses.replace(random_predictions(60), groups=np.array([f"p{i:02}" for i in range(60)]))
    ids = np.array([f"{i}" for i in range(240)])
    four = dataclasses.replace(take(p, np.repeat(np.arange(60), 4)), ids=ids)
    once, often = bootstrap.intervals(p, 100), bootstrap.intervals(four, 100)
    assert all(often[name] == pytest.approx(once[name], abs=1e-12) for name in once)
    alone = bootstrap.intervals(dataclasses.replace(four, groups=np.full(240, "")), 100)
    width = {k: ends["accuracy"][1] - ends["accuracy"][0] for k, ends in (("p", often), ("alone", alone))}
    assert width["alone"] < 0.7 * width["p"]


def test_intervals_without_variation():
    """Classes b and c have one patient each, and all 30 predictions are correct."""
    labels = np.array([0] * 28 + [1, 2])
    p = make_predictions(labels, np.eye(3)[labels])
    intervals = bootstrap.intervals(p, 200)
    rates = {"a": {"recall": 28, "specificity": 2}, "b": {"recall": 1, "specificity": 29, "precision": 1, "npv": 29}}
    counts = {f"per_class.{name}.{rate}": n for name, own in rates.items() for rate, n in own.items()}
    for name, n in (counts | {"accuracy": 30, "study.accuracy_rounded": 30}).items():
        assert intervals[name] == pytest.approx(stats.binomtest(n, n).proportion_ci(0.95, "wilson")), name
    others = intervals.keys() - {"loss", "brier", "accuracy", "study.accuracy_rounded"}
    assert all(name.startswith("per_class.") and name.split(".")[2] in metrics.PER_CLASS[:4] for name in others)
    repeated = take(p, np.repeat(np.arange(30), 3))  # three slices per patient add no information
    repeated = dataclasses.replace(repeated, groups=repeated.ids, ids=np.arange(90).astype(np.str_))
    assert bootstrap.intervals(repeated, 200)["accuracy"] == intervals["accuracy"]
    assert bootstrap.over_runs([p, p], ["accuracy"], 50)["accuracy"] == (1, *intervals["accuracy"])
    scores = np.where(np.arange(40) % 7 == 0, 0.3, 0.8)
    for positives, omitted in ((4, True), (5, False), (35, False), (36, True)):
        given = make_predictions(np.arange(40) < positives, np.stack([1 - scores, scores], axis=1))
        assert ("auc_macro" not in bootstrap.intervals(given, 50)) == omitted
        assert (bootstrap.paired_difference(given, given, ["auc_macro"], 50)["auc_macro"].low is None) == omitted
    one = dataclasses.replace(p, groups=np.full(30, "same"))
    assert bootstrap.intervals(one, 200) == {} == bootstrap.intervals(p, 0)
    assert bootstrap.over_runs([one], ["accuracy"], 200) == {"accuracy": (1, None, None)}
    same = bootstrap.paired_difference(one, one, ["accuracy"])["accuracy"]
    assert same == bootstrap.Difference(1, 1, 0, None, None, None)
    none = take(p, np.zeros(0, int))
    assert bootstrap.intervals(none) == {} and bootstrap.intervals(none, unit="patient") == {}
    assert bootstrap.over_runs([none], ["auc_macro"]) == {"auc_macro": (None, None, None)}


def shuffled(p: Predictions) -> Predictions:
    return take(p, np.random.default_rng(0).permutation(len(p)))


def test_average_and_resampling_of_runs():
    names = ["accuracy", "per_class.b.auc", "auc_macro", "study.auc_micro_logits", "average_precision_micro"]
    runs = [random_predictions(seed=s, spread=0.5 + s) for s in range(2)]
    result = bootstrap.over_runs([runs[0], shuffled(runs[1])], names, DRAWS)
    rows = drawn_rows(runs[0], DRAWS)
    each = [[by_scikit_learn(p, r) for r in rows] for p in runs]
    full = [by_scikit_learn(p, np.arange(len(p))) for p in runs]
    weights = np.random.default_rng([0, 2]).multinomial(2, [1 / 2] * 2, size=DRAWS)
    assert result["auc_macro"][1:] == (None, None), "class c is rare"
    for name in (name for name in names if name not in SCARCE):
        values = [sum(k * each[r][d][name] for r, k in enumerate(weights[d]) if k) / 2 for d in range(DRAWS)]
        assert result[name] == pytest.approx((np.mean([w[name] for w in full]), *percentiles(values)), abs=1e-10)
    alone, expected = bootstrap.over_runs(runs[:1], names, 80), bootstrap.intervals(runs[0], 80)
    assert all(alone[name][1:] == pytest.approx(expected.get(name, (None, None))) for name in names)


def test_random_draws_of_some_examples():
    """The correct ones of 96 examples are hypergeometric, those of a random run a mixture over the runs."""
    labels = np.arange(600) % 2

    def run(correct):
        return make_predictions(labels, np.eye(2)[np.where(np.arange(600) < correct, labels, 1 - labels)])

    for correct in ((570,), (300, 570)):
        mean, low, high = bootstrap.over_runs([run(n) for n in correct], ["accuracy"], 8000, size=96)["accuracy"]
        cdf = np.mean([stats.hypergeom.cdf(np.arange(97), 600, n, 96) for n in correct], axis=0)
        assert mean == pytest.approx(np.mean(correct) / 600)
        assert [low * 96, high * 96] == pytest.approx(np.searchsorted(cdf, [0.025, 0.975]), abs=0.01)
    assert bootstrap.over_runs([run(600)], ["accuracy"], 50, size=96)["accuracy"] == (1, 1, 1)
    with pytest.raises(ValueError, match="601 .* 600"):
        bootstrap.over_runs([run(9)], size=601)


def test_paired_difference_against_scikit_learn():
    a, b = random_predictions(seed=1, spread=0.8), random_predictions(seed=2, spread=1.6)
    result = bootstrap.paired_difference(a, shuffled(b), draws=DRAWS)
    pairs = [(by_scikit_learn(a, r), by_scikit_learn(b, r)) for r in drawn_rows(a, DRAWS)]
    assert result.keys() == pairs[0][0].keys()
    for name, difference in result.items():
        assert difference.difference == pytest.approx(difference.b - difference.a)
        if name in SCARCE:
            assert difference.low is difference.high is difference.p is None
            continue
        values = np.array([two[name] - one[name] for one, two in pairs])
        assert (difference.low, difference.high) == pytest.approx(percentiles(values), abs=1e-10), name
        values = values[~np.isnan(values)]
        tail = min((values <= 1e-12).sum(), (values >= -1e-12).sum())
        assert difference.p == pytest.approx(min(1, 2 * (tail + 1) / (len(values) + 1))), name


def test_equal_better_and_disagreeing_runs():
    p = random_predictions(400, 120, spread=2.0)
    same = bootstrap.paired_difference(p, shuffled(p), draws=200)
    assert all(d.p == 1 and d.low == d.high == 0 for name, d in same.items() if name != "ece")
    worse = dataclasses.replace(p, probabilities=p.probabilities[:, [1, 0, 2]])
    difference = bootstrap.paired_difference(p, worse, ["accuracy"], draws=1999)["accuracy"]
    assert difference.high < 0 and difference.p == 2 / 2000
    right, wrong = (dataclasses.replace(p, probabilities=np.eye(3)[(p.labels + i) % 3]) for i in (0, 1))
    assert bootstrap.over_runs([right, wrong], ["accuracy"], 200)["accuracy"] == (0.5, 0, 1)


def test_runs_of_different_test_sets():
    p = random_predictions()
    labels = np.where(p.ids == "i4", (p.labels + 1) % 3, p.labels)
    groups = np.where(p.ids == "i7", "elsewhere", p.groups)
    for changed, words in (
        (dataclasses.replace(p, classes=("a", "b", "d")), "classes"),
        (take(p, np.arange(89)), "such as i89"),
        (take(p, np.array([*range(90), 0])), "duplicates"),
        (dataclasses.replace(p, labels=labels), "labels.*such as i4"),
        (dataclasses.replace(p, groups=groups), "patients.*such as i7: .*'elsewhere'"),
    ):
        for call in (lambda c: bootstrap.paired_difference(p, c), lambda c: bootstrap.over_runs([p, c], ["accuracy"])):
            with pytest.raises(ValueError, match=words):
                call(changed)


def test_binomial_interval_of_many():
    n = 900
    right = np.arange(n) < 0.8 * n
    scores = np.where(right[:, None], [1.0, 0, 0], [0, 1.0, 0])
    intervals = bootstrap.intervals(make_predictions(np.zeros(n), scores), 1000)
    half = 1.96 * np.sqrt(0.8 * 0.2 / n)
    assert intervals["accuracy"] == pytest.approx((0.8 - half, 0.8 + half), abs=0.006)
    assert not intervals.keys() & {"auc_macro", "per_class.b.recall", "study.auc_micro_logits"}


def test_wilson_interval():
    for count, n in ((0, 10), (1, 10), (5, 100), (10, 100), (100, 100)):
        assert bootstrap.wilson(count, n) == pytest.approx(stats.binomtest(count, n).proportion_ci(0.95, "wilson"))
    assert bootstrap.wilson(0, 0) == [0.0, 1.0]
