"""From a prepared data set to batches of uint8 images: decode, crop, resize, in a reproducible order.

The order of training examples is one endless global sequence fixed by the seed; batch `s` holds its places
`s * B .. (s + 1) * B - 1`, and host `h` of `n` reads the places `h, h + n, ...`. The position is therefore a
function of the step alone: a resumed run, also on another number of hosts, goes on where it would have been.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import grain
import numpy as np

from lungjax.config import Config, InputSpec
from lungjax.data import images
from lungjax.data.prepared import Prepared

Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class Reader:
    """Reads one row of a prepared data set as the network's input; picklable for worker processes."""

    data: Prepared
    spec: InputSpec
    margin: float  # part of the box's side kept around it

    def __call__(self, row: int) -> np.ndarray:
        """Returns uint8 [height, width, channels]. Raises ValueError naming the file if it can't be read."""
        try:
            image = images.decode(self.data.records[int(row)]["image"], self.data.window)
            return images.to_input(image, self.data.columns["box"][row], self.spec, self.margin)
        except ValueError as error:
            raise ValueError(f"{self.data.name}: {self.data.columns['file'][row]}: {error}") from None


def train_rows(data: Prepared) -> np.ndarray:
    """Returns the rows of the train split. Raises ValueError if a class has no example there."""
    rows = data.rows("train")
    counts = np.bincount(data.columns["label"][rows], minlength=len(data.classes))
    missing = [name for name, n in zip(data.classes, counts, strict=True) if n == 0]
    if missing:
        raise ValueError(
            f"{data.name}: no training example of {', '.join(missing)}; add some, or prepare the data set "
            "without that class"
        )
    return rows


def order(data: Prepared, config: Config) -> grain.MapDataset:
    """Returns the endless global sequence of rows of the train split."""
    rows, seed = train_rows(data), config.train.seed
    if config.data.sampling == "natural":
        return grain.MapDataset.source(rows).seed(seed).shuffle().repeat(None)
    labels = data.columns["label"][rows]
    streams = [
        grain.MapDataset.source(rows[labels == label]).seed(seed + label).shuffle().repeat(None)
        for label in range(len(data.classes))
    ]
    return grain.MapDataset.mix(streams, weights=[1.0] * len(streams))


def train_batches(data: Prepared, config: Config, *, start_step: int, host: int = 0, hosts: int = 1) -> Iterator[Batch]:
    """Yields this host's part of each global batch from `start_step` on, for ever.

    Each batch has `image` uint8 [b, height, width, channels], `label` int32 [b] and `place` uint32 [b], the
    example's place in the global sequence, from which later randomness for that example is derived.
    """
    reader = Reader(data, config.input, config.input.box_margin)
    labels = data.columns["label"]
    local = config.train.batch_size // hosts

    def load(index: int, row: int) -> Batch:
        place = (start_step * local + index) * hosts + host
        return {
            "image": reader(row),
            "label": np.asarray(labels[row], np.int32),
            "place": np.asarray(place % 2**32, np.uint32),
        }

    # Batches are made before the workers share them out, or each worker would batch every n-th example.
    mine = order(data, config)[host::hosts][start_step * local :].map_with_index(load).batch(local)
    batches = mine.to_iter_dataset(_read_options(config))
    if config.data.workers:
        batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=config.data.workers))
    return iter(batches)


def eval_batches(data: Prepared, rows: np.ndarray, config: Config, *, host: int = 0, hosts: int = 1) -> Iterator[Batch]:
    """Yields this host's part of every batch over `rows`, each row exactly once.

    `row` int32 [b] names the row; the last batch is filled up with black images whose row is -1.
    """
    reader = Reader(data, config.input, 0.0)
    size = config.eval.batch_size
    padded = np.concatenate([rows, np.full(-len(rows) % size, -1, rows.dtype)])
    empty = np.zeros((*config.input.size, config.input.channels), np.uint8)

    def load(row: int) -> Batch:
        return {"image": empty if row < 0 else reader(row), "row": np.asarray(row, np.int32)}

    mine = grain.MapDataset.source(padded)[host::hosts].map(load).batch(size // hosts)
    return iter(mine.to_iter_dataset(_read_options(config)))


def _read_options(config: Config) -> grain.ReadOptions:
    return grain.ReadOptions(num_threads=config.data.threads, prefetch_buffer_size=config.data.threads + 1)
