"""Which record a file is: by its checksum, else by the names and shapes of its tensors."""

import math
from collections.abc import Mapping
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from lungjax import models
from lungjax.config import ModelConfig
from lungjax.weights import download
from lungjax.weights.catalogue import PretrainedWeights, records
from lungjax.weights.convert import convert, target
from lungjax.weights.readers import Tensors, open_tensors
from lungjax.weights.rules import layouts

DENSE = r"^head/dense/"  # the classifier: new for every data set
NAMED = 0.5  # part of a file's tensors that a network's rules know, for it to be a file of that network
TRIED = 3  # networks whose shapes are compared if the best guesses don't fit
SHOWN = 12  # lines of what differs


def record_of(path: Path, model: str) -> PretrainedWeights:
    """Returns the record of `model` that a file is: by its own name, its checksum, or its tensors' names.

    Raises ValueError if the network's family has no such names, with what they fit, and if several records have
    them whose networks or inputs differ.
    """
    stat = path.stat()
    return _record_of(path, model, stat.st_mtime_ns, stat.st_size)


@lru_cache(16)  # asked for again with every step from a configuration to leaves
def _record_of(path: Path, model: str, *stamp: int) -> PretrainedWeights:
    known = records(model)
    for record in known:
        # All of the hub's are called model.safetensors, so there the folder has to say which.
        hub = Path(record.filename).stem, record.url.rpartition("/")[2]
        if path.name == record.filename or (path.parent.name, path.name) == hub:
            return record
    with open_tensors(path) as tensors:
        shapes = tensors.shapes
    for record in by_checksum(path):
        if record.model == model:
            return record
    share, outputs = {}, {}
    for record in known:
        rules = layouts(model).get(record.layout)
        if rules:
            paths = {target(name, rules, len(shape)): shape for name, shape in shapes.items()}
            named = sum(target(name, rules, len(shape)) is not None for name, shape in shapes.items())
            share[record], outputs[record] = named / max(len(shapes), 1), paths.get("head/dense/bias")
    best = max(share.values(), default=0.0)
    if best < NAMED:
        raise ValueError(
            f"{path}: its tensors ({', '.join(list(shapes)[:3])}, ...) are not named as in any weights of {model}; "
            f"{fits(path)}"
        )
    fit = [record for record in share if share[record] == best]
    fit = [record for record in fit if outputs[record] == (record.classes,)] or fit
    if len({(record.network, record.input) for record in fit}) > 1:
        raise ValueError(
            f"{path} may be any of {', '.join(record.name for record in fit)}, which want other numbers of the "
            f"network or its input: rename it as what it is, {' or '.join(record.filename for record in fit)}"
        )
    return fit[0]


def by_checksum(path: Path) -> list[PretrainedWeights]:
    """Returns the records whose published checksum the file has."""
    found = {kind: download.digest(path, kind) for kind in ("md5", "sha256")}
    checksums = [(record, record.checksum.partition(":")) for record in records() if record.checksum]
    return [record for record, (kind, _, digits) in checksums if found[kind].startswith(digits)]


def identify(path: str | Path) -> str:
    """Returns a sentence that names the records a file is, or whose tensors it has.

    Raises ValueError for a file that can't be read, and with the nearest network and what differs if none fits.
    """
    path = Path(path).expanduser()
    with open_tensors(path) as tensors:
        same = by_checksum(path)
        if same:
            return f"{path}: {', '.join(r.name for r in same)} (the published checksum)"
        return by_content(tensors)


def by_content(tensors: Tensors) -> str:
    """Returns a sentence with the records whose every tensor the file has; the numbers themselves can't tell more.

    Raises ValueError with the nearest network and what differs.
    """
    path = tensors.path
    # Arrays of the right shapes that take no memory: rules move axes, they never look at numbers.
    hollow = {name: np.broadcast_to(np.float32(0), shape) for name, shape in tensors.shapes.items()}
    nearest: tuple[int, str, str] | None = None
    for chosen in _guesses(hollow, path.stat().st_size)[:TRIED]:
        first = chosen[0]
        rules = layouts(first.model)[first.layout]
        try:
            ours = _shapes(first.model, first.classes)
            convert(hollow, rules, ours, fresh=DENSE)
        except ValueError as error:
            problems = str(error).splitlines()[1:]
            nearest = min(nearest or (10**9, "", ""), (len(problems), first.model, "\n".join(problems[:SHOWN])))
            continue
        names = ", ".join(map(_named, chosen))
        alike = " (alike in names and shapes)" if len(chosen) > 1 else ""
        try:
            convert(hollow, rules, ours)
        except ValueError as error:
            head = "\n".join(str(error).splitlines()[1 : SHOWN + 1])
            return f"{path}: the tensors of {names}{alike}, but for its classifier:\n{head}"
        return f"{path}: the tensors of {names}{alike}; no published checksum is that of this file"
    if nearest is None:
        names = ", ".join(list(hollow)[:3])
        raise ValueError(f"{path}: its tensors ({names}, ...) are not named as in any file that is known here")
    raise ValueError(f"{path}: fits no network; the nearest is {nearest[1]}, but\n{nearest[2]}")


def fits(path: Path) -> str:
    """Returns the end of an error: what a file of another network fits."""
    try:
        return f"python -m lungjax.weights --check says: {identify(path).removeprefix(f'{path}: ')}"
    except ValueError:
        return f"python -m lungjax.weights --check {path} says what is nearest"


def shapes(
    model: str | ModelConfig, classes: int, size: tuple[int, int] | None = None, channels: int = 3
) -> Mapping[str, Any]:
    """Returns the shape of every leaf by path, without the collection; computes nothing.

    `size` (height, width) defaults to the input of the network's weights, or 224; only a head that flattens
    depends on it.
    """
    config = ModelConfig(name=model) if isinstance(model, str) else model
    known = records(config.name)
    size = size or (known[0].input.size if known else (224, 224))
    return models.leaf_shapes(models.build(config, classes), (*size, channels))


def _named(record: PretrainedWeights) -> str:
    fields = ", ".join(f"{name}={value}" for name, value in record.network)
    return record.name + (f" ({fields})" if fields else "")


@cache
def _shapes(model: str, classes: int) -> Mapping[str, tuple[int, ...]]:
    return shapes(model, classes)


def _guesses(hollow: dict[str, np.ndarray], size: int) -> list[list[PretrainedWeights]]:
    """Returns the records that want the same tensors, together; in front those with the file's names and size."""
    groups: dict[tuple[str, str, int], list[PretrainedWeights]] = {}
    for record in records():
        groups.setdefault((record.model, record.layout, record.classes), []).append(record)
    known: dict[int, float] = {}  # part of the names that a table of rules knows
    order = {}
    for key, group in groups.items():
        rules = layouts(group[0].model).get(group[0].layout)
        if rules is None:
            continue
        if id(rules) not in known:
            named = sum(target(name, rules, array.ndim) is not None for name, array in hollow.items())
            known[id(rules)] = named / max(len(hollow), 1)
        if known[id(rules)] > 0.5:
            unlike = abs(math.log(max(size, 1) / (1e6 * max(group[0].megabytes, 1))))
            order[key] = (-round(known[id(rules)], 1), unlike)
    return [groups[key] for key in sorted(order, key=lambda key: order[key])]
