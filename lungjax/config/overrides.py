"""Conversion of configurations from and to text: `--set=path=value`, `config.json`, and differences between two."""

import ast
import dataclasses
import json
import types
import typing
from typing import Any

from lungjax.config import presets
from lungjax.config.schema import AugmentConfig, Config, fields_of, nearest

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
    except (ValueError, SyntaxError):
        raise error from None
    if hint is float and type(value) in (int, float):
        return float(value)
    if hint is int and type(value) in (int, float) and value == int(value):
        return int(value)
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


def from_json(text: str, where: str = "config.json") -> Config:
    """Reads a `Config`. Raises ValueError naming `where` and the field for an unknown field or a wrong type."""
    try:
        tree = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON: {error}") from None
    return typing.cast(Config, _build(Config, tree, where, ""))


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
