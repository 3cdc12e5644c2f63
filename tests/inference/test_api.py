"""The Python API; tests/test_predict.py has the predictions of loaded models."""

import json
import shutil
from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest
from brightness import brightness
from folders import encoded
from weight_writers import CLASSES, KERAS, SIDE, flat, install, leaves, write

import lungjax
from lungjax import models
from lungjax.config import Config, HeadConfig, InputSpec, ModelConfig, metadata
from lungjax.explain.saliency import Explainer
from lungjax.runtime import mesh as meshes
from lungjax.training import program
from lungjax.weights import load as loading


@pytest.fixture
def zoo(monkeypatch, tmp_path):
    return install(monkeypatch, tmp_path)


def test_list_models():
    names = lungjax.list_models()
    assert set(names) == set(models.MODELS) and len(names) > 60
    assert lungjax.list_models("efficientnetv2_*")[-1] == "efficientnetv2_xl"
    assert lungjax.list_models("vgg??") == ["vgg16", "vgg19"] and lungjax.list_models("no*") == []
    public, private = lungjax.list_models(weights=True), lungjax.list_models(weights=False)
    assert sorted(public + private) == sorted(names)
    assert "convnextv2_atto" in public and {"cbr_small", "simple", "xray_cnn"} <= {*private}


def test_create_new_head(zoo):
    saved = leaves()
    write(zoo, "h5", saved)
    net, variables, spec = lungjax.create("tiny", weights="imagenet", classes=3, weights_dir=zoo)
    created = flat(variables)
    assert (created["head/dense/kernel"].shape, created["head/dense/bias"].shape) == ((16, 3), (3,))
    assert created["head/dense/kernel"].std() > 0.01
    for path in saved.keys() - {"head/dense/kernel", "head/dense/bias"}:
        np.testing.assert_array_equal(created[path], saved[path], err_msg=path)
    other = flat(lungjax.create("tiny", classes=3, weights_dir=zoo, seed=1)[1])
    assert (other["head/dense/kernel"] != created["head/dense/kernel"]).any()
    assert spec == KERAS.input
    logits, features = jax.eval_shape(lambda: net.apply(variables, np.zeros((2, SIDE, SIDE, 3)), train=False))
    assert logits.shape == (2, 3) and features["last"].shape == (2, 8, 8, 16)
    # An explicit class count gives a new head even if it equals that of the weights.
    same = flat(lungjax.create("tiny", classes=CLASSES, weights_dir=zoo)[1])
    assert (same["head/dense/kernel"] != saved["head/dense/kernel"]).any()


def test_create_size_head_and_fields(zoo):
    write(zoo, "h5", leaves())
    head = HeadConfig(hidden=(7,), pool="max")
    net, variables, spec = lungjax.create(
        "tiny", classes=2, size=(48, 40), head=head, weights_dir=zoo, dtype="bfloat16", drop_path=0.1
    )
    assert spec == replace(KERAS.input, size=(48, 40))
    assert variables["params"]["head"]["hidden1"]["kernel"].shape == (16, 7)
    assert (net.drop_path, net.head.pool, net.head.dropout) == (0.1, "max", 0.2)
    images = lungjax.preprocess(np.zeros((9, 9, 3), np.uint8), spec)
    assert images.shape == (1, 48, 40, 3) and images.dtype == np.float32
    logits, features = jax.eval_shape(lambda: net.apply(variables, images, train=False))
    assert logits.dtype == np.float32 and features["last"].dtype == "bfloat16" and logits.shape == (1, 2)
    with pytest.raises(ValueError, match="head/hidden1/kernel"):
        lungjax.create("tiny", size=48, head=head, weights_dir=zoo)  # the classes of the weights, another head
    with pytest.raises(ValueError, match="too small"):
        lungjax.create("simple", "none", size=8)


def test_start_of_training(zoo):
    """For gray images and color weights, the network has three input channels, normalized as the weights require."""
    write(zoo, "safetensors", leaves())
    config = Config(model=ModelConfig(name="tiny", weights="half"), input=InputSpec(size=(SIDE, SIDE)))
    config = loading.resolve(config)
    run = program.build(config, ("a", "b", "c"), np.arange(9) % 3, meshes.make_mesh(1))
    variables = run.new_state(loading.leaves(config, run.module, zoo)).variables
    _, created, spec = lungjax.create("tiny", "half", classes=3, size=SIDE, channels=1, weights_dir=zoo)
    assert spec.mean == config.input.mean == (0.5,) * 3 and spec.network_channels == config.input.network_channels == 3
    jax.tree.map(np.testing.assert_array_equal, variables, created)


def test_create_without_weights():
    net, variables, spec = lungjax.create("simple", "none", channels=1)
    assert spec == InputSpec(size=(224, 224), channels=1) and net.outputs == 1000
    assert variables["params"]["stem_conv"]["kernel"].shape == (3, 3, 1, 16)
    assert np.asarray(variables["params"]["head"]["dense"]["kernel"]).std() > 0


def test_create_from_run(trained_run):
    network = lungjax.load(trained_run.workdir).network
    saved, source = flat(network.variables), f"run:{trained_run.workdir}"
    net, variables, spec = lungjax.create("simple", source)
    assert spec == network.config.input and (spec.mean, spec.std) == ((0.3,), (0.2,)) and net.outputs == 3
    created = flat(variables)
    assert created.keys() == saved.keys()
    for path, array in saved.items():
        np.testing.assert_array_equal(created[path], array, err_msg=path)
    net, variables, _ = lungjax.create("simple", source, classes=4)
    assert variables["params"]["head"]["dense"]["bias"].shape == (4,)
    np.testing.assert_array_equal(flat(variables)["stage2_conv/kernel"], saved["stage2_conv/kernel"])
    for name, options, word in (
        ("cbr_tiny", {"classes": 2, "size": 128}, "does not fit"),
        ("simple", {"channels": 3}, "channel"),
        ("simple", {"padding": "same"}, "padding"),
        ("simple", {"head": HeadConfig(hidden=(32, 6))}, "hidden2"),
    ):
        with pytest.raises(ValueError, match=word):
            lungjax.create(name, source, **options)


def test_preprocess_values():
    spec = InputSpec(size=(2, 2), channels=3, mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 1.0))
    image = np.asarray([[[255, 0, 51], [0, 255, 0]], [[51, 51, 51], [102, 0, 255]]], np.uint8)
    expected = np.asarray([[[1, -1, 0.2], [-1, 3, 0]], [[-0.6, -0.2, 0.2], [-0.2, -1, 1]]])
    for images in (image, [image], image[None], image.astype(np.float32)):
        np.testing.assert_allclose(lungjax.preprocess(images, spec), expected[None], atol=1e-6)
    gray = np.asarray([[0, 51, 0, 51, 0], [102, 255, 0, 0, 0]], np.uint8)
    spec = InputSpec(size=(2, 5), channels=1, mean=(0.2,), std=(0.4,))
    for images in (gray, [gray], gray[None], gray[..., None], [gray[..., None]]):
        np.testing.assert_allclose(lungjax.preprocess(images, spec)[0, ..., 0], (gray / 255 - 0.2) / 0.4, atol=1e-6)
    three = lungjax.preprocess(gray, replace(spec, mean=(0.2, 0.0, 0.2), std=(0.4, 1.0, 0.4)))
    np.testing.assert_allclose(three[0, 1, 1], [2, 1, 2], atol=1e-6)
    # Two images of different size, each reduced to one pixel; a color becomes its luma.
    spec = InputSpec(size=(1, 1), channels=1, mean=(0.0,), std=(1.0,))
    pair = [np.asarray([[0, 52], [100, 252]], np.uint8), np.full((2, 7), 51, np.uint8)]
    assert lungjax.preprocess(pair, spec).ravel() == pytest.approx([101 / 255, 0.2], abs=1e-6)
    color = lungjax.preprocess(np.asarray([[[200, 100, 50]]], np.uint8), spec)
    assert color.item() == pytest.approx(round(0.299 * 200 + 0.587 * 100 + 0.114 * 50) / 255)


def test_preprocess_files_and_boxes(tmp_path):
    image = np.zeros((40, 60), np.uint8)
    image[10:20, 30:50] = 200
    path = tmp_path / "a.png"
    path.write_bytes(encoded(image))
    spec = InputSpec(size=(4, 4), channels=1, crop="box", mean=(0.0,), std=(1.0,))
    inside, outside = lungjax.preprocess([path, str(path)], spec, [(30, 10, 50, 20), (0, 20, 30, 40)])
    assert inside == pytest.approx(200 / 255) and outside == pytest.approx(0)
    assert lungjax.preprocess(str(path), spec).shape == (1, 4, 4, 1)
    with pytest.raises(ValueError, match="boxes"):
        lungjax.preprocess([path, path], spec, [(0, 0, 4, 4)])


def test_preprocess_errors():
    for images, word in (
        ([np.zeros((9, 9, 3), np.uint8), np.zeros((9, 9, 4), np.uint8)], r"image 1: shape \(9, 9, 4\)"),
        (np.zeros((2, 9, 9, 4), np.uint8), "shape"), ([np.zeros((0, 9), np.uint8)], "shape"),
        (np.ones((9, 9)), "float64 from 1 to 1"), (np.full((9, 9), 300.0), "from 300 to 300"),
        (np.full((9, 9), np.nan), "nan"), (np.full((9, 9), -1.0), "from -1"), (np.zeros((9, 9), np.uint16), "16-bit"),
        ([], "no image"), ("absent.png", "absent.png"), (__file__, "test_api.py"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=word):
            lungjax.preprocess(images, InputSpec(size=(8, 8), channels=3))


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
