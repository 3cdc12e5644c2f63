"""Near duplicates: re-saved copies of an image, detected by a 64-bit hash and confirmed by comparing pixels.

Chests are so similar that a hash is insufficient: of 7.5 million pairs of CT slices from different patients, 41 have
hashes within 4 bits. `near_pairs` therefore proposes candidates, and `likeness` compares details after alignment.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image
from scipy.fft import dctn
from scipy.ndimage import gaussian_filter1d

from lungjax.data.imaging import images as image_files

SIDE = 64  # pixels of a thumbnail
MIN_DEVIATION = 2.0  # gray levels; a thumbnail with a smaller standard deviation has no content to hash
DISTANCE = 4  # bits; detects 99% of re-saved copies
# A larger distance detects more cropped copies, but its many candidate pairs are affordable only for small sets.
DISTANCES = ((20_000, 8), (100_000, 6))  # maximum number of images, bits
MIN_CORRELATION = 0.9  # of the details of two copies
BLOCK = 1 << 20  # hash pairs compared at a time
MAX_PARTNERS = 20_000  # comparisons per hash and band
MAX_COPIES = 100  # later images with the same hash that an image is compared with
MAX_PAIRS = 10_000_000
BATCH = 256  # pictures aligned at a time
CACHE_SIZE = 50_000  # thumbnails in memory while pairs are confirmed

# The 64 lowest frequencies from radius 5 on. Lower ones are common to all chests: at equal recall of re-saved copies
# they propose four to ten times as many pairs of different patients.
_RADII = sorted((y * y + x * x, y, x) for y in range(12) for x in range(12) if y * y + x * x >= 25)
_FREQUENCIES = np.array([(y, x) for _, y, x in _RADII[:64]])


@dataclass(frozen=True, eq=False)
class Near:
    """Pairs of confirmed or candidate near duplicates."""

    pairs: np.ndarray  # int64 [P, 2], rows i < j, sorted
    note: str = ""  # limits that the search reached, "" for none


def thumbnail(gray: np.ndarray) -> np.ndarray:
    """Returns a gray image, uint8 [H, W], as uint8 [64, 64] for `likeness`; a thumbnail is returned unchanged."""
    return np.clip(np.rint(_shrink(gray)), 0, 255).astype(np.uint8)


def phash(gray: np.ndarray) -> int:
    """Returns the 64-bit perceptual hash of a gray image, uint8 [H, W]; 0 for a flat one.

    The bits are the signs of 64 low DCT frequencies of the thumbnail. JPEG compression, resizing and small changes of
    brightness, contrast or gamma flip a few bits; cropping by more than 1% flips many.
    """
    small = _shrink(gray)
    if small.std() < MIN_DEVIATION:
        return 0
    waves = dctn(small, norm="ortho")[_FREQUENCIES[:, 0], _FREQUENCIES[:, 1]]
    return int(np.packbits(waves > 0).view(">u8")[0])


def near_pairs(hashes: np.ndarray, groups: np.ndarray, distance: int = DISTANCE) -> Near:
    """Returns all pairs of images in different groups whose hashes differ in at most `distance` bits.

    `hashes` is uint64 [N], and hash 0 is never paired; `groups` is int64 [N]; `distance` is 0 to 15. Hashes that differ
    in d bits are equal in at least one of d + 1 bands, so sorting by each band finds every pair. To limit memory, pairs
    are skipped if very many hashes are similar; `note` reports this.
    """
    images = np.flatnonzero(hashes)
    images = images[np.lexsort((_rank_in_group(hashes[images], groups[images]), hashes[images]))]
    values, owner = hashes[images], groups[images]
    _, start, run, count = np.unique(values, return_index=True, return_inverse=True, return_counts=True)
    rank = np.arange(len(images)) - start[run]  # among images with the same hash, alternating between groups
    everything, early = np.arange(len(images)), np.flatnonzero(rank < MAX_COPIES)
    # Equal hashes first, then those that are equal in a band.
    masks = [np.uint64(2**64 - 1)]
    masks += [np.uint64(sum(1 << bit for bit in range(band, 64, distance + 1))) for band in range(distance + 1)]
    parts, notes, total, skipped = [np.zeros((0, 2), np.int64)], [], 0, 0
    for number, mask in enumerate(masks):
        members, limit = (early, MAX_PARTNERS) if number else (everything, MAX_COPIES)
        order = members[np.lexsort((members, values[members] & mask))]
        ordered = values[order]
        partners = np.searchsorted(ordered & mask, ordered & mask, side="right") - np.arange(len(order)) - 1
        skipped += int(np.maximum(partners - limit, 0).sum()) if number else 0
        for first, second in _blocks(np.minimum(partners, limit)):
            a, b, differ = order[first], order[second], ordered[first] ^ ordered[second]
            new = (np.bitwise_count(differ) <= distance) & (owner[a] != owner[b])
            for earlier in masks[:number]:
                new &= differ & earlier != 0
            parts.append(np.column_stack([a[new], b[new]])[: MAX_PAIRS - total])
            total += len(parts[-1])
            if total >= MAX_PAIRS:
                break
        if total >= MAX_PAIRS:
            notes.append(f"the search for near duplicates stopped at {MAX_PAIRS:,} candidate pairs")
            break
    if skipped:
        notes.append(f"{skipped:,} comparisons were skipped: over {MAX_PARTNERS:,} hashes share a band")
    places = np.concatenate(parts)
    if count[run[places]].max(initial=0) > MAX_COPIES:
        notes.insert(0, f"up to {count.max():,} images share a hash; at most {MAX_COPIES} pairs per image were tried")
    pairs = np.sort(images[places], axis=1)
    return Near(pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))], "; ".join(notes))


def likeness(pairs: np.ndarray, read: Callable[[int], np.ndarray]) -> np.ndarray:
    """Returns the correlation of local detail for each pair, float64 [P] in -1..1; copies reach MIN_CORRELATION.

    `pairs` int64 [P, 2] are image numbers; `read` returns an image or its thumbnail, uint8 [H, W]. One image is aligned
    to the other by shift and stretch; brightness and contrast are removed. Measured maxima: 0.82 for CT slices of
    different patients (7.5 million pairs), 0.72 for X-rays of different people, 0.86 for X-rays of one person. Copies
    with JPEG quality 30, half the size or a border of 2% cut off reach 0.95, as may adjacent slices of one scan.
    """
    detail = functools.lru_cache(CACHE_SIZE)(lambda i: _detail(thumbnail(read(i))).astype(np.float16))
    result = np.zeros(len(pairs))
    inner = np.s_[:, 4:-4, 4:-4]  # a stretched picture repeats its edge outside
    for at in range(0, len(pairs), BATCH):
        batch = pairs[at : at + BATCH].T.tolist()
        fixed, moving = (np.stack([detail(i) for i in side]).astype(np.float32) for side in batch)
        aligned = _correlation(fixed[inner], _align(fixed, moving)[inner])
        result[at : at + BATCH] = np.maximum(aligned, _correlation(fixed, moving))
    return result


def near_twins(hashes: np.ndarray, groups: ArrayLike, pixels: ArrayLike, read: Callable[[int], np.ndarray]) -> Near:
    """Returns the confirmed near duplicates in different groups; arguments as in `near_pairs` and `likeness`.

    `groups` are names. Among exact copies (equal `pixels`) in a group, only the first is compared.
    """
    same = np.unique(np.asarray(pixels, np.str_), return_inverse=True)[1]
    group = np.unique(np.asarray(groups, np.str_), return_inverse=True)[1]
    rows = np.sort(np.unique(np.column_stack([same, group]), axis=0, return_index=True)[1])
    distance = next((bits for images, bits in DISTANCES if len(rows) <= images), DISTANCE)
    near = near_pairs(np.asarray(hashes, np.uint64)[rows], group[rows], distance)
    pairs = rows[near.pairs]
    pairs = pairs[same[pairs[:, 0]] != same[pairs[:, 1]]]
    return Near(pairs[likeness(pairs, read) >= MIN_CORRELATION], near.note)


def _shrink(gray: np.ndarray) -> np.ndarray:
    if gray.shape == (SIDE, SIDE):
        return gray.astype(np.float32)
    picture = Image.fromarray(gray).convert("F")  # not rounded: a dark image has few gray levels
    return np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def _rank_in_group(hashes: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Returns the number of earlier images with the same hash and group, int64 [n]; sorting by it alternates groups."""
    run = np.unique(np.column_stack([hashes, groups.astype(np.uint64)]), axis=0, return_inverse=True)[1].ravel()
    order = np.argsort(run, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order)) - np.searchsorted(run[order], run[order])
    return rank


def _blocks(partners: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields (first, second) positions that pair each p with p + 1 ... p + partners[p], about `BLOCK` at a time."""
    starts = np.cumsum(partners) - partners
    for rows in np.split(np.arange(len(partners)), np.flatnonzero(np.diff(starts // BLOCK)) + 1):
        first = rows.repeat(partners[rows])
        yield first, first + 1 + starts[rows[:1]].sum() + np.arange(len(first)) - starts[first]


def _smooth(image: np.ndarray, sigma: float) -> np.ndarray:
    gauss = gaussian_filter1d(np.eye(SIDE, dtype=np.float32), sigma, axis=0)  # of one side of a thumbnail
    return gauss @ image @ gauss.T


def _detail(small: np.ndarray) -> np.ndarray:
    """Returns a thumbnail minus its local mean, divided by its local deviation."""
    centered = small - _smooth(small.astype(np.float32), 2.0)
    return centered / (np.sqrt(_smooth(centered**2, 4.0)) + 4.0)  # 4 gray levels keep noise small


def _correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = (v - v.mean(axis=(1, 2), keepdims=True) for v in (a, b))
    return (a * b).sum(axis=(1, 2)) / np.maximum(np.sqrt((a * a).sum(axis=(1, 2)) * (b * b).sum(axis=(1, 2))), 1e-6)


def _align(fixed: np.ndarray, moving: np.ndarray) -> np.ndarray:
    """Returns `moving` [B, 64, 64] shifted and stretched along each axis to fit `fixed` (Lucas & Kanade, 1981)."""
    scale = (np.arange(SIDE, dtype=np.float32) - (SIDE - 1) / 2) / (SIDE / 2)  # -1..1
    move = np.zeros((len(fixed), 4), np.float32)  # down, stretch down, across, stretch across, in pixels
    warped = moving
    for sigma in (3.0, 2.0, 1.0, 1.0):
        target, current = (_smooth(v, sigma) for v in (fixed, warped))
        down, across = np.gradient(current, axis=(1, 2))
        slopes = np.stack([down, down * scale[:, None], across, across * scale], axis=-1)[:, 2:-2, 2:-2]
        slopes = slopes.reshape(len(fixed), -1, 4)
        error = (target - current)[:, 2:-2, 2:-2].reshape(len(fixed), -1, 1)
        transposed = slopes.transpose(0, 2, 1)
        step = np.linalg.solve(transposed @ slopes + 1e-3 * np.eye(4, dtype=np.float32), transposed @ error)[..., 0]
        move = np.clip(move + np.clip(step, -2, 2), -5, 5)  # at most 8% of the image, at either edge
        rows = _sampling_matrix(move[:, 0:1] + move[:, 1:2] * scale)
        columns = _sampling_matrix(move[:, 2:3] + move[:, 3:4] * scale)
        warped = rows @ moving @ columns.transpose(0, 2, 1)
    return warped


def _sampling_matrix(shift: np.ndarray) -> np.ndarray:
    """Returns matrices [B, 64, 64] that sample linearly at each position plus `shift` [B, 64]; edges repeat."""
    place = np.arange(SIDE, dtype=np.float32)
    at = np.clip(place + shift, 0, SIDE - 1)
    return image_files.kernel_weights(np.abs(at[..., None] - place), "bilinear")
