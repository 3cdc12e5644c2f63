"""The clean protocol and the leak counts on hand-made columns, and two data sets compared."""

import numpy as np
import pytest

from lungjax.data import duplicates, leakage

NONE = np.zeros((0, 2), np.int64)


def clean(rows, near=()):
    """`rows` are (split, label, group, pixels)."""
    columns = [list(column) for column in zip(*rows, strict=True)]
    return leakage.clean(*columns, np.array(near, np.int64).reshape(-1, 2))


def test_what_leaks_nothing_stays():
    rows = [("train", 0, "a", "1"), ("val", 0, "b", "2"), ("test", 1, "c", "3"), ("", 1, "d", "4")]
    assert clean(rows) == (["train", "val", "test", ""], [])


def test_a_torn_group_keeps_its_latest_split():
    rows = [
        ("train", 0, "a", "1"),
        ("test", 0, "a", "2"),
        ("val", 0, "a", "3"),
        ("train", 0, "b", "4"),
        ("val", 0, "b", "5"),
    ]
    splits, notes = clean(rows)
    assert splits == ["", "test", "", "", "val"]
    assert notes == ["left out of the clean protocol: 3 images (their patients are also in a later split)"]


def test_an_image_that_is_out_from_the_start_pushes_nobody_out():
    rows = [("train", 0, "a", "1"), ("", 1, "a", "1"), ("", 0, "b", "2"), ("val", 1, "b", "3")]
    assert clean(rows, [(0, 2)]) == (["train", "", "", "val"], [])


def test_of_exact_copies_the_one_in_the_latest_split_stays():
    rows = [("train", 0, "a", "x"), ("test", 0, "b", "x"), ("val", 0, "c", "x"), ("train", 0, "a", "y")]
    splits, notes = clean(rows)
    assert splits == ["", "test", "", "train"]
    assert notes == ["left out of the clean protocol: 2 images (copies of an image that is kept)"]


def test_of_copies_in_one_split_one_stays_whatever_their_order():
    rows = [("train", 0, "b", "x"), ("train", 0, "a", "x"), ("train", 0, "c", "x")]
    assert clean(rows)[0] == ["", "train", ""]
    assert clean(rows[::-1])[0] == ["", "train", ""]
    assert clean([rows[1], rows[1]])[0] == ["train", ""]


def test_copies_with_different_labels_all_go():
    rows = [
        ("train", 0, "a", "x"),
        ("test", 1, "b", "x"),
        ("test", 1, "c", "x"),
        ("train", 1, "d", "y"),
        # The first of these goes with its patient, but its label still speaks against the other.
        ("train", 0, "e", "z"),
        ("test", 1, "f", "z"),
        ("val", 0, "e", "w"),
    ]
    splits, notes = clean(rows)
    assert splits == ["", "", "", "train", "", "", "val"]
    assert notes == [
        "left out of the clean protocol: 1 image (their patients are also in a later split)",
        "left out of the clean protocol: 4 images (equal images have different labels)",
    ]


def test_a_near_twin_in_a_later_split_pushes_out():
    rows = [("train", 0, "a", "1"), ("val", 0, "b", "2"), ("test", 0, "c", "3"), ("train", 0, "d", "4")]
    splits, notes = clean(rows, [(1, 2), (3, 2)])
    assert splits == ["train", "", "test", ""]
    assert notes == ["left out of the clean protocol: 2 images (near twins of an image in a later split)"]


def test_what_is_pushed_out_pushes_nobody():
    rows = [("train", 0, "a", "1"), ("val", 0, "b", "2"), ("test", 0, "c", "3")]
    assert clean(rows, [(0, 1), (1, 2)])[0] == ["train", "", "test"]  # a chain: val went, so train may stay
    assert clean(rows, [(0, 1)])[0] == ["", "val", "test"]
    rows[2] = ("test", 0, "c", "2")  # val's picture goes as a copy of test's, whose twin train's still is
    assert clean(rows, [(0, 1)])[0] == ["", "", "test"]
    rows[2] = ("test", 1, "c", "2")  # both go for their labels
    assert clean(rows, [(0, 1)])[0] == ["train", "", ""]


def test_near_twins_in_one_split_stay_and_different_labels_are_told():
    rows = [("train", 0, "a", "1"), ("train", 0, "b", "2"), ("train", 1, "c", "3")]
    assert clean(rows, [(0, 1)]) == (["train"] * 3, [])
    assert clean(rows, [(0, 1), (1, 2)]) == (
        ["train"] * 3,
        ["1 near pair in one split with different labels stay: look at them"],
    )


def random_columns(rng, n=400):
    splits = rng.choice(["train", "val", "test", ""], n, p=[0.6, 0.15, 0.2, 0.05]).tolist()
    groups = [f"p{g}" for g in rng.integers(0, 160, n)]
    pixels = [f"x{p}" for p in rng.integers(0, 330, n)]
    labels = [int(p[1:]) % 7 // 3 if rng.random() > 0.1 else 3 for p in pixels]
    near = np.unique(np.sort(rng.integers(0, n, (60, 2)), axis=1), axis=0)
    near = near[[groups[i] != groups[j] for i, j in near]]
    return splits, labels, groups, pixels, near


@pytest.mark.parametrize("seed", range(5))
def test_nothing_leaks_after_it_and_the_order_of_rows_does_not_matter(seed):
    rng = np.random.default_rng(seed)
    splits, labels, groups, pixels, near = random_columns(rng)
    done, _ = leakage.clean(splits, labels, groups, pixels, near)
    members = {s: [i for i, d in enumerate(done) if d == s] for s in ("train", "val", "test")}
    assert all(len(rows) > 10 for rows in members.values())
    for split, counts in leakage.leaks(members, groups, pixels, near).items():
        assert counts["any"] == 0 and counts["images"] == len(members[split])
    before = {s: [i for i, d in enumerate(splits) if d == s] for s in members}
    assert leakage.leaks(before, groups, pixels, near)["test"]["any"] > 20
    assert all(d in ("", s) for d, s in zip(done, splits, strict=True))

    mixed = rng.permutation(len(splits))
    place = np.argsort(mixed)
    again, _ = leakage.clean(*([c[i] for i in mixed] for c in (splits, labels, groups, pixels)), place[near])

    def kept(splits_, rows):  # copies in one group and split stand for each other
        return sorted((pixels[i], groups[i], s) for i, s in zip(rows, splits_, strict=True) if s)

    assert kept(again, mixed) == kept(done, range(len(done)))


def test_clean_refuses_other_splits_and_lengths():
    with pytest.raises(ValueError, match="'valid'; allowed are train, val, test"):
        clean([("valid", 0, "a", "1")])
    with pytest.raises(ValueError, match="2 splits, 1 labels"):
        leakage.clean(["train", "val"], [0], ["a", "b"], ["1", "2"], NONE)
    assert leakage.clean([], [], [], [], NONE) == ([], [])


def test_leaks_are_counted_once_for_each_image():
    groups = ["a", "b", "c", "d", "a", "e", "f", "g"]
    pixels = ["1", "2", "3", "1", "4", "5", "6", "2"]
    members = {"train": [0, 0, 0, 1, 2], "val": [3, 4, 7], "test": [3, 3, 5, 6, 2]}
    near = np.array([(1, 5), (3, 6), (2, 3)])  # the last: 3 has an exact copy in train, which counts
    found = leakage.leaks(members, groups, pixels, near)
    assert found["val"] == {
        "images": 3,
        "exact_twin_in_train": 2,  # 3 is 0 again, 7 is 1
        "near_twin_in_train": 0,
        "group_in_train": 1,  # 4 is of a
        "any": 3,
    }
    assert found["test"] == {
        "images": 4,
        "exact_twin_in_train": 2,  # 3, and 2, which is in both splits
        "near_twin_in_train": 2,  # 5 of 1; 6 of 3, which looks like 0
        "group_in_train": 1,
        "any": 4,
        "exact_twin_in_val": 1,
    }
    assert leakage.leaks({"train": [0], "test": []}, groups, pixels, near) == {}


def test_leaks_in_words():
    counts = {"images": 1200, "exact_twin_in_train": 12, "near_twin_in_train": 3, "group_in_train": 1, "any": 15}
    found = {"val": counts, "test": counts | {"exact_twin_in_train": 1, "exact_twin_in_val": 2}}
    assert leakage.leak_notes(found) == [
        "12 of 1,200 val images of the study's split have an exact copy in train, 3 a near twin, 1 shares patients; "
        "15 have any of these",
        "1 of 1,200 test images of the study's split has an exact copy in train, 3 a near twin, 1 shares patients; "
        "15 have any of these; 2 have an exact copy in val",
    ]


def test_the_worst_pairs_are_named_first():
    files = ["f.png", "e.png", "d.png", "c.png", "b.png", "a.png", "out.png", "g.png"]
    labels = ["ill", "ill", "well", "ill", "ill", "ill", "well", "ill"]
    pixels = ["1", "1", "2", "3", "3", "3", "3", "4"]
    members = {"train": [0, 1, 2, 3, 4, 4], "val": [5], "test": [5, 7]}
    near = np.array([(0, 2), (1, 7), (0, 4), (5, 6)])
    assert leakage.pairs_named(members, files, labels, pixels, near) == [
        "d.png (train, well) ~ f.png (train, ill)",
        "a.png (val+test, ill) = b.png (train, ill)",
        "e.png (train, ill) ~ g.png (test, ill)",
        "e.png (train, ill) = f.png (train, ill)",
        "b.png (train, ill) ~ f.png (train, ill)",
    ]
    assert len(leakage.pairs_named(members, files, labels, pixels, near, shown=2)) == 2
    assert leakage.pairs_named({}, files, labels, pixels, near) == []


def picture(seed: int) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 255, (12, 12), dtype=np.uint8)
    return np.kron(coarse, np.ones((10, 10), np.uint8))


def side(name, files, groups, pixels, images):
    hashes = np.array([duplicates.phash(image) for image in images], np.uint64)
    return leakage.Side(name, files, groups, pixels, hashes, images.__getitem__)


def test_two_data_sets_are_compared():
    one = side("one", ["a", "b", "c", "d"], ["p1", "p2", "p2", "p3"], list("0123"), [picture(s) for s in range(4)])
    bright = np.clip(picture(2).astype(int) + 8, 0, 255).astype(np.uint8)
    two = side(
        "two",
        ["x", "y", "z", "w", "v"],
        ["p9", "p3", "q", "q", "r"],
        ["0", "0", "8", "9", "8"],
        [picture(0), picture(0), bright, picture(7), bright],
    )
    found = leakage.cross(one, two)
    assert found["names"] == ["one", "two"] and found["images"] == [4, 5]
    assert found["groups"] == ["p3"]
    assert found["exact"] == [1, 2]
    assert found["near"] == [1, 2]
    assert found["examples"] == ["a = x", "c ~ z"]
    assert found["lines"] == [
        "patients with the same name in one and two: 1 (p3)",
        "1 of 4 images of one has an exact copy in two, 1 a near twin",
        "2 of 5 images of two have an exact copy in one, 2 a near twin",
    ]
    assert found["note"] == ""


def test_data_sets_that_share_nothing():
    one = side("one", ["a"], ["p1"], ["0"], [picture(0)])
    two = side("two", ["x"], ["p2"], ["1"], [picture(1)])
    found = leakage.cross(one, two)
    assert (found["exact"], found["near"], found["groups"], found["examples"]) == ([0, 0], [0, 0], [], [])
    assert found["lines"][0] == "patients with the same name in one and two: 0"


def test_near_examples_are_not_crowded_out_by_exact_ones():
    images = [picture(s) for s in range(30)]
    names = [f"{s:02}" for s in range(30)]
    one = side("one", names, names, names, images)
    two = side("two", names, names, names[:27] + ["x", "y", "z"], images[:27] + [i[2:-2] for i in images[27:]])
    examples = leakage.cross(one, two)["examples"]
    assert len(examples) == 20 and examples[-3:] == ["27 ~ 27", "28 ~ 28", "29 ~ 29"]
