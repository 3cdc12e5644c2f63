"""The content of model.json: the `metadata.Metadata` of a run, with the look of its training images."""

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

MAX_IMAGES = 1000  # per split, for `look`
BODY_BOX_NOTE = (
    "The scores use the body boxes of the data set. Prediction finds the box in each image, which may differ by some "
    "pixels and change the result."
)
SCORES = ("n", "accuracy", "balanced_accuracy", "auc_macro", "ece")
POINT = ("threshold", "sensitivity", "specificity", "ppv", "npv", "intervals")


def look(data: Prepared) -> novelty.Familiarity | None:
    """Returns the look of the training images, or None if too few can be read.

    Uses up to MAX_IMAGES images per split, evenly spaced; unreadable ones are skipped.
    """
    try:
        return novelty.fit(*(_pictures(data, split) for split in ("train", "val", "test")))
    except ValueError:  # too few images
        return None


def _pictures(data: Prepared, split: str) -> Iterator[Any]:
    rows = np.unique(data.rows(split))
    for row in rows[np.linspace(0, len(rows) - 1, min(len(rows), MAX_IMAGES)).round().astype(int)]:
        try:
            yield images.load(data.records[int(row)]["image"], data.window)
        except ValueError:
            continue


def describe(
    config: Config,
    data: Prepared,
    results: Mapping[str, Predictions],
    report: Mapping[str, Any],
    familiarity: novelty.Familiarity | None,
    description: Mapping[str, Any],
) -> Metadata:
    """Returns the content of model.json for a run that was just tested.

    Args:
      config: of the run, complete.
      data: the training data.
      results: predictions of "test", and of "val" if any, on which temperature and thresholds are chosen.
      report: the content of report.json.
      familiarity: of `look`.
      description: of `datasets.describe`.
    """
    name, _ = datasets.resolve(data.name)
    volumes = data.volumes or {}
    val, test = results.get("val"), results["test"]
    temperature, points = 1.0, {}
    if val is not None and len(val):
        temperature = calibration.fit_temperature(val)
        points = _points(config, *(calibration.apply_temperature(p, temperature) for p in (val, test)))
    facts, box, about = report["facts"], _box(config, data), description.get("about") or {}
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
        familiarity=None if familiarity is None else familiarity.to_dict(),
        about={
            "notice": NOTICE,
            "network": config.model.name,
            "weights": config.model.weights,
            "noncommercial_weights": config.model.noncommercial,
            "data_licence": about.get("licence", ""),
            "data_title": about.get("title", ""),
            "protocol": config.data.protocol,
            "warnings": [*report["warnings"], *([BODY_BOX_NOTE] if box == "body" else [])],
            **{key: facts.get(key) for key in ("parameters", "best_step", "fingerprint", "commit", "versions")},
        },
    )


def _patients(data: Prepared) -> dict[str, dict[str, int]]:
    """Returns the number of patients per split and class; {} if no two images share one."""
    labels, groups = data.columns["label"], data.columns["group"]
    if len(np.unique(groups)) == len(groups):
        return {}
    splits = {split: np.unique(data.rows(split)) for split in ("train", "val", "test")}
    return {
        split: {name: len(np.unique(groups[rows][labels[rows] == i])) for i, name in enumerate(data.classes)}
        for split, rows in splits.items()
    }


def _box(config: Config, data: Prepared) -> str:
    name, entry = datasets.resolve(data.name)
    columns = data.columns
    full = np.column_stack([0 * columns["width"], 0 * columns["height"], columns["width"], columns["height"]])
    if config.input.crop != "box" or (columns["box"] == full).all():
        return ""  # also if the data set has no boxes, so that complete images were used
    return "body" if entry.axial and name.base != "folder" else "given"  # a user's boxes may be of anything


def _points(config: Config, val: Predictions, test: Predictions) -> dict[str, Any]:
    """Returns LEVEL.CLASS.RULE of calibrated predictions; patients only if some have several slices."""
    levels = {"slice": (val, test)}
    if any(len(np.unique(metrics.patient_keys(p))) < len(p) for p in (val, test)):
        levels["patient"] = (metrics.by_patient(val)[0], metrics.by_patient(test)[0])
    points: dict[str, Any] = {}
    for level, pair in levels.items():
        if len(pair[1]):
            e = config.eval
            by_class = operating_points.points(*pair, e.sensitivity, e.prevalence, e.draws)
            points[level] = {
                name: {rule: {key: point[key] for key in POINT} for rule, point in rules.items()}
                for name, rules in by_class.items()
            }
    return points


def _scores(level: Mapping[str, Any], report: Mapping[str, Any]) -> dict[str, Any]:
    intervals = {key: ends for key, ends in level.get("intervals", {}).items() if key in SCORES}
    rates = {
        name: {key: level["per_class"][name].get(key) for key in ("n", "recall", "precision", "auc")}
        for name in report["classes"]
    }
    return {key: level.get(key) for key in SCORES} | {"intervals": intervals, "per_class": rates}
