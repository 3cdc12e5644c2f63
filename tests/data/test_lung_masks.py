"""Body and lung masks against phantoms with known lungs, the studies' masks against hand-made cases."""

import csv
from functools import cache

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from lungjax.data.imaging import lung_masks, study_masks
from lungjax.datasets.phantom import slices


def dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


@cache
def phantoms(finding, seeds=range(16)):
    """One slice of each seed, the levels in turn: image, lungs, lesion."""
    out = []
    for seed in seeds:
        patient = slices.new_patient(seed, finding)
        drawn = slices.draw_slice(patient, slices.levels(patient, 4)[seed % 4])
        out.append((slices.gray(drawn.hu, patient.window), drawn.lung, drawn.lesion))
    return out


def ellipse(shape, centre, radii):
    row, column = np.ogrid[: shape[0], : shape[1]]
    return ((row - centre[0]) / radii[0]) ** 2 + ((column - centre[1]) / radii[1]) ** 2 < 1


def drawing(lung=True):
    """A body with two lungs in black air, 160 x 200."""
    image = np.full((160, 200), 5, np.uint8)
    image[ellipse(image.shape, (80, 100), (60, 85))] = 180
    both = ellipse(image.shape, (80, 62), (38, 28)) | ellipse(image.shape, (80, 138), (38, 28))
    if lung:
        image[both] = 40
    return image, both


@pytest.mark.parametrize("finding", slices.CLASSES)
def test_lungs_of_phantoms(finding):
    found = [lung_masks.lung_mask(image) for image, _, _ in phantoms(finding)]
    assert np.mean([dice(mask, lung) for mask, (_, lung, _) in zip(found, phantoms(finding), strict=True)]) > 0.97


def test_lesions_at_the_chest_wall_are_lung():
    # Gray levels alone take such lesions for chest wall: the masks must hold more of them than a threshold does.
    ours, plain, all_of_it = 0, 0, 0
    for image, lung, lesion in phantoms("Pneumonia"):
        level = (np.median(image[lung & ~lesion]) + image[~lung].max()) / 2
        ours += (lung_masks.lung_mask(image) & lesion).sum()
        plain += ((image < level) & lesion).sum()
        all_of_it += lesion.sum()
    assert ours > 0.75 * all_of_it
    assert ours > 1.3 * plain


@pytest.mark.parametrize("side", [400, 512])
def test_large_images_get_the_same_lungs(side):
    image, lung, _ = phantoms("COVID-19")[0]
    height = round(side * image.shape[0] / image.shape[1])
    big = np.asarray(Image.fromarray(image).resize((side, height), Image.Resampling.BICUBIC))
    truth = np.asarray(Image.fromarray(lung).resize((side, height)))
    assert dice(lung_masks.lung_mask(big), truth) > 0.97


def test_lungs_that_the_edge_cuts_off_and_white_margins():
    image, both = drawing()
    cut = np.s_[:, 45:155]  # no air left at the sides, both lungs open at the edge
    assert dice(lung_masks.lung_mask(image[cut]), both[cut]) > 0.95
    framed = np.pad(image, 12, constant_values=255)
    assert dice(lung_masks.lung_mask(framed), np.pad(both, 12)) > 0.97
    assert dice(lung_masks.body_mask(framed), np.pad(image > 20, 12)) > 0.95


def test_body_keeps_the_lungs_and_drops_table_and_arms():
    image, both = drawing()
    body = (image > 20) | both
    image[139:142, 20:180] = 180  # table, touching the back
    image[ellipse(image.shape, (80, 7), (12, 6))] = 180  # arm
    mask = lung_masks.body_mask(image)
    assert dice(mask, body) > 0.98
    assert not mask[139:142, 20:70].any() and not mask[70:90, 2:12].any()


def test_air_between_the_body_and_a_table_is_no_lung():
    image, both = drawing()
    image[148:156, :] = 180  # from edge to edge, and up along the sides to the body
    image[80:156, :16] = 180
    image[80:156, -16:] = 180
    assert dice(lung_masks.lung_mask(image), both) > 0.97


def test_windpipe_is_dropped():
    image, both = drawing()
    pipe = ellipse(image.shape, (60, 100), (5, 5))
    image[pipe] = 10
    mask = lung_masks.lung_mask(image)
    assert dice(mask, both) > 0.97 and not mask[pipe].any()


def test_stages_show_the_region_they_name():
    image, _ = drawing()
    body, lung = lung_masks.body_mask(image), lung_masks.lung_mask(image)
    for stage, mask in [("nobackg", body), ("crop", body), ("lungs_nocrop", lung), ("lungs", lung)]:
        staged = lung_masks.apply(image, stage)
        x0, y0, x1, y1 = (int(v) for v in staged.region)
        assert staged.found and staged.image.dtype == np.uint8
        np.testing.assert_array_equal(staged.image, np.where(mask, image, 0)[y0:y1, x0:x1])
        if stage in ("crop", "lungs"):
            assert (x0, x1) == tuple(np.flatnonzero(mask.any(0))[[0, -1]] + (0, 1))
        else:
            assert staged.region == (0, 0, 200, 160)


def test_crop_drops_arms_raised_above_the_chest():
    image, _ = drawing()
    image[10:40, 40:60] = 180  # joined to the body, above its middle
    top = np.flatnonzero(image[:, 100] > 20)[0]
    assert abs(lung_masks.apply(image, "crop").region[1] - top) <= 1


def test_no_lungs_is_black_in_the_lungs_alone():
    image, _ = drawing()
    image = np.maximum(image, 1)
    np.testing.assert_array_equal(lung_masks.apply(image, "no_lungs").image == 0, lung_masks.lung_mask(image))


def test_without_lungs_the_stage_before_is_kept():
    image, _ = drawing(lung=False)
    assert not lung_masks.lung_mask(image).any()
    for stage, before in [("lungs_nocrop", "nobackg"), ("lungs", "crop"), ("no_lungs", None)]:
        staged = lung_masks.apply(image, stage)
        wanted = lung_masks.apply(image, before) if before else None
        assert not staged.found
        np.testing.assert_array_equal(staged.image, wanted.image if wanted else image)
        assert staged.region == (wanted.region if wanted else (0, 0, 200, 160))


@pytest.mark.parametrize("shape", [(1, 1), (8, 8), (3, 300), (100, 120)])
@pytest.mark.parametrize("value", [0, 255])
def test_flat_images_have_nothing_to_find(shape, value):
    image = np.full(shape, value, np.uint8)
    for stage in (*lung_masks.ROBUST, "study_nobackg", "study_crop", "features"):
        staged = lung_masks.apply(image, stage)
        assert staged.image.size
        if stage in lung_masks.ROBUST:
            assert not staged.found
            np.testing.assert_array_equal(staged.image, image)


def test_noise_does_not_crash():
    image = np.random.default_rng(0).integers(0, 256, (200, 200), dtype=np.uint8)
    for stage in lung_masks.ROBUST:
        assert lung_masks.apply(image, stage).image.any()


@pytest.mark.parametrize("image", [np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8)), np.zeros((0, 8), np.uint8)])
def test_only_gray_uint8_images(image):
    for make in (lung_masks.body_mask, lung_masks.lung_mask, lambda image: lung_masks.apply(image, "study_crop")):
        with pytest.raises(ValueError, match=r"gray uint8 image \[H, W\]"):
            make(image)


def test_unknown_stage_names_the_nearest():
    with pytest.raises(ValueError, match="nearest: no_lungs"):
        lung_masks.apply(np.zeros((8, 8), np.uint8), "nolung")


def test_real_slices(shared):
    """Two lungs of plausible size nearly everywhere; the contours themselves are judged by eye."""
    with open(shared / "data/ct/labels.csv") as lines:
        paths = [row["path"] for row in csv.DictReader(lines) if "/nor_" not in row["path"]]
    shares = []
    for path in np.random.default_rng(0).choice(sorted(paths), 40, replace=False):
        mask = lung_masks.lung_mask(np.asarray(Image.open(shared / "data/ct" / path).convert("L")))
        left, right = mask[:, : mask.shape[1] // 2].mean(), mask[:, mask.shape[1] // 2 :].mean()
        shares.append(min(left, right) > 0.02 and max(left, right) < 0.85)
    assert np.mean(shares) >= 0.9


# ---- the studies' own masks


def test_canny_is_opencvs():
    # A step has two columns of equal strength; OpenCV keeps the first. Below the low threshold nothing is kept.
    step = np.zeros((6, 8), np.uint8)
    step[:, 4:] = 255
    edges = study_masks.canny(step, 240, 255)
    np.testing.assert_array_equal(edges, np.arange(8) == np.full((6, 1), 3))
    assert not study_masks.canny(step // 8, 240, 255).any()


def test_longest_contour_is_filled():
    lines = np.zeros((60, 60), bool)
    lines[5:45, 5:45] = True
    lines[8:42, 8:42] = False  # a frame: its outer outline is the longest
    lines[20:30, 20:30] = True
    lines[50:58, 2:58:2] = True  # many short ones
    wanted = np.zeros((60, 60), bool)
    wanted[5:45, 5:45] = True
    np.testing.assert_array_equal(study_masks.longest_contour(lines), wanted)
    assert study_masks.longest_contour(np.zeros((9, 9), bool)) is None


def test_contours_of_holes_cover_the_line_around_them():
    lines = np.ones((20, 20), bool)
    lines[6:10, 7:12] = False
    sizes = sorted(int(filled.sum()) for _, filled in study_masks._contours(lines))
    assert sizes == [6 * 7 - 4, 400]  # OpenCV's outline of a hole cuts its corners


def test_study_body_mask_is_the_body_without_table():
    square = np.full((512, 512), 20, np.uint8)
    body = ellipse(square.shape, (240, 256), (150, 200))
    square[body] = 200
    square[ellipse(square.shape, (240, 180), (90, 60))] = 60  # lung
    square[450:458, 100:400] = 220  # table
    mask = study_masks.body_mask(square)
    # The outline lies on the edge of the eroded body, dilated again: not more than two pixels off.
    assert (ndimage.binary_erosion(body, iterations=2) & ~mask).sum() == 0
    assert (mask & ~ndimage.binary_dilation(body, iterations=2)).sum() == 0


def test_study_body_mask_is_repaired_at_the_upper_edge():
    mask = np.zeros((40, 40), bool)
    mask[0:30, [5, 34]] = True
    mask[29, 5:35] = True  # open at the top
    fixed = study_masks._repair(mask)
    assert fixed[:30, 5:35].all() and fixed.sum() == 30 * 30


def test_study_stages_show_the_region_they_name():
    image, _ = drawing()
    staged = lung_masks.apply(image, "study_crop")
    rows, columns = np.flatnonzero((image > 20).any(1)), np.flatnonzero((image > 20).any(0))
    np.testing.assert_allclose(staged.region, (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1), atol=1.5)
    x0, y0, x1, y1 = staged.region
    assert staged.found
    assert staged.image.shape == pytest.approx(((y1 - y0) * 512 / 160, (x1 - x0) * 512 / 200))


def test_the_snake_shrinks_from_its_circle():
    square = np.zeros((512, 512), np.uint8)
    body = ellipse(square.shape, (250, 260), (120, 150))
    square[body] = 200
    short, longer = study_masks.snake_mask(square, 5), study_masks.snake_mask(square, 60)
    circle = ellipse(square.shape, (250, 260), (251, 251))
    assert not (short & ~circle).any() and longer.sum() < short.sum() < circle.sum() < 1.1 * short.sum()


def test_features_keep_the_lung_and_drop_the_tissue():
    image, both = drawing()
    vessel = ellipse(image.shape, (80, 62), (4, 4))
    image[vessel] = 170
    picture = lung_masks.apply(image, "features").image
    inner = ndimage.binary_erosion(both, iterations=2) & ~ndimage.binary_dilation(vessel, iterations=2)
    assert (picture[inner] == 40).all() and (picture[vessel] == 170).all()
    assert not picture[(image == 180)].any() and not picture[image == 5].any()
    assert lung_masks.apply(np.resize(image, (600, 700)), "features").image.shape == (512, 512)
