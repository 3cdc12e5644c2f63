"""The clean protocol, leak counts, and the comparison of two data sets, on synthetic columns."""

import functools
from dataclasses import replace

import numpy as np
from folders import chest

from lungjax.data import duplicates, leakage
from lungjax.data.imaging import images
from lungjax.data.prepared import Prepared

SPLITS = ("train", "val", "test")


def clean(text, near=()):
    """Applies the protocol to comma-separated rows "split label group pixels"; the split "-" means none."""
    splits, labels, groups, pixels = zip(*(row.split() for row in text.split(",")), strict=True)
    splits = ["" if split == "-" else split for split in splits]
    near = np.array(near, np.int64).reshape(-1, 2)
    return leakage.clean(splits, list(map(int, labels)), groups, pixels, near, "patients")


def test_clean_groups_and_images_in_no_split():
    assert clean("train 0 a 1, val 0 b 2, test 1 c 3, - 1 d 4") == (["train", "val", "test", ""], [])
    # Images in no split remove nothing.
    assert clean("train 0 a 1, - 1 a 1, - 0 b 2, val 1 b 3", [(0, 2)]) == (["train", "", "", "val"], [])
    splits, (note,) = clean("train 0 a 1, test 0 a 2, val 0 a 3, train 0 b 4, val 0 b 5")
    assert splits == ["", "test", "", "", "val"] and "patients" in note and note.endswith(": 3")


def test_clean_exact_copies():
    splits, (note,) = clean("train 0 a x, test 0 b x, val 0 c x, train 0 a y")
    assert splits == ["", "test", "", "train"] and "copies" in note and note.endswith(": 2")
    for rows in ("train 0 b x, train 0 a x, train 0 c x", "train 0 c x, train 0 a x, train 0 b x"):
        assert clean(rows)[0] == ["", "train", ""]  # the first group stays
    assert clean("train 0 a x, train 0 a x")[0] == ["train", ""]
    # The first z is removed with its patient, but its label still contradicts the other.
    splits, notes = clean("train 0 a x, test 1 b x, test 1 c x, train 1 d y, train 0 e z, test 1 f z, val 0 e w")
    assert splits == ["", "", "", "train", "", "", "val"]
    assert notes[0].endswith(": 1") and "labels" in notes[1] and notes[1].endswith(": 4")


def test_clean_near_duplicates():
    splits, (note,) = clean("train 0 a 1, val 0 b 2, test 0 c 3, train 0 d 4", [(1, 2), (3, 2)])
    assert splits == ["train", "", "test", ""] and "near" in note and note.endswith(": 2")
    rows = "train 0 a 1, val 0 b 2, test 0 c 3"
    assert clean(rows, [(0, 1), (1, 2)])[0] == ["train", "", "test"]  # a chain: val is removed, so train may stay
    assert clean(rows, [(0, 1)])[0] == ["", "val", "test"]
    # Val is removed as a copy of test, and train as its near duplicate. With different labels, val and test go.
    assert clean("train 0 a 1, val 0 b 2, test 0 c 2", [(0, 1)])[0] == ["", "", "test"]
    assert clean("train 0 a 1, val 0 b 2, test 1 c 2", [(0, 1)])[0] == ["train", "", ""]
    rows = "train 0 a 1, train 0 b 2, train 1 c 3"  # in one split
    assert clean(rows, [(0, 1)]) == (["train"] * 3, [])


def random_columns(rng, n=400):
    splits = rng.choice([*SPLITS, ""], n, p=[0.6, 0.15, 0.2, 0.05]).tolist()
    groups = [f"p{g}" for g in rng.integers(0, 160, n)]
    pixels = [f"x{p}" for p in rng.integers(0, 330, n)]
    labels = [int(p[1:]) % 7 // 3 if rng.random() > 0.1 else 3 for p in pixels]
    near = np.unique(np.sort(rng.integers(0, n, (60, 2)), axis=1), axis=0)
    return splits, labels, groups, pixels, near[[groups[i] != groups[j] for i, j in near]]


def split_up(cells, groups, pixels, near):
    """Returns a data set with the splits `cells`, such as "val+test", in both protocols."""
    columns = {"group": np.array(groups), "pixels": np.array(pixels)}
    columns |= dict.fromkeys(("split", "split_study"), np.array(cells))
    return Prepared("made", ("a", "b"), columns, None, None, "0", near=np.asarray(near))


def test_clean_without_leaks_in_any_order():
    for seed in range(3):
        rng = np.random.default_rng(seed)
        *columns, near = random_columns(rng)
        splits, _, groups, pixels = columns
        result, _ = leakage.clean(*columns, near, "patients")
        after = leakage.leaks(split_up(result, groups, pixels, near))
        assert all(counts["images"] > 10 and counts["any"] == 0 for counts in after.values())
        assert leakage.leaks(split_up(splits, groups, pixels, near))["test"]["any"] > 20
        assert all(d in ("", s) for d, s in zip(result, splits, strict=True))
        order = rng.permutation(len(splits))
        shuffled, _ = leakage.clean(*([c[i] for i in order] for c in columns), np.argsort(order)[near], "patients")
        # Copies in one group and split are interchangeable.
        expected = [(pixels[i], groups[i], s) for i, s in enumerate(result) if s]
        assert sorted((pixels[i], groups[i], s) for i, s in zip(order, shuffled, strict=True) if s) == sorted(expected)


def test_leaks():
    groups = ["a", "b", "c", "d", "a", "e", "f", "g"]
    pixels = ["1", "2", "3", "1", "4", "5", "6", "2"]
    cells = ["train*3", "train", "train+test", "val+test*2", "val", "test", "test", "val"]
    near = np.array([(1, 5), (3, 6), (2, 3)])  # 3 also has an exact copy in train, which has precedence
    data = replace(split_up(cells, groups, pixels, near), protocol="study")
    leaks = leakage.leaks(data)
    names = ("images", "exact_twin_in_train", "near_twin_in_train", "group_in_train", "any")
    # Val: 3 copies 0, 7 copies 1, 4 is of group a. Test: 3, 2 (also in train), 5 (like 1), and 6 (like a copy of 0).
    assert leaks["val"] == dict(zip(names, (3, 2, 0, 1, 3), strict=True))
    assert leaks["test"] == dict(zip(names, (4, 2, 2, 1, 4), strict=True)) | {"exact_twin_in_val": 1}
    assert leakage.leaks(split_up(["train"] * 8, groups, pixels, near)) == {}
    val, test = leakage.leak_notes(leaks, "protocol=study", "patients")
    assert val.startswith("protocol=study: 3 of 3 val images") and "in val" not in val
    assert test.endswith("exact copies in val: 1")


picture = functools.partial(chest, size=120, vessels=60)


def data_set(name, files, groups, pixels, pictures):
    hashes = np.array([duplicates.phash(image) for image in pictures], np.uint64)
    columns = {"file": np.array(files), "group": np.array(groups), "pixels": np.array(pixels), "phash": hashes}
    return Prepared(name, ("a", "b"), columns, [{"image": images.encode(image)} for image in pictures], None, "0")


def test_cross():
    one = data_set("one", list("abcd"), ["p1", "p2", "p2", "p3"], list("0123"), [picture(s) for s in range(4)])
    bright = np.clip(picture(2).astype(int) + 8, 0, 255).astype(np.uint8)
    pictures = [picture(0), picture(0), bright, picture(7), bright]
    two = data_set("two", list("xyzwv"), ["p9", "p3", "q", "q", "r"], list("00898"), pictures)
    result = leakage.cross(one, two)
    lines, seen = result.pop("lines"), result.pop("b_rows")
    assert result == {"exact": [1, 2], "near": [1, 2], "examples": ["a = x", "c ~ z"], "note": ""}
    assert seen.tolist() == [True, True, True, False, True]
    assert lines[0].endswith("1 (p3)") and lines[1].startswith("of the 4 images in one, 1 have")
    other = leakage.cross(one, two, np.array([1, 3]), np.array([0, 2, 3]))
    assert (other["exact"], other["near"], other["examples"]) == ([0, 0], [0, 0], [])
    turned = leakage.cross(one, replace(two, volumes={"orientation": "rotated"}))
    assert "180" in turned["note"] and turned["lines"][-1] == turned["note"]
