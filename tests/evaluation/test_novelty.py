"""Novelty score of synthetic slices: outliers, thresholds, reasons and serialization."""

import json

import numpy as np
import pytest
from folders import chest
from PIL import Image
from skimage import data as photographs

from lungjax.data.imaging import images
from lungjax.evaluation import novelty


def chests(first: int, count: int) -> list[np.ndarray]:
    return [chest(seed) for seed in range(first, first + count)]


@pytest.fixture(scope="module")
def fitted() -> novelty.Novelty:
    return novelty.fit(iter(chests(0, 200)), iter(chests(200, 200)), iter(chests(400, 150)))


def in_color(picture):
    return np.repeat(picture[..., None], 3, axis=2)


NOISE = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
ROWS = np.arange(64)[:, None]
OUTLIERS = {
    "black": (np.zeros((90, 90), np.uint8), "almost uniform"),
    "white": (np.full((90, 90), 255, np.uint8), "almost uniform"),
    "noise": (NOISE, ""),
    "astronaut": (photographs.astronaut(), "color image"),
    "gray astronaut": (images.gray(photographs.astronaut()), ""),
    "text": (photographs.page(), ""),
    "grainy": (np.clip(chest(900) + 0.3 * (NOISE - 128.0), 0, 255), ""),
    "heat map": (in_color(chest(900)) // 2 + np.asarray([100, 20, 0], np.uint8), "color image"),
    "inverted": (255 - chest(900), ""),
    "rotated": (np.rot90(chest(900)), "layout"),
    "dark": (chest(900) // 3, "larger black area"),
    "wide": (np.repeat(chest(900), 3, axis=1), "wider"),
    "high": (np.repeat(chest(900), 3, axis=0), "narrower"),
    "blurred": (np.asarray(Image.fromarray(chest(900)).resize((16, 16)).resize((64, 64))), "smoother"),
    "white foot": (np.where(ROWS > 58, 255, chest(900)).astype(np.uint8), "brighter bottom border"),
}


def test_outliers_and_reasons(fitted):
    for name, (picture, words) in OUTLIERS.items():
        assert fitted.score(picture) > 1, name
        assert words in fitted.reason(picture), name


def test_count_and_rarity_of_false_alarms(fitted):
    val, counts = fitted.rates["false_alarms"].values()
    alarms = sum(fitted.score(picture) > 1 for picture in chests(400, 150))
    assert (counts["n"], counts["warnings"], counts["rate"]) == (150, alarms, alarms / 150)
    assert val["n"] == 200 and val["warnings"] <= 2
    assert alarms + sum(fitted.score(picture) > 1 for picture in chests(550, 150)) <= 9  # 3 %


def test_detection_rates_and_clusters():
    # Two kinds of training images, dark and bright; a Gaussian of both would contain the gray ones between them.
    kinds = [[np.clip(chest(seed) / 4 + add, 0, 255) for seed in range(first, first + 60)]
             for first, add in ((0, 20), (100, 180), (200, 100))]  # fmt: skip
    mixed, (dark, bright, between) = kinds[0][:40] + kinds[1][:40], (kind[40:] for kind in kinds)
    rates = novelty.fit(mixed, dark + bright, [], [("between", between), ("none", [])]).rates["detection"]
    assert rates["between"] == rates["between"] | {"n": 20, "warnings": 20, "rate": 1.0}
    assert rates["none"]["rate"] is None


def test_score_by_noise_and_tint(fitted):
    noise = np.random.default_rng(1).normal(0, 1, (64, 64))
    noisy = [np.clip(chest(902) + s * noise, 0, 255).astype(np.float32) for s in (0, 20, 40, 80)]
    tinted = [in_color(chest(902)) * np.asarray([1, 1 - s, 1 - s]) for s in (0.0, 0.1, 0.3, 0.9)]
    for pictures in (noisy, tinted):
        scores = [fitted.score(picture) for picture in pictures]
        assert scores == sorted(scores) and scores[0] < 1 < scores[-1]
    # Noise of single pixels is not color.
    grain = np.clip(in_color(chest(906)) + np.random.default_rng(2).normal(0, 3, (64, 64, 3)), 0, 255)
    assert fitted.score(grain) == pytest.approx(fitted.score(grain @ novelty.LUMA), rel=0.15)


def test_score_independence_of_size_and_dtype(fitted):
    large = chest(903, 256)
    image, score = Image.fromarray(large), fitted.score(large)
    assert fitted.score(image.resize((128, 128), Image.Resampling.BOX)) == pytest.approx(score, rel=0.1)
    huge = image.resize((2048, 2048), Image.Resampling.NEAREST)
    for same in (huge, image.convert("RGBA"), large[..., None], large.astype(np.float32), in_color(large)):
        assert fitted.score(same) == pytest.approx(score, rel=0.02)


def test_few_images(fitted):
    few = novelty.fit(chests(0, 20), chests(200, 5), [])
    assert few.rates["false_alarms"]["test"] == {"n": 0, "warnings": 0, "rate": None, "interval": [0.0, 1.0]}
    assert all(few.score(picture) > 1 for picture in (photographs.astronaut(), NOISE, np.zeros((9, 9), np.uint8)))
    # The largest of five validation scores would be exceeded by one new image in six.
    assert np.mean([few.score(picture) > 1 for picture in chests(400, 100)]) < 0.1
    for train, val in ((19, 5), (20, 4)):
        with pytest.raises(ValueError, match="at least 20 and 5"):
            novelty.fit(chests(0, train), chests(200, val), [])


def test_uniform_and_color_training_sets():
    same = novelty.fit([chest(0)] * 30, [chest(0)] * 10, [chest(0)])
    assert same.score(chest(0) + 1) < 1 < same.score(chest(1)) < same.score(photographs.astronaut()) < np.inf
    tinted = [np.clip(in_color(p) * np.asarray([1.0, 0.7, 0.6]), 0, 255).astype(np.uint8) for p in chests(0, 60)]
    color, gray = novelty.fit(tinted[:40], tinted[40:], []), images.gray(tinted[50])
    assert color.score(tinted[50]) <= 1 < color.score(gray) and color.reason(gray) == "less colorful"


def test_json_round_trip(fitted):
    text = json.dumps(fitted.to_dict())
    again = novelty.from_dict(json.loads(text))
    assert len(text) < 150_000 and again.to_dict() == fitted.to_dict()
    for picture in (chest(907), NOISE, photographs.astronaut()):
        assert again.score(picture) == fitted.score(picture)
        assert again.reason(picture) == fitted.reason(picture)


def test_damaged_json(fitted):
    for damage in (
        lambda d: d.update(threshold=0),
        lambda d: d["parts"].pop("detail"),
        lambda d: d["parts"]["detail"]["means"][0].pop(),
        lambda d: d.pop("detection"),
        lambda d: d["parts"]["intensity"]["covariance"].__setitem__(0, -1.0),
        lambda d: d["parts"]["layout"].update(unit=float("nan")),
        lambda d: d.update(parts=[]),
    ):
        content = json.loads(json.dumps(fitted.to_dict()))
        damage(content)
        with pytest.raises(ValueError, match="damaged"):
            novelty.from_dict(content)


def test_odd_arrays(fitted):
    for shape in ((5,), (0, 5), (4, 4, 2), (4, 4, 4), (2, 4, 4, 3)):
        with pytest.raises(ValueError, match="picture"):
            fitted.score(np.zeros(shape, np.uint8))
    broken = np.full((20, 30), np.nan, np.float32)
    broken[3:9] = np.inf
    for picture in (broken, np.zeros((1, 1), np.uint8), np.zeros((1, 5000), np.uint8), np.full((4, 4), -1e30)):
        assert 1 < fitted.score(picture) < np.inf and fitted.reason(picture)
