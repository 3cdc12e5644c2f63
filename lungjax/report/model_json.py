"""model.json of a run, for those who use its network: `metadata.Metadata` and the novelty score."""

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

MAX_IMAGES = 1000  # of a split, for the novelty score
BODY_BOX = (
    "Tested with the body boxes of the data set. Prediction detects the body in each image; its box may differ by some "
    "pixels and change a prediction."
)
SCORES = ("n", "accuracy", "balanced_accuracy", "auc_macro", "ece")
POINT = ("threshold", "sensitivity", "specificity", "ppv", "npv", "intervals")


def fit_novelty(data: Prepared) -> novelty.Novelty | None:
    """Returns the novelty score of a data set, from at most MAX_IMAGES images of each split, evenly spaced.

    Unreadable images are skipped. None if too few are left.
    """
    try:
        return novelty.fit(*(_pictures(data, split) for split in ("train", "val", "test")))
    except ValueError:
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
    detector: novelty.Novelty | None,
    dataset: Mapping[str, Any],
) -> Metadata:
    """Returns the content of model.json for a run that was just tested.

    Args:
      config: of the run, complete.
      data: the training data.
      results: predictions of "test", and of "val" if it exists, which temperature and thresholds are chosen on.
      report: content of report.json.
      detector: of `fit_novelty`.
      dataset: of `datasets.describe`.
    """
    name, _ = datasets.resolve(data.name)
    volumes = data.volumes or {}
    val, test = results.get("val"), results["test"]
    temperature, points = 1.0, {}
    if val is not None and len(val):
        temperature = calibration.fit_temperature(val)
        points = _points(config, *(calibration.apply_temperature(p, temperature) for p in (val, test)))
    facts, box = report["facts"], _box(config, data)
    about = dataset.get("about") or {}
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
        scores={level: _scores(report["test"][level], report["classes"]) for level in ("slice", "patient")},
        counts=facts.get("counts", {}),
        patients=_patients(data),
        novelty=None if detector is None else detector.to_dict(),
        about={
            "notice": NOTICE,
            "network": config.model.name,
            "weights": config.model.weights,
            "noncommercial_weights": config.model.noncommercial,
            "data_licence": about.get("licence", ""),
            "data_title": about.get("title", ""),
            "protocol": config.data.protocol,
            "warnings": [*report["warnings"], *([BODY_BOX] if box == "body" else [])],
            **{key: facts.get(key) for key in ("parameters", "best_step", "fingerprint", "commit", "versions")},
        },
    )


def _patients(data: Prepared) -> dict[str, dict[str, int]]:
    """Returns SPLIT.CLASS, the number of patients; {} if each has one image."""
    groups = data.columns["group"]
    if len(np.unique(groups)) == len(groups):
        return {}
    counts = {}
    for split in ("train", "val", "test"):
        rows = np.unique(data.rows(split))
        labels = data.columns["label"][rows]
        counts[split] = {name: len(np.unique(groups[rows][labels == i])) for i, name in enumerate(data.classes)}
    return counts


def _box(config: Config, data: Prepared) -> str:
    name, entry = datasets.resolve(data.name)
    columns = data.columns
    whole = np.column_stack([0 * columns["width"], 0 * columns["height"], columns["width"], columns["height"]])
    if config.input.crop != "box" or (columns["box"] == whole).all():
        return ""
    return "body" if entry.axial and name.base != "folder" else "given"  # a user's boxes may be of anything


def _points(config: Config, val: Predictions, test: Predictions) -> dict[str, Any]:
    """Returns LEVEL.CLASS.RULE of calibrated predictions; "patient" only if some have several slices."""
    pairs = {"slice": (val, test)}
    if any(len(np.unique(metrics.patient_keys(p))) < len(p) for p in (val, test)):
        pairs["patient"] = (metrics.by_patient(val)[0], metrics.by_patient(test)[0])
    options = config.eval
    levels = {
        level: operating_points.points(*pair, options.sensitivity, options.prevalence, options.draws)
        for level, pair in pairs.items()
        if len(pair[1])
    }
    return {
        level: {
            name: {rule: {key: point[key] for key in POINT} for rule, point in rules.items()}
            for name, rules in classes.items()
        }
        for level, classes in levels.items()
    }


def _scores(level: Mapping[str, Any], classes: tuple[str, ...]) -> dict[str, Any]:
    intervals = level.get("intervals", {})
    rates = {
        name: {key: level["per_class"][name].get(key) for key in ("n", "recall", "precision", "auc")}
        for name in classes
    }
    scores = {key: level.get(key) for key in SCORES}
    return scores | {"intervals": {key: intervals[key] for key in SCORES if key in intervals}, "per_class": rates}
