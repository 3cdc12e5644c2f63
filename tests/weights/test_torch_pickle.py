"""Both formats of PyTorch are read without torch, and malicious pickles are rejected before they run anything."""

import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest
import torch_writers
from torch_writers import array_of, call, mapping, name, number, row, state_dict, storage, tensor, text, write_zip

from lungjax.weights.readers import open_tensors

BOTH = pytest.mark.parametrize("write", [write_zip, torch_writers.write_stream])
NUMBERS = np.arange(24, dtype=np.float32).reshape(4, 6)
RAW = {"0": NUMBERS.tobytes()}
module = torch_writers.module
LAYER, NETWORK = name("torch.nn.modules.conv", "Conv2d"), name("torchxrayvision.models", "DenseNet")


@BOTH
def test_tensors_of_one_storage(tmp_path, write):
    shared = storage("0", "Float", 24, b"N")
    parameter = call(name("torch._utils", "_rebuild_parameter"), tensor(shared, (24,), (1,)), b"\x88", b"}")
    tree = state_dict({
        "complete": tensor(shared, (4, 6), (6, 1)), "transposed": tensor(shared, (6, 4), (1, 6)),
        "window": tensor(shared, (2, 3), (6, 1), offset=8), "scalar": tensor(storage("1", "Float", 1), (), ()),
        "empty": tensor(storage("2", "Float", 0), (0, 4), (4, 1)), "parameter": parameter,
    })  # fmt: skip
    tensors = open_tensors(write(tmp_path / "w.h5", tree, RAW | {"1": np.float32(5).tobytes(), "2": b""}))
    expected = {
        "complete": NUMBERS, "transposed": NUMBERS.T, "window": NUMBERS[1:3, 2:5], "scalar": np.float32(5),
        "empty": np.zeros((0, 4)), "parameter": NUMBERS.ravel(),
    }  # fmt: skip
    assert tensors.shapes == {key: array.shape for key, array in expected.items()}
    for key, array in expected.items():
        np.testing.assert_array_equal(tensors[key], array)


def test_dtypes(tmp_path):
    for compress in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        for dtype in (np.float16, ml_dtypes.bfloat16, np.float64, np.int64, np.bool_):
            array = np.asarray([[1, 0, 3]], dtype)
            tree = state_dict({"a": array_of("0", array)})
            result = open_tensors(write_zip(tmp_path / "w", tree, {"0": array.tobytes()}, compress))["a"]
            assert result.dtype == array.dtype
            np.testing.assert_array_equal(result, array)


@BOTH
def test_removal_of_wrappers(tmp_path, write):
    for wrapper in ("model", "state_dict"):
        tree = mapping(epoch=number(3), **{wrapper: state_dict({"module.a": array_of("0", NUMBERS)})})
        np.testing.assert_array_equal(open_tensors(write(tmp_path / "w", tree, RAW))["a"], NUMBERS)


@BOTH
def test_pickled_module(tmp_path, write):
    """torchxrayvision's DenseNet files are modules; the older format stores the source code of their classes."""
    kinds = [LAYER, NETWORK]
    if write is torch_writers.write_stream:
        kinds = [row(text("module"), kind, text("models.py"), text("raise SystemExit")) + b"Q" for kind in kinds]
    parameter = call(name("torch._utils", "_rebuild_parameter"), array_of("0", NUMBERS), b"\x88", b"}")
    names = call(name("__builtin__", "set"), b"](" + text("b") + b"e")
    backend = call(name("torch.nn.backends.thnn", "_get_thnn_function_backend"))
    layer = module(
        kinds[0], text("weight") + parameter + text("bias") + b"N", text("mean") + array_of("1", NUMBERS[0]),
        stride=row(number(2), number(2)), _non_persistent_buffers_set=names, _backend=backend,
    )  # fmt: skip
    features = module(kinds[1], modules=text("conv0") + layer)
    tree = module(kinds[1], modules=text("features") + features + text("x") + b"N")
    for saved in (tree, mapping(model=tree)):
        tensors = open_tensors(write(tmp_path / "w", saved, RAW | {"1": NUMBERS[0].tobytes()}))
        assert list(tensors) == ["features.conv0.weight", "features.conv0.mean"]
        np.testing.assert_array_equal(tensors["features.conv0.weight"], NUMBERS)
        np.testing.assert_array_equal(tensors["features.conv0.mean"], NUMBERS[0])


@BOTH
def test_crafted_modules(tmp_path, write):
    leaf, new, put, get = text("w") + array_of("0", NUMBERS), NETWORK + b")\x81", b"r\1\0\0\0", b"j\1\0\0\0"
    shared = new + mapping(_parameters=get, _buffers=b"}", _modules=get) + b"b"
    twice = module(NETWORK, modules=text("a") + get + text("b") + get)
    loop = new + put + mapping(_parameters=b"}", _buffers=b"}", _modules=mapping(a=get)) + b"b"
    for tree, word in (
        # Small files whose names would fill the memory.
        (mapping(a=b"}" + put, model=shared), "two places"), (loop, "two places"),
        (mapping(a=module(NETWORK, leaf) + put, model=twice), "two places"),
        (module(NETWORK, modules=text("a" * 1000) + module(LAYER, leaf)), "too long"),
        (module(NETWORK, text("a" * 1001) + b"N"), "too long"),
        (module(NETWORK, modules=text("a") + array_of("0", NUMBERS)), "Tensor"), (new, "_parameters"),
        (module(NETWORK, text("a") + text("b")), "not tensors"), (new + row(number(1)) + b"b", "attributes"),
        (NETWORK + row(number(1)) + b"\x81", "object"), (call(NETWORK, number(1)), "not callable"),
        (NETWORK, "no tensors"), (NETWORK + mapping(a=b"N") + b"b", "damaged"),
        (module(name("torch.nn.modules_x", "A"), leaf), "asks for"), (module(name("os", "system"), leaf), "asks for"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=word):
            open_tensors(write(tmp_path / "w", tree, RAW if b"FloatStorage" in tree else {}))


def attacks(marker):
    """Returns pickles that would write the file `marker`, or change objects of the reader."""
    shell, python = text(f"touch {marker}"), text(f"open({str(marker)!r}, 'w')")
    stack = b"\x93"  # STACK_GLOBAL: module and name are values
    ordered_dict, size = name("collections", "OrderedDict"), name("torch", "Size")
    rebuild = name("torch._utils", "_rebuild_tensor")
    state = mapping(function=name("torch", "Size"))
    return {
        "os.system": call(name("os", "system"), shell),
        "builtins.eval": call(name("builtins", "eval"), python),
        "builtins.getattr": call(name("builtins", "getattr"), size, text("__class__")),
        "by STACK_GLOBAL": call(text("os") + text("system") + stack, shell),
        "nested attribute": call(text("collections") + text("OrderedDict.__init__.__globals__") + stack),
        "torch.storage._load_from_bytes": call(name("torch.storage", "_load_from_bytes"), text("")),
        "_rebuild_from_type_v2": call(name("torch._tensor", "_rebuild_from_type_v2"), size, size, b")", state),
        "INST": b"(" + shell + b"ios\nsystem\n",
        "OBJ": b"(" + name("os", "system") + shell + b"o",
        "NEWOBJ": name("os", "system") + row(shell) + b"\x81",
        "NEWOBJ of a stand-in": ordered_dict + b")\x81",
        "BUILD on a name": size + state + b"b",
        "BUILD on a returned name": call(size, rebuild) + b"N" + state + b"\x86b",
        "BUILD on a storage": name("torch", "FloatStorage") + mapping(key=text("../x")) + b"b",
        "BUILD on a tensor": array_of("0", NUMBERS) + mapping(offset=number(-9)) + b"b",
        "extension registry": b"\x82\x01" + row(shell) + b"R",
        "call of a storage": call(name("torch", "FloatStorage"), number(1)),
        "persistent text": b"Pos.system\n",
        "persistent module": row(text("module"), size, text("file"), text("source")) + b"Q",
        "storage of no type": row(text("storage"), size, text("0"), text("cpu"), number(1)) + b"Q",
        "view of a storage": storage("0", "Float", 24, row(text("v"), number(0), number(9))),
        "a tensor of text": call(rebuild, text("0"), number(0), row(), row()),
        "a far memo": text("a") + b"r\xff\xff\xff\x7f",
        "a text of a terabyte": b"\x8d" + struct.pack("<Q", 1 << 40) + b"a",
        "stack empty": b"0" * 5,
    }


@BOTH
def test_crafted_pickles(tmp_path, write):
    marker = tmp_path / "harm"
    good = state_dict({"a": array_of("0", NUMBERS)})
    for attack, body in attacks(marker).items():
        files = {
            "alone": {"tree": body},
            "as a value": {"tree": state_dict({"a": body})},
            "dropped": {"tree": body + b"0" + good},  # POP: run, and discarded
        }
        if write is torch_writers.write_stream:
            files |= {"system": {"tree": good, "system": body}, "keys": {"tree": good, "keys": body}}
        for place, parts in files.items():
            with pytest.raises(ValueError, match=r"w.pth: "):
                open_tensors(write(tmp_path / "w.pth", stored=RAW, **parts))
            assert not marker.exists(), (attack, place)
    # Refused files have no lasting effect.
    np.testing.assert_array_equal(open_tensors(write(tmp_path / "w.pth", good, RAW))["a"], NUMBERS)


@BOTH
def test_tensors_outside_their_storage(tmp_path, write):
    for shape, strides, offset, count in (
        ((4, 6), (6, 1), 1, 24), ((25,), (1,), 0, 24), ((2, 2), (23, 1), 0, 24), ((-1,), (1,), 0, 24),
        ((10**9, 10**9), (0, 0), 0, 24),  # no memory behind it
        ((4,), (-1,), 3, 24), ((4,), (1, 1), 0, 24), ((24,), (1,), 0, 10**15), ((1,), (1,), 0, -1),
    ):  # fmt: skip
        tree = state_dict({"a": tensor(storage("0", "Float", count, b"N"), shape, strides, offset)})
        with pytest.raises(ValueError, match="/w: "):
            open_tensors(write(tmp_path / "w", tree, RAW))


@BOTH
def test_files_without_tensors(tmp_path, write):
    text_parameter = call(name("torch._utils", "_rebuild_parameter"), text("0"), b"\x88", b"}")
    for tree, message in (
        (state_dict({}), "no tensors by name"), (row(text("a")), "no tensors by name"),
        (mapping(epoch=number(3)), "not tensors: 'epoch'"), (state_dict({"a": text_parameter}), "not tensors"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            open_tensors(write(tmp_path / "w", tree, {}))


@BOTH
def test_pickles_that_take_minutes(tmp_path, write):
    good, shared = state_dict({"a": array_of("0", NUMBERS)}), storage("0", "Float", 24, b"N")
    prime = (1 << 61) - 1  # all multiples have the same hash
    for extra, word in (
        (b"(" + b"N" * 1_000_000 + b"t", "1,000,000 instructions"),
        (b"}(" + b"".join(b"\x8a\x09" + (i * prime).to_bytes(9, "little") + b"N" for i in range(3)) + b"u", "key"),
        (b"}" + row(number(1), number(2)) + b"Ns", "key"), (b"(" + text("a") + b"Nd", "DICT"),
        (call(name("collections", "OrderedDict"), b"]"), "argument"),
        (call(name("torch", "Size"), *[b"N"] * 65), "arguments"),
        (tensor(shared, (1,) * 65, (1,) * 65), "shape"), (tensor(shared, (1 << 62, 4), (0, 0)), "storage"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=word):
            open_tensors(write(tmp_path / "w", mapping(model=good, extra=extra), RAW))
    integers = b"}(" + number(0) + b"N" + number(1) + b"Nu"  # as in the state of an optimizer
    tensors = open_tensors(write(tmp_path / "w", mapping(model=good, extra=integers), RAW))
    np.testing.assert_array_equal(tensors["a"], NUMBERS)


def test_damaged_archives(tmp_path):
    path, tree, raw = tmp_path / "w", state_dict({"a": array_of("0", NUMBERS)}), RAW["0"]
    for stored, extra, message in (
        ({}, (), "missing"), (RAW | {"1": raw}, (), "of no tensor: 1"), ({"0": raw[:-4]}, (), "96 bytes, got 92"),
        (RAW, ("constants.pkl",), "TorchScript"), (RAW, ("more/data.pkl",), "2 files data.pkl"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            open_tensors(write_zip(path, tree, stored, extra=extra))
    content = write_zip(path, tree, RAW).read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="truncated or damaged"):
        open_tensors(path)
    path.write_bytes(content.replace(raw, b"\x07" + raw[1:]))
    with pytest.raises(ValueError, match=r"a: damaged.*CRC"):
        open_tensors(path)["a"]


def test_damaged_streams(tmp_path):
    tree, raw = state_dict({"a": array_of("0", NUMBERS)}), RAW["0"]
    content = torch_writers.write_stream(tmp_path / "w", tree, RAW).read_bytes()
    for damaged, message in (
        (content[:-7], f"expected {len(content)} bytes, got {len(content) - 7}"),
        (content + b"1234", f"too long: expected {len(content)} bytes"),
        (content[:60], "truncated or damaged pickle"),
        (content.replace(struct.pack("<q", 24) + raw, struct.pack("<q", 23) + raw), "has 23 elements"),
    ):
        (tmp_path / "w").write_bytes(damaged)
        with pytest.raises(ValueError, match=message):
            open_tensors(tmp_path / "w")
    with pytest.raises(ValueError, match="list of storages"):
        open_tensors(torch_writers.write_stream(tmp_path / "w", tree, RAW | {"1": raw}))
