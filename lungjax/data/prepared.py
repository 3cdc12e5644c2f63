"""A prepared data set: columns from `index.csv`, encoded images from TFDS records, in the same order.

The index is a plain CSV beside the records, so that a set of 425,000 images opens in about a second without
reading an image, and a person can look into it. It is written last: a directory without it is not prepared.
"""

import contextlib
import csv
import gc
import hashlib
import io
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

SPLITS = ("train", "val", "test")
BOX = ("xmin", "ymin", "xmax", "ymax")
RESERVED = ("file", "label", "split", "group", "source", "width", "height", *BOX, "box", "pixels")
SLICES = "slices"  # the one TFDS split: train, val and test are a column, and "all" is TFDS's own word
FORMAT = 1
CHUNK = 20_000  # rows of an index read at a time, so that its text is never in memory as a whole


@dataclass(frozen=True, eq=False)
class Prepared:
    """One data set, ready for random access. Picklable, so that reading processes can have it."""

    name: str  # such as "covidx_ct/3a"
    classes: tuple[str, ...]  # display names in label order
    columns: dict[str, np.ndarray]  # each of length N, in record order; see `read_index`
    records: Any  # records[i]["image"] is the encoded image; len(records) == N
    window: tuple[float, float] | None  # 16-bit pixel values that become 0 and 255; None if all are 8-bit
    fingerprint: str  # hex digest of names, labels, splits, boxes and pixels

    def rows(self, split: str) -> np.ndarray:
        """Returns the row numbers of a split, int64 [n], in record order."""
        return np.flatnonzero(self.columns["split"] == split)


def is_prepared(directory: Path) -> bool:
    """Says whether `directory` holds a finished data set."""
    return (directory / "index.csv").is_file()


def load(directory: Path, name: str) -> Prepared:
    """Opens the prepared data set in `directory`.

    Raises ValueError if it was written in another format or its index and records differ in length.
    """
    described = json.loads((directory / "lungjax.json").read_text("utf-8"))
    if described["format"] != FORMAT:
        raise ValueError(
            f"{directory} has index format {described['format']}, this lungjax reads {FORMAT}: prepare "
            "it again with --overwrite"
        )
    classes = tuple(described["classes"])
    columns = read_index(directory / "index.csv", classes)
    records = open_records(directory)
    if len(records) != len(columns["label"]):
        raise ValueError(
            f"{directory}: index.csv has {len(columns['label'])} rows, the records {len(records)}: "
            "prepare it again with --overwrite"
        )
    window = tuple(described["window"]) if described["window"] else None
    digest = hashlib.sha256((directory / "lungjax.json").read_bytes())
    digest.update((directory / "index.csv").read_bytes())
    return Prepared(name, classes, columns, records, window, digest.hexdigest())


def open_records(directory: Path) -> Any:
    """Returns the TFDS data source of a prepared data set; each record's image stays encoded."""
    import tensorflow_datasets as tfds  # here: it costs most of a second, and only opening needs it

    with quiet_tfds():
        builder = tfds.builder_from_directory(directory)
        return builder.as_data_source(split=SLICES, decoders={"image": tfds.decode.SkipDecoding()})


@contextlib.contextmanager
def quiet_tfds() -> Iterator[None]:
    """Keeps TFDS from logging each step and from printing the size of a download that there is none of."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(before)


def read_index(path: Path, classes: Sequence[str]) -> dict[str, np.ndarray]:
    """Returns the columns of an index.csv, each of length N.

    `file`, `split`, `group`, `source` and further columns are str, `label` is int64 (place in `classes`),
    `width` and `height` int32 in pixels, `box` float32 [N, 4]: xmin, ymin, xmax, ymax in pixels, max
    exclusive.
    """
    number = {name: i for i, name in enumerate(classes)}
    parts: dict[str, list[np.ndarray]] = {}
    # The collector would walk the fresh strings again and again, which doubles the time.
    collecting = gc.isenabled()
    gc.disable()
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.reader(file)
            header = next(reader)
            while rows := list(itertools.islice(reader, CHUNK)):
                for name, values in zip(header, zip(*rows, strict=True), strict=True):
                    parts.setdefault(name, []).append(_column(name, values, number))
    finally:
        if collecting:
            gc.enable()
    columns = {name: np.concatenate(part) for name, part in parts.items() if name != "pixels"}
    return columns | {"box": np.stack([columns.pop(name) for name in BOX], axis=1)}


def _column(name: str, values: Sequence[str], number: Mapping[str, int]) -> np.ndarray:
    if name == "label":
        return np.fromiter(map(number.__getitem__, values), np.int64)
    if name in ("width", "height"):
        return np.fromiter(map(int, values), np.int32)
    if name in BOX:
        return np.fromiter(map(float, values), np.float32)
    return np.array(values, dtype=np.str_)


def write_index(
    directory: Path,
    name: str,
    classes: Sequence[str],
    window: tuple[float, float] | None,
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
) -> None:
    """Writes lungjax.json and then, whole or not at all, index.csv; `label` holds class names."""
    described: Mapping[str, Any] = {
        "format": FORMAT,
        "name": name,
        "classes": list(classes),
        "window": window,
    }
    (directory / "lungjax.json").write_text(json.dumps(described, indent=2, ensure_ascii=False) + "\n", "utf-8")
    partial = directory / "index.csv.partial"
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(directory / "index.csv")
