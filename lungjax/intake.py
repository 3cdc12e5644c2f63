"""What a user gives to a trained network: files, folders, lists and scans, as decoded images by name.

Allowed are PNG, JPEG, TIFF and BMP files, DICOM files, NIfTI volumes (both with the extra `dicom`), folders of these,
and CSV lists with a column `path` (relative to the list), and `group` where rows of one patient belong together. The
slices of one DICOM series, of one NIfTI volume and of one group form a series. Volumes are cut as the network's
training images were. What can't be used is named, and the rest goes on.
"""

import csv
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from lungjax.data import dicom, images, nifti, volumes
from lungjax.data.volumes import Windows
from lungjax.datasets import folder_volumes
from lungjax.metadata import Metadata

PATH_COLUMNS = ("path", "file", "image")
GROUP_COLUMNS = ("group", "patient", "series")

Decoded = Callable[[], np.ndarray]  # reads and decodes; raises ValueError or OSError
Cut = Callable[[str, Windows], bytes]  # (plane, windows) -> the volume's middle picture as a PNG file


@dataclass(frozen=True)
class Item:
    """One image to predict."""

    name: str  # the file, and which plane of it where it has several
    read: Decoded  # uint8, or float32 in 0..255, [H, W] or [H, W, 3]
    series: str = ""  # of Intake.middle, "" for an image of its own
    short: str = ""  # the name below the folder that was given


@dataclass
class Intake:
    """What was found."""

    items: list[Item] = field(default_factory=list)
    middle: dict[str, Cut | None] = field(default_factory=dict)  # of each series; None where it is no volume
    notes: dict[str, list[str]] = field(default_factory=dict)  # of each series
    bad: list[tuple[str, str]] = field(default_factory=list)  # name, and why it can't be used
    beside: int = 0  # DICOM files that show nothing of the patient


def gather(given: Sequence[str], told: Metadata, group_pattern: str = "") -> Intake:
    """Returns every image that the paths in `given` stand for, as the network of `told` wants it.

    Args:
      given: files, folders (all images below them) and CSV lists.
      told: window, hu_windows, plane and position are read.
      group_pattern: regex; its first group over a plain image's path names its series.

    Raises ValueError for a pattern that is none or has no group; all else that is wrong is told in `Intake.bad`.
    """
    try:
        pattern = re.compile(group_pattern) if group_pattern else None
    except re.error as error:
        raise ValueError(f"--group_pattern={group_pattern}: not a regular expression ({error})") from None
    if pattern is not None and pattern.groups < 1:
        raise ValueError(f"--group_pattern={group_pattern}: put parentheses around the part that names the patient")
    found, seen = Intake(), set()
    headers: dict[str, list[dicom.Header]] = {}
    shorts: dict[str, str] = {}
    for path, group, short in _listed(given, found):
        if str(path) in seen:
            continue
        seen.add(str(path))
        kind = folder_volumes.kind(str(path))
        match = pattern.search(str(path)) if pattern and not group else None
        series = group or (match.group(1) if match else "")
        try:
            if kind == "dicom":
                header = dicom.header(str(path))
                if header.aside:
                    found.beside += 1
                elif header.modality in dicom.XRAYS:
                    read = partial(_decoded, partial(dicom.xray, str(path)), None)
                    _add(found, Item(str(path), read, series, short))
                else:
                    headers.setdefault(header.series, []).append(header)
                    shorts[str(path)] = short
            elif kind == "nifti":
                _add_nifti(found, str(path), short, told)
            elif kind == "image":
                _add(found, Item(str(path), partial(_decoded, path.read_bytes, told.window), series, short))
            else:
                found.bad.append((str(path), f"{images_allowed()} can be read"))
        except (ValueError, OSError) as error:
            found.bad.append((str(path), _plain(error, path)))
    for slices in headers.values():
        _add_series(found, slices, shorts, told)
    return found


def images_allowed() -> str:
    """Returns the kinds of files, in words."""
    return "PNG, JPEG, TIFF and BMP images, DICOM files, NIfTI volumes, folders and CSV lists"


def _listed(given: Sequence[str], found: Intake) -> Iterator[tuple[Path, str, str]]:
    """Yields each file, its group, "" where there is none, and its short name."""
    for text in given:
        path = Path(text).expanduser()
        if path.is_dir():
            inside = [file for file in sorted(path.rglob("*")) if file.is_file()]
            known = [file for file in inside if folder_volumes.kind(str(file))]
            if not known:
                found.bad.append((text, f"no image in this folder; {images_allowed()} can be read"))
            yield from ((file, "", str(file.relative_to(path))) for file in known)
        elif path.suffix.lower() == ".csv":
            try:
                yield from _rows(path)
            except (ValueError, OSError) as error:
                found.bad.append((text, _plain(error, path)))
        elif path.exists():
            yield path, "", path.name
        else:
            found.bad.append((text, "no such file or folder"))


def _rows(path: Path) -> Iterator[tuple[Path, str, str]]:
    with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        reader = csv.DictReader(file)
        columns = reader.fieldnames or []
        own = next((name for name in PATH_COLUMNS if name in columns), None)
        if own is None:
            raise ValueError(f"no column {', '.join(PATH_COLUMNS)}; it has {', '.join(columns) or 'nothing'}")
        group = next((name for name in GROUP_COLUMNS if name in columns), None)
        rows = [(row[own] or "", (row[group] or "") if group else "") for row in reader]
    for name, patient in rows:
        if name:
            yield path.parent / Path(name).expanduser(), patient, name


def _add(found: Intake, item: Item) -> None:
    if item.series:
        found.middle.setdefault(item.series, None)
    found.items.append(item)


def _add_series(found: Intake, headers: Sequence[dicom.Header], shorts: dict[str, str], told: Metadata) -> None:
    """Adds a DICOM series: its slices, or planes cut through them."""
    first = str(headers[0].path)
    try:
        series = dicom.series(headers)
        paths = tuple(header.path for header in series.headers)
        if len(paths) == 1 and told.plane == series.plane:
            _add(
                found,
                Item(first, partial(_decoded, partial(dicom.picture, first, told.hu_windows), None), "", shorts[first]),
            )
            return
        if series.flaw and told.plane != series.plane:
            raise ValueError(f"no {told.plane} plane can be cut: {series.flaw}")
    except ValueError as error:
        found.bad.append((first, _plain(error, Path(first))))
        return
    name = _free(found, os.path.dirname(first) or first)
    found.notes[name] = list(series.notes)

    def middle(plane: str, windows: Windows) -> bytes:
        if series.flaw and plane != series.plane:
            raise ValueError(f"no {plane} plane can be cut: {series.flaw}")
        count = series.shape[volumes.PLANES[plane]]
        return dicom.cut(paths, series.step, plane, volumes.middle(count), windows)

    found.middle[name] = middle
    if told.plane == series.plane:  # slice by slice: the volume need not be in memory
        for i in _places(len(paths), told.position):
            read = partial(dicom.picture, paths[i], told.hu_windows)
            found.items.append(Item(str(paths[i]), partial(_decoded, read, None), name, shorts[str(paths[i])]))
        return
    for i in _places(series.shape[volumes.PLANES[told.plane]], told.position):
        read = partial(dicom.cut, paths, series.step, told.plane, i, told.hu_windows)
        short = f"{os.path.dirname(shorts[first]) or os.path.basename(name)}#{told.plane}-{i:04d}"
        found.items.append(Item(f"{name}#{told.plane}-{i:04d}", partial(_decoded, read, None), name, short))


def _add_nifti(found: Intake, path: str, short: str, told: Metadata) -> None:
    header = nifti.header(path)
    name = _free(found, path)
    found.notes[name] = list(header.notes)

    def middle(plane: str, windows: Windows) -> bytes:
        return nifti.picture(path, plane, volumes.middle(header.shape[volumes.PLANES[plane]]), windows)

    found.middle[name] = middle
    for i in _places(header.shape[volumes.PLANES[told.plane]], told.position):
        read = partial(nifti.picture, path, told.plane, i, told.hu_windows)
        place = f"#{told.plane}-{i:04d}"
        found.items.append(Item(path + place, partial(_decoded, read, None), name, short + place))


def _places(count: int, position: str) -> Sequence[int]:
    return [volumes.middle(count)] if position == "mid" else range(count)


def _free(found: Intake, name: str) -> str:
    """Returns a name that no series has yet: several may lie in one folder."""
    number, free = 1, name
    while free in found.middle:
        number += 1
        free = f"{name} (series {number})"
    return free


def _decoded(read: Callable[[], bytes], window: tuple[float, float] | None) -> np.ndarray:
    try:
        return images.decode(read(), window)
    except ValueError as error:
        if "16-bit image, and" in str(error):
            raise ValueError(
                "a 16-bit image, and the model was trained on 8-bit ones: say with --window=low,high which values "
                "become black and white"
            ) from None
        raise


def _plain(error: Exception, path: Path) -> str:
    """Returns an error's words without the path, which is told beside it."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).removeprefix(f"{path}: ")
