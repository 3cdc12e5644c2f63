"""Parameter trees by name: flat "block1/conv/kernel" paths and regex masks over them."""

import re
from collections.abc import Mapping
from typing import Any

Tree = Mapping[str, Any]


def flatten(tree: Tree, prefix: str = "") -> dict[str, Any]:
    """Returns the leaves of nested dicts by slash-separated path, in the tree's own order."""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        leaves |= flatten(value, path + "/") if isinstance(value, Mapping) else {path: value}
    return leaves


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, value in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree


def mask(tree: Tree, pattern: str) -> dict[str, Any]:
    """Returns a tree of bools: whether `pattern` is found in (`re.search`) each leaf's path."""
    found = re.compile(pattern)
    return unflatten({path: found.search(path) is not None for path in flatten(tree)})
