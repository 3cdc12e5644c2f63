"""Records of predictions, ready for JSON and the same in every command and the service; README.md has the keys."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lungjax.config import nearest
from lungjax.config.metadata import Metadata
from lungjax.evaluation import aggregation

RULE = "youden"
JOIN, NO_FINDING = " + ", "no finding"  # in `predicted` of models of several findings
POINT_KEYS = ("threshold", "sensitivity", "specificity")
WARNED_FRACTION = 0.2  # minimum fraction of slices with warnings for a warning about the series


def check_rule(metadata: Metadata, rule: str) -> None:
    """Raises ValueError for an unknown operating point; models without operating points accept any name."""
    rules = metadata.rules()
    if rules and rule not in rules:
        raise ValueError(f"--rule={rule}: {nearest(rule, rules)}")


def record(
    metadata: Metadata,
    name: str,
    probabilities: np.ndarray,
    novelty: float | None = None,
    warnings: Sequence[str] = (),
    rule: str = RULE,
) -> dict[str, Any]:
    """Returns the record of one image with calibrated `probabilities` [classes]."""
    score = None if novelty is None else round(float(novelty), 3)
    return {"file": name, **_prediction(metadata, probabilities, rule, "slice"), "novelty": score,
            "warnings": list(warnings)}  # fmt: skip


def summary(
    metadata: Metadata,
    name: str,
    probabilities: np.ndarray,
    warned: int = 0,
    warnings: Sequence[str] = (),
    rule: str = RULE,
) -> dict[str, Any]:
    """Returns the record of a series: its slices are aggregated as those of patients in the report.

    `probabilities` are calibrated, [slices, classes]; `warned` is the number of slices with warnings, and `warnings`
    are those of the series. Decisions use operating points for patients if the model has any, else those for slices.
    """
    count, level = len(probabilities), "patient" if metadata.points.get("patient") else "slice"
    several = [f"{warned} of {count} images have warnings"] if warned and warned >= WARNED_FRACTION * count else []
    classes, exclusive = metadata.classes, not metadata.multilabel
    aggregated = aggregation.aggregate(probabilities, classes, metadata.aggregate, exclusive=exclusive)[0]
    prediction = _prediction(metadata, aggregated, rule, level)
    return {"series": name, "files": count, **prediction, "warnings": [*warnings, *several]}


def failure(name: str, message: str) -> dict[str, str]:
    """Returns the record of an image that can't be predicted."""
    return {"file": name, "error": message}


def columns(metadata: Metadata) -> list[str]:
    """Returns the columns of a CSV table that describe the prediction."""
    return ["predicted", *(f"p_{name}" for name in metadata.classes), *(f"called_{name}" for name in metadata.classes)]


def cell(record: Mapping[str, Any], column: str) -> Any:
    """Returns the value of a record in a column of a CSV table."""
    kind, _, name = column.partition("_")
    if kind == "p":
        return record.get("probabilities", {}).get(name, "")
    if kind == "called":
        point = record.get("decisions", {}).get(name)
        return "" if point is None else "yes" if point["called"] else "no"
    value = record.get(column)
    if isinstance(value, dict):  # gate
        return "passed" if value["passed"] else "rejected"
    return "; ".join(value) if isinstance(value, list) else "" if value is None else value


def _prediction(metadata: Metadata, probabilities: np.ndarray, rule: str, level: str) -> dict[str, Any]:
    points: Mapping[str, Any] = metadata.points.get(level, {})
    p = dict(zip(metadata.classes, map(float, probabilities), strict=True))
    decisions = {}
    for name, value in p.items():
        point = points.get(name, {}).get(rule)
        if point:
            rates = {key: point.get(key) for key in POINT_KEYS}
            decisions[name] = {"called": value >= point["threshold"], "rule": rule, "level": level, **rates}
    predicted = metadata.classes[int(np.argmax(probabilities))]
    if metadata.multilabel:
        present = [name for name, value in p.items() if decisions.get(name, {"called": value >= 0.5})["called"]]
        predicted = JOIN.join(present) or NO_FINDING
    return {
        "predicted": predicted,
        "probabilities": {name: float(f"{value:.9g}") for name, value in p.items()},  # identifies every float32
        "decisions": decisions,
    }
