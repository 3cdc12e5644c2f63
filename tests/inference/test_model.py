"""`lungjax.load`: features, maps, batches of any size, and errors; tests/test_predict.py has the predictions."""

import json
import shutil
from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest
from brightness import brightness

import lungjax
from lungjax.config import InputSpec, metadata
from lungjax.explain.saliency import Explainer


@pytest.fixture(scope="module")
def model(trained_run):
    return lungjax.load(trained_run.workdir)


def test_features_and_explain(model):
    images = np.random.default_rng(0).integers(0, 256, (5, 40, 40), dtype=np.uint8)
    network, spec = model.network, model.metadata.input
    x = lungjax.preprocess(images, spec)
    logits, features = jax.jit(partial(network.module.apply, train=False))(network.variables, x)
    np.testing.assert_allclose(model.features(images), features["last"].mean((1, 2)), atol=1e-5)
    np.testing.assert_allclose(model.logits(images), logits, atol=1e-5)
    explainer = Explainer(network.module, network.variables, spec)
    pixels = np.stack([model.prepare(image).pixels for image in images])
    np.testing.assert_allclose(model.explain(images), explainer.maps(pixels)[0], atol=1e-5)
    maps = model.explain(images[:2], [2, 0], "gradcam_positive")
    np.testing.assert_allclose(maps, explainer.maps(pixels[:2], np.asarray([2, 0]), "gradcam_positive")[0], atol=1e-5)
    for arguments, word in (((images, None, "gradcan"), "gradcam"), ((images, [0]), "5 class indices"),
                            ((images[:1], [3]), "in 0..2")):  # fmt: skip
        with pytest.raises(ValueError, match=word):
            model.explain(*arguments)


def test_boxes(model):
    image = np.random.default_rng(0).integers(0, 256, (60, 80), dtype=np.uint8)
    boxed = replace(model, metadata=replace(model.metadata, input=replace(model.metadata.input, crop="box")))
    cut = model.predict(image[10:50, 20:60])
    np.testing.assert_allclose(boxed.predict([image], boxes=[(20, 10, 60, 50)]), cut, atol=2e-6)
    assert np.abs(boxed.predict([image]) - cut).max() > 1e-5


def test_load_errors(trained_run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(trained_run.workdir, copy)
    other = replace(metadata.read(copy / "model.json"), classes=("a", "b", "c"))
    (copy / "model.json").write_text(other.to_json())
    with pytest.raises(ValueError, match="does not match the weights.*--mode=evaluate"):
        lungjax.load(copy)
    (copy / "model.json").unlink()
    with pytest.raises(ValueError, match="--mode=evaluate"):
        lungjax.load(copy)
    with pytest.raises(ValueError, match="gone.png"):
        lungjax.load(trained_run.workdir).predict(["gone.png"])


def test_batches_of_any_size():
    model, pixels = brightness(), np.random.default_rng(0).integers(0, 256, (11, 8, 8, 1), dtype=np.uint8)
    assert model.batch_sizes == (1, 2, 4) and replace(model, batch_size=6).batch_sizes == (1, 2, 4, 6)
    outputs = model.outputs(pixels)
    np.testing.assert_allclose(outputs["probabilities"][:, 1], pixels.mean((1, 2, 3)) / 255, atol=1e-6)
    for size in (1, 3, 8):
        parts = [model.outputs(pixels[i : i + size])["features"] for i in range(0, 11, size)]
        np.testing.assert_array_equal(np.concatenate(parts), outputs["features"])
    assert model.outputs(pixels[:0])["probabilities"].shape == (0, 2)
    with pytest.raises(ValueError, match="float64"):
        model.outputs(pixels / 255)
    with pytest.raises(ValueError, match="no saliency maps"):
        model.explain(pixels[..., 0])


def test_crop_to_body():
    spec = InputSpec(size=(40, 30), crop="box")
    y, x = np.mgrid[:200, :260]
    ellipse = ((y - 100) / 60) ** 2 + ((x - 130) / 90) ** 2 < 1
    image = np.where(ellipse, 150, 5).astype(np.uint8)
    cropped = brightness(input=spec, box="body").prepare(image)
    assert (cropped.pixels[20] > 100).all() and (cropped.pixels[:, 15] > 100).all() and not cropped.warnings
    blank = brightness(input=spec, box="body").prepare(np.zeros((200, 260), np.uint8))
    whole = brightness(input=spec, box="given").prepare(image)
    assert "box" in blank.warnings[0] and "box" in whole.warnings[0] and (whole.pixels[:2] < 100).all()


def test_metadata_round_trip_and_errors():
    description = replace(
        brightness().metadata, stored=(64, 128), window=(0.0, 900.0), positive=1, points={"slice": {}}, box="body"
    )
    assert metadata.from_json(description.to_json()) == description
    tree = json.loads(description.to_json())
    for change, word in (
        ({"format": 2}, "newer"), ({"format": None}, "format"), ({"classes": ["one"]}, "classes"),
        ({"temperature": 0}, "temperature"), ({"classes": ["a", "a"]}, "different"), ({"window": [5, 5]}, "window"),
        ({"hu_windows": [[0, 0]]}, "hu_windows"), ({"box": "foo"}, "foo"), ({"stage": "lung"}, "lung"),
        ({"points": {"slice": {"bright": {"youden": {"threshold": "a"}}}}}, "points"), ({"positive": 2}, "positive"),
        ({"input": {"size": [8, 8], "colours": 3}}, "unknown"), ({"input": {"size": [8, 100000]}}, "size"),
        ({"input": []}, "wrong type"), ({"scores": {"n": float("nan")}}, "finite"),
        ({"counts": {"a": 2**64}}, "64 bits"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"there.json: .*{word}"):
            metadata.from_json(json.dumps(tree | change), "there.json")
    with pytest.raises(ValueError, match="JSON"):
        metadata.from_json("{")
