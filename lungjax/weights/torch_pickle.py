"""PyTorch's .pth, .pt and .bin files without PyTorch, both formats, through an unpickler that can build tensors only.

A pickle is a program: it may call whatever it can name. Here it can name a dozen stand-ins, which are filled
in after the program has ended; any other name refuses the file. Data are views of the mapped file.
"""

import math
import mmap
import pickle
import pickletools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NoReturn

import ml_dtypes
import numpy as np

MAGIC = 0x1950A86A20F9469CFC6C  # of the stream format, pickled first
LONG = b"\x8a\x0a" + MAGIC.to_bytes(10, "little")  # as any pickle protocol from 2 on writes it
PROTOCOL = 1001
PICKLE_LIMIT = 100_000_000  # bytes of a pickle with the names and shapes of tensors
DTYPES = {
    "FloatStorage": "f4", "DoubleStorage": "f8", "HalfStorage": "f2", "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": "i8", "IntStorage": "i4", "ShortStorage": "i2", "CharStorage": "i1", "ByteStorage": "u1",
    "BoolStorage": "?",
}  # fmt: skip
# What torch.save writes. Others make objects in further ways (INST, OBJ, NEWOBJ, the extension registry).
WRITTEN = (
    "PROTO FRAME STOP GLOBAL STACK_GLOBAL REDUCE BUILD BINPERSID MARK POP_MARK TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_TUPLE "
    "EMPTY_LIST EMPTY_DICT APPEND APPENDS SETITEM SETITEMS UNICODE BINUNICODE SHORT_BINUNICODE BINSTRING "
    "SHORT_BINSTRING STRING INT LONG BININT BININT1 BININT2 LONG1 BINFLOAT FLOAT NONE NEWTRUE NEWFALSE PUT BINPUT "
    "LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET LIST DICT"
)
OPCODES = frozenset(WRITTEN.split())


class UnsafePickleError(ValueError):
    """What is wrong with a file, without its name."""


def _show(value: Any) -> str:
    """Returns a number or a text to be shown, else the type: a pickle can nest tuples that never end printing."""
    return repr(value)[:80] if type(value) in (int, str) else f"a {type(value).__name__.strip('_')}"


class _Sealed:
    """Takes no state and no attributes, so that a pickle can't change what it was given."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> NoReturn:
        raise UnsafePickleError(f"its pickle sets the state of {type(self).__name__.strip('_')}")


class _Global(_Sealed):
    """A name that a pickle may call."""

    __slots__ = ("call",)

    def __init__(self, call: Callable[..., Any]):
        self.call = call

    def __call__(self, *args: Any) -> Any:
        return self.call(*args)


class _Storage(_Sealed):
    """The numbers of one or several tensors: a kind, or with a key a place in the file."""

    __slots__ = ("count", "dtype", "key", "start")

    def __init__(self, dtype: np.dtype, key: str = "", count: int = 0, start: int = 0):
        self.dtype, self.key, self.count, self.start = dtype, key, count, start


class _Tensor(_Sealed):
    """A window on a storage, in elements."""

    __slots__ = ("offset", "shape", "storage", "strides")

    def __init__(self, storage: Any, offset: Any, shape: Any, strides: Any, *ignored: Any):
        if not isinstance(storage, _Storage) or not storage.key:
            raise UnsafePickleError("a tensor without a storage")
        if not isinstance(shape, tuple) or not isinstance(strides, tuple) or len(shape) != len(strides):
            raise UnsafePickleError("a tensor without as many strides as sides")
        if any(type(n) is not int or n < 0 for n in (offset, *shape, *strides)):
            raise UnsafePickleError("a tensor whose shape, strides and offset are not whole numbers from 0")
        last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
        # No more elements than the storage has: with stride 0 a few bytes could stand for any size.
        if math.prod(shape) and max(last + 1, math.prod(shape)) > storage.count:
            raise UnsafePickleError(f"a tensor of shape {shape} reaches outside its {storage.count} elements")
        self.storage, self.offset, self.shape, self.strides = storage, offset + storage.start, shape, strides


class _Dict(dict[Any, Any]):
    """An OrderedDict; torch gives those of a module a state, the versions of its layers."""

    def __setstate__(self, state: Any) -> None:
        """Leaves the state aside."""


def _parameter(tensor: Any, *ignored: Any) -> _Tensor:
    if not isinstance(tensor, _Tensor):
        raise UnsafePickleError("a parameter that is no tensor")
    return tensor


def _size(sizes: Any = ()) -> tuple[Any, ...]:
    return tuple(sizes)


GLOBALS: dict[tuple[str, str], _Sealed] = {
    ("torch._utils", "_rebuild_tensor"): _Global(_Tensor),
    ("torch._utils", "_rebuild_tensor_v2"): _Global(_Tensor),
    ("torch._utils", "_rebuild_parameter"): _Global(_parameter),
    ("torch", "Size"): _Global(_size),
    ("collections", "OrderedDict"): _Global(_Dict),
    **{("torch", name): _Storage(np.dtype(dtype)) for name, dtype in DTYPES.items()},
}


class _Unpickler(pickle.Unpickler):
    """Finds the names of GLOBALS only."""

    def __init__(self, file: IO[bytes]):
        super().__init__(file, encoding="utf-8")
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Returns a stand-in. Raises Refused for everything else, whatever it is."""
        if (module, name) not in GLOBALS:
            raise UnsafePickleError(
                f"its pickle asks for {module}.{name}, which no file of tensors needs; nothing was run"
            )
        return GLOBALS[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        """Returns the storage of `pid`: ("storage", kind, key, device, elements[, view])."""
        if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage":
            raise UnsafePickleError(
                "its pickle refers to something else than tensors' data; wanted is the state_dict of a module"
            )
        _, kind, key, _, count, view = pid if len(pid) == 6 else (*pid, None)
        if not isinstance(kind, _Storage) or kind.key or not key or type(key) is not str or type(count) is not int:
            raise UnsafePickleError(f"its pickle refers to a storage {_show(key)} of {_show(count)} elements")
        known = self.storages.setdefault(key, _Storage(kind.dtype, key, count))
        if count < 0 or (known.dtype, known.count) != (kind.dtype, count):
            raise UnsafePickleError(f"storage {key!r} is given twice, or with {count} elements")
        if view is None:
            return known
        if not (isinstance(view, tuple) and len(view) == 3 and all(type(n) is int and n >= 0 for n in view[1:])):
            raise UnsafePickleError(f"storage {key!r} has a view of {_show(view)}")
        if view[1] + view[2] > count:
            raise UnsafePickleError(f"a view of storage {key!r} reaches outside its {count} elements")
        return _Storage(kind.dtype, key, view[2], view[1])


def _unpickle(file: IO[bytes]) -> tuple[Any, dict[str, _Storage]]:
    try:
        start = file.tell()
        for number, (opcode, value, _) in enumerate(pickletools.genops(file), 1):
            if opcode.name not in OPCODES:
                raise UnsafePickleError(
                    f"its pickle has the instruction {opcode.name}, which makes other things than "
                    "tensors; wanted is the state_dict of a module; nothing was run"
                )
            if (
                opcode.name.endswith("PUT") and int(value or 0) > number
            ):  # the unpickler would make room for all before it
                raise UnsafePickleError(f"its pickle numbers its {number}th value {value}")
        file.seek(start)
        unpickler = _Unpickler(file)
        return unpickler.load(), unpickler.storages
    except UnsafePickleError:
        raise
    except Exception as error:  # a damaged pickle raises any of a dozen kinds
        raise UnsafePickleError(f"truncated or damaged pickle: {type(error).__name__}: {error}") from None


def is_stream(start: bytes) -> bool:
    """Says whether a file that starts with these bytes is in the older of the two formats."""
    return start[:1] == b"\x80" and start[2:14] == LONG


def load(path: Path) -> dict[str, np.ndarray]:
    """Returns the tensors of a file by name, as read-only views of it.

    `{"model": tensors}`, `{"state_dict": tensors}` and a "module." before every name are taken off.

    Raises ValueError naming the file for a pickle that asks for anything but tensors, and for damaged bytes.
    """
    try:
        with path.open("rb") as file:
            data = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
            read = _stream if is_stream(data[:64].tobytes()) else _archive
            tree, storages = read(file, data)
        return _tensors(tree, storages)
    except UnsafePickleError as error:
        raise ValueError(f"{path}: {error}") from None


def _stream(file: IO[bytes], data: np.ndarray) -> tuple[Any, dict[str, np.ndarray]]:
    """Magic number, protocol, system and tree as pickles; then the storages' keys; then count and bytes of each."""
    magic, protocol = _unpickle(file)[0], _unpickle(file)[0]
    system = _unpickle(file)[0]
    if (magic, protocol) != (MAGIC, PROTOCOL) or not isinstance(system, dict):
        raise UnsafePickleError(f"protocol {_show(protocol)}, wanted {PROTOCOL}")
    tree, storages = _unpickle(file)
    keys, _ = _unpickle(file)
    if not isinstance(keys, list) or any(type(k) is not str for k in keys) or sorted(keys) != sorted(storages):
        raise UnsafePickleError("its list of storages is not that of its tensors")
    at = file.tell()
    expected = at + sum(8 + storages[key].count * storages[key].dtype.itemsize for key in keys)
    if data.size != expected:
        raise UnsafePickleError(f"{'truncated' if data.size < expected else 'too long'}: expected {expected} bytes, "
                      f"found {data.size}")  # fmt: skip
    order = ">" if system.get("little_endian") is False else "<"
    arrays = {}
    for key in keys:
        storage = storages[key]
        count = int.from_bytes(data[at : at + 8].tobytes(), "big" if order == ">" else "little")
        if count != storage.count:
            raise UnsafePickleError(f"storage {key!r} has {count} elements, its tensors want {storage.count}")
        arrays[key] = _numbers(data, at + 8, storage, order)
        at += 8 + arrays[key].nbytes
    return tree, arrays


def _archive(file: IO[bytes], data: np.ndarray) -> tuple[Any, dict[str, np.ndarray]]:
    """A zip of NAME/data.pkl, NAME/data/KEY for each storage, and NAME/byteorder."""
    try:
        with zipfile.ZipFile(file) as archive:
            members = {member.filename: member for member in archive.infolist()}
            roots = [name.removesuffix("data.pkl") for name in members if name.split("/")[-1] == "data.pkl"]
            if len(roots) != 1 or len(members) != len(archive.infolist()):
                raise UnsafePickleError(f"{len(roots)} files data.pkl in it, or one name twice; wanted is one")
            root = roots[0]
            if f"{root}constants.pkl" in members:
                raise UnsafePickleError("a TorchScript program; wanted is the state_dict of a module")
            if members[f"{root}data.pkl"].file_size > PICKLE_LIMIT:
                raise UnsafePickleError(f"its pickle has more than {PICKLE_LIMIT} bytes")
            with archive.open(members[f"{root}data.pkl"]) as pickled:
                tree, storages = _unpickle(pickled)
            byteorder = f"{root}byteorder"
            order = ">" if byteorder in members and archive.read(byteorder).strip() == b"big" else "<"
            stored = {name.removeprefix(f"{root}data/") for name in members if name.startswith(f"{root}data/")} - {""}
            for problem, keys in (("missing", set(storages) - stored), ("of no tensor", stored - set(storages))):
                if keys:
                    raise UnsafePickleError(f"data {problem}: {', '.join(sorted(keys)[:5])}")
            arrays = {}
            for key, storage in storages.items():
                member = members[f"{root}data/{key}"]
                expected = storage.count * storage.dtype.itemsize
                if member.file_size != expected:
                    raise UnsafePickleError(f"data/{key}: expected {expected} bytes, found {member.file_size}")
                if member.compress_type == zipfile.ZIP_STORED and not member.flag_bits & 1:
                    header = data[member.header_offset : member.header_offset + 30].tobytes()
                    names = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
                    arrays[key] = _numbers(data, member.header_offset + 30 + names, storage, order)
                else:
                    arrays[key] = _numbers(np.frombuffer(archive.read(member), np.uint8), 0, storage, order)
            return tree, arrays
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError, EOFError) as error:  # all of zipfile
        raise UnsafePickleError(f"truncated or damaged zip of {data.size} bytes: {error}") from None


def _numbers(data: np.ndarray, at: int, storage: _Storage, order: str) -> np.ndarray:
    end = at + storage.count * storage.dtype.itemsize
    if end > data.size:
        raise UnsafePickleError(f"truncated: storage {storage.key!r} ends at byte {end}, found {data.size}")
    numbers = data[at:end].view(storage.dtype)
    return numbers.byteswap() if order == ">" else numbers


def _tensors(tree: Any, storages: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    for wrapper in ("model", "state_dict"):
        if isinstance(tree, dict) and isinstance(tree.get(wrapper), dict):
            tree = tree[wrapper]
    if not isinstance(tree, dict) or not tree:
        raise UnsafePickleError("no tensors by name in it; wanted is the state_dict of a module")
    others = [_show(name) for name, value in tree.items() if type(name) is not str or not isinstance(value, _Tensor)]
    if others:
        raise UnsafePickleError(f"not tensors: {', '.join(others[:5])}; wanted is the state_dict of a module")
    prefix = "module." if all(name.startswith("module.") for name in tree) else ""
    return {name.removeprefix(prefix): _view(tensor, storages[tensor.storage.key]) for name, tensor in tree.items()}


def _view(tensor: _Tensor, numbers: np.ndarray) -> np.ndarray:
    strides = tuple(step * numbers.itemsize for step in tensor.strides)
    if not math.prod(tensor.shape):
        return np.zeros(tensor.shape, numbers.dtype)
    return np.lib.stride_tricks.as_strided(numbers[tensor.offset :], tensor.shape, strides, writeable=False)
