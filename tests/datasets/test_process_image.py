"""What becomes of one image on its way into a data set: bytes kept, boxes moved, stages, sizes, masks."""

import io

import numpy as np
import pytest
from PIL import Image

from lungjax.config import InputSpec
from lungjax.data import pipeline
from lungjax.data.imaging import images, lung_masks
from lungjax.data.prepared import BODY_SIDE, Prepared
from lungjax.datasets.build.process_image import Problem, Treatment, treat
from lungjax.datasets.listing import Example
from lungjax.datasets.phantom import slices


def encoded(image, form="PNG"):
    out = io.BytesIO()
    Image.fromarray(image).save(out, form)
    return out.getvalue()


def treated(data, box=None, **how):
    return treat(Example("f", lambda: data, 0, "train", "g", box=box), Treatment(**how))


@pytest.fixture(scope="module")
def slice_():
    patient = slices.new_patient(5, "COVID-19")
    drawn = slices.draw_slice(patient, 0.5)
    return slices.gray(drawn.hu, patient.window), drawn


GRAY = np.random.default_rng(0).integers(0, 256, (37, 53), dtype=np.uint8)


def test_the_bytes_of_8_bit_png_and_jpeg_are_kept_and_of_others_a_png_is_made():
    for form in ("PNG", "JPEG"):
        data = encoded(GRAY, form)
        assert treated(data).data == data
    other = treated(encoded(GRAY, "BMP"))
    np.testing.assert_array_equal(images.decode(other.data, None), GRAY)
    assert (other.width, other.height) == (53, 37) and other.box == (0, 0, 53, 37)
    assert other.pixels == treated(encoded(GRAY)).pixels
    np.testing.assert_allclose((other.mean, other.std), ((GRAY / 255).mean(), (GRAY / 255).std()), rtol=1e-6)


def test_16_bit_values_are_counted_and_a_stage_asks_for_their_window():
    deep = np.array([[0, 999, 1000], [1500, 3000, 65535]], np.uint16)
    found = treated(encoded(deep))
    assert found.histogram.sum() == 6 and found.histogram[1500] == 1 and found.histogram[65535] == 1
    np.testing.assert_array_equal(images.read(found.data)[0], deep)
    problem = treated(encoded(deep), stage="lungs")
    assert isinstance(problem, Problem) and not problem.skippable and "--window=low,high" in problem.text
    big = np.full((40, 60), 30000, np.uint16)
    assert images.read(treated(encoded(big), size=(20, 30)).data)[0].dtype == np.uint16


def test_damaged_files_may_be_skipped_and_boxes_outside_may_not():
    damaged = treated(encoded(GRAY)[:200])
    assert isinstance(damaged, Problem) and damaged.skippable
    outside = treated(encoded(GRAY), box=(0, 0, 54, 37))
    assert isinstance(outside, Problem) and not outside.skippable
    assert outside.text == "box 0 0 54 37 lies outside the image, which is 53 x 37 (width x height)"


def test_a_smaller_copy_moves_the_box_with_it():
    found = treated(encoded(np.repeat(np.repeat(GRAY, 2, 0), 2, 1)), box=(10, 20, 50, 60), size=(37, 106))
    assert (found.height, found.width) == (37, 106) and found.box == (10, 10, 50, 30)
    assert found.phash == treated(encoded(np.repeat(np.repeat(GRAY, 2, 0), 2, 1))).phash, "of the original"


@pytest.mark.parametrize("width", range(100, 600, 7))
def test_the_box_of_a_whole_image_stays_the_whole_image_in_any_size(width):
    """Rounding may not push it over the edge by a last bit: TFDS refuses that."""
    found = treated(encoded(np.zeros((113, width), np.uint8)), box=(0, 0, width, 113), size=(224, 225))
    assert found.box[2] <= 225 and found.box == pytest.approx((0, 0, 225, 224))


def test_a_crop_keeps_the_box_on_the_same_pixels(slice_):
    image, drawn = slice_
    staged = lung_masks.apply(image, "crop")
    box = tuple(float(v) for v in drawn.box)
    found = treated(encoded(image), box=box, stage="crop")
    np.testing.assert_array_equal(images.decode(found.data, None), staged.image)
    left, top = staged.region[:2]
    expected = np.clip(np.asarray(box) - (left, top, left, top), 0, (found.width, found.height) * 2)
    np.testing.assert_allclose(found.box, expected)
    assert found.pixels == treated(encoded(image)).pixels, "copies are told by the original"


def test_a_slice_without_lungs_is_said_and_keeps_a_picture():
    belly = np.zeros((120, 120), np.uint8)
    yy, xx = np.mgrid[:120, :120]
    belly[(yy - 60) ** 2 / 45**2 + (xx - 60) ** 2 / 55**2 < 1] = 150
    for stage in ("lungs", "lungs_nocrop", "no_lungs"):
        found = treated(encoded(belly), stage=stage)
        assert not found.found and images.decode(found.data, None).max() == 150


@pytest.mark.parametrize("stage", ["", "crop"])
def test_the_body_mask_travels_with_the_image_through_crop_and_resize(slice_, stage):
    image, drawn = slice_
    found = treated(encoded(image), box=tuple(float(v) for v in drawn.box), stage=stage, body=True)
    bits = np.frombuffer(found.body, np.uint8)
    columns = {"file": np.array(["f"]), "box": np.asarray([found.box], np.float32)}
    data = Prepared("x", ("a", "b"), columns, [{"image": found.data, "body": bits}], None, "0", body=True)
    assert data.body_mask(0).shape == (BODY_SIDE, BODY_SIDE)
    region = lung_masks.apply(image, stage).region if stage else (0, 0, image.shape[1], image.shape[0])
    left, top, right, bottom = (int(v) for v in region)
    for spec, margin in ((InputSpec(size=(80, 96)), 0.0), (InputSpec(size=(80, 96), crop="box"), 0.1)):
        made = pipeline.Reader(data, spec, margin, body=True).example(0)
        assert made["body"].shape == made["image"].shape[:2]
        shown = images.view(found.box, spec, margin, found.width, found.height)
        truth = lung_masks.body_mask(image)[top:bottom, left:right].astype(np.uint8) * 255
        expected = images.resize(truth, shown, made["body"].shape, "bilinear", True) > 127
        got = made["body"] > 127
        assert 2 * (expected & got).sum() / (expected.sum() + got.sum()) > 0.98


def test_a_margin_shows_more_around_the_box_and_says_where_the_box_is():
    image = np.arange(100 * 120).reshape(100, 120).astype(np.uint8)
    columns = {"file": np.array(["f"]), "box": np.asarray([[20, 5, 60, 85]], np.float32)}
    data = Prepared("x", ("a", "b"), columns, [{"image": encoded(image)}], None, "0")
    made = pipeline.Reader(data, InputSpec(size=(80, 40), crop="box"), 0.25).example(0)
    assert made["image"].shape == (120, 60, 1)
    # Across 10 px are kept on each side; above the box there are 5 of the 20 px wanted, below it 15.
    np.testing.assert_allclose(made["box"], [10 / 60, 5 / 100, 50 / 60, 85 / 100], rtol=1e-6)
