"""A prepared data set: columns from `index.npz` and encoded images from TFDS records, in the same order.

The index is separate from the records, so that large data sets open quickly. It is written last; a directory without
it is not prepared.
"""

import contextlib
import hashlib
import io
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from lungjax.config.schema import parse_json
from lungjax.data import splits
from lungjax.data.imaging import images
from lungjax.runtime.files import atomic_file

SPLITS = splits.SPLITS
COLUMNS = {  # of the index, with their types; a data set may add columns of type str
    "file": np.str_, "label": np.int64, "split": np.str_, "split_study": np.str_, "group": np.str_, "source": np.str_,
    "width": np.int32, "height": np.int32, "box": np.float32, "pixels": np.str_, "phash": np.uint64,
    "mean": np.float32, "std": np.float32, "found": np.bool_,
}  # fmt: skip
SLICES = "slices"  # the only TFDS split; train, val and test are in the index
VERSION = "3.0.0"  # of the format of a prepared directory
BODY_SIDE = 128  # rows and columns of stored body masks, regardless of the image size
INDEX = "index.npz"
INFO = "lungjax.json"
OLD = ".old"  # suffix of a directory that is being replaced, see `staging.publish`
ADVICE = "prepare the data set again with --overwrite, or restore a copy"
SAMPLE = 32  # records that are compared with the index when a data set is opened; one in eight is decoded
COLUMN = "column/"  # prefix of their names in the index


@dataclass(frozen=True, eq=False)
class Prepared:
    """A data set with random access; picklable for worker processes."""

    name: str  # such as "covidx_ct/3a"
    classes: tuple[str, ...]  # display names in label order
    # Arrays of length N in record order. `label` is an index of `classes`, or of findings [N, C], see `labels`; `width`
    # and `height` are in pixels, as is `box` [N, 4]: xmin, ymin, xmax, ymax, max exclusive; `mean` and `std` are of
    # pixel / 255; `found` is False if a stage found no body or lung.
    columns: dict[str, np.ndarray]
    records: Any  # records[i]["image"] is the encoded image; len(records) == N
    window: tuple[float, float] | None  # 16-bit pixel values that become 0 and 255; None if all are 8-bit
    fingerprint: str  # hex digest of names, labels, splits, boxes and pixels
    protocol: str = "clean"  # of the splits that `rows` returns
    body: bool = False  # whether records have a body mask
    volumes: Mapping[str, Any] | None = None  # how CT volumes became images: hu_windows, plane, position, orientation
    modality: str = ""  # "ct", "xray", or "" if unknown or mixed
    rotate: bool = False  # whether `pipeline.Reader` rotates the images by 180 degrees, as the network expects
    # Rows of near duplicates in different groups, int64 [P, 2]; see `duplicates.near_twins`.
    near: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.int64))

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
    """Returns the directory of a data set, such as "covidx_ct/3a"; the old one, if a kill interrupted replacing it."""
    final = data_dir / name / VERSION
    old = final.with_name(VERSION + OLD)
    return old if old.is_dir() and not final.exists() else final


def is_prepared(directory: Path) -> bool:
    """Returns whether `directory` contains a complete data set."""
    return (directory / INDEX).is_file()


def load(directory: Path, name: str, protocol: str = "clean") -> Prepared:
    """Opens the prepared data set in `directory`, with the splits of `protocol`.

    Raises ValueError if the data set lacks requested study splits, or if its files are damaged or do not match.
    """
    with damage(directory / INFO):
        info = parse_json((directory / INFO).read_bytes(), INFO)
        classes, (low, high) = tuple(map(str, info["classes"])), map(float, info["window"] or (0, 1))
        study, body, volumes, modality = info["study"], bool(info["body"]), info["volumes"], str(info["modality"])
        modified = bool(info["stage"] or info["size"])
        if low >= high or not isinstance(study, str) or not isinstance(volumes, dict | None):
            raise ValueError("a field has an invalid value")
    if protocol == "study" and not study:
        raise ValueError(f"data.protocol=study: {name} has no original splits; use clean")
    with damage(directory / INDEX):
        with np.load(directory / INDEX) as file:
            columns = {key.removeprefix(COLUMN): file[key] for key in file}
        near, rows = columns.pop("near"), len(columns["label"])
        if {len(columns[key]) for key in [*COLUMNS, *columns]} != {rows}:
            raise ValueError("its columns have different lengths")
        label = columns["label"]
        valid = range(-1, 2) if label.shape[1:] == (len(classes),) else range(len(classes))
        if label.shape[1:] not in ((), (len(classes),)) or not np.isin(label, valid).all():
            raise ValueError(f"its labels do not match the {len(classes)} classes of {INFO}")
    with damage(directory):
        records = open_records(directory)
        if len(records) != rows:
            raise ValueError(f"{rows} rows but {len(records)} records")
    _check_sample(directory, columns, records, modified)
    window = (low, high) if info["window"] else None
    common = name, classes, columns, records, window, fingerprint(directory), protocol
    return Prepared(*common, body, volumes, modality, near=near)


@contextlib.contextmanager
def damage(path: Path) -> Iterator[None]:
    """Turns any error of a block that reads `path`, a part of a prepared data set, into ValueError with the remedy."""
    try:
        yield
    except Exception as error:  # zipfile, zlib, TFDS and array_record have many types
        reason = " ".join(str(error).split()) or repr(error)
        raise ValueError(f"{path} is damaged or missing ({reason:.200}); {ADVICE}") from error


def _check_sample(directory: Path, columns: Mapping[str, np.ndarray], records: Any, modified: bool) -> None:
    """Raises ValueError if a few records differ from the index; `modified` images have a stage or another size.

    The fingerprint does not cover the records, and training assumes that record i is row i of the index.
    """
    for number, row in enumerate(np.unique(np.linspace(0, len(columns["label"]) - 1, SAMPLE).astype(int)).tolist()):
        record = records[row]
        same = all(record[key].decode() == columns[key][row] for key in ("file", "group", "source"))
        if same and number % 8 == 0:
            with damage(directory):
                array, form = images.read(record["image"], limits=None)  # `prepare` may have had higher limits
            same = array.shape[:2] == (columns["height"][row], columns["width"][row])
            if not modified and form == "PNG" and array.dtype == np.uint8:  # JPEG decoders may differ
                same &= images.digest(array) == columns["pixels"][row]
        if not same:
            raise ValueError(f"{directory}: record {row} does not match row {row} of {INDEX}; {ADVICE}")


def fingerprint(directory: Path) -> str:
    """Returns a hex digest of a prepared data set, without opening its records."""
    digest = hashlib.sha256((directory / INFO).read_bytes())
    digest.update((directory / INDEX).read_bytes())
    return digest.hexdigest()


class Records:
    """The records of a prepared data set as dicts of bytes; picklable.

    `image` is the encoded image, `body` the zlib-compressed bits of the body mask; `file`, `group` and `source` are
    names. TFDS would decode every feature, which takes as long as decoding a small image.
    """

    def __init__(self, source: Any, directory: Path):
        # Imported here, in the main thread of a worker, since two threads that import TFDS at once deadlock.
        from tensorflow_datasets.proto import tf_example_pb2

        self._source = source  # source[row] is a serialized tf.train.Example
        self._directory = directory
        self._parse = tf_example_pb2.Example.FromString

    def __reduce__(self) -> Any:
        """Pickles only the data source and its directory."""
        return Records, (self._source, self._directory)

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self._source)

    def __getitem__(self, row: int) -> dict[str, bytes]:
        """Returns a record. Raises IndexError for an invalid row, and ValueError for a damaged record."""
        if not 0 <= row < len(self._source):
            raise IndexError(f"record {row} is out of range for {len(self._source)} records")
        with damage(self._directory):
            features = self._parse(self._source[row]).features.feature
            return {name: features[name].bytes_list.value[0] for name in ("image", "body", "file", "group", "source")}


def open_records(directory: Path) -> Records:
    """Returns the records of a prepared data set, in the order in which they were written."""
    import tensorflow_datasets as tfds  # takes most of a second

    with quiet_tfds():
        builder = tfds.builder_from_directory(directory)
        source = builder.as_data_source(split=SLICES, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
    return Records(source.data_source, directory)


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


def write_index(directory: Path, info: Mapping[str, Any], columns: Mapping[str, np.ndarray], near: np.ndarray) -> None:
    """Writes lungjax.json from `info` and then, atomically, the index; see `Prepared` for `columns` and `near`.

    `info` has name, classes, window, study (a description of protocol=study), stage, size, body, modality, and volumes.
    """
    (directory / INFO).write_text(json.dumps(info, indent=2, ensure_ascii=False) + "\n", "utf-8")
    arrays: Any = {"near": near} | {COLUMN + name: values for name, values in columns.items()}
    with atomic_file(directory / INDEX) as partial:
        np.savez_compressed(partial, **arrays)
