"""Convolutions, NHWC by HWIO, in forms that XLA compiles well where they run.

The forms for the CPU are chosen when the function is lowered, so the same traced model runs the plain
operation on an accelerator. `tests/benchmarks/README.md` has the measurements behind each choice. The choice
sits inside gradient rules of our own (nothing is differentiated through it), so forward-mode derivatives
(`jax.jvp`) of these functions are not defined; `jax.grad` and `jax.vjp` are.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Pair = tuple[int, int]
Pads = tuple[Pair, Pair]
Padding = str | int | Sequence[int | Sequence[int]]
DIMENSIONS = ("NHWC", "HWIO", "NHWC")
FEW_CHANNELS = 3  # up to so many (an image's), a forward convolution is a sum of scaled slices
FUSED_TERMS = 27  # more terms than these in one loop spill the registers
SLICED_TERMS = 49  # and with more than these the compiler's own convolution is faster
SUMMED_CELLS = 8, 4  # rows and columns of cells that one element of the kernel's gradient adds up


# A value that jit's caches know of, so that a program traced in one form is never taken for the other.
_PLAIN: Any = jax.make_user_context(False)


def plain_forms() -> AbstractContextManager[None]:
    """Returns a context in which networks are traced with the compiler's plain operations, as exports want them.

    No form for a single platform is then in the program, and 1x1 convolutions are convolutions.
    """
    return _PLAIN(True)


def cpu_or_default(*args: Any, cpu: Callable[..., Any], default: Callable[..., Any]) -> Any:
    """Returns cpu(*args) where the program is lowered for a CPU and default(*args) elsewhere or in `plain_forms`."""
    return default(*args) if _PLAIN.value else lax.platform_dependent(*args, cpu=cpu, default=default)


def pair(value: int | Sequence[int]) -> Pair:
    """Returns (value, value) for a number, and a pair as it is."""
    if isinstance(value, int):
        return value, value
    height, width = value
    return int(height), int(width)


def explicit_pads(padding: Padding, size: Pair, kernel: Pair, strides: Pair) -> Pads:
    """Returns ((top, bottom), (left, right)) for "SAME", "VALID", a number or pairs, as lax would pad.

    "SYMMETRIC" is torch's (kernel - 1) // 2 on every side, which differs from SAME on even maps at stride 2.

    Raises ValueError for any other word.
    """
    if isinstance(padding, int):
        return (padding, padding), (padding, padding)
    if not isinstance(padding, str):
        rows, columns = padding
        return pair(rows), pair(columns)
    if padding.upper() == "SYMMETRIC":
        rows, columns = ((side - 1) // 2 for side in kernel)
        return pair(rows), pair(columns)
    if padding.upper() not in ("SAME", "VALID"):
        raise ValueError(f"padding={padding!r}: allowed are SAME, VALID, SYMMETRIC, a number or pairs of numbers")
    rows, columns = lax.padtype_to_pads(size, kernel, strides, padding.upper())
    return pair(rows), pair(columns)


@functools.cache
def compiler_options(platform: str | None = None, train: bool = True) -> dict[str, Any]:
    """Returns the options to give `jax.jit` where whole steps are compiled; empty but on the CPU.

    `platform` is the one compiled for; None is this process's. `train` is False for prediction alone.

    Without them XLA hands float32 convolutions to YNNPACK, which runs them on one core, and those without
    padding several times slower still; XLA's older convolution takes all cores. The options name what YNNPACK
    keeps: in training products and reductions; in prediction reductions alone, since with a product it takes in the
    bias, the gate and the next product, and is slower at that than one loop and one product each. A jaxlib that
    doesn't know them is left alone.
    """
    if (platform or jax.default_backend()) != "cpu":
        return {}
    kept = ("DOT", "REDUCE") if train else ("REDUCE",)
    options = {
        "xla_cpu_experimental_ynn_fusion_type": ",".join(f"LIBRARY_FUSION_TYPE_{kind}" for kind in kept),
        "xla_cpu_prefer_vector_width": 512,
    }
    try:
        jax.jit(lambda: jnp.zeros(()), compiler_options=options).lower().compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return options


def plain_conv(x: jax.Array, kernel: jax.Array, strides: Pair, pads: Pads, groups: int = 1) -> jax.Array:
    """Convolves x [B, H, W, C] with kernel [h, w, C / groups, D] by the compiler's own convolution."""
    return lax.conv_general_dilated(x, kernel, strides, pads, dimension_numbers=DIMENSIONS, feature_group_count=groups)


def plain_depthwise(x: jax.Array, kernel: jax.Array, strides: Pair, pads: Pads) -> jax.Array:
    """Convolves each channel of x [B, H, W, C] with its own kernel [h, w, 1, C] by the compiler's own."""
    return plain_conv(x, kernel, strides, pads, x.shape[-1])


def pointwise_conv(x: jax.Array, kernel: jax.Array, strides: Pair = (1, 1)) -> jax.Array:
    """Convolves x [B, H, W, C] with kernel [1, 1, C, D] as one matrix product."""
    if _PLAIN.value:
        return plain_conv(x, kernel, strides, ((0, 0), (0, 0)))
    return product(x[:, :: strides[0], :: strides[1]], kernel[0, 0])


@jax.custom_vjp
def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Multiplies x [..., C] with kernel [C, D].

    XLA copies the first factor of the kernel's gradient to another layout, so the narrower map comes first there;
    autodiff has x second always.
    """
    return lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))


def _product_save(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, Any]:
    return product(x, kernel), (x, kernel)


def _product_gradients(saved: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    dx = lax.dot_general(dy, kernel, (((dy.ndim - 1,), (1,)), ((), ())))
    cells = tuple(range(x.ndim - 1))
    if x.shape[-1] <= dy.shape[-1]:
        return dx, lax.dot_general(x, dy, ((cells, cells), ((), ())))
    return dx, lax.dot_general(dy, x, ((cells, cells), ((), ()))).T


product.defvjp(_product_save, _product_gradients)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def depthwise_conv(x: jax.Array, kernel: jax.Array, strides: Pair, pads: Pads) -> jax.Array:
    """Convolves each channel of x [B, H, W, C] with its own kernel [h, w, 1, C].

    On the CPU all three pieces are sums of shifted slices, accumulated in float32 at least.
    """
    return _choose(_depthwise_forward, plain_depthwise, strides, pads)(x, kernel)


def _depthwise_gradients(strides: Pair, pads: Pads, saved: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    plain_dx, plain_dkernel = _plain_gradients(plain_depthwise)
    dx = _choose(_depthwise_dx, plain_dx, strides, pads)(*saved, dy)
    return dx, _choose(_depthwise_dkernel, plain_dkernel, strides, pads)(*saved, dy)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def dense_conv(x: jax.Array, kernel: jax.Array, strides: Pair, pads: Pads) -> jax.Array:
    """Convolves x [B, H, W, C] with kernel [h, w, C, D].

    On the CPU an image of few channels is convolved as scaled slices; the gradient to the input is a product
    and a sum of slices where the plain one would mostly multiply zeros (strides, kernels as big as the map).
    """
    return _choose(_dense_forward, plain_conv, strides, pads)(x, kernel)


def _dense_gradients(strides: Pair, pads: Pads, saved: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    plain_dx, plain_dkernel = _plain_gradients(plain_conv)
    dx = _choose(_dense_dx, plain_dx, strides, pads)(*saved, dy)
    return dx, plain_dkernel(*saved, dy, strides, pads)


def _save(x: jax.Array, kernel: jax.Array, strides: Pair, pads: Pads, of: Callable) -> tuple[jax.Array, Any]:
    return of(x, kernel, strides, pads), (x, kernel)


depthwise_conv.defvjp(partial(_save, of=depthwise_conv), _depthwise_gradients)
dense_conv.defvjp(partial(_save, of=dense_conv), _dense_gradients)


def _choose(cpu: Callable, plain: Callable, strides: Pair, pads: Pads) -> Callable[..., jax.Array]:
    forms = {"cpu": partial(cpu, strides=strides, pads=pads)}
    return partial(cpu_or_default, default=partial(plain, strides=strides, pads=pads), **forms)


def _plain_gradients(plain: Callable) -> tuple[Callable, Callable]:
    def dx(x: jax.Array, kernel: jax.Array, dy: jax.Array, strides: Pair, pads: Pads) -> jax.Array:
        return jax.vjp(lambda x: plain(x, kernel, strides, pads), x)[1](dy)[0]

    def dkernel(x: jax.Array, kernel: jax.Array, dy: jax.Array, strides: Pair, pads: Pads) -> jax.Array:
        return jax.vjp(lambda kernel: plain(x, kernel, strides, pads), kernel)[1](dy)[0]

    return dx, dkernel


def to_float32(x: jax.Array) -> jax.Array:
    """Returns x as float32, or as what it is where that has more digits."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def pad(x: jax.Array, pads: Pads | list[Pair], value: float = 0.0) -> jax.Array:
    """Pads the map, or crops it where a number is negative."""
    rows, columns = pads
    return lax.pad(x, jnp.asarray(value, x.dtype), ((0, 0, 0), (*rows, 0), (*columns, 0), (0, 0, 0)))


def isolate_fusion(function: Callable[..., jax.Array], *args: jax.Array) -> jax.Array:
    """Returns function(*args), computed once and from arguments in memory.

    XLA's CPU fusion takes a sum of slices for cheap and recomputes it in everything that reads it (batch norm
    and activation, forward and backward). It fuses neither into nor out of a conditional, so here is one,
    always taken; the barrier hides that from the compiler.
    """
    result = jax.eval_shape(function, *args)
    taken = lax.optimization_barrier(jnp.array(True))
    like_first = (args[0].shape, args[0].dtype) == (result.shape, result.dtype)

    def other(*args: jax.Array) -> jax.Array:  # what there is already needs no code of its own
        return args[0] if like_first else jnp.zeros(result.shape, result.dtype)

    return lax.cond(taken, function, other, *args)


def slices(x: jax.Array, window: Pair, strides: Pair) -> list[tuple[int, int, jax.Array]]:
    """Returns (i, j, slice) of a padded map for every tap of the window, in rows, then columns."""
    (down, across), taps = strides, itertools.product(range(window[0]), range(window[1]))
    height, width = ((n - k) // s * s + 1 for n, k, s in zip(x.shape[1:3], window, strides, strict=True))
    return [(i, j, x[:, i : i + height : down, j : j + width : across]) for i, j in taps]


def _depthwise_forward(x: jax.Array, kernel: jax.Array, strides: Pair, pads: Pads) -> jax.Array:
    def add_up(padded: jax.Array, kernel: jax.Array) -> jax.Array:
        total: Any = 0.0
        for i, j, part in slices(padded, kernel.shape[:2], strides):
            total += to_float32(part) * to_float32(kernel[i, j, 0])
        return total.astype(x.dtype)

    return isolate_fusion(add_up, pad(x, pads), kernel)


def _dense_forward(x: jax.Array, kernel: jax.Array, strides: Pair, pads: Pads) -> jax.Array:
    kh, kw, depth, _ = kernel.shape
    if depth > FEW_CHANNELS or kh * kw * depth > SLICED_TERMS:
        return plain_conv(x, kernel, strides, pads)

    def add_up(padded: jax.Array, kernel: jax.Array) -> jax.Array:
        total: Any = 0.0
        for i, j, part in slices(padded, (kh, kw), strides):
            if j == 0 and i > 0 and kh * kw * depth > FUSED_TERMS:
                total = lax.optimization_barrier(total)  # one loop for each row of the kernel
            for c in range(depth):
                total += to_float32(part[..., c : c + 1]) * to_float32(kernel[i, j, c])
        return total.astype(x.dtype)

    return isolate_fusion(add_up, pad(x, pads), kernel)


def scatter_gradient(
    arrays: list[jax.Array],
    shape: tuple[int, ...],
    window: Pair,
    strides: Pair,
    pads: Pads,
    term: Callable[..., jax.Array],
) -> jax.Array:
    """Adds up for every cell of a map of `shape` the terms of the windows that cover it.

    `arrays` are maps of windows [B, h, w, C]; `term(i, j, *parts)` is what windows give to their cell (i, j).
    One sum for each phase of the stride: row s * q + a lies in row i = a + top (mod s) of the window at
    q + (a + top - i) / s, so that no time goes into the zeros of a dilated map.
    """
    counts, first, spare = [], [], []
    for size, k, s, (low, _), windows in zip(shape[1:3], window, strides, pads, arrays[0].shape[1:3], strict=True):
        counts.append(-(-size // s))
        first.append((low - k + 1) // s)  # the windows read run from here, for the first cell,
        spare.append((-first[-1], counts[-1] + (low + s - 1) // s - windows))  # to so many past the last one

    def taps(axis: int, phase: int) -> list[Pair]:
        whole = [(i, *divmod(phase + pads[axis][0] - i, strides[axis])) for i in range(window[axis])]
        return [(i, offset - first[axis]) for i, offset, rest in whole if rest == 0]

    def add_up(*padded: jax.Array) -> jax.Array:
        def piece(a: int, b: int) -> jax.Array:
            total: Any = jnp.zeros((shape[0], *counts, shape[3]), to_float32(padded[0][:0]).dtype)
            for (i, top), (j, left) in itertools.product(taps(0, a), taps(1, b)):
                total += term(i, j, *(z[:, top : top + counts[0], left : left + counts[1]] for z in padded))
            return total.astype(padded[0].dtype)

        rows = [jnp.stack([piece(a, b) for b in range(strides[1])], 3) for a in range(strides[0])]
        full = jnp.stack(rows, 2).reshape(shape[0], counts[0] * strides[0], counts[1] * strides[1], shape[3])
        return full[:, : shape[1], : shape[2]]

    return isolate_fusion(add_up, *(pad(a, spare) for a in arrays))


def _depthwise_dx(x: jax.Array, kernel: jax.Array, dy: jax.Array, strides: Pair, pads: Pads) -> jax.Array:
    def term(i: int, j: int, part: jax.Array) -> jax.Array:
        return to_float32(part) * to_float32(kernel[i, j, 0])

    return scatter_gradient([dy], x.shape, kernel.shape[:2], strides, pads, term)


def _depthwise_dkernel(x: jax.Array, kernel: jax.Array, dy: jax.Array, strides: Pair, pads: Pads) -> jax.Array:
    """A loop over the map for all taps of a 3x3 kernel, or of one row of a bigger one (those compile too long).

    An element of the loop's result adds up a handful of cells; with one product for each, memory would be the limit.
    """
    kh, kw, _, _ = kernel.shape
    rows, columns = (_parts(n, most) for n, most in zip(dy.shape[1:3], SUMMED_CELLS, strict=True))
    dy = pad(dy, [(0, -n % parts) for n, parts in zip(dy.shape[1:3], (rows, columns), strict=True)])
    height, width = dy.shape[1:3]
    block = width // columns
    (down, across), span = strides, (height - 1) * strides[0] + 1
    # What is read past the padded map's end meets the zeros added to dy.
    reach = [(n - 1) * s + k for n, s, k in zip((height, width), strides, (kh, kw), strict=True)]
    padded = pad(x, [(low, most - low - n) for (low, _), most, n in zip(pads, reach, x.shape[1:3], strict=True)])
    together = kh if kh * kw <= 9 else 1

    def add_up(part: jax.Array, dy: jax.Array) -> jax.Array:
        def tap(i: int, j: int) -> jax.Array:
            total: Any = 0.0
            for row, column in itertools.product(range(rows), range(0, width, block)):
                left = j + column * across
                x = part[:, i + row * down : i + span : rows * down, left : left + (block - 1) * across + 1 : across]
                total += to_float32(x) * to_float32(dy[:, row::rows, column : column + block])
            return total

        return jnp.stack([tap(i, j) for i, j in itertools.product(range(together), range(kw))])

    def kernel_rows(i: jax.Array) -> jax.Array:
        part = lax.dynamic_slice_in_dim(padded, i, span + together - 1, 1)
        return isolate_fusion(add_up, part, dy).sum((2, 3)).sum(1)

    sums = kernel_rows(jnp.array(0)) if together == kh else lax.map(kernel_rows, jnp.arange(kh))
    return sums.reshape(kernel.shape).astype(kernel.dtype)


def _parts(cells: int, most: int) -> int:
    """Returns into how many parts to cut an axis: many, and with few cells to fill up the last one."""
    return min(range(1, most + 1), key=lambda parts: -(-cells // parts) * parts + cells / parts)


def _dense_dx(x: jax.Array, kernel: jax.Array, dy: jax.Array, strides: Pair, pads: Pads) -> jax.Array:
    if x.shape[1] * x.shape[2] < 2 * dy.shape[1] * dy.shape[2]:
        return _plain_gradients(plain_conv)[0](x, kernel, dy, strides, pads)
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    contract = (((3,), (3,)), ((), ()))
    product = lax.dot_general(dy, kernel, contract, preferred_element_type=dtype)  # [B, h, w, kh, kw, C]

    def add_up(product: jax.Array) -> jax.Array:
        total: Any = 0.0
        for i, j in itertools.product(range(kernel.shape[0]), range(kernel.shape[1])):
            config = [(0, 0, 0)] * 4
            for axis, tap in ((1, i), (2, j)):
                low, step = tap - pads[axis - 1][0], strides[axis - 1]
                config[axis] = (low, x.shape[axis] - 1 - low - (dy.shape[axis] - 1) * step, step - 1)
            total += lax.pad(product[:, :, :, i, j], jnp.zeros((), dtype), config)
        return total.astype(x.dtype)

    return isolate_fusion(add_up, product)
