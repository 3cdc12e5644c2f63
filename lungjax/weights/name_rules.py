"""Rules that map tensor names in weight files to parameter paths: name_rules.toml by family and layout."""

import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from lungjax.models import family_of
from lungjax.weights.convert import Rule, Rules

TABLES = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))


def layouts(model: str) -> dict[str, Rules]:
    """Returns the rules for the family of a network, by layout. Raises ValueError for an unknown network."""
    family = family_of(model)
    return {layout: _rules(family, layout) for layout in TABLES.get(family, ())}


@cache
def _rules(family: str, layout: str) -> Rules:
    fields = _fields(family, layout)
    for name in ("layers", "leaves"):
        fields[name] = tuple(Rule(*rule) for rule in fields[name])
    fields["special"] = tuple((pattern, FUNCTIONS[name]) for pattern, name in fields.get("special", ()))
    repeats = fields.pop("repeats", ())
    blocks = (f"stage{stage}_block{i + 1}" for stage, count in enumerate(repeats, 1) for i in range(count))
    return Rules(**fields, blocks=dict(enumerate(blocks)))


def _fields(family: str, layout: str) -> dict[str, Any]:
    """Returns the fields of a layout, including those of the one that it is like."""
    own = dict(TABLES[family][layout])
    other = _fields(*own.pop("like").split(".")) if "like" in own else {}
    return other | own | {name: own.get(name, []) + other.get(name, []) for name in ("layers", "leaves")}


def _flatten_hwc(array: np.ndarray) -> np.ndarray:
    """Returns the first dense kernel, [O, 512 * 7 * 7] or [O, 512, 7, 7], for a map that is flattened as h, w, c."""
    return array.reshape(len(array), 512, 7, 7).transpose(2, 3, 1, 0).reshape(-1, len(array))


# The first kernel of some files is for BGR images. torchvision's layer scale is [C, 1, 1], Facebook's response norm
# [1, 1, 1, C].
FUNCTIONS = {
    "bgr": lambda kernel: kernel[:, :, ::-1],
    "flat": lambda array: array.reshape(-1),
    "flatten_hwc": _flatten_hwc,
}
