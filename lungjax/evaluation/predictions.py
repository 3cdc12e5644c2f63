"""Predictions for the examples of a split, in memory and as a CSV file.

Columns of the CSV, one row per example: `id`, `group` (patient), `source`, `label` and `predicted` (class names),
`p_CLASS`, calibrated on val, and, if known, `logit_CLASS` for each class in label order, and `extra_NAME` for each
additional column of the data set. Every metric of a report can be computed from this file. softmax(logit_CLASS) are the
uncalibrated probabilities.

With several findings per image, `label_FINDING` (1 present, 0 absent, -1 unknown) replaces `label` and `predicted`, and
sigmoid(logit_FINDING) are the uncalibrated probabilities. `finding` turns each of them into a problem of two classes.
"""

import csv
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from lungjax.data.safe_text import csv_row, csv_text
from lungjax.runtime.files import atomic_file

COLUMNS = ("id", "group", "source")
LABEL_COLUMNS = ("label", "predicted")


@dataclass(frozen=True, eq=False)
class Predictions:
    """N examples and the probabilities of C classes. Raises ValueError for inconsistent shapes, labels or classes."""

    ids: np.ndarray  # [N] str, unique in the data set
    groups: np.ndarray  # [N] str, the patient; each "" is a separate patient
    sources: np.ndarray  # [N] str, such as the hospital; "" is unknown
    labels: np.ndarray  # [N] int64, 0..C-1, or of findings [N, C], -1..1
    probabilities: np.ndarray  # [N, C] float32 or float64, each row sums to 1, except of findings
    classes: tuple[str, ...]  # C names in label order
    extra: dict[str, np.ndarray] = field(default_factory=dict)  # additional columns, each [N] str
    logits: np.ndarray | None = None  # [N, C], probabilities = softmax(logits / temperature), or sigmoid; or unknown

    def __post_init__(self) -> None:
        """Checks shapes, labels and class names; the metrics check the values of `probabilities`."""
        n, c = len(self.ids), len(self.classes)
        tables = {"probabilities": self.probabilities} | ({} if self.logits is None else {"logits": self.logits})
        rows = {"groups": self.groups, "sources": self.sources, **self.extra}
        (tables if self.multilabel else rows)["labels"] = self.labels
        for columns, shape in ((tables, (n, c)), (rows, (n,))):
            for name, values in columns.items():
                if np.shape(values) != shape:
                    raise ValueError(f"{name}: shape {np.shape(values)}, expected {shape} for {n} ids and {c} classes")
        if len(set(self.classes)) < c:
            raise ValueError(f"duplicate class names: {', '.join(self.classes)}")
        low, high = (-1, 1) if self.multilabel else (0, c - 1)
        bad = np.argwhere((self.labels < low) | (self.labels > high))[:, 0]
        if len(bad):
            raise ValueError(f"{self.ids[bad[0]]}: label {self.labels[bad[0]]} is not from {low} to {high}")

    def __len__(self) -> int:
        """Returns N."""
        return len(self.ids)

    @property
    def multilabel(self) -> bool:
        """Whether the classes are findings, of which an image may have several."""
        return self.labels.ndim == 2

    @property
    def predicted(self) -> np.ndarray:
        """The class with the highest probability (the first one if tied), int64 [N]; not for findings."""
        return self.probabilities.argmax(axis=1) if len(self) else np.zeros(0, np.int64)


def take(predictions: Predictions, rows: np.ndarray) -> Predictions:
    """Returns the predictions for `rows`, int [M], in this order; rows may repeat."""
    p = predictions
    columns = {name: getattr(p, name)[rows] for name in ("ids", "groups", "sources", "labels", "probabilities")}
    logits = None if p.logits is None else p.logits[rows]
    return replace(p, **columns, logits=logits, extra={name: values[rows] for name, values in p.extra.items()})


def finding(predictions: Predictions, index: int) -> Predictions:
    """Returns the predictions of one finding for the images with a known label, with classes "no NAME" and "NAME"."""
    p, name = predictions, predictions.classes[index]
    rows = np.flatnonzero(p.labels[:, index] >= 0)
    chosen, score = p.probabilities[rows, index], None if p.logits is None else p.logits[rows, index]
    return Predictions(
        ids=p.ids[rows],
        groups=p.groups[rows],
        sources=p.sources[rows],
        labels=p.labels[rows, index].astype(np.int64),
        probabilities=np.stack([1 - chosen, chosen], axis=1),
        classes=(f"no {name}", name),
        extra={key: values[rows] for key, values in p.extra.items()},
        logits=None if score is None else np.stack([np.zeros_like(score), score], axis=1),
    )


def binary(predictions: Predictions) -> dict[str, tuple[Predictions, int]]:
    """Returns, by class, predictions in which it is a class, and its index: of findings, those of `finding`."""
    p = predictions
    return {name: (finding(p, i), 1) if p.multilabel else (p, i) for i, name in enumerate(p.classes)}


def with_rule(predictions: Predictions, how: str) -> Predictions:
    """Returns the predictions with the rule `how` of `aggregation` for their patients; without one, it is the mean."""
    return replace(predictions, extra=predictions.extra | {"aggregate": np.full(len(predictions), how)})


def write(predictions: Predictions, path: Path) -> None:
    """Writes the CSV atomically, with the fewest digits from which `read` restores each float32 exactly."""
    names = np.asarray(predictions.classes, dtype=np.str_)
    header = [
        *COLUMNS,
        *([f"label_{name}" for name in predictions.classes] if predictions.multilabel else LABEL_COLUMNS),
        *(f"p_{name}" for name in predictions.classes),
        *(f"logit_{name}" for name in predictions.classes if predictions.logits is not None),
        *(f"extra_{name}" for name in predictions.extra),
    ]
    numbers = [predictions.probabilities, *([] if predictions.logits is None else [predictions.logits])]
    # As float32: "0.1" instead of "0.10000000149011612".
    digits = np.concatenate(numbers, axis=1).astype(np.float32).astype(np.str_)
    text = (predictions.ids, predictions.groups, predictions.sources)
    p = predictions
    labels = p.labels.T if p.multilabel else (names[p.labels], names[p.predicted])
    columns = [*text, *labels, *digits.T, *predictions.extra.values()]
    with (
        atomic_file(Path(path)) as partial,
        # File names may contain bytes that are not UTF-8; surrogateescape preserves them.
        partial.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(csv_row(header))
        writer.writerows(map(csv_row, zip(*(np.asarray(column).tolist() for column in columns), strict=True)))


def read(path: Path) -> Predictions:
    """Reads a CSV written by `write`; probabilities and logits are float32.

    Raises ValueError, with file and line, for a missing column, a row of the wrong length, an unknown class, a value
    that is not a number, or labels or logits for only some classes.
    """
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        reader = csv.reader(file)
        header = [csv_text(name) for name in next(reader, [])]
        lines = [(reader.line_num, [csv_text(cell) for cell in row]) for row in reader]
    kinds = ("p_", "logit_", "label_")
    classes, *others = (tuple(h.removeprefix(kind) for h in header if h.startswith(kind)) for kind in kinds)
    logit_classes, findings = others
    missing = [name for name in (*COLUMNS, *(() if findings else LABEL_COLUMNS)) if name not in header]
    for what, names in zip(("logits", "labels"), others, strict=True):
        if names and names != classes:
            raise ValueError(f"{path}: {what} of {', '.join(names)}, but probabilities of {', '.join(classes)}")
    if missing or not classes:
        raise ValueError(
            f"{path}: missing column {', '.join(missing) or 'p_CLASS'}; the header should start with "
            f"{','.join((*COLUMNS, *LABEL_COLUMNS))},p_..., but it is {','.join(header[:6]) or 'empty'}"
        )
    places = [i for kind in kinds for i, name in enumerate(header) if name.startswith(kind)]
    labels, numbers = [], []
    for line, row in lines:
        if len(row) != len(header):
            raise ValueError(f"{path}, line {line}: {len(row)} values, expected {len(header)}")
        if not findings:
            if (label := row[header.index("label")]) not in classes:
                raise ValueError(f"{path}, line {line}: label {label!r} is not one of {', '.join(classes)}")
            labels.append(classes.index(label))
        try:
            numbers.append([float(row[i]) for i in places])
        except ValueError as error:
            raise ValueError(f"{path}, line {line}: {error}") from None
    columns = {name: np.asarray([row[i] for _, row in lines], np.str_) for i, name in enumerate(header)}
    table = np.asarray(numbers, np.float32).reshape(len(lines), len(places))
    count = len(classes)
    return Predictions(
        ids=columns["id"],
        groups=columns["group"],
        sources=columns["source"],
        labels=table[:, -count:].astype(np.int64) if findings else np.asarray(labels, np.int64),
        probabilities=table[:, :count],
        classes=classes,
        extra={name.removeprefix("extra_"): column for name, column in columns.items() if name.startswith("extra_")},
        logits=table[:, count : 2 * count] if logit_classes else None,
    )
