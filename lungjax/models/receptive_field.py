"""Positions in the image of the cells of a feature map: the centers of their receptive fields, read from a trace.

Padding and strides move them. Under "valid" padding a map shows the inner part of the image; under TF's SAME its cells
lie half a stride right of and below an even spread, under torch's symmetric padding half a stride left and above.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import Jaxpr, Literal

from lungjax.models.jaxprs import inner_jaxprs


class Axis(NamedTuple):
    """Cell i of a map is centered at pixel `start + step * i`, counted from the center of the first pixel."""

    start: float
    step: float


Places = tuple[Axis, Axis]  # of rows and columns
PIXELS = (Axis(0.0, 1.0), Axis(0.0, 1.0))  # of the image itself
CONV = "conv_general_dilated"
WINDOWED = (CONV, "reduce_window", "reduce_window_max", "reduce_window_sum", "slice", "pad")


def places(function: Callable[..., jax.Array], *args: Any) -> Places | None:
    """Returns the positions of the cells of function(*args), [B, h, w, c], in its last argument, [B, H, W, C].

    Args:
      function: from images to a map; traced, not run.
      *args: arrays or their shapes; the last one is the images.

    Where paths meet, such as a block and its shortcut, their centers are averaged. A sum over the whole image has no
    position. Returns None if the result has none.
    """
    closed = jax.make_jaxpr(function)(*args)
    inputs: list[Places | None] = [None] * len(closed.jaxpr.invars)
    inputs[-1] = PIXELS
    return _of_jaxpr(closed.jaxpr, inputs)[0]


def over(places: Places | None, size: tuple[int, int], cells: tuple[int, int]) -> Places:
    """Returns where to draw cells (rows, columns) over an image of `size`: at `places` if these leave a margin.

    That is the case under valid padding. Otherwise they are spread evenly, as in image resizing: with padding, the
    centers of what trained cells react to lie there (measured on EfficientNet-Lite0's ImageNet weights), not at the
    centers of the receptive fields.
    """
    if places and all(axis.step * c < n for axis, n, c in zip(places, size, cells, strict=True)):
        return places
    rows, columns = (Axis((n / c - 1) / 2, n / c) for n, c in zip(size, cells, strict=True))
    return rows, columns


def taps(axis: Axis, pixels: int, cells: int) -> np.ndarray:
    """Returns the weights [pixels, cells] of linear interpolation; constant beyond the outer cells."""
    at = np.clip((np.arange(pixels) - axis.start) / axis.step, 0, cells - 1)
    return np.maximum(1 - np.abs(at[:, None] - np.arange(cells)), 0).astype(np.float32)


def _of_jaxpr(jaxpr: Jaxpr, inputs: Sequence[Places | None]) -> list[Places | None]:
    places: dict[Any, Places | None] = dict(zip(jaxpr.invars, inputs, strict=True))

    def of(x: Any) -> Places | None:
        return None if isinstance(x, Literal) else places.get(x)

    for equation in jaxpr.eqns:
        operands = [of(x) for x in equation.invars]
        if any(operands):
            places.update(zip(equation.outvars, _of_equation(equation, operands), strict=False))
    return [of(x) for x in jaxpr.outvars]


def _of_equation(equation: Any, operands: list[Places | None]) -> list[Places | None]:
    inner = inner_jaxprs(equation)
    if inner and equation.primitive.name == "cond":
        # Of a convolution's forms for several platforms, the plain one; else the last branch, which is that of True.
        plain = [branch for branch in inner if any(e.primitive.name == CONV for e in branch.eqns)]
        return _of_jaxpr((plain or inner)[-1], operands[1:])
    if inner:
        return _of_jaxpr(inner[0], operands)
    shape = equation.outvars[0].aval.shape
    if equation.primitive.name in WINDOWED and len(shape) == 4:
        return [_of_windows(equation, operands[0]) if operands[0] else None]
    maps = [
        place
        for x, place in zip(equation.invars, operands, strict=True)
        if place and len(shape) == len(x.aval.shape) == 4 and x.aval.shape[1:3] == shape[1:3]
    ]
    if not maps:
        return [None] * len(equation.outvars)
    rows, columns = (Axis(sum(p[a].start for p in maps) / len(maps), maps[0][a].step) for a in (0, 1))
    return [(rows, columns)] * len(equation.outvars)


def _of_windows(equation: Any, operand: Places) -> Places:
    params, axes = equation.params, []
    for a, axis in enumerate(operand):
        d = a + 1  # rows and columns are axes 1 and 2
        if equation.primitive.name == CONV:
            width = equation.invars[1].aval.shape[params["dimension_numbers"].rhs_spec[2 + a]]
            offset = (width - 1) * params["rhs_dilation"][a] / 2 - params["padding"][a][0]
            stride = params["window_strides"][a]
        elif equation.primitive.name == "slice":
            offset, stride = params["start_indices"][d], (params["strides"] or (1,) * 4)[d]
        elif equation.primitive.name == "pad":
            offset, stride = -params["padding_config"][d][0], 1
        else:
            offset = (params["window_dimensions"][d] - 1) * params["window_dilation"][d] / 2 - params["padding"][d][0]
            stride = params["window_strides"][d]
        axes.append(Axis(float(axis.start + axis.step * offset), float(axis.step * stride)))
    return axes[0], axes[1]
