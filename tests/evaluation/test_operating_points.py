import dataclasses

import numpy as np
import pytest
from sklearn import metrics as sk

from lungjax.evaluation import bootstrap, operating_points
from lungjax.evaluation.predictions import Predictions

CLASSES = ("a", "b", "c")


def make(n=120, seed=0, patients=30, ties=True):
    rng = np.random.default_rng(seed)
    patient = rng.integers(0, patients, n)
    labels = np.arange(patients)[patient] % 3
    z = rng.normal(size=(n, 3))
    z[np.arange(n), labels] += 1
    p = np.exp(np.round(z) if ties else z)
    ids = np.array([f"s{seed}_{i}" for i in range(n)])
    groups = np.array([f"p{i}" for i in patient])
    return Predictions(ids, groups, np.full(n, ""), labels, p / p.sum(axis=1, keepdims=True), CLASSES)


def two(positive, scores) -> Predictions:
    """Class b's scores by hand."""
    scores = np.asarray(scores, float)
    ids = np.array([f"i{i}" for i in range(len(scores))])
    return Predictions(
        ids, np.full(len(ids), ""), np.full(len(ids), ""), np.asarray(positive, int),
        np.stack([1 - scores, scores], axis=1), ("a", "b"),
    )  # fmt: skip


@pytest.mark.parametrize("ties", [True, False])
def test_thresholds_are_the_best_of_all_scores(ties):
    p = make(ties=ties)
    for i in range(3):
        positive, scores = p.labels == i, p.probabilities[:, i]
        tried = {
            t: ((scores >= t)[positive].mean(), (scores < t)[~positive].mean())
            for t in sorted(set(scores), reverse=True)
        }
        best = operating_points.choose(p, i, "youden")
        assert best in tried and sum(tried[best]) == pytest.approx(max(sum(v) for v in tried.values()))
        for wanted in (0.5, 0.8, 0.95, 1.0):
            found = operating_points.choose(p, i, f"sensitivity_{wanted}")
            assert tried[found][0] >= wanted and all(s < wanted for t, (s, _) in tried.items() if t > found)


def test_thresholds_by_hand():
    p = two([1, 1, 1, 1, 0, 0, 0, 0], [0.9, 0.8, 0.6, 0.2, 0.7, 0.6, 0.1, 0.1])
    # At 0.8: 2/4 + 4/4; at 0.6, with both of the tie: 3/4 + 2/4; at 0.2: 4/4 + 2/4. Of equals the highest.
    assert operating_points.choose(p, 1, "youden") == 0.8
    assert (
        operating_points.choose(p, 1, "sensitivity_0.75") == 0.6
        and operating_points.choose(p, 1, "sensitivity_0.76") == 0.2
    )
    # A network that has it the wrong way round still gets a threshold that a score has.
    assert operating_points.choose(two([0, 0, 1, 1], [0.9, 0.8, 0.2, 0.1]), 1, "youden") in (0.9, 0.1)
    for rule in ("best", "sensitivity_", "sensitivity_0", "sensitivity_1.2", "sensitivity_nan"):
        with pytest.raises(ValueError, match=f"rule '{rule}'"):
            operating_points.choose(p, 1, rule)


def test_numbers_at_a_threshold_by_hand():
    p = two([1, 1, 1, 1, 0, 0, 0, 0, 0, 0], [0.9, 0.8, 0.5, 0.2, 0.7, 0.5, 0.1, 0.1, 0.1, 0.1])
    found = operating_points.metrics_at_threshold(p, 1, 0.5, prevalence=0.1, draws=200)
    wanted = {"threshold": 0.5, "tp": 3, "fp": 2, "fn": 1, "tn": 4, "ppv": 3 / 5, "npv": 4 / 5}
    assert found == found | wanted | {"sensitivity": 3 / 4, "at_prevalence": 0.1}
    assert found["specificity"] == pytest.approx(4 / 6)
    # Of 1,200 people 120 have it: 90 are found, with 360 false alarms; 720 of 750 that are cleared are healthy.
    assert found["ppv_at"] == pytest.approx(90 / 450) and found["npv_at"] == pytest.approx(720 / 750)
    assert found["intervals"].keys() == set(operating_points.RATES)
    bare = operating_points.metrics_at_threshold(p, 1, 0.5, draws=0)
    assert bare["ppv_at"] is bare["npv_at"] is bare["at_prevalence"] is None and bare["intervals"] == {}
    nobody = operating_points.metrics_at_threshold(p, 1, 0.95, prevalence=0.1, draws=0)
    assert nobody["ppv"] is nobody["ppv_at"] is None and nobody["sensitivity"] == 0 and nobody["npv_at"] == 0.9
    only = operating_points.metrics_at_threshold(two([0, 0], [0.9, 0.1]), 1, 0.5)
    assert only["sensitivity"] is only["npv_at"] is None and only["specificity"] == 0.5 and only["ppv"] == 0
    for bad in (-0.1, 1.1, np.nan):
        with pytest.raises(ValueError, match="prevalence="):
            operating_points.metrics_at_threshold(p, 1, 0.5, prevalence=bad)


def test_intervals_are_over_patients():
    p = make()
    found = operating_points.metrics_at_threshold(p, 1, 0.3, prevalence=0.2, draws=40, seed=5)
    names = sorted({"0" + g for g in p.groups.tolist()})
    counts = next(bootstrap.resample_patients(len(names), 40, 5, 40))[[names.index("0" + g) for g in p.groups.tolist()]]
    called, positive = p.probabilities[:, 1] >= 0.3, p.labels == 1
    sensitivity = np.array([sk.recall_score(positive, called, sample_weight=w) for w in counts.T])
    specificity = np.array([sk.recall_score(~positive, ~called, sample_weight=w) for w in counts.T])
    ppv = np.array([sk.precision_score(positive, called, sample_weight=w) for w in counts.T])
    at = sensitivity * 0.2 / (sensitivity * 0.2 + (1 - specificity) * 0.8)
    for name, values in (("sensitivity", sensitivity), ("specificity", specificity), ("ppv", ppv), ("ppv_at", at)):
        assert found["intervals"][name] == pytest.approx(np.percentile(values, [2.5, 97.5]).tolist()), name


def test_the_report_chooses_on_val_and_counts_on_test():
    val, test = make(seed=1), make(seed=2)
    found = operating_points.points(val, test, 0.9, 0.05, draws=50)
    assert list(found) == list(CLASSES)
    for i, name in enumerate(CLASSES):
        assert list(found[name]) == ["youden", "sensitivity_0.9"]
        for rule, point in found[name].items():
            assert point == operating_points.metrics_at_threshold(
                test, i, operating_points.choose(val, i, rule), 0.05, draws=50
            )
    without = dataclasses.replace(val, labels=np.where(val.labels == 2, 1, val.labels))
    found = operating_points.points(without, test, draws=0)
    reason = "There is no operating point for c: the split that thresholds are chosen on has no example of c."
    assert (
        found["c"] == {}
        and operating_points.missing_rules(without) == [reason]
        and operating_points.missing_rules(val) == []
    )
    assert found["a"]["sensitivity_0.95"]["tp"] > 0
    same = dataclasses.replace(val, labels=np.zeros(120, int))
    assert operating_points.points(same, test, draws=0) == {"a": {}, "b": {}, "c": {}}
    assert (
        "nothing but a" in operating_points.missing_rules(same)[0]
        and "no example of b" in operating_points.missing_rules(same)[1]
    )
    with pytest.raises(ValueError, match="has no example of c"):
        operating_points.choose(without, 2, "youden")


def test_net_benefit_by_hand():
    p = two([1, 1, 0, 0, 0], [0.9, 0.5, 0.5, 0.2, 0.1])
    found = operating_points.net_benefit(p, 1, [0.05, 0.2, 0.5, 0.8])
    # Called: all five; four; three (the tie is called); one.
    wanted = [2 / 5 - 3 / 5 / 19, 2 / 5 - 2 / 5 / 4, 2 / 5 - 1 / 5, 1 / 5]
    assert found["model"] == pytest.approx(wanted)
    assert found["all"] == pytest.approx([2 / 5 - 3 / 5 / 19, 2 / 5 - 3 / 5 / 4, 2 / 5 - 3 / 5, 2 / 5 - 3 / 5 * 4])
    usual = operating_points.net_benefit(make(), 0)
    assert usual["thresholds"][0] == 0.01 and len(usual["model"]) == len(usual["all"]) == 99
    assert operating_points.net_benefit(two([0, 0], [0.9, 0.1]), 1, [0.5])["model"] == [-0.5], "no example of the class"
    for bad in (0.0, 1.0):
        with pytest.raises(ValueError, match="threshold probabilities"):
            operating_points.net_benefit(p, 1, [bad, 0.5])
    with pytest.raises(ValueError, match="no example"):
        operating_points.net_benefit(bootstrap.take(p, np.zeros(0, int)), 1)
