"""Several findings per image, some unknown: every number against scikit-learn on the known labels, or by hand."""

import numpy as np
import pytest
from random_predictions import by_scikit_learn, make_predictions, random_findings
from scipy import special
from sklearn import metrics as sk

from lungjax.config import EvalConfig
from lungjax.evaluation import (
    aggregation,
    bootstrap,
    calibration,
    ensemble,
    metrics,
    operating_points,
    paired_tests,
    predictions,
)  # fmt: skip
from lungjax.evaluation.predictions import Predictions


def known_part(p: Predictions, i: int) -> Predictions:
    """The binary problem of one finding, built without lungjax's own function."""
    rows = p.labels[:, i] >= 0
    score = p.probabilities[rows, i]
    return make_predictions(p.labels[rows, i], np.stack([1 - score, score], axis=1), groups=p.groups[rows])


def test_metrics_of_known_labels_against_scikit_learn():
    p = random_findings()
    level = metrics.summarize(p)
    parts = [by_scikit_learn(known_part(p, i)) for i in range(3)]
    for name, part, known in zip(p.classes, parts, (p.labels >= 0).sum(axis=0), strict=True):
        own = level["per_class"][name]
        assert own["known"] == known < 240 and own["n"] == (p.labels[:, p.classes.index(name)] == 1).sum()
        for rate in metrics.PER_CLASS:
            assert own[rate] == pytest.approx(part[f"per_class.b.{rate}"])
    for rate in metrics.PER_CLASS:
        assert level[f"{rate}_macro"] == pytest.approx(np.mean([part[f"per_class.b.{rate}"] for part in parts]))
    for rate in ("accuracy", "loss", "brier", "ece", "balanced_accuracy"):
        expected = np.mean([part[rate] for part in parts]) / (2 if rate == "brier" else 1)  # of one class, not of two
        assert level[rate] == pytest.approx(expected), rate
    masked = [sk.roc_auc_score(p.labels[m, i], p.probabilities[m, i]) for i, m in enumerate((p.labels >= 0).T)]
    assert level["auc_macro"] == pytest.approx(np.mean(masked)) and level["n"] == 240
    undefined = metrics.summarize(predictions.take(p, np.flatnonzero(p.labels[:, 0] != 1)))
    assert undefined["per_class"]["edema"]["auc"] is None and undefined["auc_macro"] is not None


def test_intervals_resample_patients_of_all_findings_together():
    p = random_findings(n=150, patients=30)
    low, high = bootstrap.intervals(p, 200)["auc_macro"]
    names, member = np.unique(p.groups, return_inverse=True)
    draws = []
    for counts in next(bootstrap.resample_patients(len(names), 200, 200)).T:
        rows = np.repeat(np.arange(len(p)), counts[member].astype(int))
        y, s = p.labels[rows], p.probabilities[rows]
        draws.append(np.mean([sk.roc_auc_score(y[m, i], s[m, i]) for i, m in enumerate((y >= 0).T)]))
    np.testing.assert_allclose((low, high), np.percentile(draws, [2.5, 97.5]), rtol=1e-12)


def test_patients_with_conflicting_images_count_as_unknown():
    labels = np.array([[1, 0], [0, 0], [-1, 1], [1, -1], [-1, -1]])
    ids, groups = np.array(list("abcde")), np.array(["p", "p", "q", "q", "r"])
    scores = np.array([[0.9, 0.1], [0.5, 0.3], [0.2, 0.6], [0.4, 0.8], [0.7, 0.7]])
    patients, mixed = metrics.by_patient(Predictions(ids, groups, ids, labels, scores, ("x", "y")))
    assert mixed == 1 and patients.labels.tolist() == [[-1, 0], [1, 1], [-1, -1]]
    np.testing.assert_allclose(patients.probabilities, [[0.7, 0.2], [0.3, 0.7], [0.7, 0.7]])
    highest = aggregation.aggregate(scores[:2], ("x", "y"), "max:x", exclusive=False)
    np.testing.assert_allclose(highest, [[0.9, 0.2]])  # y keeps its mean: findings do not share a sum of 1


def test_calibration_of_each_finding():
    p = random_findings()
    temperatures = calibration.fit_temperature(p)
    for i, own in enumerate(temperatures):
        rows = p.labels[:, i] >= 0

        def loss(t, i=i, rows=rows):
            return sk.log_loss(p.labels[rows, i], special.expit(p.logits[rows, i].astype(float) / t))

        assert loss(own) <= min(loss(own * 1.01), loss(own / 1.01))
    scaled = calibration.apply_temperature(p, temperatures)
    np.testing.assert_allclose(scaled.probabilities, special.expit(p.logits / np.array(temperatures)), rtol=1e-5)
    summary = calibration.summary(scaled, temperatures, draws=0)
    top = np.maximum(scaled.probabilities, 1 - scaled.probabilities)[p.labels >= 0]
    assert sum(b["n"] for b in summary["calibrated"]["bins"]) == len(top)
    own = calibration.recalibration(known_part(scaled, 1), 0)["b"]
    assert summary["calibrated"]["per_class"]["mass"]["slope"] == pytest.approx(own["slope"])


def test_thresholds_of_each_finding():
    val, test = random_findings(1), random_findings(2)
    points = operating_points.evaluate(
        operating_points.choose_all(val, test, EvalConfig(draws=0)), test, EvalConfig(draws=0)
    )
    for i, name in enumerate(val.classes):
        rows = val.labels[:, i] >= 0
        fpr, tpr, thresholds = sk.roc_curve(val.labels[rows, i], val.probabilities[rows, i], drop_intermediate=False)
        point = points["slice"][name]["youden"]
        assert point["threshold"] == pytest.approx(thresholds[1:][np.argmax((tpr - fpr)[1:])])
        rows = test.labels[:, i] >= 0
        tn, fp, fn, tp = sk.confusion_matrix(
            test.labels[rows, i], test.probabilities[rows, i] >= point["threshold"]
        ).ravel()
        assert [point[key] for key in ("tn", "fp", "fn", "tp")] == [tn, fp, fn, tp]


def test_comparison_and_mean_of_two_networks():
    a, b = random_findings(1), random_findings(2)
    shuffled = predictions.take(b, np.random.default_rng(0).permutation(len(b)))
    mean = ensemble.mean([a, shuffled])
    np.testing.assert_allclose(mean.probabilities, (a.probabilities + b.probabilities) / 2, rtol=1e-6)
    plain = (special.expit(a.logits.astype(float)) + special.expit(b.logits.astype(float))) / 2
    np.testing.assert_allclose(mean.logits, special.logit(plain), rtol=1e-5, atol=1e-6)
    difference = bootstrap.paired_difference(a, b, ["auc_macro"], 50)["auc_macro"]
    assert difference.difference == pytest.approx(metrics.summarize(b)["auc_macro"] - metrics.summarize(a)["auc_macro"])
    own = paired_tests.test(a, b, "slice.per_class.mass.auc")
    pair = [known_part(p, 1) for p in (a, b)]
    assert own == paired_tests.test(*pair, "slice.per_class.b.auc") and own is not None
    assert paired_tests.test(a, b, "slice.auc_macro") is None
    with pytest.raises(ValueError, match="different labels"):
        bootstrap.align(
            a, predictions.take(a, np.arange(len(a))[::-1]).__class__(**{**vars(b), "labels": 0 * b.labels})
        )


def test_csv_of_findings(tmp_path):
    p = random_findings(n=20)
    for given in (p, predictions.take(p, np.arange(0))):
        predictions.write(given, tmp_path / "p.csv")
        read = predictions.read(tmp_path / "p.csv")
        assert read.multilabel and read.classes == p.classes and list(read.extra) == ["view"]
        for name in ("ids", "labels", "probabilities", "logits"):
            np.testing.assert_array_equal(getattr(read, name), getattr(given, name))
    text = (tmp_path / "p.csv").read_text()
    assert text.startswith("id,group,source,label_edema,label_mass,label_no_ne,p_edema,")
    (tmp_path / "p.csv").write_text(text.replace("label_mass", "other"))
    with pytest.raises(ValueError, match="labels of edema, no_ne, but probabilities of edema, mass, no_ne"):
        predictions.read(tmp_path / "p.csv")
    with pytest.raises(ValueError, match="label .* is not from -1 to 1"):
        predictions.take(Predictions(**{**vars(p), "labels": p.labels + 1}), np.arange(1))
