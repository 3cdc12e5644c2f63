"""Weight files as named arrays: safetensors, npz, Keras's HDF5 and PyTorch's .pth, recognized by their first bytes.

Nothing in a file is ever executed: no pickled arrays, no links to other files, and only tensors in PyTorch's pickles.
"""

import math
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import safetensors

from lungjax.weights import torch_pickle

FORMATS = "safetensors, .npz, .h5 of keras.applications (the legacy format), PyTorch's .pth, .pt and .bin"


@dataclass(frozen=True)
class Entry:
    """One array of a file, not read yet."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


class Tensors(Mapping[str, np.ndarray], AbstractContextManager["Tensors"]):
    """Read-only mapping from the names in a file to its arrays, each read on access."""

    def __init__(self, path: Path, entries: dict[str, Entry], handle: Any = None):
        self.path = path
        self._entries, self._handle = entries, handle or nullcontext()

    def __getitem__(self, name: str) -> np.ndarray:
        """Reads one array. Raises KeyError for an unknown name, ValueError for damaged bytes."""
        return self._entries[name].read()

    def __iter__(self) -> Iterator[str]:
        """Iterates over the names."""
        return iter(self._entries)

    def __len__(self) -> int:
        """Returns the number of arrays."""
        return len(self._entries)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every array; reads none."""
        return {name: entry.shape for name, entry in self._entries.items()}

    def __exit__(self, *error: object) -> None:
        """Closes the file. Arrays read before stay valid."""
        self._handle.__exit__(*error)


def open_tensors(path: str | Path) -> Tensors:
    """Opens a weight file, whatever its suffix; arrays are read one by one, or memory-mapped (.pth).

    Raises ValueError with the file, what is wrong with it, and the supported formats.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: {'a folder' if path.is_dir() else 'no such file'}; expected a weight file")
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
    raise ValueError(f"{path}: {_guess(start)}; supported are {FORMATS}")


def _guess(start: bytes) -> str:
    if not start:
        return "the file is empty"
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the weights; run `git lfs pull`, or download the file itself"
    if start.lstrip()[:1] == b"<":
        return "a web page, not weights; the server answered the download with a login or error page"
    if start[:1] == b"\x80":
        return "a pickle not written by torch.save"
    return f"not a weight file (it starts with {start[:8]!r})"


def _pth(path: Path) -> Tensors:
    def entry(array: np.ndarray) -> Entry:
        return Entry(array.shape, lambda: array)

    return Tensors(path, {name: entry(array) for name, array in torch_pickle.load(path).items()})


def _safetensors(path: Path) -> Tensors:
    try:
        file = safetensors.safe_open(path, "numpy")
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.offset_keys()}
    except safetensors.SafetensorError as error:
        size = path.stat().st_size
        raise ValueError(f"{path}: truncated or damaged safetensors file of {size} bytes: {error}") from None

    def entry(name: str, shape: tuple[int, ...]) -> Entry:
        return Entry(shape, lambda: file.get_tensor(name))

    return Tensors(path, {name: entry(name, shape) for name, shape in shapes.items()}, file)


def _zip(path: Path) -> Tensors:
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:  # the last: a damaged header
        size = path.stat().st_size
        raise ValueError(f"{path}: truncated or damaged: no complete zip directory in {size} bytes ({error})") from None
    members = archive.infolist()
    names = [member.filename for member in members]
    if any(name.split("/")[-1] == "data.pkl" for name in names):
        archive.close()
        return _pth(path)
    if "config.json" in names and "model.weights.h5" in names:
        raise ValueError(_keras3(path))
    if not names or not all(name.endswith(".npy") for name in names):
        raise ValueError(f"{path}: a zip file, but neither npz nor .pth; supported are {FORMATS}")
    if len(set(names)) != len(names):
        raise ValueError(f"{path}: duplicate names in the zip directory")
    entries = {member.filename.removesuffix(".npy"): _npy(path, archive, member) for member in members}
    return Tensors(path, entries, archive)


def _npy(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Entry:
    place = f"{path}: {member.filename}"
    try:
        with archive.open(member) as file:
            version = np.lib.format.read_magic(file)
            header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = header(file)
            start = file.tell()
    except Exception as error:  # zipfile and numpy raise a dozen types for damaged bytes
        raise ValueError(f"{place}: damaged: {error}") from None
    if dtype.hasobject:
        raise ValueError(f"{place}: contains Python objects, which are never unpickled; only numbers are read")
    expected = start + math.prod(shape) * dtype.itemsize
    if expected != member.file_size:
        raise ValueError(f"{place}: expected {expected} bytes, got {member.file_size}")

    def read() -> np.ndarray:
        try:
            with archive.open(member) as file:
                return np.asarray(np.lib.format.read_array(file, allow_pickle=False))
        except Exception as error:  # as above; zipfile verifies its CRC while reading
            raise ValueError(f"{place}: damaged: {error}") from None

    return Entry(shape, read)


def _h5(path: Path) -> Tensors:
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        size = re.search(r"stored_eof = (\d+)", str(error))
        reason = f"truncated: expected {size[1]} bytes, got {path.stat().st_size}" if size else f"damaged: {error}"
        raise ValueError(f"{path}: {reason}") from None
    try:
        return Tensors(path, _keras_entries(path, file), file)
    except (OSError, KeyError, RuntimeError) as error:
        file.close()
        raise ValueError(f"{path}: damaged HDF5 file: {error}") from None
    except ValueError:
        file.close()
        raise


def _keras_entries(path: Path, file: h5py.File) -> dict[str, Entry]:
    root = file.get("model_weights", file)  # in a file with the complete model
    if not any(name.startswith("layer_names") for name in root.attrs):
        if {"layers", "_layer_checkpoint_dependencies"} & set(file):
            raise ValueError(_keras3(path))
        raise ValueError(f"{path}: an HDF5 file without layer_names, so not from Keras; supported are {FORMATS}")
    entries: dict[str, Entry] = {}
    # By the attributes only: layer names contain slashes, so walking the groups would nest layers in one another.
    layers = _names(root, "layer_names")
    for layer in layers + [name for name in ("top_level_model_weights",) if name in root]:
        if not isinstance(root.get(layer), h5py.Group):
            raise ValueError(f"{path}: layer {layer} is listed in layer_names, but missing")
        for weight in _names(root[layer], "weight_names"):
            name = f"{layer}/{weight.removesuffix(':0').removeprefix(layer + '/')}"
            if name in entries:
                name = next(f"{name}#{i}" for i in range(2, len(entries) + 3) if f"{name}#{i}" not in entries)
            entries[name] = _dataset(path, file, root[layer], weight)
    return entries


def _keras3(path: Path) -> str:
    return (
        f"{path}: a Keras 3 file (.keras or .weights.h5), whose tensors are numbered, not named; expected the legacy "
        "format of keras.applications, such as efficientnetb0.h5"
    )


def _names(group: h5py.Group, attribute: str) -> list[str]:
    """Returns the list in an attribute. HDF5 limits its size, so Keras splits long lists into NAME0, NAME1, ..."""
    keys = [attribute] if attribute in group.attrs else []
    while f"{attribute}{len(keys)}" in group.attrs and keys != [attribute]:
        keys.append(f"{attribute}{len(keys)}")
    return [name.decode() if isinstance(name, bytes) else str(name) for key in keys for name in group.attrs[key]]


def _dataset(path: Path, file: h5py.File, layer: h5py.Group, weight: str) -> Entry:
    place = f"{path}: {layer.name}/{weight}"
    data = layer.get(weight)
    if not isinstance(data, h5py.Dataset):
        raise ValueError(f"{place} is listed in weight_names, but missing")
    if data.external or data.is_virtual or data.file.filename != file.filename:
        raise ValueError(f"{place} is stored in another file; only data inside the file are read")
    if data.dtype.kind not in "fiub":
        raise ValueError(f"{place}: dtype {data.dtype}; only numbers are read")

    def read() -> np.ndarray:
        try:
            return np.asarray(data[()])
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{place}: damaged: {error}") from None

    return Entry(data.shape, read)
