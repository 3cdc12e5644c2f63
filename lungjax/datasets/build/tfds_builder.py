"""The TFDS builder of all data sets, which defines the features of a record and writes them."""

import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from lungjax.data import prepared
from lungjax.datasets.build.process_image import ProcessedImage
from lungjax.datasets.listing import Example

BODY_BYTES = prepared.BODY_SIDE**2 // 8
Shards = Sequence[Callable[[], Iterator[tuple[int, dict[str, Any]]]]]


class Builder(tfds.core.ShardBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Writes records in shards.

    `image` is an encoded image (uint8, or uint16 PNG for 16 bits), `box` TFDS's ymin, xmin, ymax, xmax as fractions of
    the image, and `body` the bits of a body mask over the image, row by row (zero without masks).
    """

    name = "lungjax"
    VERSION = tfds.core.Version(prepared.VERSION)

    def __init__(self, *, config: str, classes: Sequence[str], findings: bool, shards: Shards, **kwargs: Any):
        self._classes, self._findings, self._shards = list(classes), findings, shards
        super().__init__(config=tfds.core.BuilderConfig(name=config), **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(),
            "label": (
                tfds.features.Tensor(shape=(len(self._classes),), dtype=np.int8)
                if self._findings
                else tfds.features.ClassLabel(names=self._classes)
            ),
            "file": tfds.features.Text(),
            "group": tfds.features.Text(),
            "source": tfds.features.Text(),
            "box": tfds.features.BBoxFeature(),
            "body": tfds.features.Tensor(shape=(BODY_BYTES,), dtype=np.uint8, encoding="zlib"),
        }
        options: Any = {"features": tfds.features.FeaturesDict(features), "disable_shuffling": True}
        return tfds.core.DatasetInfo(builder=self, description=f"{self.name}/{self.builder_config.name}", **options)

    def _shard_iterators_per_split(self, dl_manager: Any) -> Any:
        return {prepared.SLICES: self._shards}


def write(name: str, root: Path, classes: Sequence[str], findings: bool, shards: Shards) -> None:
    """Writes the shards in order below `root` as the data set `name`. Raises ValueError if the disk is full.

    With `findings`, an image may have several of the `classes`.
    """
    tfds.disable_progress_bar()  # replaced by one for the complete data set
    base, _, config = name.partition("/")
    kind: Any = type(base, (Builder,), {"name": base}, skip_registration=True)
    with prepared.quiet_tfds():
        writer = kind(data_dir=root, config=config, classes=classes, findings=findings, shards=shards)
        try:
            writer.download_and_prepare(file_format="array_record")
        except RuntimeError as error:  # of array_record, without an errno
            if "No space left" not in str(error):
                raise
            raise ValueError(f"the disk is full: {name} was not written; choose another --data_dir") from None


def record(example: Example, image: ProcessedImage) -> dict[str, Any]:
    """Returns the features of one example for TFDS."""
    xmin, ymin, xmax, ymax = image.box
    width, height = image.width, image.height
    return {
        "image": io.BytesIO(image.data),
        "label": np.asarray(example.label, np.int8) if isinstance(example.label, tuple) else example.label,
        "file": example.file,
        "group": example.group,
        "source": example.source,
        "box": tfds.features.BBox(ymin=ymin / height, xmin=xmin / width, ymax=ymax / height, xmax=xmax / width),
        "body": np.frombuffer(image.body or bytes(BODY_BYTES), np.uint8),
    }
