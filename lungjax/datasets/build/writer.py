"""Writes a data set: reads and checks every image once, and writes TFDS records, index.csv and the summary.

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
import sys
import zlib
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from lungjax import __version__
from lungjax.data import duplicates, prepared, summary
from lungjax.datasets import folder_volumes
from lungjax.datasets.build import near_duplicates, staging, tfds_builder
from lungjax.datasets.build.process_image import ImageOptions, Problem, ProcessedImage, process_image
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
    examples: list[Example] = field(default_factory=list)  # stored ones, in order
    columns: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))  # of the index
    unstaged: list[str] = field(default_factory=list)  # files in which a stage detected no lung
    histogram: np.ndarray = field(default_factory=lambda: np.zeros(1 << 16, np.int64))  # of 16-bit train images
    converted: Counter[str] = field(default_factory=Counter)  # images of modes that lose part of their content
    deep: int = 0  # images with 16 bits
    raw: list[int] = field(default_factory=list)  # rows whose mean and std are of 16-bit values

    def shards(self, examples: Sequence[Example], sizes: Sequence[int]) -> tfds_builder.Shards:
        """Returns one generator function per shard; TFDS calls them in order, one after the other."""
        bounds, total = [0], 0
        for i, size in enumerate(sizes):
            if total and total + size > SHARD_BYTES:
                bounds.append(i)
                total = 0
            total += size
        bounds.append(len(examples))
        return [functools.partial(self._shard, examples[a:b]) for a, b in itertools.pairwise(bounds)]

    def _shard(self, examples: Sequence[Example]) -> Iterator[tuple[int, dict[str, Any]]]:
        with self.thumbnails.open("ab") as thumbnails:
            for example, image in process_shard(examples, self.options, self.shard_folder):
                self.bar.update()
                if self._is_stored(example, image) and isinstance(image, ProcessedImage):
                    thumbnails.write(image.thumbnail)
                    self._add(example, image)
                    yield len(self.examples) - 1, tfds_builder.record(example, image)

    def _is_stored(self, example: Example, image: ProcessedImage | Problem) -> bool:
        """Returns whether to store an image, and records bad ones. Raises ValueError if it can't be skipped."""
        line = f"{_place(example)}{example.file}"
        if isinstance(image, Problem):
            line += f": {image.text}"
            if self.on_bad_image == "fail" or not image.skippable:
                raise ValueError(line + (SKIP if image.skippable else ""))
            self.skipped.append(line)
            return False
        if not image.found:
            self.unstaged.append(example.file)
            if self.on_no_lung == "fail":
                raise ValueError(f"{line}: no body or lung was detected; use --on_no_lung=keep or skip")
        return image.found or self.on_no_lung == "keep"

    def _add(self, example: Example, image: ProcessedImage) -> None:
        row = {
            "file": example.file,
            "label": self.listing.classes[example.label],
            "split": example.split,
            "split_study": example.study if self.listing.study else "",
            "group": example.group,
            "source": example.source,
            "width": str(image.width),
            "height": str(image.height),
            **dict(zip(prepared.BOX, (f"{v:.9g}" for v in image.box), strict=True)),
            "pixels": image.pixels,
            "phash": f"{image.phash:016x}",
            "mean": f"{image.mean:.5f}",
            "std": f"{image.std:.5f}",
            "found": str(int(image.found)),
            **dict(zip(self.listing.extra, example.extra, strict=True)),
        }
        for name, text in row.items():
            self.columns[name].append(sys.intern(text))  # few values differ in a set of 400,000 images
        self.converted.update([image.conversion] if image.conversion else [])
        if image.histogram is not None:
            self.deep += 1
            self.raw += [len(self.examples)] if image.raw else []
            if example.split == "train":
                self.histogram += image.histogram
        self.examples.append(example)

    def find_duplicates(self) -> tuple[np.ndarray, list[str], dict[str, Any]]:
        """Sets the clean splits; returns near duplicates, notes, summary. Raises ValueError if train lacks a class."""
        if not self.examples:
            first = f"; the first: {self.skipped[0]}" if self.skipped else ""
            raise ValueError(f"no readable image{first}")
        shape = (len(self.examples), duplicates.SIDE, duplicates.SIDE)
        thumbnails = np.memmap(self.thumbnails, np.uint8, "r", shape=shape)
        near, clean, notes, twins = near_duplicates.search(self.examples, self.columns, self.listing, thumbnails)
        self.columns["split"] = clean
        classes = self.listing.classes
        rows = zip(self.columns["label"], clean, strict=True)
        empty = set(classes) - {label for label, split in rows if split == "train"}
        listed = {classes[example.label] for example in self.examples if example.split == "train"}
        # With study splits, a warning suffices; a set without any training images is for tests.
        if empty and listed and not (empty <= listed and self.listing.study):
            lost = " once patients and images of later splits are removed" if empty & listed else ""
            names = ", ".join(c for c in classes if c in empty)
            raise ValueError(f"no training example of {names}{lost}; every class needs an image in the train split")
        return near, notes, twins

    def window(self) -> tuple[tuple[float, float] | None, list[str]]:
        """Returns the window of the data set, and notes on it; scales mean and std of 16-bit images to it.

        Raises ValueError if a window is needed and can't be derived from the train split.
        """
        window = self.options.window
        if not self.deep:
            return None, ["--window has no effect: no image has 16 bits"] if window else []
        count = f"{self.deep} of {len(self.examples)} images have 16 bits"
        if window:
            return window, [f"{count}; --window is {window[0]:g} to {window[1]:g}"]
        total = np.cumsum(self.histogram)
        if total[-1] == 0:
            raise ValueError(f"{count}, but none of them is in the train split: give --window=low,high")
        low, high = (float(np.searchsorted(total, part * total[-1])) for part in (0.005, 0.995))
        if high <= low:
            raise ValueError(f"{count}, and nearly all their training pixels are {low:g}: give --window=low,high")
        for row in self.raw:
            for key, offset in (("mean", low), ("std", 0.0)):
                self.columns[key][row] = f"{(float(self.columns[key][row]) - offset) / (high - low):.5f}"
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
) -> dict[str, Any]:
    """Writes the data set `name`; returns its summary, which is also stored as summary.json and summary.md.

    Args:
        name: data set and configuration, such as "folder/my_hospital".
        listing: the examples in storage order.
        data_dir: the root of all prepared data sets.
        stage, size, window: as in `ImageOptions`; without a window, percentiles 0.5 and 99.5 of train are used.
        on_bad_image: "fail", or "skip" to list and skip unreadable and missing images.
        on_no_lung: "keep" the previous stage of an image without a detected body or lung, "skip" it, or "fail".
        overwrite: replace an existing data set.
        keep: return {} for an existing data set, which another process may have written.
        quiet: no output, for data sets that are generated on first use.

    Raises ValueError for a bad image, a box outside its image, a class without a training example, too little disk
    space, or a data set that already exists.
    """
    say: Callable[[str], None] = (lambda text: None) if quiet else print
    final = prepared.directory(data_dir, name)
    options = ImageOptions(stage, size, listing.body, window)
    with staging.locked(data_dir, name) as root:
        if prepared.is_prepared(final) and keep:
            return {}
        if prepared.is_prepared(final) and not overwrite:
            raise ValueError(f"{name} is already prepared in {final}; --overwrite replaces it")
        sizes, missing = _sizes(listing.examples, options, on_bad_image)
        # Until the data set is complete, images that differ from their files also exist in `shard_folder`.
        twice = [n for e, n in zip(listing.examples, sizes, strict=True) if not _stored_unmodified(e, options)]
        staging.check_disk(sum(sizes) + sum(twice), data_dir, len(listing.examples), say)
        shard_folder = root.with_name(f"{root.name}.shards")
        shard_folder.mkdir(exist_ok=True)
        if any(shard_folder.iterdir()):
            say("Resuming an interrupted run")
        present = [e for e, size in zip(listing.examples, sizes, strict=True) if size]
        with progress_bar(total=len(present), desc=name, unit=" images", disable=quiet, dynamic_ncols=True) as bar:
            paths = (root / "thumbnails", shard_folder)
            images = _Images(listing, options, on_bad_image, on_no_lung, *paths, bar, missing)
            shards = images.shards(present, [size for size in sizes if size])
            tfds_builder.write(name, root, name, listing.classes, shards)
        written = prepared.directory(root, name)
        say("Searching for duplicates ...")
        near, leaks, twins = images.find_duplicates()
        window, notes = images.window()
        info: dict[str, Any] = {"name": name, "classes": list(listing.classes), "window": window}
        info |= {"study": listing.study, "stage": stage, "size": size}
        info |= {"body": listing.body, "modality": listing.modality}
        info |= {"volumes": dict(listing.volumes)} if listing.volumes else {}
        near_duplicates.write(near, images.columns["file"], written)
        header = [*prepared.COLUMNS, *listing.extra]
        rows = zip(*(images.columns[key] for key in header), strict=True)
        prepared.write_index(written, info, header, rows)
        _check_order(written, name, images.columns["file"])
        notes, columns = [*listing.notes, *notes, *leaks], images.columns
        if modes := ", ".join(f"{mode} ({count:,})" for mode, count in sorted(images.converted.items())):
            notes.append(f"images converted to 8-bit gray or RGB without transparency, by mode: {modes}")
        lines = (images.skipped, images.unstaged, notes)
        result = summary.summarize(info, columns, twins, *lines, listing.group_name, listing.warnings)
        summary.write(result, written)
        staging.publish(written, final)
        shutil.rmtree(shard_folder)
    return result


def _sizes(examples: Sequence[Example], options: ImageOptions, on_bad_image: str) -> tuple[list[int], list[str]]:
    """Returns the approximate stored bytes of each image (0 if it is missing) and one line per missing image."""
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
                size = 0
        sizes.append(height * width if height and size else size)
    return sizes, missing


def _stored_unmodified(example: Example, options: ImageOptions) -> bool:
    """Returns whether a file is probably stored as it is; its content, such as a rotation, may require a PNG."""
    is_file = isinstance(example.image, str) and example.image.lower().endswith((".png", ".jpg", ".jpeg"))
    return is_file and not (options.stage or options.size or example.transform)


def _place(example: Example) -> str:
    return f"{example.where}: " if example.where else ""


def process_shard(
    examples: Sequence[Example], options: ImageOptions, folder: Path
) -> Iterator[tuple[Example, ProcessedImage | Problem]]:
    """Yields the results of `process_images`, and saves those of good images in `folder` for the next run."""
    path, saved = folder / _shard_key(examples, options), []
    if path.exists():
        saved = pickle.loads(zlib.decompress(path.read_bytes()))
        missing = process_images([e for e, image in zip(examples, saved, strict=True) if image is None], options)
        for example, image in zip(examples, saved, strict=True):
            if image is None:
                yield next(missing)
            else:
                yield example, replace(image, data=Path(str(example.image)).read_bytes()) if image.original else image
        return
    for example, result in process_images(examples, options):
        good = None if isinstance(result, Problem) else result
        saved.append(replace(good, data=b"") if good and good.original else good)
        yield example, result
    with atomic_file(path) as partial:
        partial.write_bytes(zlib.compress(pickle.dumps(saved), 1))


def _shard_key(examples: Sequence[Example], options: ImageOptions) -> str:
    """Returns a digest of everything that the processed images of a shard depend on."""

    @functools.cache  # each plane of a volume has the files of all its slices
    def stamp(path: str) -> str:
        with contextlib.suppress(OSError):  # `process_image` reports missing files
            stat = os.stat(path)
            return f"{stat.st_size} {stat.st_mtime_ns}"
        return ""

    def describe(function: Any, skip: int = 0) -> str:  # repr would contain the address of the function
        target = getattr(function, "func", function)
        name = getattr(target, "__qualname__", type(target).__qualname__)
        return f"{name} {getattr(function, 'args', ())[skip:]} {getattr(function, 'keywords', '')}"

    digest = hashlib.blake2b(f"{__version__} {options}".encode(), digest_size=12)
    for e in examples:
        sources = folder_volumes.sources(e.image)  # if any, they are the first argument
        files = [f"{getattr(one, 'name', one)} {stamp(getattr(one, 'path', one))}" for one in sources]
        text = f"{e.file} {files} {describe(e.image, bool(files))} {e.box} {describe(e.transform)}\n"
        digest.update(text.encode(errors="surrogateescape"))
    return digest.hexdigest()


def process_images(
    examples: Sequence[Example], options: ImageOptions
) -> Iterator[tuple[Example, ProcessedImage | Problem]]:
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


def _check_order(written: Path, name: str, files: Sequence[str]) -> None:
    # Training assumes that record i is row i of the index; if TFDS shuffled, every label would be wrong.
    source = prepared.open_records(written)
    count = len(files)
    sample = {0, count - 1, *np.random.default_rng(0).integers(0, count, 30).tolist()}
    wrong = [i for i in sorted(sample) if source[i]["file"].decode() != files[i]]
    if len(source) != count or wrong:
        raise RuntimeError(f"{name}: the records are not in the order of the index, first at row {wrong[:1]}")
