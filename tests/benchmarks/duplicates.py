"""Times the near-duplicate search on as many hashes as COVIDx CT has slices.

    python -m tests.benchmarks.duplicates [--images=431205]

The hashes are synthetic. Those of a patient form a random walk that starts near a common hash and flips 0 to 4 bits
per slice. Some bits flip far more often than others, so that about as many hashes are similar as in real CT slices.
Copies with 0 to 4 flipped bits are planted in other patients.
"""

import time

import numpy as np

from lungjax.data import duplicates
from lungjax.data.duplicates import DISTANCE
from tests.benchmarks import harness

PATIENTS, PLANTED = 6_068, 5_000


def words(bits: np.ndarray) -> np.ndarray:
    """Packs bits, bool [N, 64], into uint64 [N]."""
    return np.packbits(bits, axis=1).view(">u8")[:, 0].astype(np.uint64)


def make_hashes(images: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns hashes uint64 [N], groups int64 [N] and the planted pairs int64 [P, 2]."""
    groups = np.sort(rng.integers(0, PATIENTS, images))
    _, first, patient = np.unique(groups, return_index=True, return_inverse=True)
    unusual = rng.uniform(0.02, 0.3, (len(first), 1))  # with the walk, hashes are as similar as real ones
    begin = words((rng.random(64) < 0.5) ^ (rng.random((len(first), 64)) < unusual))
    bits = rng.permutation(64).astype(np.uint64)[(64 * rng.random((images, 4)) ** 6).astype(np.int64)]
    flips = np.where(np.arange(4) < rng.integers(0, 5, (images, 1)), np.uint64(1) << bits, np.uint64(0))
    walk = np.bitwise_xor.accumulate(np.bitwise_xor.reduce(flips, axis=1))
    hashes = walk ^ (begin ^ walk[first])[patient]
    chosen = rng.permutation(images)[: 2 * PLANTED].reshape(2, -1)
    for source, copy, turn in zip(*chosen, rng.integers(0, DISTANCE + 1, PLANTED), strict=True):
        mask = sum(1 << int(bit) for bit in rng.choice(64, turn, replace=False))
        hashes[copy] = hashes[source] ^ np.uint64(mask)
    pairs = np.sort(chosen.T, axis=1)
    return hashes, groups, pairs[groups[pairs[:, 0]] != groups[pairs[:, 1]]]


def main() -> None:
    images = harness.parse(__doc__, images=431_205).images
    rng = np.random.default_rng(0)
    hashes, groups, planted = make_hashes(images, rng)
    start = time.perf_counter()
    near = duplicates.near_pairs(hashes, groups, DISTANCE)
    seconds = time.perf_counter() - start
    keys = near.pairs[:, 0] * images + near.pairs[:, 1]
    recall = np.isin(planted[:, 0] * images + planted[:, 1], keys).mean()
    print(
        f"{images:,} hashes of {PATIENTS:,} patients: {seconds:.1f} s, peak memory of the process "
        f"{harness.peak_bytes() / 2**20:,.0f} MiB, {len(near.pairs):,} pairs, recall of {len(planted):,} planted "
        f"copies {recall:.4f}; {near.note or 'nothing was skipped'}"
    )


if __name__ == "__main__":
    main()
