"""Weight files are recognized by content, read one array at a time, and rejected with a reason if damaged."""

import os
import zipfile

import h5py
import ml_dtypes
import numpy as np
import pytest
from weight_writers import write_h5, write_layers, write_npz, write_safetensors

from lungjax.weights.readers import open_tensors

FORMATS = pytest.mark.parametrize("write", [write_safetensors, write_npz, write_h5])


@FORMATS
def test_truncated_files(tmp_path, write):
    arrays = {f"layer{i}/kernel": np.random.default_rng(i).normal(size=(9, 50)) for i in range(5)}
    content = write(tmp_path / "w", arrays).read_bytes()
    for part in (0.0, 0.001, 0.2, 0.5, 0.9, 0.9999):
        (tmp_path / "w").write_bytes(content[: int(part * len(content))])
        with pytest.raises(ValueError, match="/w: "):
            open_tensors(tmp_path / "w")


def test_other_files(tmp_path):
    path = tmp_path / "w.h5"
    for content, message in (
        (b"", "the file is empty"), (b"\n<!DOCTYPE html><html>", "a web page"), (b"\x80\x04K\x01.", "a pickle"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a Git LFS pointer"),
        (b"GIF89a" + bytes(99), "not a weight file"),
    ):  # fmt: skip
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"w.h5: {message}.*safetensors, .npz, .h5 .*.pth"):
            open_tensors(path)
    for names, message in ((["photo.png"], "neither npz nor .pth"), (["config.json", "model.weights.h5"], "Keras 3")):
        with zipfile.ZipFile(path, "w") as archive:
            for name in names:
                archive.writestr(name, b"")
        with pytest.raises(ValueError, match=message):
            open_tensors(path)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for other, message in ((tmp_path, "a folder"), (tmp_path / "absent", "no such file"), (pipe, "a device, pipe")):
        with pytest.raises(ValueError, match=message):
            open_tensors(other)


def test_safetensors_dtypes(tmp_path):
    flags, brain = np.asarray([True, False, True]), np.asarray([1.5, -2.0], ml_dtypes.bfloat16)
    arrays = {"flags": flags, "brain": brain, "empty": np.zeros((0, 4), np.float32), "double": np.linspace(0, 1, 7)}
    tensors = open_tensors(write_safetensors(tmp_path / "w", arrays))
    for name, array in arrays.items():
        assert tensors[name].dtype == array.dtype
        np.testing.assert_array_equal(tensors[name], array)


def test_npz_objects_and_damage(tmp_path):
    path, ones = tmp_path / "w.npz", np.ones(9000)
    np.savez(path, a=np.ones(3), b=np.asarray([{}, None], object))
    with pytest.raises(ValueError, match=r"w.npz: b: .*allow_pickle"):
        dict(open_tensors(path))
    content = write_npz(path, {"a": ones, "b": np.zeros(3)}).read_bytes()
    path.write_bytes(content.replace(ones.tobytes(), ones.tobytes()[:-1] + b"\x07"))
    tensors = open_tensors(path)
    assert tensors["b"].tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match=r"w.npz: a: damaged.*CRC"):
        tensors["a"]


def test_keras_names_of_released_files(tmp_path):
    names = {
        "input_1": (),  # no weights
        "conv1/conv": ("kernel",),  # DenseNet
        "block1_conv1": ("block1_conv1_W_1", "block1_conv1_b_1"),  # VGG
        "expanded_conv/depthwise": ("depthwise_kernel",),  # MobileNetV3: nested layers
        "expanded_conv/depthwise/BatchNorm": ("gamma",),
        "convnext_tiny_stem": ("convnext_tiny_stem_conv/kernel", "convnext_tiny_stem_layernorm/gamma"),
        "layer_scale": ("Variable",),
    }
    bare = ("block1_conv1", "convnext_tiny_stem", "layer_scale")  # whose weights are not named after the layer
    layers = {
        layer: {f"{name}:0" if layer in bare else f"{layer}/{name}:0": np.ones(1) for name in weights}
        for layer, weights in names.items()
    }
    layers["predictions"] = {"predictions/kernel": np.ones(1)}  # Keras 3 writes no ":0"
    for root, chunks in (("", 0), ("model_weights", 0), ("", 3)):
        path = write_layers(tmp_path / f"{root}{chunks}.h5", layers, root, chunks)
        expected = [f"{layer}/{name}" for layer, weights in names.items() for name in weights]
        assert list(open_tensors(path)) == [*expected, "predictions/kernel"]
    with h5py.File(tmp_path / "w.h5", "w") as file:
        file.attrs["layer_names"] = [b"a", b"a/b"]
        file["a/b/c:0"] = np.ones(2)  # both names can mean this array
        file["a"].attrs["weight_names"] = [b"b/c:0"]
        file["a/b"].attrs["weight_names"] = [b"c:0"]
    assert list(open_tensors(tmp_path / "w.h5")) == ["a/b/c", "a/b/c#2"]


def test_inconsistent_keras_files(tmp_path):
    path, other = tmp_path / "w.h5", tmp_path / "other.h5"
    layers = {"a": {"a/kernel:0": np.ones(2), "a/bias:0": np.ones(2)}, "b": {"b/kernel:0": np.ones(2)}}
    with h5py.File(other, "w") as file:
        file["secret"] = np.ones(2)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)  # opening it would never end

    def replace(file, link=None, **dataset):
        del file["a/a/bias:0"]
        if link:
            file["a/a/bias:0"] = link
        else:
            file.create_dataset("a/a/bias:0", **dataset)

    def keras3(file):
        del file.attrs["layer_names"]
        file.create_group("layers")

    for change, message in (
        (lambda file: file["a/a"].pop("bias:0"), "bias:0 is listed in weight_names, but missing"),
        (lambda file: file.pop("b"), "layer b is listed in layer_names, but missing"),
        (lambda file: replace(file, h5py.ExternalLink(str(other), "secret")), "stored in another file"),
        (lambda file: replace(file, h5py.ExternalLink(str(pipe), "secret")), "stored in another file"),
        (lambda file: replace(file, h5py.SoftLink("/a/a/kernel:0")), "a link"),
        (lambda file: replace(file, shape=(10**6, 10**6), dtype="f4"), "only 0 bytes"),
        (lambda file: replace(file, shape=2, dtype="f4", external=[(str(other), 0, 8)]), "another file"),
        (lambda file: replace(file, data=["text"]), "dtype object"),
        (lambda file: file.attrs.pop("layer_names"), "without layer_names"),
        (keras3, "Keras 3 file .*legacy format"),
    ):
        with h5py.File(write_layers(path, layers), "r+") as file:
            change(file)
        with pytest.raises(ValueError, match=message):
            open_tensors(path)
