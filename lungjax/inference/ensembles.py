"""Ensembles of models with the same classes, whose calibrated probabilities are averaged: members and metadata."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lungjax.config import overrides
from lungjax.config.metadata import NOTICE, Metadata
from lungjax.evaluation import ensemble, operating_points

# Fields that decide how volumes and 16-bit images are read, before the members' own preprocessing, and how images
# of a patient are aggregated, after the mean over the members.
SHARED = ("window", "hu_windows", "plane", "position", "aggregate")
JOINED = ("network", "weights", "data_licence", "data_title", "protocol")  # keys of `about`


def find(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    """Returns the run folders and exported files at `paths`, of which a folder may have several, one per subfolder.

    Raises ValueError if there is none, or if one is given twice.
    """
    places: list[Path] = []
    for path in [paths] if isinstance(paths, str | Path) else paths:
        place = Path(path).expanduser()
        exports = [place / name for name in ("model.pyz", "model.onnx") if (place / name).exists()]
        runs = sorted(file.parent for file in place.glob("*/config.json"))
        places += [place] if (place / "config.json").exists() else exports[:1] or runs or [place]
    if not places:
        raise ValueError("no model is given")
    for place in places:
        if sum(place.resolve() == other.resolve() for other in places) > 1:
            raise ValueError(f"{place} is given twice; each member of an ensemble counts once")
    return places


def describe(places: Sequence[Path], members: Sequence[Metadata]) -> Metadata:
    """Returns the metadata of the ensemble of the models at `places`.

    Thresholds are chosen on the mean of the members' val predictions if all of them are runs that were validated on the
    same images; otherwise there are none, and `about` says why. Raises ValueError if the classes or the fields SHARED
    differ, or if a member is an ensemble.
    """
    first = members[0]
    for place, member in zip(places, members, strict=True):
        if member.members:
            raise ValueError(f"{place} is an ensemble; give its members")
        if member.multilabel != first.multilabel:
            raise ValueError(f"{places[0]} and {place} can't be averaged: only one has several findings per image")
        if member.classes != first.classes:
            names = f"{', '.join(first.classes)} and {', '.join(member.classes)}"
            raise ValueError(f"{places[0]} and {place} have different classes or another order: {names}")
        for name in SHARED:
            if getattr(member, name) != getattr(first, name):
                values = f"{getattr(first, name)!r} and {getattr(member, name)!r}"
                raise ValueError(f"{places[0]} and {place} can't be averaged: `{name}` is {values} in model.json")
    points, note = _points(places)
    about: dict[str, Any] = {key: _joined(str(m.about.get(key) or "") for m in members) for key in JOINED}
    warnings = [text for member in members for text in member.about.get("warnings", ())]
    equal = all(member.counts == first.counts for member in members)
    return replace(
        first,
        name=f"{_joined(m.name for m in members)}, ensemble of {len(members)}",
        dataset=_joined(m.dataset for m in members),
        positive=first.positive if first.multilabel else None,
        temperature=1.0,
        tta="none",
        points=points,
        scores={},
        counts=first.counts if equal else {},
        patients=first.patients if equal else {},
        novelty=None,
        about={
            "notice": NOTICE,
            **about,
            "noncommercial_weights": any(m.about.get("noncommercial_weights") for m in members),
            "parameters": sum(m.about.get("parameters") or 0 for m in members),
            "warnings": [note, *dict.fromkeys(warnings)],
        },
        members=tuple(members),
    )


def same_region(metadata: Metadata) -> bool:
    """Returns whether the inputs of all members show the same region of an image, so their maps can be averaged."""
    crops = [(m.stage, m.orientation, m.box, m.input.crop, m.input.crop_size) for m in metadata.members]
    stored = [m.stored for m in metadata.members if m.input.crop == "center"]
    return len(set(crops)) == 1 and len(set(stored)) <= 1


def _joined(texts: Any) -> str:
    return "; ".join(dict.fromkeys(text for text in texts if text))


def _points(places: Sequence[Path]) -> tuple[operating_points.Points, str]:
    """Returns the operating points of the ensemble of runs, and a sentence that says where they come from."""
    val, test = (ensemble.average(places, split) for split in ("val", "test"))
    if val is None:
        return {}, "No operating points: the members are not runs that were validated on the same images."
    options = overrides.read(places[0] / "config.json").eval
    points = operating_points.choose_all(val, val if test is None else test, options)
    note = "The operating points were chosen on the mean of the members' predictions for their common val split."
    return points if test is None else operating_points.evaluate(points, test, options), note
