"""A prepared data set: columns from `index.npz` and encoded images from TFDS records, in the same order.

The index is separate from the records, so that 425,000 images open in about a second. It is written last; a directory
without it is not prepared.
"""

import contextlib
import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from lungjax.data import splits
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
COLUMN = "column/"  # prefix of their names in the index


@dataclass(frozen=True, eq=False)
class Prepared:
    """A data set with random access; picklable for worker processes."""

    name: str  # such as "covidx_ct/3a"
    classes: tuple[str, ...]  # display names in label order
    # Arrays of length N in record order. `label` is an index of `classes`; `width` and `height` are in pixels, as is
    # `box` [N, 4]: xmin, ymin, xmax, ymax, max exclusive; `mean` and `std` are of pixel / 255; `found` is False if a
    # stage found no body or lung.
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
    """Returns the directory of a data set, such as "covidx_ct/3a"."""
    return data_dir / name / VERSION


def is_prepared(directory: Path) -> bool:
    """Returns whether `directory` contains a complete data set."""
    return (directory / INDEX).is_file()


def load(directory: Path, name: str, protocol: str = "clean") -> Prepared:
    """Opens the prepared data set in `directory`, with the splits of `protocol`.

    Raises ValueError if the data set lacks requested study splits, or has a damaged or incomplete index.
    """
    info = json.loads((directory / "lungjax.json").read_text("utf-8"))
    if protocol == "study" and not info["study"]:
        raise ValueError(f"data.protocol=study: {name} has no original splits; use clean")
    try:
        with np.load(directory / INDEX) as file:
            columns = {key.removeprefix(COLUMN): file[key] for key in file}
    except (zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{directory / INDEX} is damaged ({error}); copy or prepare the data set again") from None
    near, records = columns.pop("near"), open_records(directory)
    if len(records) != (count := len(columns["label"])):
        raise ValueError(f"{directory}: {count} rows but {len(records)} records; prepare it again with --overwrite")
    window = tuple(info["window"]) if info["window"] else None
    common = name, tuple(info["classes"]), columns, records, window, fingerprint(directory), protocol
    return Prepared(*common, info["body"], info["volumes"], info["modality"], near=near)


def fingerprint(directory: Path) -> str:
    """Returns a hex digest of a prepared data set, without opening its records."""
    digest = hashlib.sha256((directory / "lungjax.json").read_bytes())
    digest.update((directory / INDEX).read_bytes())
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


def write_index(directory: Path, info: Mapping[str, Any], columns: Mapping[str, np.ndarray], near: np.ndarray) -> None:
    """Writes lungjax.json from `info` and then, atomically, the index; see `Prepared` for `columns` and `near`.

    `info` has name, classes, window, study (a description of protocol=study), stage, size, body, modality, and volumes.
    """
    (directory / "lungjax.json").write_text(json.dumps(info, indent=2, ensure_ascii=False) + "\n", "utf-8")
    arrays: Any = {"near": near} | {COLUMN + name: values for name, values in columns.items()}
    with atomic_file(directory / INDEX) as partial:
        np.savez_compressed(partial, **arrays)
