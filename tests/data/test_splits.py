"""Splits by group, and their completion."""

from collections import Counter

import numpy as np
import pytest

from lungjax.data import splits
from lungjax.datasets.listing import Example, complete_splits


def patients(seed=0, count=300):
    """Patients with 1 to 40 slices of one class; the classes are in the ratio 70 : 20 : 10."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 41, count)
    labels = np.repeat(rng.choice(3, count, p=[0.7, 0.2, 0.1]), sizes)
    return labels.tolist(), [f"patient {p}" for p in np.repeat(np.arange(count), sizes)]


def test_undivided_groups_and_shares():
    rng = np.random.default_rng(0)
    mixed = rng.integers(0, 3, 4000).tolist(), [f"g{i}" for i in rng.integers(0, 200, 4000)]
    for labels, groups in (patients(0), patients(1), mixed):
        result = splits.make_splits(labels, groups)
        assert len(set(zip(groups, result, strict=True))) == len(set(groups))
        for (label, split), n in Counter(zip(labels, result, strict=True)).items():
            assert abs(n / labels.count(label) - splits.SHARES[split]) < 0.03


def test_independence_of_example_order():
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


def complete(given, labels, groups):
    examples = zip(given, labels, groups, strict=True)
    listed = [Example(str(i), "", label, split, group) for i, (split, label, group) in enumerate(examples)]
    completed, notes = complete_splits(listed, 0)
    return [example.split for example in completed], notes


def test_missing_splits_from_train():
    labels, groups = patients()
    given = ["test" if int(g.split()[1]) % 5 == 0 else "train" for g in groups]
    result, notes = complete(given, labels, groups)
    assert all(r == "test" for r, g in zip(result, given, strict=True) if g == "test")
    assert result.count("test") == given.count("test") and "val" in notes[0]
    assert result.count("val") / given.count("train") == pytest.approx(0.15 / 0.85, abs=0.02)
    assert len(set(zip(groups, result, strict=True))) == len(set(groups))
    assert complete(["train", "val", "test"], [0] * 3, "abc") == (["train", "val", "test"], [])
    with pytest.raises(ValueError, match="train"):
        complete(["val", "test"], [0, 1], "ab")


def test_study_cells():
    assert splits.parse_study("val+train*3") == {"val": 1, "train": 3}
    with pytest.raises(ValueError, match="dev"):
        splits.parse_study("dev")
