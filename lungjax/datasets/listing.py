"""Types that describe a data set before its images are read. TFDS is not imported, as it would delay help texts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from lungjax.data import labels, splits
from lungjax.data.safe_text import check_printable


@dataclass(frozen=True, slots=True)
class Example:
    """One image of a data set before it is read.

    `split` is the initial split of the clean protocol, which then removes images with a duplicate in a later split.
    `study` has the splits of the study with repetitions: "train", "train*3", "val+test", or "" for unused images.
    """

    file: str  # name in reports; unique in the data set
    image: str | Callable[[], bytes]  # a path, or a picklable function that returns an encoded image
    label: Any  # the index of a class; or a tuple, for each finding 1 (present), 0 (absent) or -1 (unknown)
    split: str  # train, val or test; "" excludes the image from the clean protocol
    group: str  # patient, or another unit that must be in a single split
    source: str = ""  # origin of the image, for scores per source
    box: tuple[float, float, float, float] | None = None  # xmin, ymin, xmax, ymax in pixels, max exclusive
    extra: tuple[str, ...] = ()  # values of Listing.extra
    where: str = ""  # such as "labels.csv line 7", for errors
    study: str = ""  # see above; ignored if Listing.study is ""
    transform: Callable[[np.ndarray], np.ndarray] | None = None  # applied after the stage; picklable, keeps the size


@dataclass(frozen=True)
class Listing:
    """A data set before any image is read. Raises ValueError for a file listed twice and for control characters."""

    classes: tuple[str, ...]  # in label order, or the findings
    examples: Sequence[Example]
    extra: tuple[str, ...] = ()  # names of extra columns
    notes: tuple[str, ...] = ()  # remarks for the summary
    group_name: str = "patients"  # name of the groups in the summary
    study: str = ""  # description of protocol=study; "" without published or given splits
    body: bool = False  # whether to store body masks of CT slices, see `lung_masks.body_mask`
    volumes: Mapping[str, Any] | None = None  # how CT volumes were cut: hu_windows, plane, position, orientation
    warnings: tuple[str, ...] = ()  # for the summary
    modality: str = ""  # "ct", "xray", or "" if unknown or mixed

    @property
    def findings(self) -> bool:
        """Returns whether an image may have several of the classes."""
        return any(isinstance(example.label, tuple) for example in self.examples)

    def __post_init__(self) -> None:
        """Checks that no file is listed twice, and the names."""
        for name in self.classes:
            check_printable(name, "class")
        first: dict[str, str] = {}
        for example in self.examples:
            for name in (example.file, example.group, example.source):
                check_printable(name, example.where or "data set")
            if example.file in first:
                raise ValueError(f"{example.where}: {example.file} is already in {first[example.file]}")
            first[example.file] = example.where


@dataclass(frozen=True)
class About:
    """Description of a data set for `python -m lungjax.prepare --dataset=NAME --help` and reports."""

    title: str  # one line
    origin: str  # download location and size
    layout: str  # required structure of the folder
    licence: str  # and restrictions of use
    citation: str
    study: str = ""  # of protocol=study
    clean: str = ""  # of protocol=clean
    # Published images per class, in label order: {configuration: {split: counts}}.
    expected: Mapping[str, Mapping[str, tuple[int, ...]]] = field(default_factory=dict)


def complete_splits(examples: Sequence[Example], seed: int) -> tuple[list[Example], list[str]]:
    """Returns the examples with missing splits filled in, by group and stratified by class, and notes on them.

    Three splits are made if none is given; a missing val or test split is taken from train. Without a train split, the
    examples are an external test set and keep their splits.
    """
    given = {example.split for example in examples}
    missing = [split for split in splits.SPLITS if split not in given]
    if given == {""}:
        origin, parts = "", list(splits.SPLITS)
        note = f"splits made by group, stratified by class, 70/15/15, seed {seed}"
    elif "train" in missing:
        return list(examples), ["no train split: an external test set for --mode=evaluate --dataset=NAME"]
    else:
        origin, parts = "train", ["train", *missing]
        note = f"no {' and no '.join(missing)} split given: taken from train by group, seed {seed}"
    if not missing:
        return list(examples), []
    total = sum(splits.SHARES[split] for split in parts)
    shares = {split: splits.SHARES[split] / total for split in parts}
    chosen = [example for example in examples if example.split == origin]
    new = iter(splits.make_splits([e.label for e in chosen], [e.group for e in chosen], shares, seed))
    return [replace(e, split=next(new)) if e.split == origin else e for e in examples], [note]


def compare_counts(
    examples: Sequence[Example],
    classes: Sequence[str],
    expected: Mapping[str, Sequence[int]],
    name: str,
    unit: str = "images",
) -> list[str]:
    """Returns one line per split of `Example.study` whose counts per class differ from the published ones, if any.

    If all agree, returns a line that says so. `expected` maps a split, or "all", to published counts in label order.
    """
    shown = labels.indicators(np.asarray([example.label for example in examples]), len(classes))
    times = [{"all": 1} | splits.parse_study(example.study) for example in examples]
    lines = []
    for split, published in expected.items():
        actual = tuple((np.asarray([n.get(split, 0) for n in times]) @ shown).tolist())
        if actual != tuple(published):
            ours, theirs = (" / ".join(f"{count:,}" for count in column) for column in (actual, published))
            where = "the data set" if split == "all" else split
            what = f"{ours} {unit} of {', '.join(classes)}"
            lines.append(f"differs from the publication: {where} has {what}; {name} has {theirs}")
    return lines or [f"the {unit} per class are as published for {name}"]
