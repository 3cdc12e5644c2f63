"""Experiments by name: each is a file with `get_config(**arguments) -> Config`, read without importing jax."""

import ast
import importlib.util
import inspect
from pathlib import Path

from lungjax.config import overrides, schema
from lungjax.config.schema import Config

PACKAGE = Path(__file__).parents[1]


def folder() -> Path:
    """Returns the folder of the experiment files: next to the package in a checkout, inside it once installed."""
    installed = PACKAGE / "experiments"
    return installed if installed.is_dir() else PACKAGE.parent / "experiments"


def names() -> dict[str, Path]:
    """Returns the files of all experiments by name."""
    return {path.stem: path for path in sorted(folder().glob("*.py")) if not path.stem.startswith("_")}


def listing() -> str:
    """Returns one line per experiment: its name and the first line of its docstring."""
    docs = {name: ast.get_docstring(ast.parse(path.read_text())) or "" for name, path in names().items()}
    width = max(map(len, docs), default=0)
    return "\n".join(f"{name:{width}}  {doc.partition(chr(10))[0]}" for name, doc in docs.items())


def load(choice: str) -> Config:
    """Returns the configuration of --experiment=CHOICE: NAME[:KEY=VALUE,...], FILE.py[:KEY=VALUE,...] or config.json.

    Raises ValueError for an unknown name or argument (listing the nearest ones) and for a missing file.
    """
    target, _, text = choice.partition(":")
    if target.endswith(".json"):
        return overrides.read(Path(target))
    path = Path(target) if target.endswith(".py") else names().get(target, Path())
    if not path.is_file():
        hint = "no such file" if target.endswith(".py") else schema.nearest(target, names())
        raise ValueError(f"--experiment={choice}: unknown experiment {target!r}; {hint}")
    spec = importlib.util.spec_from_file_location(f"lungjax_experiment_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    parameters, arguments = inspect.signature(module.get_config).parameters, {}
    for item in filter(None, text.split(",")):
        key, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"--experiment={choice}: {item!r} is not key=value")
        if key not in parameters:
            takes = schema.nearest(key, parameters) if parameters else "it takes none"
            raise ValueError(f"--experiment={choice}: no argument {key!r}; {takes}")
        arguments[key] = overrides.parse(value, parameters[key].annotation, f"--experiment={choice}: {key}")
    config = module.get_config(**arguments)
    if not isinstance(config, Config):
        raise ValueError(f"--experiment={choice}: get_config returned {type(config).__name__}, not a lungjax Config")
    return config
