"""Weights of every format reach the network as the very numbers, or an error says by name what is wrong."""

import hashlib
import re
from dataclasses import replace

import jax
import numpy as np
import pytest
from scipy import stats
from weight_writers import FORMATS, HALVED, KERAS, TORCH, install, leaves, write

import lungjax
from lungjax.config import Config, InputSpec, ModelConfig
from lungjax.models import trees
from lungjax.weights import catalogue, identify, load

ALL = pytest.mark.parametrize("form", FORMATS)
PHOTO = np.random.default_rng(0).integers(0, 256, (40, 50), dtype=np.uint8)


@pytest.fixture
def zoo(monkeypatch, tmp_path):
    install(monkeypatch)
    monkeypatch.setenv("LUNGJAX_WEIGHTS", str(tmp_path / "cache"))
    return tmp_path


def flat(variables):
    return {path: np.asarray(leaf) for tree in variables.values() for path, leaf in trees.flatten(tree).items()}


def logits(net, variables, images):
    return np.asarray(jax.jit(lambda v, x: net.apply(v, x, train=False)[0])(variables, images))


def model(**fields):
    return ModelConfig(name="tiny", **fields)


def resolved(channels=1, mean=None, std=None, **fields):
    spec = InputSpec(size=(32, 32), channels=channels, mean=mean, std=std)
    return load.resolve(Config(input=spec, model=ModelConfig(**({"name": "tiny"} | fields))))


# What a file holds


@ALL
def test_each_format_gives_the_very_arrays(zoo, form):
    ours = leaves()
    _, variables, _ = lungjax.create("tiny", f"file:{write(zoo, form, ours)}")
    found = flat(variables)
    assert found.keys() == ours.keys()
    for path, array in ours.items():
        assert found[path].dtype == np.float32
        np.testing.assert_array_equal(found[path], array, err_msg=path)


@ALL
def test_a_tensor_too_few_too_many_or_turned_is_named(zoo, form):
    writer, named, known = FORMATS[form]
    whole = named(leaves())
    kernel = next(name for name in whole if re.search(r"block2a_project_conv|blocks\.1\.0\.conv_pwl", name))
    extra = kernel.replace("project_conv", "project_conv2").replace("conv_pwl", "conv_pwl2")
    ours = "stage2_block1/project_conv/kernel"
    turned = whole[kernel].swapaxes(-1, -2) if whole[kernel].shape[-1] > 1 else whole[kernel].swapaxes(0, 1)
    changes = {
        "few": ({k: v for k, v in whole.items() if k != kernel}, f"only in the network: {ours} (1, 1, 48, 12)"),
        "many": (whole | {extra: np.ones(3, np.float32)}, f"only in the file: {extra} (3,)"),
        "turned": (whole | {kernel: turned.copy()}, f"{ours}: {kernel} {turned.shape} gives (1, 1, 12, 48), wanted"),
    }
    for change, (tensors, line) in changes.items():
        folder = zoo / change
        folder.mkdir()
        path = writer(folder / known, tensors)
        with pytest.raises(ValueError, match=r"does not fit \(1 names\)") as error:
            lungjax.create("tiny", f"file:{path}")
        assert str(error.value).startswith(f"{path} (tiny.") and line in str(error.value)
        assert len(str(error.value).splitlines()) == 2


@ALL
def test_a_truncated_file_is_refused(zoo, form):
    path = write(zoo, form, leaves())
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 4])
    with pytest.raises(ValueError, match=re.escape(str(path))):
        lungjax.create("tiny", f"file:{path}")


def test_half_precision_files_become_single(zoo):
    half = {path: array.astype(np.float16) for path, array in leaves().items()}
    found = flat(lungjax.create("tiny", f"file:{write(zoo, 'safetensors', half)}")[1])
    assert {array.dtype for array in found.values()} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(found["top_conv/kernel"], half["top_conv/kernel"])


# Which file it is


def test_a_file_of_another_network_says_which(zoo):
    other = write(zoo, "h5", leaves("wide"), "some.h5")
    with pytest.raises(ValueError, match=r"stem_conv/kernel|top_conv/kernel") as error:
        lungjax.create("tiny", f"file:{other}")
    assert "some.h5: python -m lungjax.weights --check says: the tensors of wide.keras; no published checksum" in str(
        error.value
    )
    with pytest.raises(ValueError) as error:
        lungjax.create("mobilenetv2", f"file:{other}")
    start = rf"{other}: its tensors \(block1a_bn/moving_mean, .*\) are not named as in any weights of mobilenetv2; "
    assert re.match(f"{start}python -m lungjax.weights --check says: the tensors of wide.keras", str(error.value))
    strange = zoo / "strange.npz"
    np.savez(strange, a=np.ones(2), b=np.ones(3))
    with pytest.raises(ValueError, match=f"any weights of tiny; python -m lungjax.weights --check {strange} says"):
        lungjax.create("tiny", f"file:{strange}")


def test_a_renamed_file_that_may_be_several_is_refused(zoo):
    path = write(zoo, "safetensors", leaves(), "weights.safetensors")
    message = r"may be any of tiny.half, tiny.torch, .*: rename it as .*tiny_half.safetensors or tiny_torch.safetensors"
    with pytest.raises(ValueError, match=message):
        lungjax.create("tiny", f"file:{path}")
    path.rename(zoo / TORCH.filename)
    net, _, spec = lungjax.create("tiny", f"file:{zoo / TORCH.filename}")
    assert (net.padding, net.epsilon, spec.mean) == ("symmetric", 1e-5, TORCH.input.mean)


def test_the_hubs_folder_names_its_file(zoo):
    ours = leaves()
    write(zoo / "tiny_torch", "safetensors", ours, "model.safetensors")
    assert lungjax.create("tiny", f"file:{zoo}/tiny_torch/model.safetensors")[0].padding == "symmetric"
    assert lungjax.create("tiny", "torch", weights_dir=zoo)[0].padding == "symmetric"
    write(zoo / "elsewhere", "safetensors", ours, "model.safetensors")
    with pytest.raises(ValueError, match="may be any of tiny.half, tiny.torch"):
        lungjax.create("tiny", f"file:{zoo}/elsewhere/model.safetensors")


def test_a_published_checksum_names_a_renamed_file(zoo, monkeypatch):
    path = write(zoo, "safetensors", leaves(), "weights.safetensors")
    known = replace(TORCH, checksum=f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}")
    monkeypatch.setattr(catalogue, "RECORDS", (KERAS, HALVED, known))
    assert identify.record_of(path, "tiny") == known


def test_the_real_zoo_tells_or_asks(tmp_path, monkeypatch):
    shapes = identify.shapes("efficientnet_b0", 1000)
    names = {f"blocks.{i}.0.bn1.weight": (4,) for i in range(7)} | {
        "conv_stem.weight": shapes["stem_conv/kernel"][::-1]
    }
    path = tmp_path / "mine.safetensors"
    FORMATS["safetensors"][0](path, {name: np.ones(shape, np.float32) for name, shape in names.items()})
    with pytest.raises(ValueError, match=r"efficientnet_b0.aa_in1k.*efficientnet_b0.ra_in1k.*rename it"):
        identify.record_of(path, "efficientnet_b0")
    assert identify.record_of(path, "efficientnet_lite3").name == "efficientnet_lite3.in1k"  # its only one


def test_a_wrong_checksum_is_refused(zoo, monkeypatch):
    path = write(zoo, "h5", leaves())
    right = hashlib.md5(path.read_bytes()).hexdigest()
    monkeypatch.setattr(catalogue, "RECORDS", (replace(KERAS, checksum=f"md5:{right}"),))
    lungjax.create("tiny", weights_dir=zoo)
    monkeypatch.setattr(catalogue, "RECORDS", (replace(KERAS, checksum="md5:" + "0" * 32),))
    with pytest.raises(ValueError, match=f"tiny.h5 is not tiny.keras, or damaged: md5 {right}, published 0000"):
        lungjax.create("tiny", weights_dir=zoo)


def test_a_file_that_is_nowhere_is_asked_for(zoo):
    with pytest.raises(ValueError, match=r"tiny.keras: tiny.h5 is not on this machine.*--set=model.weights=none"):
        lungjax.create("tiny")
    with pytest.raises(ValueError, match="model.weights=file:absent.h5: no such file"):
        lungjax.create("tiny", "file:absent.h5")


# Words that name no weights


@pytest.mark.parametrize(
    "name,weights,message",
    [
        ("tinny", "imagenet", "model.name='tinny': unknown network; the nearest: .*tiny"),
        ("tiny", "imagnet", "model.weights='imagnet': allowed are none, imagenet, .*; the nearest: .*imagenet"),
        ("tiny", "keras5", "the nearest: .*keras"),
        ("tiny", "wide.keras", "model.weights='wide.keras': allowed are"),
        ("cbr_small", "imagenet", "no ImageNet weights of cbr_small are public. --experiment=imagenet_pretrain:model="),
        ("tiny", "run:nowhere", "model.weights=run:nowhere: no trained run in nowhere"),
        ("tiny", "own", "tiny.own: licence cc-by-nc-4.0 forbids commercial use; --set=model.noncommercial=True"),
        ("tiny", "meanvar:own", "forbids commercial use"),
    ],
)
def test_unknown_or_forbidden_sources_are_named(zoo, name, weights, message):
    with pytest.raises(ValueError, match=message):
        lungjax.create(name, weights)


def test_real_noncommercial_weights_want_consent(tmp_path):
    with pytest.raises(ValueError, match=r"convnextv2_atto.fcmae_ft_in1k: licence cc-by-nc-4.0 forbids"):
        lungjax.create("convnextv2_atto")
    path = tmp_path / "convnextv2_atto_1k_224_ema.pt"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="licence cc-by-nc-4.0 forbids"):  # a file on the disk has its licence still
        lungjax.create("convnextv2_atto", f"file:{path}")
    accepted = ModelConfig(name="convnextv2_atto", weights=f"file:{path}", noncommercial=True)
    assert load.parse(accepted).record.name == "convnextv2_atto.facebook"


# What else does not fit


def test_another_class_count_with_the_head_kept_is_refused(zoo):
    path = write(zoo, "h5", leaves(classes=7))
    with pytest.raises(ValueError, match=r"\(2 names\)") as error:
        lungjax.create("tiny", f"file:{path}")
    assert "head/dense/kernel: predictions/kernel (16, 7) gives (16, 7), wanted (16, 5)" in str(error.value)
    assert "head/dense/bias: predictions/bias (7,) gives (7,), wanted (5,)" in str(error.value)
    assert lungjax.create("tiny", f"file:{path}", classes=3)[1]["params"]["head"]["dense"]["bias"].shape == (3,)


def test_sizes_channels_and_classes_out_of_range_are_refused(zoo):
    path = f"file:{write(zoo, 'h5', leaves())}"
    for options, message in [
        ({"channels": 4}, "input.channels=4: allowed are 1, 3"),
        ({"size": 0}, "input.size"),
        ({"classes": 0}, "at least 2"),
        ({"gray": "sum"}, "model.gray='sum': allowed are repeat, fold, slice"),
    ]:
        with pytest.raises(ValueError, match=message):
            lungjax.create("tiny", path, **options)
    with pytest.raises(ValueError, match=r"size=\(31, 64\) is too small for vgg16: it takes \(32, 32\)"):
        lungjax.create("vgg16", "none", size=(31, 64))


# Gray images and three channels


def test_gray_images_repeated_are_the_same_network(zoo):
    write(zoo, "h5", leaves())
    net, variables, spec = lungjax.create("tiny", weights_dir=zoo, channels=1)
    colour, same, colours = lungjax.create("tiny", weights_dir=zoo)
    assert (spec.channels, spec.mean, spec.network_channels) == (1, KERAS.input.mean, 3)
    jax.tree.map(np.testing.assert_array_equal, variables, same)
    gray = lungjax.preprocess(PHOTO, spec)
    expected = lungjax.preprocess(np.stack([PHOTO] * 3, -1), colours)
    np.testing.assert_array_equal(gray, expected)
    np.testing.assert_array_equal(logits(net, variables, gray), logits(colour, same, expected))


def test_gray_images_meet_a_folded_kernel(zoo):
    write(zoo, "safetensors", leaves())
    repeat, three, spec3 = lungjax.create("tiny", "half", weights_dir=zoo, channels=1)
    fold, one, spec1 = lungjax.create("tiny", "half", weights_dir=zoo, channels=1, gray="fold")
    assert spec1.mean == spec1.std == (0.5,) and spec1.network_channels == 1
    assert one["params"]["stem_conv"]["kernel"].shape == (3, 3, 1, 8)
    images1, images3 = (lungjax.preprocess(PHOTO, spec) for spec in (spec1, spec3))
    expected = logits(repeat, three, images3)
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(logits(fold, one, images1), expected, atol=1e-5 * np.ptp(expected))


def test_one_slice_is_the_green_one(zoo):
    ours = leaves()
    write(zoo, "h5", ours)
    _, variables, spec = lungjax.create("tiny", weights_dir=zoo, channels=1, gray="slice")
    np.testing.assert_array_equal(variables["params"]["stem_conv"]["kernel"], ours["stem_conv/kernel"][:, :, 1:2])
    assert (spec.mean, spec.std) == ((0.456,), (0.224,))


def test_folding_is_refused_where_it_would_be_another_network():
    with pytest.raises(ValueError, match=r"model.gray=fold: imagenet of efficientnet_b0 want mean \(0.485, 0.456"):
        resolved(name="efficientnet_b0", weights="imagenet", gray="fold")
    # The variance of a sum is not the sum of variances.
    with pytest.raises(ValueError, match="model.gray=fold: bit_r50x1 standardises its kernels"):
        resolved(name="bit_r50x1", weights="imagenet", gray="fold")
    for name in ("mobilenet", "efficientnetv2_s"):
        assert len(resolved(name=name, weights="imagenet", gray="fold").input.mean) == 1
        assert len(resolved(name=name, weights="imagenet").input.mean) == 3
    assert len(resolved(3, name="efficientnet_b0", weights="imagenet", gray="fold").input.mean) == 3  # nothing to fold


# From a record to the configuration


def test_a_record_reaches_the_configuration_and_only_once(zoo):
    found = resolved(weights="torch")
    assert (found.model.padding, found.model.epsilon) == ("symmetric", 1e-5)
    assert (found.input.mean, found.input.std) == (TORCH.input.mean, TORCH.input.std)
    for gray in ("repeat", "fold", "slice"):
        once = resolved(weights="half", gray=gray)
        assert load.resolve(once) == once
    plain = Config(model=model(weights="none"))
    assert load.resolve(plain) is plain


def test_what_the_user_sets_stays_unless_the_weights_forbid_it(zoo):
    found = resolved(mean=(0.1,), weights="torch", epsilon=1e-5)
    assert (found.input.mean, found.input.std) == ((0.1,) * 3, TORCH.input.std)
    assert resolved(3, mean=(0.1, 0.2, 0.3), weights="keras").input.mean == (0.1, 0.2, 0.3)
    with pytest.raises(ValueError, match="model.epsilon=0.001: the weights tiny.torch are for 1e-05"):
        resolved(weights="torch", epsilon=1e-3)
    with pytest.raises(ValueError, match="model.padding='same': the weights tiny.torch are for 'symmetric'"):
        resolved(weights="torch", padding="same")
    with pytest.raises(ValueError, match="model.padding='symmetric': the weights tiny.keras are for 'same'"):
        resolved(weights="keras", padding="symmetric")  # not a field of the record, but the network's own


def test_a_saved_configuration_does_without_its_file(zoo):
    path = write(zoo, "h5", leaves())
    found = resolved(weights=f"file:{path}")
    path.unlink()
    assert load.resolve(found) == found
    assert load.resolve(replace(found, model=replace(found.model, weights=f"meanvar:file:{path}")))
    with pytest.raises(ValueError, match="no such file"):
        load.resolve(replace(found, input=replace(found.input, mean=None)))


# Random, as wide as the weights


def test_meanvar_has_each_tensors_own_mean_and_variance():
    rng = np.random.default_rng(0)
    source = {
        "a/kernel": rng.gamma(2.0, 3.0, (3, 3, 64, 64)).astype(np.float32),  # far from normal
        "b/kernel": rng.normal(-1, 0.01, (5, 5, 64, 64)).astype(np.float32),
        "c/scale": np.full(8, 2.5, np.float32),
        "c/mean": np.ones(8, np.float32),
        "c/var": np.ones(8, np.float32),
    }
    drawn = load.mean_var(source, seed=1)
    assert drawn.keys() == {"a/kernel", "b/kernel", "c/scale"}
    for path in ("a/kernel", "b/kernel"):
        assert drawn[path].mean() == pytest.approx(source[path].mean(), rel=0.05)
        assert drawn[path].std() == pytest.approx(source[path].std(), rel=0.05)
        assert abs(np.corrcoef(drawn[path].ravel(), source[path].ravel())[0, 1]) < 0.05
        assert (drawn[path].shape, drawn[path].dtype) == (source[path].shape, np.float32)
    assert stats.skew(drawn["a/kernel"], None) == pytest.approx(0, abs=0.1)  # normal, unlike the source
    assert (drawn["c/scale"] == 2.5).all()


def test_meanvar_keeps_new_statistics_and_follows_the_seed(zoo):
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
