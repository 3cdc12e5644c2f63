"""Identifies weight files by file name or checksum, or else by the names and shapes of their tensors."""

import math
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from lungjax import models
from lungjax.config import ModelConfig
from lungjax.weights import download
from lungjax.weights.catalogue import PretrainedWeights, records
from lungjax.weights.convert import Rules, convert, target
from lungjax.weights.name_rules import layouts
from lungjax.weights.readers import check_file, open_tensors

CLASSIFIER = r"^head/dense/"  # new for every data set
MIN_MATCH = 0.5  # fraction of the tensor names that the rules of a network must match
CANDIDATES = 3  # networks whose shapes are compared
MAX_LINES = 12  # of the listed differences


def record_of(path: Path, model: str) -> PretrainedWeights:
    """Returns the record of `model` that a file's name, checksum or tensors match; raises ValueError if unclear."""
    for record in records(model):
        if any(path.parts[-len(known.parts) :] == known.parts for known in record.paths):
            return record
    for record in by_checksum(path):  # before libraries open an unknown file
        if record.model == model:
            return record
    with open_tensors(path) as tensors:
        shapes = tensors.shapes
    matches = {record: _match(shapes, layouts(model)[record.layout]) for record in records(model)}
    best = max(matches.values(), default=0.0)
    if best < MIN_MATCH:
        raise ValueError(f"{path}: tensors {_first(shapes)} do not match any weights of {model}; {suggestion(path)}")
    fit = [record for record in matches if matches[record] == best]
    fit = [record for record in fit if (record.classes,) in shapes.values()] or fit  # the bias of its classifier
    if len({(record.network, record.input) for record in fit}) > 1:
        names, files = ", ".join(record.name for record in fit), " or ".join(record.filename for record in fit)
        raise ValueError(f"{path} may be any of {names}, which need different settings: rename it to {files}")
    return fit[0]


def by_checksum(path: Path) -> list[PretrainedWeights]:
    """Returns the records that have the checksum of the file. Raises ValueError unless it is a regular file."""
    check_file(path)
    digests = {kind: download.digest(path, kind) for kind in ("md5", "sha256")}
    checksums = [(record, record.checksum.partition(":")) for record in records() if record.checksum]
    return [record for record, (kind, _, digits) in checksums if digests[kind].startswith(digits)]


def identify(path: str | Path) -> str:
    """Returns a sentence with the records of a file. Raises ValueError with differences if it fits no network."""
    path = Path(path).expanduser()
    if exact := by_checksum(path):
        return f"{path}: {', '.join(record.name for record in exact)} (the published checksum)"
    with open_tensors(path) as tensors:
        # Arrays without memory; rules move axes and never read values.
        placeholders = {name: np.broadcast_to(np.float32(0), shape) for name, shape in tensors.shapes.items()}
    failures = []
    for group in _candidates(tensors.shapes, path.stat().st_size)[:CANDIDATES]:
        rules = layouts(group[0].model)[group[0].layout]
        ours = shapes(group[0])
        if problems := _problems(placeholders, rules, ours, fresh=CLASSIFIER):
            failures.append((len(problems), group[0].model, "\n".join(problems[:MAX_LINES])))
            continue
        fields = [", ".join(f"{key}={value}" for key, value in record.network) for record in group]
        names = ", ".join(r.name + (f" ({own})" if own else "") for r, own in zip(group, fields, strict=True))
        if problems := _problems(placeholders, rules, ours):
            return f"{path}: the tensors of {names}, except for the classifier:\n" + "\n".join(problems[:MAX_LINES])
        return f"{path}: the tensors of {names}; the file has no published checksum"
    if not failures:
        raise ValueError(f"{path}: tensors {_first(placeholders)} do not match any known file")
    _, model, lines = min(failures)
    raise ValueError(f"{path}: fits no network; the nearest is {model}, but\n{lines}")


def suggestion(path: Path) -> str:
    """Returns the end of an error message: the network that the file fits, or how to see the nearest one."""
    try:
        return f"python -m lungjax.weights --check says: {identify(path).removeprefix(f'{path}: ')}"
    except ValueError:
        return f"python -m lungjax.weights --check={path} shows the nearest network"


def shapes(record: PretrainedWeights) -> Mapping[str, Any]:
    """Returns the shapes of all parameters by path, without those of the classifier if the file has none."""
    network = models.build(ModelConfig(name=record.model), record.classes or 2)
    ours = models.leaf_shapes(network, (*record.input.size, record.input.channels))
    return ours if record.classes else {path: shape for path, shape in ours.items() if not re.match(CLASSIFIER, path)}


def _problems(arrays: Mapping[str, np.ndarray], rules: Rules, ours: Mapping[str, Any], **options: str) -> list[str]:
    try:
        convert(arrays, rules, ours, **options)
        return []
    except ValueError as error:
        return str(error).splitlines()[1:]


def _first(names: Iterable[str]) -> str:
    return ", ".join(list(names)[:3]) + ", ..."


def _match(shapes: Mapping[str, tuple[int, ...]], rules: Rules) -> float:
    """Returns the fraction of names that the rules match."""
    return sum(target(name, rules, len(shape)) is not None for name, shape in shapes.items()) / max(len(shapes), 1)


def _candidates(shapes: Mapping[str, tuple[int, ...]], size: int) -> list[list[PretrainedWeights]]:
    """Returns groups of records with the same tensors, sorted by how well names and file size match."""
    groups: dict[tuple[str, str, int], list[PretrainedWeights]] = {}
    for record in records():
        groups.setdefault((record.model, record.layout, record.classes), []).append(record)
    match = cache(lambda rules: _match(shapes, rules))  # many groups share their rules
    order = {}
    for key, group in groups.items():
        fraction = match(layouts(group[0].model)[group[0].layout])
        if fraction >= MIN_MATCH:
            order[key] = (-round(fraction, 1), abs(math.log(size / (1e6 * group[0].megabytes))))
    return [groups[key] for key in sorted(order, key=order.__getitem__)]
