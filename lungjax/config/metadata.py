"""What a trained network says of itself: model.json, in a run's folder and inside each of its exports.

Whoever predicts with it reads the intended input, the classes, the calibration and the operating points from here and
nowhere else, so nothing has to be given by hand, and nothing is normalised twice.

    format              1; a new key keeps it, one that goes or changes meaning raises it
    name, dataset       of the experiment and of the data set it was trained on
    classes             [names] in label order, as in every list of probabilities
    input               the fields of `config.InputSpec`: size, channels, crop, interpolation, mean, std ...
    stage, stored       what the data set keeps of an image before that (`datasets.build.process_image`): a stage
                        such as "lungs", and [height, width] of the stored copy, or null
    box                 with input.crop "box", where the box of an image comes from: "body", found as the box around the
                        body in a CT slice, or "given", known to the data set alone; "" otherwise
    window              [low, high] of 16-bit images, which become 0 and 255; null if all were 8-bit
    hu_windows          [[centre, width], ...] in Hounsfield units, one (gray) or three (colours), of CT volumes
    plane, position     how volumes were cut: axial, coronal or sagittal; every plane ("all") or the middle one ("mid")
    positive            class number that a sigmoid head's logit speaks for; null for a softmax head
    temperature         logits are divided by it, which calibrates them (`lungjax.evaluation.calibration`)
    points              LEVEL.CLASS.RULE, LEVEL being slice or patient: threshold on the calibrated probability, chosen
                        on val, and sensitivity, specificity, ppv, npv, intervals of the test split
    scores              LEVEL of the test split: n, accuracy, balanced_accuracy, auc_macro, ece, intervals
    counts              SPLIT.CLASS: images
    patients            SPLIT.CLASS: patients; {} where each image counts as its own
    novelty             `lungjax.evaluation.novelty.Novelty.to_dict`; null without such a score
    about               network, weights, licence, step, commit, versions: what a reader may want to know
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
HU_WINDOWS = ((-600.0, 1500.0),)  # the lungs' usual window, centre and width
NOTICE = "For research use only. Not a medical device, not for diagnosis."
LEVELS = ("slice", "patient")


@dataclass(frozen=True)
class Metadata:
    """The content of model.json; the module's docstring says what each field is."""

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
    positive: int | None = None
    temperature: float = 1.0
    points: Mapping[str, Any] = field(default_factory=dict)
    scores: Mapping[str, Any] = field(default_factory=dict)
    counts: Mapping[str, Any] = field(default_factory=dict)
    patients: Mapping[str, Any] = field(default_factory=dict)
    novelty: Mapping[str, Any] | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """Returns model.json's text."""
        tree = {"format": FORMAT, **dataclasses.asdict(self)}
        return json.dumps(tree, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    def public(self) -> dict[str, Any]:
        """Returns what a person may want to read, JSON-ready: all but the parameters of `novelty`."""
        tree = dataclasses.asdict(self)
        known = self.novelty
        tree["novelty"] = None if known is None else {"false_alarms": known.get("false_alarms")}
        return tree | {"notice": NOTICE}

    def rules(self, level: str = "slice") -> list[str]:
        """Returns the names of the operating points' rules, such as youden and sensitivity_0.95."""
        return sorted({rule for points in self.points.get(level, {}).values() for rule in points}, reverse=True)


def from_json(text: str, where: str = FILE) -> Metadata:
    """Reads what `Metadata.to_json` wrote.

    Raises ValueError, with `where`, for what is no such text, a newer format, or fields that can't be true.
    """
    try:
        tree = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error})") from None
    if not isinstance(tree, dict) or not isinstance(tree.get("format"), int):
        raise ValueError(f"{where}: no model.json of lungjax (it has no number `format`)")
    if tree["format"] > FORMAT:
        raise ValueError(f"{where}: format {tree['format']} of a newer lungjax; this one reads up to {FORMAT}")
    try:
        found = Metadata(**{key: value for key, value in _tuples(tree).items() if key in _FIELDS})
        found = dataclasses.replace(found, input=InputSpec(**_tuples(tree["input"])))
    except (TypeError, KeyError) as error:
        raise ValueError(f"{where}: a field is missing or unknown ({error})") from None
    problem = _problem(found)
    if problem:
        raise ValueError(f"{where}: {problem}")
    return found


def read(path: Path) -> Metadata:
    """Reads a model.json. Raises ValueError if it is not there, or as `from_json`."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        return from_json(path.read_text("utf-8"), str(path))
    except UnicodeDecodeError:
        raise ValueError(f"{path}: no text in UTF-8") from None


_FIELDS = {f.name for f in dataclasses.fields(Metadata)}
_LISTS = ("classes", "stored", "window", "hu_windows", "size", "crop_size", "mean", "std")


def _tuples(tree: Mapping[str, Any]) -> dict[str, Any]:
    def tupled(value: Any) -> Any:
        return tuple(map(tupled, value)) if isinstance(value, list) else value

    return {key: tupled(value) if key in _LISTS else value for key, value in tree.items()}


def _problem(found: Metadata) -> str:  # noqa: C901, PLR0912
    """Says what can't be true of a file that somebody sent or changed; "" if nothing is wrong."""
    names, size, spec = found.classes, found.input.size, found.input
    if not (isinstance(names, tuple) and len(names) > 1 and all(isinstance(name, str) for name in names)):
        return "`classes` should be two or more names"
    if len(set(names)) < len(names):
        return f"`classes` {', '.join(names)}: a name comes twice"
    if not _side_lengths(size):
        return f"`input.size` {size}: wanted height and width in pixels"
    if spec.channels not in (1, 3):
        return f"`input.channels` {spec.channels}: allowed are 1 and 3"
    for name, value in (("mean", spec.mean), ("std", spec.std)):
        if value is not None and not (_numbers(value) and len(value) in (1, 3)):
            return f"`input.{name}` {value}: wanted one number or three"
    if found.stored is not None and not _side_lengths(found.stored):
        return f"`stored` {found.stored}: wanted height and width in pixels, or null"
    if found.window is not None and not (_numbers(found.window, 2) and found.window[0] < found.window[1]):
        return f"`window` {found.window}: wanted two rising numbers, or null"
    windows = found.hu_windows
    if not (
        isinstance(windows, tuple) and len(windows) in (1, 3) and all(_numbers(w, 2) and w[1] > 0 for w in windows)
    ):
        return f"`hu_windows` {windows}: wanted one or three of centre and width"
    for name, word, allowed in (
        ("plane", found.plane, ("axial", "coronal", "sagittal")),
        ("position", found.position, ("all", "mid")),
        ("box", found.box, ("", "body", "given")),
        ("stage", found.stage, ("", *STAGES)),
    ):
        if word not in allowed:
            return f"`{name}` {word!r}: allowed are {', '.join(map(repr, allowed))}"
    if not (_numbers((found.temperature,)) and found.temperature > 0):
        return f"`temperature` {found.temperature}: must be above zero"
    if found.positive is not None and found.positive not in range(len(names)):
        return f"`positive` {found.positive}: there are {len(names)} classes"
    for name in ("points", "scores", "counts", "patients", "about"):
        if not isinstance(getattr(found, name), dict):
            return f"`{name}` should be an object"
    if found.novelty is not None and not isinstance(found.novelty, dict):
        return "`novelty` should be an object or null"
    try:
        points = [p for level in found.points.values() for rules in level.values() for p in rules.values()]
        fine = all(_numbers((point["threshold"],)) for point in points)
    except (AttributeError, KeyError, TypeError):
        fine = False
    return "" if fine else "`points` should be LEVEL.CLASS.RULE with a threshold each"


def _numbers(values: Any, count: int = 0) -> bool:
    if not isinstance(values, tuple) or (count and len(values) != count):
        return False
    return all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in values)


def _side_lengths(size: Any) -> bool:
    return isinstance(size, tuple) and len(size) == 2 and all(type(n) is int and 0 < n <= 8192 for n in size)
