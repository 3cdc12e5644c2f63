import dataclasses

import numpy as np
import pytest
from sklearn import metrics as sk

from lungjax.evaluation import bootstrap, metrics
from lungjax.evaluation.predictions import Predictions

CLASSES = ("a", "b", "c")
DRAWS = 12


def make(n=90, patients=25, seed=0, ties=True, spread=1.2, classes=CLASSES):
    """Examples of patients of one class each (the labels are the same for every seed), some without a patient."""
    rng, known = np.random.default_rng(seed), np.random.default_rng(99)
    patient = known.integers(0, patients, n)
    labels = np.where(known.random(patients) < 0.08, 2, np.arange(patients) % 2)[patient]
    logits = rng.normal(size=(n, len(classes))).astype(np.float32)
    logits[np.arange(n), labels] += spread
    if ties:
        logits = np.round(logits * 1.5)
    p = np.exp(logits.astype(np.float64))
    return Predictions(
        ids=np.array([f"i{i}" for i in range(n)]),
        groups=np.where(np.arange(n) % 11 == 0, "", np.array([f"p{i}" for i in patient])),
        sources=np.full(n, ""),
        labels=labels,
        probabilities=p / p.sum(axis=1, keepdims=True),
        classes=classes,
        logits=logits,
    )


def drawn_rows(p: Predictions, draws: int, seed: int) -> list[np.ndarray]:
    """The rows of each draw, one by one, from the counts of patients in the order of their first names."""
    names = ["1" + i if not g else "0" + g for i, g in zip(p.ids.tolist(), p.groups.tolist(), strict=True)]
    order = sorted(set(names))
    counts = np.concatenate(list(bootstrap.resample_patients(len(order), draws, seed, 7)), axis=1)
    assert (counts.sum(axis=0) == len(order)).all()
    times = counts[[order.index(name) for name in names]].astype(int)
    return [np.repeat(np.arange(len(p)), times[:, d]) for d in range(draws)]


def by_scikit_learn(p: Predictions, rows: np.ndarray) -> dict[str, float]:
    """All numbers of a level over explicit rows, NaN where scikit-learn or the definition has none."""
    labels, s, z = p.labels[rows], p.probabilities[rows], p.logits[rows]
    said, c = s.argmax(axis=1), len(p.classes)
    one_hot = np.eye(c)[labels]
    there = [0 < one_hot[:, i].sum() < len(rows) for i in range(c)]
    shares = one_hot.mean(axis=0)
    found = {"accuracy": (said == labels).mean(), "loss": sk.log_loss(labels, s, labels=range(c))}
    found["brier"] = ((s - one_hot) ** 2).sum(axis=1).mean()
    place = np.ceil(s.max(axis=1) * 15 - 1e-12)
    found["ece"] = sum(abs((s.max(axis=1) - (said == labels))[place == b].sum()) for b in range(16)) / len(rows)
    each = sk.precision_recall_fscore_support(labels, said, labels=range(c), zero_division=np.nan)
    rates = dict(zip(("precision", "recall", "f1"), each, strict=False))
    for name, own in (("auc", sk.roc_auc_score), ("average_precision", sk.average_precision_score)):
        rates[name] = np.array([own(one_hot[:, i], s[:, i]) if there[i] else np.nan for i in range(c)])
        found[f"{name}_micro"] = own(one_hot.ravel(), s.ravel())
    rest = [
        sk.precision_recall_fscore_support(labels != i, said != i, labels=[True], zero_division=np.nan)
        for i in range(c)
    ]
    rates["npv"], rates["specificity"] = (np.array([r[k][0] for r in rest]) for k in (0, 1))
    for name, values in rates.items():
        found |= {f"per_class.{p.classes[i]}.{name}": values[i] for i in range(c)}
        found[f"{name}_macro"] = np.nanmean(values)
        if name not in ("npv", "specificity"):
            known = ~np.isnan(values)
            found[f"{name}_weighted"] = np.average(values[known], weights=shares[known])
    found["balanced_accuracy"] = found["recall_macro"]
    named = (z == z.max(axis=1, keepdims=True)) & (z != 0)  # TensorFlow Addons: both of a tie
    found["study.f1_weighted"] = sk.f1_score(one_hot, named, average="weighted", zero_division=0)
    found["study.auc_micro_logits"] = sk.roc_auc_score(one_hot.ravel(), z.ravel())
    precision, recall = rates["precision"].mean(), rates["recall"].mean()
    found["study.f1_macro_harmonic"] = 2 * precision * recall / (precision + recall)
    found["study.accuracy_rounded"] = (np.round(s).argmax(axis=1) == labels).mean()
    return found


def percentiles(values):
    values = np.array(values)
    values = values[~np.isnan(values)]
    return tuple(np.percentile(values, [2.5, 97.5])) if len(values) else None


def expected(name, values, point):
    """Percentiles, those of the calibration error reflected at the point: its draws lie above it."""
    low, high = percentiles(values)
    return (max(0.0, 2 * point - high), max(0.0, 2 * point - low)) if name == "ece" else (low, high)


@pytest.mark.parametrize("ties", [True, False])
def test_every_interval_is_that_of_scikit_learn_on_the_drawn_rows(ties):
    p = make(ties=ties)
    rows = drawn_rows(p, DRAWS, seed=3)
    assert min((p.labels[r] == 2).sum() for r in rows) == 0, "some draw lacks the rare class"
    each = [by_scikit_learn(p, r) for r in rows]
    found = bootstrap.intervals(p, DRAWS, seed=3)
    level = metrics.summarize(p.labels, p.probabilities, p.classes, logits=p.logits)
    assert found.keys() == metrics.numbers(level).keys() == each[0].keys()
    for name, ends in found.items():
        assert ends == pytest.approx(expected(name, [draw[name] for draw in each], metrics.numbers(level)[name])), name


def test_weights_do_what_copies_do():
    """Areas with scikit-learn's sample_weight: nothing is copied on either side."""
    p = make(seed=5)
    names = ["1" + i if not g else "0" + g for i, g in zip(p.ids.tolist(), p.groups.tolist(), strict=True)]
    order = sorted(set(names))
    counts = next(bootstrap.resample_patients(len(order), DRAWS, 0, DRAWS))[[order.index(name) for name in names]]
    found = bootstrap.intervals(p, DRAWS)
    for i, name in ((0, "a"), (1, "b")):
        for key, own in (("auc", sk.roc_auc_score), ("average_precision", sk.average_precision_score)):
            values = [own(p.labels == i, p.probabilities[:, i], sample_weight=w) for w in counts.T]
            assert found[f"per_class.{name}.{key}"] == pytest.approx(percentiles(values), abs=1e-10)


def test_draws_follow_from_the_seed_alone(monkeypatch):
    p = make()
    found = bootstrap.intervals(p, 50, seed=1)
    assert bootstrap.intervals(p, 50, seed=1) == found != bootstrap.intervals(p, 50, seed=2)
    monkeypatch.setattr(bootstrap, "BLOCK", 1)
    small = bootstrap.intervals(p, 50, seed=1)
    assert small.keys() == found.keys()
    assert all(small[name] == pytest.approx(found[name], abs=1e-12) for name in found)


def test_copies_of_a_slice_make_no_interval_narrower():
    p = dataclasses.replace(make(60), groups=np.array([f"p{i:02}" for i in range(60)]))
    four = dataclasses.replace(
        bootstrap.take(p, np.repeat(np.arange(60), 4)), ids=np.array([f"{i}" for i in range(240)])
    )
    once, often = bootstrap.intervals(p, 100), bootstrap.intervals(four, 100)
    assert all(often[name] == pytest.approx(once[name], abs=1e-12) for name in once)
    alone = bootstrap.intervals(dataclasses.replace(four, groups=np.full(240, "")), 100)
    width = {k: found["accuracy"][1] - found["accuracy"][0] for k, found in (("p", often), ("alone", alone))}
    assert width["alone"] < 0.7 * width["p"]


def test_a_share_of_many_has_the_binomial_interval():
    n = 900
    right = np.arange(n) < 0.8 * n
    p = dataclasses.replace(
        make(n),
        groups=np.full(n, ""),
        labels=np.zeros(n, int),
        probabilities=np.where(right[:, None], [1.0, 0, 0], [0, 1.0, 0]),
        logits=None,
    )
    found = bootstrap.intervals(p, 1000)
    half = 1.96 * np.sqrt(0.8 * 0.2 / n)
    assert found["accuracy"] == pytest.approx((0.8 - half, 0.8 + half), abs=0.006)
    assert "auc_macro" not in found and "per_class.b.recall" not in found and "study.auc_micro_logits" not in found


def test_what_is_undefined_in_most_draws_has_no_interval():
    """Classes b and c have one patient each: a draw has one of them in 63 % of the cases, both in 40 %."""
    labels = np.array([0] * 28 + [1, 2])
    p = dataclasses.replace(
        make(30), labels=labels, probabilities=np.eye(3)[labels], groups=np.full(30, ""), logits=None
    )
    found = bootstrap.intervals(p, 200)
    assert found["per_class.b.recall"] == (1, 1) and found["recall_macro"] == (1, 1)
    assert "study.f1_macro_harmonic" not in found
    one = dataclasses.replace(p, groups=np.full(30, "same"))
    assert bootstrap.intervals(one, 200) == {} == bootstrap.intervals(p, 0)
    assert bootstrap.over_runs([one], ["accuracy"], 200) == {"accuracy": (1, None, None)}
    assert bootstrap.paired_difference(one, one, ["accuracy"])["accuracy"] == bootstrap.Difference(
        1, 1, 0, None, None, None
    )
    none = bootstrap.take(p, np.zeros(0, int))
    assert bootstrap.intervals(none) == {} and bootstrap.intervals(none, unit="patient") == {}
    assert bootstrap.over_runs([none], ["auc_macro"]) == {"auc_macro": (None, None, None)}


def test_patients_are_drawn_of_the_patient_level():
    p = make()
    patients, _ = metrics.by_patient(p)
    found = bootstrap.intervals(p, 60, unit="patient")
    assert found == bootstrap.intervals(patients, 60) != bootstrap.intervals(p, 60)


def shuffled(p: Predictions, seed=0) -> Predictions:
    return bootstrap.take(p, np.random.default_rng(seed).permutation(len(p)))


def test_several_runs_are_averaged_and_drawn():
    names = ["accuracy", "per_class.b.auc", "auc_macro", "study.auc_micro_logits", "average_precision_micro"]
    runs = [make(seed=s, spread=0.5 + s) for s in range(2)]
    found = bootstrap.over_runs([runs[0], shuffled(runs[1])], names, DRAWS, seed=4)
    rows = drawn_rows(runs[0], DRAWS, 4)
    each = [[by_scikit_learn(p, r) for r in rows] for p in runs]
    whole = [by_scikit_learn(p, np.arange(len(p))) for p in runs]
    chosen = np.random.default_rng([4, 2]).multinomial(2, [1 / 2] * 2, size=DRAWS)
    for name in names:
        values = [sum(k * each[r][d][name] for r, k in enumerate(chosen[d]) if k) / 2 for d in range(DRAWS)]
        assert found[name] == pytest.approx((np.mean([w[name] for w in whole]), *percentiles(values)), abs=1e-10)
    alone = bootstrap.over_runs(runs[:1], names, 80)
    wanted = bootstrap.intervals(runs[0], 80)
    assert all(alone[name][1:] == pytest.approx(wanted[name]) for name in names)


def test_runs_that_disagree_widen_the_interval():
    p = make()
    right = dataclasses.replace(p, probabilities=np.eye(3)[p.labels])
    wrong = dataclasses.replace(p, probabilities=np.eye(3)[(p.labels + 1) % 3])
    assert bootstrap.over_runs([right, wrong], ["accuracy"], 200)["accuracy"] == (0.5, 0, 1)
    assert bootstrap.over_runs([right, right], ["accuracy"], 200)["accuracy"] == (1, 1, 1)


def test_a_difference_is_that_of_the_same_draws():
    a, b = make(seed=1, spread=0.8), make(seed=2, spread=1.6)
    found = bootstrap.paired_difference(a, shuffled(b), draws=DRAWS, seed=6)
    rows = drawn_rows(a, DRAWS, 6)
    pairs = [(by_scikit_learn(a, r), by_scikit_learn(b, r)) for r in rows]
    assert found.keys() == pairs[0][0].keys()
    for name, difference in found.items():
        values = np.array([two[name] - one[name] for one, two in pairs])
        assert (difference.low, difference.high) == pytest.approx(percentiles(values), abs=1e-10), name
        assert difference.difference == pytest.approx(difference.b - difference.a)
        values = values[~np.isnan(values)]
        tail = min((values <= 1e-12).sum(), (values >= -1e-12).sum())
        assert difference.p == pytest.approx(min(1, 2 * (tail + 1) / (len(values) + 1))), name
    assert bootstrap.paired_difference(a, b, ["auc_micro"], DRAWS, 6) == {"auc_micro": found["auc_micro"]}


def test_p_is_one_for_the_same_and_small_for_the_better():
    p = make(400, 120, spread=2.0)
    same = bootstrap.paired_difference(p, shuffled(p), draws=200)
    assert all(d.p == 1 and d.low == d.high == 0 for d in same.values())
    worse = dataclasses.replace(p, probabilities=p.probabilities[:, [1, 0, 2]])
    found = bootstrap.paired_difference(p, worse, ["accuracy"], draws=1999)["accuracy"]
    assert found.high < 0 and found.p == 2 / 2000


def test_what_cannot_be_compared_is_named():
    p = make()
    other = p.labels.copy()
    other[4] = (other[4] + 1) % 3
    groups = np.where(p.ids == "i7", "elsewhere", p.groups)
    for changed, words in (
        (dataclasses.replace(p, classes=("a", "b", "d")), "other classes: a, b, c and a, b, d"),
        (bootstrap.take(p, np.arange(89)), "other examples, 90 and 89: 1 only in the first, such as i89"),
        (
            dataclasses.replace(p, ids=np.char.add(p.ids, "x")),
            "90 only in the first, such as i0; 90 only in the second",
        ),
        (bootstrap.take(p, np.array([0, *range(1, 89), 0])), "other examples, 90 and 90: 1 only in the first"),
        (dataclasses.replace(p, labels=other), "other labels for 1 of 90 examples, such as i4"),
        (dataclasses.replace(p, groups=groups), "other patients for 1 of 90 examples, such as i7: .*'elsewhere'"),
    ):
        for call in (lambda c: bootstrap.paired_difference(p, c), lambda c: bootstrap.over_runs([p, c], ["accuracy"])):
            with pytest.raises(ValueError, match=words):
                call(changed)


def test_wrong_arguments_are_named():
    p = make()
    with pytest.raises(ValueError, match=r"no number 'auc'.*nearest"):
        bootstrap.over_runs([p], ["auc"])
    with pytest.raises(ValueError, match="no number 'per_class.x.recall'"):
        bootstrap.paired_difference(p, p, ["per_class.x.recall"])
    with pytest.raises(ValueError, match="unit='image': allowed are slice, patient"):
        bootstrap.intervals(p, unit="image")
    with pytest.raises(ValueError, match="draws=-1"):
        bootstrap.intervals(p, -1)
    with pytest.raises(ValueError, match="no runs"):
        bootstrap.over_runs([], ["accuracy"])
    p.probabilities[3] = np.nan
    with pytest.raises(ValueError, match="i3"):
        bootstrap.intervals(p)


@pytest.mark.parametrize(
    "count, n, low, high",
    [
        (0, 10, 0.0, 0.2775),
        (1, 10, 0.0179, 0.4042),
        (5, 100, 0.0215, 0.1118),
        (100, 100, 0.9630, 1.0),
        (0, 0, 0.0, 1.0),
    ],
)
def test_interval_is_wilsons(count, n, low, high):
    """Newcombe 1998's formula, by hand."""
    assert bootstrap.wilson(count, n) == pytest.approx([low, high], abs=5e-5)
    if n:
        z, p = 1.959964, count / n
        half = z * np.sqrt(p * (1 - p) / n + z**2 / 4 / n**2)
        by_hand = [(p + z**2 / 2 / n + s * half) / (1 + z**2 / n) for s in (-1, 1)]
        assert bootstrap.wilson(count, n) == pytest.approx(by_hand, abs=1e-6)
