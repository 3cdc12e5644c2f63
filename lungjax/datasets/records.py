"""Writes a data set: reads and checks every image once, TFDS records, index.csv and the summary.

All of it happens in a staging directory that is renamed at the end, so an interrupted run leaves nothing that
opens, and with `overwrite` the old data set stays until the new one is whole.
"""

import contextlib
import fcntl
import functools
import itertools
import multiprocessing
import os
import shutil
import sys
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from lungjax import machine
from lungjax.data import duplicates, prepared, summary
from lungjax.datasets import builder, twins
from lungjax.datasets.listing import Example, Listing
from lungjax.datasets.treatment import Problem, Treated, Treatment, treat

SHARD_BYTES = 128 << 20  # TFDS keeps one shard's records in memory while it writes them
SPARE_BYTES = 64 << 20  # disk that must stay free beside the images
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
    with _locked(data_dir, name) as staging:
        if prepared.is_prepared(final) and keep:
            return {}
        if prepared.is_prepared(final) and not overwrite:
            raise ValueError(f"{name} is already prepared in {final}; --overwrite replaces it")
        sizes, missing = _sizes(listing.examples, on_bad_image)
        _check_disk(sum(max(size, 0) for size in sizes), data_dir, len(listing.examples), say)
        seen = _Seen(staging / "thumbnails", skipped=missing)
        with tqdm(total=len(sizes), desc=name, unit=" images", disable=quiet, dynamic_ncols=True) as bar:
            present = [e for e, size in zip(listing.examples, sizes, strict=True) if size >= 0]
            shards = _shards(present, [s for s in sizes if s >= 0], listing, treatment, seen, choices, bar)
            bar.total = len(present)
            builder.write(name, staging, name, listing.classes, shards)
        written = prepared.directory(staging, name)
        _check_left(seen)
        say("Looking for images that are there twice ...")
        found = twins.search(seen.examples, seen.columns, listing, _thumbnails(seen))
        seen.columns["split"] = found.sound
        _check_classes(seen, listing.classes)
        window, notes = _window(window, seen)
        header = [*prepared.COLUMNS, *listing.extra]
        described = {
            "name": name,
            "classes": list(listing.classes),
            "window": window,
            "study": listing.study,
            "body": listing.body,
        }
        twins.write(found, seen.columns["file"], written)
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
        _publish(written, final)
    return result


@contextlib.contextmanager
def _locked(data_dir: Path, name: str) -> Iterator[Path]:
    """Yields an empty staging directory on the same disk; a second process that wants the same name waits."""
    root = data_dir / ".staging" / name.replace("/", "-")
    root.mkdir(parents=True, exist_ok=True)
    with (root.parent / f"{root.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            shutil.rmtree(root, ignore_errors=True)  # what a killed run left
            root.mkdir(parents=True)
            yield root
        finally:
            shutil.rmtree(root, ignore_errors=True)


def _publish(written: Path, final: Path) -> None:
    final.parent.mkdir(parents=True, exist_ok=True)
    old = final.with_name(final.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    written.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def _sizes(examples: Sequence[Example], on_bad_image: str) -> tuple[list[int], list[str]]:
    """Returns bytes of each file (-1 if it is missing, 0 if drawn) and a line for each missing one."""
    sizes, missing = [], []
    for example in examples:
        size = 0
        if isinstance(example.image, str):
            try:
                size = os.stat(example.image).st_size
            except OSError as error:
                line = f"{_place(example)}{example.image}: {(error.strerror or str(error)).lower()}"
                if on_bad_image == "fail":
                    raise ValueError(f"{line}{SKIP}") from None
                missing.append(line)
                size = -1
        sizes.append(size)
    return sizes, missing


def _check_disk(needed: int, data_dir: Path, count: int, say: Callable[[str], None]) -> None:
    free = shutil.disk_usage(data_dir).free
    say(f"{count:,} images, about {_human(needed)} to write into {data_dir} ({_human(free)} free)")
    if needed + SPARE_BYTES > free:
        raise ValueError(
            f"{data_dir}: the records need about {_human(needed + SPARE_BYTES)}, {_human(free)} are free; "
            "choose another --data_dir"
        )


def _human(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


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
) -> builder.Shards:
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
    workers = machine.cores()
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
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))


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
        **dict(zip(listing.extra, example.extra, strict=True)),
    }
    for name, text in row.items():
        seen.columns[name].append(sys.intern(text))  # a set of 400,000 images has few different sizes
    if treated.histogram is not None:
        seen.deep += 1
        if example.split == "train":
            seen.histogram += treated.histogram
    names = (example.file, example.group, example.source)
    return builder.record(
        treated.data, example.label, names, treated.box, (treated.width, treated.height), treated.body
    )


def _thumbnails(seen: _Seen) -> np.ndarray:
    shape = (len(seen.examples), duplicates.SIDE, duplicates.SIDE)
    return np.memmap(seen.thumbnails, np.uint8, "r", shape=shape)


def _check_left(seen: _Seen) -> None:
    if not seen.examples:
        raise ValueError("no readable image is left" + (f"; the first: {seen.skipped[0]}" if seen.skipped else ""))


def _check_classes(seen: _Seen, classes: Sequence[str]) -> None:
    pairs = set(zip(seen.columns["label"], seen.columns["split"], strict=True))
    trained = {label for label, split in pairs if split == "train"}
    empty = [c for c in classes if c not in trained]
    if empty:
        given = {classes[example.label] for example in seen.examples if example.split == "train"}
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


def _check_order(written: Path, name: str, seen: _Seen) -> None:
    # Training trusts that record i is row i of the index; a TFDS that shuffled would mislabel everything.
    source = prepared.open_records(written)
    files = seen.columns["file"]
    count = len(files)
    some = {0, count - 1, *np.random.default_rng(0).integers(0, count, 30).tolist()}
    wrong = [i for i in sorted(some) if source[i]["file"].decode() != files[i]]
    if len(source) != count or wrong:
        raise RuntimeError(f"{name}: the records are not in the order of the index, first at row {wrong[:1]}")
