"""What is said of one image or one series, in the same words and numbers by every command: JSON-ready dictionaries.

    file            its name
    predicted       the class of the highest probability
    probabilities   {class: p}, calibrated, adding up to 1
    decisions       {class: {called, rule, level, threshold, sensitivity, specificity}}: whether p is at least the
                    threshold that `rule` chose on the validation split, for slices or patients (`level`), and how often
                    that was right on the test split; without a class that has no such point
    unlike          how unlike the training images it is; above 1 is more so than 99 % of the validation images; None
                    where the model can't tell
    warnings        [sentences]

A series (or a patient) has `files`, its number of slices, in the place of `file` and `unlike`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lungjax.config import nearest
from lungjax.config.metadata import Metadata

RULE = "youden"
SHOWN = ("threshold", "sensitivity", "specificity")
MANY = 0.2  # part of a series' slices with a warning, from which the series has one


def check_rule(metadata: Metadata, rule: str) -> None:
    """Raises ValueError for a rule that the model has no operating point of, unless it has none at all."""
    rules = metadata.rules()
    if rules and rule not in rules:
        raise ValueError(f"--rule={rule}: {nearest(rule, rules)}")


def record(
    metadata: Metadata,
    name: str,
    probabilities: np.ndarray,
    unlike: float | None = None,
    warnings: Sequence[str] = (),
    rule: str = RULE,
) -> dict[str, Any]:
    """Returns the record of one image; `probabilities` [classes] are calibrated."""
    return {
        "file": name,
        **_said(metadata, probabilities, rule, "slice"),
        "unlike": None if unlike is None else round(float(unlike), 3),
        "warnings": list(warnings),
    }


def summary(
    metadata: Metadata,
    name: str,
    probabilities: np.ndarray,
    warned: int = 0,
    warnings: Sequence[str] = (),
    rule: str = RULE,
) -> dict[str, Any]:
    """Returns the record of a series: the mean over its slices, as a patient's in every report.

    Args:
      metadata: of the model.
      name: of the series.
      probabilities: [slices, classes], calibrated.
      warned: how many slices have a warning of their own.
      warnings: of the series itself.
      rule: of the operating points; those of patients where the model has them, else those of slices.
    """
    count = len(probabilities)
    level = "patient" if metadata.points.get("patient") else "slice"
    lines = list(warnings)
    if warned >= MANY * count and warned:
        lines.append(f"{warned} of {count} slices have a warning of their own")
    mean = np.asarray(probabilities, np.float64).mean(axis=0)
    return {"series": name, "files": count, **_said(metadata, mean, rule, level), "warnings": lines}


def failure(name: str, message: str) -> dict[str, str]:
    """Returns the record of an image of which nothing can be said."""
    return {"file": name, "error": message}


def _said(metadata: Metadata, probabilities: np.ndarray, rule: str, level: str) -> dict[str, Any]:
    p = [float(value) for value in probabilities]
    points: Mapping[str, Any] = metadata.points.get(level, {})
    decisions = {}
    for name, value in zip(metadata.classes, p, strict=True):
        point = points.get(name, {}).get(rule)
        if point:
            called = value >= point["threshold"]
            decisions[name] = {"called": called, "rule": rule, "level": level, **{key: point.get(key) for key in SHOWN}}
    return {
        "predicted": metadata.classes[int(np.argmax(p))],
        "probabilities": {name: round(value, 6) for name, value in zip(metadata.classes, p, strict=True)},
        "decisions": decisions,
    }
