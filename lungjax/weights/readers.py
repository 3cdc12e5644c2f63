"""Files of weights as named arrays: safetensors, npz, Keras's HDF5 and PyTorch's .pth, told apart by their bytes.

Nothing in a file is ever run: no pickled arrays, no links out of the file, and of PyTorch's pickles tensors only.
"""

import json
import math
import mmap
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import ml_dtypes
import numpy as np

from lungjax.weights import torch_pickle

FORMATS = "safetensors, .npz, .h5 of keras.applications (the legacy format), PyTorch's .pth, .pt and .bin"
HEADER_LIMIT = 100_000_000  # bytes of a safetensors header, as in the format's own library
DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": ml_dtypes.bfloat16, "I64": "<i8", "I32": "<i4",
    "I16": "<i2", "I8": "|i1", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "|u1", "BOOL": "|b1",
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One array of a file that is still to be read."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


class Tensors(Mapping[str, np.ndarray], AbstractContextManager["Tensors"]):
    """The arrays of a file by name, in the file's order, each read when it is asked for. Read only."""

    def __init__(self, path: Path, form: str, entries: dict[str, Entry], handle: Any = None):
        self.path, self.form = path, form  # form: one of "safetensors", "npz", "h5", "pth"
        self._entries, self._handle = entries, handle or nullcontext()

    def __getitem__(self, name: str) -> np.ndarray:
        """Reads one array. Raises KeyError for an unknown name, ValueError for damaged bytes."""
        return self._entries[name].read()

    def __iter__(self) -> Iterator[str]:
        """Goes over the names."""
        return iter(self._entries)

    def __len__(self) -> int:
        """How many arrays the file holds."""
        return len(self._entries)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every array, without reading any."""
        return {name: entry.shape for name, entry in self._entries.items()}

    def __exit__(self, *error: object) -> None:
        """Closes the file. Arrays that were read stay valid."""
        self._handle.__exit__(*error)


def open_tensors(path: str | Path) -> Tensors:
    """Opens a file of weights whatever its suffix; arrays are read one by one, or mapped into memory (.pth).

    Raises ValueError naming the file, what is wrong with it, and the formats that are read.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: {'a folder' if path.is_dir() else 'no such file'}; wanted a file of weights")
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"\x89HDF\r\n\x1a\n"):
        return _h5(path)
    if start.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _zip(path)
    if torch_pickle.is_stream(start):
        return _pth(path)
    if start[8:9] == b"{":
        return _safetensors(path)
    raise ValueError(f"{path}: {_guess(start)}; read are {FORMATS}")


def _guess(start: bytes) -> str:
    if not start:
        return "the file is empty"
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the weights; run `git lfs pull`, or download the file itself"
    if start.lstrip()[:1] == b"<":
        return "a web page, not weights; the download was answered by a login or an error"
    if start[:1] == b"\x80":
        return "a pickle that torch.save did not write"
    return f"not a file of weights (it starts with {start[:8]!r})"


def _mapped(path: Path) -> np.ndarray:
    """The file's bytes, mapped: pages are read when touched and can be dropped again."""
    with path.open("rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


def _pth(path: Path) -> Tensors:
    arrays = torch_pickle.load(path)  # views of the mapped file

    def entry(array: np.ndarray) -> Entry:
        return Entry(array.shape, lambda: array)

    return Tensors(path, "pth", {name: entry(array) for name, array in arrays.items()})


def _safetensors(path: Path) -> Tensors:
    data = _mapped(path)
    length = int.from_bytes(data[:8].tobytes(), "little")
    if length > HEADER_LIMIT:
        raise ValueError(f"{path}: a header of {length} bytes is no safetensors file; read are {FORMATS}")
    start = 8 + length
    if start > data.size:
        raise ValueError(f"{path}: truncated: its header needs {start} bytes, the file has {data.size}")
    try:
        header = json.loads(data[8:start].tobytes(), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged safetensors header: {error}") from None
    header.pop("__metadata__", None)
    fields = {name: _field(path, name, field) for name, field in header.items()}
    end = 0
    for name, (_, _, low, high) in sorted(fields.items(), key=lambda item: item[1][2:]):
        if low != end:
            raise ValueError(f"{path}: {name} starts at byte {low} of the data, wanted {end}: a gap or an overlap")
        end = high
    if start + end != data.size:
        wrong = "truncated" if start + end > data.size else "bytes follow the last tensor"
        raise ValueError(f"{path}: {wrong}: expected {start + end} bytes, found {data.size}")

    def entry(dtype: np.dtype, shape: tuple[int, ...], low: int, _: int) -> Entry:
        # Read, not a view of the map, whose pages would stay until all arrays are converted.
        return Entry(shape, lambda: np.fromfile(path, dtype, math.prod(shape), offset=start + low).reshape(shape))

    return Tensors(path, "safetensors", {name: entry(*field) for name, field in fields.items()})


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"twice in it: {next(n for n in names if names.count(n) > 1)}")
    return result


def _field(path: Path, name: str, field: Any) -> tuple[np.dtype, tuple[int, ...], int, int]:
    """Returns dtype, shape, first and last byte of a safetensors header's entry."""
    try:
        kind, shape, (low, high) = field["dtype"], tuple(field["shape"]), field["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{path}: {name}: wanted dtype, shape and data_offsets, got {str(field)[:80]}") from None
    if not isinstance(kind, str) or kind not in DTYPES:
        raise ValueError(f"{path}: {name}: dtype {kind!r}; known are {', '.join(DTYPES)}")
    if any(type(number) is not int or number < 0 for number in (*shape, low, high)):
        raise ValueError(f"{path}: {name}: shape {shape} or bytes {low} to {high} are not whole numbers from 0")
    dtype = np.dtype(DTYPES[kind])
    if high - low != math.prod(shape) * dtype.itemsize:
        wanted = math.prod(shape) * dtype.itemsize
        raise ValueError(f"{path}: {name}: {kind} {shape} needs {wanted} bytes, bytes {low} to {high} are given")
    return dtype, shape, low, high


def _zip(path: Path) -> Tensors:
    try:
        archive = zipfile.ZipFile(path)
        members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:  # the last: zipfile on a damaged header
        size = path.stat().st_size
        raise ValueError(
            f"{path}: truncated or damaged: {size} bytes without a whole zip directory ({error})"
        ) from None
    names = [member.filename for member in members]
    if any(name.split("/")[-1] == "data.pkl" for name in names):
        archive.close()
        return _pth(path)
    if "config.json" in names and "model.weights.h5" in names:
        raise ValueError(_keras3(path))
    if not names or not all(name.endswith(".npy") for name in names):
        raise ValueError(f"{path}: a zip file, but neither npz nor .pth; read are {FORMATS}")
    if len(set(names)) != len(names):
        raise ValueError(f"{path}: twice in it: {next(n for n in names if names.count(n) > 1)}")
    entries = {member.filename.removesuffix(".npy"): _npy(path, archive, member) for member in members}
    return Tensors(path, "npz", entries, archive)


def _npy(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Entry:
    what = f"{path}: {member.filename}"
    try:
        with archive.open(member) as file:
            version = np.lib.format.read_magic(file)
            header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = header(file)
            start = file.tell()
    except Exception as error:  # zipfile and numpy raise a dozen kinds for damaged bytes
        raise ValueError(f"{what}: damaged: {error}") from None
    if dtype.hasobject:
        raise ValueError(f"{what}: holds Python objects, which are never unpickled; only plain numbers are read")
    expected = start + math.prod(shape) * dtype.itemsize
    if expected != member.file_size:
        raise ValueError(f"{what}: expected {expected} bytes, found {member.file_size}")

    def read() -> np.ndarray:
        try:
            with archive.open(member) as file:
                return np.asarray(np.lib.format.read_array(file, allow_pickle=False))
        except Exception as error:  # as above; the bytes' checksum is looked at while reading
            raise ValueError(f"{what}: damaged: {error}") from None

    return Entry(shape, read)


def _h5(path: Path) -> Tensors:
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        size = re.search(r"stored_eof = (\d+)", str(error))
        if size:
            found = path.stat().st_size
            raise ValueError(f"{path}: truncated: expected {size[1]} bytes, found {found}") from None
        raise ValueError(f"{path}: damaged HDF5 file: {error}") from None
    try:
        root = file.get("model_weights", file)  # of a whole saved model
        if not any(name.startswith("layer_names") for name in root.attrs):
            if {"layers", "_layer_checkpoint_dependencies"} & set(file):
                raise ValueError(_keras3(path))
            raise ValueError(f"{path}: an HDF5 file without layer_names, so not Keras's; read are {FORMATS}")
        entries: dict[str, Entry] = {}
        # By the attributes only: layer names hold slashes, so that a walk would take one layer for another's part.
        layers = _names(root, "layer_names")
        for layer in layers + [name for name in ("top_level_model_weights",) if name in root]:
            if not isinstance(root.get(layer), h5py.Group):
                raise ValueError(f"{path}: layer {layer} is listed in layer_names, but not in the file")
            for weight in _names(root[layer], "weight_names"):
                name = f"{layer}/{weight.removesuffix(':0').removeprefix(layer + '/')}"
                if name in entries:
                    name = next(f"{name}#{i}" for i in range(2, len(entries) + 3) if f"{name}#{i}" not in entries)
                entries[name] = _dataset(path, file, root[layer], weight)
    except (OSError, KeyError, RuntimeError) as error:
        file.close()
        raise ValueError(f"{path}: damaged HDF5 file: {error}") from None
    except ValueError:
        file.close()
        raise
    return Tensors(path, "h5", entries, file)


def _keras3(path: Path) -> str:
    return (
        f"{path}: a Keras 3 file (.keras or .weights.h5), whose tensors are only numbered; wanted is the legacy "
        "format, as the files of keras.applications have it, such as efficientnetb0.h5"
    )


def _names(group: h5py.Group, attribute: str) -> list[str]:
    """Returns a list kept in an attribute; HDF5 limits its size, so that Keras splits long ones into NAME0, NAME1."""
    found = [attribute] if attribute in group.attrs else []
    while f"{attribute}{len(found)}" in group.attrs and found != [attribute]:
        found.append(f"{attribute}{len(found)}")
    return [name.decode() if isinstance(name, bytes) else str(name) for key in found for name in group.attrs[key]]


def _dataset(path: Path, file: h5py.File, layer: h5py.Group, weight: str) -> Entry:
    what = f"{path}: {layer.name}/{weight}"
    data = layer.get(weight)
    if not isinstance(data, h5py.Dataset):
        raise ValueError(f"{what} is listed in weight_names, but not in the file")
    if data.external or data.is_virtual or data.file.filename != file.filename:
        raise ValueError(f"{what} lies in another file; only data inside the file are read")
    if data.dtype.kind not in "fiub":
        raise ValueError(f"{what}: dtype {data.dtype}; only numbers are read")

    def read() -> np.ndarray:
        try:
            return np.asarray(data[()])
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{what}: damaged: {error}") from None

    return Entry(data.shape, read)
