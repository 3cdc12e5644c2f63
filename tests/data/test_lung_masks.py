"""Body and lung masks of phantoms with known lungs, and the studies' masks in synthetic cases."""

import csv

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from lungjax.data.imaging import lung_masks, study_masks
from lungjax.datasets.phantom import slices


def dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def phantoms(finding, count=10):
    """Yields the image, lung mask and lesion mask of one slice per patient, at alternating levels."""
    for seed in range(count):
        patient = slices.new_patient(seed, finding)
        drawn = slices.draw_slice(patient, slices.levels(patient, 4)[seed % 4])
        yield slices.gray(drawn.hu, patient.window), drawn.lung, drawn.lesion


def ellipse(shape, center, radii):
    row, column = np.ogrid[: shape[0], : shape[1]]
    return ((row - center[0]) / radii[0]) ** 2 + ((column - center[1]) / radii[1]) ** 2 < 1


def drawing(lung=True):
    """A body with two lungs in black air, 160 x 200."""
    image = np.full((160, 200), 5, np.uint8)
    image[ellipse(image.shape, (80, 100), (60, 85))] = 180
    both = ellipse(image.shape, (80, 62), (38, 28)) | ellipse(image.shape, (80, 138), (38, 28))
    if lung:
        image[both] = 40
    return image, both


def test_phantoms():
    for finding in slices.CLASSES:
        scores, masked, dark, lesions = [], 0, 0, 0
        for image, lung, lesion in phantoms(finding):
            mask = lung_masks.lung_mask(image)
            scores.append(dice(mask, lung))
            level = (np.median(image[lung & ~lesion]) + image[~lung].max()) / 2
            masked, dark = masked + (mask & lesion).sum(), dark + ((image < level) & lesion).sum()
            lesions += lesion.sum()
        assert np.mean(scores) > 0.97
        if finding == "Pneumonia":  # lesions at the chest wall, which a threshold does not separate from it
            assert masked > 0.75 * lesions and masked > 1.3 * dark
    image, lung, _ = next(phantoms("COVID-19"))
    big = np.asarray(Image.fromarray(image).resize((512, 480), Image.Resampling.BICUBIC))
    assert dice(lung_masks.lung_mask(big), np.asarray(Image.fromarray(lung).resize((512, 480)))) > 0.97


def test_cut_lungs_and_white_margins():
    image, both = drawing()
    cut = np.s_[:, 45:155]  # there is no air at the sides, and both lungs are open at the edge
    assert dice(lung_masks.lung_mask(image[cut]), both[cut]) > 0.95
    framed = np.pad(image, 12, constant_values=255)
    assert dice(lung_masks.lung_mask(framed), np.pad(both, 12)) > 0.97
    assert dice(lung_masks.body_mask(framed), np.pad(image > 20, 12)) > 0.95


def test_body_without_table_and_arms():
    image, both = drawing()
    body = (image > 20) | both
    image[139:142, 20:180] = 180  # table, touching the back
    image[ellipse(image.shape, (80, 7), (12, 6))] = 180  # arm
    mask = lung_masks.body_mask(image)
    assert dice(mask, body) > 0.98
    assert not mask[139:142, 20:70].any() and not mask[70:90, 2:12].any()


def test_air_above_table_and_trachea():
    image, both = drawing()
    image[148:156, :] = 180  # a table from edge to edge that rises along the sides to the body
    image[80:156, :16] = 180
    image[80:156, -16:] = 180
    assert dice(lung_masks.lung_mask(image), both) > 0.97
    image, both = drawing()
    trachea = ellipse(image.shape, (60, 100), (5, 5))
    image[trachea] = 10
    mask = lung_masks.lung_mask(image)
    assert dice(mask, both) > 0.97 and not mask[trachea].any()


def test_stages():
    image, _ = drawing()
    body, lung = lung_masks.body_mask(image), lung_masks.lung_mask(image)
    masks = {"nobackg": body, "crop": body, "lungs_nocrop": lung, "lungs": lung, "no_lungs": ~lung}
    for stage, mask in masks.items():
        result = lung_masks.apply(image, stage)
        x0, y0, x1, y1 = (int(v) for v in result.region)
        assert result.found and result.image.dtype == np.uint8
        np.testing.assert_array_equal(result.image, np.where(mask, image, 0)[y0:y1, x0:x1])
        columns = np.flatnonzero(mask.any(0))
        assert (x0, x1) == ((columns[0], columns[-1] + 1) if stage in ("crop", "lungs") else (0, 200))
    image[10:40, 40:60] = 180  # an arm, raised above the chest and joined to it
    top = np.flatnonzero(image[:, 100] > 20)[0]
    assert abs(lung_masks.apply(image, "crop").region[1] - top) <= 1


def test_previous_stage_without_lungs():
    image, _ = drawing(lung=False)
    for stage, previous in (("lungs_nocrop", "nobackg"), ("lungs", "crop"), ("no_lungs", None)):
        result = lung_masks.apply(image, stage)
        expected = lung_masks.apply(image, previous) if previous else None
        assert not result.found
        np.testing.assert_array_equal(result.image, expected.image if expected else image)
        assert result.region == (expected.region if expected else (0, 0, 200, 160))


def test_flat_and_noisy_images():
    for shape in ((1, 1), (3, 300), (100, 120)):
        for value in (0, 255):
            image = np.full(shape, value, np.uint8)
            for stage in (*lung_masks.ROBUST, "study_nobackg", "study_crop", "features"):
                result = lung_masks.apply(image, stage)
                assert result.image.size
                if stage in lung_masks.ROBUST:
                    assert not result.found
                    np.testing.assert_array_equal(result.image, image)
    noise = np.random.default_rng(0).integers(0, 256, (100, 100), dtype=np.uint8)
    assert all(lung_masks.apply(noise, stage).image.any() for stage in lung_masks.ROBUST)


def test_invalid_images_and_stages():
    for image in (np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8)), np.zeros((0, 8), np.uint8)):
        for make in (lung_masks.body_mask, lung_masks.lung_mask, lambda image: lung_masks.apply(image, "study_crop")):
            with pytest.raises(ValueError, match="gray uint8"):
                make(image)
    with pytest.raises(ValueError, match="no_lungs"):
        lung_masks.apply(np.zeros((8, 8), np.uint8), "nolung")


def test_real_slices(shared):
    """Two lungs of plausible size are found in nearly all slices."""
    with open(shared / "data/ct/labels.csv") as lines:
        paths = [row["path"] for row in csv.DictReader(lines) if "/nor_" not in row["path"]]
    plausible = []
    for path in np.random.default_rng(0).choice(sorted(paths), 30, replace=False):
        mask = lung_masks.lung_mask(np.asarray(Image.open(shared / "data/ct" / path).convert("L")))
        left, right = mask[:, : mask.shape[1] // 2].mean(), mask[:, mask.shape[1] // 2 :].mean()
        plausible.append(min(left, right) > 0.02 and max(left, right) < 0.85)
    assert np.mean(plausible) >= 0.9


def test_canny_against_opencv():
    # A step has two columns of equal strength; OpenCV takes the first. Below the low threshold there is no edge.
    step = np.zeros((6, 8), np.uint8)
    step[:, 4:] = 255
    np.testing.assert_array_equal(study_masks.canny(step, 240, 255), np.arange(8) == np.full((6, 1), 3))
    assert not study_masks.canny(step // 8, 240, 255).any()


def test_study_body_mask():
    square = np.full((512, 512), 20, np.uint8)
    body = ellipse(square.shape, (240, 256), (150, 200))
    square[body] = 200
    square[ellipse(square.shape, (240, 180), (90, 60))] = 60  # lung
    square[450:458, 100:400] = 220  # table
    mask = study_masks.body_mask(square)
    # The outline follows the body after erosion and dilation, and is at most two pixels off.
    assert (ndimage.binary_erosion(body, iterations=2) & ~mask).sum() == 0
    assert (mask & ~ndimage.binary_dilation(body, iterations=2)).sum() == 0
    cut = np.concatenate([square[160:], square[:160]])  # the image's upper edge cuts the body
    cut[:40, 250:255] = 20  # a gap that is open at the top
    mask = study_masks.body_mask(cut)
    assert not mask[:30, 252].any() and mask[100, 252], "the gap is not repaired (correct_mask=False)"


def test_study_crop_region():
    image, _ = drawing()
    result = lung_masks.apply(image, "study_crop")
    rows, columns = np.flatnonzero((image > 20).any(1)), np.flatnonzero((image > 20).any(0))
    np.testing.assert_allclose(result.region, (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1), atol=1.5)
    x0, y0, x1, y1 = result.region
    assert result.found
    assert result.image.shape == pytest.approx(((y1 - y0) * 512 / 160, (x1 - x0) * 512 / 200))


def test_shrinking_snake():
    square = np.zeros((512, 512), np.uint8)
    square[ellipse(square.shape, (250, 260), (120, 150))] = 200
    short, longer = study_masks.snake_mask(square, 2), study_masks.snake_mask(square, 20)
    circle = ellipse(square.shape, (250, 260), (251, 251))
    assert not (short & ~circle).any() and longer.sum() < short.sum() < circle.sum() < 1.1 * short.sum()


def test_features():
    image, both = drawing()
    vessel = ellipse(image.shape, (80, 62), (4, 4))
    image[vessel] = 170
    picture = lung_masks.apply(image, "features").image
    inner = ndimage.binary_erosion(both, iterations=2) & ~ndimage.binary_dilation(vessel, iterations=2)
    assert (picture[inner] == 40).all() and (picture[vessel] == 170).all()
    assert not picture[(image == 180)].any() and not picture[image == 5].any()
    assert lung_masks.apply(np.resize(image, (600, 700)), "features").image.shape == (512, 512)
