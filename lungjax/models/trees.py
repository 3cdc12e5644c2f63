"""Parameter trees by path: nested dicts as flat "block1/conv/kernel" paths, and masks and parts of them."""

import re
from collections.abc import Container, Mapping
from typing import Any

from flax import traverse_util

Tree = Mapping[str, Any]


def flatten(tree: Tree) -> dict[str, Any]:
    """Returns the leaves of nested dicts by slash-separated path, in the order of the tree; drops empty dicts."""
    return traverse_util.flatten_dict(tree, sep="/")


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    return traverse_util.unflatten_dict(leaves, sep="/")


def mask(tree: Tree, pattern: str) -> dict[str, Any]:
    """Returns a tree of bools: whether `re.search` finds `pattern` in the path of the leaf."""
    return unflatten({path: re.search(pattern, path) is not None for path in flatten(tree)})


def split(tree: Tree, paths: Container[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the tree without the leaves at `paths`, and a tree of only these."""
    leaves = flatten(tree)
    rest = {path: leaf for path, leaf in leaves.items() if path not in paths}
    return unflatten(rest), unflatten({path: leaf for path, leaf in leaves.items() if path in paths})


def merge(one: Tree, other: Tree) -> dict[str, Any]:
    """The inverse of `split`: one tree with the leaves of both."""
    return unflatten(flatten(one) | flatten(other))
