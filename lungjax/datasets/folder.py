"""Anyone's images, DICOM series and NIfTI volumes: labels.csv, {train,val,test}/{class}/... or {class}/..."""

import csv
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lungjax.config import nearest
from lungjax.data import prepared, splits
from lungjax.data.imaging import images
from lungjax.datasets import PrepareOptions, folder_volumes
from lungjax.datasets.listing import About, Example, Listing

KNOWN = ("path", "label", "split", "group", "source", *prepared.BOX)
SPLIT_NAMES = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test",
    "testing": "test",
}  # fmt: skip
LAYOUTS = (
    "a file labels.csv (path,label[,split,group,source]), or folders {train,val,test}/{class}/..., or "
    f"{{class}}/... with images ({', '.join(images.SUFFIXES)}), DICOM or NIfTI files"
)


ABOUT = About(
    title="your own CT slices, chest X-rays or CT volumes, in a folder",
    origin="your own images, or any set that lies in one of the layouts below; the prepared copy is about as big as "
    "the images (of a volume: as its pictures)",
    layout="""One of three:
  labels.csv with the columns path and label (paths are relative to it), and if you like split (train, val,
    test), group (patient), source (hospital, scanner), and xmin, ymin, xmax, ymax (a box in pixels, max exclusive);
    any other column is kept
  {train,val,test}/{class}/... (folders in a class folder don't matter; a missing val or test is cut from train)
  {class}/... (splits are made by group, 70/15/15)
Images are PNG, JPEG, TIFF, BMP, GIF (first frame), WebP or JPEG 2000, 8-bit gray or colour or unsigned 16-bit gray
(see --window). Without a group (or --group_pattern over the file names), each image counts as its own patient.

DICOM (.dcm, .dicom, or no suffix) and NIfTI (.nii, .nii.gz) may lie there as images do, and a path of labels.csv
may name such a file, or a folder that holds one or more series; pip install 'lungjax[dicom]'.
  CT: the files of one SeriesInstanceUID are a volume, in the order of their positions. --plane=axial, coronal or
    sagittal, --position=mid (one picture) or all; pixels are made square. --hu_window=-600/1500 (centre/width in
    Hounsfield units) is the default; three windows, with commas, become red, green and blue. Axial and coronal
    pictures have the patient's right on the left; the head is up. Localizers are left out.
  X-rays (CR, DX): in the window of the file, with bone white.
  NIfTI: Hounsfield units in three dimensions.
  Of a person, only a hash of the patient id is kept, as group. DICOM files appear in the index as
    series-HASH/0007 or image-HASH, never by their path; groups of labels.csv and paths of other files are
    kept as they are. --on_bad_image=skip lists what it left out by path.
The pictures of the NCCID study are --plane=coronal --position=mid in folder/NAME-64x128; the study's own files
are stored upside down, these are not.""",
    licence="that of your images",
    citation="the origin of your images",
    study="the splits as they were given; none if the folder gives none",
    clean="the same splits (or the ones made by group), without images whose patient or twin is in a later split",
)


def listing(source: Path, config: str, options: PrepareOptions) -> Listing:
    """Lists the images of the folder `source`, and the pictures of its volumes; see ABOUT.

    Without a split, three are made by group, and a missing val or test split is cut from train. Without a
    group, each image is its own. Classes are sorted (as numbers if they all are), or as in options.classes.

    Raises ValueError, with the line number where there is one, for a folder in none of the layouts, a
    malformed line, an unknown split, an unknown class or a pattern that matches nothing. A DICOM or NIfTI file that
    can't be used raises it when its example is read, see `folder_volumes.expand`.
    """
    table = source / "labels.csv"
    rows, extra, notes = _from_csv(table) if table.is_file() else _from_folders(source)
    if not rows:
        raise ValueError(f"{source}: no image found; allowed is {LAYOUTS}")
    for column, pattern in (("group", options.group_pattern), ("source", options.source_pattern)):
        if pattern:
            _apply_pattern(rows, column, pattern)
    cut = any(folder_volumes.kind(row["image"]) in ("dicom", "nifti") for row in rows)
    rows, told, slices = folder_volumes.expand(rows, options)
    notes += told
    alone = sum(1 for row in rows if not row["group"])
    grouped = alone < len(rows)
    if alone:
        what = f"{alone} images have no group" if grouped else "no groups (column group, or --group_pattern)"
        notes.append(f"{what}: each of them counts as its own patient")
    classes = _classes([row["label"] for row in rows], options.classes)
    number = {name: i for i, name in enumerate(classes)}
    labels = [number[row["label"]] for row in rows]
    groups = [row["group"] or row["file"] for row in rows]
    named, made = splits.complete([row["split"] for row in rows], labels, groups, options.seed)
    examples = [
        Example(
            row["file"],
            row["image"],
            label,
            split,
            group,
            row["source"],
            row["box"],
            row["extra"],
            row["where"],
            row["split"],
        )
        for row, label, split, group in zip(rows, labels, named, groups, strict=True)
    ]
    return Listing(
        classes,
        examples,
        extra,
        (*notes, *made),
        "patients" if grouped else "images without a group",
        "the splits as they were given" if any(row["split"] for row in rows) else "",
        options.modality == "ct" if options.modality else slices,
        {name: getattr(options, name) for name in ("hu_windows", "plane", "position")} if cut else None,
    )


def _classes(labels: Sequence[str], asked: tuple[str, ...]) -> tuple[str, ...]:
    found = set(labels)
    if asked:
        if set(asked) != found or len(set(asked)) != len(asked):
            raise ValueError(f"--classes={','.join(asked)}: the data has {', '.join(sorted(found))}, each once")
        return asked
    if len(found) < 2:
        raise ValueError(f"only one class, {next(iter(found))!r}: at least two are needed. Allowed is {LAYOUTS}")
    numbers = all(re.fullmatch(r"-?\d+", name) for name in found)
    return tuple(sorted(found, key=int) if numbers else sorted(found))


def _apply_pattern(rows: Sequence[dict[str, Any]], column: str, pattern: str) -> None:
    flag = f"--{column}_pattern={pattern}"
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{flag} is no regular expression: {error}") from None
    if not compiled.groups:
        raise ValueError(f"{flag} needs a group in brackets, such as '^([a-z]+)_'")
    if any(row[column] for row in rows):
        raise ValueError(f"{flag}: labels.csv already has a column {column}; leave one of them out")
    for row in rows:
        match = compiled.search(os.path.basename(row["file"]))
        if not match or not match.group(1):
            raise ValueError(f"{flag} finds nothing in the file name of {row['file']}")
        row[column] = match.group(1)


def _from_folders(source: Path) -> tuple[list[dict[str, Any]], tuple[str, ...], list[str]]:
    found = sorted(_walk(source))
    images_of = [path for path in found if folder_volumes.kind(str(source / path))]
    others, found = len(found) - len(images_of), images_of
    tops = {path.split("/")[0] for path in found if "/" in path}
    split_of = {top: SPLIT_NAMES[top.lower()] for top in tops if top.lower() in SPLIT_NAMES}
    if split_of and set(split_of) != tops:
        rest = ", ".join(sorted(tops - set(split_of)))
        raise ValueError(f"{source}: beside {', '.join(sorted(split_of))} there are the folders {rest}; {LAYOUTS}")
    depth = 2 if split_of else 1
    rows = []
    for path in found:
        parts = path.split("/")
        if len(parts) <= depth:
            raise ValueError(f"{source}: {path} lies in no class folder; allowed is {LAYOUTS}")
        split = split_of.get(parts[0], "")
        row: dict[str, Any] = {
            "file": path,
            "image": str(source / path),
            "label": parts[depth - 1],
            "split": split,
        }
        rows.append(row | {"group": "", "source": "", "box": None, "extra": (), "where": ""})
    return rows, (), [f"{others} files that are no images were left out"] if others else []


def _walk(source: Path) -> list[str]:
    """Returns all files below `source` as relative paths with "/", without hidden ones."""
    paths = []
    for folder, folders, files in os.walk(source, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith((".", "__MACOSX"))]
        base = os.path.relpath(folder, source)
        for name in files:
            if not name.startswith("."):
                paths.append(name if base == "." else f"{base}/{name}".replace(os.sep, "/"))
    return paths


def _from_csv(table: Path) -> tuple[list[dict[str, Any]], tuple[str, ...], list[str]]:
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            header = [name.strip() for name in next(reader, [])]
            extra, boxed = _check_header(header, table.name)
            rows = _read_rows(reader, header, extra, boxed, table)
    except UnicodeDecodeError as error:
        raise ValueError(f"{table.name} is not UTF-8 text ({error}): save it as UTF-8") from None
    except csv.Error as error:
        raise ValueError(f"{table.name} line {reader.line_num}: {error}") from None
    return rows, extra, []


def _check_header(header: Sequence[str], table: str) -> tuple[tuple[str, ...], bool]:
    lacking = [name for name in ("path", "label") if name not in header]
    if lacking:
        hint = "; columns are separated by commas" if len(header) == 1 else ""
        raise ValueError(
            f"{table} line 1: no column {' and no '.join(lacking)}, found {', '.join(header) or 'nothing'}; "
            f"{nearest(lacking[0], header)}{hint}"
        )
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice or "" in header:
        raise ValueError(
            f"{table} line 1: column {', '.join(twice) or 'name'} is {'there twice' if twice else 'empty'}"
        )
    extra = tuple(name for name in header if name not in KNOWN)
    taken = [name for name in extra if name in prepared.RESERVED]
    if taken:
        raise ValueError(f"{table} line 1: the column name {', '.join(taken)} is lungjax's own; rename it")
    box = [name for name in prepared.BOX if name in header]
    if box and len(box) < 4:
        raise ValueError(f"{table} line 1: a box needs all of {', '.join(prepared.BOX)}, found {', '.join(box)}")
    return extra, bool(box)


def _read_rows(
    reader: Any, header: Sequence[str], extra: tuple[str, ...], boxed: bool, table: Path
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    first: dict[str, str] = {}
    for values in reader:
        if not values:
            continue
        where = f"{table.name} line {reader.line_num}"
        if len(values) != len(header):
            raise ValueError(f"{where}: {len(values)} values, but the header has {len(header)} columns")
        row: dict[str, Any] = dict(zip(header, (value.strip() for value in values), strict=True))
        path, label, split = row["path"].replace("\\", "/"), row["label"], row.get("split", "")
        if not path or not label:
            raise ValueError(f"{where}: {'path' if not path else 'label'} is empty")
        if path in first:
            raise ValueError(f"{where}: {path} is already in {first[path]}")
        first[path] = where
        if split and split.lower() not in SPLIT_NAMES:
            raise ValueError(
                f"{where}: unknown split {split!r}; allowed are {', '.join(prepared.SPLITS)}, or none at all"
            )
        row |= {"file": path, "image": str(table.parent / path), "split": SPLIT_NAMES.get(split.lower(), "")}
        row |= {"group": row.get("group", ""), "source": row.get("source", ""), "where": where}
        row |= {"box": _box(row, where) if boxed else None, "extra": tuple(row[name] for name in extra)}
        if not path.lower().endswith(images.SUFFIXES) and os.path.isdir(row["image"]):
            rows += folder_volumes.unfold(row, _walk(Path(row["image"])))
        else:
            rows.append(row)
    without = next((row["where"] for row in rows if not row["split"]), None)
    if without and any(row["split"] for row in rows):
        raise ValueError(f"{without}: no split, but other lines have one; give every line a split, or none")
    return rows


def _box(row: dict[str, Any], where: str) -> tuple[float, float, float, float] | None:
    texts = [row[name] for name in prepared.BOX]
    if not any(texts):
        return None
    try:
        xmin, ymin, xmax, ymax = (float(text) for text in texts)
    except ValueError:
        raise ValueError(f"{where}: the box {' '.join(texts)!r} is not four numbers") from None
    if not (xmin < xmax and ymin < ymax):
        raise ValueError(f"{where}: the box {' '.join(texts)} is empty; wanted xmin < xmax and ymin < ymax")
    return xmin, ymin, xmax, ymax
