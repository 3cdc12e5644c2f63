"""Which record a file is: by its checksum, else by the names and shapes of its tensors."""

import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np

from lungjax.weights.catalogue import Record, records
from lungjax.weights.convert import convert, target
from lungjax.weights.load import DENSE, by_checksum, shapes
from lungjax.weights.readers import Tensors, open_tensors
from lungjax.weights.rules import layouts

TRIED = 3  # networks whose shapes are compared if the best guesses don't fit
SHOWN = 12  # lines of what differs


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


def _named(record: Record) -> str:
    fields = ", ".join(f"{name}={value}" for name, value in record.network)
    return record.name + (f" ({fields})" if fields else "")


@cache
def _shapes(model: str, classes: int) -> Mapping[str, tuple[int, ...]]:
    return shapes(model, classes)


def _guesses(hollow: dict[str, np.ndarray], size: int) -> list[list[Record]]:
    """Returns the records that want the same tensors, together; in front those with the file's names and size."""
    groups: dict[tuple[str, str, int], list[Record]] = {}
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
