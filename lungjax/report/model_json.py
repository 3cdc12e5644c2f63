"""What a run writes for those who will use its network: `metadata.Metadata` and `novelty.Novelty` of a run."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from lungjax import datasets
from lungjax.config import Config
from lungjax.config.metadata import HU_WINDOWS, NOTICE, Metadata
from lungjax.data.imaging import images
from lungjax.data.prepared import Prepared
from lungjax.evaluation import calibration, metrics, novelty, operating_points
from lungjax.evaluation.predictions import Predictions
from lungjax.models.outputs import positive_class

MOST = 1000  # images of a split that are looked at for `familiarity`
BOXED = (
    "The scores are of the body's box as the data set gives it; in prediction it is found in each image, which may "
    "differ by some pixels and change an answer."
)
SCORES = ("n", "accuracy", "balanced_accuracy", "auc_macro", "ece")


def look(data: Prepared) -> novelty.Novelty | None:
    """Returns what the training images of a data set look like; None for too few or unreadable ones.

    Up to MOST images of each split, at even distances. An image that can't be read is left out.
    """
    try:
        return novelty.fit(*(_pictures(data, split) for split in ("train", "val", "test")))
    except ValueError:  # too few pictures to say what is usual
        return None


def _pictures(data: Prepared, split: str) -> Iterator[Any]:
    rows = np.unique(data.rows(split))
    for row in rows[np.linspace(0, len(rows) - 1, min(len(rows), MOST)).round().astype(int)]:
        try:
            yield images.load(data.records[int(row)]["image"], data.window)
        except ValueError:
            continue


def describe(
    config: Config,
    data: Prepared,
    results: Mapping[str, Predictions],
    report: Mapping[str, Any],
    known: novelty.Novelty | None,
    told: Mapping[str, Any],
) -> Metadata:
    """Returns model.json's content for a run that was just tested.

    Args:
      config: of the run, complete.
      data: what it was trained on.
      results: predictions of "test", and of "val" where there are any: temperature and thresholds are chosen there.
      report: report.json's content.
      known: of `look`.
      told: of `datasets.describe`.
    """
    name, _ = datasets.resolve(data.name)
    volumes = data.volumes or {}
    val, test = results.get("val"), results["test"]
    temperature, points = 1.0, {}
    if val is not None and len(val):
        temperature = calibration.fit_temperature(val)
        points = _points(
            config, calibration.apply_temperature(val, temperature), calibration.apply_temperature(test, temperature)
        )
    facts, box = report["facts"], _box(config, data)
    about = told.get("about") or {}
    return Metadata(
        name=config.name,
        classes=data.classes,
        input=config.input,
        dataset=data.name,
        stage=name.stage,
        stored=name.size,
        box=box,
        window=data.window,
        hu_windows=tuple(tuple(map(float, window)) for window in volumes.get("hu_windows", HU_WINDOWS)),  # type: ignore[misc]
        plane=volumes.get("plane", "axial"),
        position=volumes.get("position", "all"),
        positive=positive_class(config, data.classes),
        temperature=temperature,
        points=points,
        scores={level: _scores(report["test"][level], report) for level in ("slice", "patient")},
        counts=facts.get("counts", {}),
        patients=_patients(data),
        familiarity=None if known is None else known.to_dict(),
        about={
            "notice": NOTICE,
            "network": config.model.name,
            "weights": config.model.weights,
            "noncommercial_weights": config.model.noncommercial,
            "data_licence": about.get("licence", ""),
            "data_title": about.get("title", ""),
            "protocol": config.data.protocol,
            "warnings": [*report["warnings"], *([BOXED] if box == "body" else [])],
            **{key: facts.get(key) for key in ("parameters", "best_step", "fingerprint", "commit", "versions")},
        },
    )


def _patients(data: Prepared) -> dict[str, dict[str, int]]:
    columns, found = data.columns, {}
    if len(np.unique(columns["group"])) == len(columns["group"]):
        return {}
    for split in ("train", "val", "test"):
        rows = np.unique(data.rows(split))
        labels, groups = columns["label"][rows], columns["group"][rows]
        found[split] = {name: len(np.unique(groups[labels == i])) for i, name in enumerate(data.classes)}
    return found


def _box(config: Config, data: Prepared) -> str:
    name, entry = datasets.resolve(data.name)
    columns = data.columns
    whole = np.column_stack([0 * columns["width"], 0 * columns["height"], columns["width"], columns["height"]])
    if config.input.crop != "box" or (columns["box"] == whole).all():
        return ""  # also where the data set has none, and whole images were shown
    return "body" if entry.axial and name.base != "folder" else "given"  # a user's boxes may be of anything


def _points(config: Config, val: Predictions, test: Predictions) -> dict[str, Any]:
    """Returns LEVEL.CLASS.RULE of calibrated predictions; patients only where some have several slices."""
    chosen = config.eval
    found = {"slice": (val, test)}
    if any(len(np.unique(metrics.patient_keys(p))) < len(p) for p in (val, test)):
        found["patient"] = (metrics.by_patient(val)[0], metrics.by_patient(test)[0])
    kept = ("threshold", "sensitivity", "specificity", "ppv", "npv", "intervals")
    return {
        level: {
            name: {rule: {key: point[key] for key in kept} for rule, point in rules.items()}
            for name, rules in operating_points.points(
                *pair, chosen.sensitivity, chosen.prevalence, chosen.draws
            ).items()
        }
        for level, pair in found.items()
        if len(pair[1])
    }


def _scores(level: Mapping[str, Any], report: Mapping[str, Any]) -> dict[str, Any]:
    ends = level.get("intervals", {})
    rates = {
        name: {key: level["per_class"][name].get(key) for key in ("n", "recall", "precision", "auc")}
        for name in report["classes"]
    }
    shown = {key: level.get(key) for key in SCORES}
    return shown | {"intervals": {key: ends[key] for key in SCORES if key in ends}, "per_class": rates}
