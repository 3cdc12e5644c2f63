"""Maps the tensors of a file to our parameters by a table of rules, and accounts for every name on both sides."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

Shape = tuple[int, ...]
LEAVES = {
    "gamma": "scale", "beta": "bias", "moving_mean": "mean", "moving_variance": "var", "running_mean": "mean",
    "running_var": "var", "kernel": "kernel", "depthwise_kernel": "kernel", "bias": "bias",
}  # fmt: skip
MAX_LINES = 40  # of an error message
NOTHING = r"(?!)"  # matches no path
TOKEN = re.compile(r"<(block )?(\d)([+-]\d)?>")  # in the path of a rule


class Rule(NamedTuple):
    """A regex for a complete name, and our path, as described in name_rules.toml."""

    pattern: str
    path: str
    table: Mapping[str, str] = {}

    def apply(self, name: str, blocks: Mapping[int, str]) -> str | None:
        """Returns the path; None if the name does not match, or if the table or `blocks` lacks a part of it."""
        match = re.fullmatch(self.pattern, name)
        if match is None:
            return None

        def part(token: re.Match[str]) -> str:
            text = match[int(token[2])] or "0"  # Keras omits the number of block 0
            if not token[1] and not token[3]:
                return self.table[text]
            number = (ord(text) - ord("a") + 1 if text.isalpha() else int(text)) + int(token[3] or 0)
            return blocks[number] if token[1] else str(number)

        try:
            return match.expand(TOKEN.sub(part, self.path))
        except KeyError:
            return None


@dataclass(frozen=True, eq=False)
class Rules:
    """Rules that turn the names in a file into ours. Patterns match complete names; the first match wins."""

    layers: tuple[Rule, ...]  # layer name in the file -> our layer path
    leaves: tuple[Rule, ...] = ()  # complete tensor name -> our complete path; tried first
    ignore: tuple[str, ...] = ()  # names of tensors that are not parameters
    # Our path -> function of the array in the file that returns our array
    special: tuple[tuple[str, Callable[[np.ndarray], np.ndarray]], ...] = ()
    torch: bool = False  # kernels are [O, I, H, W] and [O, I]
    blocks: Mapping[int, str] = field(default_factory=dict)  # our names by number, in files without numbers of stages

    def path(self, rules: Iterable[Rule], name: str) -> str | None:
        """Returns the path by the first of `rules` that applies to a name, or None."""
        paths = (rule.apply(name, self.blocks) for rule in rules)
        return next((path for path in paths if path is not None), None)


SAME_NAMES = Rules(layers=(), leaves=(Rule("(.*)", r"\1"),))  # for files with our own names


def target(name: str, rules: Rules, ndim: int) -> str | None:
    """Returns the parameter path for a tensor name; "" if it is ignored, None if no rule matches.

    The `ndim` of the tensor distinguishes the `weight` of a norm from that of a convolution in PyTorch.
    """
    path = rules.path(rules.leaves, name)
    if path is not None:
        return path
    if name.endswith("num_batches_tracked") or any(re.fullmatch(p, name) for p in rules.ignore):
        return ""
    layer, _, leaf = name.rpartition("." if rules.torch else "/")
    layer_path = rules.path(rules.layers, layer)
    if layer_path is None:
        return None
    if leaf == "weight":
        return f"{layer_path}/{'scale' if ndim == 1 else 'kernel'}"
    if re.search(r"_[Wb]_1$", leaf):  # in Keras 1, after the name of the layer
        return f"{layer_path}/{'kernel' if leaf.endswith('_W_1') else 'bias'}"
    return f"{layer_path}/{LEAVES[leaf]}" if leaf in LEAVES else None


def arrange(array: np.ndarray, path: str, shape: Shape, rules: Rules) -> np.ndarray:
    """Returns an array of a file in our layout, as a view where possible; its shape may still differ from ours."""
    for pattern, function in rules.special:
        if re.search(pattern, path):
            return function(array)
    if rules.torch and array.ndim == 4:
        array = array.transpose(2, 3, 1, 0)
    elif rules.torch and array.ndim == 2:
        array = array.T
    elif array.ndim == len(shape) == 4 and array.shape[3] == shape[2] == 1:  # depthwise in Keras, [h, w, C, 1]
        array = array.swapaxes(2, 3)
    extra = array.ndim - len(shape)
    if extra > 0 and array.shape[:extra] == (1,) * extra:
        array = array.reshape(array.shape[extra:])  # a dense layer stored as a 1x1 convolution
    return array


def convert(
    tensors: Mapping[str, np.ndarray],
    rules: Rules,
    shapes: Mapping[str, Shape],
    fresh: str = NOTHING,
    optional: str = NOTHING,
    label: str = "the file",
) -> dict[str, np.ndarray]:
    """Returns our parameters by path, from the tensors of a file, which are read one by one.

    `shapes` has the shapes of our parameters by path. Paths that match the regex `fresh` are never read from the file;
    those that match `optional` are skipped if the file lacks them or has another shape. Raises a ValueError, naming
    `label`, that lists tensors without a rule, missing parameters, duplicate parameters and unequal shapes.
    """
    leaves: dict[str, np.ndarray] = {}
    origin: dict[str, str] = {}
    problems = []
    for name in tensors:
        array = tensors[name]
        path = target(name, rules, array.ndim)
        if path is None or (path and path not in shapes and not re.search(f"{fresh}|{optional}", path)):
            problems.append(f"only in the file: {name} {array.shape}" + (f" (would be {path})" if path else ""))
        elif path not in shapes or re.search(fresh, path):
            continue
        elif path in leaves:
            problems.append(f"{path}: filled by {origin[path]} and by {name}")
        else:
            leaf = arrange(array, path, shapes[path], rules)
            fits = leaf.shape == tuple(shapes[path])
            if fits or not re.search(optional, path):
                leaves[path], origin[path] = leaf, name
            if path in leaves and not fits:
                problems.append(f"{path}: {name} {array.shape} gives {leaf.shape}, expected {shapes[path]}")
    missing = [path for path in shapes if path not in leaves and not re.search(f"{fresh}|{optional}", path)]
    problems += [f"only in the network: {path} {tuple(shapes[path])}" for path in missing]
    if problems:
        rest = [f"... and {len(problems) - MAX_LINES} more"] if len(problems) > MAX_LINES else []
        lines = "\n  ".join(problems[:MAX_LINES] + rest)
        raise ValueError(f"{label} does not fit ({len(problems)} names):\n  {lines}")
    return leaves
