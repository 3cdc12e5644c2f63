"""Parameter trees by path, such as "block1/conv/kernel": flax.traverse_util with "/" as separator."""

from collections.abc import Container, Mapping
from functools import partial
from typing import Any

from flax import traverse_util

Tree = Mapping[str, Any]

flatten = partial(traverse_util.flatten_dict, sep="/")
unflatten = partial(traverse_util.unflatten_dict, sep="/")


def split(tree: Tree, paths: Container[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the tree without the leaves at `paths`, and the tree of those leaves."""
    leaves = flatten(tree)
    rest = {path: leaf for path, leaf in leaves.items() if path not in paths}
    return unflatten(rest), unflatten({path: leaf for path, leaf in leaves.items() if path in paths})


def merge(one: Tree, other: Tree) -> dict[str, Any]:
    """Returns one tree with the leaves of both trees; the inverse of `split`."""
    return unflatten(flatten(one) | flatten(other))
