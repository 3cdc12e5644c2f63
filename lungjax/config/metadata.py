"""The metadata of a trained network, stored as model.json in the folder of a run and in each of its exports.

All code that predicts reads input, classes, calibration and operating points from this file.
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any

from lungjax.config.schema import AGGREGATES, CHOICES, STAGES, InputSpec, parse_json

FILE = "model.json"
FORMAT = 1  # the key `format`; incremented if a key is removed or changes meaning
HU_WINDOWS = ((-600.0, 1500.0),)  # center and width of the usual lung window
NOTICE = "For research use only. Not a medical device, not for diagnosis."
LEVELS = ("slice", "patient")


@dataclass(frozen=True)
class Metadata:
    """The content of model.json."""

    name: str  # of the experiment
    classes: tuple[str, ...]  # in label order, as in every list of probabilities
    input: InputSpec
    dataset: str  # the training data set
    stage: str = ""  # preprocessing by the data set (`datasets.build.process_image`), such as "lungs"
    stored: tuple[int, int] | None = None  # height and width of the copy stored by the data set
    # For input.crop "box", the origin of an image's box: "body" if it is computed around the body in a CT slice,
    # "given" if it is part of the data set; "" for other crops.
    box: str = ""
    window: tuple[float, float] | None = None  # of 16-bit images, becomes 0 and 255; None if all were 8-bit
    hu_windows: tuple[tuple[float, float], ...] = HU_WINDOWS  # of CT volumes: one (gray) or three (channels)
    plane: str = "axial"  # of the slices of volumes: axial, coronal or sagittal
    position: str = "all"  # of the slices of volumes: all, or the middle one ("mid")
    # "standard", or "rotated" if the training images were rotated by 180 degrees; images to predict, which should be in
    # standard orientation (head or chest up), are then rotated first.
    orientation: str = "standard"
    modality: str = ""  # of the training images: ct, xray, or "" if unknown or mixed
    # Positive class of the sigmoid output; None for softmax; -1 if each class is a finding, see `multilabel`.
    positive: int | None = None
    tta: str = "none"  # test-time augmentation (`eval.tta`), with which temperature and thresholds were chosen
    # Divisor of logits for calibration (`lungjax.evaluation.calibration`), one number or one per finding.
    temperature: float | tuple[float, ...] = 1.0
    aggregate: str = "mean"  # from slices to patients (`lungjax.evaluation.aggregation`)
    # LEVEL.CLASS.RULE, where LEVEL is slice or patient: threshold on the calibrated probability, chosen on val, and
    # sensitivity, specificity, ppv, npv and intervals of the test split.
    points: Mapping[str, Any] = field(default_factory=dict)
    # LEVEL of the test split: n, accuracy, balanced_accuracy, auc_macro, ece, intervals.
    scores: Mapping[str, Any] = field(default_factory=dict)
    counts: Mapping[str, Any] = field(default_factory=dict)  # SPLIT.CLASS: number of images
    patients: Mapping[str, Any] = field(default_factory=dict)  # SPLIT.CLASS: number of patients; {} without patient IDs
    novelty: Mapping[str, Any] | None = None  # `lungjax.evaluation.novelty.Novelty.to_dict`
    about: Mapping[str, Any] = field(default_factory=dict)  # network, weights, license, step, commit, versions
    # Of an ensemble: the models whose calibrated probabilities are averaged. `input`, `stage`, `stored`, `box`,
    # `orientation`, `modality` and `novelty` are then those of each member.
    members: tuple["Metadata", ...] = ()

    def to_json(self) -> str:
        """Returns the content of model.json."""
        tree = {"format": FORMAT, **dataclasses.asdict(self)}
        return json.dumps(tree, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    def public(self) -> dict[str, Any]:
        """Returns the fields of interest to readers, ready for JSON: all but the parameters of `novelty`."""
        tree = dataclasses.asdict(self)
        if self.novelty is not None:
            tree["novelty"] = {key: self.novelty.get(key) for key in ("false_alarms", "detection")}
        members = [member.public() for member in self.members]
        return tree | {"multilabel": self.multilabel, "notice": NOTICE, "members": members}

    @property
    def multilabel(self) -> bool:
        """Whether the classes are findings with independent probabilities, of which an image may have several."""
        return self.positive == -1

    @property
    def preprocessing(self) -> tuple[Any, ...]:
        """The fields that determine the network input of an image: equal for models that get the same pixels."""
        spec = dataclasses.replace(self.input, mean=None, std=None, box_margin=0.0)
        return spec, self.stage, self.stored, self.box, self.window, self.orientation

    def override(self, **fields: Any) -> "Metadata":
        """Returns a copy with other values of `fields`, also in the members."""
        members = tuple(member.override(**fields) for member in self.members)
        return dataclasses.replace(self, **fields, members=members)

    def modality_warnings(self, modality: str) -> list[str]:
        """Returns a warning if the DICOM modality of an image is not that of the training images, else []."""
        differs = modality and self.modality and (modality == "CT") != (self.modality == "ct")
        trained = "CT" if self.modality == "ct" else "X-rays"
        return [f"modality {modality}; the model was trained on {trained}"] if differs else []

    def rules(self, level: str = "slice") -> list[str]:
        """Returns the names of the operating-point rules, such as youden and sensitivity_0.95."""
        return sorted({rule for points in self.points.get(level, {}).values() for rule in points}, reverse=True)


def from_json(text: str | bytes, where: str = FILE) -> Metadata:
    """Reads the JSON of `Metadata.to_json`. Raises ValueError, naming `where`, for invalid text or a newer format."""
    tree = parse_json(text, where)
    if not isinstance(tree.get("format"), int):
        raise ValueError(f"{where}: not a model.json of lungjax (no numeric `format`)")
    if tree["format"] > FORMAT:
        raise ValueError(f"{where}: format {tree['format']} of a newer lungjax; this one supports up to {FORMAT}")
    try:
        members = tuple(_from_tree(member, f"{where}: members") for member in tree.get("members", ()))
        result = _from_tree(tree | {"members": ()}, where)
        if len(members) == 1 or any(member.classes != result.classes for member in members):
            raise ValueError(f"{where}: `members`: expected none, or two or more with the classes of the ensemble")
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{where}: a field is missing, unknown or of the wrong type ({error})") from None
    return dataclasses.replace(result, members=members)


def _from_tree(tree: Mapping[str, Any], where: str) -> Metadata:
    """Returns the metadata of one network. May raise AttributeError, KeyError or TypeError."""
    spec = InputSpec(**{key: _to_tuples(value) for key, value in tree["input"].items()})
    known = {f.name for f in dataclasses.fields(Metadata)} & {*tree}
    result = Metadata(**{key: _to_tuples(tree[key]) for key in known} | {"input": spec})
    for name, valid, expected in _requirements(result):
        if not valid:
            raise ValueError(f"{where}: `{name}` {attrgetter(name)(result)!r:.200}: expected {expected}")
    return result


def read(path: Path) -> Metadata:
    """Reads a model.json. Raises ValueError if it is missing or invalid (see `from_json`)."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    return from_json(path.read_bytes(), str(path))


def read_data(workdir: Path) -> dict[str, Any]:
    """Returns the data.json of a run: dataset, classes, fingerprint. Raises ValueError if it is missing or damaged."""
    path = workdir / "data.json"
    try:
        content = parse_json(path.read_bytes(), str(path))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        content = {}
    classes, texts = content.get("classes"), [content.get("dataset"), content.get("fingerprint")]
    if not isinstance(classes, list) or not all(isinstance(text, str) for text in [*classes, *texts]):
        raise ValueError(f"{path} is missing or damaged; delete it and rerun the command that trained the run")
    return content


def _to_tuples(value: Any) -> Any:
    return tuple(map(_to_tuples, value)) if isinstance(value, list) else value


def _requirements(model: Metadata) -> Iterator[tuple[str, bool, str]]:
    """Yields (name, whether its value is valid, valid values). May raise AttributeError, KeyError or TypeError."""
    classes, spec, window, pairs = model.classes, model.input, model.window, model.hu_windows
    distinct = isinstance(classes, tuple) and len(set(classes)) == len(classes) > 1
    yield "classes", distinct and all(isinstance(c, str) for c in classes), "two or more different names"
    yield "input.size", _is_size(spec.size), "height and width in pixels"
    yield "stored", model.stored is None or _is_size(model.stored), "height and width in pixels, or null"
    yield "input.mean", spec.mean is None or _are_numbers(spec.mean, 1, 3), "one number or three"
    yield "input.std", spec.std is None or _are_numbers(spec.std, 1, 3), "one number or three"
    increasing = window is None or (_are_numbers(window, 2) and window[0] < window[1])
    yield "window", increasing, "two increasing numbers, or null"
    valid = isinstance(pairs, tuple) and all(_are_numbers(pair, 2) and pair[1] > 0 for pair in pairs)
    yield "hu_windows", valid and len(pairs) in (1, 3), "one or three pairs of center and width"
    choices: dict[str, tuple[Any, ...]] = {
        "plane": ("axial", "coronal", "sagittal"), "position": ("all", "mid"), "orientation": ("standard", "rotated"),
        "modality": ("", "ct", "xray"), "box": ("", "body", "given"), "stage": ("", *STAGES),
        "positive": (None, *range(-1, len(classes))), "tta": CHOICES["eval.tta"], "members": ((),),
    }  # fmt: skip
    for name, allowed in choices.items():
        yield name, getattr(model, name) in allowed, ", ".join(map(repr, allowed))
    rule, _, names = model.aggregate.partition(":")
    valid = rule in AGGREGATES and {*names.split("+")} <= {"", *classes}
    yield "aggregate", valid, f"one of {', '.join(AGGREGATES)}, alone or with classes, as max:A"
    yield "input.channels", spec.channels in (1, 3), "1 or 3"
    values = model.temperature if isinstance(model.temperature, tuple) else (model.temperature,)
    valid = _are_numbers(values, 1, len(classes) if model.multilabel else 1) and min(values) > 0
    yield "temperature", valid, "a number above zero, or one per finding"
    for name in ("points", "scores", "counts", "patients", "about"):
        yield name, isinstance(getattr(model, name), dict), "an object"
    yield "novelty", model.novelty is None or isinstance(model.novelty, dict), "an object"
    points = [point for level in model.points.values() for rules in level.values() for point in rules.values()]
    valid = all(_are_numbers((point["threshold"],), 1) for point in points)
    yield "points", valid, "LEVEL.CLASS.RULE, each with a numeric threshold"


def _are_numbers(values: Any, *counts: int) -> bool:
    numbers = isinstance(values, tuple) and len(values) in counts
    return numbers and all(type(value) in (int, float) and math.isfinite(value) for value in values)


def _is_size(size: Any) -> bool:
    return isinstance(size, tuple) and len(size) == 2 and all(type(n) is int and 0 < n <= 8192 for n in size)
