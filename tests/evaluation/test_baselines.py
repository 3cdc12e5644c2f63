"""What the source alone tells, against sums by hand and scikit-learn; when a control is warned about."""

from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from lungjax.data import statistics
from lungjax.data.prepared import Prepared
from lungjax.evaluation import baselines, metrics


def made(train, test, classes=("ill", "well")):
    """`train` and `test` are (label, source)."""
    label, source = zip(*train, *test, strict=True)
    n = len(label)
    columns = {
        "file": np.asarray([f"{i:03}" for i in range(n)]),
        "label": np.asarray(label, np.int64),
        "group": np.asarray([f"p{i}" for i in range(n)]),
        "source": np.asarray(source, np.str_),
        "split": np.asarray(["train"] * len(train) + ["test"] * len(test)),
    }
    return Prepared("made", classes, columns, [None] * n, None, "0" * 64)


TRAIN = [(0, "a")] * 5 + [(1, "a")] + [(1, "b")] * 4 + [(0, "")] * 2  # of the ten with a source, five are ill
TEST = [(0, "a"), (1, "b"), (1, ""), (0, "elsewhere"), (1, "a")]


def test_frequencies_of_the_source_are_smoothed_towards_those_of_train():
    found = baselines.source_only(made(TRAIN, TEST))
    a, b = [(5 + 1) / (6 + 2), (1 + 1) / (6 + 2)], [(0 + 1) / (4 + 2), (4 + 1) / (4 + 2)]
    unknown = [7 / 12, 5 / 12]  # of all train images
    np.testing.assert_allclose(found.probabilities, [a, b, unknown, unknown, a])
    assert found.ids.tolist() == ["012", "013", "014", "015", "016"] and found.labels.tolist() == [0, 1, 1, 0, 1]
    assert found.sources.tolist() == ["a", "b", "", "elsewhere", "a"] and found.logits is None
    level = metrics.report_levels(found)["slice"]
    assert level["auc_macro"] == pytest.approx(roc_auc_score(found.labels, found.probabilities[:, 1]))


def test_classes_that_are_not_even_share_the_smoothing_as_they_are():
    data = made([(0, "a")] * 6 + [(1, "a")] * 2 + [(2, "b")] * 2, [(0, "a"), (2, "b"), (1, "c")], ("x", "y", "z"))
    found = baselines.source_only(data).probabilities
    prior = np.array([0.6, 0.2, 0.2])
    np.testing.assert_allclose(found[0], (np.array([6, 2, 0]) + 3 * prior) / 11)
    np.testing.assert_allclose(found[1], (np.array([0, 0, 2]) + 3 * prior) / 5)
    np.testing.assert_allclose(found[2], prior)
    study = replace(data, protocol="study", columns=data.columns | {
        "split_study": np.asarray(["train*2"] * 6 + ["train"] * 4 + ["test"] * 3)
    })  # fmt: skip
    again = baselines.source_only(study).probabilities  # an image that a study repeats counts as often
    np.testing.assert_allclose(again[2], np.array([12, 2, 2]) / 16)


def test_fewer_than_two_sources_say_nothing():
    assert baselines.source_only(made([(0, "a"), (1, "a")], TEST)) is None
    assert baselines.source_only(made([(0, "a"), (1, ""), (1, "a")], TEST)) is None
    assert baselines.source_only(made(TRAIN, TEST), "val") is None


def test_the_page_of_a_data_set_guesses_from_the_same_frequencies():
    rng = np.random.default_rng(0)
    labels, keys = rng.choice(3, 400, p=[0.7, 0.2, 0.1]), rng.integers(0, 9, 400)
    train, test = np.arange(300), np.arange(300, 400)
    keys[test[:4]] = 20  # which train has not
    counts = np.array([[np.sum((keys[train] == k) & (labels[train] == c)) for c in range(3)] for k in range(21)])
    parts = counts / np.bincount(labels[train])  # the part of each class that has the key
    right = np.array([(parts[k] == parts[k].max())[c] / (parts[k] == parts[k].max()).sum()
                      for k, c in zip(keys[test], labels[test], strict=True)])  # fmt: skip
    expected = np.mean([right[labels[test] == c].mean() for c in range(3)])
    assert statistics.guess(keys, labels, train, test, 3) == pytest.approx(expected)


def two_sources(share):
    """Two sources of 1000 images; `share` of the ill are of the first, as many of the well of the other."""
    of = [(0, "a")] * round(1000 * share) + [(1, "a")] * round(1000 * (1 - share))
    of += [(0, "b")] * round(1000 * (1 - share)) + [(1, "b")] * round(1000 * share)
    return made(of, of)


@pytest.mark.parametrize(("share", "told"), [(0.6, False), (0.69, False), (0.71, True), (1.0, True)])
def test_a_source_that_tells_the_class_is_warned_about(share, told):
    level = metrics.report_levels(baselines.source_only(two_sources(share)))["slice"]
    assert level["auc_macro"] == pytest.approx(share)
    found = list(baselines.warnings({"controls": {"source_only": level}, "test": {"slice": {"auc_macro": 0.9}}}))
    assert len(found) == told and all(f"{share:.3f} (the network has 0.900)" in text for text in found)


def test_what_is_read_without_lungs_is_warned_about():
    def said(auc, whole=0.95):
        return list(
            baselines.warnings({"controls": {"no_lungs": {"auc_macro": auc}}, "test": {"slice": {"auc_macro": whole}}})
        )

    assert said(0.59) == said(None) == []
    assert "AUC of 0.610 (0.950 with them)" in said(0.61)[0] and "(none with them)" in said(0.61, None)[0]
