"""Augmentation in training, and the control without lungs."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_runs as runs
from small_runs import PLAIN, changed

from lungjax import datasets
from lungjax.config import experiments
from lungjax.data import augment, pipeline, prepared
from lungjax.data.imaging import images
from lungjax.datasets import PrepareOptions
from lungjax.models.inputs import normalize
from lungjax.training import setup, step, train

pytestmark = pytest.mark.usefixtures("small_network")


@pytest.mark.parametrize("mixing", ["augment.mixup=0.4", pytest.param("augment.cutmix=1.0", marks=pytest.mark.slow)])
def test_loss_of_mixed_labels(mixing):
    config = changed(PLAIN, "model.head.dropout=0", "optim.frozen_batch_norm=frozen", mixing)
    batch, (before, _, metrics) = runs.batch_of(config), runs.one_step(config)

    @jax.jit
    def mixed(variables, batch):
        key, _ = jax.random.split(jax.random.key(config.train.seed))
        images = batch["image"].astype(jnp.float32)
        images, other, share = augment.mix(images, batch["label"], batch["place"], key, config.augment)
        images = normalize(images, config.input)
        return runs.build(config).module.apply(variables, images, train=False)[0], other, share

    logits, other, share = mixed(before.variables, batch)
    assert 0 <= float(share.min()) < 0.9 and float(share.max()) <= 1
    a, b = (
        step.cross_entropy(logits, labels, class_weights=jnp.ones(3), label_smoothing=0.0, positive=None)
        for labels in (batch["label"], other)
    )
    np.testing.assert_allclose(metrics["loss"], (share * a + (1 - share) * b).mean(), rtol=1e-5)


def test_margin_of_box_jitter(small_data):
    columns = small_data.columns | {"box": np.tile(np.asarray([10, 5, 30, 35], np.float32), (60, 1))}
    boxed = replace(small_data, columns=columns)
    config = changed(PLAIN, "input.crop=box", "input.box_margin=0.25", "augment.box_jitter=0.2")
    batch = next(pipeline.train_batches(boxed, config, start=0))
    assert batch["image"].shape == (8, 48, 48, 1)
    # The margin is 7.5 of the 30 rows; above and below the box there are only 5.
    np.testing.assert_allclose(batch["box"][0], [5 / 30, 5 / 40, 25 / 30, 35 / 40], rtol=1e-6)
    assert np.isfinite(runs.build(config).train_step(runs.first_state(config), batch)[1]["loss"])
    with pytest.raises(ValueError, match="body masks"):
        next(pipeline.train_batches(boxed, changed(config, "augment.exterior=0.5"), start=0))


def test_pixels_outside_the_crop_after_rotation(small_data):
    """The COVIDx CT study rotates before it crops 340 x 380 of 512 x 512 pixels: no corner becomes black."""
    config = experiments.load("covidx_ct:protocol=study")
    config = replace(config, train=replace(config.train, batch_size=16))
    records = [{**record, "image": images.encode(np.full((512, 512), 200, np.uint8))} for record in small_data.records]
    batch = next(pipeline.train_batches(replace(small_data, records=records), config, start=0))
    # The margin is 0.19 of the sides, but only 66 pixels to the left and right.
    np.testing.assert_allclose(batch["box"][0], [66 / 512, 64.6 / 469.2, 446 / 512, 404.6 / 469.2], rtol=1e-5)
    result = augment.augment(
        batch["image"], batch["place"], jax.random.key(0), config.augment, (224, 224), batch["box"]
    )
    assert result.shape == (16, 224, 224, 1) and (np.asarray(result) < 199).mean() < 1e-3


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    root = tmp_path_factory.mktemp("phantoms")
    for name in ("phantom_ct/tiny", "phantom_ct/tiny-no_lungs"):
        datasets.write(name, None, root, PrepareOptions(), quiet=True)
    return root


def test_report_of_the_control_without_lungs(phantoms, tmp_path, monkeypatch):
    monkeypatch.setattr(setup, "open_dataset", datasets.open_dataset)
    config = changed(
        PLAIN, "data.dataset=phantom_ct/tiny", "input.crop=box", "train.steps=2", "train.monitor=slice.loss",
        "augment.exterior=0.5",
    )  # fmt: skip
    report_path = train.run(config, tmp_path / "run", phantoms)
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["controls"]["no_lungs"]["n"] == report["test"]["slice"]["n"] == 12
    assert report["controls"]["no_lungs"]["loss"] != report["test"]["slice"]["loss"]
    assert "lungs blacked out" in report_path.read_text()
    warned = any("lungs blacked out" in warning for warning in report["warnings"])
    assert warned == (report["controls"]["no_lungs"]["auc_macro"] >= 0.6)


def test_images_of_the_control_without_lungs(phantoms, monkeypatch):
    data = datasets.open_dataset("phantom_ct/tiny", phantoms)
    files = data.columns["file"]
    control = datasets.without_lungs(data, phantoms)
    assert set(control.columns["file"][control.rows("test")]) == set(files[data.rows("test")])
    assert not len(control.rows("train"))
    assert not control.rotate and datasets.without_lungs(replace(data, rotate=True), phantoms).rotate
    for column in ("file", "pixels", "phash", "box"):  # those of the image before its stage
        np.testing.assert_array_equal(control.columns[column], data.columns[column])
    assert (control.columns["mean"] < data.columns["mean"]).mean() > 0.9
    # The control follows other splits of the same files; other classes, stages and data sets have no control.
    swapped = replace(data, columns=data.columns | {"split": np.where(data.columns["split"] == "val", "test", "val")})
    control = datasets.without_lungs(swapped, phantoms)
    assert set(control.columns["file"][control.rows("test")]) == set(files[data.rows("val")])
    assert datasets.without_lungs(replace(data, classes=data.classes[::-1]), phantoms) is None
    for name in ("phantom_ct/tiny-crop", "phantom_ct/default", "small"):
        assert datasets.without_lungs(replace(data, name=name), phantoms) is None
    control = replace(control, columns=control.columns | {"found": np.zeros(48, bool)})
    monkeypatch.setattr(prepared, "load", lambda *_: control)
    assert datasets.without_lungs(data, phantoms) is None  # no lungs in any test image
