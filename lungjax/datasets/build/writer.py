"""Writes a data set: reads and checks every image once, TFDS records, index.csv and the summary.

All of it happens in a staging directory that is renamed at the end, so an interrupted run leaves nothing that
opens, and with `overwrite` the old data set stays until the new one is whole.
"""

import functools
import itertools
import multiprocessing
import os
import sys
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from lungjax.runtime import environment
from lungjax.data import duplicates, prepared, summary
from lungjax.datasets.build import tfds_builder, staging, near_duplicates
from lungjax.datasets.listing import Example, Listing
from lungjax.datasets.build.process_image import Problem, Treated, Treatment, treat

SHARD_BYTES = 128 << 20  # TFDS keeps one shard's records in memory while it writes them
DRAWN_BYTES = 512 * 512  # of an image that is made or changed on the way, about: it is stored unpacked
SKIP = "; --on_bad_image=skip leaves such images out"


@dataclass
class _Seen:
    """What the pass over the images finds out."""

    thumbnails: Path  # a file with one for each row: they are too many for memory
    examples: list[Example] = field(default_factory=list)  # those that are stored, in order
    columns: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))  # of the index
    skipped: list[str] = field(default_factory=list)
    unstaged: list[str] = field(default_factory=list)  # files in which a stage found no lung
    histogram: np.ndarray = field(default_factory=lambda: np.zeros(1 << 16, np.int64))  # of 16-bit train images
    deep: int = 0  # images with 16 bits
    raw: list[int] = field(default_factory=list)  # rows whose mean and std are of 16-bit values


@dataclass(frozen=True)
class _Choices:
    """What a user may choose about images that are not as they should be."""

    on_bad_image: str
    on_no_lung: str


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
    """Writes the data set `name` and returns its summary, which also lies beside it as summary.json and .md.

    Args:
        name: data set and configuration, such as "folder/my_hospital".
        listing: the examples, in the order they are stored.
        data_dir: the root of all prepared data sets.
        stage: one of config.STAGES, "" for the images as they are.
        size: height and width of the stored images; None leaves each as it is.
        window: 16-bit pixel values that become 0 and 255; None takes percentiles 0.5 and 99.5 of train.
        on_bad_image: "fail", or "skip" to leave unreadable and missing images out and list them.
        on_no_lung: an image in which `stage` finds no body or lung: "keep" it one stage before, "skip" it or "fail".
        overwrite: replace a data set of that name.
        keep: be content with one that is there and return {}: two runs may both find drawn data missing.
        quiet: no progress bar and no words, for data sets that are generated on first use.

    Raises ValueError for a bad image, a box outside its image, a class without a training example, too little
    disk, or a data set that is already there.
    """
    say: Callable[[str], None] = (lambda text: None) if quiet else print
    final = prepared.directory(data_dir, name)
    treatment = Treatment(stage, size, listing.body, window)
    choices = _Choices(on_bad_image, on_no_lung)
    with staging.locked(data_dir, name) as root:
        if prepared.is_prepared(final) and keep:
            return {}
        if prepared.is_prepared(final) and not overwrite:
            raise ValueError(f"{name} is already prepared in {final}; --overwrite replaces it")
        sizes, missing = _sizes(listing.examples, treatment, on_bad_image)
        staging.check_disk(sum(max(size, 0) for size in sizes), data_dir, len(listing.examples), say)
        seen = _Seen(root / "thumbnails", skipped=missing)
        with tqdm(total=len(sizes), desc=name, unit=" images", disable=quiet, dynamic_ncols=True) as bar:
            present = [e for e, size in zip(listing.examples, sizes, strict=True) if size >= 0]
            shards = _shards(present, [s for s in sizes if s >= 0], listing, treatment, seen, choices, bar)
            bar.total = len(present)
            tfds_builder.write(name, root, name, listing.classes, shards)
        written = prepared.directory(root, name)
        _check_left(seen)
        say("Looking for images that are there twice ...")
        found = near_duplicates.search(seen.examples, seen.columns, listing, _thumbnails(seen))
        seen.columns["split"] = found.clean
        _check_classes(seen, listing)
        window, notes = _window(window, seen)
        _scale(seen, window)
        header = [*prepared.COLUMNS, *listing.extra]
        described = {
            "name": name,
            "classes": list(listing.classes),
            "window": window,
            "study": listing.study,
            "stage": stage,
            "size": size,
            "body": listing.body,
            **({"volumes": dict(listing.volumes)} if listing.volumes else {}),
        }
        near_duplicates.write(found, seen.columns["file"], written)
        rows = zip(*(seen.columns[key] for key in header), strict=True)
        prepared.write_index(written, described, header, rows)
        _check_order(written, name, seen)
        result = summary.summarize(
            described,
            seen.columns,
            twins=found.told,
            skipped=seen.skipped,
            unstaged=seen.unstaged,
            notes=[*listing.notes, *notes, *found.notes],
            group_name=listing.group_name,
        )
        summary.write(result, written)
        staging.publish(written, final)
    return result


def _sizes(examples: Sequence[Example], treatment: Treatment, on_bad_image: str) -> tuple[list[int], list[str]]:
    """Returns about how many bytes each image takes (-1 if it is missing) and a line for each missing one."""
    sizes, missing = [], []
    height, width = treatment.size or (0, 0)
    for example in examples:
        if not example.file.isprintable():
            raise ValueError(f"{_place(example)}the file name {example.file!r} is not plain UTF-8 text: rename it")
        size = DRAWN_BYTES
        if isinstance(example.image, str):
            try:
                size = os.stat(example.image).st_size
                size = max(size, DRAWN_BYTES) if treatment.stage else size
            except OSError as error:
                line = f"{_place(example)}{example.image}: {(error.strerror or str(error)).lower()}"
                if on_bad_image == "fail":
                    raise ValueError(f"{line}{SKIP}") from None
                missing.append(line)
                size = -1
        sizes.append(height * width if height and size >= 0 else size)
    return sizes, missing


def _place(example: Example) -> str:
    return f"{example.where}: " if example.where else ""


def _shards(
    examples: Sequence[Example],
    sizes: Sequence[int],
    listing: Listing,
    treatment: Treatment,
    seen: _Seen,
    choices: _Choices,
    bar: Any,
) -> tfds_builder.Shards:
    """Returns one generator function a shard; TFDS calls them in order, one after the other."""
    bounds, total = [0], 0
    for i, size in enumerate(sizes):
        if total and total + size > SHARD_BYTES:
            bounds.append(i)
            total = 0
        total += size
    bounds.append(len(examples))

    def shard(start: int, stop: int) -> Iterator[tuple[int, dict[str, Any]]]:
        with seen.thumbnails.open("ab") as thumbnails:
            for example, treated in kept(start, stop):
                thumbnails.write(treated.thumbnail)
                yield len(seen.examples), _record(example, treated, listing, seen)

    def kept(start: int, stop: int) -> Iterator[tuple[Example, Treated]]:
        for example, treated in _treated(examples[start:stop], treatment):
            bar.update()
            if isinstance(treated, Problem):
                line = f"{_place(example)}{example.file}: {treated.text}"
                if choices.on_bad_image == "fail" or not treated.skippable:
                    raise ValueError(line + (SKIP if treated.skippable else ""))
                seen.skipped.append(line)
                continue
            if not treated.found:
                seen.unstaged.append(example.file)
                if choices.on_no_lung == "fail":
                    raise ValueError(
                        f"{_place(example)}{example.file}: the stage {treatment.stage} finds nothing in it; "
                        "--on_no_lung=keep or skip goes on"
                    )
                if choices.on_no_lung == "skip":
                    continue
            yield example, treated

    return [functools.partial(shard, start, stop) for start, stop in itertools.pairwise(bounds)]


def _treated(examples: Sequence[Example], treatment: Treatment) -> Iterator[tuple[Example, Treated | Problem]]:
    """Yields each example with what became of its image, in order."""
    workers = environment.cores()
    waiting: deque[Any] = deque()
    with _pool(examples, treatment, workers) as pool:
        try:
            for example in examples:
                waiting.append((example, pool.submit(treat, example, treatment)))
                if len(waiting) > 4 * workers:
                    done, result = waiting.popleft()
                    yield done, result.result()
            while waiting:
                done, result = waiting.popleft()
                yield done, result.result()
        finally:
            for _, result in waiting:
                result.cancel()


def _pool(examples: Sequence[Example], treatment: Treatment, workers: int) -> Executor:
    # Decoding leaves Python's lock alone, so threads do; drawing and masks hold it. Spawned, not forked: by now the
    # process may have XLA's threads. Starting a process takes a second or two, which few images don't pay back.
    masks = bool(treatment.stage) or treatment.body
    slow = len(examples) if masks else sum(callable(example.image) for example in examples)
    if slow < 50 * workers or workers == 1:
        return ThreadPoolExecutor(workers)
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _end_with_the_parent)


def _end_with_the_parent() -> None:
    """Ends this worker when its parent is killed, which would leave it waiting for work for ever."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _record(example: Example, treated: Treated, listing: Listing, seen: _Seen) -> dict[str, Any]:
    seen.examples.append(example)
    row = {
        "file": example.file,
        "label": listing.classes[example.label],
        "split": example.split,
        "split_study": example.study if listing.study else "",
        "group": example.group,
        "source": example.source,
        "width": str(treated.width),
        "height": str(treated.height),
        **dict(zip(prepared.BOX, (f"{v:.9g}" for v in treated.box), strict=True)),
        "pixels": treated.pixels,
        "phash": f"{treated.phash:016x}",
        "mean": f"{treated.mean:.5f}",
        "std": f"{treated.std:.5f}",
        "found": str(int(treated.found)),
        **dict(zip(listing.extra, example.extra, strict=True)),
    }
    for name, text in row.items():
        seen.columns[name].append(sys.intern(text))  # a set of 400,000 images has few different sizes
    if treated.histogram is not None:
        seen.deep += 1
        seen.raw += [len(seen.examples) - 1] if treated.raw else []
        if example.split == "train":
            seen.histogram += treated.histogram
    names = (example.file, example.group, example.source)
    return tfds_builder.record(
        treated.data, example.label, names, treated.box, (treated.width, treated.height), treated.body
    )


def _thumbnails(seen: _Seen) -> np.ndarray:
    shape = (len(seen.examples), duplicates.SIDE, duplicates.SIDE)
    return np.memmap(seen.thumbnails, np.uint8, "r", shape=shape)


def _check_left(seen: _Seen) -> None:
    if not seen.examples:
        raise ValueError("no readable image is left" + (f"; the first: {seen.skipped[0]}" if seen.skipped else ""))


def _check_classes(seen: _Seen, listing: Listing) -> None:
    classes = listing.classes
    pairs = set(zip(seen.columns["label"], seen.columns["split"], strict=True))
    trained = {label for label, split in pairs if split == "train"}
    empty = [c for c in classes if c not in trained]
    if empty:
        given = {classes[example.label] for example in seen.examples if example.split == "train"}
        if set(empty) <= given and listing.study:
            return  # the study's splits can still be used; the summary warns
        lost = " once patients and images of later splits are taken out" if set(empty) & given else ""
        raise ValueError(
            f"no training example of {', '.join(empty)}{lost}; every class needs an image in the train split"
        )


def _window(window: tuple[float, float] | None, seen: _Seen) -> tuple[tuple[float, float] | None, list[str]]:
    """Returns the window to record, and what to say about it."""
    if not seen.deep:
        return None, ["--window was not used: no image has 16 bits"] if window else []
    kinds = f"{seen.deep} of {len(seen.examples)} images have 16 bits"
    if window:
        return window, [f"{kinds}; as asked, their values {window[0]:g} to {window[1]:g} become 0 to 255"]
    total = np.cumsum(seen.histogram)
    if total[-1] == 0:
        raise ValueError(f"{kinds}, but none of them is in the train split: give --window=low,high")
    low, high = (float(np.searchsorted(total, part * total[-1])) for part in (0.005, 0.995))
    if high <= low:
        raise ValueError(f"{kinds}, and nearly all their training pixels are {low:g}: give --window=low,high")
    return (low, high), [
        f"{kinds}; the percentiles 0.5 and 99.5 of the train split were taken as window: {low:g} to {high:g} "
        "become 0 to 255; --window=low,high sets it"
    ]


def _scale(seen: _Seen, window: tuple[float, float] | None) -> None:
    """Turns mean and standard deviation of 16-bit values into those of what the window shows, without its clipping."""
    low, high = window or (0.0, 1.0)
    for row in seen.raw:
        mean, std = (float(seen.columns[key][row]) for key in ("mean", "std"))
        seen.columns["mean"][row] = f"{(mean - low) / (high - low):.5f}"
        seen.columns["std"][row] = f"{std / (high - low):.5f}"


def _check_order(written: Path, name: str, seen: _Seen) -> None:
    # Training trusts that record i is row i of the index; a TFDS that shuffled would mislabel everything.
    source = prepared.open_records(written)
    files = seen.columns["file"]
    count = len(files)
    some = {0, count - 1, *np.random.default_rng(0).integers(0, count, 30).tolist()}
    wrong = [i for i in sorted(some) if source[i]["file"].decode() != files[i]]
    if len(source) != count or wrong:
        raise RuntimeError(f"{name}: the records are not in the order of the index, first at row {wrong[:1]}")
