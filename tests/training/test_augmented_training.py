"""Augmentation, mixing, protocols and stages as a run has them: only train data changes, and a run stays repeatable."""

import dataclasses
import json
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import without_pictures
from test_train import CONFIG, assert_same_step, batch_of, changed, last_weights, make

from lungjax import datasets, models
from lungjax.config import AugmentConfig, Config, overrides
from lungjax.config.presets import PRESETS
from lungjax.data import pipeline
from lungjax.datasets import PrepareOptions
from lungjax.models.inputs import normalize
from lungjax.training import losses, step, train

MOVED = ["augment=ct_cov19_original", "augment.contrast=0.5,1.5", "model.head.dropout=0", "optim.name=sgd"]


def with_places(n, size=32, start=0):
    return batch_of(n, size) | {"place": jnp.arange(start, start + n, dtype=jnp.uint32)}


def test_a_preset_is_a_section_that_single_fields_refine():
    config = overrides.override(Config(), "augment=covidnet_ct")
    assert config.augment == PRESETS["covidnet_ct"]
    config = overrides.override(config, "augment.rotation=0.1")
    assert config.augment == replace(PRESETS["covidnet_ct"], rotation=0.1)
    assert overrides.from_json(overrides.to_json(config)) == config
    assert overrides.override(config, "augment=none").augment == AugmentConfig()
    with pytest.raises(ValueError, match="the nearest: covidnet_ct"):
        overrides.override(Config(), "augment=covidnetct")


def test_a_picture_depends_on_its_place_alone_so_parts_of_a_batch_make_the_whole_step():
    config, batch = changed(CONFIG, *MOVED), with_places(8)
    first, whole = make(config)
    want, _ = whole(first, batch)
    got, _ = make(changed(config, "train.accumulate=4"))[1](first, batch)
    assert_same_step(want, got, 2e-6)
    plain, _ = make(changed(config, "augment=none"))[1](first, batch)
    elsewhere, _ = whole(first, with_places(8, start=100))
    for other in (plain, elsewhere):
        moved = [np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (want.params, other.params)), strict=True)]
        assert max(moved) > 1e-4


def test_only_train_images_are_changed(small_data):
    config = changed(CONFIG, *MOVED, "augment.mixup=0.5")
    first, _ = make(config)
    batch = {"image": batch_of(8, 32)["image"], "row": jnp.arange(8)}
    module = models.build(config.model, 3)
    seen = [
        step.make_predict_step(partial(module.apply, train=False), c, None)(first.variables, batch)
        for c in (config, CONFIG)
    ]
    np.testing.assert_array_equal(seen[0]["probabilities"], seen[1]["probabilities"])


@pytest.mark.parametrize("mixing", ["augment.mixup=0.4", "augment.cutmix=1.0"])
def test_the_loss_of_mixed_images_is_shared_out_between_their_labels(mixing, monkeypatch):
    config = changed(CONFIG, "model.head.dropout=0", "optim.name=sgd", mixing)
    batch = with_places(8)
    first, train_step = make(config)
    got = train_step(first, batch)[1]["loss"]
    key = jax.random.fold_in(jax.random.key(config.train.seed), 1)
    images, other, share = step.augment.mix(
        batch["image"].astype(jnp.float32), batch["label"], batch["place"], key, config.augment
    )
    assert float(share.min()) < 0.9 and float(share.min()) >= 0 and float(share.max()) <= 1
    logits, _ = models.build(config.model, 3).apply(first.variables, normalize(images, config.input), train=False)
    parts = [
        losses.cross_entropy(logits, labels, class_weights=jnp.ones(3), label_smoothing=0.0, positive=None)
        for labels in (batch["label"], other)
    ]
    np.testing.assert_allclose(got, (share * parts[0] + (1 - share) * parts[1]).mean(), rtol=1e-5)


def test_an_augmented_run_stopped_and_resumed_ends_with_the_same_bits(tmp_path, monkeypatch, small_data):
    monkeypatch.setattr(train, "open_dataset", lambda name, *_, **__: small_data)
    without_pictures(monkeypatch)
    config = changed(CONFIG, "augment=xray_covid_online", "augment.cutmix=1.0", "train.steps=8")
    train.run(config, tmp_path / "whole", tmp_path)
    half = train.set_up

    def set_up(*args):
        this = half(*args)
        return dataclasses.replace(this, program=dataclasses.replace(this.program, steps=4))

    monkeypatch.setattr(train, "set_up", set_up)
    train.run(config, tmp_path / "parts", tmp_path)
    monkeypatch.setattr(train, "set_up", half)
    train.run(config, tmp_path / "parts", tmp_path)
    want, got = last_weights(tmp_path / "whole", 8), last_weights(tmp_path / "parts", 8)
    assert want.keys() == got.keys()
    for path, value in want.items():
        np.testing.assert_array_equal(got[path], value, err_msg=path)


def test_box_jitter_gets_a_margin_and_the_box_in_it(small_data):
    columns = small_data.columns | {"box": np.tile(np.asarray([10, 5, 30, 35], np.float32), (60, 1))}
    data = replace(small_data, columns=columns)
    config = changed(CONFIG, "input.crop=box", "input.box_margin=0.25", "augment.box_jitter=0.2")
    batch = next(pipeline.train_batches(data, config, start=0))
    assert batch["image"].shape == (8, 48, 48, 1)
    # 10 of the 30 rows above and below would be kept: 5 and 5 are there.
    np.testing.assert_allclose(batch["box"][0], [5 / 30, 5 / 40, 25 / 30, 35 / 40], rtol=1e-6)
    first, train_step = make(config)
    assert np.isfinite(train_step(first, batch)[1]["loss"])
    with pytest.raises(ValueError, match=r"augment.exterior=0.5: folder/small has no masks of the body"):
        next(pipeline.train_batches(data, changed(config, "augment.exterior=0.5"), start=0))


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    root = tmp_path_factory.mktemp("phantoms")
    for name in ("phantom_ct/tiny", "phantom_ct/tiny-no_lungs"):
        datasets.write(name, None, root, PrepareOptions(), quiet=True)
    return root


def test_a_report_says_what_is_left_without_the_lungs(phantoms, tmp_path, monkeypatch):
    without_pictures(monkeypatch)
    config = changed(
        CONFIG, "data.dataset=phantom_ct/tiny", "input.crop=box", "input.box_margin=0.1", "train.steps=2",
        "train.monitor=slice.loss", "augment=covidnet_ct",
    )  # fmt: skip
    report_path = train.run(config, tmp_path / "run", phantoms)
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["no_lungs"]["n"] == report["test"]["slice"]["n"] == 12
    assert report["no_lungs"]["loss"] != report["test"]["slice"]["loss"]
    assert "lungs blacked out" in report_path.read_text()
    told = [text for text in report["warnings"] if "lungs blacked out" in text]
    assert bool(told) == (report["no_lungs"]["auc_macro"] >= 0.6)


def test_the_control_without_lungs_has_the_test_files_in_which_lungs_are_found(phantoms):
    data = datasets.open_dataset("phantom_ct/tiny", phantoms)
    tested = set(data.columns["file"][data.rows("test")])
    dark = datasets.without_lungs(data, phantoms)
    assert set(dark.columns["file"][dark.rows("test")]) == tested and not len(dark.rows("train"))
    # Another split of the same files moves the control with it; other classes, stages and sets have none.
    moved = replace(data, columns=data.columns | {"split": np.where(data.columns["split"] == "val", "test", "val")})
    dark = datasets.without_lungs(moved, phantoms)
    assert set(dark.columns["file"][dark.rows("test")]) == set(data.columns["file"][data.rows("val")])
    for other in (
        replace(data, classes=data.classes[::-1]), replace(data, name="phantom_ct/tiny-crop"),
        replace(data, name="phantom_ct/default"), replace(data, name="small"),
    ):  # fmt: skip
        assert datasets.without_lungs(other, phantoms) is None
    index = next(phantoms.glob("phantom_ct/tiny-no_lungs/*/index.csv"))
    lines = index.read_text().splitlines()
    place = lines[0].split(",").index("found")
    kept = [lines[0]] + [",".join([*c[:place], "0", *c[place + 1 :]]) for c in (line.split(",") for line in lines[1:])]
    index.write_text("\n".join(kept) + "\n")
    try:
        assert datasets.without_lungs(data, phantoms) is None, "else a finished run would fail on an empty split"
    finally:
        index.write_text("\n".join(lines) + "\n")


def test_a_stage_and_a_size_are_versions_of_the_same_splits(phantoms):
    whole = datasets.open_dataset("phantom_ct/tiny", phantoms)
    dark = datasets.open_dataset("phantom_ct/tiny-no_lungs", phantoms)
    for column in ("file", "split", "pixels", "phash", "width", "box"):
        np.testing.assert_array_equal(whole.columns[column], dark.columns[column])
    assert (dark.columns["mean"] <= whole.columns["mean"]).all()
    assert (dark.columns["mean"] < whole.columns["mean"]).mean() > 0.9
    with pytest.raises(ValueError, match="data.protocol=study: phantom_ct/tiny came with no splits"):
        datasets.open_dataset("phantom_ct/tiny", phantoms, "study")
