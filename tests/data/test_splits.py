import random
from collections import Counter

import numpy as np
import pytest

from lungjax.data import splits


def patients(seed=0, count=300):
    """Patients of 1 to 40 slices, one class each, classes 70 : 20 : 10."""
    rng = random.Random(seed)
    labels, groups = [], []
    for p in range(count):
        label = rng.choices([0, 1, 2], [70, 20, 10])[0]
        for _ in range(rng.randint(1, 40)):
            labels.append(label)
            groups.append(f"patient {p}")
    return labels, groups


def test_no_group_in_two_splits_and_class_shares_are_close():
    for seed in range(4):
        labels, groups = patients(seed)
        made = splits.make_splits(labels, groups, seed=seed)
        assert len({(g, s) for g, s in zip(groups, made, strict=True)}) == len(set(groups))
        total = Counter(labels)
        for (label, split), n in Counter(zip(labels, made, strict=True)).items():
            assert abs(n / total[label] - splits.SHARES[split]) < 0.02


def test_groups_with_several_classes_are_balanced_too():
    rng = np.random.default_rng(0)
    groups = [f"g{i}" for i in rng.integers(0, 200, 4000)]
    labels = rng.integers(0, 3, 4000).tolist()
    made = splits.make_splits(labels, groups)
    for (label, split), n in Counter(zip(labels, made, strict=True)).items():
        assert abs(n / labels.count(label) - splits.SHARES[split]) < 0.03
    assert len(set(zip(groups, made, strict=True))) == len(set(groups))


def test_the_order_of_the_examples_plays_no_part_and_the_seed_does():
    labels, groups = patients()
    made = dict(zip(groups, splits.make_splits(labels, groups, seed=1), strict=True))
    order = random.Random(5).sample(range(len(labels)), len(labels))
    again = splits.make_splits([labels[i] for i in order], [groups[i] for i in order], seed=1)
    assert {groups[i]: split for i, split in zip(order, again, strict=True)} == made
    other = dict(zip(groups, splits.make_splits(labels, groups, seed=2), strict=True))
    assert other != made


def test_few_groups_go_to_train_first():
    assert splits.make_splits([0, 1], ["a", "b"]) == ["train", "train"]
    made = splits.make_splits([0] * 20 + [1] * 20, [f"{i}" for i in range(40)])
    assert Counter(zip([0] * 20 + [1] * 20, made, strict=True)) == {
        (0, "train"): 14, (0, "val"): 3, (0, "test"): 3, (1, "train"): 14, (1, "val"): 3, (1, "test"): 3,
    }  # fmt: skip


def test_only_the_missing_split_is_cut_from_train():
    labels, groups = patients()
    given = ["test" if int(g.split()[1]) % 5 == 0 else "train" for g in groups]
    done, notes = splits.complete(given, labels, groups)
    assert all(d == "test" for d, g in zip(done, given, strict=True) if g == "test")
    assert done.count("test") == given.count("test")
    assert done.count("val") / given.count("train") == pytest.approx(0.15 / 0.85, abs=0.02)
    assert len(set(zip(groups, done, strict=True))) == len(set(groups))
    assert "val" in notes[0]


def test_given_splits_are_kept_and_a_missing_train_split_is_an_error():
    given = ["train", "val", "test"]
    assert splits.complete(given, [0, 0, 0], ["a", "b", "c"]) == (given, [])
    with pytest.raises(ValueError, match="no train split"):
        splits.complete(["val", "test"], [0, 1], ["a", "b"])
