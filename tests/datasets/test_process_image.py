"""Processing of one image: bytes, boxes, stages, sizes and masks."""

import zlib

import numpy as np
import pytest
from folders import encoded

from lungjax.config import InputSpec
from lungjax.data import pipeline
from lungjax.data.imaging import images, lung_masks
from lungjax.data.prepared import BODY_SIDE, Prepared
from lungjax.datasets.build.process_image import ImageOptions, process_image
from lungjax.datasets.listing import Example
from lungjax.datasets.phantom import slices

GRAY = np.random.default_rng(0).integers(0, 256, (37, 53), dtype=np.uint8)


def process(data, box=None, **options):
    return process_image(Example("f", lambda: data, 0, "train", "g", box=box), ImageOptions(**options))


@pytest.fixture(scope="module")
def phantom():
    patient = slices.new_patient(5, "COVID-19")
    drawn = slices.draw_slice(patient, 0.5)
    return slices.gray(drawn.hu, patient.window), tuple(map(float, drawn.box))


def test_8_bit_images():
    for form in ("PNG", "JPEG"):
        assert process(encoded(GRAY, form)).data == encoded(GRAY, form)
    other = process(encoded(GRAY, "BMP"))
    np.testing.assert_array_equal(images.decode(other.data, None), GRAY)
    assert (other.width, other.height) == (53, 37) and other.box == (0, 0, 53, 37)
    assert other.pixels == process(encoded(GRAY)).pixels
    np.testing.assert_allclose((other.mean, other.std), ((GRAY / 255).mean(), (GRAY / 255).std()), rtol=1e-6)


def test_16_bit_images():
    deep = np.array([[0, 999, 1000], [1500, 3000, 65535]], np.uint16)
    result = process(encoded(deep))
    assert result.histogram.sum() == 6 and result.histogram[1500] == 1 and result.histogram[65535] == 1
    np.testing.assert_array_equal(images.read(result.data)[0], deep)
    assert "--window=low,high" in process(encoded(deep), stage="lungs")
    large = np.full((40, 60), 30000, np.uint16)
    assert images.read(process(encoded(large), size=(20, 30)).data)[0].dtype == np.uint16


def test_box_in_resized_image():
    data = encoded(np.repeat(np.repeat(GRAY, 2, 0), 2, 1))
    result = process(data, box=(10, 20, 50, 60), size=(37, 106))
    assert (result.height, result.width) == (37, 106) and result.box == (10, 10, 50, 30)
    assert result.phash == process(data).phash, "of the original"
    # Rounding must not move the box of a complete image over the edge by one bit, because TFDS rejects that.
    for width in range(100, 600, 7):
        result = process(encoded(np.zeros((113, width), np.uint8)), box=(0, 0, width, 113), size=(224, 225))
        assert result.box[2] <= 225 and result.box == pytest.approx((0, 0, 225, 224))


def test_box_in_crop(phantom):
    image, box = phantom
    staged = lung_masks.apply(image, "crop")
    result = process(encoded(image), box=box, stage="crop")
    np.testing.assert_array_equal(images.decode(result.data, None), staged.image)
    left, top = staged.region[:2]
    expected = np.clip(np.asarray(box) - (left, top, left, top), 0, (result.width, result.height) * 2)
    np.testing.assert_allclose(result.box, expected)
    assert result.pixels == process(encoded(image)).pixels, "copies are recognized by the original"


def test_copies_of_processed_images(phantom):
    """Studies generated copies after their image processing, not before."""
    image, _ = phantom
    mirrored = Example("f", lambda: encoded(image), 0, "train", "g", transform=np.fliplr)
    result = process_image(mirrored, ImageOptions(stage="features", body=True))
    stage = lung_masks.apply(image, "features").image
    np.testing.assert_array_equal(images.decode(result.data, None), stage[:, ::-1])
    assert result.pixels == process(encoded(image[:, ::-1])).pixels, "it is not an exact copy of its original"
    body, other = (np.unpackbits(np.frombuffer(p.body, np.uint8)) for p in (result, process(encoded(image), body=True)))
    assert (body.reshape(BODY_SIDE, -1)[:, ::-1] == other.reshape(BODY_SIDE, -1)).mean() > 0.99
    assert process_image(mirrored, ImageOptions(stage="features", size=(30, 40))).width == 40


def test_body_mask_through_crop_and_resize(phantom):
    image, box = phantom
    for stage in ("", "crop"):
        result = process(encoded(image), box=box, stage=stage, body=True)
        columns = {"file": np.array(["f"]), "box": np.asarray([result.box], np.float32)}
        records = [{"image": result.data, "body": zlib.compress(result.body)}]
        data = Prepared("x", ("a", "b"), columns, records, None, "0", body=True)
        assert data.body_mask(0).shape == (BODY_SIDE, BODY_SIDE)
        region = lung_masks.apply(image, stage).region if stage else (0, 0, image.shape[1], image.shape[0])
        left, top, right, bottom = (int(v) for v in region)
        for spec, margin in ((InputSpec(size=(80, 96)), 0.0), (InputSpec(size=(80, 96), crop="box"), 0.1)):
            made = pipeline.Reader(data, spec, margin, body=True).example(0)
            assert made["body"].shape == made["image"].shape[:2]
            view = images.view(result.box, spec, margin, result.width, result.height)
            truth = lung_masks.body_mask(image)[top:bottom, left:right].astype(np.uint8) * 255
            expected = images.resize(truth, view, made["body"].shape, "bilinear", True) > 127
            actual = made["body"] > 127
            assert 2 * (expected & actual).sum() / (expected.sum() + actual.sum()) > 0.98
