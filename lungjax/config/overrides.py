"""Conversion of configurations from and to text: `--set=path=value`, `config.json`, and differences between two."""

import ast
import dataclasses
import json
import math
import types
import typing
from pathlib import Path
from typing import Any

from lungjax.config import presets
from lungjax.config.schema import AugmentConfig, Config, fields_of, nearest, parse_json

BOOLS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def override(config: Config, assignment: str) -> Config:
    """Returns `config` with one "path=value" set. Raises ValueError for an unknown path or a value of another type."""
    path, equals, text = assignment.partition("=")
    path = path.strip()
    if not equals or not path:
        raise ValueError(f"--set={assignment}: expected path=value, such as --set=optim.lr=3e-4")
    config = typing.cast(Config, _set(config, path.split("."), text.strip(), path))
    return dataclasses.replace(config, auto=tuple(n for n in config.auto if n not in (path, path.partition(".")[0])))


def _set(node: Any, parts: list[str], text: str, path: str) -> Any:
    name, *rest = parts
    hint = typing.get_type_hints(type(node)).get(name)
    if hint is None or (rest and not dataclasses.is_dataclass(hint)):
        raise ValueError(f"--set={path}={text}: no field {path!r}; {nearest(path, fields_of(Config()))}")
    if rest:
        value = _set(getattr(node, name), rest, text, path)
    elif hint is AugmentConfig:
        value = presets.preset(text)
    elif dataclasses.is_dataclass(hint):
        inside = ", ".join(f"{path}.{f.name}" for f in dataclasses.fields(hint))
        raise ValueError(f"--set={path}={text}: {path} is a section; set one of its fields: {inside}")
    else:
        value = parse(text, hint, path)
    return dataclasses.replace(node, **{name: value})


def parse(text: str, hint: Any, what: str) -> Any:
    """Reads `text` as a `hint`: int, float, bool, str, None or a tuple of these. Raises ValueError naming `what`."""
    error = ValueError(f"{what}={text}: expected {_type_name(hint)}, got {text!r}")
    if isinstance(hint, types.UnionType):
        if text == "None":  # "none" is a value of norms and weights
            return None
        hint = next(o for o in typing.get_args(hint) if o is not type(None))
    if hint is str:
        return text
    if hint is bool and text.lower() in BOOLS:
        return BOOLS[text.lower()]
    if typing.get_origin(hint) is tuple:
        text = text.strip()
        if text[:1] + text[-1:] in ("()", "[]"):  # not inside the text: regular expressions contain brackets
            text = text[1:-1]
        items = [t.strip() for t in text.split(",") if t.strip()]
        kinds = typing.get_args(hint)
        if kinds[-1] is ...:
            return tuple(parse(t, kinds[0], what) for t in items)
        if len(items) == 1 and len(set(kinds)) == 1:
            items *= len(kinds)  # --set=input.size=128 means 128, 128
        if len(items) != len(kinds):
            raise error
        return tuple(parse(t, k, what) for t, k in zip(items, kinds, strict=True))
    try:
        value = ast.literal_eval(text)
        number = hint(value)  # raises OverflowError for infinity as int, and for an int beyond float
    except (ValueError, SyntaxError, TypeError, OverflowError, MemoryError, RecursionError):
        raise error from None
    in_range = math.isfinite(number) if hint is float else -(2**63) <= number < 2**63  # seeds have 64 bits
    if type(value) in (int, float) and in_range and (hint is float or number == value):
        return number
    raise error


def _type_name(hint: Any) -> str:
    kinds = typing.get_args(hint)
    if isinstance(hint, types.UnionType):
        return " or ".join(_type_name(kind) for kind in kinds)
    if kinds:  # a tuple
        return f"comma-separated {kinds[0].__name__}s" if kinds[-1] is ... else ", ".join(k.__name__ for k in kinds)
    return "None" if hint is type(None) else hint.__name__


def to_json(config: Config) -> str:
    """Returns the configuration as indented JSON, the inverse of `from_json`."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str | bytes, where: str = "config.json") -> Config:
    """Reads a `Config`. Raises ValueError naming `where` and the field for an unknown field or a wrong type."""
    return typing.cast(Config, _build(Config, parse_json(text, where), where, ""))


def read(path: Path) -> Config:
    """Reads a config.json. Raises ValueError if it is missing or invalid (see `from_json`)."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    return from_json(path.read_bytes(), str(path))


def _build(section: Any, tree: Any, where: str, prefix: str) -> Any:
    if not isinstance(tree, dict):
        raise ValueError(f"{where}: {prefix or 'the file'} should be an object, got {tree!r}")
    hints = typing.get_type_hints(section)
    values = {}
    for name, value in tree.items():
        if name not in hints:
            raise ValueError(f"{where}: no field {prefix + name!r}; {nearest(prefix + name, fields_of(Config()))}")
        if dataclasses.is_dataclass(hints[name]):
            values[name] = _build(hints[name], value, where, f"{prefix}{name}.")
        else:
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            values[name] = parse(text, hints[name], f"{where}: {prefix + name}")
    return section(**values)


def difference(old: Config, new: Config) -> list[str]:
    """Returns one "path: old -> new" line per differing field."""
    a, b = fields_of(old), fields_of(new)
    return [f"{k}: {a.get(k)!r} -> {b.get(k)!r}" for k in sorted(a | b) if a.get(k) != b.get(k)]
