"""Shortcut baseline from the source alone, checked against values computed by hand, and its warnings."""

from dataclasses import replace

import numpy as np
import pytest

from lungjax.data.prepared import Prepared
from lungjax.evaluation import baselines, metrics


def make(train, test, classes=("ill", "well")):
    """Returns a data set of the (label, source) pairs in `train` and `test`."""
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


def test_class_frequencies_of_the_source():
    p = baselines.source_only(make(TRAIN, TEST))
    a, b = [(5 + 1) / (6 + 2), (1 + 1) / (6 + 2)], [(0 + 1) / (4 + 2), (4 + 1) / (4 + 2)]
    unknown = [7 / 12, 5 / 12]  # of all training images
    np.testing.assert_allclose(p.probabilities, [a, b, unknown, unknown, a])
    assert p.ids.tolist() == ["012", "013", "014", "015", "016"] and p.labels.tolist() == [0, 1, 1, 0, 1]
    assert p.sources.tolist() == ["a", "b", "", "elsewhere", "a"] and p.logits is None


def test_smoothing_by_class_frequencies():
    data = make([(0, "a")] * 6 + [(1, "a")] * 2 + [(2, "b")] * 2, [(0, "a"), (2, "b"), (1, "c")], ("x", "y", "z"))
    prior = np.array([0.6, 0.2, 0.2])
    expected = [(np.array([6, 2, 0]) + 3 * prior) / 11, (np.array([0, 0, 2]) + 3 * prior) / 5, prior]
    np.testing.assert_allclose(baselines.source_only(data).probabilities, expected)
    # Images that a study repeats count several times.
    split = np.asarray(["train*2"] * 6 + ["train"] * 4 + ["test"] * 3)
    study = replace(data, protocol="study", columns=data.columns | {"split_study": split})
    np.testing.assert_allclose(baselines.source_only(study).probabilities[2], np.array([12, 2, 2]) / 16)


def test_no_baseline_without_two_sources():
    assert baselines.source_only(make([(0, "a"), (1, ""), (1, "a")], TEST)) is None
    assert baselines.source_only(make(TRAIN, TEST), "val") is None
    assert baselines.source_only(make(TRAIN, [(0, "elsewhere"), (1, "")])) is None


def test_warnings():
    # Two sources of 1000 images; 60 or 71 % of the ill are from the first, and as many of the well from the second.
    for share, warned in ((0.6, False), (0.71, True)):
        parts = zip((0, 1, 0, 1), "aabb", (share, 1 - share, 1 - share, share), strict=True)
        rows = [(label, source) for label, source, part in parts for _ in range(round(1000 * part))]
        level = metrics.summarize(baselines.source_only(make(rows, rows)))
        assert level["auc_macro"] == pytest.approx(share)
        for network, low, high in ((0.9, 0.1, 0.25), (0.9, None, None), (0.65, -0.1, 0.0), (0.65, None, None)):
            better = network == 0.9
            level["gain"] = {"difference": network - share if better else -0.05, "low": low, "high": high}
            report = {"controls": {"source_only": level}, "test": {"slice": {"auc_macro": network}}}
            texts = list(baselines.warnings(report))
            assert len(texts) == (warned if better else 1)
            for text in texts:
                assert f"{share:.3f}" in text and f"{network:.3f}" in text
                assert ("no better than the source" in text) == (not better) and "recognize" not in text
                assert ("-0.100 to +0.000" in text) == (low == -0.1)
    for auc, network, warned in ((0.59, 0.95, False), (None, 0.95, False), (0.61, None, True)):
        report = {"controls": {"no_lungs": {"auc_macro": auc}}, "test": {"slice": {"auc_macro": network}}}
        assert len(list(baselines.warnings(report))) == warned
