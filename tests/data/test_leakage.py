"""Near duplicates, the clean protocol, leak counts, and the comparison of two data sets."""

import csv
import functools
import io
from dataclasses import replace

import folders
import numpy as np
from PIL import Image

from lungjax.data import duplicates, leakage
from lungjax.data.imaging import images
from lungjax.data.prepared import Prepared

SPLITS = ("train", "val", "test")
chest = functools.partial(folders.chest, size=200, vessels=60)


def clean(text, near=()):
    """Applies the protocol to comma-separated rows "split label group pixels"; the split "-" means none."""
    splits, labels, groups, pixels = zip(*(row.split() for row in text.split(",")), strict=True)
    splits = ["" if split == "-" else split for split in splits]
    near = np.array(near, np.int64).reshape(-1, 2)
    return leakage.clean(splits, list(map(int, labels)), groups, pixels, near, "patients")


def test_clean_groups_and_images_in_no_split():
    assert clean("train 0 a 1, val 0 b 2, test 1 c 3, - 1 d 4") == (["train", "val", "test", ""], {})
    # Images in no split remove nothing.
    assert clean("train 0 a 1, - 1 a 1, - 0 b 2, val 1 b 3", [(0, 2)]) == (["train", "", "", "val"], {})
    splits, removed = clean("train 0 a 1, test 0 a 2, val 0 a 3, train 0 b 4, val 0 b 5")
    assert splits == ["", "test", "", "", "val"] and removed == {"patients in a later split": 3}


def test_clean_exact_copies():
    splits, removed = clean("train 0 a x, test 0 b x, val 0 c x, train 0 a y")
    assert splits == ["", "test", "", "train"] and removed == {"copies of another image": 2}
    for rows in ("train 0 b x, train 0 a x, train 0 c x", "train 0 c x, train 0 a x, train 0 b x"):
        assert clean(rows)[0] == ["", "train", ""]  # the first group stays
    assert clean("train 0 a x, train 0 a x")[0] == ["train", ""]
    # The first z is removed with its patient, but its label still contradicts the other.
    splits, removed = clean("train 0 a x, test 1 b x, test 1 c x, train 1 d y, train 0 e z, test 1 f z, val 0 e w")
    assert splits == ["", "", "", "train", "", "", "val"]
    assert removed == {"patients in a later split": 1, "equal images with different labels": 4}


def test_clean_near_duplicates():
    splits, removed = clean("train 0 a 1, val 0 b 2, test 0 c 3, train 0 d 4", [(1, 2), (3, 2)])
    assert splits == ["train", "", "test", ""] and removed == {"near duplicates of an image in a later split": 2}
    rows = "train 0 a 1, val 0 b 2, test 0 c 3"
    assert clean(rows, [(0, 1), (1, 2)])[0] == ["train", "", "test"]  # a chain: val is removed, so train may stay
    assert clean(rows, [(0, 1)])[0] == ["", "val", "test"]
    # Val is removed as a copy of test, and train as its near duplicate. With different labels, val and test go.
    assert clean("train 0 a 1, val 0 b 2, test 0 c 2", [(0, 1)])[0] == ["", "", "test"]
    assert clean("train 0 a 1, val 0 b 2, test 1 c 2", [(0, 1)])[0] == ["train", "", ""]
    rows = "train 0 a 1, train 0 b 2, train 1 c 3"  # in one split
    assert clean(rows, [(0, 1)]) == (["train"] * 3, {})


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


def data_set(name, files, groups, pixels, pictures):
    hashes = np.array([duplicates.phash(image) for image in pictures], np.uint64)
    columns = {"file": np.array(files), "group": np.array(groups), "pixels": np.array(pixels), "phash": hashes}
    return Prepared(name, ("a", "b"), columns, [{"image": images.encode(image)} for image in pictures], None, "0")


def test_cross():
    one = data_set("one", list("abcd"), ["p1", "p2", "p2", "p3"], list("0123"), [chest(s) for s in range(4)])
    bright = np.clip(chest(2).astype(int) + 8, 0, 255).astype(np.uint8)
    pictures = [chest(0), chest(0), bright, chest(7), bright]
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


def jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(folders.encoded(image, "JPEG", quality=quality))))


def scale(image: np.ndarray, factor: float) -> np.ndarray:
    size = (round(image.shape[1] * factor), round(image.shape[0] * factor))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))


def gamma(image: np.ndarray, power: float, add: float = 0.0) -> np.ndarray:
    return np.clip(255 * (image / 255.0) ** power + add, 0, 255).round().astype(np.uint8)


COPIES = (
    lambda a: jpeg(a, 30),
    lambda a: scale(a, 0.5),
    lambda a: scale(a, 2.0),
    lambda a: gamma(a, 1.0, 12),
    lambda a: gamma(a, 0.85),
    lambda a: jpeg(gamma(scale(a, 0.6), 0.95, 5), 50),
)


def test_hashes_of_copies_and_other_images():
    hashes = [duplicates.phash(chest(seed)) for seed in range(12)]
    for copy in COPIES:
        for seed, original in enumerate(hashes):
            assert (original ^ duplicates.phash(copy(chest(seed)))).bit_count() <= duplicates.DISTANCE
    assert min((a ^ b).bit_count() for i, a in enumerate(hashes) for b in hashes[:i]) > 8


def test_hash_of_flat_images():
    noise = np.random.default_rng(0).normal(100, 3, (256, 256)).astype(np.uint8)
    for flat in (np.zeros((50, 70), np.uint8), np.full((512, 512), 200, np.uint8), noise):
        assert duplicates.phash(flat) == 0
    assert duplicates.phash(gamma(chest(0), 1.0, -20) // 8) != 0  # dark, but not flat


def brute_force(hashes: np.ndarray, groups: np.ndarray, distance: int) -> list[list[int]]:
    i, j = np.triu_indices(len(hashes), 1)
    keep = (np.bitwise_count(hashes[i] ^ hashes[j]) <= distance) & (groups[i] != groups[j])
    keep &= (hashes[i] != 0) & (hashes[j] != 0)
    return np.column_stack([i[keep], j[keep]]).tolist()


def clustered(rng: np.random.Generator, n: int) -> np.ndarray:
    """Returns hashes on random walks that flip a few bits, so that every distance occurs, with repeats and zeros."""
    hashes = rng.integers(1, 2**64 - 1, n, dtype=np.uint64)
    for i in range(1, n):
        if i % 12:
            hashes[i] = hashes[i - 1]
            for bit in rng.integers(0, 64, rng.integers(0, 5)):
                hashes[i] ^= np.uint64(1) << np.uint64(bit)
    hashes[rng.permutation(n)[: n // 10]] = 0
    return hashes


def test_search_against_brute_force(monkeypatch):
    monkeypatch.setattr(duplicates, "BLOCK", 97)  # so that blocks end inside the pairs of one hash
    for distance in (0, 1, 4, 6, 8, 15):
        rng = np.random.default_rng(distance)
        hashes, groups, order = clustered(rng, 360), rng.integers(0, 40, 360), rng.permutation(360)
        near = duplicates.near_pairs(hashes, groups, distance)
        expected = brute_force(hashes, groups, distance)
        assert len(expected) > 50 and near.note == "" and near.pairs.tolist() == expected
        shuffled = duplicates.near_pairs(hashes[order], groups[order], distance)
        assert sorted(np.sort(order[shuffled.pairs], axis=1).tolist()) == expected
    for none in (np.zeros(0, np.uint64), np.zeros(7, np.uint64)):
        near = duplicates.near_pairs(none, np.arange(len(none)))
        assert near.pairs.shape == (0, 2) and near.note == ""


def test_bound_on_equal_hashes():
    n = 30_000
    hashes = np.full(n, 99, np.uint64)
    hashes[::3] = 98
    near = duplicates.near_pairs(hashes, np.arange(n))
    assert "20,000 images share a hash" in near.note
    assert 0 < len(near.pairs) <= duplicates.MAX_PAIRS
    assert len(np.unique(near.pairs)) > n - 10  # yet nearly every image has a partner
    assert duplicates.near_pairs(hashes, np.zeros(n, int)).note == ""  # one group: nothing is lost


def test_likeness():
    pictures = [chest(seed) for seed in range(6)]
    changes = [*COPIES, lambda a: a[6:-6, 6:-6], lambda a: a[8:-8, 14:-8]]
    images = pictures + [change(a) for a in pictures for change in changes]
    pairs = np.array([(i // len(changes), 6 + i) for i in range(len(images) - 6)])
    assert duplicates.likeness(pairs, images.__getitem__).min() >= duplicates.MIN_CORRELATION
    others = np.array([(i, j) for i in range(6) for j in range(i)])
    assert duplicates.likeness(others, images.__getitem__).max() < 0.87  # all smooth outlines match well


def test_near_duplicates():
    pictures = [chest(s) for s in range(5)]
    images = [*pictures, jpeg(pictures[0], 60), pictures[1], scale(pictures[2], 0.5), scale(pictures[0], 0.7)]
    groups = ["a", "b", "c", "d", "e", "f", "g", "c", "a"]  # c's copy is in its own group
    pixels = ["0", "1", "2", "3", "4", "5", "1", "7", "8"]  # image 6 is an exact copy
    hashes = np.array([duplicates.phash(a) for a in images], np.uint64)
    reads = []
    near = duplicates.near_twins(hashes, groups, pixels, lambda i: reads.append(i) or images[i])
    assert near.pairs.tolist() == [[0, 5], [5, 8]]
    assert set(reads) == {0, 5, 8}  # nothing else is opened


def test_real_images(shared):
    for kind in ("ct", "xray"):
        with open(shared / "data" / kind / "labels.csv") as file:
            rows = sorted(csv.DictReader(file), key=lambda row: row["path"])
        pairs_by_eye = ("seg20_r03", "seg20_r04", "ucsd_115", "ucsd_117")
        rows = [row for i, row in enumerate(rows) if i % 4 == 0 or any(name in row["path"] for name in pairs_by_eye)]
        pictures = [np.asarray(Image.open(shared / "data" / kind / row["path"]).convert("L")) for row in rows]
        small = [duplicates.thumbnail(picture) for picture in pictures]
        hashes = np.array([duplicates.phash(picture) for picture in pictures], np.uint64)
        groups, names = [row["group"] for row in rows], [row["path"] for row in rows]
        assert duplicates.near_twins(hashes, groups, names, small.__getitem__).pairs.tolist() == []
        if kind == "ct":  # one group per file: slices of a patient that the collection has twice (by eye)
            near = duplicates.near_twins(hashes, names, names, small.__getitem__).pairs
            assert all(groups[i] == groups[j] for i, j in near)
            pairs = {(names[i], names[j]) for i, j in near}
            assert ("COVID/seg20_r03.jpg", "COVID/seg20_r04.jpg") in pairs
            assert ("NonCOVID/ucsd_115.jpg", "NonCOVID/ucsd_117.jpg") in pairs
