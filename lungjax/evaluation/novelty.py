"""Novelty detection: a score that warns about out-of-distribution input, computed from the image alone.

A classifier returns a class even for a photograph, another organ or a blank page. lungjax/evaluation/README.md
describes the score; tests/benchmarks/README.md has a comparison and the limits: images of another modality, mirrored
images and unseen findings may score below 1.
"""

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image

Picture = np.ndarray | Image.Image  # [H, W] or [H, W, 3], uint8 or float in 0..255, of any size

SIDE = 64  # pixels
FALSE_ALARMS = 0.01  # share of in-distribution images that may score above 1
MIN_IMAGES = (20, 5)  # of the train and val splits
RIDGE = 0.2  # added to each standard deviation, as a fraction of it
CLUSTERS, CLUSTER_SIZE = 20, 25  # largest number of clusters, and smallest mean number of images in them
ITERATIONS = 20  # of k-means
POWER = 8  # exponent of the power mean of the three distances: nearly their maximum
# Smallest standard deviation of each feature, in its unit: gray levels of 0..255; 20 times a logarithm, so 1 is 5
# percent; 50 times a contrast or correlation. It applies to features that never vary, such as the color of gray images.
TOLERANCES = {
    "intensity": np.full(13, 2.0),
    "detail": np.asarray([2.0] * 5 + [1.0, 1.5]),
    "layout": np.asarray([4.0] * 64 + [3.0] * 64 + [2.0] * 2),
}
MIN_THRESHOLD = 0.5  # half a tolerance in every feature is not novel, even if all training images are equal
QUANTILES = (0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.98)
LUMA = np.asarray([0.299, 0.587, 0.114], np.float32)
RATES = ("false_alarms", "detection")  # keys of `Novelty.rates`
COLOR = 6  # index in "detail"
# Descriptions of values below and above those of the training images, for the features of "intensity" and "detail".
MEANINGS = {
    "intensity": (
        *[("darker dark areas", "brighter dark areas")] * 3,
        ("darker overall", "brighter overall"),
        *[("darker bright areas", "brighter bright areas")] * 3,
        ("smaller black area", "larger black area"),
        ("smaller white area", "larger white area"),
        *((f"darker {side} border", f"brighter {side} border") for side in ("top", "bottom", "left", "right")),
    ),
    "detail": (
        *[("smoother", "more fine detail or noise")] * 5,
        ("narrower aspect ratio", "wider aspect ratio"),
        ("less colorful", "more colorful"),
    ),
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Clusters:
    """The distribution of one feature vector over the training images: Gaussians with one covariance."""

    means: np.ndarray  # [K, D]
    covariance: np.ndarray  # [D, D], regularized
    unit: float = 1.0

    @cached_property
    def _whitening(self) -> np.ndarray:
        return np.linalg.inv(np.linalg.cholesky(self.covariance))

    def whiten(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns features [..., D] and means, transformed so that Mahalanobis distances are Euclidean."""
        return features @ self._whitening.T, self.means @ self._whitening.T

    def score(self, features: np.ndarray) -> Any:
        """Returns the Mahalanobis distance of features [..., D] to the nearest mean, divided by `unit`, [...]."""
        return _distances(*self.whiten(features)).min(axis=-1) / self.unit

    def deviations(self, features: np.ndarray) -> np.ndarray:
        """Returns how many standard deviations each feature [D] is from the nearest mean, [D]."""
        nearest = self.means[_distances(*self.whiten(features)).argmin()]
        return np.asarray((features - nearest) / np.sqrt(np.diag(self.covariance)))


@dataclass(frozen=True, eq=False)
class Novelty:
    """A score from `fit` or `from_dict`. Its methods raise the errors of `measure` for invalid pictures."""

    parts: dict[str, Clusters]
    threshold: float
    rates: dict[str, dict[str, Any]]  # see `fit`

    def score(self, picture: Picture) -> float:
        """Returns the novelty of a picture, finite and at least 0; values above 1 deserve a warning."""
        return float(_score(self.parts, measure(picture)) / self.threshold)

    def reason(self, picture: Picture) -> str:
        """Returns the largest difference from the training images in a few words, such as "darker overall"."""
        features = measure(picture)
        if features["intensity"][len(QUANTILES) - 1] - features["intensity"][0] < 4:  # gray levels
            return "almost uniform image"
        detail = self.parts["detail"]
        # Gray images saved as color JPEG differ by up to two gray levels between channels; six deviations are visible.
        if detail.means[:, COLOR].max() < 2 and detail.deviations(features["detail"])[COLOR] > 6:
            return "color image; the training images are grayscale"
        name = max(self.parts, key=lambda name: self.parts[name].score(features[name]))
        if name == "layout":
            return "different layout: another view, organ or kind of image"
        deviations = self.parts[name].deviations(features[name])
        largest = int(np.abs(deviations).argmax())
        if abs(deviations[largest]) < 2.5:  # no single feature explains the score
            return f"unusual combination of {'gray levels' if name == 'intensity' else 'detail and proportions'}"
        return MEANINGS[name][largest][int(deviations[largest] > 0)]

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON-ready content for `from_dict`, about 120 kB as text."""
        parts = {}
        for name, part in self.parts.items():
            lower = part.covariance[np.tril_indices(len(part.covariance))]
            parts[name] = {"means": part.means.tolist(), "covariance": lower.tolist(), "unit": part.unit}
        return {"threshold": self.threshold, **self.rates, "parts": parts}


def fit(
    train: Iterable[Picture],
    val: Iterable[Picture],
    test: Iterable[Picture],
    outliers: Iterable[tuple[str, Iterable[Picture]]] = (),
) -> Novelty:
    """Fits the score to train images, chooses the threshold on val images, and measures how often it warns.

    The result has `rates` {"false_alarms": {"val": r, "test": r}, "detection": {KIND: r}} for the pairs of kind and
    images in `outliers`, where r = {"n", "warnings", "rate", "interval"}: the number of images, those above the
    threshold, their share (None without images), and its 95 % interval. 2,000 train and 1,000 val images are enough.
    Raises ValueError for fewer than MIN_IMAGES images or invalid pictures.
    """
    reference, held_out = _measure_all(train), _measure_all(val)
    counts = len(reference["detail"]), len(held_out["detail"])
    if counts[0] < MIN_IMAGES[0] or counts[1] < MIN_IMAGES[1]:
        needed = f"a novelty score needs at least {MIN_IMAGES[0]} and {MIN_IMAGES[1]}"
        raise ValueError(f"{counts[0]} training and {counts[1]} validation images: {needed}")
    parts = {}
    for name, tolerances in TOLERANCES.items():
        part = _fit_clusters(reference[name], tolerances)
        unit = max(_conformal(part.score(held_out[name])), math.sqrt(len(tolerances)))
        parts[name] = replace(part, unit=unit)
    threshold = _threshold(_score(parts, held_out))

    def rate(features: Mapping[str, np.ndarray]) -> dict[str, Any]:
        from lungjax.evaluation import bootstrap  # here: model.pyz packs this file without it

        scores = _score(parts, features)
        n, count = len(scores), int((scores > threshold).sum())
        share = count / n if n else None
        return {"n": n, "warnings": count, "rate": share, "interval": bootstrap.wilson(count, n)}

    false_alarms = {"val": rate(held_out), "test": rate(_measure_all(test))}
    detection = {kind: rate(_measure_all(pictures)) for kind, pictures in outliers}
    return Novelty(parts, threshold, {"false_alarms": false_alarms, "detection": detection})


def from_dict(content: Mapping[str, Any]) -> Novelty:
    """Returns the score from the content of `Novelty.to_dict`. Raises ValueError for invalid content."""
    try:
        parts = {}
        for name, tolerances in TOLERANCES.items():
            part, size = content["parts"][name], len(tolerances)
            lower = np.zeros((size, size))
            lower[np.tril_indices(size)] = np.asarray(part["covariance"], np.float64).reshape(size * (size + 1) // 2)
            means = np.asarray(part["means"], np.float64).reshape(-1, size)
            parts[name] = Clusters(means, lower + np.tril(lower, -1).T, float(part["unit"]))
            # `score` fails for a covariance that is not positive definite.
            if not (np.isfinite(means).all() and 0 < parts[name].score(means.max(axis=0) + 1) < math.inf):
                raise ValueError(f"{name} is out of range")
        threshold = float(content["threshold"])
        if not 0 < threshold < math.inf:
            raise ValueError("threshold out of range")
        return Novelty(parts, threshold, {name: dict(content[name]) for name in RATES})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"the novelty score of the model is damaged ({error!r}); export the model again") from None


def measure(picture: Picture) -> dict[str, np.ndarray]:
    """Returns the features of a picture, float64: "intensity" [13], "detail" [7] and "layout" [130].

    Raises ValueError for arrays other than [H, W], [H, W, 1] or [H, W, 3], and for empty ones.
    """
    image = picture if isinstance(picture, Image.Image) else _to_image(np.asarray(picture))
    image = image if image.mode in ("L", "RGB") else image.convert("RGB")
    aspect = image.size[0] / image.size[1]
    pixels = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX, reducing_gap=2.0), np.float32)
    color = 0.0
    if pixels.ndim == 3:
        color = float(np.ptp(_pooled(pixels, 16), axis=-1).mean())  # pooled: noise of single pixels is not color
        pixels = pixels @ LUMA
    borders = (pixels[:4], pixels[-4:], pixels[:, :4], pixels[:, -4:])
    black_and_white = (255 * (pixels < 8).mean(), 255 * (pixels > 247).mean())
    coarse = _pooled(pixels, 16)
    neighbors = (pixels[:-2, 1:-1] + pixels[2:, 1:-1] + pixels[1:-1, :-2] + pixels[1:-1, 2:]) / 4
    differences = (
        *(np.diff(x, axis=axis) for x in (pixels, coarse) for axis in (0, 1)),
        pixels[1:-1, 1:-1] - neighbors,
    )
    detail = [20 * math.log1p(float(np.abs(x).mean())) for x in differences]
    thumbnail = _pooled(pixels, 8)
    thumbnail = 50 * (thumbnail - thumbnail.mean()) / (thumbnail.std() + 8)
    even = (pixels - pixels.mean()) / (pixels.std() + 2)
    symmetry = [50 * (even * even[:, ::-1]).mean(), 50 * (even * even[::-1]).mean()]
    features = {
        "intensity": [*np.quantile(pixels, QUANTILES), *black_and_white, *(border.mean() for border in borders)],
        "detail": [*detail, 20 * math.log(aspect), color],
        "layout": [*thumbnail.ravel(), *_oriented_gradients(pixels).ravel(), *symmetry],
    }
    return {name: np.asarray(values, np.float64) for name, values in features.items()}


def _to_image(array: np.ndarray) -> Image.Image:
    if array.ndim not in (2, 3) or array.shape[2:] not in ((), (1,), (3,)) or not array.size:
        raise ValueError(f"array of shape {array.shape}: a picture is [H, W] or [H, W, 3] with at least one pixel")
    array = array[..., 0] if array.shape[2:] == (1,) else array
    if array.dtype != np.uint8:
        array = np.rint(np.clip(np.nan_to_num(array), 0, 255)).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(array))


def _pooled(pixels: np.ndarray, side: int) -> np.ndarray:
    step = len(pixels) // side
    return np.asarray(pixels.reshape(side, step, side, step, *pixels.shape[2:]).mean(axis=(1, 3)))


def _oriented_gradients(pixels: np.ndarray) -> np.ndarray:
    """Returns the log mean gradient in each of 4 directions and 4 x 4 cells, [4, 4, 4]."""
    down, across = np.gradient(pixels)
    strength = np.hypot(down, across)
    angle = np.mod(np.arctan2(down, across), np.pi) * (4 / np.pi)
    shares = [np.maximum(0, 1 - np.abs(np.mod(angle - bin + 2, 4) - 2)) for bin in range(4)]  # of the two nearest bins
    return np.asarray(20 * np.log(3 + np.stack([_pooled(strength * share, 4) for share in shares])))


def _measure_all(pictures: Iterable[Picture]) -> dict[str, np.ndarray]:
    rows = [measure(picture) for picture in pictures]
    return {name: np.asarray([row[name] for row in rows]).reshape(-1, len(TOLERANCES[name])) for name in TOLERANCES}


def _fit_clusters(x: np.ndarray, tolerances: np.ndarray) -> Clusters:
    """Fits clusters to features [N, D] by k-means in the Mahalanobis distance of all images."""
    from scipy.cluster import vq  # here: prediction does not need it

    def covariance(differences: np.ndarray) -> np.ndarray:
        ridge = np.diag(tolerances**2 + (RIDGE * differences.std(axis=0)) ** 2)
        return np.asarray(np.cov(differences.T, bias=True) + ridge)

    count = max(1, min(CLUSTERS, len(x) // CLUSTER_SIZE))
    start = x[np.linspace(0, len(x) - 1, count).astype(int)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of an empty cluster, which is dropped
        nearest = vq.kmeans2(*Clusters(start, covariance(x)).whiten(x), ITERATIONS, minit="matrix")[1]
    nearest = np.unique(nearest, return_inverse=True)[1]
    means = np.stack([x[nearest == k].mean(axis=0) for k in range(nearest.max() + 1)])
    return Clusters(_rounded(means), _rounded(covariance(x - means[nearest])))


def _distances(x: np.ndarray, means: np.ndarray) -> np.ndarray:
    return np.asarray(np.linalg.norm(x[..., None, :] - means, axis=-1))


def _score(parts: Mapping[str, Clusters], features: Mapping[str, np.ndarray]) -> np.ndarray:
    scores = np.stack([part.score(features[name]) for name, part in parts.items()])
    return np.asarray(np.mean(scores**POWER, axis=0) ** (1 / POWER))


def _conformal(scores: np.ndarray) -> float:
    """Returns the score of rank ceil((n + 1)(1 - FALSE_ALARMS)), or the largest one."""
    rank = math.ceil((len(scores) + 1) * (1 - FALSE_ALARMS))
    return float(np.sort(scores)[min(rank, len(scores)) - 1])


def _threshold(scores: np.ndarray) -> float:
    """Returns a value that new scores from the same distribution exceed with probability FALSE_ALARMS.

    A new score exceeds the largest of ten with probability 1/11. With few scores the conformal quantile is therefore
    too low, and the prediction bound of a log-normal distribution (Student's t) applies.
    """
    from scipy import stats  # here: model.pyz only scores

    n, logs = len(scores), np.log(np.maximum(scores, 1e-3))
    bound = logs.mean() + stats.t.ppf(1 - FALSE_ALARMS, n - 1) * math.sqrt(1 + 1 / n) * logs.std(ddof=1)
    # A score that exceeds the threshold only by rounding is not an alarm.
    return max(_conformal(scores), math.exp(bound), MIN_THRESHOLD) * (1 + 1e-9)


def _rounded(values: np.ndarray) -> np.ndarray:
    return np.asarray([float(f"{value:.6g}") for value in values.ravel()]).reshape(values.shape)
