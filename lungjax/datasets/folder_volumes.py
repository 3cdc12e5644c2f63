"""DICOM files and NIfTI volumes in a folder, expanded to one example per image."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from lungjax.data.folder_walk import list_files
from lungjax.data.imaging import dicom, images, nifti, volumes
from lungjax.data.safe_text import printable
from lungjax.datasets import PrepareOptions

# Suffixes of files that are only counted; other files that can't be read are listed by name.
DOCUMENTS = (
    ".txt", ".md", ".csv", ".tsv", ".json", ".xml", ".html", ".yaml", ".yml", ".pdf", ".doc", ".docx", ".xls", ".xlsx",
    ".db", ".ini", ".log", ".py", "dicomdir",
)  # fmt: skip
Notes = dict[str, list[str]]  # maps a remark to the files or series it applies to; "" stands for an unnamed one


@dataclass(frozen=True)
class Row:
    """One image of a user's folder, or one DICOM or NIfTI file before it is expanded."""

    file: str
    image: Any  # a path, or a partial of a function that returns encoded bytes
    label: str
    split: str
    group: str = ""
    source: str = ""
    box: tuple[float, float, float, float] | None = None
    extra: tuple[str, ...] = ()
    where: str = ""


def kind(path: str) -> str:
    """Returns the kind of a file by its suffix: "image", "dicom", "nifti" or "" for anything else.

    Files without a suffix, or with a numeric one (the end of a DICOM UID), are opened to check.
    """
    low = path.lower()
    for name, suffixes in (("image", images.SUFFIXES), ("dicom", dicom.SUFFIXES), ("nifti", nifti.SUFFIXES)):
        if low.endswith(suffixes):
            return name
    name = os.path.basename(low)
    suffix = os.path.splitext(name)[1]
    ambiguous = (not suffix or suffix[1:].isdigit()) and name != "dicomdir"
    return "dicom" if ambiguous and dicom.is_dicom(path) else ""


def is_document(path: str) -> bool:
    """Returns whether a file is a text file, table or database, which folders of images often contain."""
    return path.lower().endswith(DOCUMENTS)


def unread_notes(paths: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns a note that counts the documents among unread files, and a warning that lists the others by suffix."""
    others: dict[str, list[str]] = {}
    for path in paths:
        if not is_document(path):
            others.setdefault(os.path.splitext(path)[1].lower() or "no suffix", []).append(path)
    documents = len(paths) - sum(map(len, others.values()))
    names = "; ".join(f"{len(p):,} with {suffix}, such as {os.path.basename(p[0])}" for suffix, p in others.items())
    warning = f"files of other formats were skipped (convert images to PNG): {printable(names)}"
    notes = [f"{documents:,} files that are not images were skipped"] if documents else []
    return notes, [warning] if names else []


def sources(image: Any) -> tuple[Any, ...]:
    """Returns the paths or DICOM headers that an image is read from; () if it is generated or unusable."""
    if isinstance(image, str):
        return (image,)
    if getattr(image, "func", None) not in (dicom.xray, dicom.picture, dicom.cut, nifti.picture):
        return ()
    first = image.args[0]
    return first if isinstance(first, tuple) else (first,)


def unfold(row: Row) -> list[Row]:
    """Returns one row per DICOM and NIfTI file in the folder of `row`. Raises ValueError if there are none."""
    paths = [(name, os.path.join(row.image, name)) for name in list_files(row.image)]
    scans = [(name, path) for name, path in paths if kind(path) in ("dicom", "nifti")]
    rows = [replace(row, file=f"{row.file}/{name}", image=path) for name, path in scans]
    if not rows:
        raise ValueError(f"{row.where}: the folder {row.file} has no DICOM or NIfTI file; list other images by path")
    return rows


def expand(rows: Sequence[Row], options: PrepareOptions) -> tuple[list[Row], list[str], str]:
    """Replaces each row of a DICOM or NIfTI file with the images that `options` select.

    DICOM images are named "series-HASH/0007", "series-HASH/coronal-0031", or "image-HASH" (X-rays and single slices),
    where HASH is the `volumes.pseudonym` of the UID; rows without a group get the pseudonym of the patient id. A NIfTI
    file keeps its path and is its own group.

    Errors of a file or series are raised when its example is read, so that --on_bad_image=skip applies; these examples
    come first. Returns the rows, notes, and the modality: "ct" or "xray" if all images are from such scans, else "".
    Raises ValueError for a missing package, and unless there are one or three windows.
    """
    kinds = {row.image: kind(row.image) for row in rows}
    by_kind = {name: [row for row in rows if kinds[row.image] == name] for name in ("dicom", "nifti")}
    if not any(by_kind.values()):
        return list(rows), [], ""
    if len(options.hu_windows) not in (1, 3):
        raise ValueError(f"--hu_window: {len(options.hu_windows)} windows; expected one (gray) or three (RGB)")
    for name, package, what in (("dicom", "pydicom", "DICOM files"), ("nifti", "nibabel", "NIfTI volumes")):
        if by_kind[name]:
            volumes.need(package, what)
    plain = [row for row in rows if kinds[row.image] not in by_kind]
    notes: Notes = {}
    cut, xrays = _from_dicom(by_kind["dicom"], options, notes)
    for row in by_kind["nifti"]:
        cut += _from_nifti(row, options, notes)
    bad = [row for row in cut if row.image.func is volumes.raise_error]
    good = [row for row in cut if row.image.func is not volumes.raise_error]
    lines = [f"{len(names)} {what}{f', such as {names[0]}' if names[0] else ''}" for what, names in notes.items()]
    if len(good) > xrays:
        windows = " and ".join(f"{center:g} +/- {width / 2:g}" for center, width in options.hu_windows)
        lines.append(f"{len(good) - xrays} {options.plane} images from CT volumes, window {windows} Hounsfield units")
    modality = "" if plain else "ct" if not xrays else "xray" if len(good) == xrays else ""
    return [*bad, *plain, *good], lines, modality


def _from_dicom(rows: Sequence[Row], options: PrepareOptions, notes: Notes) -> tuple[list[Row], int]:
    """Returns the rows of all DICOM files, and the number of X-rays among them."""
    result: list[Row] = []
    xrays: dict[str, str] = {}  # name -> path
    patients: set[str] = set()
    series: dict[str, list[tuple[dicom.Header, Row]]] = {}
    for row in rows:
        try:
            headers = dicom.headers(row.image, options.limits)
        except ValueError as error:
            result.append(_bad(row, row.file, error))
            continue
        headers, aside = [header for header in headers if not header.aside], headers[0].aside
        if not headers:
            notes.setdefault(f"DICOM files skipped: {aside}", []).append("")
            continue
        header = headers[0]
        patients.add(row.group or header.patient)
        row = replace(row, group=row.group or volumes.pseudonym(header.patient, options.salt))
        if header.modality == "CT":
            series.setdefault(header.series, []).extend((header, row) for header in headers)
            continue
        name = f"image-{volumes.pseudonym(header.image, options.salt)}"
        if name in xrays:
            copy = ValueError(f"{header.path} has the same SOPInstanceUID as {xrays[name]}: keep one of them")
            result.append(_bad(row, row.file, copy))
            continue
        xrays[name] = str(header.path)
        result.append(replace(row, file=name, image=partial(dicom.xray, header.path, options.limits)))
    if len(xrays) + len(series) > 1 and len(patients) == 1:
        notes["PatientID for all DICOM files, so they count as one patient unless groups are given"] = [""]
    if xrays:
        notes["X-rays from DICOM files, each in its own window"] = [""] * len(xrays)
    if series:
        notes["CT series from DICOM files"] = [""] * len(series)
    for uid, slices in series.items():
        name = f"series-{volumes.pseudonym(uid, options.salt)}"
        try:
            result += _from_series(name, slices, options, notes)
        except ValueError as error:
            result.append(_bad(slices[0][1], name, error))
    return result, len(xrays)


def _from_series(
    name: str, slices: Sequence[tuple[dicom.Header, Row]], options: PrepareOptions, notes: Notes
) -> list[Row]:
    series = dicom.series([header for header, _ in slices])
    row_of = {header.path: row for header, row in slices}
    rows = [row_of[header.path] for header in series.headers]
    for row in rows:
        if row.box is not None:
            raise ValueError(f"{row.file} is a slice of a CT series, which can't have a box")
    headers = tuple(replace(header, series="", image="", patient="") for header in series.headers)
    for note in series.notes:
        notes.setdefault(f"CT series {note}", []).append(name)
    if options.plane == series.plane:  # each slice may have its own label
        alone = f"image-{volumes.pseudonym(series.headers[0].image, options.salt)}" if len(rows) == 1 else ""
        result = []
        for i in volumes.indices(len(rows), options.position):
            image = partial(dicom.picture, headers[i], options.hu_windows, options.limits)
            result.append(replace(rows[i], file=alone or _name(name, options.plane, i), image=image))
        return result
    series.check(options.plane, options.limits)
    for key in ("label", "split"):
        values = sorted({getattr(row, key) for row in rows})
        if len(values) > 1:
            what = f"slices with several {key}s ({', '.join(values)})"
            raise ValueError(f"{rows[0].file}: {what}; a {options.plane} plane needs one {key} per series")
    return _planes(rows[0], name, series.shape, options, partial(dicom.cut, headers, series.step, options.plane))


def _from_nifti(row: Row, options: PrepareOptions, notes: Notes) -> list[Row]:
    try:
        header = nifti.header(row.image, options.limits)
        if row.box is not None:
            raise ValueError(f"{row.file} is a volume, which can't have a box")
    except ValueError as error:
        return [_bad(row, row.file, error)]
    notes.setdefault("NIfTI volumes", []).append("")
    for note in (*header.notes, *([] if row.group else ["without a patient: each counts as one"])):
        notes.setdefault(f"NIfTI volumes {note}", []).append(row.file)
    row = replace(row, group=row.group or row.file)
    return _planes(row, row.file, header.shape, options, partial(nifti.picture, row.image, options.plane))


def _planes(row: Row, name: str, shape: Sequence[int], options: PrepareOptions, cut: Any) -> list[Row]:
    """Returns one row per plane of a volume, or the row of the middle plane; `cut` takes number, windows and limits."""
    rows = []
    for i in volumes.indices(shape[volumes.PLANES[options.plane]], options.position):
        image = partial(cut, i, options.hu_windows, options.limits)
        rows.append(replace(row, file=_name(name, options.plane, i), image=image))
    return rows


def _name(volume: str, plane: str, index: int) -> str:
    return f"{volume}/{'' if plane == 'axial' else f'{plane}-'}{index:04d}"


def _bad(row: Row, name: str, error: Exception) -> Row:
    image = partial(volumes.raise_error, str(error))
    return replace(row, file=name, group=row.group or name, box=None, image=image)
