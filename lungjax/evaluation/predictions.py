"""Predictions for the examples of a split, in memory and as a CSV file.

Columns of the CSV, one row per example: `id`, `group` (patient), `source`, `label` and `predicted` (class names),
`p_CLASS`, calibrated on val, and, if known, `logit_CLASS` for each class in label order, and `extra_NAME` for each
additional column of the data set. Every metric of a report can be computed from this file. softmax(logit_CLASS) are the
uncalibrated probabilities.
"""

import csv
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from lungjax.data.safe_text import csv_row, csv_text
from lungjax.runtime.files import atomic_file

COLUMNS = ("id", "group", "source", "label", "predicted")


@dataclass(frozen=True, eq=False)
class Predictions:
    """N examples and the probabilities of C classes. Raises ValueError for inconsistent shapes, labels or classes."""

    ids: np.ndarray  # [N] str, unique in the data set
    groups: np.ndarray  # [N] str, the patient; each "" is a separate patient
    sources: np.ndarray  # [N] str, such as the hospital; "" is unknown
    labels: np.ndarray  # [N] int64, 0..C-1
    probabilities: np.ndarray  # [N, C] float32 or float64, each row sums to 1
    classes: tuple[str, ...]  # C names in label order
    extra: dict[str, np.ndarray] = field(default_factory=dict)  # additional columns, each [N] str
    logits: np.ndarray | None = None  # [N, C], probabilities = softmax(logits / temperature); None if unknown

    def __post_init__(self) -> None:
        """Checks shapes, labels and class names; the metrics check the values of `probabilities`."""
        n, c = len(self.ids), len(self.classes)
        tables = {"probabilities": self.probabilities} | ({} if self.logits is None else {"logits": self.logits})
        rows = {"groups": self.groups, "sources": self.sources, "labels": self.labels, **self.extra}
        for columns, shape in ((tables, (n, c)), (rows, (n,))):
            for name, values in columns.items():
                if np.shape(values) != shape:
                    raise ValueError(f"{name}: shape {np.shape(values)}, expected {shape} for {n} ids and {c} classes")
        if len(set(self.classes)) < c:
            raise ValueError(f"duplicate class names: {', '.join(self.classes)}")
        bad = np.flatnonzero((self.labels < 0) | (self.labels >= c))
        if len(bad):
            raise ValueError(f"{self.ids[bad[0]]}: label {self.labels[bad[0]]} is not a class index from 0 to {c - 1}")

    def __len__(self) -> int:
        """Returns N."""
        return len(self.ids)

    @property
    def predicted(self) -> np.ndarray:
        """The class with the highest probability (the first one if tied), int64 [N]."""
        return self.probabilities.argmax(axis=1) if len(self) else np.zeros(0, np.int64)


def take(predictions: Predictions, rows: np.ndarray) -> Predictions:
    """Returns the predictions for `rows`, int [M], in this order; rows may repeat."""
    p = predictions
    columns = {name: getattr(p, name)[rows] for name in ("ids", "groups", "sources", "labels", "probabilities")}
    logits = None if p.logits is None else p.logits[rows]
    return replace(p, **columns, logits=logits, extra={name: values[rows] for name, values in p.extra.items()})


def with_rule(predictions: Predictions, how: str) -> Predictions:
    """Returns the predictions with the rule `how` of `aggregation` for their patients; without one, it is the mean."""
    return replace(predictions, extra=predictions.extra | {"aggregate": np.full(len(predictions), how)})


def write(predictions: Predictions, path: Path) -> None:
    """Writes the CSV atomically, with the fewest digits from which `read` restores each float32 exactly."""
    names = np.asarray(predictions.classes, dtype=np.str_)
    header = [
        *COLUMNS,
        *(f"p_{name}" for name in predictions.classes),
        *(f"logit_{name}" for name in predictions.classes if predictions.logits is not None),
        *(f"extra_{name}" for name in predictions.extra),
    ]
    numbers = [predictions.probabilities, *([] if predictions.logits is None else [predictions.logits])]
    # As float32: "0.1" instead of "0.10000000149011612".
    digits = np.concatenate(numbers, axis=1).astype(np.float32).astype(np.str_)
    text = (predictions.ids, predictions.groups, predictions.sources)
    columns = [*text, names[predictions.labels], names[predictions.predicted], *digits.T, *predictions.extra.values()]
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
    that is not a number, or logits for only some classes.
    """
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        reader = csv.reader(file)
        header = [csv_text(name) for name in next(reader, [])]
        lines = [(reader.line_num, [csv_text(cell) for cell in row]) for row in reader]
    missing = [name for name in COLUMNS if name not in header]
    classes = tuple(name.removeprefix("p_") for name in header if name.startswith("p_"))
    logit_classes = [name.removeprefix("logit_") for name in header if name.startswith("logit_")]
    if logit_classes and tuple(logit_classes) != classes:
        raise ValueError(f"{path}: logits of {', '.join(logit_classes)}, but probabilities of {', '.join(classes)}")
    if missing or not classes:
        raise ValueError(
            f"{path}: missing column {', '.join(missing) or 'p_CLASS'}; the header should start with "
            f"{','.join(COLUMNS)},p_..., but it is {','.join(header[:6]) or 'empty'}"
        )
    places = [header.index(f"{kind}_{name}") for kind in ("p", "logit")[: 1 + bool(logit_classes)] for name in classes]
    labels, numbers = [], []
    for line, row in lines:
        if len(row) != len(header):
            raise ValueError(f"{path}, line {line}: {len(row)} values, expected {len(header)}")
        if (label := row[header.index("label")]) not in classes:
            raise ValueError(f"{path}, line {line}: label {label!r} is not one of {', '.join(classes)}")
        labels.append(classes.index(label))
        try:
            numbers.append([float(row[i]) for i in places])
        except ValueError as error:
            raise ValueError(f"{path}, line {line}: {error}") from None
    columns = {name: np.asarray([row[i] for _, row in lines], np.str_) for i, name in enumerate(header)}
    table = np.asarray(numbers, np.float32).reshape(len(lines), len(places))
    return Predictions(
        ids=columns["id"],
        groups=columns["group"],
        sources=columns["source"],
        labels=np.asarray(labels, np.int64),
        probabilities=table[:, : len(classes)],
        classes=classes,
        extra={name.removeprefix("extra_"): column for name, column in columns.items() if name.startswith("extra_")},
        logits=table[:, len(classes) :] if logit_classes else None,
    )
