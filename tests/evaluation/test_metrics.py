import time

import numpy as np
import pytest
from sklearn import metrics as sk

from lungjax.evaluation import metrics
from lungjax.evaluation.predictions import Predictions

TOLERANCE = 1e-12
CLASSES = ("a", "b", "c")


def random_case(seed, n=300, c=3, ties=True, labels=None):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, c, n) if labels is None else labels
    scores = rng.random((n, c))
    scores[np.arange(n), labels] += 0.4
    if ties:
        scores = np.ceil(scores * 4)
    return labels, scores / scores.sum(axis=1, keepdims=True)


def predicted_by(probabilities):
    return probabilities.argmax(axis=1)


def close(found, wanted):
    if wanted is None or np.isnan(wanted):
        assert found is None
    else:
        assert found == pytest.approx(wanted, abs=TOLERANCE)


@pytest.mark.parametrize("c", [2, 3, 7])
@pytest.mark.parametrize("ties", [True, False])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_number_is_scikit_learns(c, ties, seed):
    labels, p = random_case(seed, 300, c, ties)
    names = tuple(f"class {i}" for i in range(c))
    found = metrics.summarize(labels, p, names)
    predicted = predicted_by(p)
    one_hot = np.eye(c)[labels]
    assert found["n"] == 300
    assert found["confusion"] == sk.confusion_matrix(labels, predicted, labels=range(c)).tolist()
    close(found["accuracy"], sk.accuracy_score(labels, predicted))
    close(found["balanced_accuracy"], sk.balanced_accuracy_score(labels, predicted))
    close(found["recall_macro"], sk.balanced_accuracy_score(labels, predicted))
    close(found["loss"], sk.log_loss(labels, p, labels=range(c)))
    for average in ("macro", "weighted"):
        scores = sk.precision_recall_fscore_support(labels, predicted, average=average, zero_division=np.nan)
        for name, wanted in zip(("precision", "recall", "f1"), scores, strict=False):
            close(found[f"{name}_{average}"], wanted)
        close(found[f"auc_{average}"], sk.roc_auc_score(one_hot, p, average=average))
        close(found[f"average_precision_{average}"], sk.average_precision_score(one_hot, p, average=average))
    close(found["auc_micro"], sk.roc_auc_score(one_hot, p, average="micro"))
    close(found["average_precision_micro"], sk.average_precision_score(one_hot, p, average="micro"))
    each = sk.precision_recall_fscore_support(labels, predicted, zero_division=np.nan)
    for i, name in enumerate(names):
        row = found["per_class"][name]
        for key, wanted in zip(("precision", "recall", "f1", "n"), each, strict=True):
            close(row[key], wanted[i])
        close(row["auc"], sk.roc_auc_score(one_hot[:, i], p[:, i]))
        close(row["average_precision"], sk.average_precision_score(one_hot[:, i], p[:, i]))
        # Of the rest: its recall and its precision.
        rest = sk.precision_recall_fscore_support(
            labels != i, predicted != i, pos_label=True, average="binary", zero_division=np.nan
        )
        close(row["npv"], rest[0])
        close(row["specificity"], rest[1])


def test_specificity_and_npv_by_hand():
    labels = np.array([0, 0, 0, 1, 1, 2])
    p = np.eye(3)[[0, 1, 0, 1, 2, 2]]
    rows = metrics.summarize(labels, p, CLASSES)["per_class"]
    assert {name: (row["specificity"], row["npv"]) for name, row in rows.items()} == {
        "a": (1.0, 3 / 4),  # TN 3 of 3 others; 4 not called a, of which one is a
        "b": (3 / 4, 3 / 4),
        "c": (4 / 5, 1.0),
    }
    level = metrics.summarize(labels, p, CLASSES)
    assert level["specificity_macro"] == pytest.approx((1 + 3 / 4 + 4 / 5) / 3)
    assert level["npv_macro"] == pytest.approx((3 / 4 + 3 / 4 + 1) / 3)


def test_an_absent_class_is_left_out_and_nothing_is_made_up():
    labels, p = random_case(3, labels=np.random.default_rng(0).integers(0, 2, 200), n=200)
    predicted = predicted_by(p)
    assert (predicted == 2).any()
    found = metrics.summarize(labels, p, CLASSES)
    absent = found["per_class"]["c"]
    assert absent == absent | {"n": 0, "recall": None, "auc": None, "average_precision": None, "npv": 1.0}
    assert absent["specificity"] == pytest.approx((predicted != 2).mean())
    assert found["confusion"] == sk.confusion_matrix(labels, predicted, labels=range(3)).tolist()
    both = [sk.roc_auc_score(labels == i, p[:, i]) for i in (0, 1)]
    close(found["auc_macro"], np.mean(both))
    close(found["auc_weighted"], np.average(both, weights=np.bincount(labels)))
    close(found["auc_micro"], sk.roc_auc_score(np.eye(3)[labels].ravel(), p.ravel()))
    close(found["balanced_accuracy"], sk.recall_score(labels, predicted, labels=[0, 1], average="macro"))
    for name, score in (("precision", sk.precision_score), ("recall", sk.recall_score), ("f1", sk.f1_score)):
        for average in ("macro", "weighted"):
            wanted = score(labels, predicted, labels=range(3), average=average, zero_division=np.nan)
            close(found[f"{name}_{average}"], wanted)


def test_a_class_never_predicted_has_no_precision():
    labels = np.array([0, 1, 2, 2])
    found = metrics.summarize(labels, np.array([[0.6, 0.3, 0.1]] * 2 + [[0.3, 0.6, 0.1]] * 2), CLASSES)
    assert found["per_class"]["c"]["precision"] is None and found["per_class"]["c"]["recall"] == 0
    assert found["per_class"]["c"]["f1"] == 0
    assert found["precision_macro"] == pytest.approx((1 / 2 + 0) / 2)


def test_one_class_one_example_and_none():
    single = metrics.summarize(np.zeros(5, int), np.tile([0.7, 0.3], (5, 1)), ("a", "b"))
    assert single["accuracy"] == single["balanced_accuracy"] == 1
    assert single["auc_macro"] is single["average_precision_macro"] is single["auc_weighted"] is None
    assert single["per_class"]["a"]["specificity"] is None
    one = metrics.summarize(np.array([1]), np.array([[0.25, 0.75]]), ("a", "b"))
    assert one["n"] == 1 and one["confusion"] == [[0, 0], [0, 1]] and one["auc_macro"] is None
    assert one["loss"] == pytest.approx(-np.log(0.75))
    none = metrics.summarize(np.zeros(0, int), np.zeros((0, 2)), ("a", "b"))
    assert none["n"] == 0 and none["confusion"] == [[0, 0], [0, 0]]
    assert not any(v is not None for v in metrics.numbers(none).values())


def test_a_perfect_and_an_all_wrong_predictor():
    labels = np.arange(12) % 3
    perfect = metrics.summarize(labels, np.eye(3)[labels], CLASSES)
    zeros = {"loss", "ece", "brier"}
    ones = [k for k in metrics.numbers(perfect) if k not in zeros and not k.endswith("logits")]
    assert all(metrics.numbers(perfect)[k] == 1 for k in ones) and len(ones) == 40
    assert all(perfect[k] == 0 for k in zeros)
    wrong = metrics.summarize(labels, np.eye(3)[(labels + 1) % 3], CLASSES)
    assert wrong["accuracy"] == wrong["f1_macro"] == 0
    assert wrong["loss"] == pytest.approx(sk.log_loss(labels, np.eye(3)[(labels + 1) % 3]), rel=1e-9)


@pytest.mark.parametrize("ties", [True, False])
def test_curves_are_scikit_learns(ties):
    labels, p = random_case(5, 200, ties=ties)
    positive, scores = labels == 1, p[:, 1]
    fpr, tpr, thresholds = metrics.roc_curve(positive, scores)
    for found, wanted in zip(
        (fpr, tpr, thresholds), sk.roc_curve(positive, scores, drop_intermediate=False), strict=True
    ):
        np.testing.assert_allclose(found, wanted, atol=TOLERANCE)
    recall, precision, thresholds = metrics.pr_curve(positive, scores)
    wanted_precision, wanted_recall, wanted_thresholds = sk.precision_recall_curve(positive, scores)
    np.testing.assert_allclose(recall[::-1], wanted_recall, atol=TOLERANCE)
    np.testing.assert_allclose(precision[::-1], wanted_precision, atol=TOLERANCE)
    np.testing.assert_allclose(thresholds[1:][::-1], wanted_thresholds, atol=TOLERANCE)
    assert metrics.auc(positive, scores) == pytest.approx(np.trapezoid(tpr, fpr), abs=TOLERANCE)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ((np.nan, 0.5, 0.5), "are NaN"),
        ((np.inf, 0, 0), "infinite"),
        ((1.5, -0.5, 0), "outside 0..1"),
        ((0.5, 0.6, 0.5), "sum to 1"),
    ],
)
def test_what_is_no_probability_is_refused_by_name(bad, words):
    labels, p = random_case(0, 20)
    p[[3, 7]] = bad
    ids = np.array([f"slice_{i}.png" for i in range(20)])
    with pytest.raises(ValueError, match=rf"2 of 20 .*{words}.*slice_3.png, slice_7.png"):
        metrics.summarize(labels, p, CLASSES, ids)
    given = Predictions(ids, ids, ids, labels, p, CLASSES)
    for function in (metrics.by_patient, metrics.report_levels):
        with pytest.raises(ValueError, match=r"slice_3\.png"):
            function(given)
    p[:] = bad
    with pytest.raises(ValueError, match=r"row 4 and 15 more"):
        metrics.summarize(labels, p, CLASSES)


def patients() -> Predictions:
    """p1: two slices of one source; p2: labels mixed; p3: two sources; then two slices without a patient."""
    return Predictions(
        ids=np.array(["s0", "s1", "s2", "s3", "s4", "s5", "p1", "s7"]),
        groups=np.array(["p3", "p1", "p2", "p1", "p2", "p3", "", ""]),
        sources=np.array(["x", "x", "x", "x", "x", "y", "", ""]),
        labels=np.array([0, 1, 0, 1, 1, 0, 2, 0]),
        probabilities=np.array(
            [
                *([0.2, 0.8, 0.0], [0.6, 0.3, 0.1], [1.0, 0.0, 0.0], [0.1, 0.8, 0.1]),
                *([0.0, 1.0, 0.0], [0.9, 0.1, 0.0], [0.0, 0.0, 1.0], [0.4, 0.3, 0.3]),
            ],
            dtype=np.float32,
        ),
        classes=CLASSES,
    )


def test_patients_are_means_and_mixed_ones_are_left_out():
    found, mixed = metrics.by_patient(patients())
    assert mixed == 1
    rows = {
        (str(name), int(label)): (str(source), p)
        for name, label, source, p in zip(found.ids, found.labels, found.sources, found.probabilities, strict=True)
    }
    # The slice "p1" without a patient is not patient p1.
    assert rows.keys() == {("p1", 1), ("p3", 0), ("p1", 2), ("s7", 0)}
    assert rows[("p1", 1)][0] == "x" and rows[("p3", 0)][0] == "several"
    np.testing.assert_allclose(rows[("p1", 1)][1], [0.35, 0.55, 0.1], atol=1e-7)
    np.testing.assert_allclose(rows[("p3", 0)][1], [0.55, 0.45, 0.0], atol=1e-7)


def test_levels_hold_slices_patients_and_sources():
    p = patients()
    levels = metrics.report_levels(p)
    assert levels["slice"] == metrics.summarize(p.labels, p.probabilities, CLASSES)
    assert levels["patient"]["n"] == 4 and levels["patient"]["mixed_groups"] == 1
    assert levels["patient"]["accuracy"] == 1 and levels["slice"]["accuracy"] == 6 / 8
    assert {source: level["n"] for source, level in levels["by_source"].items()} == {
        "x": 5,
        "y": 1,
        "unknown": 2,
    }
    x = p.sources == "x"
    assert levels["by_source"]["x"] == metrics.summarize(p.labels[x], p.probabilities[x], CLASSES)
    bare = Predictions(p.ids, p.groups, np.full(8, ""), p.labels, p.probabilities, CLASSES)
    assert metrics.report_levels(bare)["by_source"] == {}


def test_calibration_is_what_the_definitions_say():
    labels, p = random_case(4, 400, 3, ties=False)
    found = metrics.summarize(labels, p, CLASSES)
    right = p.argmax(axis=1) == labels
    # Guo et al.'s own loop: bins without their lower edge.
    ece = 0.0
    for low in np.arange(15) / 15:
        inside = (p.max(axis=1) > low) & (p.max(axis=1) <= low + 1 / 15)
        if inside.any():
            ece += inside.mean() * abs(right[inside].mean() - p.max(axis=1)[inside].mean())
    close(found["ece"], ece)
    close(found["brier"], np.mean([sk.brier_score_loss(labels == i, p[:, i]) for i in range(3)]) * 3)
    # By hand: 0.6 lies in the bin (8/15, 9/15], with its upper edge, and 0.61 in the next.
    p = np.array([[0.6, 0.4], [0.6, 0.4], [0.61, 0.39]])
    found = metrics.summarize(np.array([0, 1, 1]), p, ("a", "b"))
    assert found["ece"] == pytest.approx((abs(1.2 - 1) + 0.61) / 3)
    assert found["brier"] == pytest.approx((2 * 0.16 + 2 * 0.36 + 2 * 0.61**2) / 3)


def test_the_studies_numbers_by_their_own_formulas():
    labels, p = random_case(2, 60, 3, ties=False)
    logits = np.log(p) + np.random.default_rng(0).normal(size=(60, 1)) * 3
    found = metrics.summarize(labels, p, CLASSES, logits=logits)["study"]
    assert found["f1_weighted"] == pytest.approx(sk.f1_score(labels, p.argmax(axis=1), average="weighted"))
    assert found["auc_micro_logits"] == pytest.approx(sk.roc_auc_score(np.eye(3)[labels].ravel(), logits.ravel()))
    assert abs(found["auc_micro_logits"] - metrics.summarize(labels, p, CLASSES)["auc_micro"]) > 0.05
    assert metrics.summarize(labels, p, CLASSES)["study"]["auc_micro_logits"] is None
    precision, recall = (f(labels, p.argmax(axis=1), average="macro") for f in (sk.precision_score, sk.recall_score))
    assert found["f1_macro_harmonic"] == pytest.approx(2 / (1 / precision + 1 / recall))
    # Rounded: nothing above a half is the first class, as is a half and a half.
    p = np.array([[0.2, 0.45, 0.35], [0.0, 0.5, 0.5], [0.1, 0.7, 0.2], [0.1, 0.2, 0.7]])
    found = metrics.summarize(np.array([0, 1, 1, 2]), p, CLASSES)
    assert found["accuracy"] == 3 / 4 and found["study"]["accuracy_rounded"] == 3 / 4
    found = metrics.summarize(np.array([1, 1, 1, 2]), p, CLASSES)
    assert found["accuracy"] == 1 and found["study"]["accuracy_rounded"] == 2 / 4
    # TensorFlow Addons: each class of a tie counts as named, and 0 / 0 is 0. Class b: 1 of 2 named is right, its
    # only example is found; class a: its only example is missed.
    p = np.array([[0.0, 0.5, 0.5], [0.1, 0.8, 0.1]])
    found = metrics.summarize(np.array([1, 0]), p, CLASSES)["study"]
    assert found["f1_weighted"] == pytest.approx((2 * 0.5 * 1 / 1.5 + 0) / 2)
    assert found["f1_macro_harmonic"] is None, "class a is never predicted, class c has no example"


def test_only_mixed_patients_leave_an_empty_level():
    p = Predictions(*np.array([["a", "b"], ["g", "g"], ["", ""]]), np.array([0, 1]), np.full((2, 2), 0.5), ("x", "y"))
    level = metrics.report_levels(p)["patient"]
    assert level["n"] == 0 and level["mixed_groups"] == 1 and level["accuracy"] is None


def test_a_large_test_split_takes_less_than_a_second():
    labels, p = random_case(0, 30_000, ties=False)
    groups = np.array([f"p{i // 70}" for i in range(30_000)])
    ids = np.array([f"{i}.png" for i in range(30_000)])
    given = Predictions(ids, groups, groups, labels, p.astype(np.float32), CLASSES)
    start = time.process_time()
    metrics.report_levels(given)
    for i in range(3):
        metrics.roc_curve(labels == i, p[:, i])
        metrics.pr_curve(labels == i, p[:, i])
    assert time.process_time() - start < 1
