"""Operating points and decision curves, checked by hand and against scikit-learn."""

import dataclasses

import numpy as np
import pytest
from random_predictions import make_predictions
from sklearn import metrics as sk

from lungjax.config import EvalConfig
from lungjax.evaluation import bootstrap, metrics, operating_points
from lungjax.evaluation.predictions import Predictions


def make(seed=0, ties=True):
    """120 examples from 30 patients, in three classes."""
    rng = np.random.default_rng(seed)
    patient = rng.integers(0, 30, 120)
    z = rng.normal(size=(120, 3)) + np.eye(3)[patient % 3]
    return make_predictions(patient % 3, np.exp(np.round(z) if ties else z), groups=[f"p{i}" for i in patient])


def two(positive, scores) -> Predictions:
    """Classes a and b, with the given scores for b."""
    scores = np.asarray(scores, float)
    return make_predictions(positive, np.stack([1 - scores, scores], axis=1))


def test_thresholds_against_a_search():
    for p, i in ((make(ties=ties), i) for ties in (True, False) for i in range(3)):
        positive, scores = p.labels == i, p.probabilities[:, i]
        tried = {
            t: ((scores >= t)[positive].mean(), (scores < t)[~positive].mean())
            for t in sorted(set(scores), reverse=True)
        }
        best = operating_points.choose(p, i, "youden")
        assert best in tried and sum(tried[best]) == pytest.approx(max(sum(v) for v in tried.values()))
        for least in (0.5, 0.8, 0.95, 1.0):
            threshold = operating_points.choose(p, i, f"sensitivity_{least}")
            assert tried[threshold][0] >= least and all(s < least for t, (s, _) in tried.items() if t > threshold)


def test_thresholds_by_hand():
    p = two([1, 1, 1, 1, 0, 0, 0, 0], [0.9, 0.8, 0.6, 0.2, 0.7, 0.6, 0.1, 0.1])
    # At 0.8: 2/4 + 4/4; at 0.6, with both of the tie: 3/4 + 2/4; at 0.2: 4/4 + 2/4. The highest of equals is chosen.
    assert operating_points.choose(p, 1, "youden") == 0.8
    assert operating_points.choose(p, 1, "sensitivity_0.75") == 0.6
    assert operating_points.choose(p, 1, "sensitivity_0.76") == 0.2
    # An inverted classifier still gets one of its scores as a threshold.
    assert operating_points.choose(two([0, 0, 1, 1], [0.9, 0.8, 0.2, 0.1]), 1, "youden") in (0.9, 0.1)


def at(p, threshold, **options):
    (point,) = operating_points.metrics_at_thresholds(p, [(1, threshold)], **options)
    return point


def test_metrics_at_a_threshold_by_hand():
    p = two([1, 1, 1, 1, 0, 0, 0, 0, 0, 0], [0.9, 0.8, 0.5, 0.2, 0.7, 0.5, 0.1, 0.1, 0.1, 0.1])
    point = at(p, 0.5, prevalences={"b": 0.1}, draws=200)
    expected = {"threshold": 0.5, "tp": 3, "fp": 2, "fn": 1, "tn": 4, "ppv": 3 / 5, "npv": 4 / 5}
    assert point == point | expected | {"sensitivity": 3 / 4, "at_prevalence": 0.1}
    assert point["specificity"] == pytest.approx(4 / 6)
    # Of 1,200 people, 120 are ill. There are 90 true and 360 false positives, and 720 of 750 negatives are healthy.
    assert point["ppv_at"] == pytest.approx(90 / 450) and point["npv_at"] == pytest.approx(720 / 750)
    assert point["intervals"].keys() == {"sensitivity", "specificity", "ppv", "npv", "ppv_at", "npv_at"}
    bare = at(p, 0.5, draws=0)
    assert bare["ppv_at"] is bare["npv_at"] is bare["at_prevalence"] is None and bare["intervals"] == {}
    assert at(p, 0.5, prevalences={"a": 0.1}, draws=0) == bare, "the prevalence of the other class"
    never = at(p, 0.95, prevalences={"b": 0.1}, draws=0)
    assert never["ppv"] is never["ppv_at"] is None and never["sensitivity"] == 0 and never["npv_at"] == 0.9
    only = at(two([0, 0], [0.9, 0.1]), 0.5)
    assert only["sensitivity"] is only["npv_at"] is None and only["specificity"] == 0.5 and only["ppv"] == 0
    # Without variation between the draws: Wilson's interval of 4 of 4 patients with the class, and none by Bayes' rule.
    perfect = at(two([1, 1, 1, 1, 0], [0.9, 0.9, 0.9, 0.9, 0.1]), 0.5, prevalences={"b": 0.1}, draws=50)
    ends = {"sensitivity": 4, "specificity": 1, "ppv": 4, "npv": 1}
    assert perfect["intervals"].keys() == ends.keys()
    for name, n in ends.items():
        assert perfect["intervals"][name] == pytest.approx([n / (n + 1.959964**2), 1])


def test_intervals_over_patients():
    p = make()
    point = at(p, 0.3, prevalences={"b": 0.2}, draws=40)
    names, member = np.unique(p.groups, return_inverse=True)
    counts = next(bootstrap.resample_patients(len(names), 40, 40))[member]
    called, positive = p.probabilities[:, 1] >= 0.3, p.labels == 1
    sensitivity = np.array([sk.recall_score(positive, called, sample_weight=w) for w in counts.T])
    specificity = np.array([sk.recall_score(~positive, ~called, sample_weight=w) for w in counts.T])
    ppv = np.array([sk.precision_score(positive, called, sample_weight=w) for w in counts.T])
    ppv_at = sensitivity * 0.2 / (sensitivity * 0.2 + (1 - specificity) * 0.8)
    expected = {"sensitivity": sensitivity, "specificity": specificity, "ppv": ppv, "ppv_at": ppv_at}
    for name, values in expected.items():
        assert point["intervals"][name] == pytest.approx(np.percentile(values, [2.5, 97.5]).tolist()), name


def points_of(val, test, options):
    return operating_points.evaluate(operating_points.choose_all(val, test, options), test, options)


def test_points_from_val_and_test():
    val, test = make(seed=1), make(seed=2)
    options = EvalConfig(sensitivity=0.9, prevalence=("b:0.05",), draws=50)
    points = points_of(val, test, options)
    assert list(points) == ["slice", "patient"] and operating_points.missing_rules(val) == []
    for level, chosen, tested in (("slice", val, test), ("patient", *(metrics.by_patient(p)[0] for p in (val, test)))):
        assert list(points[level]) == list(val.classes)
        for i, rules in enumerate(points[level].values()):
            assert list(rules) == ["youden", "sensitivity_0.9"]
            for rule, point in rules.items():
                threshold = operating_points.choose(chosen, i, rule)
                assert [point] == operating_points.metrics_at_thresholds(tested, [(i, threshold)], {"b": 0.05}, 50)
    assert operating_points.evaluate(points, test, options) == points, "the thresholds of model.json"
    assert list(points_of(*(dataclasses.replace(p, groups=p.ids) for p in (val, test)), options)) == ["slice"]
    without = dataclasses.replace(val, labels=np.where(val.labels == 2, 1, val.labels))
    points = points_of(without, test, EvalConfig(draws=0))["slice"]
    assert points["c"] == {} and points["a"]["sensitivity_0.95"]["tp"] > 0
    (reason,) = operating_points.missing_rules(without)
    assert "no examples of c" in reason
    same = dataclasses.replace(val, labels=np.zeros(120, int))
    assert points_of(same, test, EvalConfig(draws=0))["slice"] == {"a": {}, "b": {}, "c": {}}
    assert "only examples of a" in operating_points.missing_rules(same)[0]


def test_net_benefit_by_hand():
    curve = operating_points.net_benefit(two([1, 1, 0, 0, 0], [0.9, 0.5, 0.5, 0.2, 0.1]), 1)
    assert curve["thresholds"][0] == 0.01 and len(curve["model"]) == len(curve["all"]) == 99
    at = [curve["thresholds"].index(t) for t in (0.05, 0.2, 0.5, 0.8)]
    # Positive: five; four; three (with the tie); one.
    expected = [2 / 5 - 3 / 5 / 19, 2 / 5 - 2 / 5 / 4, 2 / 5 - 1 / 5, 1 / 5]
    assert [curve["model"][i] for i in at] == pytest.approx(expected)
    everyone = [2 / 5 - 3 / 5 / 19, 2 / 5 - 3 / 5 / 4, 2 / 5 - 3 / 5, 2 / 5 - 3 / 5 * 4]
    assert [curve["all"][i] for i in at] == pytest.approx(everyone)
    assert operating_points.net_benefit(two([0, 0], [0.9, 0.1]), 1)["model"][49] == -0.5, "no example of the class"
