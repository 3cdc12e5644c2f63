"""Reads weight files as named arrays: safetensors, npz, Keras HDF5 and PyTorch .pth, distinguished by content.

Nothing in a file is executed. Pickled arrays, links to other files and PyTorch objects other than tensors are rejected.
HDF5 is the exception: libhdf5 is not safe for forged files, which can crash the process.
"""

import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import safetensors

from lungjax.weights import torch_pickle

FORMATS = "safetensors, .npz, .h5 of keras.applications (the legacy format), PyTorch's .pth, .pt and .bin"
KERAS_3 = (
    "a Keras 3 file (.keras or .weights.h5), whose tensors are numbered, not named; expected the legacy format of "
    "keras.applications, such as efficientnetb0.h5"
)
INFLATION = 1100  # bound of the compression ratio of deflate
Reader = tuple[list[str], Callable[[str], np.ndarray], Any]  # names, a function that reads one array, the open file


class Tensors(Mapping[str, np.ndarray], AbstractContextManager["Tensors"]):
    """A read-only mapping from the names in a file to its arrays, which are read on access."""

    def __init__(self, path: Path, names: list[str], read: Callable[[str], np.ndarray], file: Any):
        self.path = path
        self._names, self._read, self._file = dict.fromkeys(names), read, file

    def __getitem__(self, name: str) -> np.ndarray:
        """Reads one array. Raises KeyError for an unknown name, ValueError for damaged bytes."""
        if name not in self._names:
            raise KeyError(name)
        try:
            return self._read(name)
        except Exception as error:  # libraries raise many types for damaged bytes
            raise ValueError(f"{self.path}: {name}: damaged, or not plain numbers: {error}") from None

    def __iter__(self) -> Iterator[str]:
        """Iterates over the names."""
        return iter(self._names)

    def __len__(self) -> int:
        """Returns the number of arrays."""
        return len(self._names)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every array."""
        return {name: array.shape for name, array in self.items()}

    def __exit__(self, *error: object) -> None:
        """Closes the file; arrays that were read remain valid."""
        self._file.__exit__(*error)


def open_tensors(path: str | Path) -> Tensors:
    """Opens a weight file, regardless of its suffix. Raises ValueError if it is missing, damaged or not supported."""
    path = Path(path)
    check_file(path)
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"\x89HDF\r\n\x1a\n"):
        read = _h5
    elif start.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        read = _zip
    elif start[:1] == b"\x80" and start[2:14] == torch_pickle.LONG:  # after the protocol, which varies
        read = torch_pickle.read_stream
    elif start[8:9] == b"{":
        read = _safetensors
    else:
        raise ValueError(f"{path}: {_guess(start)}; supported formats: {FORMATS}")
    try:
        return Tensors(path, *read(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    except Exception as error:  # as above
        raise ValueError(f"{path}: truncated or damaged, {path.stat().st_size} bytes: {error}") from None


def check_file(path: Path) -> None:
    """Raises ValueError unless the path is a regular file."""
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "a device, pipe or socket" if path.exists() else "no such file"
        raise ValueError(f"{path}: {kind}; expected a weight file")


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


def _safetensors(path: Path) -> Reader:
    def read(name: str) -> np.ndarray:
        with safetensors.safe_open(path, "numpy") as file:  # opened again: an open map keeps all pages in memory
            return file.get_tensor(name)

    with safetensors.safe_open(path, "numpy") as file:
        return file.offset_keys(), read, nullcontext()


def _zip(path: Path) -> Reader:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if any(name.split("/")[-1] == "data.pkl" for name in names):
        return torch_pickle.read_archive(path)
    if "config.json" in names and "model.weights.h5" in names:
        raise ValueError(KERAS_3)
    if not names or not all(name.endswith(".npy") for name in names):
        raise ValueError(f"a zip file, but neither npz nor .pth; supported formats: {FORMATS}")
    if len(set(names)) != len(names):
        raise ValueError("duplicate names in the zip directory")
    file = np.load(path, allow_pickle=False)
    return file.files, file.__getitem__, file


def _h5(path: Path) -> Reader:
    file = h5py.File(path, "r")
    root = _child(file, "model_weights", file)  # in a file with the complete model
    if not any(name.startswith("layer_names") for name in root.attrs):
        if {"layers", "_layer_checkpoint_dependencies"} & set(file):
            raise ValueError(KERAS_3)
        raise ValueError(f"an HDF5 file without layer_names, so not from Keras; supported formats: {FORMATS}")
    data: dict[str, h5py.Dataset] = {}
    repeated: Counter[str] = Counter()
    # Read from the attributes: layer names contain slashes, so walking the groups would nest layers in one another.
    layers = _names(root, "layer_names")
    for layer in layers + [name for name in ("top_level_model_weights",) if name in root]:
        group = _child(root, layer)
        if not isinstance(group, h5py.Group):
            raise ValueError(f"layer {layer} is listed in layer_names, but missing")
        for weight in _names(group, "weight_names"):
            plain = name = f"{layer}/{weight.removesuffix(':0').removeprefix(layer + '/')}"
            while name in data:
                repeated[plain] += 1
                name = f"{plain}#{repeated[plain] + 1}"
            data[name] = _dataset(file, group, weight)
    return list(data), lambda name: np.asarray(data[name][()]), file


def _child(group: h5py.Group, path: str, default: Any = None) -> Any:
    """Returns what `path` names in a group, or `default`. Raises ValueError for a link, before anything is opened."""
    node: Any = group
    for part in path.split("/"):
        link = node.get(part, getlink=True) if part and isinstance(node, h5py.Group) else None
        if link is None:
            return default
        if not isinstance(link, h5py.HardLink):
            raise ValueError(f"{node.name}/{part} is a link, which may be stored in another file and is not read")
        node = node[part]
    return node


def _names(group: h5py.Group, attribute: str) -> list[str]:
    """Returns the list in an attribute; Keras splits long lists into NAME0, NAME1, ..., since HDF5 limits the size."""
    keys = [attribute] if attribute in group.attrs else []
    while f"{attribute}{len(keys)}" in group.attrs and keys != [attribute]:
        keys.append(f"{attribute}{len(keys)}")
    return [name.decode() if isinstance(name, bytes) else str(name) for key in keys for name in group.attrs[key]]


def _dataset(file: h5py.File, layer: h5py.Group, weight: str) -> h5py.Dataset:
    data = _child(layer, weight)
    if not isinstance(data, h5py.Dataset):
        raise ValueError(f"{layer.name}/{weight} is listed in weight_names, but missing")
    if data.external or data.is_virtual or data.file.filename != file.filename:
        raise ValueError(f"{layer.name}/{weight} is stored in another file, which is not read")
    if data.dtype.kind not in "fiub":
        raise ValueError(f"{layer.name}/{weight}: dtype {data.dtype}; only numbers are read")
    stored = data.id.get_storage_size() * (INFLATION if data.id.get_create_plist().get_nfilters() else 1)
    if data.size * data.dtype.itemsize > stored:
        raise ValueError(f"{layer.name}/{weight}: shape {data.shape}, but the file has only {stored} bytes of it")
    return data
