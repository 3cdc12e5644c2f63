"""Folds and fractions on hand-made columns: nothing is torn apart or lost, smaller parts lie in greater ones."""

from dataclasses import replace

import numpy as np
import pytest

from lungjax import config as configs
from lungjax.config import Config, overrides
from lungjax.data import folds, splits
from lungjax.data.prepared import Prepared

NONE = np.zeros((0, 2), np.int64)


def made(rows, protocol="clean"):
    """`rows` are (label, group, split[, pixels]); without pixels every image is one of its own."""
    rows = [(*row, f"x{i}") if len(row) == 3 else row for i, row in enumerate(rows)]
    label, group, split, pixels = (list(column) for column in zip(*rows, strict=True))
    columns = {
        "file": np.asarray([f"{i:04}" for i in range(len(rows))]),
        "label": np.asarray(label, np.int64),
        "group": np.asarray(group, np.str_),
        "split": np.asarray(split, np.str_),
        "split_study": np.asarray(split, np.str_),
        "pixels": np.asarray(pixels, np.str_),
    }
    return Prepared("made", tuple("abcd")[: max(label) + 1], columns, [None] * len(rows), None, "f" * 64, protocol)


def drawn(seed=0, patients=90):
    """Patients of 1 to 9 images, a few of two classes; some images are in no split."""
    rng = np.random.default_rng(seed)
    rows = []
    for p in range(patients):
        kind = p % 3 if p % 7 else (p % 3, (p + 1) % 3)
        for _ in range(rng.integers(1, 10)):
            split = rng.choice(["train", "val", "test", ""], p=[0.6, 0.15, 0.15, 0.1])
            rows.append((int(rng.choice(kind)) if isinstance(kind, tuple) else kind, f"p{p}", split))
    return made(rows)


def asked(*assignments):
    config = Config()
    for assignment in assignments:
        config = overrides.override(config, assignment)
    configs.check(config)
    return config


def members(data):
    return {split: set(data.rows(split).tolist()) for split in splits.SPLITS}


def test_each_image_is_tested_once_and_nothing_that_belongs_together_is_parted():
    data = drawn()
    used = np.flatnonzero(data.columns["split"] != "")
    rng = np.random.default_rng(1)
    near = rng.choice(len(data.columns["label"]), (12, 2), replace=False)
    pixels = data.columns["pixels"].copy()
    copies = rng.choice(used, (3, 2), replace=False)
    pixels[copies[:, 1]] = pixels[copies[:, 0]]
    data = replace(data, columns=data.columns | {"pixels": pixels})
    tested, held = [], []
    for fold in range(5):
        config = asked("data.folds=5", f"data.fold={fold}")
        made_anew = folds.apply(data, config, near)
        inside = members(made_anew)
        assert set().union(*inside.values()) == set(used.tolist()) and sum(map(len, inside.values())) == len(used)
        where = {row: split for split, rows in inside.items() for row in rows}
        groups = {}
        for row in used.tolist():
            groups.setdefault(data.columns["group"][row], set()).add(where[row])
        assert all(len(found) == 1 for found in groups.values())
        assert all(where[i] == where[j] for i, j in near.tolist() if i in where and j in where)
        assert all(where[i] == where[j] for i, j in copies.tolist())
        for rows in inside.values():
            assert set(data.columns["label"][list(rows)].tolist()) == {0, 1, 2}
        assert made_anew.fingerprint == data.fingerprint
        tested += inside["test"]
        held.append(inside)
    assert sorted(tested) == used.tolist()
    assert all(held[i]["val"] == held[(i + 1) % 5]["test"] for i in range(5))
    sizes = [len(inside["test"]) for inside in held]
    assert max(sizes) - min(sizes) <= 9, "no more than the biggest group"


def test_twins_join_groups_in_a_chain_and_through_copies_but_not_through_images_that_are_out():
    rows = [(0, "a", "train", "1"), (0, "b", "val", "2"), (0, "b", "test", "3"), (0, "c", "test", "4"),
            (0, "d", "train", "5"), (0, "e", "", "6"), (0, "f", "train", "7"), (0, "e", "", "4")]  # fmt: skip
    data = made(rows)
    used = np.array([0, 1, 2, 3, 4, 6])
    # a ~ b by 0 ~ 1; b ~ c by 2 ~ a copy of 3 that is out itself; d ~ f only by way of e, which is in no split.
    near = np.array([(0, 1), (2, 7), (4, 5), (5, 6)])
    assert folds.joined(data, used, near).tolist() == ["a", "a", "a", "a", "d", "f"]
    assert folds.joined(data, used, NONE).tolist() == ["a", "b", "b", "c", "d", "f"]


def test_the_parts_follow_from_names_and_labels_alone():
    data = drawn()
    config = asked("data.folds=4", "data.fold=1")
    first = folds.apply(data, config, NONE)
    again = folds.apply(data, replace(config, train=replace(config.train, seed=9)), NONE)
    assert members(first) == members(again)
    mixed = np.random.default_rng(3).permutation(len(data.columns["label"]))
    other = folds.apply(replace(data, columns={k: v[mixed] for k, v in data.columns.items()}), config, NONE)
    by_name = dict(zip(other.columns["file"].tolist(), other.columns["split"].tolist(), strict=True))
    assert [by_name[file] for file in data.columns["file"].tolist()] == first.columns["split"].tolist()


def test_the_study_and_the_data_set_keep_their_own_splits():
    data = drawn()
    before = data.columns["split"].copy()
    assert folds.apply(data, asked(), NONE) is data
    folds.apply(data, asked("data.folds=3"), NONE)
    assert np.array_equal(data.columns["split"], before)


def test_fractions_are_nested_and_leave_val_and_test_alone():
    data = drawn(patients=200)
    whole, groups, labels = members(data), data.columns["group"], data.columns["label"]
    kept = {f: members(folds.apply(data, asked(f"train.fraction={f}"), NONE)) for f in (0.001, 0.1, 0.2, 0.5, 1.0)}
    for smaller, greater in zip(list(kept.values())[:-1], list(kept.values())[1:], strict=True):
        assert smaller["train"] < greater["train"] or smaller == greater
        assert set(labels[list(smaller["train"])].tolist()) == {0, 1, 2}
    assert kept[1.0] == whole
    for inside in kept.values():
        assert inside["val"] == whole["val"] and inside["test"] == whole["test"]
        names = set(groups[list(inside["train"])].tolist())
        assert {row for row in whole["train"] if groups[row] in names} == inside["train"], "whole patients"
    trained = list(whole["train"])
    counts = [len(set(groups[list(kept[f]["train"])].tolist())) / len(set(groups[trained].tolist())) for f in kept]
    assert counts[0] < 0.03 and counts[1:] == pytest.approx([0.1, 0.2, 0.5, 1.0], abs=0.01)
    shares = [np.bincount(labels[rows]) / len(rows) for rows in (trained, list(kept[0.5]["train"]))]
    assert np.abs(shares[0] - shares[1]).max() < 0.08


def test_a_class_that_only_accompanies_another_is_in_every_fraction():
    rows = [(0, f"p{i}", "train") for i in range(40) for _ in range(3)] + [(1, "p7", "train"), (1, "p8", "test")]
    rows += [(1, "p20", "train")]
    data = made(rows)
    kept = [members(folds.apply(data, asked(f"train.fraction={f}"), NONE))["train"] for f in (0.01, 0.3, 0.9)]
    assert all({120, 122} & rows for rows in kept) and kept[0] < kept[1] < kept[2]


def test_a_fraction_of_folds_and_of_a_studys_repeats():
    data = drawn()
    both = members(folds.apply(data, asked("data.folds=3", "train.fraction=0.5"), NONE))
    dealt = members(folds.apply(data, asked("data.folds=3"), NONE))
    assert both["train"] < dealt["train"] and both["test"] == dealt["test"] and both["val"] == dealt["val"]
    cells = [(0, "p0", "train*3"), (0, "p1", "train+test"), (1, "p2", "train*2"), (1, "p3", "val+train*2")] * 5
    study = made([(label, f"{group}{i // 4}", cell) for i, (label, group, cell) in enumerate(cells)], "study")
    less = folds.apply(study, asked("train.fraction=0.5"), NONE)
    assert less.rows("test").tolist() == study.rows("test").tolist()
    assert less.rows("val").tolist() == study.rows("val").tolist()
    rows, times = np.unique(less.rows("train"), return_counts=True)
    assert len(rows) == 10 and set(np.bincount(study.columns["label"][rows])) == {5}
    assert (
        dict(zip(rows.tolist(), times.tolist(), strict=True)).items()
        <= {i: (3, 1, 2, 2)[i % 4] for i in range(20)}.items()
    )


@pytest.mark.parametrize(
    ("assignments", "words"),
    [
        (["data.folds=2"], "data.folds=2: 3 or more"),
        (["data.folds=-3"], "3 or more"),
        (["data.folds=5", "data.fold=5"], "data.folds=5 are 0 to 4"),
        (["data.fold=1"], "there are no folds"),
        (["data.folds=5", "data.fold=-1"], "are 0 to 4"),
        (["data.folds=5", "data.protocol=study"], "a study's splits are what they are"),
        (["train.fraction=0"], "above 0 and at most 1"),
        (["train.fraction=1.5"], "above 0 and at most 1"),
    ],
)
def test_what_there_can_not_be_is_refused(assignments, words):
    with pytest.raises(ValueError, match=words):
        asked(*assignments)


def test_too_few_patients_are_counted():
    rows = [(0, f"p{i}", "train") for i in range(20)] + [(1, f"q{i}", "test") for i in range(5)]
    data = made(rows)
    folds.apply(data, asked("data.folds=5"), NONE)
    with pytest.raises(ValueError, match="data.folds=6: b has 5 patients .* take at most data.folds=5"):
        folds.apply(data, asked("data.folds=6"), NONE)
    with pytest.raises(ValueError, match="b has 4 patients"):
        folds.apply(data, asked("data.folds=5"), np.array([(20, 24)]))
    with pytest.raises(ValueError, match="study splits"):
        folds.apply(replace(data, protocol="study"), asked("data.folds=3"), NONE)


@pytest.mark.parametrize(("images", "others"), [((60, 30, 1, 1, 1, 1), 20), ((100, 80, 60, 1, 1, 1), 1)])
def test_a_rare_class_of_unequal_patients_is_in_every_part(images, others):
    """By size alone the small ones would go together."""
    rows = [(0, f"p{i}", "train") for i in range(7) for _ in range(others)]
    rows += [(1, f"q{i}", "train") for i, many in enumerate(images) for _ in range(many)]
    data = made(rows)
    part = folds.deal(data, 6, NONE)
    assert all(set(data.columns["label"][part == i].tolist()) == {0, 1} for i in range(6))
    assert all(len(set(part[data.columns["group"] == group].tolist())) == 1 for group in set(data.columns["group"]))


def test_patients_of_several_rare_classes_count_for_each_or_leave_no_way():
    rows = [(0, f"n{i}", "train") for i in range(9)] + [(1, "p", "val"), (1, "q", "val"), (1, "pq", "test")]
    data = made([*rows, (2, "pq", "test"), (2, "r", "train"), (2, "s", "train")])
    part = folds.deal(data, 3, NONE)
    assert all(set(data.columns["label"][part == i].tolist()) == {0, 1, 2} for i in range(3))
    # Each class has three of four patients, so any two of these would have to be in two of the three parts.
    data = made([(label, f"p{patient}", "train") for label in range(4) for patient in range(4) if patient != label])
    with pytest.raises(ValueError, match="patients have images of several classes; 3 parts are the least"):
        folds.deal(data, 3, NONE)
