"""Augments training images on the device, inside the jitted step: one warp, then intensities, then mixing of pairs.

Flip, rotation, zoom, shear, shift, box and resize are combined into one affine map from output to input pixels, and the
image is sampled once, bilinearly; a chain of layers would blur it and cut off corners repeatedly. Random numbers depend
only on the key and the position of the example, not on batch, device or host. Disabled operations add nothing to the
compiled program. `AugmentConfig` documents units and order.
"""

import math
from functools import cached_property, partial

import jax
import jax.numpy as jnp

from lungjax.config import AugmentConfig

# The uniform random numbers of an example, in order. Append only, since another order changes the results of runs.
_DRAWS = (
    "exterior", "flip_horizontal", "flip_vertical", "rotation", "zoom_height", "zoom_width", "shear", "shear_axis",
    "shift_height", "shift_width", "left", "top", "right", "bottom", "brightness", "contrast", "gamma",
    "intensity_shift", "intensity_scale", "invert", "dropout", "dropout_rows", "dropout_columns", "noise",
    "if_rotation", "if_zoom", "if_shear", "if_shift", "if_box_jitter", "if_brightness", "if_contrast", "if_gamma",
    "if_intensity", "if_dropout", "if_noise",
)  # fmt: skip
_CELLS, _NOISE, _MIX = 1, 2, 3  # further random streams of an example
_OFF = (1.0, 1.0)

_matmul = partial(jnp.matmul, precision="highest")  # bfloat16 coordinates would be off by pixels


class _Draws:
    """The random numbers of a batch by name, computed on first use."""

    def __init__(self, places: jax.Array | None, key: jax.Array, probability: float) -> None:
        self.places, self.key, self.probability = places, key, probability

    @cached_property
    def keys(self) -> jax.Array:
        return jax.vmap(jax.random.fold_in, (None, 0))(self.key, self.places)

    @cached_property
    def numbers(self) -> jax.Array:
        return jax.vmap(lambda k: jax.random.uniform(k, (len(_DRAWS),)))(self.keys)

    def uniform(self, name: str, low: float, high: float) -> jax.Array:
        return low + (high - low) * self.numbers[:, _DRAWS.index(name)]

    def chance(self, name: str, probability: float) -> jax.Array:
        return self.numbers[:, _DRAWS.index(name)] < probability

    def maybe(self, name: str, value: jax.Array, neutral: float) -> jax.Array:
        """Returns `value`, or `neutral` for examples that skip the operation."""
        if self.probability >= 1:
            return value
        skip = ~self.chance(f"if_{name}", self.probability)
        return jnp.where(skip.reshape(-1, *[1] * (value.ndim - 1)), neutral, value)

    def stream(self, number: int) -> jax.Array:
        return jax.vmap(jax.random.fold_in, (0, None))(self.keys, number)


def augment(
    images: jax.Array,
    places: jax.Array | None,
    key: jax.Array,
    config: AugmentConfig,
    size: tuple[int, int],
    boxes: jax.Array | None = None,
    body: jax.Array | None = None,
) -> jax.Array:
    """Returns augmented copies of the images, float32 [B, H, W, C] in 0..255, where H, W is `size`.

    `images` are uint8 or float32 [B, h, w, C] in 0..255, about as large as the result, since resizing has no
    antialiasing. `places`, uint32 [B], are the positions of the examples in the run, or None if nothing is random;
    `key` is the random key of the run. `boxes`, float32 [B, 4], are the visible parts as fractions of the image (xmin,
    ymin, xmax, ymax), or None for all of it; `body`, uint8 [B, h, w], is above zero inside the body.

    Raises ValueError if `config` requires boxes or body masks that are None.
    """
    if config.exterior and body is None:
        raise ValueError(f"augment.exterior={config.exterior}: the images have no body masks; set it to 0")
    if config.box_jitter and boxes is None:
        raise ValueError(f"augment.box_jitter={config.box_jitter}: the images have no boxes; use input.crop=box")
    draws = _Draws(places, key, config.probability)
    if config.exterior:
        excluded = draws.chance("exterior", config.exterior)[:, None, None, None]
        images = jnp.where(excluded, _exclude_exterior(images, body), images)
    moves = config.rotation or config.shear or any(config.zoom) or any(config.shift)
    flips = config.flip_horizontal or config.flip_vertical
    if moves or flips or boxes is not None or tuple(size) != images.shape[1:3]:
        matrix = _draw_affine(draws, config, images.shape[1:3], size, boxes)
        matrix = jnp.broadcast_to(matrix, (images.shape[0], 2, 3))
        # With flips and resizing only, samples leave the image by at most half a pixel.
        images = warp(images, matrix, size, config.fill if moves else "edge", config.fill_value)
    return _intensities(images.astype(jnp.float32), draws, config)


def _exclude_exterior(images: jax.Array, body: jax.Array | None) -> jax.Array:
    """Sets lit pixels outside the body to the mean of the dark ones, as COVIDNet-CT (there below Otsu's threshold)."""
    assert body is not None
    x = images.astype(jnp.float32)

    def mean(mask: jax.Array) -> jax.Array:
        count = jnp.maximum(mask.sum((1, 2), keepdims=True), 1)
        return jnp.where(mask, x, 0).sum((1, 2), keepdims=True) / count

    lit = x > 0
    outside = lit & (body == 0)[..., None]
    dark = outside & (x <= mean(lit))
    return jnp.where(outside, jnp.floor(mean(dark)), x).astype(images.dtype)  # an integer, so that uint8 stays uint8


def _draw_affine(
    draws: _Draws, config: AugmentConfig, inside: tuple[int, int], size: tuple[int, int], boxes: jax.Array | None
) -> jax.Array:
    """Returns the matrix of `affine` for parameters drawn from the ranges in `config`."""

    def symmetric(**limits: float) -> jax.Array:
        return jnp.stack([draws.uniform(name, -limit, limit) for name, limit in limits.items()], -1)

    flip = angle = zoom = shear = shift = None
    if config.flip_vertical or config.flip_horizontal:
        vertical = draws.chance("flip_vertical", config.flip_vertical)
        flip = jnp.stack([vertical, draws.chance("flip_horizontal", config.flip_horizontal)], -1)
    if config.rotation:
        turns = draws.uniform("rotation", -config.rotation, config.rotation)
        angle = draws.maybe("rotation", turns, 0.0) * (2 * math.pi)
    if any(config.zoom):
        height = draws.uniform("zoom_height", *config.zoom)
        width = draws.uniform("zoom_width", *config.zoom) if config.zoom_apart else height
        zoom = 1 + draws.maybe("zoom", jnp.stack([height, width], -1), 0.0)
    if config.shear:
        tangent = draws.maybe("shear", draws.uniform("shear", -config.shear, config.shear), 0.0)
        along_y = draws.chance("shear_axis", 0.5)
        shear = jnp.stack([jnp.where(along_y, tangent, 0), jnp.where(along_y, 0, tangent)], -1)
    if any(config.shift):
        shifts = symmetric(shift_height=config.shift[0], shift_width=config.shift[1])
        shift = draws.maybe("shift", shifts, 0.0)
    if boxes is not None and config.box_jitter:
        jitter = symmetric(**dict.fromkeys(("left", "top", "right", "bottom"), config.box_jitter))
        sides = boxes[:, 2:] - boxes[:, :2]
        moves = draws.maybe("box_jitter", jitter, 0.0) * jnp.concatenate([sides, sides], -1)
        boxes = jnp.clip(boxes + moves, 0, 1)
    return affine(inside, size, flip=flip, angle=angle, zoom=zoom, shear=shear, shift=shift, boxes=boxes)


def affine(
    inside: tuple[int, int],
    size: tuple[int, int],
    *,
    flip: jax.Array | None = None,
    angle: jax.Array | None = None,
    zoom: jax.Array | None = None,
    shear: jax.Array | None = None,
    shift: jax.Array | None = None,
    boxes: jax.Array | None = None,
) -> jax.Array:
    """Returns matrices, float32 [B, 2, 3], that map (y, x, 1) in the result to (y, x) in the image, in pixel centers.

    The map equals a chain of Keras layers in the order of the arguments, after a crop to the box and a resize from
    height and width `inside` to `size`. `flip`, bool [B, 2], is vertical and horizontal; `angle` [B] is in radians
    counterclockwise; `zoom` [B, 2] is the visible fraction of height and width; `shear` [B, 2] has tangents along y and
    x; `shift` [B, 2] has fractions down and right. `boxes` [B, 4] are xmin, ymin, xmax, ymax as fractions of the image.
    """
    linear = jnp.eye(2)[None]
    if flip is not None:
        linear = jnp.where(flip, -1.0, 1.0)[:, :, None] * linear
    if angle is not None:
        linear = _matmul(linear, _two_by_two(jnp.cos(angle), jnp.sin(angle), -jnp.sin(angle), jnp.cos(angle)))
    if zoom is not None:
        linear = linear * zoom[:, None, :]
    if shear is not None:
        one = jnp.ones_like(shear[:, 0])
        linear = _matmul(linear, _two_by_two(one, shear[:, 0], shear[:, 1], one))
    target, source = jnp.asarray(size, jnp.float32), jnp.asarray(inside, jnp.float32)
    middle = (target - 1) / 2
    corner, side = (jnp.zeros((1, 2)), source[None])
    if boxes is not None:
        corner, side = boxes[:, 1::-1] * source, (boxes[:, :1:-1] - boxes[:, 1::-1]) * source
    scale = side / target
    linear = scale[:, :, None] * linear
    center = middle[None] if shift is None else middle + shift * target
    offset = corner - 0.5 + scale * (middle + 0.5) - _matmul(linear, center[:, :, None])[:, :, 0]
    rows = max(linear.shape[0], offset.shape[0])
    parts = [jnp.broadcast_to(part, (rows, *part.shape[1:])) for part in (linear, offset[:, :, None])]
    return jnp.concatenate(parts, -1)


def _two_by_two(a: jax.Array, b: jax.Array, c: jax.Array, d: jax.Array) -> jax.Array:
    return jnp.stack([jnp.stack([a, b], -1), jnp.stack([c, d], -1)], -2)


def warp(images: jax.Array, matrix: jax.Array, size: tuple[int, int], fill: str, fill_value: float) -> jax.Array:
    """Samples images [B, h, w, C] bilinearly at the positions of `matrix` (see `affine`); returns float32 [B, H, W, C].

    `fill` is "constant" (`fill_value`), "edge" or "reflect", which scipy calls grid-constant, nearest and reflect.
    Samples must be within eight times the longer side of the image.
    """
    h, w = images.shape[1:3]
    if fill == "constant" and fill_value != int(fill_value):
        images = images.astype(jnp.float32)
    # The image is padded by one pixel, so that no corner of a sample needs a bounds check.
    value = int(fill_value) if images.dtype == jnp.uint8 else fill_value
    options = {"constant_values": value} if fill == "constant" else {"mode": "edge"}
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), **options)
    pixels = padded.reshape(images.shape[0], -1, images.shape[3])
    # Coordinates are integers in units of 2 ** -bits pixels. With floats, the compiler could round the pixel index and
    # the weight differently, which at a pixel border gives the full weight to the wrong pixel.
    bits = 28 - max(h, w).bit_length()
    steps = jnp.round(matrix * 2.0**bits).astype(jnp.int32)[:, :, :, None, None]
    ys, xs = jnp.arange(size[0], dtype=jnp.int32)[:, None], jnp.arange(size[1], dtype=jnp.int32)

    def coordinate(row: int, length: int) -> tuple[jax.Array, jax.Array]:
        at = steps[:, row, 0] * ys + steps[:, row, 1] * xs + steps[:, row, 2]
        if fill == "reflect":
            half, period = 1 << (bits - 1), 2 * length << bits
            at = (at + half) % period
            at = jnp.minimum(at, period - at) - half
        at = jnp.clip(at, -(1 << bits), length << bits)
        first = jnp.minimum(at >> bits, length - 1)
        return first, ((at - (first << bits)).astype(jnp.float32) * 2.0**-bits)[..., None]

    (y, down), (x, right) = coordinate(0, h), coordinate(1, w)
    place = (y + 1) * (w + 2) + (x + 1)

    def read(offset: int) -> jax.Array:
        values = jax.vmap(lambda image, at: image.at[at].get(mode="promise_in_bounds"))(pixels, place + offset)
        return values.astype(jnp.float32)

    upper = read(0) + right * (read(1) - read(0))
    lower = read(w + 2) + right * (read(w + 3) - read(w + 2))
    return upper + down * (lower - upper)


def _intensities(x: jax.Array, draws: _Draws, config: AugmentConfig) -> jax.Array:
    """Applies the operations on gray levels to float32 [B, H, W, C] in 0..255."""

    def drawn(name: str, low: float, high: float, neutral: float, gate: str = "") -> jax.Array:
        return draws.maybe(gate or name, draws.uniform(name, low, high), neutral)[:, None, None, None]

    before = x
    if config.brightness != _OFF:
        x = x * drawn("brightness", *config.brightness, 1.0)
    if config.contrast != _OFF:
        mean = x.mean((1, 2), keepdims=True)  # per channel, as in Keras
        x = mean + drawn("contrast", *config.contrast, 1.0) * (x - mean)
    if config.gamma != _OFF:
        exponent = jnp.exp(drawn("gamma", math.log(config.gamma[0]), math.log(config.gamma[1]), 0.0))
        x = 255 * (jnp.clip(x, 0, 255) / 255) ** exponent
    if config.intensity_shift:
        x = x + drawn("intensity_shift", -config.intensity_shift, config.intensity_shift, 0.0, "intensity")
    if config.intensity_scale:
        x = x * (1 + drawn("intensity_scale", -config.intensity_scale, config.intensity_scale, 0.0, "intensity"))
    if config.invert:
        x = jnp.where(draws.chance("invert", config.invert)[:, None, None, None], 255 - x, x)
    if any(config.dropout):
        x = jnp.where(_dropout_mask(draws, config, x.shape[1], x.shape[2])[..., None], 0, x)
    if config.noise:
        noise = jax.vmap(lambda k: jax.random.normal(k, x.shape[1:]))(draws.stream(_NOISE))
        x = x + drawn("noise", 0.0, config.noise, 0.0) * noise
    return x if x is before else jnp.clip(x, 0, 255)


def _dropout_mask(draws: _Draws, config: AugmentConfig, height: int, width: int) -> jax.Array:
    """Returns bool [B, height, width], True in dropped patches (CoarseDropout of imgaug)."""
    fewest, most = config.dropout_grid
    share = draws.maybe("dropout", draws.uniform("dropout", *config.dropout), 0.0)
    cells = jax.vmap(lambda k: jax.random.uniform(k, (most, most)))(draws.stream(_CELLS)) < share[:, None, None]

    def cell_of(name: str, length: int) -> jax.Array:
        count = jnp.minimum(jnp.floor(draws.uniform(name, fewest, most + 1)).astype(jnp.int32), most)
        return jnp.arange(length) * count[:, None] // length

    rows, columns = cell_of("dropout_rows", height), cell_of("dropout_columns", width)
    return jax.vmap(lambda cell, row, column: cell[row[:, None], column])(cells, rows, columns)


def mix(
    images: jax.Array, labels: jax.Array, places: jax.Array, key: jax.Array, config: AugmentConfig
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Mixes each image with the previous one in the batch by mixup (arXiv:1710.09412) or cutmix (arXiv:1905.04899).

    Takes float32 images [B, H, W, C], int32 labels [B] or [B, C], and uint32 places [B]. Returns the images, the labels
    of their partners, and float32 share [B], for loss = share * loss(labels) + (1 - share) * loss(partner labels). If
    both methods are enabled, one of them is drawn for the batch.
    """
    if not (config.mixup or config.cutmix):
        return images, labels, jnp.ones(len(labels), jnp.float32)
    height, width = images.shape[1:3]
    keys = jax.vmap(lambda place: jax.random.fold_in(jax.random.fold_in(key, place), _MIX))(places)
    both = bool(config.mixup and config.cutmix)
    use_cutmix = jax.random.bernoulli(jax.random.fold_in(keys[0], 1)) if both else jnp.asarray(not config.mixup)
    alpha = jnp.where(use_cutmix, config.cutmix, config.mixup)
    share = jax.vmap(lambda k: jax.random.beta(k, alpha, alpha))(keys)
    own = share[:, None, None]
    if config.cutmix:
        middle = jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, 2), (2,)))(keys)
        side = jnp.sqrt(1 - share)

        def span(axis: int, length: int) -> jax.Array:
            """Returns bool [B, length], True inside the rectangle, which is clipped to the image."""
            center, half = middle[:, axis] * length, side * length / 2
            low, high = jnp.round(center - half)[:, None], jnp.round(center + half)[:, None]
            return (jnp.arange(length) >= low) & (jnp.arange(length) < high)

        rows, columns = span(0, height), span(1, width)
        share = jnp.where(use_cutmix, 1 - rows.mean(1) * columns.mean(1), share)
        own = jnp.where(use_cutmix, 1 - (rows[:, :, None] & columns[:, None, :]), own)
    partners = jnp.roll(images, 1, axis=0)  # sends one image to the next device; a shuffle would send all
    mixed = partners + own[..., None] * (images - partners)
    return mixed, jnp.roll(labels, 1, axis=0), share
