"""Writes pickles like those of torch.save in both formats, and malicious ones."""

import struct
import zipfile

from lungjax.weights import torch_pickle

TYPES = {
    "float32": "Float", "float16": "Half", "bfloat16": "BFloat16", "float64": "Double", "int64": "Long", "bool": "Bool"
}  # fmt: skip


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


def state_dict(items):
    """Returns the pickle of an OrderedDict with `_metadata`, like a module's state dict."""
    pairs = b"".join(text(key) + value for key, value in items.items())
    empty = call(name("collections", "OrderedDict"))
    return empty + b"(" + pairs + b"u" + mapping(_metadata=mapping()) + b"b"


def storage(key, kind, count, *view):
    return row(text("storage"), name("torch", f"{kind}Storage"), text(key), text("cpu"), number(count), *view) + b"Q"


def tensor(stored, shape, strides, offset=0):
    sizes, steps = (row(*map(number, numbers)) for numbers in (shape, strides))
    hooks = call(name("collections", "OrderedDict"))
    return call(name("torch._utils", "_rebuild_tensor_v2"), stored, number(offset), sizes, steps, b"\x89", hooks)


def module(kind, parameters=b"", buffers=b"", modules=b"", **attributes):
    """Returns the pickle of a module of class `kind`; the other arguments are names and values of attributes."""
    parts = {"_parameters": parameters, "_buffers": buffers, "_modules": modules}
    ordered = {key: call(name("collections", "OrderedDict")) + b"(" + items + b"u" for key, items in parts.items()}
    return kind + b")\x81" + mapping(training=b"\x89", **ordered, **attributes) + b"b"


def array_of(key, array):
    strides = [step // array.itemsize for step in array.strides]
    return tensor(storage(key, TYPES[array.dtype.name], array.size, b"N"), array.shape, strides)


def write_zip(path, tree, stored, compress=zipfile.ZIP_STORED, extra=()):
    """Writes torch's zip format."""
    with zipfile.ZipFile(path, "w", compress) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + tree + b".")
        archive.writestr("archive/byteorder", b"little")
        for key, raw in stored.items():
            archive.writestr(f"archive/data/{key}", raw)
        for member in extra:
            archive.writestr(f"archive/{member}", b"")
    return path


def write_stream(path, tree, stored, system=None, keys=None):
    """Writes torch's older format, for storages with 4 bytes per element."""
    system = system or mapping(little_endian=b"\x88")
    keys = keys or b"](" + b"".join(map(text, stored)) + b"e"
    pickles = [b"\x80\x02" + body + b"." for body in (number(1001), system, tree, keys)]
    data = [struct.pack("<q", len(raw) // 4) + raw for raw in stored.values()]
    path.write_bytes(b"\x80\x02" + torch_pickle.LONG + b"." + b"".join(pickles + data))
    return path
