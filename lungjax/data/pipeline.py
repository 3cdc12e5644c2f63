"""Turns a prepared data set into batches of uint8 images in a reproducible order: decode, crop, resize.

The seed determines an endless global sequence of training examples. Batch `s` has the positions `s * B` to
`(s + 1) * B - 1`, and each host reads an equal part of it. Positions depend only on the step, so a run resumes
exactly, even on a different number of hosts.
"""

import functools
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace

import grain
import numpy as np

from lungjax.config import Config, InputSpec
from lungjax.data.batching import pad_batch
from lungjax.data.imaging import images
from lungjax.data.labels import indicators
from lungjax.data.prepared import BODY_SIDE, Prepared
from lungjax.runtime import environment

Batch = dict[str, np.ndarray]
MAX_THREADS = 16  # more are limited by Python's lock; use processes (data.workers)


@dataclass(frozen=True)
class Reader:
    """Reads rows of a prepared data set as network input; picklable for worker processes."""

    data: Prepared
    spec: InputSpec
    margin: float = 0.0  # visible margin around the crop, as a fraction of its sides
    body: bool = False  # whether to return body masks as well

    def __call__(self, row: int) -> np.ndarray:
        """Returns uint8 [height, width, channels]. Raises ValueError with the name of a file that cannot be read."""
        return self.example(row)["image"]

    def example(self, row: int) -> Batch:
        """Returns an image and the inputs of its augmentation.

        `image` is uint8 [h, w, channels], of the size of the spec plus the margin on each side. With a margin, `box` is
        float32 [4]: xmin, ymin, xmax, ymax as fractions of the image. If requested, `body` is the body mask, uint8
        [h, w], 0 or 255. Raises ValueError with the name of a file that cannot be read.
        """
        spec, box = self.spec, self.data.columns["box"][row]
        if self.margin:
            rows, columns = (round(side * (1 + 2 * self.margin)) for side in spec.size)
            spec = replace(spec, size=(rows, columns))
        try:
            image = images.load(self.data.records[int(row)]["image"], self.data.window)
            if self.data.rotate:
                image, region = images.rotate(image, box)
                box = np.asarray(region, np.float32)
            width, height = images.extent(image)
            example = {"image": images.to_input(image, box, spec, self.margin)}
            left, top, right, bottom = images.view(box, spec, self.margin, width, height)
            crop = images.view(box, spec, 0.0, width, height)
        except ValueError as error:
            raise ValueError(f"{self.data.name}: {self.data.columns['file'][row]}: {error}") from None
        if self.margin:
            across, down = right - left, bottom - top
            at = ((crop[0] - left) / across, (crop[1] - top) / down, (crop[2] - left) / across, (crop[3] - top) / down)
            example["box"] = np.clip(np.asarray(at, np.float32), 0, 1)
        if self.body:
            mask = self.data.body_mask(row).astype(np.uint8) * 255
            across, down = BODY_SIDE / width, BODY_SIDE / height
            region = (left * across, top * down, right * across, bottom * down)
            inside = images.resize(mask, region, spec.size, "bilinear", False) > 127
            example["body"] = inside.astype(np.uint8) * 255
        return example


def train_rows(data: Prepared) -> np.ndarray:
    """Returns the rows of the train split. Raises ValueError if a class has no training example."""
    rows = data.rows("train")
    if not len(rows):
        use = f"it can only test a run, with --mode=evaluate --workdir=RUN --dataset={data.name}"
        raise ValueError(f"{data.name} has no train split, so nothing can be trained on it; {use}")
    counts = indicators(data.columns["label"][rows], len(data.classes)).sum(axis=0)
    missing = [name for name, n in zip(data.classes, counts, strict=True) if n == 0]
    if missing:
        names = ", ".join(missing)
        raise ValueError(f"{data.name}: no training example of {names}; add some, or prepare it without this class")
    return rows


def order(data: Prepared, config: Config) -> grain.MapDataset:
    """Returns the endless global sequence of rows of the train split."""
    rows, seed = train_rows(data), config.train.seed
    if config.data.sampling == "natural":
        return _shuffle(rows, seed)
    labels = data.columns["label"][rows]
    if labels.ndim == 2:
        raise ValueError(f"data.sampling=balanced: {data.name} has several findings per image; use natural")
    streams = [_shuffle(rows[labels == label], seed + label) for label in range(len(data.classes))]
    return grain.MapDataset.mix(streams, weights=[1.0] * len(streams))


def batch_rows(data: Prepared, config: Config, batch: int) -> np.ndarray:
    """Returns the rows of a global batch by its number."""
    size, sequence = config.train.batch_size, order(data, config)
    return np.asarray([sequence[i] for i in range(batch * size, (batch + 1) * size)])


def _shuffle(rows: np.ndarray, seed: int) -> grain.MapDataset:
    def row_at(index: int, _: int) -> int:
        epoch, place = divmod(index, len(rows))
        return int(rows[_permutation(seed, epoch, len(rows))[place]])

    return grain.MapDataset.range(len(rows)).repeat(None).map_with_index(row_at)


@functools.lru_cache(maxsize=32)  # one per class in balanced sampling; 1.7 MB each for 425,000 rows
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    # Not grain's shuffle, which takes 20 to 50 microseconds per row, as long as reading a small record.
    return np.random.Generator(np.random.Philox([seed, epoch])).permutation(count).astype(np.uint32)


def train_batches(
    data: Prepared, config: Config, *, start: int, host: int = 0, hosts: int = 1
) -> grain.DatasetIterator:
    """Yields this host's part of each global batch endlessly, starting with number `start`.

    A batch contains the stacked results of `Reader.example`, `label` int32 [b] or [b, C], and `place` uint32 [b], the
    position in the global sequence, which seeds the augmentation. Raises ValueError if augment.exterior is set without
    body masks.
    """
    if (share := config.augment.exterior) and not data.body:
        raise ValueError(f"augment.exterior={share}: {data.name} has no body masks; only CT data sets have them")
    reader = Reader(data, config.input, config.input.box_margin, body=config.augment.exterior > 0)
    labels = data.columns["label"]
    local = config.train.batch_size // hosts
    sequence, size = order(data, config), config.train.batch_size

    def load(index: int, _: int) -> Batch:
        places = (start + index) * size + host * local + np.arange(local)
        rows = np.asarray([sequence[place] for place in places.tolist()])
        examples = [reader.example(row) for row in rows.tolist()]
        batch = {key: np.stack([example[key] for example in examples]) for key in examples[0]}
        return {**batch, "label": labels[rows].astype(np.int32), "place": (places % 2**32).astype(np.uint32)}

    # Elements are batches; if they were single examples, each worker would read every n-th one.
    batches = grain.MapDataset.range(1).repeat(None).map_with_index(load).to_iter_dataset(_read_options(config))
    if config.data.workers:
        batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=config.data.workers), _begin_worker)
    return iter(batches)


def _begin_worker(*_: int) -> None:
    # These signals reach the process group, but the run needs batches until it has saved.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    environment.exit_with_parent()


def eval_batches(
    data: Prepared, rows: np.ndarray, config: Config, size: int, *, host: int = 0, hosts: int = 1
) -> Iterator[Batch]:
    """Yields this host's part of batches of `size`, `image` and `row` [b], each of `rows` once; padding has row -1."""
    reader = Reader(data, config.input)
    padded = pad_batch(rows, len(rows) + -len(rows) % size, -1)
    empty = np.zeros((*config.input.size, config.input.channels), np.uint8)

    def load(rows: np.ndarray) -> Batch:
        images = [empty if row < 0 else reader(row) for row in rows.tolist()]
        return {"image": np.stack(images), "row": rows.astype(np.int32)}

    part = grain.MapDataset.source(padded)[host::hosts].batch(size // hosts).map(load)
    return iter(part.to_iter_dataset(_read_options(config)))


def _read_options(config: Config) -> grain.ReadOptions:
    # One thread more than cores, since one often waits for Python's lock.
    threads = config.data.threads or min(environment.cores() + 1, MAX_THREADS)
    return grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 1)
