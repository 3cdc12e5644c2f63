"""From the tensors of a file to our leaves by a table of rules, with every name on both sides accounted for."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

Replacement = str | Callable[[re.Match[str]], str]
Special = Callable[[np.ndarray, tuple[int, ...]], np.ndarray]
Shape = tuple[int, ...]
LEAVES = {
    "gamma": "scale", "beta": "bias", "moving_mean": "mean", "moving_variance": "var", "running_mean": "mean",
    "running_var": "var", "kernel": "kernel", "depthwise_kernel": "kernel", "bias": "bias",
}  # fmt: skip
SHOWN = 40  # lines of an error
NOTHING = r"(?!)"  # matches no path


@dataclass(frozen=True)
class Rules:
    """How a file's names become ours. Patterns match whole names; the first that does counts.

    A function that raises StopIteration, LookupError or ValueError doesn't know the name.
    """

    layers: tuple[tuple[str, Replacement], ...]  # layer name in the file -> our layer path
    leaves: tuple[tuple[str, Replacement], ...] = ()  # whole tensor name -> our whole path; looked at first
    ignore: tuple[str, ...] = ()  # tensors left aside on purpose
    special: tuple[tuple[str, Special], ...] = ()  # our path -> (array as in the file, our shape) -> array
    torch: bool = False  # kernels are [O, I, H, W] and [O, I]


# For files that have our own names.
SAME_NAMES = Rules(layers=(), leaves=(("(.*)", r"\1"),))


def target(name: str, rules: Rules, dimensions: int) -> str | None:
    """Returns our path of a file's tensor, "" for one left aside, None for one that no rule knows.

    `dimensions` of the array tell torch's `weight` of a norm (1) from that of a convolution.
    """
    path = _first(rules.leaves, name)
    if path is not None:
        return path
    if name.endswith("num_batches_tracked") or any(re.fullmatch(p, name) for p in rules.ignore):
        return ""
    layer, _, leaf = name.rpartition("." if rules.torch else "/")
    where = _first(rules.layers, layer)
    if where is None:
        return None
    if leaf == "weight":
        return f"{where}/{'scale' if dimensions == 1 else 'kernel'}"
    if re.search(r"_[Wb]_1$", leaf):  # Keras 1 repeats the layer's name and numbers it
        return f"{where}/{'kernel' if leaf.endswith('_W_1') else 'bias'}"
    return f"{where}/{LEAVES[leaf]}" if leaf in LEAVES else None


def _first(table: tuple[tuple[str, Replacement], ...], name: str) -> str | None:
    for pattern, replacement in table:
        match = re.fullmatch(pattern, name)
        if match:
            if isinstance(replacement, str):
                return match.expand(replacement)
            try:
                return replacement(match)
            except (StopIteration, LookupError, ValueError):  # such as a block more than the network has
                return None
    return None


def arrange(array: np.ndarray, name: str, path: str, shape: Shape, rules: Rules) -> np.ndarray:
    """Returns a file's array in our layout; a view where that is possible. May come out in another shape."""
    for pattern, function in rules.special:
        if re.search(pattern, path):
            return function(array, shape)
    if rules.torch and array.ndim == 4:
        array = array.transpose(2, 3, 1, 0)
    elif rules.torch and array.ndim == 2:
        array = array.T
    elif array.ndim == len(shape) == 4 and array.shape[3] == shape[2] == 1:  # Keras's depthwise, [h, w, C, 1]
        array = array.swapaxes(2, 3)
    if array.ndim > len(shape) and array.shape[: array.ndim - len(shape)] == (1,) * (array.ndim - len(shape)):
        array = array.reshape(array.shape[array.ndim - len(shape) :])  # a 1x1 convolution that is a dense layer
    return array


def convert(
    tensors: Mapping[str, np.ndarray],
    rules: Rules,
    shapes: Mapping[str, Shape],
    fresh: str = NOTHING,
    optional: str = NOTHING,
    where: str = "",
) -> dict[str, np.ndarray]:
    """Returns our leaves by path, from every tensor of a file.

    Args:
      tensors: arrays by the file's names; read one by one.
      rules: of the network's family and the file's layout.
      shapes: our leaves, paths without the collection ("stem_conv/kernel"): those of an `eval_shape`.
      fresh: regex over our paths that are left out, whether or not the file has them.
      optional: regex over our paths that are left out if the file lacks them or has them in another shape.
      where: the file, for the error.

    Raises ValueError with all of: tensors that no rule knows, leaves that nothing fills, leaves filled twice,
    unequal shapes. Nothing is returned then.
    """
    leaves: dict[str, np.ndarray] = {}
    origin: dict[str, str] = {}
    problems = []
    for name in tensors:
        array = tensors[name]
        path = target(name, rules, array.ndim)
        if path == "" or (path is not None and re.search(fresh, path)):
            continue
        if path is not None and re.search(optional, path):
            if path in shapes:
                array = arrange(array, name, path, shapes[path], rules)
                leaves |= {path: array} if array.shape == tuple(shapes[path]) else {}
            continue
        if path is None or path not in shapes:
            problems.append(f"only in the file: {name} {array.shape}" + (f" (would be {path})" if path else ""))
        elif path in leaves:
            problems.append(f"{path}: filled by {origin[path]} and by {name}")
        else:
            leaves[path], origin[path] = arrange(array, name, path, shapes[path], rules), name
            if leaves[path].shape != tuple(shapes[path]):
                problems.append(f"{path}: {name} {array.shape} gives {leaves[path].shape}, wanted {shapes[path]}")
    missing = [path for path in shapes if path not in leaves and not re.search(f"{fresh}|{optional}", path)]
    problems += [f"only in the network: {path} {tuple(shapes[path])}" for path in missing]
    if problems:
        shown = problems[:SHOWN] + ([f"... and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else [])
        raise ValueError(f"{where or 'the file'} does not fit ({len(problems)} names):\n  " + "\n  ".join(shown))
    return leaves
