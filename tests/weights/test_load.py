"""Weights of every format reach the network unchanged, or an error says what is wrong."""

import hashlib
from dataclasses import replace

import jax
import numpy as np
import pytest
from scipy import stats
from weight_writers import FORMATS, HALVED, KERAS, TORCH, flat, install, leaves, write

import lungjax
from lungjax.config import Config, InputSpec, ModelConfig
from lungjax.weights import catalogue, download, identify, load

PHOTO = np.random.default_rng(0).integers(0, 256, (40, 50), dtype=np.uint8)


@pytest.fixture
def zoo(monkeypatch, tmp_path):
    return install(monkeypatch, tmp_path)


def logits(net, variables, images):
    return np.asarray(jax.jit(lambda v, x: net.apply(v, x, train=False)[0])(variables, images))


def resolved(channels=1, mean=None, std=None, **fields):
    spec = InputSpec(size=(32, 32), channels=channels, mean=mean, std=std)
    return load.resolve(Config(input=spec, model=ModelConfig(**({"name": "tiny"} | fields))))


@pytest.mark.parametrize("form", FORMATS)
def test_formats(zoo, form):
    ours = leaves()
    if form == "safetensors":
        ours = {path: array.astype(np.float16) for path, array in ours.items()}
    result = flat(lungjax.create("tiny", f"file:{write(zoo, form, ours)}")[1])
    assert result.keys() == ours.keys()
    for path, array in ours.items():
        assert result[path].dtype == np.float32
        np.testing.assert_array_equal(result[path], array, err_msg=path)


def test_file_of_another_network(zoo):
    other = write(zoo, "h5", leaves("wide"), "some.h5")
    for name in ("tiny", "mobilenetv2"):
        with pytest.raises(ValueError, match=r"--check says: the tensors of wide\.keras"):
            lungjax.create(name, f"file:{other}")
    strange = zoo / "strange.npz"
    np.savez(strange, a=np.ones(2), b=np.ones(3))
    with pytest.raises(ValueError, match=f"any weights of tiny; .*--check={strange}"):
        lungjax.create("tiny", f"file:{strange}")


def test_renamed_file_of_several_records(zoo):
    ours = leaves()
    path = write(zoo, "safetensors", ours, "weights.safetensors")
    with pytest.raises(ValueError, match=r"tiny.half, tiny.torch, .*tiny_half.safetensors or tiny_torch.safetensors"):
        lungjax.create("tiny", f"file:{path}")
    path.rename(zoo / TORCH.filename)
    net, _, spec = lungjax.create("tiny", f"file:{zoo / TORCH.filename}")
    assert (net.padding, net.epsilon, spec.mean) == ("symmetric", 1e-5, TORCH.input.mean)
    assert identify.record_of(write(zoo, "h5", ours, "renamed.h5"), "tiny") == KERAS  # the only record that fits
    # The hub's files are all model.safetensors: the folder identifies them.
    path = write(zoo / "tiny_torch", "safetensors", ours, "model.safetensors")
    assert identify.record_of(path, "tiny") == TORCH
    (zoo / TORCH.filename).unlink()
    assert lungjax.create("tiny", "torch", weights_dir=zoo)[0].padding == "symmetric"


def test_recognition_by_checksum(zoo, monkeypatch):
    path = write(zoo, "safetensors", leaves(), "weights.safetensors")
    published = replace(TORCH, checksum=f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}")
    monkeypatch.setattr(catalogue, "RECORDS", (KERAS, HALVED, published))
    monkeypatch.setattr(identify, "open_tensors", lambda path: pytest.fail("opened before its checksum was known"))
    assert identify.record_of(path, "tiny") == published  # although renamed
    assert "tiny.torch (the published checksum)" in identify.identify(path)


def test_unknown_missing_or_forbidden_sources(zoo):
    for name, weights, message in (
        ("tinny", "imagenet", "model.name='tinny'.*did you mean .*tiny"), ("tiny", "keras5", "did you mean .*keras"),
        ("tiny", "imagnet", "model.weights='imagnet': expected none, imagenet, .*did you mean .*imagenet"),
        ("tiny", "wide.keras", "model.weights='wide.keras': expected"), ("tiny", "file:absent.h5", "no such file"),
        ("cbr_small", "imagenet", "--experiment=imagenet_pretrain:model=cbr_small"),
        ("tiny", "run:nowhere", "no trained run in nowhere"), ("tiny", "meanvar:own", "commercial"),
        ("tiny", "imagenet", r"tiny.h5 is not on this machine.*--set=model.weights=none"),
        ("tiny", "own", "cc-by-nc-4.0 .*--set=model.noncommercial=True"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            lungjax.create(name, weights)
    assert load.parse(ModelConfig(name="tiny", weights="own", noncommercial=True)).record.name == "tiny.own"


def test_other_class_count(zoo):
    path = write(zoo, "h5", leaves(classes=7))
    with pytest.raises(ValueError, match=r"\(2 names\)(.|\n)*head/dense/bias: predictions/bias \(7,\)"):
        lungjax.create("tiny", f"file:{path}")
    assert lungjax.create("tiny", f"file:{path}", classes=3)[1]["params"]["head"]["dense"]["bias"].shape == (3,)


def test_repeated_gray_against_color_weights(zoo):
    write(zoo, "h5", leaves())
    *gray, spec = lungjax.create("tiny", weights_dir=zoo, channels=1)
    *color, color_spec = lungjax.create("tiny", weights_dir=zoo)
    assert (spec.channels, spec.mean, spec.network_channels) == (1, KERAS.input.mean, 3) and gray[0] == color[0]
    jax.tree.map(np.testing.assert_array_equal, gray[1], color[1])
    images = lungjax.preprocess(PHOTO, spec)
    np.testing.assert_array_equal(images, lungjax.preprocess(np.stack([PHOTO] * 3, -1), color_spec))


def test_folded_kernel_against_three_channels(zoo):
    write(zoo, "safetensors", leaves())
    repeat, three, spec3 = lungjax.create("tiny", "half", weights_dir=zoo, channels=1)
    fold, one, spec1 = lungjax.create("tiny", "half", weights_dir=zoo, channels=1, gray="fold")
    assert spec1.mean == spec1.std == (0.5,) and spec1.network_channels == 1
    images1, images3 = (lungjax.preprocess(PHOTO, spec) for spec in (spec1, spec3))
    expected = logits(repeat, three, images3)
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(logits(fold, one, images1), expected, atol=1e-5 * np.ptp(expected))


def test_slice_of_the_green_channel(zoo):
    write(zoo, "h5", leaves())
    variables, spec = lungjax.create("tiny", weights_dir=zoo, channels=1, gray="slice")[1:]
    np.testing.assert_array_equal(flat(variables)["stem_conv/kernel"], leaves()["stem_conv/kernel"][:, :, 1:2])
    assert (spec.mean, spec.std) == ((0.456,), (0.224,))


def test_range_of_torchxrayvision():
    config = resolved(name="densenet121", weights="xrv")
    assert config.input.network_channels == 1 and config.model.epsilon == 1e-5
    image = np.arange(256, dtype=np.uint8).repeat(4).reshape(32, 32)
    # torchxrayvision.utils.normalize(image, 255), version 1.5.7
    expected = (2 * (image.astype(np.float32) / 255) - 1.0) * 1024
    actual = lungjax.preprocess(image, config.input)[0, :, :, 0]
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-4)  # one rounding of pixel / 255
    assert (actual.min(), actual.max()) == (-1024, 1024)


def test_one_channel_weights_without_classifier(zoo, monkeypatch):
    spec = replace(HALVED.input, channels=1, mean=(0.5,), std=(1 / 2048,))
    record = replace(HALVED, name="tiny.xray", filename="xray.safetensors", input=spec, classes=0)
    monkeypatch.setattr(catalogue, "RECORDS", (*catalogue.RECORDS, record))
    ours = {path: leaf for path, leaf in leaves(channels=1).items() if not path.startswith("head/")}
    path = write(zoo, "safetensors", ours, "xray.safetensors")
    _, variables, created = lungjax.create("tiny", "xray", 3, weights_dir=zoo)
    assert (created.channels, created.mean, created.network_channels) == (1, (0.5,), 1)
    for name, leaf in ours.items():
        np.testing.assert_array_equal(flat(variables)[name], leaf)
    with pytest.raises(ValueError, match=r"tiny.xray: the file has no classifier; set classes"):
        lungjax.create("tiny", "xray", weights_dir=zoo)
    with pytest.raises(ValueError, match=r"the weights need input.channels=1, but the images have 3"):
        lungjax.create("tiny", "xray", 3, channels=3, weights_dir=zoo)
    with pytest.raises(ValueError, match="xray weights exist for tiny"):
        resolved(name="wide", weights="xray")
    path.rename(zoo / "renamed")
    assert identify.identify(zoo / "renamed").endswith("the tensors of tiny.xray; the file has no published checksum")


def test_weights_of_a_web_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LUNGJAX_WEIGHTS", str(tmp_path))
    record = catalogue.find("resnet50.radimagenet")
    for find in (download.locate, download.download):
        with pytest.raises(ValueError, match=r"in a browser from https://drive\.google.* as RadImageNet-ResNet50"):
            find(record)
    (tmp_path / "mirror").mkdir()
    (tmp_path / "mirror" / record.filename).write_bytes(b"weights")
    monkeypatch.setenv("LUNGJAX_WEIGHTS_URL", f"file://{tmp_path}/mirror")
    assert download.download(record).read_bytes() == b"weights"


def test_fold_of_unequal_channels():
    for name, message in (("efficientnet_b0", "differ by channel"), ("bit_r50x1", "standardizes")):
        with pytest.raises(ValueError, match=message):
            resolved(name=name, weights="imagenet", gray="fold")
    for name in ("mobilenet", "efficientnetv2_s"):
        assert len(resolved(name=name, weights="imagenet", gray="fold").input.mean) == 1
        assert len(resolved(name=name, weights="imagenet").input.mean) == 3
    assert len(resolved(3, name="efficientnet_b0", weights="imagenet", gray="fold").input.mean) == 3  # nothing to fold


def test_resolved_configuration(zoo):
    for gray in ("repeat", "fold", "slice"):
        once = resolved(weights="half", gray=gray)
        assert load.resolve(once) == once
    plain = Config(model=ModelConfig(name="tiny", weights="none"))
    assert load.resolve(plain) is plain


def test_user_fields_and_corrections(zoo):
    config = resolved(mean=(0.1,), weights="torch", epsilon=1e-5)
    assert (config.input.mean, config.input.std) == ((0.1,) * 3, TORCH.input.std)
    assert resolved(3, mean=(0.1, 0.2, 0.3), weights="keras").input.mean == (0.1, 0.2, 0.3)
    for fields, message in (
        ({"weights": "torch", "epsilon": 1e-3}, "model.epsilon=0.001: .* 1e-05"),
        ({"weights": "torch", "padding": "same"}, "model.padding='same': .* 'symmetric'"),
        # Not a field of the record, but the network's own.
        ({"weights": "keras", "padding": "symmetric"}, "model.padding='symmetric': .* 'same'"),
    ):
        with pytest.raises(ValueError, match=message):
            resolved(**fields)


def test_saved_configuration_without_the_file(zoo):
    path = write(zoo, "h5", leaves())
    config = resolved(weights=f"file:{path}")
    path.unlink()
    assert load.resolve(config) == config
    assert load.resolve(replace(config, model=replace(config.model, weights=f"meanvar:file:{path}")))
    with pytest.raises(ValueError, match="no such file"):
        load.resolve(replace(config, input=replace(config.input, mean=None)))


def test_meanvar_statistics():
    rng = np.random.default_rng(0)
    source = {
        "a/kernel": rng.gamma(2.0, 3.0, (3, 3, 64, 64)).astype(np.float32),  # far from a normal distribution
        "b/kernel": rng.normal(-1, 0.01, (5, 5, 64, 64)).astype(np.float32),
    }
    random = load.mean_var(source | {"c/scale": np.full(8, 2.5), "c/mean": np.ones(8), "c/var": np.ones(8)}, seed=1)
    assert random.keys() == {"a/kernel", "b/kernel", "c/scale"} and (random["c/scale"] == 2.5).all()
    for path, array in source.items():
        assert (random[path].mean(), random[path].std()) == pytest.approx((array.mean(), array.std()), rel=0.05)
        assert abs(np.corrcoef(random[path].ravel(), array.ravel())[0, 1]) < 0.05
        assert (random[path].shape, random[path].dtype) == (array.shape, np.float32)
    assert stats.skew(random["a/kernel"], None) == pytest.approx(0, abs=0.1)  # normal, unlike the source


def test_meanvar_seed_and_new_statistics(zoo):
    ours = leaves()
    write(zoo, "h5", ours)
    one, again, other = (
        flat(lungjax.create("tiny", "meanvar:imagenet", weights_dir=zoo, seed=seed)[1]) for seed in (0, 0, 1)
    )
    for path, array in one.items():
        np.testing.assert_array_equal(again[path], array)
        if path.endswith(("/mean", "/var")):
            assert (array == path.endswith("/var")).all()
        else:
            assert (array != other[path]).any() and (array != ours[path]).any()
