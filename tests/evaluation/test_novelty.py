"""What the familiarity score warns of, on made slices and on real ones; its thresholds, sentences and written form."""

import csv
import json
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from PIL import Image
from skimage import data as photographs

from lungjax.data.imaging import images
from lungjax.evaluation import novelty


@cache
def chest(seed: int, size: int = 128) -> np.ndarray:
    """A made slice: body, lungs and vessels at places and of sizes drawn by `seed`, uint8 [size, size]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size - 0.5
    wide, high = rng.uniform(0.38, 0.48), rng.uniform(0.3, 0.42)
    image = 20.0 + 150 * ((x / wide) ** 2 + (y / high) ** 2 < 1)
    for side in (-1, 1):
        image[((x - 0.45 * wide * side) / (0.35 * wide)) ** 2 + (y / (0.7 * high)) ** 2 < 1] = 50
    for _ in range(12):
        cy, cx, r = *rng.uniform(-0.4, 0.4, 2), rng.uniform(0.01, 0.04)
        image += rng.uniform(30, 80) * np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / r**2)
    return np.clip(image + rng.normal(0, rng.uniform(1, 5), image.shape), 0, 255).astype(np.uint8)


def chests(first: int, count: int) -> list[np.ndarray]:
    return [chest(seed) for seed in range(first, first + count)]


@pytest.fixture(scope="module")
def fitted() -> novelty.Familiarity:
    return novelty.fit(iter(chests(0, 200)), iter(chests(200, 200)), iter(chests(400, 150)))


def colours(picture):
    return np.repeat(picture[..., None], 3, axis=2)


NOISE = np.random.default_rng(0).integers(0, 256, (128, 128), dtype=np.uint8)
HEAT = colours(chest(900)) // 2 + np.asarray([100, 20, 0], np.uint8)
STRANGERS = {
    "black": (np.zeros((90, 90), np.uint8), "almost empty"),
    "white": (np.full((90, 90), 255, np.uint8), "almost empty"),
    "noise": (NOISE, ""),
    "astronaut": (photographs.astronaut(), "in colour, and they are gray"),
    "gray astronaut": (images.gray(photographs.astronaut()), ""),
    "camera": (photographs.camera(), ""),
    "text": (photographs.page(), ""),
    "grainy": (np.clip(chest(900) + 0.3 * (NOISE - 128.0), 0, 255), "more fine detail or noise"),
    "heat map": (HEAT, "in colour, and they are gray"),
    "inverted": (255 - chest(900), ""),
    "turned": (np.rot90(chest(900)), "elsewhere"),
    "dark": (chest(900) // 3, "more of it is black"),
    "wide": (np.repeat(chest(900), 3, axis=1), "wider for its height"),
    "high": (np.repeat(chest(900), 3, axis=0), "narrower for its height"),
    "blurred": (np.asarray(Image.fromarray(chest(900)).resize((26, 26)).resize((128, 128))), "smoother"),
    "white foot": (
        np.where(np.arange(128)[:, None] > 115, 255, chest(900)).astype(np.uint8),
        "lower border is brighter",
    ),
}


@pytest.mark.parametrize("name", STRANGERS)
def test_what_is_no_slice_alarms_and_says_why(fitted, name):
    picture, words = STRANGERS[name]
    assert fitted.unlike(picture) > 1
    assert words in fitted.why(picture)
    assert "\n" not in fitted.why(picture) and len(fitted.why(picture)) < 90


def test_other_slices_alarm_at_the_rate_that_is_told(fitted):
    counted = fitted.false_alarms["test"]
    alarms = sum(fitted.unlike(picture) > 1 for picture in chests(400, 150))
    assert (counted["n"], counted["alarms"], counted["rate"]) == (150, alarms, alarms / 150)
    assert fitted.false_alarms["val"] == {"n": 200, "alarms": sum(fitted.unlike(p) > 1 for p in chests(200, 200))}
    assert fitted.false_alarms["val"]["alarms"] == 1  # of 200: rank ceil(201 * 0.99) = 199
    more = sum(fitted.unlike(picture) > 1 for picture in chests(550, 150))
    assert more <= 7 and alarms <= 7  # 1 % wanted, of 200 drawn ones: up to 2.5 %


def test_sets_of_differing_images_keep_their_alarms_few():
    """Half of the training images are bright: neither half is strange, and what is between them is."""
    bright = [np.minimum(p, 155) + 100 for p in chests(0, 120)]
    kinds = novelty.fit(chests(0, 120) + bright, chests(200, 100) + bright[:100], [])
    assert kinds.unlike(chest(901)) < 1
    assert kinds.unlike(np.minimum(chest(901), 155) + 100) < 1
    assert kinds.unlike(photographs.camera()) > 1


def test_stranger_is_higher(fitted):
    rng = np.random.default_rng(1)
    noise = rng.normal(0, 1, (128, 128))
    scores = [fitted.unlike(np.clip(chest(902) + s * noise, 0, 255).astype(np.float32)) for s in (0, 20, 40, 80, 160)]
    assert scores == sorted(scores) and scores[0] < 1 < scores[-1]
    tints = [fitted.unlike(colours(chest(902)) * np.asarray([1, 1 - s, 1 - s])) for s in (0.0, 0.1, 0.3, 0.9)]
    assert tints == sorted(tints) and tints[0] < 1 < tints[-1]


@pytest.mark.parametrize("seed", [903, 904, 905])
def test_size_and_type_do_not_matter(fitted, seed):
    """The same picture at other sizes, as a Pillow picture, float32 and RGB."""
    large = chest(seed, 512)
    score = fitted.unlike(large)
    for size in (300, 256, 128, 64):
        small = np.asarray(Image.fromarray(large).resize((size, size), Image.Resampling.BOX))
        assert fitted.unlike(small) == pytest.approx(score, rel=0.1)
    assert fitted.unlike(Image.fromarray(large)) == score
    assert fitted.unlike(Image.fromarray(large).convert("RGBA")) == pytest.approx(score, rel=0.01)
    assert fitted.unlike(large[..., None]) == score
    assert fitted.unlike(large.astype(np.float32)) == pytest.approx(score, rel=0.01)
    huge = np.asarray(Image.fromarray(large).resize((2048, 2048), Image.Resampling.NEAREST))
    assert fitted.unlike(huge) == pytest.approx(score, rel=0.01)
    assert fitted.unlike(colours(large)) == pytest.approx(score, rel=0.01)


@pytest.mark.parametrize("seed", [906, 907])
def test_colour_noise_is_not_colour(fitted, seed):
    """Noise of the three channels counts as the noise that it makes of the gray, and hardly more."""
    rng = np.random.default_rng(2)
    noisy = np.clip(colours(chest(seed)) + rng.normal(0, 3, (128, 128, 3)), 0, 255)
    assert np.ptp(noisy, axis=-1).mean() > 4
    assert fitted.unlike(noisy) == pytest.approx(fitted.unlike(noisy @ novelty.GRAY), rel=0.1)


def test_measurements_of_a_known_picture():
    """A picture of two halves, 64 x 128, measured by hand."""
    picture = np.zeros((64, 128, 3), np.uint8)
    picture[:, 64:] = (200, 100, 60)
    gray = 0.299 * 200 + 0.587 * 100 + 0.114 * 60
    found = novelty.measure(picture)
    light, form, layout = found["light"], found["form"], found["layout"]
    np.testing.assert_allclose(
        light, [0, 0, 0, gray / 2, gray, gray, gray, 255 / 2, 0, gray / 2, gray / 2, 0, gray], 1e-5
    )
    fine, coarse = 20 * np.log1p(gray / 63), 20 * np.log1p(gray / 15)  # one step in 63, and in 15
    second = 20 * np.log1p(2 / 62 * gray / 4)
    np.testing.assert_allclose(form, [0, fine, 0, coarse, second, 20 * np.log(2), 140 / 2], rtol=1e-5, atol=1e-9)
    step = 50 * (gray / 2) / (gray / 2 + 8)
    np.testing.assert_allclose(layout[:64].reshape(8, 8), np.tile(np.repeat([-step, step], 4), (8, 1)), rtol=1e-5)
    even = (gray / 2 / (gray / 2 + 2)) ** 2
    np.testing.assert_allclose(layout[-2:], [-50 * even, 50 * even], rtol=1e-5)
    edges = layout[64:-2].reshape(4, 4, 4) - 20 * np.log(3)
    across = 20 * np.log((3 + gray / 2 / 16) / 3)  # half the step in one of 16 columns of the cells that touch it
    np.testing.assert_allclose(edges[0, :, 1:3], across, rtol=1e-5)
    np.testing.assert_allclose(edges[1:], 0, atol=1e-5)
    np.testing.assert_allclose(edges[0, :, [0, 3]], 0, atol=1e-5)


@pytest.mark.parametrize(
    "degrees, shares", [(0, [1, 0, 0, 0]), (45, [0, 1, 0, 0]), (67.5, [0, 0.5, 0.5, 0]), (157.5, [0.5, 0, 0, 0.5])]
)
def test_edges_of_ramps(degrees, shares):
    """A ramp of 5 gray levels a pixel in a direction: its two nearest directions share it, in each cell alike."""
    down, across = np.mgrid[:64, :64]
    turned = np.deg2rad(degrees)
    found = novelty._edges(5 * (across * np.cos(turned) + down * np.sin(turned)))
    expected = 20 * np.log(3 + 5 * np.asarray(shares))
    np.testing.assert_allclose(found, np.broadcast_to(expected[:, None, None], (4, 4, 4)), atol=1e-6)


def test_distance_is_mahalanobis():
    """Against the formula with the whole covariance; 7 measurements, so that every axis is kept."""
    rng = np.random.default_rng(3)
    known = rng.normal(0, 3, (400, 7)) @ rng.normal(0, 1, (7, 7)) + 40
    known[:4, 2] += 900  # which is clipped
    part = novelty._part("form", known, known[:50])
    z = (known - np.median(known, axis=0)) / part.tolerance
    z = np.clip(z, *np.array([[-1], [1]]) * (3.5 * np.sqrt((z**2).mean(0)) + 1))
    inverse = np.linalg.inv(np.cov(z.T, bias=True) + np.eye(7))
    for place in (known[0], known[1] + 50, np.zeros(7)):
        away = (place - np.median(known, axis=0)) / part.tolerance - z.mean(0)
        assert part.distance(place) * part.level == pytest.approx(np.sqrt(away @ inverse @ away), rel=1e-3)


def test_thresholds():
    """Ranks by hand; the tail of few by simulation: one new score in a hundred is above, and not one in eleven."""
    assert novelty._exceeded_by(np.arange(1, 300), 0.01) == 297
    assert novelty._exceeded_by(np.arange(5), 0.01) == 4
    assert novelty._threshold(np.arange(1.0, 600.0)) == 594
    rng = np.random.default_rng(4)
    above = []
    for _ in range(2000):
        scores = np.exp(rng.normal(0, 0.3, 11))
        above.append(float(np.exp(rng.normal(0, 0.3))) > novelty._threshold(scores[:10]))
    assert 0.002 < np.mean(above) < 0.018


def test_written_and_read_again(fitted):
    written = json.dumps(fitted.to_dict())
    assert len(written) < 150_000
    again = novelty.from_dict(json.loads(written))
    assert again.to_dict() == fitted.to_dict()
    for picture in (chest(907), NOISE, photographs.astronaut()):
        assert again.unlike(picture) == fitted.unlike(picture)
        assert again.why(picture) == fitted.why(picture)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.pop("version"),
        lambda d: d.update(version=2),
        lambda d: d.pop("threshold"),
        lambda d: d.update(threshold=0),
        lambda d: d["parts"].pop("form"),
        lambda d: d["parts"]["form"]["centre"].pop(),
        lambda d: d["parts"]["light"]["tolerance"].__setitem__(3, 0.0),
        lambda d: d["parts"]["layout"].update(level=float("nan")),
        lambda d: d["parts"]["layout"]["pulls"][0].__setitem__(0, float("inf")),
        lambda d: d.update(parts=[]),
    ],
)
def test_damaged_descriptions_are_refused(fitted, change):
    written = json.loads(json.dumps(fitted.to_dict()))
    change(written)
    with pytest.raises(ValueError, match="familiarity"):
        novelty.from_dict(written)


def test_rounding_makes_no_alarm(monkeypatch):
    """Without the tail the threshold is the largest of few validation images, which is not above itself."""
    monkeypatch.setattr(novelty, "FEW", 0)
    for first in range(0, 80, 10):
        assert novelty.fit(chests(0, 20), chests(200 + first, 10), []).false_alarms["val"]["alarms"] == 0


def test_few_images():
    few = novelty.fit(chests(0, 20), chests(200, 5), [])
    assert few.false_alarms["test"] == {"n": 0, "alarms": 0, "rate": None, "interval": [0.0, 1.0]}
    assert all(few.unlike(picture) > 1 for picture in (photographs.astronaut(), NOISE, np.zeros((9, 9), np.uint8)))
    assert np.mean([few.unlike(picture) > 1 for picture in chests(400, 100)]) < 0.1
    with pytest.raises(ValueError, match=r"^19 training and 5 validation images.* at least 20 and 5"):
        novelty.fit(chests(0, 19), chests(200, 5), chests(400, 5))
    with pytest.raises(ValueError, match="at least 20 and 5"):
        novelty.fit(chests(0, 20), [], [])


def test_one_and_the_same_image_everywhere():
    same = novelty.fit([chest(0)] * 30, [chest(0)] * 10, [chest(0)])
    assert same.false_alarms["test"]["alarms"] == 0
    for picture in (chest(0), chest(1), NOISE, photographs.astronaut()):
        assert np.isfinite(same.unlike(picture))
    assert same.unlike(chest(0) + 1) < 1  # a gray level brighter
    assert same.unlike(photographs.astronaut()) > same.unlike(chest(1)) > 1 >= same.unlike(chest(0))
    blank = novelty.fit([np.zeros((8, 8), np.uint8)] * 30, [np.zeros((8, 8), np.uint8)] * 10, [])
    assert 1 < blank.unlike(chest(0)) < np.inf


def test_colourful_training_images():
    tinted = [np.clip(colours(p) * np.asarray([1.0, 0.7, 0.6]), 0, 255).astype(np.uint8) for p in chests(0, 60)]
    fitted = novelty.fit(tinted[:40], tinted[40:], [])
    assert fitted.unlike(tinted[50]) <= 1 < fitted.unlike(images.gray(tinted[50]))
    assert fitted.why(images.gray(tinted[50])) == "less colourful"


@pytest.mark.parametrize("shape", [(5,), (0, 5), (4, 4, 2), (4, 4, 4), (2, 4, 4, 3)])
def test_what_is_no_picture_is_refused(fitted, shape):
    with pytest.raises(ValueError, match="a picture is"):
        fitted.unlike(np.zeros(shape, np.uint8))


def test_strange_numbers_stay_finite(fitted):
    broken = np.full((20, 30), np.nan, np.float32)
    broken[3:9] = np.inf
    for picture in (broken, np.zeros((1, 1), np.uint8), np.zeros((1, 5000), np.uint8), np.full((4, 4), -1e30)):
        assert 1 < fitted.unlike(picture) < np.inf and fitted.why(picture)


def test_the_strangest_part_counts_most(fitted):
    """The three distances are joined by the mean of fourth powers, by hand."""
    picture = chest(909)
    measured = novelty.measure(picture)
    distances = np.asarray([part.distance(measured[name]) for name, part in fitted.parts.items()])
    assert fitted.unlike(picture) * fitted.threshold == pytest.approx(np.mean(distances**4) ** 0.25)
    wide = replace(fitted, threshold=2 * fitted.threshold)
    assert wide.unlike(picture) == fitted.unlike(picture) / 2


def test_real_slices_and_chests(shared):
    """Fitted on real slices, chests of X-rays alarm; the other way round too; test images of either hardly ever."""
    found = {}
    for kind in ("ct", "xray"):
        with open(shared / "data" / kind / "labels.csv") as file:
            rows = list(csv.DictReader(file))
        for split, most in (("train", 250), ("val", 90), ("test", 60)):
            these = [row["path"] for row in rows if row["split"] == split]
            step = max(len(these) // most, 1)
            files = [shared / "data" / kind / path for path in these[::step][:most]]
            found[kind, split] = [images.load(path.read_bytes(), None) for path in files]
    for kind, other, told in (("ct", "xray", 0.7), ("xray", "ct", 0.7)):
        fitted = novelty.fit(*(found[kind, split] for split in ("train", "val", "test")))
        assert fitted.false_alarms["test"]["rate"] <= 0.1
        assert np.mean([fitted.unlike(picture) > 1 for picture in found[other, "test"]]) > told
        assert min(fitted.unlike(p) for p in (photographs.astronaut(), NOISE, np.zeros((64, 64), np.uint8))) > 1
