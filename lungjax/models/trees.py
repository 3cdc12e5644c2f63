"""Parameter trees by name: flat "block1/conv/kernel" paths and regex masks over them."""

import re
from collections.abc import Container, Mapping
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


def split(tree: Tree, paths: Container[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the tree without the leaves at `paths`, and these alone."""
    leaves = flatten(tree)
    rest = {path: leaf for path, leaf in leaves.items() if path not in paths}
    return unflatten(rest), unflatten({path: leaf for path, leaf in leaves.items() if path in paths})


def merge(one: Tree, other: Tree) -> dict[str, Any]:
    """The inverse of `split`: one tree of the leaves of both."""
    return unflatten(flatten(one) | flatten(other))
