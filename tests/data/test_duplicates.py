"""Near duplicates: hashes of copies, the search against brute force, and the likeness of copies and other images."""

import csv
import functools
import io

import folders
import numpy as np
from PIL import Image

from lungjax.data import duplicates

chest = functools.partial(folders.chest, size=200, vessels=60)


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
