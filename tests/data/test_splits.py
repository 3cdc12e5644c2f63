"""Splits, folds and fractions of synthetic data sets: they are complete, nested, and never divide a patient."""

import functools
import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from small_runs import changed

from lungjax.config import Config
from lungjax.data import folds, splits
from lungjax.data.prepared import Prepared
from lungjax.datasets.listing import Example, complete_splits

config = functools.partial(changed, Config())


def table(rows, protocol="clean"):
    """Returns a data set of rows (label, group, split[, pixels]); without pixels, every image is unique."""
    rows = [(*row, f"x{i}") if len(row) == 3 else row for i, row in enumerate(rows)]
    label, group, split, pixels = (list(column) for column in zip(*rows, strict=True))
    columns = {"label": np.asarray(label, np.int64), "file": np.asarray([f"{i:04}" for i in range(len(rows))])}
    columns |= {"group": np.asarray(group), "pixels": np.asarray(pixels)}
    columns |= dict.fromkeys(("split", "split_study"), np.asarray(split))
    return Prepared("mine", tuple("abcd")[: max(label) + 1], columns, [None] * len(rows), None, "f" * 64, protocol)


def random_table(patients=90):
    """Patients with 1 to 9 images, a few of them with two classes; some images are in no split."""
    rng = np.random.default_rng(0)
    rows = []
    for p in range(patients):
        labels = [p % 3, p % 3 if p % 7 else (p + 1) % 3]
        for _ in range(rng.integers(1, 10)):
            split = rng.choice(["train", "val", "test", ""], p=[0.6, 0.15, 0.15, 0.1])
            rows.append((int(rng.choice(labels)), f"p{p}", split))
    return table(rows)


def members(data):
    return {split: set(data.rows(split).tolist()) for split in splits.SPLITS}


def test_complete_and_disjoint_folds():
    data = random_table()
    used = np.flatnonzero(data.columns["split"] != "")
    rng = np.random.default_rng(1)
    near = rng.choice(len(data.columns["label"]), (12, 2), replace=False)
    copies = rng.choice(used, (3, 2), replace=False)
    pixels = data.columns["pixels"].copy()
    pixels[copies[:, 1]] = pixels[copies[:, 0]]
    data = replace(data, columns=data.columns | {"pixels": pixels}, near=near)
    results = [folds.apply(data, config("data.folds=5", f"data.fold={fold}")) for fold in range(5)]
    for result in results:
        inside = members(result)
        where = {row: split for split, rows in inside.items() for row in rows}
        assert sorted(where) == used.tolist() and sum(map(len, inside.values())) == len(used)
        groups = {(data.columns["group"][row], where[row]) for row in used.tolist()}
        assert len(groups) == len({group for group, _ in groups}), "no patient is in two splits"
        assert all(where[i] == where[j] for i, j in [*near.tolist(), *copies.tolist()] if i in where and j in where)
        assert all(set(data.columns["label"][list(rows)].tolist()) == {0, 1, 2} for rows in inside.values())
        assert result.fingerprint == data.fingerprint
    inside = [members(result) for result in results]
    assert sorted(row for splits in inside for row in splits["test"]) == used.tolist()
    assert all(inside[i]["val"] == inside[(i + 1) % 5]["test"] for i in range(5))
    sizes = [len(splits["test"]) for splits in inside]
    assert max(sizes) - min(sizes) <= 9, "the largest group"


def test_folds_independent_of_seed_and_order():
    data = random_table()
    before = data.columns["split"].copy()
    options = config("data.folds=4", "data.fold=1")
    first = folds.apply(data, options)
    other_seed = folds.apply(data, replace(options, train=replace(options.train, seed=9)))
    assert members(first) == members(other_seed)
    order = np.random.default_rng(3).permutation(len(before))
    shuffled = folds.apply(replace(data, columns={k: v[order] for k, v in data.columns.items()}), options)
    np.testing.assert_array_equal(shuffled.columns["split"], first.columns["split"][order])
    np.testing.assert_array_equal(data.columns["split"], before)  # the data set itself keeps its splits
    assert folds.apply(data, config()) is data


def test_nested_fractions():
    data = random_table(patients=200)
    full, groups, labels = members(data), data.columns["group"], data.columns["label"]
    fractions = (0.001, 0.1, 0.2, 0.5, 1.0)
    parts = [members(folds.apply(data, config(f"train.fraction={f}"))) for f in fractions]
    assert parts[-1] == full
    assert all(a["train"] < b["train"] for a, b in itertools.pairwise(parts))
    patients = len(set(groups[list(full["train"])]))
    for fraction, part in zip(fractions, parts, strict=True):
        assert part["val"] == full["val"] and part["test"] == full["test"]
        names = set(groups[list(part["train"])].tolist())
        assert {row for row in full["train"] if groups[row] in names} == part["train"], "complete patients"
        assert set(labels[list(part["train"])].tolist()) == {0, 1, 2}
        assert len(names) / patients == pytest.approx(fraction, abs=0.02)
    shares = [np.bincount(labels[list(rows)]) / len(rows) for rows in (full["train"], parts[3]["train"])]
    assert np.abs(shares[0] - shares[1]).max() < 0.08


def test_rare_class_in_every_fraction():
    rows = [(0, f"p{i}", "train") for i in range(40) for _ in range(3)]
    data = table([*rows, (1, "p7", "train"), (1, "p8", "test"), (1, "p20", "train")])
    parts = [members(folds.apply(data, config(f"train.fraction={f}")))["train"] for f in (0.01, 0.3, 0.9)]
    assert all({120, 122} & rows for rows in parts) and parts[0] < parts[1] < parts[2]


def test_fraction_of_folds_and_of_a_study():
    data = random_table()
    both = members(folds.apply(data, config("data.folds=3", "train.fraction=0.5")))
    part = members(folds.apply(data, config("data.folds=3")))
    assert both["train"] < part["train"] and both["test"] == part["test"] and both["val"] == part["val"]
    cells = [(0, "p0", "train*3"), (0, "p1", "train+test"), (1, "p2", "train*2"), (1, "p3", "val+train*2")] * 5
    study = table([(label, f"{group}{i // 4}", cell) for i, (label, group, cell) in enumerate(cells)], "study")
    fewer = folds.apply(study, config("train.fraction=0.5"))
    for split in ("val", "test"):
        assert fewer.rows(split).tolist() == study.rows(split).tolist()
    rows, times = np.unique(fewer.rows("train"), return_counts=True)
    assert len(rows) == 10 and set(np.bincount(study.columns["label"][rows])) == {5}
    assert times.tolist() == [(3, 1, 2, 2)[row % 4] for row in rows], "repeats stay"


def test_too_few_patients():
    data = table([(0, f"p{i}", "train") for i in range(20)] + [(1, f"q{i}", "test") for i in range(5)])
    folds.apply(data, config("data.folds=5"))
    for count, near, protocol, word in (
        (6, data.near, "clean", "b has 5 patients"),
        (5, np.array([(20, 24)]), "clean", "b has 4 patients"),
        (3, data.near, "study", "study"),
    ):
        with pytest.raises(ValueError, match=word):
            folds.apply(replace(data, protocol=protocol, near=near), config(f"data.folds={count}"))


def test_every_class_in_every_part():
    for sizes, others in (((60, 30, 1, 1, 1, 1), 20), ((100, 80, 60, 1, 1, 1), 1)):  # dealing by size would fail
        rows = [(0, f"p{i}", "train") for i in range(7) for _ in range(others)]
        data = table(rows + [(1, f"q{i}", "train") for i, size in enumerate(sizes) for _ in range(size)])
        part = folds.deal(data, 6)
        assert all(set(data.columns["label"][part == i].tolist()) == {0, 1} for i in range(6))
        assert len(set(zip(data.columns["group"], part, strict=True))) == len(set(data.columns["group"]))
    rows = [(0, f"n{i}", "train") for i in range(9)] + [(1, "p", "val"), (1, "q", "val"), (1, "pq", "test")]
    data = table([*rows, (2, "pq", "test"), (2, "r", "train"), (2, "s", "train")])
    part = folds.deal(data, 3)
    assert all(set(data.columns["label"][part == i].tolist()) == {0, 1, 2} for i in range(3))
    # Each class has three of the four patients; no assignment gives every part a patient of every class.
    data = table([(label, f"p{patient}", "train") for label in range(4) for patient in range(4) if patient != label])
    with pytest.raises(ValueError, match="several classes"):
        folds.deal(data, 3)


def test_one_source_left_out():
    """Sources x (classes 0, 1), y (1, one patient of 2) and z (0); a copy and a near duplicate link y and z to x."""
    rows, sources = [], []
    for source, label, count in (("x", 0, 8), ("x", 1, 8), ("y", 1, 20), ("y", 2, 1), ("z", 0, 20)):
        rows += [(label, f"{source}{label}{i // 2 if count > 1 else 0}", "train") for i in range(count)]
        sources += [source] * count
    rows[3] = (0, "x01", "")  # in no split, and so in none afterwards
    data = table(rows)
    pixels = data.columns["pixels"].copy()
    pixels[16] = pixels[8]  # the first image of y is a copy of one in x
    columns = data.columns | {"source": np.asarray(sources), "pixels": pixels}
    data = replace(data, columns=columns, near=np.array([(0, 40)]))  # the fourth image of z
    result = folds.apply(data, config("data.test_source=x"))
    split = result.columns["split"]
    assert result.rows("test").tolist() == [i for i in range(16) if i != 3]
    assert np.flatnonzero(split == "").tolist() == [3, 16, 17, 39, 40], "patients linked to x are not used"
    assert split[36] == "train", "the only patient of its class"
    groups = [set(data.columns["group"][result.rows(name)]) for name in splits.SPLITS]
    assert not any(a & b for a, b in itertools.combinations(groups, 2))
    counts = {name: Counter(data.columns["label"][result.rows(name)].tolist()) for name in ("train", "val")}
    assert counts == {"train": {0: 16, 1: 16, 2: 1}, "val": {0: 2, 1: 2}}
    for source, other, word in (
        ("y", {}, "data.test_source=y.*images of c"),
        ("w", {}, "data.test_source=w.*known: x, y, z"),
        ("x", {"source": np.where(np.arange(57) == 5, "", columns["source"])}, "source of 1 images is unknown"),
        ("x", {"source": np.full(57, "x")}, "one source only"),
    ):
        with pytest.raises(ValueError, match=word):
            folds.apply(replace(data, columns=columns | other), config(f"data.test_source={source}"))


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
    result, notes = complete(["val", "test"], [0, 1], "ab")
    assert result == ["val", "test"] and "external test set" in notes[0]


def test_study_cells():
    assert splits.parse_study("val+train*3") == {"val": 1, "train": 3}
    with pytest.raises(ValueError, match="dev"):
        splits.parse_study("dev")
