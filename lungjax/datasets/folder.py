"""A user's images, DICOM series and NIfTI volumes: labels.csv, {train,val,test}/{class}/... or {class}/..."""

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lungjax.config import nearest
from lungjax.data import prepared
from lungjax.data.csv_table import read_table
from lungjax.data.folder_walk import check_regular, list_files
from lungjax.data.imaging import images
from lungjax.data.imaging.volumes import PLANES
from lungjax.data.safe_text import printable
from lungjax.datasets import PrepareOptions, folder_volumes
from lungjax.datasets.folder_volumes import Row
from lungjax.datasets.listing import About, Example, Listing, complete_splits

BOX = ("xmin", "ymin", "xmax", "ymax")
COLUMNS = ("path", "label", "split", "group", "source", *BOX)  # of labels.csv; others are kept unmodified
FINDING = {"1": "1", "1.0": "1", "0": "0", "0.0": "0", "-1": "-1", "-1.0": "-1", "": "-1"}  # values in labels.csv
SPLIT_NAMES = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test",
    "testing": "test",
}  # fmt: skip
LAYOUTS = (
    "a file labels.csv (path,label[,split,group,source], or a column per finding instead of label), or folders "
    f"{{train,val,test}}/{{class}}/..., or {{class}}/... with images ({', '.join(images.SUFFIXES)}), DICOM or NIfTI"
)
MIN_PATIENTS = 3  # fewer subfolders of class folders are more likely "images" and "masks" than patients

ABOUT = About(
    title="your own CT slices, chest X-rays or CT volumes, in a folder",
    origin="your own images, or any data set in one of the layouts below",
    layout="""One of three:
  labels.csv with the columns path and label (paths relative to the file), and optionally split (train, val, test),
    group (patient), source (hospital or scanner), and xmin, ymin, xmax, ymax (a box in pixels, max exclusive). For
    several findings per image, a column per finding instead of label: 1 is present, 0 absent, and -1 or nothing
    unknown. They are all other columns with such values, or those that --classes names.
  {train,val,test}/{class}/... (a missing val or test is cut from train; without train, an external test set)
  {class}/... (splits are made by group, 70/15/15)
Images are PNG, JPEG, TIFF, BMP, GIF (first frame), WebP or JPEG 2000 files, either 8-bit gray or color, or unsigned
16-bit gray (see --window). Patients are given by the column group, by folders below the class folders
({class}/{patient}/...), or by the first group of the regex --group_pattern in the path below the source. Otherwise, and
with --group_pattern=none, each image is its own patient.

DICOM (.dcm, .dicom, or no suffix) and NIfTI (.nii, .nii.gz) files may replace images, and a path in labels.csv may be
such a file, or a folder with one or more series. This requires pip install -e '.[dicom]'.
  CT: the slices with one SeriesInstanceUID (except localizers), or the frames of an enhanced CT, form a volume. --plane
    is axial, coronal or sagittal, --position is mid (one image) or all, and --hu_window=-600/1500 (center/width in HU)
    is the default; three windows, separated by commas, become red, green and blue.
  X-rays (CR, DX): rendered in the window of the file, with white bones.
  Patient ids and DICOM paths are replaced by hashes, such as series-HASH/0007, which --lookup resolves. Groups in
    labels.csv and paths of other files are kept. --on_bad_image=skip lists skipped files by path.
With --plane=coronal --position=mid --hu_window=-300/1400, the images of folder/NAME-64x128 resemble those of the NCCID
study, except that the head is up.""",
    licence="that of your images",
    citation="the origin of your images",
    study="the given splits; none if the folder has none",
    clean="the given splits (or new ones by group), without images whose patient or near duplicate is in a later split",
)


def listing(source: Path, config: str, options: PrepareOptions) -> Listing:
    """Lists the images of the folder `source` and those cut from its volumes; see ABOUT.

    Classes are in the order of `options.classes`, or sorted (numerically if all are numbers); findings are in that
    order, or in that of their columns. Raises ValueError for an unknown layout, a malformed line, an unknown split or
    class, and a path that a pattern does not match. Errors of DICOM and NIfTI files are raised when an example is read,
    see `folder_volumes.expand`.
    """
    table = source / "labels.csv"
    by_folder = not options.group_pattern
    findings: tuple[str, ...] = ()
    if table.is_file():
        rows, findings, extra, warnings = _from_csv(table, options.classes)
        notes = [f"several findings per image: {', '.join(findings)}"] if findings else []
    else:
        rows, extra, notes, warnings = _from_folders(source, by_folder)
    if not rows:
        raise ValueError(f"{source}: no image found{''.join(f' ({text})' for text in warnings)}; expected {LAYOUTS}")
    rows = _search(rows, "group", options.group_pattern)
    rows = _search(rows, "source", options.source_pattern)
    rows, volume_notes, modality = folder_volumes.expand(rows, options)
    if ungrouped := sum(not row.group for row in rows):
        warnings.append(
            f"{ungrouped:,} of {len(rows):,} images have no group and count as separate patients. If some show one "
            "patient, scores are too high: give a column group, folders {class}/{patient}/... or --group_pattern"
        )
    classes = findings or _classes([row.label for row in rows], options.classes)
    cases = Counter(name.casefold() for name in classes)
    if alike := [name for name in classes if cases[name.casefold()] > 1]:
        warnings.append(f"classes that differ only in case: {', '.join(alike)}")
    labels = [tuple(map(int, row.label.split(","))) if findings else classes.index(row.label) for row in rows]
    listed = [
        Example(r.file, r.image, label, r.split, r.group or r.file, r.source, r.box, r.extra, r.where, r.split)
        for r, label in zip(rows, labels, strict=True)
    ]
    examples, split_notes = complete_splits(listed, options.seed)
    group_name = "patients" if ungrouped < len(rows) else "images without a group"
    study = "the given splits" if any(row.split for row in rows) else ""
    modality = options.modality or modality
    body = modality == "ct" and options.plane == "axial"
    cut = {name: getattr(options, name) for name in ("hu_windows", "plane", "position")} if volume_notes else None
    all_notes = (*notes, *volume_notes, *split_notes)
    return Listing(classes, examples, extra, all_notes, group_name, study, body, cut, tuple(warnings), modality)


def lookup(source: Path, name: str, options: PrepareOptions) -> list[str]:
    """Returns the files of an image, series or patient named in reports, such as "series-5d8538175f2c/0003".

    `options` must be those that were passed to prepare. Raises ValueError if nothing in `source` has this name.
    """
    prefix = name.rpartition("/")[2].partition("-")[0]
    plane = prefix if prefix in PLANES else "axial" if "/" in name else options.plane
    pattern = options.group_pattern or ("" if (source / "labels.csv").is_file() else "none")
    examples = listing(source, "", replace(options, plane=plane, position="all", group_pattern=pattern)).examples
    files: dict[str, None] = {}
    for example in examples:
        if name in (example.file, example.file.rpartition("/")[0], example.group):
            files |= {getattr(one, "name", one): None for one in folder_volumes.sources(example.image)}
    if not files:
        raise ValueError(f"{source}: nothing is named {name}; give the folder, the --data_dir and the flags of prepare")
    return list(files)


def _classes(labels: Sequence[str], order: tuple[str, ...]) -> tuple[str, ...]:
    names = set(labels)
    if order:
        if set(order) != names or len(set(order)) != len(order):
            raise ValueError(f"--classes={','.join(order)}: expected each of {', '.join(sorted(names))} once")
        return order
    if len(names) < 2:
        raise ValueError(f"only one class, {next(iter(names))!r}; at least two are required. Expected {LAYOUTS}")
    numbers = all(re.fullmatch(r"-?\d+", name) for name in names)
    return tuple(sorted(names, key=int) if numbers else sorted(names))


def _search(rows: Sequence[Row], column: str, pattern: str) -> list[Row]:
    """Sets a column to the first group of a regex in the path of each row (group) or in its file name (source).

    Raises ValueError for an invalid pattern, a row that does not match, or a column that labels.csv already has.
    """
    flag = f"--{column}_pattern={pattern}"
    if pattern and any(getattr(row, column) for row in rows):
        raise ValueError(f"{flag}: labels.csv already has a column {column}; remove one of them")
    if not pattern or (column, pattern) == ("group", "none"):
        return list(rows)
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{flag} is not a regular expression: {error}") from None
    if not regex.groups:
        raise ValueError(f"{flag} needs a group in parentheses, such as '([a-z]+)_'")
    result = []
    for row in rows:
        match = regex.search(row.file if column == "group" else os.path.basename(row.file))
        if not match or not match[1]:
            raise ValueError(f"{flag} matches nothing in {row.file}")
        value: Any = {column: match[1]}
        result.append(replace(row, **value))
    return result


def _from_folders(source: Path, by_folder: bool) -> tuple[list[Row], tuple[str, ...], list[str], list[str]]:
    """Returns the rows, an empty tuple (there are no extra columns), notes and warnings.

    With `by_folder`, the folders below the class folders are groups, except for DICOM, which has patient ids.
    """
    files = list_files(source)
    kinds = {path: name for path in files if (name := folder_volumes.kind(str(source / path)))}
    paths = list(kinds)
    tops = {path.split("/")[0] for path in paths if "/" in path}
    split_of = {top: SPLIT_NAMES[top.lower()] for top in tops if top.lower() in SPLIT_NAMES}
    if split_of and set(split_of) != tops:
        others, given = (", ".join(sorted(names)) for names in (tops - set(split_of), split_of))
        raise ValueError(f"{source}: unexpected folders {others} next to {given}; expected {LAYOUTS}")
    depth = 2 if split_of else 1
    rows: list[Row] = []
    for path in paths:
        parts = path.split("/")
        if len(parts) <= depth:
            raise ValueError(f"{source}: {path} is not in a class folder; expected {LAYOUTS}")
        patient = parts[depth] if by_folder and len(parts) > depth + 1 and kinds[path] != "dicom" else ""
        rows.append(Row(path, str(source / path), parts[depth - 1], split_of.get(parts[0], ""), patient))
    notes, warnings = folder_volumes.unread_notes([path for path in files if path not in kinds])
    patients = {row.group for row in rows if row.group}
    if 0 < len(patients) < MIN_PATIENTS:
        raise ValueError(
            f"{source}: do the folders {', '.join(sorted(patients))} in the class folders each hold one patient? Give "
            "a --group_pattern that matches patients, or --group_pattern=none if each image is from a different one"
        )
    if patients:
        notes.append(f"{len(patients):,} patients, according to the folders below the class folders")
    pairs = Counter(group for group, _ in {(row.group, row.label) for row in rows})
    if shared := sorted(name for name in patients if pairs[name] > 1):
        warnings.append(
            f"{len(shared):,} patient folders (such as {shared[0]}) have the same name in several classes and count as "
            f"one patient; if they are not, use --group_pattern='{'[^/]+/' * (depth - 1)}([^/]+/[^/]+)/'"
        )
    return rows, (), notes, warnings


def _from_csv(table: Path, classes: tuple[str, ...]) -> tuple[list[Row], tuple[str, ...], tuple[str, ...], list[str]]:
    """Returns the rows, the findings (if any), the names of extra columns, and warnings about unlisted files."""
    columns, lines = read_table(table, ("path",))
    findings = _findings(table.name, columns, lines, classes) if "label" not in columns else ()
    if not findings and "label" not in columns:
        read_table(table, ("path", "label"))  # raises ValueError
    extra = tuple(name for name in columns if name not in (*COLUMNS, *findings))
    _check_columns(columns, extra, f"{table.name} line 1")
    rows: list[Row] = []
    for where, values in lines:
        path, split = values["path"].replace("\\", "/"), values.get("split", "")
        for name in ("path",) if findings else ("path", "label"):
            if not values[name]:
                raise ValueError(f"{where}: {name} is empty")
        if split and split.lower() not in SPLIT_NAMES:
            allowed = ", ".join(prepared.SPLITS)
            raise ValueError(f"{where}: unknown split {split!r}; expected {allowed}, or an empty column")
        row = Row(
            file=path,
            image=str(table.parent / path),
            label=",".join(FINDING[values[name]] for name in findings) or values["label"],
            split=SPLIT_NAMES.get(split.lower(), ""),
            group=values.get("group", ""),
            source=values.get("source", ""),
            box=_box([values.get(name, "") for name in BOX], where),
            extra=tuple(values[name] for name in extra),
            where=where,
        )
        try:
            check_regular(row.image)
        except ValueError as error:
            raise ValueError(f"{where}: {path} is {error}") from None
        except OSError:
            pass  # a missing file is reported when it is read, so that --on_bad_image=skip applies
        is_folder = not path.lower().endswith(images.SUFFIXES) and (table.parent / path).is_dir()
        rows += folder_volumes.unfold(row) if is_folder else [row]
    without = next((row.where for row in rows if not row.split), None)
    if without and any(row.split for row in rows):
        raise ValueError(f"{without}: no split, but other lines have one; give all lines a split, or none")
    listed = {os.path.abspath(row.image) for row in rows}
    every = [str(table.parent / path) for path in list_files(table.parent, lambda path, reason: None)]
    kinds = {path: folder_volumes.kind(path) for path in every if os.path.abspath(path) not in listed}
    _, warnings = folder_volumes.unread_notes([path for path, kind in kinds.items() if not kind])
    if outside := [row.file for row in rows if os.path.isabs(row.file) or ".." in row.file.split("/")]:
        warnings.append(f"{len(outside):,} paths in {table.name} are absolute or contain .., such as {outside[0]}")
    if unlisted := [path for path, kind in kinds.items() if kind]:
        example = printable(os.path.basename(unlisted[0]))
        warnings.append(f"skipped {len(unlisted):,} images that are not in {table.name}, such as {example}")
    return rows, findings, extra, warnings


def _findings(
    where: str, columns: Sequence[str], lines: Sequence[tuple[str, Mapping[str, str]]], names: tuple[str, ...]
) -> tuple[str, ...]:
    """Returns the columns of findings: `names`, or without them all columns of which each value is in FINDING.

    Raises ValueError for an unknown name or value, and for a single finding.
    """
    for name in names:
        if name not in columns:
            raise ValueError(f"{where} line 1: no column of the finding {name} (--classes); {nearest(name, columns)}")
        for place, values in lines:
            if values[name] not in FINDING:
                raise ValueError(f"{place}: {name} is {values[name]!r}; expected 1, 0, or -1 or nothing if unknown")
    others = {name: {values[name] for _, values in lines} for name in columns if name not in COLUMNS}
    names = names or tuple(name for name, values in others.items() if {""} != values <= {*FINDING})
    if len(names) == 1:
        raise ValueError(
            f"{where} line 1: only one finding, {names[0]}; give a column label with its two classes instead"
        )
    return names


def _check_columns(columns: Sequence[str], extra: Sequence[str], where: str) -> None:
    repeated = sorted({name for name in columns if columns.count(name) > 1})
    if repeated:
        raise ValueError(f"{where}: column {', '.join(repeated)} appears twice")
    if "" in columns:
        raise ValueError(f"{where}: a column has no name")
    reserved = [name for name in extra if name in prepared.COLUMNS]
    if reserved:
        raise ValueError(f"{where}: the column name {', '.join(reserved)} is reserved; rename it")
    box = [name for name in BOX if name in columns]
    if box and len(box) < 4:
        raise ValueError(f"{where}: a box needs all of {', '.join(BOX)}, not only {', '.join(box)}")


def _box(texts: Sequence[str], where: str) -> tuple[float, float, float, float] | None:
    if not any(texts):
        return None
    try:
        xmin, ymin, xmax, ymax = map(float, texts)
    except ValueError:
        raise ValueError(f"{where}: the box {' '.join(texts)!r} is not four numbers") from None
    if not (xmin < xmax and ymin < ymax):
        raise ValueError(f"{where}: the box {' '.join(texts)} is empty: expected xmin < xmax and ymin < ymax")
    return xmin, ymin, xmax, ymax
