"""The Python API: networks by name, images in, and a trained run that predicts as its report says."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from conftest import png, without_pictures
from weight_writers import CLASSES, HALVED, KERAS, SIDE, install, leaves, write

import lungjax
from lungjax import models
from lungjax.config import Config, EvalConfig, HeadConfig, InputSpec, ModelConfig, OptimConfig, TrainConfig, overrides
from lungjax.evaluation import predictions
from lungjax.models import trees
from lungjax.runtime import mesh
from lungjax.training import program, train
from lungjax.weights import load as loading

RUN = Config(
    input=InputSpec(size=(SIDE, SIDE), interpolation="bicubic", mean=(0.3,), std=(0.2,)),
    model=ModelConfig(name="small", padding="same", epsilon=2e-3, head=HeadConfig(hidden=(6,), dropout=0.0)),
    optim=OptimConfig(lr=3e-3),
    train=TrainConfig(batch_size=8, steps=3, eval_steps=3, monitor="slice.accuracy"),
    eval=EvalConfig(batch_size=8, examples=1, draws=0),
)


@pytest.fixture
def zoo(monkeypatch, tmp_path):
    install(monkeypatch)
    monkeypatch.setenv("LUNGJAX_WEIGHTS", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, small_data):
    """A run of a few steps on gray images."""
    folder = tmp_path_factory.mktemp("api") / "run"
    with pytest.MonkeyPatch.context() as patch:
        install(patch)
        patch.setattr(train, "open_dataset", lambda name, *_, **__: small_data)
        without_pictures(patch)
        train.run(RUN, folder, folder.parent)
    return folder


def flat(variables):
    return {path: np.asarray(leaf) for tree in variables.values() for path, leaf in trees.flatten(tree).items()}


def outputs(net, variables, shape):
    """Logits and last map as shapes and dtypes, without computing any."""
    logits, features = jax.eval_shape(lambda: net.apply(variables, np.zeros(shape, np.float32), train=False))
    return logits, features["last"]


# Names


def test_networks_are_listed_by_pattern_and_by_weights():
    every = lungjax.list_models()
    assert set(every) == set(models.MODELS) and len(every) > 60
    assert lungjax.list_models("efficientnetv2_*")[-1] == "efficientnetv2_xl"
    assert lungjax.list_models("vgg??") == ["vgg16", "vgg19"]
    assert lungjax.list_models("no*") == []
    public, none = lungjax.list_models(weights=True), lungjax.list_models(weights=False)
    assert sorted(public + none) == sorted(every)
    assert "convnextv2_atto" in public and {"cbr_small", "simple", "xray_cnn"} <= {*none}


# Networks


def test_a_new_head_on_the_weights(zoo):
    ours = leaves()
    write(zoo, "h5", ours)
    net, variables, spec = lungjax.create("tiny", weights="imagenet", classes=3, weights_dir=zoo)
    found = flat(variables)
    assert (found["head/dense/kernel"].shape, found["head/dense/bias"].shape) == ((16, 3), (3,))
    assert found["head/dense/kernel"].std() > 0.01
    for path in ours.keys() - {"head/dense/kernel", "head/dense/bias"}:
        np.testing.assert_array_equal(found[path], ours[path], err_msg=path)
    other = flat(lungjax.create("tiny", classes=3, weights_dir=zoo, seed=1)[1])
    assert (other["head/dense/kernel"] != found["head/dense/kernel"]).any()
    assert spec == KERAS.input
    logits, last = outputs(net, variables, (2, SIDE, SIDE, 3))
    assert logits.shape == (2, 3) and last.shape == (2, 8, 8, 16)
    # The same count as the weights' is a new head as well: it was asked for.
    same = flat(lungjax.create("tiny", classes=CLASSES, weights_dir=zoo)[1])
    assert (same["head/dense/kernel"] != ours["head/dense/kernel"]).any()


def test_another_size_head_and_further_fields(zoo):
    ours = leaves()
    write(zoo, "h5", ours)
    head = HeadConfig(hidden=(7,), pool="max")
    net, variables, spec = lungjax.create(
        "tiny", classes=2, size=(48, 40), head=head, weights_dir=zoo, dtype="bfloat16", drop_path=0.1
    )
    assert spec == replace(KERAS.input, size=(48, 40))
    assert variables["params"]["head"]["hidden1"]["kernel"].shape == (16, 7)
    assert (net.drop_path, net.head.pool, net.head.dropout) == (0.1, "max", 0.2)
    images = lungjax.preprocess(np.zeros((9, 9, 3), np.uint8), spec)
    assert images.shape == (1, 48, 40, 3) and images.dtype == np.float32
    logits, last = outputs(net, variables, images.shape)
    assert logits.dtype == np.float32 and last.dtype == "bfloat16" and logits.shape == (1, 2)
    with pytest.raises(ValueError, match=r"only in the network: head/hidden1/kernel"):
        lungjax.create("tiny", size=48, head=head, weights_dir=zoo)  # the weights' own classes, on another head


def test_without_weights_everything_is_random_and_input_is_plain(zoo):
    net, variables, spec = lungjax.create("small", "none", channels=1)
    assert spec == InputSpec(size=(224, 224), channels=1) and net.outputs == 1000
    assert variables["params"]["stem_conv"]["kernel"].shape == (3, 3, 1, 4)
    assert np.asarray(variables["params"]["head"]["dense"]["kernel"]).std() > 0


# Images


def test_preprocessing_by_hand():
    spec = InputSpec(size=(2, 2), channels=3, mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 1.0))
    image = np.asarray([[[255, 0, 51], [0, 255, 0]], [[51, 51, 51], [102, 0, 255]]], np.uint8)
    expected = np.asarray([[[1, -1, 0.2], [-1, 3, 0]], [[-0.6, -0.2, 0.2], [-0.2, -1, 1]]])
    for images in (image, [image], image[None], image.astype(np.float32)):
        np.testing.assert_allclose(lungjax.preprocess(images, spec), expected[None], atol=1e-6)
    gray = np.asarray([[0, 51, 0, 51, 0], [102, 255, 0, 0, 0]], np.uint8)
    one = InputSpec(size=(2, 5), channels=1, mean=(0.2,), std=(0.4,))
    expected = np.asarray([[-0.5, 0.0, -0.5, 0.0, -0.5], [0.5, 2.0, -0.5, -0.5, -0.5]])
    for images in (gray, [gray], gray[None], gray[..., None], [gray[..., None]]):
        np.testing.assert_allclose(lungjax.preprocess(images, one)[0, ..., 0], expected, atol=1e-6)
    three = lungjax.preprocess(gray, replace(one, mean=(0.2, 0.0, 0.2), std=(0.4, 1.0, 0.4)))
    np.testing.assert_allclose(three[0, 1, 1], [2, 1, 2], atol=1e-6)
    # Two images of different size in one call, each halved.
    small = InputSpec(size=(1, 1), channels=1, mean=(0.0,), std=(1.0,))
    pair = [np.asarray([[0, 52], [100, 252]], np.uint8), np.full((2, 7), 51, np.uint8)]
    assert lungjax.preprocess(pair, small).ravel() == pytest.approx([101 / 255, 0.2], abs=1e-6)


def test_colour_meets_a_gray_network_as_in_the_pipeline():
    spec = InputSpec(size=(1, 1), channels=1, mean=(0.0,), std=(1.0,))
    image = np.asarray([[[200, 100, 50]]], np.uint8)
    luma = round(0.299 * 200 + 0.587 * 100 + 0.114 * 50)
    for images in (image, image.astype(np.float32)):
        assert lungjax.preprocess(images, spec).item() == pytest.approx(luma / 255)


def test_files_and_boxes(tmp_path):
    image = np.zeros((40, 60), np.uint8)
    image[10:20, 30:50] = 200
    (tmp_path / "a.png").write_bytes(png(image))
    spec = InputSpec(size=(4, 4), channels=1, crop="box", mean=(0.0,), std=(1.0,))
    found = lungjax.preprocess([tmp_path / "a.png", str(tmp_path / "a.png")], spec, [(30, 10, 50, 20), (0, 20, 30, 40)])
    assert found[0] == pytest.approx(200 / 255) and found[1] == pytest.approx(0)
    assert lungjax.preprocess(str(tmp_path / "a.png"), spec).shape == (1, 4, 4, 1)


@pytest.mark.parametrize(
    "images,message",
    [
        (
            np.zeros((9, 9, 4), np.uint8),
            r"image 0: shape \(9, 9, 4\); allowed are \[H, W\], \[H, W, 1\] and \[H, W, 3\]",
        ),
        ([np.zeros((9, 9, 3), np.uint8), np.zeros((9, 9, 4), np.uint8)], r"image 1: shape \(9, 9, 4\)"),
        (np.zeros((2, 9, 9, 4), np.uint8), r"image 0: shape \(9, 9, 4\)"),
        ([np.zeros((0, 9), np.uint8)], r"image 0: shape \(0, 9\)"),
        (np.ones((9, 9)), "image 0: float64 from 1 to 1; allowed are uint8, and float in 0..255"),
        (np.full((9, 9), 300.0), "from 300 to 300"),
        (np.full((9, 9), np.nan), "from nan to nan"),
        (np.full((9, 9), -1.0), "from -1 to -1"),
        (np.zeros((9, 9), np.uint16), "image 0: uint16; allowed"),
        ([], "no image was given"),
        ("absent.png", "absent.png: .*No such file"),
        (__file__, "test_api.py: "),
    ],
)
def test_what_is_no_image_is_refused(images, message):
    with pytest.raises(ValueError, match=message):
        lungjax.preprocess(images, InputSpec(size=(8, 8), channels=3))


def test_boxes_are_one_an_image():
    with pytest.raises(ValueError, match="2 images with 1 boxes"):
        lungjax.preprocess(np.zeros((2, 9, 9), np.uint8), InputSpec(size=(8, 8)), [(0, 0, 4, 4)])


# Runs


def test_a_run_predicts_as_its_report_says(zoo, workdir, small_data, tmp_path):
    run = lungjax.load(workdir)
    assert run.classes == ("left", "middle", "right") and run.config == overrides.from_json(
        (workdir / "config.json").read_text()
    )
    saved = predictions.read(workdir / "predictions_test.csv")
    rows = [int(name.partition(".")[0]) for name in saved.ids]
    paths = [tmp_path / f"{row}.png" for row in rows]
    for path, row in zip(paths, rows, strict=True):
        path.write_bytes(small_data.records[row]["image"])
    found = run.predict(paths)
    assert found.shape == (13, 3) and found.dtype == np.float32
    np.testing.assert_allclose(found, saved.probabilities, atol=2e-6)
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(run.predict(paths[:1]), found[:1], atol=2e-6)


def test_a_run_gives_features_of_any_number_of_images(zoo, workdir):
    run = lungjax.load(str(workdir))
    run = replace(run, config=replace(run.config, eval=EvalConfig(batch_size=3)))
    images = np.random.default_rng(0).integers(0, 256, (7, 40, 40), dtype=np.uint8)
    pooled, maps = run.features(images), run.features(images, pool=False)
    assert pooled.shape == (7, 8) and maps.shape == (7, 8, 8, 8) and pooled.dtype == np.float32
    np.testing.assert_allclose(pooled, maps.mean((1, 2)), atol=1e-6)
    np.testing.assert_allclose(run.features(images[6])[0], pooled[6], atol=1e-5)


def test_no_run_is_no_run(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path}: no trained run there"):
        lungjax.load(tmp_path)


def test_a_network_from_a_run(zoo, workdir):
    run = lungjax.load(workdir)
    net, variables, spec = lungjax.create("small", f"run:{workdir}")
    assert spec == RUN.input and (net.padding, net.epsilon) == ("same", 2e-3)
    found, saved = flat(variables), flat(run.variables)
    assert found.keys() == saved.keys() and found["head/hidden1/kernel"].shape == (8, 6)
    for path, array in saved.items():
        np.testing.assert_array_equal(found[path], array, err_msg=path)
    net, variables, _ = lungjax.create("small", f"run:{workdir}", classes=4)
    assert variables["params"]["head"]["dense"]["bias"].shape == (4,)
    np.testing.assert_array_equal(flat(variables)["stage2_conv/kernel"], saved["stage2_conv/kernel"])


def test_a_run_that_does_not_fit_is_refused(zoo, workdir):
    with pytest.raises(ValueError, match=r"model.weights=run:.* \(small\) does not fit \(") as error:
        lungjax.create("small_wide", f"run:{workdir}", classes=2)
    wrong = "stage2_conv/kernel: stage2_conv/kernel (3, 3, 4, 8) gives (3, 3, 4, 8), wanted (3, 3, 4, 16)"
    assert wrong in str(error.value)
    with pytest.raises(ValueError, match="stem_conv/kernel: the weights are for 1 channel.*set input.channels=1"):
        lungjax.create("small", f"run:{workdir}", channels=3)
    with pytest.raises(ValueError, match="model.padding='valid': the weights of .*run are for 'same'"):
        lungjax.create("small", f"run:{workdir}", padding="valid")
    with pytest.raises(ValueError, match=r"only in the network: head/hidden2/bias"):
        lungjax.create("small", f"run:{workdir}", head=HeadConfig(hidden=(6, 6)))


def test_a_runs_input_reaches_the_next_run(workdir, zoo):
    config = loading.resolve(replace(RUN, model=ModelConfig(name="small", weights=f"run:{workdir}"), input=InputSpec()))
    assert (config.input.mean, config.input.std) == ((0.3,), (0.2,))
    assert (config.model.padding, config.model.epsilon) == ("same", 2e-3)


def test_training_starts_from_the_same_numbers(zoo, small_data):
    """Gray images, weights for colour: three channels in the step, the weights' own scale, a new classifier."""
    ours = leaves()
    write(zoo, "safetensors", ours)
    config = replace(RUN, model=ModelConfig(name="tiny", weights="half"), input=InputSpec(size=(SIDE, SIDE)))
    config = loading.resolve(config)
    labels = small_data.columns["label"][small_data.rows("train")]
    compiled = program.build(config, small_data.classes, labels, mesh.make_mesh())
    this = train.Run(config, zoo / "run", small_data, compiled, 0.0)
    assert this.config.input.mean == HALVED.input.mean and this.config.input.network_channels == 3
    start = train.initial_leaves(this, zoo)
    current = jax.eval_shape(compiled.new_state, start)
    assert current.params["stem_conv"]["kernel"].shape == (3, 3, 3, 8)
    assert ours.keys() - start.keys() == {"head/dense/kernel", "head/dense/bias"}
    for path, array in start.items():
        np.testing.assert_array_equal(array, ours[path], err_msg=path)
