"""Metrics compared with scikit-learn and with values computed by hand."""

from dataclasses import replace

import numpy as np
import pytest
from random_predictions import by_scikit_learn, make_predictions, random_predictions
from sklearn import metrics as sk

from lungjax.evaluation import calibration, metrics
from lungjax.evaluation.predictions import take

TOLERANCE = 1e-12


def random_case(seed, n=300, c=3, ties=True, labels=None):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, c, n) if labels is None else labels
    scores = rng.random((n, c))
    scores[np.arange(n), labels] += 0.4
    return make_predictions(labels, np.ceil(scores * 4) if ties else scores)


def level_of(labels, scores):
    return metrics.summarize(make_predictions(labels, scores))


def check_against_scikit_learn(given):
    level = metrics.summarize(given)
    numbers, expected = metrics.numbers(level), by_scikit_learn(given)
    assert numbers.keys() == expected.keys()
    for name, value in numbers.items():
        assert value == (None if np.isnan(expected[name]) else pytest.approx(expected[name], abs=TOLERANCE)), name
    return level


def test_every_metric_against_scikit_learn():
    for c, ties in ((2, True), (3, False), (7, True)):
        given = random_case(c, 300, c, ties)
        logits = np.log(given.probabilities) + np.random.default_rng(0).normal(size=(300, 1)) * 3
        level = check_against_scikit_learn(given)
        assert level["n"] == 300 and level["study"]["auc_micro_logits"] is None
        assert level["confusion"] == sk.confusion_matrix(given.labels, given.predicted, labels=range(c)).tolist()
        assert [row["n"] for row in level["per_class"].values()] == np.bincount(given.labels).tolist()
        check_against_scikit_learn(replace(given, logits=logits))


def test_undefined_metrics_of_an_absent_class():
    absent = check_against_scikit_learn(random_case(3, 200, labels=np.arange(200) % 2))["per_class"]["c"]
    assert absent == absent | {"n": 0, "recall": None, "auc": None, "average_precision": None, "npv": 1.0}
    # A class that is never predicted has no precision.
    never = level_of([0, 1, 2, 2], np.eye(3)[[0, 0, 1, 1]] * 0.6 + 0.4 / 3)
    assert never["per_class"]["c"] == never["per_class"]["c"] | {"precision": None, "recall": 0, "f1": 0}
    assert never["precision_macro"] == pytest.approx((1 / 2 + 0) / 2)


def test_single_class_single_example_and_empty():
    single = level_of(np.zeros(5), np.tile([0.7, 0.3], (5, 1)))
    assert single["accuracy"] == single["balanced_accuracy"] == 1
    assert single["auc_macro"] is single["average_precision_macro"] is single["auc_weighted"] is None
    assert single["per_class"]["a"]["specificity"] is None
    one = level_of([1], [[0.25, 0.75]])
    assert one["confusion"] == [[0, 0], [0, 1]] and one["loss"] == pytest.approx(-np.log(0.75))
    none = level_of([], np.zeros((0, 2)))
    assert none["n"] == 0 and not any(v is not None for v in metrics.numbers(none).values())


def test_study_metrics_by_hand():
    # Rounded: the first class is predicted if no probability exceeds 0.5.
    p = [[0.2, 0.45, 0.35], [0.0, 0.5, 0.5], [0.1, 0.7, 0.2], [0.1, 0.2, 0.7]]
    for labels, accuracy, rounded in (([0, 1, 1, 2], 3 / 4, 3 / 4), ([1, 1, 1, 2], 1, 2 / 4)):
        level = level_of(labels, p)
        assert level["accuracy"] == accuracy and level["study"]["accuracy_rounded"] == rounded
    # TensorFlow Addons: all tied classes count as predicted, and 0 / 0 is 0. Class b has precision 1/2 and recall 1,
    # and class a has recall 0.
    study = level_of([1, 0], [[0.0, 0.5, 0.5], [0.1, 0.8, 0.1]])["study"]
    assert study["f1_weighted"] == pytest.approx((2 * 0.5 * 1 / 1.5 + 0) / 2)
    assert study["f1_macro_harmonic"] is None  # class a is never predicted, class c has no example
    raw = random_predictions()
    cold, warm = (metrics.summarize(calibration.apply_temperature(raw, t)) for t in (1.0, 3.0))
    assert warm["study"] == cold["study"] and warm["loss"] != cold["loss"], "the studies do not calibrate"


def test_invalid_probabilities():
    for bad, words in (
        ((np.nan, 0.5, 0.5), "NaN"),
        ((np.inf, 0, 0), "infinite"),
        ((1.5, -0.5, 0), "outside 0..1"),
        ((0.5, 0.6, 0.5), "sum to 1"),
    ):
        given = random_case(0, 20)
        given.probabilities[[3, 7]] = bad
        for function in (metrics.by_patient, metrics.report_levels):
            with pytest.raises(ValueError, match=rf"2 of 20 .*{words}.* i3, i7"):
                function(given)
        given.probabilities[:] = bad
        with pytest.raises(ValueError, match="i4 and 15 more"):
            metrics.summarize(given)


def patients():
    """p1 has two slices from one source, p2 has mixed labels, and p3 has two sources; two slices have no patient."""
    return make_predictions(
        [0, 1, 0, 1, 1, 0, 2, 0],
        [
            *([0.2, 0.8, 0.0], [0.6, 0.3, 0.1], [1.0, 0.0, 0.0], [0.1, 0.8, 0.1]),
            *([0.0, 1.0, 0.0], [0.9, 0.1, 0.0], [0.0, 0.0, 1.0], [0.4, 0.3, 0.3]),
        ],
        groups=["p3", "p1", "p2", "p1", "p2", "p3", "", ""],
        sources=["x", "x", "x", "x", "x", "y", "", ""],
        ids=np.array(["s0", "s1", "s2", "s3", "s4", "s5", "p1", "s7"]),
    )


def test_patient_means_without_mixed_labels():
    means, mixed = metrics.by_patient(patients())
    assert mixed == 1
    columns = zip(means.ids, means.labels, means.sources, means.probabilities, strict=True)
    rows = {(str(name), int(label)): (str(source), p) for name, label, source, p in columns}
    # The slice "p1" without a patient is not patient p1.
    assert rows.keys() == {("p1", 1), ("p3", 0), ("p1", 2), ("s7", 0)}
    assert rows["p1", 1][0] == "x" and rows["p3", 0][0] == "several"
    np.testing.assert_allclose(rows["p1", 1][1], [0.35, 0.55, 0.1])
    np.testing.assert_allclose(rows["p3", 0][1], [0.55, 0.45, 0.0], atol=1e-15)
    only_mixed = make_predictions([0, 1], np.full((2, 2), 0.5), groups=["g", "g"])
    level = metrics.report_levels(only_mixed)["patient"]
    assert level["n"] == 0 and level["mixed_groups"] == 1 and level["accuracy"] is None


def test_levels_of_slices_patients_and_sources():
    p = patients()
    levels = metrics.report_levels(p)
    assert levels["slice"] == metrics.summarize(p)
    assert levels["patient"]["n"] == 4 and levels["patient"]["mixed_groups"] == 1
    assert levels["patient"]["accuracy"] == 1 and levels["slice"]["accuracy"] == 6 / 8
    sources = levels["subgroups"]["source"]
    assert {source: level["n"] for source, level in sources.items()} == {"x": 5, "y": 1, "unknown": 2}
    part = take(p, np.flatnonzero(p.sources == "x"))
    patients_of_x = len(set(part.groups) - {""}) + (part.groups == "").sum()
    assert sources["x"] == {"patients": patients_of_x} | metrics.summarize(part)
    assert metrics.report_levels(make_predictions(p.labels, p.probabilities))["subgroups"] == {}


def test_subgroups_of_kept_columns():
    p = make_predictions(np.arange(36) % 2, np.full((36, 2), 0.5))
    age = np.array([*map(str, range(20, 50)), *("30.5", "", "nan", "31", "31", "31")])
    columns = {
        "sex": np.array(["F"] * 20 + ["M"] * 15 + [""]), "age": age, "country": np.array(["China"] * 36),
        "name": np.array([f"p{i}" for i in range(36)]), "aggregate": np.array(["mean", "max"] * 18),
    }  # fmt: skip
    groups = metrics.subgroups(replace(p, extra=columns))
    sizes = {name: {value: len(part) for value, part in parts.items()} for name, parts in groups.items()}
    # Ages 20 to 49, 30.5 and three more 31: thirds of 34 known values end at the 12th and the 23rd.
    assert sizes == {
        "sex": {"F": 20, "M": 15, "unknown": 1},
        "age": {"20 to 30.5": 12, "31 to 38": 11, "39 to 49": 11, "unknown": 2},
    }
