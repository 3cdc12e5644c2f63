"""From the images of a patient to the patient: each rule on a hand-made case, and its use everywhere."""

from dataclasses import replace

import numpy as np
import pytest
from random_predictions import make_predictions
from services import METADATA

from lungjax.config import Config, EvalConfig, check, metadata, overrides
from lungjax.evaluation import aggregation, bootstrap, metrics, operating_points, predictions
from lungjax.inference import records

ILL = np.array([0.9, 0.2, 0.1, 0.6, 0.2, 0.3])  # of one patient's six images
NONE = (1 - 0.9) * (1 - 0.2) * (1 - 0.1) * (1 - 0.6) * (1 - 0.2) * (1 - 0.3)
BINARY = {"mean": 2.3 / 6, "max": 0.9, "top_k": (0.9 + 0.6) / 2, "noisy_or": 1 - NONE}  # a quarter of six: two images


def test_rules_for_one_class():
    p = np.stack([ILL, 1 - ILL], axis=1)
    for rule, expected in BINARY.items():
        np.testing.assert_allclose(aggregation.aggregate(p, ("ill", "well"), f"{rule}:ill"), [[expected, 1 - expected]])
    # Two patients whose images alternate.
    other = np.array([0.5, 0.4, 0.3, 0.2, 0.1, 0.0])
    both = np.stack([ILL, other], axis=1).ravel()
    both = aggregation.aggregate(np.stack([both, 1 - both], 1), ("ill", "well"), "top_k:ill", np.arange(12) % 2)
    np.testing.assert_allclose(both[:, 0], [0.75, 0.45])


def test_rules_for_several_classes():
    classes, p = ("a", "b", "c"), np.array([[0.6, 0.3, 0.1], [0.1, 0.2, 0.7]])
    cases = {
        "max": np.array([0.6, 0.3, 0.7]) / 1.6,
        "noisy_or": np.array([1 - 0.4 * 0.9, 1 - 0.7 * 0.8, 1 - 0.9 * 0.3]) / (0.64 + 0.44 + 0.73),
        "max:a": [0.6, 0.4 * 0.25 / 0.65, 0.4 * 0.4 / 0.65],  # means of b and c: 0.25 and 0.4
        "max:a+c": [0.6 / 1.3, 0, 0.7 / 1.3],
        "mean:a": [0.35, 0.25, 0.4],
    }
    for how, expected in cases.items():
        np.testing.assert_allclose(aggregation.aggregate(p, classes, how), [expected], atol=1e-15)
    joined = aggregation.aggregate(p, ("a+x", "b", "c"), "max:x")
    np.testing.assert_allclose(joined, [cases["max:a"]])
    certain = aggregation.aggregate(np.array([[1.0, 0.0], [0.0, 1.0]], np.float32), ("a", "b"), "noisy_or:a")
    np.testing.assert_allclose(certain, [[1, 0]], atol=1e-12)


def case():
    """Two ill patients with one suspicious image each, and two well ones whose images are all a bit suspicious."""
    ill = np.array([0.9, 0.0, 0.1, 0.8, 0.0, 0.0, 0.4, 0.4, 0.4, 0.5, 0.4, 0.3])
    groups = [f"p{i // 3}" for i in range(12)]
    return make_predictions([0] * 6 + [1] * 6, np.stack([ill, 1 - ill], axis=1), groups=groups)


def test_patients_with_the_rule_of_their_fold(tmp_path):
    p, rules = case(), np.repeat(["max:a", "mean", "noisy_or:a"], [3, 6, 3])
    p = replace(p, classes=("a", "b"), extra={"aggregate": rules})
    expected = [0.9, 0.8 / 3, 0.4, 1 - 0.5 * 0.6 * 0.7]
    predictions.write(p, tmp_path / "p.csv")
    for given in (p, predictions.read(tmp_path / "p.csv")):
        np.testing.assert_allclose(metrics.by_patient(given)[0].probabilities[:, 0], expected, rtol=1e-6)
    assert metrics.unit_levels(p)["patient"]["accuracy"] == 0.5
    assert bootstrap.over_runs([p], ["accuracy"], 0, "patient")["accuracy"][0] == 0.5
    limits = operating_points.choose_all(p, p, EvalConfig())["patient"]["a"]["youden"]["threshold"]
    assert limits == pytest.approx(0.9)


def test_choice_on_val():
    val = replace(case(), classes=("a", "b"))
    rule, scores = operating_points.choose_aggregate(val, EvalConfig(aggregate="auto:a", draws=10))
    assert rule == "max:a" and {how: score[0] for how, score in scores.items()} == {
        "mean": 0.0, "max:a": 1.0, "top_k:a": 1.0, "noisy_or:a": 1.0,
    }  # fmt: skip
    undefined = predictions.take(val, np.arange(6))
    assert operating_points.choose_aggregate(undefined, EvalConfig(aggregate="auto", draws=0))[0] == "mean"


def test_series_of_a_model_and_invalid_rules():
    name, other = METADATA.classes
    model = metadata.from_json(replace(METADATA, aggregate=f"max:{name}").to_json())
    record = records.summary(model, "s", np.array([[0.7, 0.3], [0.2, 0.8], [0.3, 0.7]]))
    assert record["probabilities"] == {name: 0.7, other: 0.3}
    for invalid in ("median", "auto", "max:absent"):
        with pytest.raises(ValueError, match="aggregate"):
            metadata.from_json(replace(METADATA, aggregate=invalid).to_json())
    with pytest.raises(ValueError, match=r"median.*noisy_or, auto"):
        check(overrides.override(Config(), "eval.aggregate=median"))
