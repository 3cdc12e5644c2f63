"""Writes a data set: reads and checks every image once, and writes TFDS records, index and summary.

The staging directory is renamed at the end, so an interrupted run leaves no incomplete data set, and an overwritten
data set remains until the new one is complete. The next run resumes from the processed images of complete shards.
"""

import contextlib
import functools
import hashlib
import itertools
import multiprocessing
import os
import pickle
import shutil
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from lungjax import __version__
from lungjax.data import duplicates, leakage, prepared, summary
from lungjax.data.imaging.limits import DEFAULT, Limits
from lungjax.datasets import folder_volumes
from lungjax.datasets.build import staging, tfds_builder
from lungjax.datasets.build.process_image import ImageOptions, ProcessedImage, process_image
from lungjax.datasets.listing import Example, Listing
from lungjax.runtime import environment
from lungjax.runtime.files import atomic_file
from lungjax.runtime.progress_bar import progress_bar

SHARD_BYTES = 128 << 20  # TFDS writes a shard from memory
GENERATED_BYTES = 512 * 512  # approximate size of a generated or modified image, which is stored uncompressed
SKIP = "; use --on_bad_image=skip to skip such images"


@dataclass
class _Images:
    """State and results of one pass over the images of a listing."""

    listing: Listing
    options: ImageOptions
    on_bad_image: str
    on_no_lung: str
    thumbnails: Path  # a file with one thumbnail per row, because memory may not hold them
    shard_folder: Path  # the processed images of complete shards, see `process_shard`
    bar: Any
    skipped: list[str]
    stored: list[tuple[Example, ProcessedImage]] = field(default_factory=list)  # in order, without image data
    unstaged: list[str] = field(default_factory=list)  # files in which a stage detected no body or lung
    histogram: np.ndarray = field(default_factory=lambda: np.zeros(1 << 16, np.int64))  # of 16-bit train images

    def shards(self, sizes: Sequence[tuple[Example, int]]) -> tfds_builder.Shards:
        """Returns one generator function per shard; TFDS calls them in order, one after the other."""
        shards: list[list[Example]] = [[]]
        total = 0
        for example, size in sizes:
            if total and total + size > SHARD_BYTES:
                shards.append([])
                total = 0
            shards[-1].append(example)
            total += size
        return [functools.partial(self._shard, shard) for shard in shards]

    def _shard(self, examples: Sequence[Example]) -> Iterator[tuple[int, dict[str, Any]]]:
        with self.thumbnails.open("ab") as thumbnails:
            for example, result in process_shard(examples, self.options, self.shard_folder):
                self.bar.update()
                if image := self._accept(example, result):
                    thumbnails.write(image.thumbnail)
                    if image.histogram is not None and example.split == "train":
                        self.histogram += image.histogram
                    self.stored.append((example, replace(image, data=b"", body=b"", thumbnail=b"", histogram=None)))
                    yield len(self.stored) - 1, tfds_builder.record(example, image)

    def _accept(self, example: Example, result: ProcessedImage | str) -> ProcessedImage | None:
        """Returns an image to store, or lists the problem of a skipped one. Raises ValueError if bad images fail."""
        if isinstance(result, str):
            line = f"{_place(example)}{example.file}: {result}"
            if self.on_bad_image == "fail":
                raise ValueError(line + SKIP)
            self.skipped.append(line)
            return None
        if not result.found:
            self.unstaged.append(example.file)
            if self.on_no_lung == "fail":
                line = f"{_place(example)}{example.file}"
                raise ValueError(f"{line}: no body or lung was detected; use --on_no_lung=keep or skip")
        return result if result.found or self.on_no_lung == "keep" else None

    def columns(self) -> dict[str, np.ndarray]:
        """Returns the columns of the index, with the initial splits. Raises ValueError if no image was stored."""
        if not self.stored:
            first = f"; the first: {self.skipped[0]}" if self.skipped else ""
            raise ValueError(f"no readable image{first}")
        examples, images = zip(*self.stored, strict=True)
        study = [example.study if self.listing.study else "" for example in examples]
        columns: dict[str, np.ndarray] = {}
        for name, kind in prepared.COLUMNS.items():
            source = images if hasattr(images[0], name) else examples
            values = study if name == "split_study" else [getattr(one, name) for one in source]
            columns[name] = np.asarray(values, kind)
        extra = zip(*(example.extra for example in examples), strict=True)
        return columns | {name: np.asarray(v, np.str_) for name, v in zip(self.listing.extra, extra, strict=True)}

    def window(self, columns: dict[str, np.ndarray]) -> tuple[tuple[float, float] | None, list[str]]:
        """Returns the window of the data set, and notes on it; scales mean and std of 16-bit images to it.

        Raises ValueError if a window is needed and can't be derived from the train split.
        """
        window = self.options.window
        deep = np.array([image.deep for _, image in self.stored])
        if not deep.any():
            return None, ["--window has no effect: no image has 16 bits"] if window else []
        count = f"{deep.sum()} of {len(deep)} images have 16 bits"
        if window:
            return window, [f"{count}; --window is {window[0]:g} to {window[1]:g}"]
        total = np.cumsum(self.histogram)
        if total[-1] == 0:
            raise ValueError(f"{count}, but none of them is in the train split: give --window=low,high")
        low, high = (float(np.searchsorted(total, part * total[-1])) for part in (0.005, 0.995))
        if high <= low:
            raise ValueError(f"{count}, and nearly all their training pixels are {low:g}: give --window=low,high")
        columns["mean"][deep] = (columns["mean"][deep] - low) / (high - low)
        columns["std"][deep] /= high - low
        text = f"{count}; their window, percentiles 0.5 to 99.5 of train, is {low:g} to {high:g}; --window sets another"
        return (low, high), [text]


def prepare(
    name: str,
    listing: Listing,
    data_dir: Path,
    *,
    stage: str = "",
    size: tuple[int, int] | None = None,
    window: tuple[float, float] | None = None,
    on_bad_image: str = "fail",
    on_no_lung: str = "keep",
    overwrite: bool = False,
    keep: bool = False,
    quiet: bool = False,
    limits: Limits = DEFAULT,
) -> dict[str, Any]:
    """Writes the data set `name`; returns its summary, which is also stored as summary.json and summary.md.

    `stage`, `size`, `window` and `limits` are those of `ImageOptions`; without a window, percentiles 0.5 and 99.5 of
    train are used. `on_bad_image` is "fail", or "skip" to list and skip unreadable and missing images. `on_no_lung` is
    "keep" to store the previous stage of an image without a detected body or lung, "skip" or "fail". `keep` returns {}
    for an existing data set, which another process may have written; `overwrite` replaces it. `quiet` suppresses the
    output.

    Raises ValueError for a bad image, a box outside its image, too little disk space, or an existing data set.
    """
    say: Callable[[str], None] = (lambda text: None) if quiet else print
    options = ImageOptions(stage, size, listing.body, window, limits)
    final = data_dir / name / prepared.VERSION  # without the recovery of `prepared.directory`
    with staging.locked(data_dir, name) as root:
        if prepared.is_prepared(final) and keep:
            return {}
        if prepared.is_prepared(final) and not overwrite:
            raise ValueError(f"{name} is already prepared in {final}; --overwrite replaces it")
        sizes, missing = _sizes(listing.examples, options, on_bad_image)
        # Until the data set is complete, images that differ from their files also exist in `shard_folder`.
        needed = sum(size if _stored_unmodified(example, options) else 2 * size for example, size in sizes)
        say(f"{len(listing.examples):,} images, {staging.check_disk(needed, data_dir)}")
        shard_folder = root.with_name(f"{root.name}.shards")
        shard_folder.mkdir(exist_ok=True)
        if any(shard_folder.iterdir()):
            say("Resuming an interrupted run")
        with progress_bar(total=len(sizes), desc=name, unit=" images", disable=quiet, dynamic_ncols=True) as bar:
            paths = (root / "thumbnails", shard_folder)
            images = _Images(listing, options, on_bad_image, on_no_lung, *paths, bar, missing)
            tfds_builder.write(name, root, listing.classes, listing.findings, images.shards(sizes))
        written = prepared.directory(root, name)
        say("Searching for duplicates ...")
        columns = images.columns()
        window, notes = images.window(columns)
        shape = (len(images.stored), duplicates.SIDE, duplicates.SIDE)
        thumbnails = np.memmap(images.thumbnails, np.uint8, "r", shape=shape)
        group, pixels = columns["group"], columns["pixels"]
        twins = duplicates.near_twins(columns["phash"], group, pixels, thumbnails.__getitem__)
        clean, removed = leakage.clean(
            columns["split"], columns["label"], group, pixels, twins.pairs, listing.group_name
        )
        columns["split"] = np.asarray(clean)
        info: dict[str, Any] = {"name": name, "classes": listing.classes, "window": window, "study": listing.study}
        info |= {"stage": stage, "size": size, "body": listing.body}
        info |= {"modality": listing.modality, "volumes": listing.volumes}
        prepared.write_index(written, info, columns, twins.pairs)
        data = prepared.load(written, name)
        converted = Counter(image.conversion for _, image in images.stored if image.conversion)
        if modes := ", ".join(f"{mode} ({count:,})" for mode, count in sorted(converted.items())):
            notes.append(f"images converted to 8-bit gray or RGB without transparency, by mode: {modes}")
        notes = [note for note in (*listing.notes, *notes, twins.note) if note]
        notes += [f"images removed from the clean protocol ({reason}): {n:,}" for reason, n in removed.items()]
        dark = len(images.unstaged) if on_no_lung == "skip" else 0
        flow = {
            "found": {"images": len(listing.examples), "groups": len({e.group for e in listing.examples})},
            "skipped": {"missing or unreadable": len(images.skipped), "no body or lung detected": dark},
            "removed": removed,
        }
        lines = (images.skipped, images.unstaged, notes)
        result = summary.summarize(data, info, *lines, listing.group_name, listing.warnings) | {"flow": flow}
        summary.write(result, written)
        staging.publish(written, final)
        shutil.rmtree(shard_folder)
    return result


def _sizes(
    examples: Sequence[Example], options: ImageOptions, on_bad_image: str
) -> tuple[list[tuple[Example, int]], list[str]]:
    """Returns the existing images with their approximate stored bytes, and one line per missing image."""
    sizes, missing = [], []
    height, width = options.size or (0, 0)
    for example in examples:
        if not example.file.isprintable():
            raise ValueError(f"{_place(example)}the file name {example.file!r} is not plain UTF-8 text: rename it")
        size = GENERATED_BYTES
        if isinstance(example.image, str):
            try:
                least = 1 if _stored_unmodified(example, options) else GENERATED_BYTES
                size = max(os.stat(example.image).st_size, least)
            except OSError as error:
                line = f"{_place(example)}{example.image}: {(error.strerror or str(error)).lower()}"
                if on_bad_image == "fail":
                    raise ValueError(f"{line}{SKIP}") from None
                missing.append(line)
                continue
        sizes.append((example, height * width or size))
    return sizes, missing


def _stored_unmodified(example: Example, options: ImageOptions) -> bool:
    """Returns whether a file is probably stored as it is; its content, such as a rotation, may require a PNG."""
    is_file = isinstance(example.image, str) and example.image.lower().endswith((".png", ".jpg", ".jpeg"))
    return is_file and not (options.stage or options.size or example.transform)


def _place(example: Example) -> str:
    return f"{example.where}: " if example.where else ""


def process_shard(
    examples: Sequence[Example], options: ImageOptions, folder: Path
) -> Iterator[tuple[Example, ProcessedImage | str]]:
    """Yields the results of `process_images`, and saves them in `folder` for the next run, which retries bad images."""
    path = folder / _shard_key(examples, options)
    saved: list[ProcessedImage | str] = []
    with contextlib.suppress(FileNotFoundError, zlib.error):  # missing, or damaged by a power loss
        saved = pickle.loads(zlib.decompress(path.read_bytes()))
    if saved:
        for example, image in zip(examples, saved, strict=True):
            if isinstance(image, str):
                image = process_image(example, options)
            elif image.original:
                image = replace(image, data=Path(str(example.image)).read_bytes())
            yield example, image
        return
    for example, result in process_images(examples, options):
        saved.append(replace(result, data=b"") if isinstance(result, ProcessedImage) and result.original else result)
        yield example, result
    with atomic_file(path) as partial:
        partial.write_bytes(zlib.compress(pickle.dumps(saved), 1))


def _shard_key(examples: Sequence[Example], options: ImageOptions) -> str:
    """Returns a digest of everything that the processed images of a shard depend on."""
    versions = {}  # of the files; each plane of a volume has the files of all its slices
    sources = (source for example in examples for source in folder_volumes.sources(example.image))
    for path in {str(getattr(source, "path", source)) for source in sources}:
        with contextlib.suppress(OSError):  # `process_image` reports missing files
            stat = os.stat(path)
            versions[path] = stat.st_size, stat.st_mtime_ns
    inputs = [(example.file, example.image, example.box, example.transform) for example in examples]
    options = replace(options, limits=DEFAULT)  # a run with higher limits resumes the one that failed
    content = pickle.dumps((__version__, options, inputs, sorted(versions.items())))
    return hashlib.blake2b(content, digest_size=12).hexdigest()


def process_images(
    examples: Sequence[Example], options: ImageOptions
) -> Iterator[tuple[Example, ProcessedImage | str]]:
    """Yields each example with its processed image, in order; few images are in memory at a time."""
    workers = environment.cores()
    remaining = iter(examples)
    with _pool(examples, options, workers) as pool:

        def submit(count: int) -> list[Any]:
            return [(e, pool.submit(process_image, e, options)) for e in itertools.islice(remaining, count)]

        waiting = deque(submit(4 * workers))
        try:
            while waiting:
                example, result = waiting.popleft()
                yield example, result.result()
                waiting += submit(1)
        finally:
            pool.shutdown(cancel_futures=True)


def _pool(examples: Sequence[Example], options: ImageOptions, workers: int) -> Executor:
    # Decoding releases Python's lock, so threads suffice; drawing and masks hold it. Processes are spawned, because a
    # fork is unsafe with XLA's threads. Their start takes a second or two, too long for few images.
    masks = bool(options.stage) or options.body
    slow = len(examples) if masks else sum(callable(e.image) or e.transform is not None for e in examples)
    if slow < 50 * workers or workers == 1:
        return ThreadPoolExecutor(workers)
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), environment.exit_with_parent)
