"""Inputs of a trained model: images from files, folders, lists and scans.

Inputs may be images (`images.FORMATS`), DICOM files or NIfTI volumes (both need the `dicom` extra), folders of these,
or CSV lists with a column `path` (relative to the list) and optionally `group`, the patient. The slices of a DICOM
series, a NIfTI volume or a group form a series. Volumes are cut like the training images of the model.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from lungjax.config.metadata import Metadata
from lungjax.data.csv_table import read_table
from lungjax.data.folder_walk import check_regular, list_files
from lungjax.data.imaging import dicom, images, nifti, volumes
from lungjax.data.imaging.limits import DEFAULT, Limits
from lungjax.data.imaging.volumes import Windows
from lungjax.datasets import folder_volumes

KINDS = f"images ({images.FORMAT_NAMES}), DICOM files, NIfTI volumes, folders and CSV lists"

Cut = Callable[[str, int, Windows], bytes]  # plane, number of the slice, windows -> the slice as a PNG file
MiddleSlice = Callable[[str, Windows], bytes]  # plane, windows -> the middle slice of a volume as a PNG file


@dataclass(frozen=True)
class Item:
    """One image to predict."""

    name: str  # path, and the slice of a volume
    data: Callable[[], bytes]  # an image file; raises the errors of its decoder
    series: str = ""  # a key of Inputs.series, or "" for a single image
    short: str = ""  # name below the given folder
    modality: str = ""  # as in DICOM; "CT" for NIfTI volumes
    limits: Limits = DEFAULT

    def read(self) -> np.ndarray:
        """Returns the decoded image, uint8 or uint16, [H, W] or [H, W, 3]."""
        return images.read(self.data(), limits=self.limits)[0]


@dataclass
class Inputs:
    """Result of `gather`."""

    items: list[Item] = field(default_factory=list)
    series: dict[str, MiddleSlice | None] = field(default_factory=dict)  # by name; None if it is not a volume
    notes: dict[str, list[str]] = field(default_factory=dict)  # by series
    failures: list[tuple[str, str]] = field(default_factory=list)  # name and reason
    skipped: int = 0  # DICOM objects without an image of the patient
    documents: int = 0  # files of folders that are not images, such as tables
    stamps: list[tuple[str, int, int]] = field(default_factory=list)  # path, size and time of change of each file
    limits: Limits = DEFAULT  # of each file

    def add(self, item: Item) -> None:
        """Adds an image, and its series if that is new."""
        if item.series:
            self.series.setdefault(item.series, None)
        self.items.append(item)

    def add_volume(self, name: str, group: str, notes: Sequence[str], cut: Cut, shape: Sequence[int]) -> str:
        """Adds a volume of `shape` to its group, or as a series of its own; returns the name of the series."""

        def middle(plane: str, windows: Windows) -> bytes:
            return cut(plane, shape[volumes.PLANES[plane]] // 2, windows)

        series, number = group or name, 1
        while not group and series in self.series:  # several series in one folder
            number += 1
            series = f"{name} (series {number})"
        self.notes.setdefault(series, []).extend(notes)
        if self.series.get(series) is None:
            self.series[series] = middle
        return series

    def add_slices(self, name: str, short: str, series: str, cut: Cut, shape: Sequence[int], data: Metadata) -> None:
        """Adds the slices of a volume of `shape`, in the plane and windows of the metadata."""
        for i in volumes.indices(shape[volumes.PLANES[data.plane]], data.position):
            suffix = f"#{data.plane}-{i:04d}"
            slice_data = partial(cut, data.plane, i, data.hu_windows)
            self.items.append(Item(name + suffix, slice_data, series, short + suffix, "CT", self.limits))


def gather(paths: Sequence[str], metadata: Metadata, group_pattern: str = "", limits: Limits = DEFAULT) -> Inputs:
    """Collects the images in files, folders (recursively) and CSV lists; unusable inputs go to `Inputs.failures`.

    Volumes are cut with the `hu_windows`, `plane` and `position` of the metadata. Files that exceed `limits` fail. The
    first group of the regex `group_pattern`, matched in the path of an image (below a folder, in a list, or as given),
    names its series. Raises ValueError for an invalid pattern or one without a group.
    """
    try:
        pattern = re.compile(group_pattern) if group_pattern not in ("", "none") else None
    except re.error as error:
        raise ValueError(f"--group_pattern={group_pattern}: not a regular expression ({error})") from None
    if pattern is not None and pattern.groups < 1:
        raise ValueError(f"--group_pattern={group_pattern}: put parentheses around the part that names the patient")
    inputs = Inputs(limits=limits)
    series_by_path: dict[str, str] = {}
    headers: dict[str, list[dicom.Header]] = {}
    names: dict[str, tuple[str, str]] = {}  # group and short name of each DICOM slice
    for path, group, short, text in _files(paths, inputs):
        match = pattern.search(text) if pattern and not group else None
        series = group or (match.group(1) or "" if match else "")
        try:
            place = os.path.realpath(path)  # raises ValueError for a null byte in a list
            if place in series_by_path:
                before = series_by_path[place]
                if before != series:
                    patient = f"with the patient {before!r}" if before else "without a patient"
                    inputs.failures.append((str(path), f"duplicate, predicted only once, {patient}"))
                continue
            series_by_path[place] = series
            stat = check_regular(path)
            inputs.stamps.append((place, stat.st_size, stat.st_mtime_ns))
            slices = _add_file(inputs, str(path), series, short, metadata)
        except (ValueError, OSError) as error:
            inputs.failures.append((str(path), reason(error, str(path))))
            continue
        for header in slices:
            headers.setdefault(header.series, []).append(header)
            names[str(path)] = (series, short)
    for slices in headers.values():
        try:
            _add_dicom(inputs, slices, names, metadata)
        except ValueError as error:
            inputs.failures.append((str(slices[0].path), reason(error, str(slices[0].path))))
    return inputs


def reason(error: Exception, name: str) -> str:
    """Returns the message of an error without the name of the file."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).removeprefix(f"{name}: ") or type(error).__name__


def _files(paths: Sequence[str], inputs: Inputs) -> Iterator[tuple[Path, str, str, str]]:
    """Yields each file with its group or "", its short name, and the text that `group_pattern` is matched in."""
    lists = {text for text in paths if text.lower().endswith(".csv")}
    for text in paths:
        try:
            path = Path(text).expanduser()
            if path.is_dir():
                yield from ((path / name, "", name, name) for name in _folder(path, text, inputs))
            elif text in lists:
                # The same name in two lists need not be the same patient.
                prefix = f"{text}: " if len(lists) > 1 else ""
                for file, group, name in _rows(path):
                    yield file, f"{prefix}{group}" if group else "", name, name
            elif path.exists():
                yield path, "", path.name, text
            else:
                inputs.failures.append((text, "no such file or folder"))
        except (ValueError, OSError, RuntimeError) as error:  # RuntimeError: ~ of an unknown user
            inputs.failures.append((text, reason(error, text)))


def _folder(folder: Path, text: str, inputs: Inputs) -> list[str]:
    files = list_files(folder, lambda path, reason: inputs.failures.append((path, reason)))
    names = [name for name in files if folder_volumes.kind(str(folder / name))]
    others = sorted(set(files) - set(names))
    unknown = [name for name in others if not folder_volumes.is_document(name)]
    inputs.documents += len(others) - len(unknown)
    inputs.failures += [(str(folder / name), f"unsupported file type; expected {KINDS}") for name in unknown]
    if not names:
        inputs.failures.append((text, f"no image in this folder; expected {KINDS}"))
    return names


def _rows(path: Path) -> Iterator[tuple[Path, str, str]]:
    for _, row in read_table(path, ("path",)).rows:
        if row["path"]:
            yield path.parent / Path(row["path"]).expanduser(), row.get("group", ""), row["path"]


def _add_file(inputs: Inputs, path: str, series: str, short: str, metadata: Metadata) -> list[dicom.Header]:
    """Adds a file, or returns its slices if it is from a CT series. Raises ValueError for any other kind of file."""
    kind, limits = folder_volumes.kind(path), inputs.limits
    if kind == "image":
        inputs.add(Item(path, partial(images.file_bytes, path, limits), series, short, limits=limits))
    elif kind == "nifti":
        volume, cut = nifti.header(path, limits), partial(nifti.picture, path, limits=limits)
        name = inputs.add_volume(path, series, volume.notes, cut, volume.shape)
        inputs.add_slices(path, short, name, cut, volume.shape, metadata)
    elif kind == "dicom":
        headers = [header for header in dicom.headers(path, limits) if not header.aside]
        if headers and headers[0].modality not in dicom.XRAYS:
            return headers
        if headers:
            inputs.add(Item(path, partial(dicom.xray, path, limits), series, short, headers[0].modality, limits))
        inputs.skipped += not headers
    else:
        raise ValueError(f"unsupported file type; expected {KINDS}")
    return []


def _add_dicom(
    inputs: Inputs, headers: Sequence[dicom.Header], names: dict[str, tuple[str, str]], metadata: Metadata
) -> None:
    """Adds slices of a DICOM series, recut if the model uses another plane. Raises ValueError if this is impossible."""
    first, plane = str(headers[0].path), metadata.plane
    group, short = names[first]
    series = dicom.series(headers)

    def item(header: dicom.Header, series: str) -> Item:
        short = names[str(header.path)][1] + header.name.removeprefix(str(header.path))
        data = partial(dicom.picture, header, metadata.hu_windows, inputs.limits)
        return Item(header.name, data, series, short, "CT", inputs.limits)

    def cut(plane: str, number: int, windows: Windows) -> bytes:
        series.check(plane, inputs.limits)
        return dicom.cut(series.headers, series.step, plane, number, windows, inputs.limits)

    if len(headers) == 1 and plane == series.plane:
        inputs.add(item(headers[0], group))
        return
    series.check(plane, inputs.limits)
    files = {str(header.path) for header in headers}
    folder = first if len(files) == 1 else os.path.dirname(first) or first
    name = inputs.add_volume(folder, group, series.notes, cut, series.shape)
    if plane == series.plane:  # slice by slice, so the volume need not fit into memory
        inputs.items += [item(series.headers[i], name) for i in volumes.indices(len(headers), metadata.position)]
        return
    short = short if len(files) == 1 else os.path.dirname(short) or os.path.basename(folder)
    inputs.add_slices(folder, short, name, cut, series.shape, metadata)
