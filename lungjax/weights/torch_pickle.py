"""Reads both formats of PyTorch's .pth, .pt and .bin files without PyTorch; its unpickler can build only tensors.

A pickle is a program that may call any function that it names. Here it can name a dozen stand-ins and nothing else.
A pickled module, as torchxrayvision releases them, is read as its state dict: its classes are never imported.
"""

import math
import pickle
import pickletools
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, ClassVar, NamedTuple

import ml_dtypes
import numpy as np

MAGIC = 0x1950A86A20F9469CFC6C  # first pickle of the stream format
LONG = b"\x8a\x0a" + MAGIC.to_bytes(10, "little")  # as pickled by protocol 2 and later
PROTOCOL = 1001
PICKLE_LIMIT = 100_000_000  # bytes of the pickle in an archive, which has names and shapes only
MAX_INSTRUCTIONS = 1_000_000  # of a pickle; real ones have about 30 per tensor
MAX_ITEMS = 64  # dimensions of a tensor, and arguments of a function
MAX_NAME = 1000  # letters of the name of a tensor in a module
MODULES = re.compile(r"(torch\.nn\.modules|torchvision\.models|torchxrayvision)(\.\w+)+")  # of networks
DTYPES = {
    "FloatStorage": "f4", "DoubleStorage": "f8", "HalfStorage": "f2", "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": "i8", "IntStorage": "i4", "ShortStorage": "i2", "CharStorage": "i1", "ByteStorage": "u1",
    "BoolStorage": "?",
}  # fmt: skip
# Those of torch.save; others make arbitrary objects (INST, OBJ, the extension registry) or plain dicts (DICT).
INSTRUCTIONS = (
    "PROTO FRAME STOP GLOBAL STACK_GLOBAL REDUCE NEWOBJ BUILD BINPERSID MARK POP_MARK TUPLE TUPLE1 TUPLE2 TUPLE3 "
    "EMPTY_TUPLE EMPTY_LIST EMPTY_DICT APPEND APPENDS SETITEM SETITEMS UNICODE BINUNICODE SHORT_BINUNICODE BINSTRING "
    "SHORT_BINSTRING STRING INT LONG BININT BININT1 BININT2 LONG1 BINFLOAT FLOAT NONE NEWTRUE NEWFALSE PUT BINPUT "
    "LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET LIST"
)
OPCODES = frozenset(INSTRUCTIONS.split())


class UnsafePickleError(ValueError):
    """The file is damaged or contains more than tensors; the message does not include the file name."""


# Named tuples have neither state nor settable attributes, so a pickle cannot change them by BUILD.
class _Global(NamedTuple):
    """A function that a pickle may call."""

    function: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)


class _Storage(NamedTuple):
    """The elements of one or more tensors, stored in the file under `key`; without a key, a type of storage."""

    dtype: np.dtype
    key: str = ""
    size: int = 0


class _Tensor(NamedTuple):
    """A view of a storage; offset and strides are in elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Dict(dict[Any, Any]):
    """A dict or OrderedDict; the latter also carries a state in a module's state_dict, the versions of the layers."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """Sets an item. Raises UnsafePickleError for keys whose hashes a file could choose, so that all collide."""
        if type(key) is not str and not (type(key) is int and abs(key) < 2**32):
            raise UnsafePickleError(f"{_show(key)} as a key; expected names")
        super().__setitem__(key, value)

    def __setstate__(self, state: Any) -> None:
        """Ignores the state."""


class _Class(NamedTuple):
    """The class of a module; it is never looked up, since only the tensors of its instances matter."""


class _Module(_Dict):
    """A module: its attributes by name."""

    def __setstate__(self, state: Any) -> None:
        """Takes the attributes from a dict. Raises UnsafePickleError for any other state."""
        if not isinstance(state, _Dict):
            raise UnsafePickleError(f"{_show(state)} as the attributes of a module")
        self.update(state)


def _show(value: Any) -> str:
    """Returns the repr of a number or text, or else the type, since nested tuples could take forever to print."""
    return repr(value)[:80] if type(value) in (int, str) else f"a {type(value).__name__.strip('_')}"


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *ignored: Any) -> _Tensor:
    numbers = isinstance(shape, tuple) and isinstance(strides, tuple) and (offset, *shape, *strides)
    valid = numbers and all(type(n) is int and 0 <= n < 2**63 for n in numbers)
    if not valid or not len(shape) == len(strides) <= MAX_ITEMS:
        raise UnsafePickleError("a tensor with an invalid shape, offset or strides")
    if not isinstance(storage, _Storage) or not storage.key:
        raise UnsafePickleError("a tensor without a storage")
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    # Limits the number of elements, since with stride 0 a few bytes could become an array of any size.
    if math.prod(shape) and max(last + 1, math.prod(shape)) > storage.size:
        raise UnsafePickleError(f"a tensor of shape {shape} exceeds its storage of {storage.size} elements")
    return _Tensor(storage, offset, shape, strides)


GLOBALS: dict[tuple[str, str], _Global | _Storage] = {
    ("torch._utils", "_rebuild_tensor"): _Global(_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): _Global(_tensor),
    ("torch._utils", "_rebuild_parameter"): _Global(lambda tensor, *_: tensor),
    ("torch", "Size"): _Global(lambda sizes=(): sizes),
    ("collections", "OrderedDict"): _Global(lambda: _Dict()),  # without arguments, which would not be checked
    # Of modules: names of buffers that are not saved; in files from before 2020, a former field.
    ("__builtin__", "set"): _Global(lambda items: None),
    ("torch.nn.backends.thnn", "_get_thnn_function_backend"): _Global(lambda: None),
    **{("torch", name): _Storage(np.dtype(dtype)) for name, dtype in DTYPES.items()},
}


_PythonUnpickler: Any = pickle._Unpickler  # makes a _Dict of each dict, unlike the one in C


class _Unpickler(_PythonUnpickler):
    """Resolves only the names in GLOBALS and the classes of MODULES, and collects the storages."""

    dispatch: ClassVar = dict(_PythonUnpickler.dispatch)
    dispatch[pickle.EMPTY_DICT[0]] = lambda self: self.append(_Dict())

    def __init__(self, file: IO[bytes]):
        super().__init__(file, encoding="utf-8")
        self.storages: dict[str, _Storage] = {}

    def load_newobj(self) -> None:
        """Makes an empty module."""
        arguments, kind = self.stack.pop(), self.stack.pop()
        if not isinstance(kind, _Class) or arguments != ():
            raise UnsafePickleError(f"its pickle makes an object of {_show(kind)}; nothing was run")
        self.append(_Module())

    dispatch[pickle.NEWOBJ[0]] = load_newobj

    def load_reduce(self) -> None:
        """Calls a function with few arguments, since a file could repeat a call with a long list of them."""
        if len(self.stack[-1]) > MAX_ITEMS:
            raise UnsafePickleError(f"a call with more than {MAX_ITEMS} arguments")
        super().load_reduce()

    dispatch[pickle.REDUCE[0]] = load_reduce

    def find_class(self, module: str, name: str) -> Any:
        """Returns the stand-in for a name. Raises UnsafePickleError for any other."""
        if MODULES.fullmatch(module):
            return _Class()
        if (module, name) not in GLOBALS:
            raise UnsafePickleError(f"its pickle asks for {module}.{name}, which tensors do not need; nothing was run")
        return GLOBALS[module, name]

    def persistent_load(self, pid: Any) -> _Storage | _Class:
        """Returns the storage of `pid`: ("storage", type, key, device, elements[, None]), or the class of a module.

        The latter is ("module", class, source file, source code) in the older format.
        """
        if type(pid) is tuple and len(pid) == 4 and pid[0] == "module" and isinstance(pid[1], _Class):
            return pid[1]
        if type(pid) is not tuple or len(pid) not in (5, 6) or pid[0] != "storage" or pid[5:] not in ((), (None,)):
            raise UnsafePickleError("its pickle refers to data other than tensors; expected a module's state_dict")
        _, kind, key, _, size = pid[:5]
        if not isinstance(kind, _Storage) or kind.key or not key or type(key) is not str or type(size) is not int:
            raise UnsafePickleError(f"its pickle refers to a storage {_show(key)} of {_show(size)} elements")
        storage = self.storages.setdefault(key, _Storage(kind.dtype, key, size))
        if size < 0 or (storage.dtype, storage.size) != (kind.dtype, size):
            raise UnsafePickleError(f"storage {key!r} has several types or sizes, or {size} elements")
        return storage


def _unpickle(file: IO[bytes]) -> tuple[Any, dict[str, _Storage]]:
    try:
        start = file.tell()
        for number, (opcode, _, _) in enumerate(pickletools.genops(file), 1):
            if opcode.name not in OPCODES:
                raise UnsafePickleError(f"its pickle has the instruction {opcode.name}; nothing was run")
            if number > MAX_INSTRUCTIONS:
                raise UnsafePickleError(f"its pickle has more than {MAX_INSTRUCTIONS:,} instructions; nothing was run")
        file.seek(start)
        unpickler = _Unpickler(file)
        return unpickler.load(), unpickler.storages
    except UnsafePickleError:
        raise
    except Exception as error:  # damaged pickles raise many types
        raise UnsafePickleError(f"truncated or damaged pickle: {type(error).__name__}: {error}") from None


def read_stream(path: Path) -> tuple[list[str], Callable[[str], np.ndarray], IO[bytes]]:
    """Opens a file of the older format; returns the names of the tensors, a function that reads one, and the open file.

    The file has five pickles (magic number, protocol, system, tree, keys of the storages), then the size and
    elements of each storage. Raises UnsafePickleError for pickles that ask for anything but tensors, and for damage.
    """
    file = path.open("rb")
    magic, protocol, system = (_unpickle(file)[0] for _ in range(3))
    if (magic, protocol) != (MAGIC, PROTOCOL) or not isinstance(system, dict):
        raise UnsafePickleError(f"protocol {_show(protocol)}, expected {PROTOCOL}")
    if system.get("little_endian") is False:
        raise UnsafePickleError("written on a big-endian machine; save it again on another one")
    tree, storages = _unpickle(file)
    keys, _ = _unpickle(file)
    if not isinstance(keys, list) or any(type(k) is not str for k in keys) or sorted(keys) != sorted(storages):
        raise UnsafePickleError("its list of storages does not match its tensors")
    offsets, end = {}, file.tell()
    for key in keys:
        file.seek(end)
        size = int.from_bytes(file.read(8), "little")
        if size != storages[key].size:
            raise UnsafePickleError(f"storage {key!r} has {size} elements, but its tensors expect {storages[key].size}")
        offsets[key] = end + 8
        end += 8 + size * storages[key].dtype.itemsize
    if end != path.stat().st_size:
        raise UnsafePickleError(f"truncated or too long: expected {end} bytes, got {path.stat().st_size}")

    def read(storage: _Storage) -> np.ndarray:
        return np.fromfile(path, storage.dtype, storage.size, offset=offsets[storage.key])

    return *_reader(tree, read), file


def read_archive(path: Path) -> tuple[list[str], Callable[[str], np.ndarray], zipfile.ZipFile]:
    """Like `read_stream` for the newer format, a zip of NAME/data.pkl, NAME/byteorder and NAME/data/KEY per storage."""
    archive = zipfile.ZipFile(path)
    names = archive.namelist()
    roots = [name.removesuffix("data.pkl") for name in names if name.split("/")[-1] == "data.pkl"]
    if len(roots) != 1 or len(set(names)) != len(names):
        raise UnsafePickleError(f"contains {len(roots)} files data.pkl, or duplicate names; expected one")
    root = roots[0]
    if f"{root}constants.pkl" in names:
        raise UnsafePickleError("a TorchScript program; expected a module's state_dict")
    if archive.getinfo(f"{root}data.pkl").file_size > PICKLE_LIMIT:
        raise UnsafePickleError(f"its pickle has more than {PICKLE_LIMIT} bytes")
    if f"{root}byteorder" in names and archive.read(f"{root}byteorder").strip() == b"big":
        raise UnsafePickleError("written on a big-endian machine; save it again on another one")
    with archive.open(f"{root}data.pkl") as pickled:
        tree, storages = _unpickle(pickled)
    stored = {name.removeprefix(f"{root}data/") for name in names if name.startswith(f"{root}data/")} - {""}
    if stored != set(storages):
        raise UnsafePickleError(f"data missing, or of no tensor: {', '.join(sorted(stored ^ set(storages))[:5])}")
    for key, storage in storages.items():
        expected, actual = storage.size * storage.dtype.itemsize, archive.getinfo(f"{root}data/{key}").file_size
        if actual != expected:
            raise UnsafePickleError(f"data/{key}: expected {expected} bytes, got {actual}")

    def read(storage: _Storage) -> np.ndarray:
        return np.frombuffer(archive.read(f"{root}data/{storage.key}"), storage.dtype)

    return *_reader(tree, read), archive


def _state_dict(root: _Module) -> dict[str, Any]:
    """Returns the parameters and buffers of a module and its submodules by name.

    Raises UnsafePickleError for long names and for parts in two places, since a small file could fill the memory.
    """
    tensors: dict[str, Any] = {}
    seen, modules = set(), [("", root)]
    for prefix, module in modules:  # which grows
        for kind in ("_parameters", "_buffers", "_modules"):
            items = module.get(kind)
            if not isinstance(items, _Dict) or id(items) in seen:
                raise UnsafePickleError(f"module {prefix!r}: {_show(items)} as {kind}, or a part in two places")
            seen.add(id(items))
            for name, value in items.items():
                path = f"{prefix}{name}"
                if len(path) > MAX_NAME or (kind == "_modules" and not isinstance(value, _Module | None)):
                    raise UnsafePickleError(f"module {path[:80]!r}: {_show(value)}, or a name that is too long")
                if kind == "_modules" and value is not None:
                    modules.append((f"{path}.", value))
                elif value is not None:
                    tensors[path] = value
    return tensors


def _reader(tree: Any, read: Callable[[_Storage], np.ndarray]) -> tuple[list[str], Callable[[str], np.ndarray]]:
    """Returns names and a reader of tensors, without a wrapper {"model": ...} and the prefix "module."."""
    for wrapper in ("model", "state_dict"):
        if isinstance(tree, dict) and isinstance(tree.get(wrapper), dict):
            tree = tree[wrapper]
    if isinstance(tree, _Module):
        tree = _state_dict(tree)
    if not isinstance(tree, dict) or not tree:
        raise UnsafePickleError("no tensors by name; expected a module's state_dict")
    others = [_show(name) for name, value in tree.items() if type(name) is not str or not isinstance(value, _Tensor)]
    if others:
        raise UnsafePickleError(f"not tensors: {', '.join(others[:5])}; expected a module's state_dict")
    prefix = "module." if all(name.startswith("module.") for name in tree) else ""

    def array(name: str) -> np.ndarray:
        tensor = tree[f"{prefix}{name}"]
        if not math.prod(tensor.shape):
            return np.zeros(tensor.shape, tensor.storage.dtype)
        strides = tuple(step * tensor.storage.dtype.itemsize for step in tensor.strides)
        elements = read(tensor.storage)[tensor.offset :]
        return np.lib.stride_tricks.as_strided(elements, tensor.shape, strides, writeable=False)

    return [name.removeprefix(prefix) for name in tree], array
