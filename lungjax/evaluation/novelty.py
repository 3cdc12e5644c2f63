"""Whether an image is like the training images: a score that warns of a photograph, another organ, a blank page.

A network answers any picture, also one that it can't know. Here a picture is shrunk to 64 x 64 pixels by area and
measured in three ways: its gray levels ("light": quantiles, black, white, the four borders), its detail, aspect and
colour ("form"), and where things lie ("layout": an 8 x 8 thumbnail free of brightness and contrast, strengths of
edges in four directions in 4 x 4 places, symmetry). Of each the score has one Mahalanobis distance to the training
images (Mahalanobis 1936), whose covariance is that of the training images plus a tolerance of each measurement. The
tolerance makes it work with few images and with what never varies: gray training images have the colour zero, and it
is the tolerance that says how much colour is much. Each distance is divided by what one validation image in 300
exceeds, and the three are joined by the mean of fourth powers, which is nearly the largest of them.

No network takes part, so it is the same for every network of a data set. What it finds and what it doesn't find is in
tests/benchmarks/README.md; a mirrored image, or one whose finding alone is new, is familiar to it.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image
from scipy import sparse, stats

VERSION = 1
SIDE = 64  # pixels a picture is measured in
LARGE = 256  # pixels: a side of twice as many is first shrunk by a whole factor and in whole gray levels, which is fast
ALARMS = 0.01  # of the validation images may be above the threshold
BEYOND = 1 / 300  # of the validation images are beyond the level of one part
POWER = 4
AXES = 40  # of the training images' variation are kept; along all others only the tolerance counts
CLIP = 3.5  # in standard deviations: a few odd training images shall not make the strange familiar
FEW = 500  # with fewer validation images the threshold also follows the normal distribution of the logarithms
NEAR = 0.5  # nothing is strange with distances below half of a tolerance in each measurement
LEAST = {"training": 20, "validation": 5}

PARTS = ("light", "form", "layout")
SHARE = {"light": 0.1, "form": 0.1, "layout": 0.3}  # of the training images' spread that is added to the tolerance
QUANTILES = (0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.98)
BORDERS = ("upper", "lower", "left", "right")
CELLS, DIRECTIONS, THUMBNAIL = 4, 4, 8
# The tolerance of each measurement, in its own unit: gray levels of 0..255; 20 times a logarithm, so 1 is 5 percent;
# 50 times a contrast or a correlation.
TOLERANCES = {
    "light": np.full(len(QUANTILES) + 2 + len(BORDERS), 2.0),
    "form": np.asarray([2.0] * 5 + [1.0, 1.5]),
    "layout": np.asarray([4.0] * THUMBNAIL**2 + [3.0] * (CELLS**2 * DIRECTIONS) + [2.0] * 2),
}
ASPECT, COLOUR = 5, 6  # places in "form"
GRAY = np.asarray([0.299, 0.587, 0.114], np.float32)
EMPTY = 4  # gray levels from the darkest to the brightest parts
PALE = 2  # gray levels between the colour channels: gray images saved in colour
CLEAR = 6  # standard deviations: a reader sees that colour
PLAIN = 2.5  # standard deviations: what is nearer than this does not explain a warning


@dataclass(frozen=True, eq=False)
class Part:
    """One of the three distances. All arrays are rounded to what `Familiarity.to_dict` writes."""

    centre: np.ndarray  # [D]
    tolerance: np.ndarray  # [D], the unit of the distance
    spread: np.ndarray  # [D], standard deviations of the training images, at least the fixed tolerance
    pulls: np.ndarray  # [K, D]: what the training images' variation takes off a distance along its K axes
    level: float  # the distance that counts as 1, at least what one tolerance in each measurement makes

    def distance(self, measured: np.ndarray) -> float:
        """Returns the Mahalanobis distance of measurements [D] to the training images, in units of `level`."""
        z = (measured - self.centre) / self.tolerance
        taken = self.pulls @ z
        return math.sqrt(max(float(z @ z - taken @ taken), 0.0)) / self.level


@dataclass(frozen=True, eq=False)
class Familiarity:
    """A fitted score. Made by `fit` or `from_dict`."""

    parts: dict[str, Part]
    threshold: float
    false_alarms: dict[str, dict[str, Any]]

    def unlike(self, picture: np.ndarray | Image.Image) -> float:
        """Returns how unlike the training images a picture is, 0 or more and finite; above 1 it is to be warned of.

        Takes what `fit` takes. Raises ValueError for an array that is no picture.
        """
        return self._score(measure(picture)) / self.threshold

    def why(self, picture: np.ndarray | Image.Image) -> str:
        """Returns in a few words what is strangest about a picture, whether it is above 1 or not.

        Such as "in colour, and they are gray". Raises ValueError for an array that is no picture.
        """
        measured = measure(picture)
        if measured["light"][len(QUANTILES) - 1] - measured["light"][0] < EMPTY:
            return "almost empty: nearly one gray all over"
        form = self.parts["form"]
        if form.centre[COLOUR] < PALE and measured["form"][COLOUR] - form.centre[COLOUR] > CLEAR * form.spread[COLOUR]:
            return "in colour, and they are gray"
        distances = {name: part.distance(measured[name]) for name, part in self.parts.items()}
        worst = max(distances, key=lambda name: distances[name])
        part = self.parts[worst]
        away = (measured[worst] - part.centre) / part.spread
        place = int(np.abs(away).argmax())
        if worst == "layout":
            return "things lie elsewhere in it: another view, organ or kind of image"
        if abs(away[place]) < PLAIN:
            mix = "mix of gray levels is" if worst == "light" else "detail and proportions are"
            return f"its {mix} unusual"
        above = bool(away[place] > 0)
        return _light(place, above) if worst == "light" else _form(place, above)

    def _score(self, measured: Mapping[str, np.ndarray]) -> float:
        return _joined([part.distance(measured[name]) for name, part in self.parts.items()])

    def to_dict(self) -> dict[str, Any]:
        """Returns what `from_dict` takes, ready for JSON, about 60 kB as text."""
        arrays = ("centre", "tolerance", "spread", "pulls")
        return {
            "version": VERSION,
            "threshold": self.threshold,
            "false_alarms": self.false_alarms,
            "parts": {
                name: {key: getattr(part, key).tolist() for key in arrays} | {"level": part.level}
                for name, part in self.parts.items()
            },
        }


def fit(
    train: Iterable[np.ndarray | Image.Image],
    val: Iterable[np.ndarray | Image.Image],
    test: Iterable[np.ndarray | Image.Image],
) -> Familiarity:
    """Fits the score on training images, chooses its threshold on validation images, counts false alarms on test.

    Pictures are what `lungjax.data.imaging.images.load` gives, uint8 or float32 in 0..255, [H, W] or [H, W, 3], of any
    size; each is measured and let go. 2,000 training and 1,000 validation images are enough; images of one patient in
    two of the three make the count too good.

    The threshold is the value that at most one validation image in a hundred exceeds. Of fewer than 500 it is at least
    the value that the next image exceeds once in a hundred times if logarithms are normal (Student's t): the largest of
    ten values alone is exceeded by one image in eleven.

    Raises ValueError for fewer than 20 training or 5 validation images, or an array that is no picture.
    """
    from lungjax.evaluation import bootstrap  # here: model.pyz packs this file, and predicts without intervals

    known, chosen = _measured(train), _measured(val)
    counts = {"training": len(known["light"]), "validation": len(chosen["light"])}
    if any(counts[name] < least for name, least in LEAST.items()):
        raise ValueError(
            f"{counts['training']} training and {counts['validation']} validation images: to tell what is unlike them "
            f"takes at least {LEAST['training']} and {LEAST['validation']}"
        )
    parts = {name: _part(name, known[name], chosen[name]) for name in PARTS}
    of_val = _scores(parts, chosen)
    threshold = float(_rounded(max(_threshold(of_val), NEAR) * (1 + 1e-5)))  # rounding never makes an alarm
    of_test = _scores(parts, _measured(test))
    alarms, n = int((of_test > threshold).sum()), len(of_test)
    false_alarms: dict[str, dict[str, Any]] = {
        "val": {"n": len(of_val), "alarms": int((of_val > threshold).sum())},
        "test": {
            "n": n,
            "alarms": alarms,
            "rate": alarms / n if n else None,
            "interval": bootstrap.wilson(alarms, n),
        },
    }
    return Familiarity(parts, threshold, false_alarms)


def from_dict(written: Mapping[str, Any]) -> Familiarity:
    """Returns the score that `Familiarity.to_dict` wrote. Raises ValueError for anything else."""
    if written.get("version") != VERSION:
        raise ValueError(f"familiarity of version {written.get('version')!r}: this lungjax reads version {VERSION}")
    try:
        parts = {}
        for name in PARTS:
            part, size = written["parts"][name], len(TOLERANCES[name])
            rows = {key: np.asarray(part[key], np.float64).reshape(size) for key in ("centre", "tolerance", "spread")}
            pulls = np.asarray(part["pulls"], np.float64).reshape(-1, size)
            parts[name] = Part(pulls=pulls, level=float(part["level"]), **rows)
            above_zero = (rows["tolerance"].min(), rows["spread"].min(), parts[name].level)
            if not all(map(np.isfinite, (*rows["centre"], *pulls.ravel(), *above_zero))) or min(above_zero) <= 0:
                raise ValueError(f"numbers of {name} out of range")
        threshold = float(written["threshold"])
        if not 0 < threshold < math.inf:
            raise ValueError(f"threshold {threshold}")
        return Familiarity(parts, threshold, {split: dict(v) for split, v in written["false_alarms"].items()})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"familiarity that can't be read ({error!r}): write the model's description anew") from None


def measure(picture: np.ndarray | Image.Image) -> dict[str, np.ndarray]:
    """Returns the measurements of a picture: "light" [13], "form" [7] and "layout" [130], float64.

    Raises ValueError for an array that is not [H, W] or [H, W, 3], or has no pixel.
    """
    g, colour, aspect = _shrunk(picture)
    borders = (g[:4], g[-4:], g[:, :4], g[:, -4:])
    light = [*np.quantile(g, QUANTILES), 255 * (g < 8).mean(), 255 * (g > 247).mean(), *(b.mean() for b in borders)]
    coarse = _pooled(g, 16)
    around = (g[:-2, 1:-1] + g[2:, 1:-1] + g[1:-1, :-2] + g[1:-1, 2:]) / 4
    steps = (np.diff(g, axis=0), np.diff(g, axis=1), np.diff(coarse, axis=0), np.diff(coarse, axis=1))
    detail = [20 * math.log1p(float(np.abs(x).mean())) for x in (*steps, g[1:-1, 1:-1] - around)]
    thumbnail = _pooled(g, THUMBNAIL)
    thumbnail = 50 * (thumbnail - thumbnail.mean()) / (thumbnail.std() + 8)
    even = (g - g.mean()) / (g.std() + 2)
    symmetry = [50 * (even * even[:, ::-1]).mean(), 50 * (even * even[::-1]).mean()]
    return {
        "light": np.asarray(light, np.float64),
        "form": np.asarray([*detail, 20 * math.log(aspect), colour], np.float64),
        "layout": np.concatenate([thumbnail.ravel(), _edges(g).ravel(), symmetry]).astype(np.float64),
    }


def _shrunk(picture: np.ndarray | Image.Image) -> tuple[np.ndarray, float, float]:
    """Gray float32 [SIDE, SIDE] in 0..255, mean difference of the colour channels, and width / height."""
    if isinstance(picture, Image.Image):
        image = picture if picture.mode in ("L", "RGB") else picture.convert("RGB")
        width, height = image.size
        array = _reduced(image)
    else:
        array = np.asarray(picture)
        if array.ndim not in (2, 3) or array.shape[2:] not in ((), (1,), (3,)) or not array.size:
            raise ValueError(f"an array of shape {np.shape(picture)}: a picture is [H, W] or [H, W, 3], with pixels")
        array = array[..., 0] if array.shape[2:] == (1,) else array
        height, width = array.shape[:2]
        if array.dtype == np.uint8:
            array = _reduced(Image.fromarray(np.ascontiguousarray(array)))
        else:
            array = np.clip(np.nan_to_num(array), 0, 255)
    bands = [np.asarray(array, np.float32)] if array.ndim == 2 else np.moveaxis(array, 2, 0).astype(np.float32)
    down, across = (_areas(length) for length in array.shape[:2])
    small = [(across @ (down @ band).T).T for band in bands]
    if len(small) == 1:
        return small[0], 0.0, width / height
    pixels = np.stack(small, axis=-1)
    coarse = np.stack([_pooled(band, 16) for band in small], axis=-1)  # in which colour noise is nearly gone
    return pixels @ GRAY, float(np.ptp(coarse, axis=-1).mean()), width / height


def _reduced(image: Image.Image) -> np.ndarray:
    width, height = image.size
    factors = (max(width // LARGE, 1), max(height // LARGE, 1))
    return np.asarray(image if factors == (1, 1) else image.reduce(factors))


@lru_cache
def _areas(length: int) -> Any:
    """What each of `length` pixels gives to each of SIDE, sparse float32 [SIDE, length], by the area they share.

    Pillow's box filter takes a pixel wholly or not at all, so pictures of 96 and of 128 pixels differed in sharpness.
    Sparse, since two threads of numpy's BLAS may wait 20 times as long for each other as such a small product takes.
    """
    edges = np.arange(SIDE + 1) * (length / SIDE)
    pixels = np.arange(length)
    shared = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return sparse.csr_array((np.maximum(shared, 0) * (SIDE / length)).astype(np.float32))


def _pooled(square: np.ndarray, side: int) -> np.ndarray:
    times = len(square) // side
    return square.reshape(side, times, side, times).mean(axis=(1, 3))


def _edges(g: np.ndarray) -> np.ndarray:
    """Mean strength of the edges of each direction in each cell, float32 [DIRECTIONS, CELLS, CELLS], on a log scale.

    As the histograms of oriented gradients (Dalal and Triggs 2005), each edge shared by its two nearest directions.
    """
    down, across = np.gradient(g)
    strength = np.hypot(down, across)
    angle = np.mod(np.arctan2(down, across), np.pi) * (DIRECTIONS / np.pi)
    half = DIRECTIONS / 2
    shares = [np.maximum(0, 1 - np.abs(np.mod(angle - b + half, DIRECTIONS) - half)) for b in range(DIRECTIONS)]
    return 20 * np.log(3 + np.stack([_pooled(strength * share, CELLS) for share in shares]))


def _measured(pictures: Iterable[np.ndarray | Image.Image]) -> dict[str, np.ndarray]:
    found = [measure(picture) for picture in pictures]
    return {name: np.asarray([one[name] for one in found]) for name in PARTS}


def _part(name: str, known: np.ndarray, chosen: np.ndarray) -> Part:
    """One distance from measurements [N, D] of training and [M, D] of validation images."""
    least, deviation = TOLERANCES[name], known.std(axis=0)
    tolerance = _rounded(np.hypot(least, SHARE[name] * deviation))
    z = (known - np.median(known, axis=0)) / tolerance
    reach = CLIP * np.sqrt((z**2).mean(axis=0)) + 1
    z = np.clip(z, -reach, reach)
    centre = _rounded(np.median(known, axis=0) + tolerance * z.mean(axis=0))
    values, vectors = np.linalg.eigh(np.cov(z.T, bias=True))
    kept = min(AXES, len(known) // 4, len(values))
    variance = np.maximum(values[::-1][:kept], 0)
    pulls = _rounded(np.sqrt(variance / (1 + variance))[:, None] * vectors[:, ::-1][:, :kept].T)
    part = Part(centre, tolerance, _rounded(np.hypot(least, deviation)), pulls, 1.0)
    level = _exceeded_by(np.asarray([part.distance(one) for one in chosen]), BEYOND)
    return Part(centre, tolerance, part.spread, pulls, float(_rounded(max(level, math.sqrt(len(least))))))


def _joined(distances: list[float]) -> float:
    largest = max(distances)
    if not largest:
        return 0.0
    return largest * float(np.mean([(d / largest) ** POWER for d in distances])) ** (1 / POWER)


def _scores(parts: dict[str, Part], measured: dict[str, np.ndarray]) -> np.ndarray:
    rows = zip(*(measured[name] for name in PARTS), strict=True)
    return np.asarray([_joined([parts[n].distance(x) for n, x in zip(PARTS, row, strict=True)]) for row in rows])


def _exceeded_by(values: np.ndarray, share: float) -> float:
    """The value that a new one of the same kind exceeds with a chance of `share`; the largest where there are few.

    That is the value of rank ceil((n + 1)(1 - share)), as in conformal prediction.
    """
    rank = math.ceil((len(values) + 1) * (1 - share))
    return float(np.sort(values)[min(rank, len(values)) - 1])


def _threshold(scores: np.ndarray) -> float:
    n, observed = len(scores), _exceeded_by(scores, ALARMS)
    if n >= FEW:
        return observed
    logs = np.log(np.maximum(scores, 1e-3))
    wide = stats.t.ppf(1 - ALARMS, n - 1) * math.sqrt(1 + 1 / n) * logs.std(ddof=1)
    return max(observed, math.exp(logs.mean() + wide))


def _rounded(values: Any) -> np.ndarray:
    """Six significant digits: what is written is what was fitted, in the same order of memory too."""
    return np.asarray(np.vectorize(lambda v: float(f"{v:.6g}"), otypes=[np.float64])(values), order="C")


def _light(place: int, above: bool) -> str:
    if place == len(QUANTILES):
        return f"{'more' if above else 'less'} of it is black"
    if place == len(QUANTILES) + 1:
        return f"{'more' if above else 'less'} of it is white"
    more = "brighter" if above else "darker"
    if place > len(QUANTILES):
        return f"its {BORDERS[place - len(QUANTILES) - 2]} border is {more}"
    if QUANTILES[place] == 0.5:
        return f"{more} as a whole"
    return f"its {'dark' if QUANTILES[place] < 0.5 else 'bright'} parts are {more}"


def _form(place: int, above: bool) -> str:
    if place == COLOUR:
        return f"{'more' if above else 'less'} colourful"
    if place == ASPECT:
        return f"{'wider' if above else 'narrower'} for its height"
    return "more fine detail or noise" if above else "smoother"
