"""A prepared data set: columns from `index.csv` and encoded images from TFDS records, in the same order.

The index is a CSV file next to the records, so that 425,000 images open in about a second. It is written last; a
directory without it is not prepared.
"""

import contextlib
import csv
import gc
import hashlib
import io
import itertools
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from lungjax.data import splits
from lungjax.runtime.files import atomic_file

SPLITS = splits.SPLITS
BOX = ("xmin", "ymin", "xmax", "ymax")
COLUMNS = (
    "file", "label", "split", "split_study", "group", "source", "width", "height", *BOX,
    "pixels", "phash", "mean", "std", "found",
)  # fmt: skip
RESERVED = (*COLUMNS, "box")
SLICES = "slices"  # the only TFDS split; train, val and test are in the index
VERSION = "2.1.0"  # of the format of a prepared directory
BODY_SIDE = 128  # rows and columns of stored body masks, regardless of the image size
CHUNK = 20_000  # rows of the index that are read at a time, to limit memory


@dataclass(frozen=True, eq=False)
class Prepared:
    """A data set with random access; picklable for worker processes."""

    name: str  # such as "covidx_ct/3a"
    classes: tuple[str, ...]  # display names in label order
    columns: dict[str, np.ndarray]  # each of length N, in record order; see `read_index`
    records: Any  # records[i]["image"] is the encoded image; len(records) == N
    window: tuple[float, float] | None  # 16-bit pixel values that become 0 and 255; None if all are 8-bit
    fingerprint: str  # hex digest of names, labels, splits, boxes and pixels
    protocol: str = "clean"  # of the splits that `rows` returns
    body: bool = False  # whether records have a body mask
    volumes: Mapping[str, Any] | None = None  # how CT volumes became images: hu_windows, plane, position, orientation
    modality: str = ""  # "ct", "xray", or "" if unknown or mixed
    rotate: bool = False  # whether `pipeline.Reader` rotates the images by 180 degrees, as the network expects

    @property
    def orientation(self) -> str:
        """Returns "standard", or "rotated" if the stored images are rotated by 180 degrees."""
        return str((self.volumes or {}).get("orientation", "standard"))

    def rows(self, split: str) -> np.ndarray:
        """Returns the row numbers of a split, int64 [n], in order; with protocol "study", rows may be repeated."""
        if self.protocol == "clean":
            return np.flatnonzero(self.columns["split"] == split)
        cells, place = np.unique(self.columns["split_study"], return_inverse=True)
        times = np.asarray([splits.parse_study(cell).get(split, 0) for cell in cells])
        return np.repeat(np.arange(len(place)), times[place])

    def body_mask(self, row: int) -> np.ndarray:
        """Returns the body mask, bool [BODY_SIDE, BODY_SIDE] over the full stored image."""
        packed = np.frombuffer(zlib.decompress(self.records[int(row)]["body"]), np.uint8)
        return np.unpackbits(packed).reshape(BODY_SIDE, BODY_SIDE).astype(bool)


def directory(data_dir: Path, name: str) -> Path:
    """Returns the directory of a data set, such as "covidx_ct/3a"."""
    return data_dir / name / VERSION


def is_prepared(directory: Path) -> bool:
    """Returns whether `directory` contains a complete data set."""
    return (directory / "index.csv").is_file()


def load(directory: Path, name: str, protocol: str = "clean") -> Prepared:
    """Opens the prepared data set in `directory`, with the splits of `protocol`.

    Raises ValueError if the data set lacks requested study splits, or if index and records differ in length.
    """
    info = json.loads((directory / "lungjax.json").read_text("utf-8"))
    if protocol == "study" and not info["study"]:
        raise ValueError(f"data.protocol=study: {name} has no original splits; use clean")
    classes = tuple(info["classes"])
    columns = read_index(directory / "index.csv", classes)
    records = open_records(directory)
    if len(records) != (count := len(columns["label"])):
        raise ValueError(f"{directory}: {count} rows but {len(records)} records; prepare it again with --overwrite")
    window, digest = tuple(info["window"]) if info["window"] else None, fingerprint(directory)
    optional = info.get("volumes"), info["modality"]
    return Prepared(name, classes, columns, records, window, digest, protocol, info["body"], *optional)


def fingerprint(directory: Path) -> str:
    """Returns a hex digest of a prepared data set, without opening its records."""
    digest = hashlib.sha256((directory / "lungjax.json").read_bytes())
    digest.update((directory / "index.csv").read_bytes())
    return digest.hexdigest()


class Records:
    """The records of a prepared data set as dicts of bytes; picklable.

    `image` is the encoded image, `body` the zlib-compressed bits of the body mask; `file`, `group` and `source` are
    names. TFDS would decode every feature, which takes as long as decoding a small image.
    """

    def __init__(self, source: Any):
        # Imported here, in the main thread of a worker, since two threads that import TFDS at once deadlock.
        from tensorflow_datasets.proto import tf_example_pb2

        self._source = source  # source[row] is a serialized tf.train.Example
        self._parse = tf_example_pb2.Example.FromString

    def __reduce__(self) -> Any:
        """Pickles only the data source."""
        return Records, (self._source,)

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self._source)

    def __getitem__(self, row: int) -> dict[str, bytes]:
        """Returns a record. Raises IndexError for an invalid row."""
        if not 0 <= row < len(self._source):
            raise IndexError(f"record {row} is out of range for {len(self._source)} records")
        features = self._parse(self._source[row]).features.feature
        return {name: features[name].bytes_list.value[0] for name in ("image", "body", "file", "group", "source")}


def open_records(directory: Path) -> Records:
    """Returns the records of a prepared data set, in the order in which they were written."""
    import tensorflow_datasets as tfds  # takes most of a second

    with quiet_tfds():
        builder = tfds.builder_from_directory(directory)
        source = builder.as_data_source(split=SLICES, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
    return Records(source.data_source)


@contextlib.contextmanager
def quiet_tfds() -> Iterator[None]:
    """Suppresses log messages and output of TFDS."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(before)


def read_index(path: Path, classes: Sequence[str]) -> dict[str, np.ndarray]:
    """Returns the columns of an index.csv, each of length N.

    `label` is an int64 index of `classes`, `width` and `height` are int32 in pixels, `box` is float32 [N, 4] with xmin,
    ymin, xmax, ymax in pixels (max exclusive), `phash` is uint64, `mean` and `std` are float32 of pixel / 255, and
    `found` is bool, False if a stage found no body or lung. Other columns are str.
    """
    number = {name: i for i, name in enumerate(classes)}
    parts: dict[str, list[np.ndarray]] = {}
    # Garbage collection would traverse the new strings again and again, which doubles the time.
    enabled = gc.isenabled()
    gc.disable()
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.reader(file)
            header = next(reader)
            while rows := list(itertools.islice(reader, CHUNK)):
                for name, values in zip(header, zip(*rows, strict=True), strict=True):
                    parts.setdefault(name, []).append(_column(name, values, number))
    finally:
        if enabled:
            gc.enable()
    columns = {name: np.concatenate(part) for name, part in parts.items()}
    return columns | {"box": np.stack([columns.pop(name) for name in BOX], axis=1)}


def _column(name: str, values: Sequence[str], number: Mapping[str, int]) -> np.ndarray:
    if name == "label":
        return np.fromiter(map(number.__getitem__, values), np.int64)
    if name in ("width", "height"):
        return np.fromiter(map(int, values), np.int32)
    if name in (*BOX, "mean", "std"):
        return np.fromiter(map(float, values), np.float32)
    if name == "found":
        return np.array(values) == "1"
    if name == "phash":
        return np.fromiter((int(value, 16) for value in values), np.uint64)
    return np.array(values, dtype=np.str_)


def write_index(directory: Path, info: Mapping[str, Any], header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Writes lungjax.json from `info` and then, atomically, index.csv, with class names in `label`.

    `info` has name, classes, window, study (a description of protocol=study), stage, size, body, modality, and volumes
    if images were cut from CT volumes (hu_windows, plane, position, orientation).
    """
    (directory / "lungjax.json").write_text(json.dumps(info, indent=2, ensure_ascii=False) + "\n", "utf-8")
    with atomic_file(directory / "index.csv") as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
