"""Where in the image the cells of a network's last map lie: the middles of what they see, read off its trace.

Padding and strides move them. Under "valid" a map shows the inner part of the image, under Keras's SAME its cells lie
half a stride right of and below an even spread, under torch's symmetric padding half a stride left and above.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal


class Axis(NamedTuple):
    """Cell i of a map has its middle at pixel `start + step * i`, counted from the middle of the first pixel."""

    start: float
    step: float


Places = tuple[Axis, Axis]  # of rows and columns
WHOLE = (Axis(0.0, 1.0), Axis(0.0, 1.0))
KEPT = ("conv_general_dilated", "reduce_window", "reduce_window_max", "reduce_window_sum", "slice", "pad")


def places(function: Callable[..., jax.Array], *args: Any) -> Places | None:
    """Returns where the cells of function(*args)'s result [B, h, w, c] lie in its last argument [B, H, W, C].

    Args:
      function: from images to a map; traced, not run.
      *args: arrays or their shapes; the last one is the images.

    Where several paths meet, such as a block and its shortcut, the mean of their middles. What has passed through a sum
    over all of the image has no place. None where nothing with a place reaches the result.
    """
    closed = jax.make_jaxpr(function)(*args)
    inputs: list[Places | None] = [None] * len(closed.jaxpr.invars)
    inputs[-1] = WHOLE
    return _follow(closed.jaxpr, inputs)[0]


def over(found: Places | None, size: tuple[int, int], cells: tuple[int, int]) -> Places:
    """Returns where to lay cells (rows, columns) over an image of `size`: as `found` where they leave a margin.

    That is under valid padding. Else they are spread evenly, as images are resized: with padding the middles of what
    trained cells react to lie there (measured on EfficientNet-Lite0's ImageNet weights), not where geometry has them.
    """
    if found and all(axis.step * c < n for axis, n, c in zip(found, size, cells, strict=True)):
        return found
    rows, columns = (Axis((n / c - 1) / 2, n / c) for n, c in zip(size, cells, strict=True))
    return rows, columns


def taps(axis: Axis, pixels: int, cells: int) -> np.ndarray:
    """Returns the weights [pixels, cells] of linear interpolation; beyond the outer cells their values go on."""
    at = np.clip((np.arange(pixels) - axis.start) / axis.step, 0, cells - 1)
    return np.maximum(1 - np.abs(at[:, None] - np.arange(cells)), 0).astype(np.float32)


def _follow(jaxpr: Jaxpr, inputs: Sequence[Places | None]) -> list[Places | None]:
    known: dict[Any, Places | None] = dict(zip(jaxpr.invars, inputs, strict=True))

    def of(x: Any) -> Places | None:
        return None if isinstance(x, Literal) else known.get(x)

    for equation in jaxpr.eqns:
        given = [of(x) for x in equation.invars]
        if any(given):
            known.update(zip(equation.outvars, _through(equation, given), strict=False))
    return [of(x) for x in jaxpr.outvars]


def _through(equation: Any, given: list[Places | None]) -> list[Places | None]:
    inner = [value for value in jax.tree.leaves(equation.params, is_leaf=_is_jaxpr) if _is_jaxpr(value)]
    if inner:
        if equation.primitive.name == "cond":
            # A convolution in forms for several platforms says most in its plain one; else the last is that of True.
            plain = [one for one in inner if any(e.primitive.name == KEPT[0] for e in _open(one).eqns)]
            return _follow(_open((plain or inner)[-1]), given[1:])
        return _follow(_open(inner[0]), given)
    first, out = given[0], equation.outvars[0].aval
    if equation.primitive.name in KEPT and len(out.shape) == 4:
        return [_moved(equation, first) if first else None]
    alike = [
        place
        for x, place in zip(equation.invars, given, strict=True)
        if place and len(out.shape) == len(x.aval.shape) == 4 and x.aval.shape[1:3] == out.shape[1:3]
    ]
    if not alike:
        return [None] * len(equation.outvars)
    middle = tuple(Axis(sum(p[a].start for p in alike) / len(alike), alike[0][a].step) for a in (0, 1))
    return [(middle[0], middle[1])] * len(equation.outvars)


def _moved(equation: Any, given: Places) -> Places:
    params, moved = equation.params, []
    for a, axis in enumerate(given):
        d = a + 1  # rows and columns are axes 1 and 2
        if equation.primitive.name == "conv_general_dilated":
            width = equation.invars[1].aval.shape[params["dimension_numbers"].rhs_spec[2 + a]]
            reach = (width - 1) * params["rhs_dilation"][a] / 2 - params["padding"][a][0]
            stride = params["window_strides"][a]
        elif equation.primitive.name == "slice":
            reach, stride = params["start_indices"][d], (params["strides"] or (1,) * 4)[d]
        elif equation.primitive.name == "pad":
            reach, stride = -params["padding_config"][d][0], 1
        else:
            reach = (params["window_dimensions"][d] - 1) * params["window_dilation"][d] / 2 - params["padding"][d][0]
            stride = params["window_strides"][d]
        moved.append(Axis(float(axis.start + axis.step * reach), float(axis.step * stride)))
    return moved[0], moved[1]


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, Jaxpr | ClosedJaxpr)


def _open(value: Any) -> Jaxpr:
    return value.jaxpr if isinstance(value, ClosedJaxpr) else value
