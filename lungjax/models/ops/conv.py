"""NHWC convolutions in forms that XLA compiles to fast code on each platform.

A program for a CPU gets the CPU forms, and one for an accelerator the plain operations; `tests/benchmarks/README.md`
has the measurements. The choice is made inside custom gradient rules, so `jax.grad` and `jax.vjp` work, but not
forward-mode derivatives (`jax.jvp`).
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata

Pair = tuple[int, int]
Pads = tuple[Pair, Pair]
Padding = str | int | Sequence[int | Sequence[int]]
DIMENSIONS = ("NHWC", "HWIO", "NHWC")
MAX_SLICED_TERMS = 27  # of a dense kernel (3 x 3 of RGB images); with more, XLA's own convolution is faster
MAX_BLOCK = 8  # images and rows per block of a kernel's gradient; longer sums of rows exceed the address registers

PLAIN = "plain"
# The platform whose forms are traced, None for that of this process, or PLAIN. It is part of the key of jit's caches,
# so a program traced in one form is never reused for another.
_FORMS: Any = jax.make_user_context(None)


def plain_forms() -> AbstractContextManager[None]:
    """Returns a context in which networks are traced as XLA's plain operations, for exports and fast compilation."""
    return _FORMS(PLAIN)


def jit(function: Callable[..., Any], platform: str | None = None, train: bool = True, **options: Any) -> Any:
    """Returns jax.jit(function, **options) with the forms and `compiler_options` of `platform`, by default this one."""

    @functools.wraps(getattr(function, "func", function))  # profiles show the name, which a partial lacks
    def traced(*args: Any) -> Any:
        with _FORMS(_FORMS.value or platform):
            return function(*args)

    return jax.jit(traced, compiler_options=compiler_options(platform, train), **options)


def cpu_or_default(*args: Any, cpu: Callable[..., Any], default: Callable[..., Any], **options: Any) -> Any:
    """Returns cpu(*args, **options) in a program for a CPU, else (and inside `plain_forms`) that of `default`."""
    if _FORMS.value == PLAIN:
        return default(*args, **options)  # without calls, which exporters would have to follow
    form = cpu if (_FORMS.value or jax.default_backend()) == "cpu" else default
    return _apply(*args, form=form, options=tuple(options.items()))


@partial(jax.jit, static_argnames=("form", "options"))
def _apply(*args: Any, form: Callable[..., Any], options: tuple[Any, ...]) -> Any:
    # Under jit, so that layers of equal shapes are traced and lowered once.
    return form(*args, **dict(options))


def pair(value: int | Sequence[int]) -> Pair:
    """Returns (value, value) for an int, or the two values of a sequence."""
    if isinstance(value, int):
        return value, value
    height, width = value
    return int(height), int(width)


def explicit_pads(padding: Padding, size: Pair, kernel: Pair, strides: Pair) -> Pads:
    """Returns ((top, bottom), (left, right)) of a padding of lax, or "SYMMETRIC": (kernel - 1) // 2 as in torch."""
    if not isinstance(padding, int | str):
        rows, columns = padding
    elif isinstance(padding, int):
        rows = columns = padding
    elif padding.upper() == "SYMMETRIC":
        rows, columns = ((side - 1) // 2 for side in kernel)
    elif padding.upper() in ("SAME", "VALID"):
        rows, columns = lax.padtype_to_pads(size, kernel, strides, padding.upper())
    else:
        raise ValueError(f"padding={padding!r}: expected SAME, VALID, SYMMETRIC, a number or pairs of numbers")
    return pair(rows), pair(columns)


@functools.cache
def compiler_options(platform: str | None = None, train: bool = True) -> dict[str, Any]:
    """Returns the `compiler_options` of `jax.jit` for complete steps on `platform`, by default that of this process.

    On CPUs, XLA by default offloads float32 convolutions to YNNPACK, which runs them on one core. The options restrict
    YNNPACK to reductions and, in training, to products, one by one: fused with what follows, products are slower. They
    are empty on other platforms and if jaxlib does not know them.
    """
    if (platform or jax.default_backend()) != "cpu":
        return {}
    fusions = ("INDIVIDUAL_DOT", "REDUCE") if train else ("REDUCE",)
    options = {
        "xla_cpu_experimental_ynn_fusion_type": ",".join(f"LIBRARY_FUSION_TYPE_{kind}" for kind in fusions),
        "xla_cpu_prefer_vector_width": 512,
    }
    try:
        jax.jit(lambda: jnp.zeros(()), compiler_options=options).lower().compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return options


def convolve(x: jax.Array, kernel: jax.Array, strides: Pair, pads: Pads) -> jax.Array:
    """Convolves x [B, H, W, C] with kernel [h, w, C / groups, D]; a 1x1 convolution becomes a matrix product."""
    if kernel.shape[:3] == (1, 1, x.shape[-1]) and pads == ((0, 0), (0, 0)) and _FORMS.value != PLAIN:
        return product(x[:, :: strides[0], :: strides[1]], kernel[0, 0])
    return _convolve(x, kernel, strides, pads)


def plain_conv(x: jax.Array, kernel: jax.Array, strides: Pair, pads: Pads) -> jax.Array:
    """Convolves x [B, H, W, C] with kernel [h, w, C / groups, D] by XLA's own convolution."""
    groups = x.shape[-1] // kernel.shape[2]
    return lax.conv_general_dilated(x, kernel, strides, pads, dimension_numbers=DIMENSIONS, feature_group_count=groups)


@jax.custom_vjp
def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Multiplies x [..., C] by kernel [C, D].

    The gradients are written in the order that YNNPACK computes fastest: dy times the transposed kernel, and x times
    dy. Plain autodiff contracts the second axis of the kernel and puts dy first, which takes up to twice the time.
    """
    return lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))


def _product_gradients(saved: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    cells = tuple(range(x.ndim - 1))
    return product(dy, kernel.T), lax.dot_general(x, dy, ((cells, cells), ((), ())))


product.defvjp(lambda x, kernel: (product(x, kernel), (x, kernel)), _product_gradients)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolve(x: jax.Array, kernel: jax.Array, strides: Pair, pads: Pads) -> jax.Array:
    return cpu_or_default(x, kernel, cpu=_forward, default=plain_conv, strides=strides, pads=pads)


def _gradients(strides: Pair, pads: Pads, saved: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    dx = cpu_or_default(x, kernel, dy, cpu=_dx, default=_plain_dx, strides=strides, pads=pads)
    if not _is_depthwise(x, kernel):
        return dx, _plain_dkernel(x, kernel, dy, strides, pads)
    forms = {"cpu": _depthwise_dkernel, "default": _plain_dkernel}
    return dx, cpu_or_default(x, kernel, dy, strides=strides, pads=pads, **forms)


_convolve.defvjp(lambda x, kernel, *options: (_convolve(x, kernel, *options), (x, kernel)), _gradients)


def _is_depthwise(x: jax.Array, kernel: jax.Array) -> bool:
    return kernel.shape[2] == 1 < x.shape[-1] == kernel.shape[3]


def _plain_dx(x: jax.Array, kernel: jax.Array, dy: jax.Array, strides: Pair, pads: Pads) -> jax.Array:
    return jax.vjp(lambda x: plain_conv(x, kernel, strides, pads), x)[1](dy)[0]


def _plain_dkernel(x: jax.Array, kernel: jax.Array, dy: jax.Array, strides: Pair, pads: Pads) -> jax.Array:
    return jax.vjp(lambda kernel: plain_conv(x, kernel, strides, pads), kernel)[1](dy)[0]


def to_float32(x: jax.Array) -> jax.Array:
    """Returns x in float32, or in its own dtype if that is wider."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def pad(x: jax.Array, pads: Pads | list[Pair], value: float = 0.0) -> jax.Array:
    """Pads a map, or crops it where a pad is negative."""
    rows, columns = pads
    return lax.pad(x, jnp.asarray(value, x.dtype), ((0, 0, 0), (*rows, 0), (*columns, 0), (0, 0, 0)))


def isolate_fusion(function: Callable[..., jax.Array], *args: jax.Array) -> jax.Array:
    """Returns function(*args), computed exactly once and from arguments in memory.

    XLA's CPU fusion considers a sum of slices cheap and recomputes it for each of its readers. It does not fuse across
    a call, and this call is marked so that it is not inlined; calls within the function are.
    """

    def inlined(*args: jax.Array) -> jax.Array:
        with set_xla_metadata(inlineable="true"):
            return function(*args)

    with set_xla_metadata(inlineable="false"):
        return jax.jit(inlined)(*args)


def slices(x: jax.Array, window: Pair, strides: Pair) -> list[tuple[int, int, jax.Array]]:
    """Returns (i, j, slice) of a padded map for every tap of the window, row by row."""
    (down, across), taps = strides, itertools.product(range(window[0]), range(window[1]))
    height, width = ((n - k) // s * s + 1 for n, k, s in zip(x.shape[1:3], window, strides, strict=True))
    return [(i, j, x[:, i : i + height : down, j : j + width : across]) for i, j in taps]


def _forward(x: jax.Array, kernel: jax.Array, strides: Pair, pads: Pads) -> jax.Array:
    """Sums shifted slices for depthwise and very small kernels, in float32 or wider; else `plain_conv`."""
    (kh, kw, depth, _), depthwise = kernel.shape, _is_depthwise(x, kernel)
    if not depthwise and (depth != x.shape[-1] or kh * kw * depth > MAX_SLICED_TERMS):
        return plain_conv(x, kernel, strides, pads)

    def add_up(padded: jax.Array, kernel: jax.Array) -> jax.Array:
        total: Any = 0.0
        for i, j, part in slices(padded, (kh, kw), strides):
            for c in range(depth):
                total += to_float32(part if depthwise else part[..., c : c + 1]) * to_float32(kernel[i, j, c])
        return total.astype(x.dtype)

    return isolate_fusion(add_up, pad(x, pads), kernel)


def scatter_gradient(
    arrays: list[jax.Array], shape: tuple[int, ...], window: Pair, strides: Pair, pads: Pads, term: Callable[..., Any]
) -> jax.Array:
    """Returns a map of `shape` whose cells are the sums of the terms of all windows that cover them.

    `arrays` are maps of windows [B, h, w, C]; `term(i, j, *parts)` returns the term of each window for its cell (i, j).
    There is one sum per phase of the stride, so no time is spent on the zeros of a dilated map: row s * q + a is row
    i = a + top (mod s) of the window at q + (a + top - i) / s.
    """
    counts, first, extra = [], [], []
    for size, k, s, (low, _), windows in zip(shape[1:3], window, strides, pads, arrays[0].shape[1:3], strict=True):
        counts.append(-(-size // s))
        first.append((low - k + 1) // s)  # first window that is read, for the first cell
        extra.append((-first[-1], counts[-1] + (low + s - 1) // s - windows))  # before the first and after the last

    def taps(axis: int, phase: int) -> list[Pair]:
        offsets = [(i, *divmod(phase + pads[axis][0] - i, strides[axis])) for i in range(window[axis])]
        return [(i, offset - first[axis]) for i, offset, rest in offsets if rest == 0]

    def add_up(*padded: jax.Array) -> jax.Array:
        def piece(a: int, b: int) -> jax.Array:
            total: Any = jnp.zeros((shape[0], *counts, shape[3]), to_float32(padded[0][:0]).dtype)
            for (i, top), (j, left) in itertools.product(taps(0, a), taps(1, b)):
                total += term(i, j, *(z[:, top : top + counts[0], left : left + counts[1]] for z in padded))
            return total.astype(padded[0].dtype)

        rows = [jnp.stack([piece(a, b) for b in range(strides[1])], 3) for a in range(strides[0])]
        full = jnp.stack(rows, 2).reshape(shape[0], counts[0] * strides[0], counts[1] * strides[1], shape[3])
        return full[:, : shape[1], : shape[2]]

    return isolate_fusion(add_up, *(pad(a, extra) for a in arrays))


def _depthwise_dkernel(x: jax.Array, kernel: jax.Array, dy: jax.Array, strides: Pair, pads: Pads) -> jax.Array:
    """Returns the kernel's gradient, a sum over blocks of images and rows that stay in the cache for all its cells."""
    (kh, kw, _, _), (down, across), cells = kernel.shape, strides, dy.shape[1]
    # Many rows per block, but little padding.
    rows = min(range(1, MAX_BLOCK + 1), key=lambda rows: -(-cells // rows) * rows + cells / rows)
    bands, images = -(-cells // rows), math.gcd(len(x), MAX_BLOCK)
    dy = pad(dy, ((0, bands * rows - cells), (0, 0)))
    # Cells read past the end of the padded map are multiplied by the zeros added to dy.
    reach = [(n - 1) * s + k for n, s, k in zip(dy.shape[1:3], strides, (kh, kw), strict=True)]
    x = pad(x, [(low, end - low - n) for (low, _), end, n in zip(pads, reach, x.shape[1:3], strict=True)])
    # Of the images, every n-th is in the same block, so that each block stays distributed over all devices.
    height, blocks = x.shape[1], len(x) // images * bands
    x, dy = (z.reshape(images, -1, *z.shape[2:]) for z in (x, dy))
    kernel_rows = kh if kh * kw <= 9 else 1  # per loop
    span, columns = (rows - 1) * down + kernel_rows, (dy.shape[2] - 1) * across + 1

    def add_up(part: jax.Array, dy: jax.Array) -> jax.Array:
        def tap(i: int, j: int) -> jax.Array:
            covered = part[:, i : i + (rows - 1) * down + 1 : down, j : j + columns : across]
            products = to_float32(covered) * to_float32(dy)
            return sum(products[:, row] for row in range(rows))

        return jnp.stack([tap(i, j) for i, j in itertools.product(range(kernel_rows), range(kw))])

    def sums_of(block: jax.Array) -> jax.Array:
        top = block // bands * height + block % bands * rows * down
        dy_part = lax.dynamic_slice_in_dim(dy, block * rows, rows, 1)

        def sums_from(i: Any) -> jax.Array:
            part = lax.dynamic_slice_in_dim(x, top + i, span, 1)
            return isolate_fusion(add_up, part, dy_part).sum(2).sum(1)

        return sums_from(0) if kernel_rows == kh else lax.map(sums_from, jnp.arange(kh))

    sums = lax.map(sums_of, jnp.arange(blocks)).sum(0)
    return sums.reshape(kernel.shape).astype(kernel.dtype)


def _dx(x: jax.Array, kernel: jax.Array, dy: jax.Array, strides: Pair, pads: Pads) -> jax.Array:
    """Returns the gradient of x, from sums of slices if depthwise or where the plain form would multiply many zeros."""
    if _is_depthwise(x, kernel):

        def term(i: int, j: int, part: jax.Array) -> jax.Array:
            return to_float32(part) * to_float32(kernel[i, j, 0])

        return scatter_gradient([dy], x.shape, kernel.shape[:2], strides, pads, term)
    if kernel.shape[2] != x.shape[-1] or 2 * x.shape[1] * x.shape[2] < 3 * dy.shape[1] * dy.shape[2]:
        return _plain_dx(x, kernel, dy, strides, pads)
    dtype, contract = jnp.promote_types(x.dtype, jnp.float32), (((3,), (3,)), ((), ()))
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
