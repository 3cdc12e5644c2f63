"""The one TFDS builder behind every data set: what a record holds, and writing them."""

import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from lungjax.data import prepared

BODY_BYTES = prepared.BODY_SIDE**2 // 8
Shards = Sequence[Callable[[], Iterator[tuple[int, dict[str, Any]]]]]


class Builder(tfds.core.ShardBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Writes the records of given shards.

    `image` holds encoded bytes (uint8 or, for 16 bits, uint16 PNG); `box` is TFDS's ymin, xmin, ymax, xmax in parts
    of the image, the whole image where the data set has no boxes; `body` the bits of a mask of the body, row by row
    over the whole image, all zero where none was made.
    """

    name = "lungjax"
    VERSION = tfds.core.Version(prepared.VERSION)

    def __init__(self, *, config: str, description: str, classes: Sequence[str], shards: Shards, **kwargs: Any):
        self._description, self._classes, self._shards = description, list(classes), shards
        super().__init__(config=tfds.core.BuilderConfig(name=config, description=description), **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(),
                "label": tfds.features.ClassLabel(names=self._classes),
                "file": tfds.features.Text(),
                "group": tfds.features.Text(),
                "source": tfds.features.Text(),
                "box": tfds.features.BBoxFeature(),
                "body": tfds.features.Tensor(shape=(BODY_BYTES,), dtype=np.uint8, encoding="zlib"),
            }
        )
        return tfds.core.DatasetInfo(
            builder=self, description=self._description, features=features, disable_shuffling=True
        )

    def _shard_iterators_per_split(self, dl_manager: Any) -> Any:
        return {prepared.SLICES: self._shards}


def write(name: str, root: Path, description: str, classes: Sequence[str], shards: Shards) -> None:
    """Writes the shards, in order, below `root` as the data set `name`, such as "covidx_ct/3a".

    Raises ValueError if the disk is full.
    """
    tfds.disable_progress_bar()  # ours counts images over the whole data set
    base, _, config = name.partition("/")
    kind: Any = type(base, (Builder,), {"name": base}, skip_registration=True)
    with prepared.quiet_tfds():
        writer = kind(data_dir=root, config=config, description=description, classes=classes, shards=shards)
        try:
            writer.download_and_prepare(file_format="array_record")
        except RuntimeError as error:  # array_record's own, without an errno
            if "No space left" not in str(error):
                raise
            raise ValueError(f"the disk is full: {name} was not written; choose another --data_dir") from None


def record(
    image: bytes,
    label: int,
    names: tuple[str, str, str],
    box: tuple[float, float, float, float],
    size: tuple[int, int],
    body: bytes,
) -> dict[str, Any]:
    """Returns one example as TFDS takes it; names are file, group and source, box in pixels, size width and height."""
    xmin, ymin, xmax, ymax = box
    width, height = size
    file, group, source = names
    bits = np.frombuffer(body or bytes(BODY_BYTES), np.uint8)
    place = tfds.features.BBox(ymin=ymin / height, xmin=xmin / width, ymax=ymax / height, xmax=xmax / width)
    return {
        "image": io.BytesIO(image),
        "label": label,
        "file": file,
        "group": group,
        "source": source,
        "box": place,
        "body": bits,
    }
