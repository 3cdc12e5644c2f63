"""Writes a data set: reads and checks every image once, TFDS records, index.csv and the summary.

All of it happens in a staging directory that is renamed at the end, so an interrupted run leaves nothing that
opens, and with `overwrite` the old data set stays until the new one is whole.
"""

import contextlib
import fcntl
import io
import itertools
import multiprocessing
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from lungjax.data import images, prepared, summary

VERSION = tfds.core.Version("1.0.0")  # of what `features` and the index hold
SHARD_BYTES = 128 << 20  # TFDS keeps one shard's records in memory while it writes them
SPARE_BYTES = 64 << 20  # disk that must stay free beside the images


@dataclass(frozen=True, slots=True)
class Example:
    """One image of a data set before it is read."""

    file: str  # the name shown in reports; unique in the data set
    image: str | Callable[[], bytes]  # a path, or a picklable function that returns an encoded image
    label: int
    split: str  # one of prepared.SPLITS
    group: str  # patient, or whatever must not be torn apart by a split
    source: str = ""  # where the image comes from, for scores per source
    box: tuple[float, float, float, float] | None = None  # xmin, ymin, xmax, ymax in pixels, max exclusive
    extra: tuple[str, ...] = ()  # values of Listing.extra
    where: str = ""  # such as "labels.csv line 7", for errors


@dataclass(frozen=True)
class Listing:
    """What a data set consists of, before an image is read."""

    classes: tuple[str, ...]  # in label order
    examples: Sequence[Example]
    extra: tuple[str, ...] = ()  # names of further columns
    notes: tuple[str, ...] = ()  # what the summary should tell the user
    group_name: str = "patients"  # what a group is, for the summary


@dataclass
class _Seen:
    """What the pass over the images finds out."""

    rows: list[list[str]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    histogram: np.ndarray = field(default_factory=lambda: np.zeros(1 << 16, np.int64))  # of 16-bit train images
    deep: int = 0  # images with 16 bits


def info(builder: Any, classes: Sequence[str], description: str) -> tfds.core.DatasetInfo:
    """Returns the TFDS description every lungjax data set shares.

    `image` holds encoded bytes (uint8 or, for 16 bits, uint16 PNG); `box` is TFDS's ymin, xmin, ymax, xmax in
    parts of the image, the whole image where the data set has no boxes.
    """
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(),
            "label": tfds.features.ClassLabel(names=list(classes)),
            "file": tfds.features.Text(),
            "group": tfds.features.Text(),
            "source": tfds.features.Text(),
            "box": tfds.features.BBoxFeature(),
        }
    )
    return tfds.core.DatasetInfo(builder=builder, description=description, features=features, disable_shuffling=True)


def directory(data_dir: Path, name: str) -> Path:
    """Returns where the data set `name`, such as "covidx_ct/3a", lies in `data_dir`."""
    return data_dir / name / str(VERSION)


def prepare(
    builder: Callable[..., Any],
    name: str,
    listing: Listing,
    data_dir: Path,
    *,
    window: tuple[float, float] | None = None,
    on_bad_image: str = "fail",
    overwrite: bool = False,
    keep: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Writes the data set `name` and returns its summary, which also lies beside it as summary.json and .md.

    Args:
        builder: the TFDS builder class; called with data_dir, config, classes and shards.
        name: data set and configuration, such as "folder/my_hospital".
        listing: the examples, in the order they are stored.
        data_dir: the root of all prepared data sets.
        window: 16-bit pixel values that become 0 and 255; None takes percentiles 0.5 and 99.5 of train.
        on_bad_image: "fail", or "skip" to leave unreadable and missing images out and list them.
        overwrite: replace a data set of that name.
        keep: be content with one that is there and return {}: two runs may both find drawn data missing.
        quiet: no progress bar and no words, for data sets that are generated on first use.

    Raises ValueError for a bad image, a box outside its image, a class without a training example, too little
    disk, or a data set that is already there.
    """
    say: Callable[[str], None] = (lambda text: None) if quiet else print
    final = directory(data_dir, name)
    with _locked(data_dir, name) as staging:
        if prepared.is_prepared(final) and keep:
            return {}
        if prepared.is_prepared(final) and not overwrite:
            raise ValueError(f"{name} is already prepared in {final}; --overwrite replaces it")
        sizes, missing = _sizes(listing.examples, on_bad_image)
        _check_disk(sum(max(size, 0) for size in sizes), data_dir, len(listing.examples), say)
        seen = _Seen(skipped=missing)
        with tqdm(total=len(sizes), desc=name, unit=" images", disable=quiet, dynamic_ncols=True) as bar:
            present = [e for e, size in zip(listing.examples, sizes, strict=True) if size >= 0]
            shards = _shards(present, [s for s in sizes if s >= 0], listing, seen, on_bad_image, bar)
            bar.total = len(present)
            _run_tfds(builder, name, staging, listing.classes, shards)
        written = directory(staging, name)
        _check_classes(seen, listing.classes)
        window, notes = _window(window, seen)
        header = _header(listing)
        prepared.write_index(written, name, listing.classes, window, header, seen.rows)
        _check_order(written, name, seen)
        result = summary.summarize(
            name,
            listing.classes,
            header,
            seen.rows,
            window,
            seen.skipped,
            [*listing.notes, *notes],
            listing.group_name,
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
                    raise ValueError(f"{line}; --on_bad_image=skip leaves such images out") from None
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
    seen: _Seen,
    on_bad_image: str,
    bar: Any,
) -> list[Callable[[], Iterator[tuple[int, dict[str, Any]]]]]:
    """Returns one generator function a shard; TFDS calls them in order, one after the other."""
    bounds, total = [0], 0
    for i, size in enumerate(sizes):
        if total and total + size > SHARD_BYTES:
            bounds.append(i)
            total = 0
        total += size
    bounds.append(len(examples))

    def shard(start: int, stop: int) -> Iterator[tuple[int, dict[str, Any]]]:
        for example, found in _checked(examples[start:stop]):
            bar.update()
            problem = found if isinstance(found, str) else _outside(example, found)
            if problem is not None:
                line = f"{_place(example)}{example.file}: {problem}"
                if on_bad_image == "fail" or not isinstance(found, str):
                    hint = "; --on_bad_image=skip leaves such images out" if isinstance(found, str) else ""
                    raise ValueError(line + hint)
                seen.skipped.append(line)
                continue
            assert isinstance(found, images.Checked)
            yield len(seen.rows), _record(example, found, listing, seen)

    return [
        lambda start=start, stop=stop: shard(start, stop)  # type: ignore[misc]
        for start, stop in itertools.pairwise(bounds)
    ]


def _checked(examples: Sequence[Example]) -> Iterator[tuple[Example, images.Checked | str]]:
    """Yields each example with its checked image, or with what is wrong with it, in order."""
    workers = min(8, os.cpu_count() or 1)
    waiting: deque[Any] = deque()
    with _pool(examples, workers) as pool:
        try:
            for example in examples:
                waiting.append((example, pool.submit(_check, example)))
                if len(waiting) > 4 * workers:
                    done, result = waiting.popleft()
                    yield done, result.result()
            while waiting:
                done, result = waiting.popleft()
                yield done, result.result()
        finally:
            for _, result in waiting:
                result.cancel()


def _pool(examples: Sequence[Example], workers: int) -> Executor:
    # Decoding leaves Python's lock alone, so threads do; drawing holds it. Spawned, not forked: by now the
    # process may have XLA's threads. Starting a process takes a second or two, which few images don't pay back.
    drawn = sum(callable(example.image) for example in examples)
    if drawn < 50 * workers or workers == 1:
        return ThreadPoolExecutor(workers)
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))


def _check(example: Example) -> images.Checked | str:
    try:
        data = Path(example.image).read_bytes() if isinstance(example.image, str) else example.image()
        return images.check(data)
    except (ValueError, OSError) as error:
        return str(error)


def _outside(example: Example, found: images.Checked) -> str | None:
    if example.box is None:
        return None
    xmin, ymin, xmax, ymax = example.box
    if 0 <= xmin < xmax <= found.width and 0 <= ymin < ymax <= found.height:
        return None
    box = " ".join(f"{v:g}" for v in example.box)
    return f"box {box} lies outside the image, which is {found.width} x {found.height} (width x height)"


def _record(example: Example, found: images.Checked, listing: Listing, seen: _Seen) -> dict[str, Any]:
    xmin, ymin, xmax, ymax = example.box or (0.0, 0.0, float(found.width), float(found.height))
    seen.rows.append(
        [example.file, listing.classes[example.label], example.split, example.group, example.source]
        + [str(found.width), str(found.height), *(f"{v:.9g}" for v in (xmin, ymin, xmax, ymax)), found.pixels]
        + list(example.extra)
    )
    if found.histogram is not None:
        seen.deep += 1
        if example.split == "train":
            seen.histogram += found.histogram
    box = tfds.features.BBox(
        ymin=ymin / found.height, xmin=xmin / found.width, ymax=ymax / found.height, xmax=xmax / found.width
    )
    return {
        "image": io.BytesIO(found.data),
        "label": example.label,
        "file": example.file,
        "group": example.group,
        "source": example.source,
        "box": box,
    }


def _header(listing: Listing) -> list[str]:
    names = ["file", "label", "split", "group", "source", "width", "height", *prepared.BOX, "pixels"]
    return [*names, *listing.extra]


def _run_tfds(builder: Callable[..., Any], name: str, root: Path, classes: Sequence[str], shards: Any) -> None:
    tfds.disable_progress_bar()  # ours counts images over the whole data set
    with prepared.quiet_tfds():
        writer = builder(data_dir=root, config=name.partition("/")[2], classes=classes, shards=shards)
        try:
            writer.download_and_prepare(file_format="array_record")
        except RuntimeError as error:  # array_record's own, without an errno
            if "No space left" not in str(error):
                raise
            raise ValueError(f"the disk is full: {name} was not written; choose another --data_dir") from None


def _check_classes(seen: _Seen, classes: Sequence[str]) -> None:
    if not seen.rows:
        raise ValueError("no readable image is left" + (f"; the first: {seen.skipped[0]}" if seen.skipped else ""))
    trained = {row[1] for row in seen.rows if row[2] == "train"}
    empty = [c for c in classes if c not in trained]
    if empty:
        raise ValueError(f"no training example of {', '.join(empty)}; every class needs an image in the train split")


def _window(window: tuple[float, float] | None, seen: _Seen) -> tuple[tuple[float, float] | None, list[str]]:
    """Returns the window to record, and what to say about it."""
    if not seen.deep:
        return None, ["--window was not used: no image has 16 bits"] if window else []
    kinds = f"{seen.deep} of {len(seen.rows)} images have 16 bits"
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
    count = len(seen.rows)
    some = {0, count - 1, *np.random.default_rng(0).integers(0, count, 30).tolist()}
    wrong = [i for i in sorted(some) if source[i]["file"].decode() != seen.rows[i][0]]
    if len(source) != count or wrong:
        raise RuntimeError(f"{name}: the records are not in the order of the index, first at row {wrong[:1]}")
