"""What a user gives to a trained network: files, folders, lists and scans, as decoded images by name.

Allowed are images (`images.FORMATS`), DICOM files, NIfTI volumes (both with the extra `dicom`), folders of these,
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

from lungjax.config.metadata import Metadata
from lungjax.data.imaging import dicom, images, nifti, volumes
from lungjax.data.imaging.volumes import Windows
from lungjax.datasets import folder_volumes

PATH_COLUMNS = ("path", "file", "image")
GROUP_COLUMNS = ("group", "patient", "series")

Decoded = Callable[[], np.ndarray]  # reads and decodes; raises what decoders raise
Cut = Callable[[str, Windows], bytes]  # (plane, windows) -> the volume's middle picture as a PNG file


@dataclass(frozen=True)
class Item:
    """One image to predict."""

    name: str  # the file, and which plane of it where it has several
    read: Decoded  # uint8 or uint16, [H, W] or [H, W, 3]
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
    found = Intake()
    seen: dict[str, str] = {}
    headers: dict[str, list[dicom.Header]] = {}
    names: dict[str, tuple[str, str]] = {}  # of DICOM slices by path: group and short name
    for path, group, short in _listed(given, found):
        match = pattern.search(str(path)) if pattern and not group else None
        series = group or (match.group(1) or "" if match else "")
        try:
            place = os.path.realpath(path)
            if place in seen:
                if seen[place] != series:
                    before = f"of {seen[place]!r}" if seen[place] else "without a patient"
                    found.bad.append((str(path), f"given before, {before}: it was predicted as that"))
                continue
            seen[place] = series
            kind = folder_volumes.kind(str(path))
            if kind == "dicom":
                header = dicom.header(str(path))
                if header.aside:
                    found.beside += 1
                elif header.modality in dicom.XRAYS:
                    _add(found, Item(str(path), partial(_decoded, partial(dicom.xray, str(path))), series, short))
                else:
                    headers.setdefault(header.series, []).append(header)
                    names[str(path)] = (series, short)
            elif kind == "nifti":
                _add_nifti(found, str(path), series, short, told)
            elif kind == "image":
                _add(found, Item(str(path), partial(_decoded, path.read_bytes), series, short))
            else:
                found.bad.append((str(path), f"{images_allowed()} can be read"))
        except (ValueError, OSError) as error:
            found.bad.append((str(path), plain(error, str(path))))
    for slices in headers.values():
        _add_series(found, slices, names, told)
    return found


def images_allowed() -> str:
    """Returns the kinds of files, in words."""
    return f"images ({images.FORMAT_NAMES}), DICOM files, NIfTI volumes, folders and CSV lists"


def _listed(given: Sequence[str], found: Intake) -> Iterator[tuple[Path, str, str]]:
    """Yields each file, its group, "" where there is none, and its short name."""
    lists = [text for text in given if text.lower().endswith(".csv")]
    for text in given:
        try:
            path = Path(text).expanduser()
            if path.is_dir():
                yield from _inside(path, text, found)
            elif text in lists:
                # The same name in two lists need not be the same person.
                start = f"{text}: " if len(set(lists)) > 1 else ""
                yield from ((file, f"{start}{group}" if group else "", name) for file, group, name in _rows(path))
            elif path.exists():
                yield path, "", path.name
            else:
                found.bad.append((text, "no such file or folder"))
        except (ValueError, OSError, RuntimeError, csv.Error) as error:  # RuntimeError: ~ of nobody
            found.bad.append((text, plain(error, text)))


def _inside(folder: Path, text: str, found: Intake) -> Iterator[tuple[Path, str, str]]:
    """Yields the images below a folder; links to folders and what can't be entered are told."""
    known = 0

    def told(error: OSError) -> None:
        found.bad.append((str(error.filename), error.strerror or "can't be read"))

    for where, folders, files in os.walk(folder, onerror=told):
        folders.sort()
        for name in folders:
            if os.path.islink(os.path.join(where, name)):
                found.bad.append((os.path.join(where, name), "a link to a folder: give that folder itself"))
        for name in sorted(files):
            path = Path(where, name)
            if not path.exists():
                found.bad.append((str(path), "a link to what is not there"))
            elif path.is_file() and folder_volumes.kind(str(path)):
                known += 1
                yield path, "", str(path.relative_to(folder))
    if not known:
        found.bad.append((text, f"no image in this folder; {images_allowed()} can be read"))


def _rows(path: Path) -> list[tuple[Path, str, str]]:
    with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        reader = csv.DictReader(file)
        columns = reader.fieldnames or []
        own = next((name for name in PATH_COLUMNS if name in columns), None)
        if own is None:
            raise ValueError(f"no column {', '.join(PATH_COLUMNS)}; it has {', '.join(columns)[:200] or 'nothing'}")
        group = next((name for name in GROUP_COLUMNS if name in columns), None)
        rows = [(row[own] or "", (row[group] or "") if group else "") for row in reader]
    return [(path.parent / Path(name).expanduser(), patient, name) for name, patient in rows if name]


def _add(found: Intake, item: Item) -> None:
    if item.series:
        found.middle.setdefault(item.series, None)
    found.items.append(item)


def _add_volume(found: Intake, name: str, group: str, notes: Sequence[str], middle: Cut) -> str:
    """Enters a volume into its group, or as a series of its own; returns the series' name."""
    series = group or _free(found, name)
    found.notes.setdefault(series, []).extend(notes)
    if found.middle.get(series) is None:
        found.middle[series] = middle
    return series


def _add_series(
    found: Intake, headers: Sequence[dicom.Header], names: dict[str, tuple[str, str]], told: Metadata
) -> None:
    """Adds a DICOM series: its slices, or planes cut through them."""
    first = str(headers[0].path)
    group, short = names[first]
    try:
        series = dicom.series(headers)
        paths = tuple(header.path for header in series.headers)
        if len(paths) == 1 and told.plane == series.plane:
            _add(found, Item(first, partial(_decoded, partial(dicom.picture, first, told.hu_windows)), group, short))
            return
        if series.flaw and told.plane != series.plane:
            raise ValueError(f"no {told.plane} plane can be cut: {series.flaw}")
    except ValueError as error:
        found.bad.append((first, plain(error, first)))
        return

    def middle(plane: str, windows: Windows) -> bytes:
        if series.flaw and plane != series.plane:
            raise ValueError(f"no {plane} plane can be cut: {series.flaw}")
        count = series.shape[volumes.PLANES[plane]]
        return dicom.cut(paths, series.step, plane, volumes.middle_slice(count), windows)

    folder = os.path.dirname(first) or first
    name = _add_volume(found, folder, group, series.notes, middle)
    if told.plane == series.plane:  # slice by slice: the volume need not be in memory
        for i in _places(len(paths), told.position):
            read = partial(_decoded, partial(dicom.picture, paths[i], told.hu_windows))
            found.items.append(Item(str(paths[i]), read, name, names[str(paths[i])][1]))
        return
    short = os.path.dirname(short) or os.path.basename(folder)
    for i in _places(series.shape[volumes.PLANES[told.plane]], told.position):
        read = partial(_decoded, partial(dicom.cut, paths, series.step, told.plane, i, told.hu_windows))
        place = f"#{told.plane}-{i:04d}"
        found.items.append(Item(folder + place, read, name, short + place))


def _add_nifti(found: Intake, path: str, group: str, short: str, told: Metadata) -> None:
    header = nifti.header(path)

    def middle(plane: str, windows: Windows) -> bytes:
        return nifti.picture(path, plane, volumes.middle_slice(header.shape[volumes.PLANES[plane]]), windows)

    name = _add_volume(found, path, group, header.notes, middle)
    for i in _places(header.shape[volumes.PLANES[told.plane]], told.position):
        read = partial(_decoded, partial(nifti.picture, path, told.plane, i, told.hu_windows))
        place = f"#{told.plane}-{i:04d}"
        found.items.append(Item(path + place, read, name, short + place))


def _places(count: int, position: str) -> Sequence[int]:
    return [volumes.middle_slice(count)] if position == "mid" else range(count)


def _free(found: Intake, name: str) -> str:
    """Returns a name that no series has yet: several may lie in one folder."""
    number, free = 1, name
    while free in found.middle:
        number += 1
        free = f"{name} (series {number})"
    return free


def _decoded(read: Callable[[], bytes]) -> np.ndarray:
    return images.read(read())[0]


def plain(error: Exception, name: str) -> str:
    """Returns an error's words without the name of the file, which is told beside it."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).removeprefix(f"{name}: ") or type(error).__name__
