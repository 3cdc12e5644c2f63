"""Weight files are told apart by content, read one array at a time, and refused with a reason when damaged."""

import json
import struct
import tracemalloc
import zipfile

import h5py
import ml_dtypes
import numpy as np
import pytest

from lungjax.weights.readers import open_tensors

ARRAYS = {
    "conv1/conv/kernel": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "bn/count": np.asarray(7, np.int64),
    "half": np.linspace(-1, 1, 5).astype(np.float16),
}


def write_safetensors(path, arrays, header=None, tail=b""):
    """Writes a file by hand; `header` maps the header, a dict, to another."""
    fields, data, at = {"__metadata__": {"format": "pt"}}, b"", 0
    kinds = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64", "int64": "I64", "bool": "BOOL"}
    for name, array in arrays.items():
        raw = array.tobytes()
        kind, offsets = kinds[array.dtype.name], [at, at + len(raw)]
        fields[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": offsets}
        data, at = data + raw, at + len(raw)
    text = header(fields) if header else fields
    text = text if isinstance(text, bytes) else json.dumps(text).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data + tail)
    return path


def write_npz(path, arrays):
    with path.open("wb") as file:
        np.savez(file, **arrays)
    return path


def write_h5(path, layers, root="", chunks=0):
    """Writes Keras's legacy format: {layer: {weight: array}}; `chunks` splits the lists of names."""

    def attribute(group, name, values):
        values = [value.encode() for value in values]
        for i in range(chunks):
            group.attrs[f"{name}{i}"] = values[i * len(values) // chunks : (i + 1) * len(values) // chunks]
        if not chunks:
            group.attrs[name] = values

    with h5py.File(path, "w") as file:
        top = file.create_group(root) if root else file
        attribute(top, "layer_names", list(layers))
        for layer, weights in layers.items():
            group = top.require_group(layer)
            attribute(group, "weight_names", list(weights))
            for name, array in weights.items():
                group.create_dataset(name, data=array)
    return path


def h5_of(path, arrays):
    layers = {}
    for name, array in arrays.items():
        layers.setdefault(name.rpartition("/")[0] or "top", {})[f"{name}:0"] = array
    return write_h5(path, layers)


FORMATS = {"safetensors": write_safetensors, "npz": write_npz, "h5": h5_of}


@pytest.mark.parametrize("form", FORMATS)
def test_arrays_come_back_equal_whatever_the_suffix(tmp_path, form):
    with open_tensors(FORMATS[form](tmp_path / "weights.bin", ARRAYS)) as tensors:
        assert tensors.form == form and len(tensors) == 3
        names = dict(zip(ARRAYS, tensors, strict=True))  # in the file's order; h5 puts the layer before "half"
        for name, array in ARRAYS.items():
            found = tensors[names[name]]
            assert found.dtype == array.dtype and found.shape == tensors.shapes[names[name]] == array.shape
            np.testing.assert_array_equal(found, array)
        with pytest.raises(KeyError):
            tensors["absent"]


@pytest.mark.parametrize("form", FORMATS)
def test_a_file_cut_anywhere_is_refused_by_name(tmp_path, form):
    arrays = {f"layer{i}/kernel": np.random.default_rng(i).normal(size=(9, 50)) for i in range(5)}
    whole = FORMATS[form](tmp_path / "whole", arrays).read_bytes()
    for part in (0.0, 0.001, 0.2, 0.5, 0.9, 0.9999):
        cut = tmp_path / "cut"
        cut.write_bytes(whole[: int(part * len(whole))])
        with pytest.raises(ValueError, match="cut: ") as error:
            open_tensors(cut)
        if part > 0.1 and form != "npz":  # a zip's length stands at its end
            assert f"expected {len(whole)} bytes, found {int(part * len(whole))}" in str(error.value)


@pytest.mark.parametrize(
    "content,message",
    [
        (b"", "the file is empty"),
        (b"\n<!DOCTYPE html><html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a Git LFS pointer"),
        (b"\x80\x04K\x01.", "a pickle that torch.save did not write"),
        (b"GIF89a" + bytes(99), "not a file of weights"),
    ],
)
def test_what_is_no_weight_file_is_named(tmp_path, content, message):
    (tmp_path / "w.h5").write_bytes(content)
    with pytest.raises(ValueError, match=f"w.h5: {message}.*safetensors, .npz, .h5 .*.pth"):
        open_tensors(tmp_path / "w.h5")
    with pytest.raises(ValueError, match="a folder"):
        open_tensors(tmp_path)
    with pytest.raises(ValueError, match="no such file"):
        open_tensors(tmp_path / "absent")


def test_safetensors_reads_brain_floats_empty_and_unaligned_arrays(tmp_path):
    arrays = {
        "flag": np.asarray([True, False, True]),  # three bytes, so that all that follow lie across words
        "brain": np.asarray([1.5, -2.0], ml_dtypes.bfloat16),
        "empty": np.zeros((0, 4), np.float32),
        "double": np.linspace(0, 1, 7),
    }
    tensors = open_tensors(write_safetensors(tmp_path / "w", arrays))
    for name, array in arrays.items():
        assert tensors[name].dtype == array.dtype and tensors[name].shape == array.shape
        np.testing.assert_array_equal(tensors[name], array)


def change(name, **fields):
    return lambda header: {**header, name: {**header[name], **fields}}


@pytest.mark.parametrize(
    "header,message",
    [
        (change("b", data_offsets=[12, 40]), "b: F32 .4,. needs 16 bytes, bytes 12 to 40"),
        (change("b", data_offsets=[10, 26]), "b starts at byte 10 of the data, wanted 12"),
        (change("b", data_offsets=[16, 32]), "b starts at byte 16 of the data, wanted 12: a gap"),
        (change("b", shape=[40], data_offsets=[12, 172]), "truncated: expected .* bytes, found"),
        (change("b", shape=[3], data_offsets=[12, 24]), "bytes follow the last tensor"),
        (change("b", shape=[-4]), "not whole numbers"),
        (change("b", shape=[2.0, 2]), "not whole numbers"),
        (change("b", data_offsets=[-4, 12]), "not whole numbers"),
        (change("b", dtype="F31"), "dtype 'F31'; known are F64"),
        (change("b", dtype=["F32"]), "dtype"),
        (change("b", data_offsets=7), "wanted dtype, shape and data_offsets"),
        (lambda header: {**header, "c": None}, "c: wanted dtype"),
        (lambda header: [1], "not a file of weights"),
        (lambda header: b'{"a": ' * 99999, "damaged safetensors header"),
        (lambda header: json.dumps(header).encode()[:-1] + b', "a": {}}', "twice in it: a"),
        (lambda header: b'{"a": \xff}', "damaged safetensors header"),
    ],
)
def test_safetensors_headers_that_lie_are_refused(tmp_path, header, message):
    arrays = {"a": np.ones(3, np.float32), "b": np.ones(4, np.float32)}
    open_tensors(write_safetensors(tmp_path / "good", arrays))
    with pytest.raises(ValueError, match=message):
        open_tensors(write_safetensors(tmp_path / "bad", arrays, header))


def test_a_safetensors_header_of_absurd_length_is_refused(tmp_path):
    (tmp_path / "w").write_bytes(struct.pack("<Q", 1 << 60) + b"{}" * 50)
    with pytest.raises(ValueError, match="a header of 1152921504606846976 bytes"):
        open_tensors(tmp_path / "w")
    (tmp_path / "w").write_bytes(struct.pack("<Q", 5000) + b"{}" * 50)
    with pytest.raises(ValueError, match="truncated: its header needs 5008 bytes, the file has 108"):
        open_tensors(tmp_path / "w")


def test_an_array_costs_its_own_size_and_the_others_nothing(tmp_path):
    size = 1 << 30
    header = {
        "large": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]},
        "middle": {"dtype": "F32", "shape": [1 << 20], "data_offsets": [size, size + (4 << 20)]},
    }
    text = json.dumps(header).encode()
    with (tmp_path / "w").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.seek(size, 1)  # a hole, which takes no disk
        file.write(np.arange(1 << 20, dtype=np.float32).tobytes())
    tracemalloc.start()
    tensors = open_tensors(tmp_path / "w")
    assert tensors.shapes["large"] == (size // 4,)
    assert tracemalloc.get_traced_memory()[1] < 1e6
    assert tensors["middle"].tolist()[-2:] == [(1 << 20) - 2, (1 << 20) - 1]
    tracemalloc.stop()
    tracemalloc.start()
    assert tensors["middle"].size == 1 << 20
    assert tracemalloc.get_traced_memory()[1] < 1.1 * (4 << 20)
    tracemalloc.stop()


def test_npz_never_unpickles_and_sees_damage(tmp_path):
    np.savez(tmp_path / "w.npz", a=np.ones(3), b=np.asarray([{}, None], object))
    with pytest.raises(ValueError, match=r"b.npy: holds Python objects"):
        open_tensors(tmp_path / "w.npz")

    whole = write_npz(tmp_path / "w.npz", {"a": np.ones(9000), "b": np.zeros(3)}).read_bytes()
    at = whole.index(np.ones(9000).tobytes()) + 60_000
    (tmp_path / "w.npz").write_bytes(whole[:at] + b"\x07" + whole[at + 1 :])
    tensors = open_tensors(tmp_path / "w.npz")
    assert tensors["b"].tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match=r"w.npz: a.npy: damaged: Bad CRC"):
        tensors["a"]

    with zipfile.ZipFile(tmp_path / "short.npz", "w") as archive:
        archive.writestr("a.npy", whole[whole.index(b"\x93NUMPY") :][:200])
    with pytest.raises(ValueError, match="a.npy: expected 72128 bytes, found 200"):
        open_tensors(tmp_path / "short.npz")


def test_other_zip_files_are_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "w.zip", "w") as archive:
        archive.writestr("photo.png", b"")
    with pytest.raises(ValueError, match="a zip file, but neither npz nor .pth"):
        open_tensors(tmp_path / "w.zip")
    with zipfile.ZipFile(tmp_path / "m.keras", "w") as archive:
        archive.writestr("config.json", b"{}")
        archive.writestr("model.weights.h5", b"")
    with pytest.raises(ValueError, match="a Keras 3 file.*legacy"):
        open_tensors(tmp_path / "m.keras")


@pytest.mark.parametrize("root,chunks", [("", 0), ("model_weights", 0), ("", 3)])
def test_keras_names_as_in_the_released_files(tmp_path, root, chunks):
    one = np.ones(1, np.float32)
    layers = {
        "input_1": {},  # no weights
        "conv1/conv": {"conv1/conv/kernel:0": one},  # DenseNet
        "block1_conv1": {"block1_conv1_W_1:0": one, "block1_conv1_b_1:0": one},  # VGG
        "expanded_conv/depthwise": {"expanded_conv/depthwise/depthwise_kernel:0": one},  # MobileNetV3: a layer that
        "expanded_conv/depthwise/BatchNorm": {"expanded_conv/depthwise/BatchNorm/gamma:0": one},  # holds another one
        "convnext_tiny_stem": {"convnext_tiny_stem_conv/kernel:0": one, "convnext_tiny_stem_layernorm/gamma:0": one},
        "layer_scale": {"Variable:0": one},
        "predictions": {"predictions/kernel": one},  # Keras 3 writes no ":0"
    }
    tensors = open_tensors(write_h5(tmp_path / "w.h5", layers, root, chunks))
    assert list(tensors) == [
        "conv1/conv/kernel",
        "block1_conv1/block1_conv1_W_1",
        "block1_conv1/block1_conv1_b_1",
        "expanded_conv/depthwise/depthwise_kernel",
        "expanded_conv/depthwise/BatchNorm/gamma",
        "convnext_tiny_stem/convnext_tiny_stem_conv/kernel",
        "convnext_tiny_stem/convnext_tiny_stem_layernorm/gamma",
        "layer_scale/Variable",
        "predictions/kernel",
    ]


def test_two_equal_keras_names_are_numbered(tmp_path):
    with h5py.File(tmp_path / "w.h5", "w") as file:
        file.attrs["layer_names"] = [b"a", b"a/b"]
        file["a/b/c:0"] = np.ones(2)  # the one array that both names can mean
        file["a"].attrs["weight_names"] = [b"b/c:0"]
        file["a/b"].attrs["weight_names"] = [b"c:0"]
    assert list(open_tensors(tmp_path / "w.h5")) == ["a/b/c", "a/b/c#2"]


def test_keras_files_that_lie_are_refused(tmp_path):
    path = tmp_path / "w.h5"
    good = {"a": {"a/kernel:0": np.ones(2), "a/bias:0": np.ones(2)}, "b": {"b/kernel:0": np.ones(2)}}

    def broken(change, message):
        write_h5(path, good)
        with h5py.File(path, "r+") as file:
            change(file)
        with pytest.raises(ValueError, match=message):
            dict(open_tensors(path))

    def replaced(name, **how):
        def change(file):
            del file[name]
            file.create_dataset(name, **how)

        return change

    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["secret"] = np.ones(2)

    def linked(file):
        del file["a/a/bias:0"]
        file["a/a/bias:0"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "secret")

    def emptied(file):
        for name in list(file.attrs):
            del file.attrs[name]

    def keras3(file):
        emptied(file)
        file.create_group("layers")

    broken(lambda file: file["a/a"].pop("bias:0"), "/a/a/bias:0 is listed in weight_names, but not in the file")
    broken(lambda file: file.pop("b"), "layer b is listed in layer_names, but not in the file")
    broken(linked, "/a/a/bias:0 lies in another file")
    broken(replaced("a/a/bias:0", data=["text"]), "dtype object; only numbers are read")
    broken(replaced("a/a/bias:0", shape=2, dtype="f4", external=[(str(tmp_path / "other.h5"), 0, 8)]), "another file")
    broken(emptied, "an HDF5 file without layer_names")
    broken(keras3, "a Keras 3 file .*legacy format.*efficientnetb0.h5")
