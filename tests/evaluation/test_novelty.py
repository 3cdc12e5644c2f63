"""The novelty score on synthetic and on real slices: what it detects, its thresholds, reasons and written form."""

import csv
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
    "dark": (chest(900) // 3, "more of it is black"),
    "wide": (np.repeat(chest(900), 3, axis=1), "wider"),
    "high": (np.repeat(chest(900), 3, axis=0), "narrower"),
    "blurred": (np.asarray(Image.fromarray(chest(900)).resize((16, 16)).resize((64, 64))), "smoother"),
    "white foot": (np.where(ROWS > 58, 255, chest(900)).astype(np.uint8), "bottom border is brighter"),
}


def test_outliers_and_reasons(fitted):
    for name, (picture, words) in OUTLIERS.items():
        assert fitted.score(picture) > 1, name
        assert words in fitted.reason(picture), name


def test_false_alarms_are_counted_and_rare(fitted):
    counts = fitted.false_alarms["test"]
    alarms = sum(fitted.score(picture) > 1 for picture in chests(400, 150))
    assert (counts["n"], counts["alarms"], counts["rate"]) == (150, alarms, alarms / 150)
    assert fitted.false_alarms["val"]["n"] == 200 and fitted.false_alarms["val"]["alarms"] <= 2
    assert alarms + sum(fitted.score(picture) > 1 for picture in chests(550, 150)) <= 9  # 3 %


def test_two_kinds_of_training_images():
    """Neither kind is novel, and what lies between them is."""
    bright = [np.minimum(p, 155) + 100 for p in chests(0, 120)]
    both = novelty.fit(chests(0, 120) + bright, chests(200, 60) + bright[:60], [])
    assert both.score(chest(901)) < 1 and both.score(np.minimum(chest(901), 155) + 100) < 1
    assert both.score(photographs.camera()) > 1


def test_score_rises_with_the_change(fitted):
    noise = np.random.default_rng(1).normal(0, 1, (64, 64))
    scores = [fitted.score(np.clip(chest(902) + s * noise, 0, 255).astype(np.float32)) for s in (0, 20, 40, 80)]
    assert scores == sorted(scores) and scores[0] < 1 < scores[-1]
    tints = [fitted.score(in_color(chest(902)) * np.asarray([1, 1 - s, 1 - s])) for s in (0.0, 0.1, 0.3, 0.9)]
    assert tints == sorted(tints) and tints[0] < 1 < tints[-1]


def test_size_and_type_of_array_hardly_matter(fitted):
    large = chest(903, 256)
    score = fitted.score(large)
    small = np.asarray(Image.fromarray(large).resize((128, 128), Image.Resampling.BOX))
    assert fitted.score(small) == pytest.approx(score, rel=0.1)
    huge = np.asarray(Image.fromarray(large).resize((2048, 2048), Image.Resampling.NEAREST))
    assert fitted.score(huge) == pytest.approx(score, rel=0.02)
    image = Image.fromarray(large)
    for same in (image, image.convert("RGBA"), large[..., None], large.astype(np.float32), in_color(large)):
        assert fitted.score(same) == pytest.approx(score, rel=0.01)


def test_color_noise_is_not_color(fitted):
    noise = np.random.default_rng(2).normal(0, 3, (64, 64, 3))
    noisy = np.clip(in_color(chest(906)) + noise, 0, 255)
    assert fitted.score(noisy) == pytest.approx(fitted.score(noisy @ novelty.LUMA), rel=0.15)


def test_features_by_hand():
    """Two halves, 64 x 128: each feature follows from the gray level of the right half."""
    picture = np.zeros((64, 128, 3), np.uint8)
    picture[:, 64:] = (200, 100, 60)
    gray = 0.299 * 200 + 0.587 * 100 + 0.114 * 60
    features = novelty.measure(picture)
    expected = [0, 0, 0, gray / 2, gray, gray, gray, 255 / 2, 0, gray / 2, gray / 2, 0, gray]
    np.testing.assert_allclose(features["intensity"], expected, atol=1.5)
    steps = [0, gray / 63, 0, gray / 15]  # one step in 63, and in 15
    np.testing.assert_allclose(features["detail"][:4], 20 * np.log1p(steps), atol=0.1)
    np.testing.assert_allclose(features["detail"][5:], [20 * np.log(2), 140 / 2], atol=0.5)
    step = 50 * (gray / 2) / (gray / 2 + 8)
    np.testing.assert_allclose(features["layout"][:64].reshape(8, 8), np.tile([-step] * 4 + [step] * 4, (8, 1)), atol=1)
    gradients = features["layout"][64:-2].reshape(4, 4, 4) - 20 * np.log(3)
    np.testing.assert_allclose(gradients[0, :, 1:3], 20 * np.log((3 + gray / 2 / 16) / 3), atol=0.2)
    assert np.abs(gradients[1:]).max() < 1e-5 and np.abs(gradients[0, :, [0, 3]]).max() < 1e-5


def test_few_images(fitted):
    few = novelty.fit(chests(0, 20), chests(200, 5), [])
    assert few.false_alarms["test"] == {"n": 0, "alarms": 0, "rate": None, "interval": [0.0, 1.0]}
    assert all(few.score(picture) > 1 for picture in (photographs.astronaut(), NOISE, np.zeros((9, 9), np.uint8)))
    # The largest of five validation scores would be exceeded by one new image in six.
    assert np.mean([few.score(picture) > 1 for picture in chests(400, 100)]) < 0.1
    for train, val in ((19, 5), (20, 4)):
        with pytest.raises(ValueError, match="at least 20 and 5"):
            novelty.fit(chests(0, train), chests(200, val), [])


def test_training_images_all_the_same():
    same = novelty.fit([chest(0)] * 30, [chest(0)] * 10, [chest(0)])
    assert same.score(chest(0) + 1) < 1 < same.score(chest(1)) < same.score(photographs.astronaut()) < np.inf
    blank = novelty.fit([np.zeros((8, 8), np.uint8)] * 30, [np.zeros((8, 8), np.uint8)] * 10, [])
    assert 1 < blank.score(chest(0)) < np.inf


def test_color_training_images():
    tinted = [np.clip(in_color(p) * np.asarray([1.0, 0.7, 0.6]), 0, 255).astype(np.uint8) for p in chests(0, 60)]
    fitted = novelty.fit(tinted[:40], tinted[40:], [])
    assert fitted.score(tinted[50]) <= 1 < fitted.score(images.gray(tinted[50]))
    assert fitted.reason(images.gray(tinted[50])) == "less colorful"


def test_written_and_read_again(fitted):
    text = json.dumps(fitted.to_dict())
    again = novelty.from_dict(json.loads(text))
    assert len(text) < 150_000 and again.to_dict() == fitted.to_dict()
    for picture in (chest(907), NOISE, photographs.astronaut()):
        assert again.score(picture) == fitted.score(picture)
        assert again.reason(picture) == fitted.reason(picture)


def test_damaged_description_is_an_error(fitted):
    for damage in (
        lambda d: d.pop("threshold"),
        lambda d: d.update(threshold=0),
        lambda d: d["parts"].pop("detail"),
        lambda d: d["parts"]["detail"]["mean"].pop(),
        lambda d: d["parts"]["intensity"]["covariance"].__setitem__(0, -1.0),
        lambda d: d["parts"]["layout"].update(unit=float("nan")),
        lambda d: d["parts"]["layout"]["mean"].__setitem__(0, float("inf")),
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


def test_real_slices_and_x_rays(shared):
    """Fitted to either, most images of the other are novel, and hardly any of its own test images."""
    pictures = {}
    for kind in ("ct", "xray"):
        with open(shared / "data" / kind / "labels.csv") as file:
            rows = list(csv.DictReader(file))
        for split, most in (("train", 250), ("val", 90), ("test", 60)):
            paths = [row["path"] for row in rows if row["split"] == split]
            files = [shared / "data" / kind / path for path in paths[:: max(len(paths) // most, 1)][:most]]
            pictures[kind, split] = [images.load(path.read_bytes(), None) for path in files]
    for kind, other in (("ct", "xray"), ("xray", "ct")):
        real = novelty.fit(*(pictures[kind, split] for split in ("train", "val", "test")))
        assert real.false_alarms["test"]["rate"] <= 0.1
        assert np.mean([real.score(picture) > 1 for picture in pictures[other, "test"]]) > 0.7
