"""DICOM files and NIfTI volumes of a folder, turned into its examples: one for each picture that is cut."""

import os
from collections.abc import Sequence
from functools import partial
from typing import Any

from lungjax.data.imaging import dicom, images, nifti, volumes
from lungjax.datasets import PrepareOptions

Row = dict[str, Any]  # of `folder`: file, image, label, split, group, source, box, extra, where
Notes = dict[str, list[str]]  # what is to be said, and of which files or series; "" for one without a name


def kind(path: str) -> str:
    """Returns what a file is: "image", "dicom", "nifti" or "" for anything else.

    The suffix says it; a file without one (or with digits, the end of a DICOM UID) is opened to see.
    """
    low = path.lower()
    if low.endswith(images.SUFFIXES):
        return "image"
    if low.endswith(dicom.SUFFIXES):
        return "dicom"
    if low.endswith(nifti.SUFFIXES):
        return "nifti"
    name = os.path.basename(low)
    suffix = os.path.splitext(name)[1]
    unsure = (not suffix or suffix[1:].isdigit()) and name != "dicomdir"
    return "dicom" if unsure and dicom.is_dicom(path) else ""


def unfold(row: Row, files: Sequence[str]) -> list[Row]:
    """Returns one row for each DICOM and NIfTI file of `files` (relative to the folder that `row` names).

    Raises ValueError, with the row's place, if there is none.
    """
    paths = [name for name in files if kind(os.path.join(row["image"], name)) in ("dicom", "nifti")]
    if not paths:
        raise ValueError(
            f"{row['where']}: the folder {row['file']} holds no DICOM file and no NIfTI volume; "
            "give every other image a line of its own"
        )
    return [
        row | {"file": f"{row['file']}/{name}", "image": os.path.join(row["image"], name)} for name in sorted(paths)
    ]


def expand(rows: Sequence[Row], options: PrepareOptions) -> tuple[list[Row], list[str], bool]:
    """Replaces each row of a DICOM or NIfTI file by the pictures that `options` want of it.

    Of DICOM files, the index gets no path and no name, but "series-HASH/0007" (or "series-HASH/coronal-0031",
    and "image-HASH" for X-rays and lone slices); HASH and the group of rows without one are
    `volumes.pseudonym` of the UID and of the patient's id. A NIfTI file keeps its path, as an image does, and
    is a group of its own.

    What is wrong with a file or a series is raised when its example is read, so that --on_bad_image=skip can
    leave it out; these examples come first, so that without it nothing is written before they are found.

    Returns the rows, notes, and whether all of them are axial CT slices. Raises ValueError for options that
    can't be followed, a package that is not installed, and a NIfTI file that is named twice.
    """
    kinds = [kind(row["image"]) for row in rows]
    if not {"dicom", "nifti"} & set(kinds):
        return list(rows), [], False
    volumes.check_options(options.plane, options.position, options.hu_windows)
    for name, package, what in (("dicom", "pydicom", "DICOM files"), ("nifti", "nibabel", "NIfTI volumes")):
        if name in kinds:
            volumes.need(package, what)
    plain = [row for row, found in zip(rows, kinds, strict=True) if found not in ("dicom", "nifti")]
    notes: Notes = {}
    made, xrays = _from_dicom([row for row, found in zip(rows, kinds, strict=True) if found == "dicom"], options, notes)
    scans = {row["image"]: row for row, found in zip(rows, kinds, strict=True) if found == "nifti"}
    if len(scans) < kinds.count("nifti"):
        twice = next(row for row in rows if scans.get(row["image"], row) is not row)
        raise ValueError(f"{twice['where']}: {twice['file']} is named by another line too")
    for row in scans.values():
        made += _from_nifti(row, options, notes)
    bad = [row for row in made if row["image"].func is volumes.raise_error]
    good = [row for row in made if row["image"].func is not volumes.raise_error]
    said = [f"{len(names)} {what}{f', such as {names[0]}' if names[0] else ''}" for what, names in notes.items()]
    windows = " and ".join(f"{centre:g} +/- {width / 2:g}" for centre, width in options.hu_windows)
    if len(good) > xrays:
        said.append(f"{len(good) - xrays} {options.plane} pictures of CT volumes, window {windows} Hounsfield units")
    return [*bad, *plain, *good], said, not plain and not xrays and options.plane == "axial"


def _from_dicom(rows: Sequence[Row], options: PrepareOptions, notes: Notes) -> tuple[list[Row], int]:
    """Returns the rows of all DICOM files, and how many of them are X-rays."""
    made: list[Row] = []
    seen: dict[str, str] = {}
    patients: set[str] = set()
    by_series: dict[str, list[tuple[dicom.Header, Row]]] = {}
    for row in rows:
        try:
            header = dicom.header(row["image"])
        except ValueError as error:
            made.append(_refused(row, row["file"], error))
            continue
        if header.aside:
            notes.setdefault(f"DICOM files left out: {header.aside}", []).append("")
            continue
        patients.add(row["group"] or header.patient)
        row = row | {"group": row["group"] or volumes.pseudonym(header.patient, options.salt)}
        if header.modality == "CT":
            by_series.setdefault(header.series, []).append((header, row))
            continue
        name = f"image-{volumes.pseudonym(header.image, options.salt)}"
        if name in seen:
            copy = ValueError(f"{header.path} has the SOPInstanceUID of {seen[name]}: keep one of them")
            made.append(_refused(row, row["file"], copy))
            continue
        seen[name] = str(header.path)
        made.append(row | {"file": name, "image": partial(dicom.xray, header.path)})
    xrays = len(seen)
    if xrays + len(by_series) > 1 and len(patients) == 1:
        notes["PatientID for all DICOM files: they count as one patient; give a group to tell them apart"] = [""]
    if xrays:
        notes["X-rays from DICOM files, each in its own window"] = [""] * xrays
    if by_series:
        notes["CT series from DICOM files"] = [""] * len(by_series)
    for uid, found in by_series.items():
        name = f"series-{volumes.pseudonym(uid, options.salt)}"
        try:
            made += _from_series(name, found, options, notes)
        except ValueError as error:
            made.append(_refused(found[0][1], name, error))
    return made, xrays


def _from_series(
    name: str, found: Sequence[tuple[dicom.Header, Row]], options: PrepareOptions, notes: Notes
) -> list[Row]:
    series = dicom.series([header for header, _ in found])
    row_of = {header.path: row for header, row in found}
    rows = [row_of[header.path] for header in series.headers]
    boxed = next((row for row in rows if row["box"] is not None), None)
    if boxed:
        raise ValueError(f"{boxed['file']} is of a CT series, whose pictures are made anew: no box can be given for it")
    for note in series.notes:
        notes.setdefault(f"CT series {note}", []).append(name)
    if options.plane == series.plane:  # each slice may have a label of its own
        units: dict[Any, list[int]] = {}
        for i, row in enumerate(rows):
            units.setdefault((row["label"], row["split"], row["where"]), []).append(i)
        if options.position == "mid":
            places = [unit[volumes.middle_slice(len(unit))] for unit in units.values()]
        else:
            places = list(range(len(rows)))
        if len(rows) == 1:
            name = f"image-{volumes.pseudonym(series.headers[0].image, options.salt)}"
        files = [name if len(rows) == 1 else _name(name, options.plane, i) for i in places]
        read = [partial(dicom.picture, series.headers[i].path, options.hu_windows) for i in places]
        return [rows[i] | {"file": file, "image": image} for i, file, image in zip(places, files, read, strict=True)]
    if series.flaw:
        raise ValueError(f"{series.headers[0].path} and its series: no {options.plane} plane can be cut, {series.flaw}")
    for key in ("label", "split"):
        several = sorted({row[key] for row in rows})
        if len(several) > 1:
            raise ValueError(
                f"{series.headers[0].path} and its series have several {key}s ({', '.join(several)}): a "
                f"{options.plane} plane needs one {key} for the series"
            )
    paths = tuple(header.path for header in series.headers)
    return [
        rows[0]
        | {
            "file": _name(name, options.plane, i),
            "image": partial(dicom.cut, paths, series.step, options.plane, i, options.hu_windows),
        }
        for i in _places(series.shape[volumes.PLANES[options.plane]], options.position)
    ]


def _from_nifti(row: Row, options: PrepareOptions, notes: Notes) -> list[Row]:
    try:
        header = nifti.header(row["image"])
        if row["box"] is not None:
            raise ValueError(f"{row['file']} is a volume, whose pictures are made anew: no box can be given for it")
    except ValueError as error:
        return [_refused(row, row["file"], error)]
    notes.setdefault("NIfTI volumes", []).append("")
    for note in (*header.notes, *([] if row["group"] else ["without a patient: each counts as its own"])):
        notes.setdefault(f"NIfTI volumes {note}", []).append(row["file"])
    return [
        row
        | {
            "file": _name(row["file"], options.plane, i),
            "group": row["group"] or row["file"],
            "image": partial(nifti.picture, row["image"], options.plane, i, options.hu_windows),
        }
        for i in _places(header.shape[volumes.PLANES[options.plane]], options.position)
    ]


def _places(count: int, position: str) -> Sequence[int]:
    return [volumes.middle_slice(count)] if position == "mid" else range(count)


def _name(volume: str, plane: str, index: int) -> str:
    return f"{volume}/{'' if plane == 'axial' else f'{plane}-'}{index:04d}"


def _refused(row: Row, name: str, error: Exception) -> Row:
    return row | {
        "file": name,
        "group": row["group"] or name,
        "box": None,
        "image": partial(volumes.raise_error, str(error)),
    }
