"""What a data set consists of before an image is read: the vocabulary of all data set modules.

A data set module offers `ABOUT`, and `listing(source, config, options)` that finds and labels the images of a
folder as they were downloaded. Nothing here imports TFDS, so help and mistakes are answered at once.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lungjax.data.splits import parse_study as parse_study


@dataclass(frozen=True, slots=True)
class Example:
    """One image of a data set before it is read.

    `split` is the start of the clean protocol, which loses what has a twin in a later split; `study` says where
    the study had the image, and how often: "train", "train*3", "val+test" or "" for left out.
    """

    file: str  # the name shown in reports; unique in the data set
    image: str | Callable[[], bytes]  # a path, or a picklable function that returns an encoded image
    label: int
    split: str  # train, val or test; "" leaves the image out of the clean protocol
    group: str  # patient, or whatever must not be torn apart by a split
    source: str = ""  # where the image comes from, for scores per source
    box: tuple[float, float, float, float] | None = None  # xmin, ymin, xmax, ymax in pixels, max exclusive
    extra: tuple[str, ...] = ()  # values of Listing.extra
    where: str = ""  # such as "labels.csv line 7", for errors
    study: str = ""  # the study's splits, see above; ignored where Listing.study is ""


@dataclass(frozen=True)
class Listing:
    """What a data set consists of, before an image is read."""

    classes: tuple[str, ...]  # in label order
    examples: Sequence[Example]
    extra: tuple[str, ...] = ()  # names of further columns
    notes: tuple[str, ...] = ()  # what the summary should tell the user
    group_name: str = "patients"  # what a group is, for the summary
    study: str = ""  # what protocol=study is, in words; "" if nobody published or gave a split
    body: bool = False  # CT slices: keep a mask of the body for each, see `lung_masks.body_mask`
    volumes: Mapping[str, Any] | None = None  # how CT volumes became pictures: hu_windows, plane, position


@dataclass(frozen=True)
class About:
    """What a person must know of a data set; `python -m lungjax.prepare --dataset=NAME --help` prints it."""

    title: str  # one line
    origin: str  # where the images come from and how big they are
    layout: str  # what the folder must look like, some lines
    licence: str  # and who may not use it
    citation: str
    study: str = ""  # what protocol=study repeats
    clean: str = ""  # what protocol=clean does in its place
    # Images per class, in label order, of the publication: {configuration: {split: counts}}.
    expected: Mapping[str, Mapping[str, tuple[int, ...]]] | None = None


def differences(
    examples: Sequence[Example], classes: Sequence[str], expected: Mapping[str, tuple[int, ...]], name: str
) -> list[str]:
    """Returns a line for each published split (of `Example.study`) whose images per class differ, or one of praise.

    `expected` maps a split, or "all" for the whole data set, to published counts in label order.
    """
    counts: Counter[tuple[str, int]] = Counter()
    for example in examples:
        for split, times in parse_study(example.study).items():
            counts[split, example.label] += times
        counts["all", example.label] += 1
    lines = []
    for split, wanted in expected.items():
        have = tuple(counts[split, label] for label in range(len(classes)))
        if have != tuple(wanted):
            which = "the data set" if split == "all" else split
            lines.append(
                f"differs from the publication: {which} has {in_words(have)} images of {', '.join(classes)}; "
                f"{name} has {in_words(wanted)}"
            )
    return lines or [f"all images per class are as published for {name}"]


def in_words(numbers: Sequence[int]) -> str:
    """Returns counts such as "1,000 / 20"."""
    return " / ".join(f"{number:,}" for number in numbers)
