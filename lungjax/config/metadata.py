"""The metadata of a trained network, stored as model.json in the folder of a run and in each of its exports.

All code that predicts reads input, classes, calibration and operating points from this file.

    format              1; incremented if a key is removed or changes meaning
    name, dataset       names of the experiment and of the training data set
    classes             [names] in label order, as in every list of probabilities
    input               the fields of `config.InputSpec`: size, channels, crop, interpolation, mean, std ...
    stage, stored       preprocessing by the data set (`datasets.build.process_image`): a stage such as "lungs", and
                        [height, width] of the stored copy, or null
    box                 for input.crop "box", the origin of an image's box: "body" if it is computed around the body in
                        a CT slice, "given" if it is part of the data set; "" for other crops
    window              [low, high] of 16-bit images, which become 0 and 255; null if all were 8-bit
    hu_windows          [[center, width], ...] in Hounsfield units, one (gray) or three (channels), for CT volumes
    plane, position     slices of volumes: axial, coronal or sagittal; all ("all") or the middle one ("mid")
    orientation         "standard", or "rotated" if the training images were rotated by 180 degrees; images to predict,
                        which should be in standard orientation (head or chest up), are then rotated first
    modality            of the training images: ct, xray, or "" if unknown or mixed
    positive            positive class of the sigmoid output; null for softmax
    temperature         divisor of logits for calibration (`lungjax.evaluation.calibration`)
    points              LEVEL.CLASS.RULE, where LEVEL is slice or patient: threshold on the calibrated probability,
                        chosen on val, and sensitivity, specificity, ppv, npv and intervals of the test split
    scores              LEVEL of the test split: n, accuracy, balanced_accuracy, auc_macro, ece, intervals
    counts              SPLIT.CLASS: number of images
    patients            SPLIT.CLASS: number of patients; {} without patient IDs
    novelty             `lungjax.evaluation.novelty.Novelty.to_dict`; null without such a score
    about               network, weights, license, step, commit, versions
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lungjax.config.schema import STAGES, InputSpec

FILE = "model.json"
FORMAT = 1
HU_WINDOWS = ((-600.0, 1500.0),)  # center and width of the usual lung window
NOTICE = "For research use only. Not a medical device, not for diagnosis."
LEVELS = ("slice", "patient")


@dataclass(frozen=True)
class Metadata:
    """The content of model.json; see the docstring of the module."""

    name: str
    classes: tuple[str, ...]
    input: InputSpec
    dataset: str
    stage: str = ""
    stored: tuple[int, int] | None = None
    box: str = ""
    window: tuple[float, float] | None = None
    hu_windows: tuple[tuple[float, float], ...] = HU_WINDOWS
    plane: str = "axial"
    position: str = "all"
    orientation: str = "standard"
    modality: str = ""
    positive: int | None = None
    temperature: float = 1.0
    points: Mapping[str, Any] = field(default_factory=dict)
    scores: Mapping[str, Any] = field(default_factory=dict)
    counts: Mapping[str, Any] = field(default_factory=dict)
    patients: Mapping[str, Any] = field(default_factory=dict)
    novelty: Mapping[str, Any] | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """Returns the content of model.json."""
        tree = {"format": FORMAT, **dataclasses.asdict(self)}
        return json.dumps(tree, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    def public(self) -> dict[str, Any]:
        """Returns the fields of interest to readers, ready for JSON: all but the parameters of `novelty`."""
        tree = dataclasses.asdict(self)
        if self.novelty is not None:
            tree["novelty"] = {key: self.novelty.get(key) for key in ("false_alarms", "detection")}
        return tree | {"notice": NOTICE}

    def modality_warnings(self, modality: str) -> list[str]:
        """Returns a warning if the DICOM modality of an image is not that of the training images, else []."""
        differs = modality and self.modality and (modality == "CT") != (self.modality == "ct")
        trained = "CT" if self.modality == "ct" else "X-rays"
        return [f"modality {modality}; the model was trained on {trained}"] if differs else []

    def rules(self, level: str = "slice") -> list[str]:
        """Returns the names of the operating-point rules, such as youden and sensitivity_0.95."""
        return sorted({rule for points in self.points.get(level, {}).values() for rule in points}, reverse=True)


def from_json(text: str, where: str = FILE) -> Metadata:
    """Reads the JSON of `Metadata.to_json`. Raises ValueError, naming `where`, for invalid text or a newer format."""
    try:
        tree = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error})") from None
    if not isinstance(tree, dict) or not isinstance(tree.get("format"), int):
        raise ValueError(f"{where}: not a model.json of lungjax (no numeric `format`)")
    if tree["format"] > FORMAT:
        raise ValueError(f"{where}: format {tree['format']} of a newer lungjax; this one supports up to {FORMAT}")
    try:
        result = Metadata(**{key: value for key, value in _tuples(tree).items() if key in _FIELDS})
        result = dataclasses.replace(result, input=InputSpec(**_tuples(tree["input"])))
    except (TypeError, KeyError) as error:
        raise ValueError(f"{where}: a field is missing or unknown ({error})") from None
    problem = _problem(result)
    if problem:
        raise ValueError(f"{where}: {problem}")
    return result


def read(path: Path) -> Metadata:
    """Reads a model.json. Raises ValueError if it is missing or invalid (see `from_json`)."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        return from_json(path.read_text("utf-8"), str(path))
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8 text") from None


_FIELDS = {f.name for f in dataclasses.fields(Metadata)}
_LISTS = ("classes", "stored", "window", "hu_windows", "size", "crop_size", "mean", "std")


def _tuples(tree: Mapping[str, Any]) -> dict[str, Any]:
    def to_tuple(value: Any) -> Any:
        return tuple(map(to_tuple, value)) if isinstance(value, list) else value

    return {key: to_tuple(value) if key in _LISTS else value for key, value in tree.items()}


def _problem(metadata: Metadata) -> str:
    """Returns the first problem in metadata from an untrusted file; "" for valid metadata."""
    names, windows = metadata.classes, metadata.hu_windows
    if not (isinstance(names, tuple) and len(names) > 1 and all(isinstance(name, str) for name in names)):
        return "`classes` should be two or more names"
    if len(set(names)) < len(names):
        return f"`classes` {', '.join(names)}: a name occurs twice"
    for name, size in (("input.size", metadata.input.size), ("stored", metadata.stored)):
        if not (_side_lengths(size) or (name == "stored" and size is None)):
            return f"`{name}` {size}: expected height and width in pixels"
    for name, statistic in (("mean", metadata.input.mean), ("std", metadata.input.std)):
        if statistic is not None and not (_numbers(statistic) and len(statistic) in (1, 3)):
            return f"`input.{name}` {statistic}: expected one number or three"
    if metadata.window is not None and not (_numbers(metadata.window, 2) and metadata.window[0] < metadata.window[1]):
        return f"`window` {metadata.window}: expected two increasing numbers, or null"
    pairs = isinstance(windows, tuple) and all(_numbers(window, 2) and window[1] > 0 for window in windows)
    if not (pairs and len(windows) in (1, 3)):
        return f"`hu_windows` {windows}: expected one or three pairs of center and width"
    choices: tuple[tuple[str, Any, tuple[Any, ...]], ...] = (
        ("input.channels", metadata.input.channels, (1, 3)),
        ("plane", metadata.plane, ("axial", "coronal", "sagittal")),
        ("position", metadata.position, ("all", "mid")),
        ("orientation", metadata.orientation, ("standard", "rotated")),
        ("modality", metadata.modality, ("", "ct", "xray")),
        ("box", metadata.box, ("", "body", "given")),
        ("stage", metadata.stage, ("", *STAGES)),
        ("positive", metadata.positive, (None, *range(len(names)))),
    )
    for name, value, allowed in choices:
        if value not in allowed:
            return f"`{name}` {value!r}: expected {', '.join(map(repr, allowed))}"
    if not (_numbers((metadata.temperature,)) and metadata.temperature > 0):
        return f"`temperature` {metadata.temperature}: must be above zero"
    for name in ("points", "scores", "counts", "patients", "about", "novelty"):
        value = getattr(metadata, name)
        if not isinstance(value, dict) and not (name == "novelty" and value is None):
            return f"`{name}` should be an object"
    try:
        points = [p for level in metadata.points.values() for rules in level.values() for p in rules.values()]
        valid = all(_numbers((point["threshold"],)) for point in points)
    except (AttributeError, KeyError, TypeError):
        valid = False
    return "" if valid else "`points` should be LEVEL.CLASS.RULE, each with a threshold"


def _numbers(values: Any, count: int = 0) -> bool:
    if not isinstance(values, tuple) or (count and len(values) != count):
        return False
    return all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in values)


def _side_lengths(size: Any) -> bool:
    return isinstance(size, tuple) and len(size) == 2 and all(type(n) is int and 0 < n <= 8192 for n in size)
