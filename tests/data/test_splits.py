"""Splits by group, and the splits of studies against scikit-learn itself."""

from collections import Counter

import numpy as np
import pytest
from sklearn import model_selection, utils

from lungjax.data import splits, study_splits


def patients(seed=0, count=300):
    """Patients of 1 to 40 slices, one class each, classes 70 : 20 : 10."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 41, count)
    labels = np.repeat(rng.choice(3, count, p=[0.7, 0.2, 0.1]), sizes)
    return labels.tolist(), [f"patient {p}" for p in np.repeat(np.arange(count), sizes)]


def mixed_patients():
    rng = np.random.default_rng(0)
    return rng.integers(0, 3, 4000).tolist(), [f"g{i}" for i in rng.integers(0, 200, 4000)]


def test_groups_stay_together_and_shares_are_close():
    for labels, groups in (patients(0), patients(1), mixed_patients()):
        result = splits.make_splits(labels, groups)
        assert len(set(zip(groups, result, strict=True))) == len(set(groups))
        for (label, split), n in Counter(zip(labels, result, strict=True)).items():
            assert abs(n / labels.count(label) - splits.SHARES[split]) < 0.03


def test_order_of_examples_does_not_matter():
    labels, groups = patients()
    result = dict(zip(groups, splits.make_splits(labels, groups, seed=1), strict=True))
    order = np.random.default_rng(5).permutation(len(labels))
    shuffled = splits.make_splits([labels[i] for i in order], [groups[i] for i in order], seed=1)
    assert {groups[i]: split for i, split in zip(order, shuffled, strict=True)} == result
    assert dict(zip(groups, splits.make_splits(labels, groups, seed=2), strict=True)) != result


def test_few_groups():
    assert splits.make_splits([0, 1], ["a", "b"]) == ["train", "train"]
    result = splits.make_splits([0] * 20 + [1] * 20, [f"{i}" for i in range(40)])
    expected = Counter({(c, s): n for c in (0, 1) for s, n in (("train", 14), ("val", 3), ("test", 3))})
    assert Counter(zip([0] * 20 + [1] * 20, result, strict=True)) == expected


def test_missing_splits_come_from_train():
    labels, groups = patients()
    given = ["test" if int(g.split()[1]) % 5 == 0 else "train" for g in groups]
    result, notes = splits.complete(given, labels, groups)
    assert all(r == "test" for r, g in zip(result, given, strict=True) if g == "test")
    assert result.count("test") == given.count("test") and "val" in notes[0]
    assert result.count("val") / given.count("train") == pytest.approx(0.15 / 0.85, abs=0.02)
    assert len(set(zip(groups, result, strict=True))) == len(set(groups))
    assert splits.complete(["train", "val", "test"], [0] * 3, list("abc")) == (["train", "val", "test"], [])
    with pytest.raises(ValueError, match="train"):
        splits.complete(["val", "test"], [0, 1], ["a", "b"])


def test_study_cells():
    assert splits.parse_study("val+train*3") == {"val": 1, "train": 3}
    assert study_splits.cells(4, val=np.array([2]), train=np.array([0, 3])) == ["train", "", "val", "train"]
    with pytest.raises(ValueError, match="dev"):
        splits.parse_study("dev")


def assert_equal(result, expected):
    for ours, theirs in zip(result, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_plain_split_equals_scikit_learn():
    for count in (2, 7, 97, 1432):
        for size, seed in ((0.1, 25), (1 - 0.7, 42), (0.5, 42)):
            expected = model_selection.train_test_split(np.arange(count), test_size=size, random_state=seed)
            assert_equal(study_splits.train_test_split(count, size, seed), expected)


def test_stratified_split_equals_scikit_learn():
    refused = 0
    for sizes in ((997, 900, 900), (5, 5, 5), (7, 7, 7, 7, 3), (2, 100), (33, 34, 12)):
        labels = np.random.default_rng(1).permutation(np.repeat(np.arange(len(sizes)), sizes))
        rows = np.arange(len(labels))
        for size, seed in ((0.1, 25), (0.2 / 0.9, 25), (0.35, 0), (0.5, 7)):
            try:
                expected = model_selection.train_test_split(rows, test_size=size, random_state=seed, stratify=labels)
            except ValueError:
                refused += 1
                with pytest.raises(ValueError, match="stratified"):
                    study_splits.train_test_split(len(rows), size, seed, labels)
            else:
                assert_equal(study_splits.train_test_split(len(rows), size, seed, labels), expected)
    assert 0 < refused < 10
    with pytest.raises(ValueError, match="0 for train"):
        study_splits.train_test_split(1, 0.5, 0)


def test_resample_equals_scikit_learn():
    for count, draws in ((1, 4), (35996, 26970), (294, 26), (26, 294)):
        for seed in (0, 3):
            rows = utils.resample(np.arange(count), replace=True, n_samples=draws, random_state=seed)
            np.testing.assert_array_equal(study_splits.resample(count, draws, seed), np.bincount(rows, minlength=count))
