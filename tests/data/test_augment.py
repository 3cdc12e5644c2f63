"""Augmentation: warp against scipy, geometry on ramp images, hand-computed intensities, and mixing by pixel values."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage, stats

from lungjax.config import AugmentConfig, Config, InputSpec, check, overrides
from lungjax.config.presets import PRESETS, preset
from lungjax.data.augment import affine, augment, mix, warp

KEY = jax.random.key(3)
MANY = 1000
run = jax.jit(augment, static_argnames=("config", "size"))


def places(n, start=0):
    return jnp.arange(start, start + n, dtype=jnp.uint32)


def noise(*shape, dtype=np.uint8):
    return np.random.default_rng(0).integers(0, 256, shape).astype(dtype)


def many(config, image):
    """1,000 augmented copies of one float image [h, w, C], as numpy."""
    images = jnp.broadcast_to(jnp.asarray(image, jnp.float32), (MANY, *image.shape))
    return np.asarray(run(images, places(MANY), KEY, config, image.shape[:2]), np.float64)


def ramp(side=17):
    """An image whose pixel at (y, x) has the value (y, x), so that a warped copy shows where it was sampled."""
    return np.stack(np.meshgrid(np.arange(side), np.arange(side), indexing="ij"), -1).astype(np.float32)


def matrices(config, side=17):
    """Random affine maps of `config` about the center, [1000, 2, 3], with rows (y, x) and columns (y, x, shift)."""
    out, c = many(config, ramp(side)), (side - 1) // 2
    middle = out[:, c, c]
    return np.stack([out[:, c + 1, c] - middle, out[:, c, c + 1] - middle, middle - c], -1)


def assert_uniform(values, low, high):
    width = high - low
    assert values.min() >= low - 1e-3 * width and values.max() <= high + 1e-3 * width
    assert stats.kstest(values, stats.uniform(low, width).cdf).pvalue > 1e-4


def test_warp_against_scipy():
    size, rng = (17, 29), np.random.default_rng(1)
    matrix = np.concatenate([rng.normal(0, 1, (6, 2, 2)), rng.uniform(-9, 30, (6, 2, 1))], -1).astype(np.float32)
    grid = np.stack([*np.indices(size), np.ones(size)]).reshape(3, -1)
    for fill, mode in {"constant": "grid-constant", "edge": "nearest", "reflect": "reflect"}.items():
        for dtype in (np.uint8, np.float32):
            images = noise(6, 23, 31, 2, dtype=dtype)
            out = compiled_warp(images, matrix, size, fill, 40.5)
            assert out.shape == (6, *size, 2) and out.dtype == jnp.float32
            for image, m, result in zip(images, matrix, out, strict=True):
                for c in range(2):
                    expected = ndimage.map_coordinates(
                        image[..., c].astype(float), m.astype(float) @ grid, order=1, mode=mode, cval=40.5
                    )
                    np.testing.assert_allclose(result[..., c].reshape(-1), expected, atol=0.02)


def test_tiny_rotation():
    """Near integer coordinates, index and weight must refer to the same pixel."""
    images = noise(32, 64, 64, 3)
    angle = np.linspace(-1e-6, 1e-6, 32).astype(np.float32)
    out = compiled_warp(images, compiled_affine((64, 64), (64, 64), angle=angle), (64, 64), "edge", 0)
    np.testing.assert_allclose(out, images, atol=0.1)


NEUTRAL = {"flip": (False, False), "angle": 0.0, "zoom": (1.0, 1.0), "shear": (0.0, 0.0), "shift": (0.0, 0.0)}
compiled_affine = jax.jit(affine, static_argnums=(0, 1))
compiled_warp = jax.jit(warp, static_argnums=(2, 3, 4))


def map_of(size, **parameters):
    return compiled_affine(size, size, **{k: jnp.asarray([v]) for k, v in (NEUTRAL | parameters).items()})


def transform(image, fill_value=0.0, **parameters):
    image = np.asarray(image, np.float32)[None, :, :, None]
    size = image.shape[1:3]
    return np.asarray(compiled_warp(image, map_of(size, **parameters), size, "constant", fill_value))[0, :, :, 0]


def test_directions_and_centers():
    image = noise(8, 8).astype(np.float32)
    np.testing.assert_allclose(transform(image, angle=np.pi / 2), np.rot90(image), atol=1e-3)  # counter-clockwise
    np.testing.assert_array_equal(transform(image, flip=(True, False)), image[::-1])
    np.testing.assert_array_equal(transform(image, flip=(False, True)), image[:, ::-1])
    down_left = transform(image, shift=(0.25, -0.5), fill_value=7)
    np.testing.assert_array_equal(down_left[2:, :4], image[:-2, 4:])
    assert (down_left[:2] == 7).all() and (down_left[:, 4:] == 7).all()
    y, x = ramp(9)[..., 0], ramp(9)[..., 1]
    np.testing.assert_allclose(transform(y, zoom=(0.5, 1.0)), 4 + (y - 4) / 2, atol=1e-4)  # half the height is visible
    np.testing.assert_allclose(transform(x, shear=(0.0, 0.25))[:, 1:8], (x + 0.25 * (y - 4))[:, 1:8], atol=1e-4)
    small = transform(np.full((9, 9), 50), zoom=(2.0, 2.0), fill_value=1)
    assert (small[2:7, 2:7] == 50).all() and (small[0] == 1).all() and (small[:, -1] == 1).all()


def test_order_of_geometry():
    size = (16, 16)
    steps = {"flip": (False, True), "angle": 0.4, "zoom": (0.9, 1.2), "shear": (0.2, 0.0), "shift": (0.1, -0.05)}
    together = np.asarray(map_of(size, **steps))[0]
    chain = np.eye(3)
    for name, value in steps.items():  # the first step of the image is the last of a coordinate
        chain = chain @ np.vstack([np.asarray(map_of(size, **{name: value}))[0], [0, 0, 1]])
    np.testing.assert_allclose(together, chain[:2], atol=1e-4)


def test_empty_program_of_defaults():
    images = noise(3, 9, 11, 1)
    out = run(images, None, KEY, AugmentConfig(), (9, 11))
    assert out.dtype == jnp.float32
    np.testing.assert_array_equal(out, images)
    text = run.lower(images, None, KEY, AugmentConfig(), (9, 11)).compile().as_text()
    assert "gather" not in text and "while" not in text and "threefry" not in text


def test_flips():
    images = noise(64, 12, 9, 1)
    out = np.asarray(run(images, places(64), KEY, AugmentConfig(flip_horizontal=0.5, flip_vertical=0.5), (12, 9)))
    kinds = [images, images[:, :, ::-1], images[:, ::-1], images[:, ::-1, ::-1]]
    hits = np.stack([(out == kind).all((1, 2, 3)) for kind in kinds])
    assert (hits.sum(0) == 1).all() and (hits.sum(1) >= 6).all()


def test_ranges_of_geometry():
    m = matrices(AugmentConfig(rotation=0.1))
    assert_uniform(np.arctan2(m[:, 0, 1], m[:, 0, 0]) / (2 * np.pi), -0.1, 0.1)
    m = matrices(AugmentConfig(zoom=(-0.2, 0.1), shift=(0.1, 0.3)))
    assert_uniform(m[:, 0, 0], 0.8, 1.1)
    np.testing.assert_allclose(m[:, 0, 0], m[:, 1, 1], atol=1e-3)
    assert_uniform(m[:, 0, 2] / m[:, 0, 0] / 17, -0.1, 0.1)
    assert_uniform(m[:, 1, 2] / m[:, 1, 1] / 17, -0.3, 0.3)
    m = matrices(AugmentConfig(zoom=(-0.2, 0.1), zoom_apart=True))
    assert_uniform(m[:, 1, 1], 0.8, 1.1)
    assert abs(np.corrcoef(m[:, 0, 0], m[:, 1, 1])[0, 1]) < 0.15
    m = matrices(AugmentConfig(shear=0.2))
    along_y = m[:, 0, 1] != 0
    assert 0.44 < along_y.mean() < 0.56 and not (m[along_y, 1, 0] != 0).any()
    assert_uniform(m[:, 0, 1] + m[:, 1, 0], -0.2, 0.2)


def test_box_jitter():
    boxes = jnp.tile(jnp.asarray([[0.25, 0.4, 0.75, 0.6]]), (MANY, 1))
    images = jnp.broadcast_to(ramp(40), (MANY, 40, 40, 2))
    out = np.asarray(run(images, places(MANY), KEY, AugmentConfig(box_jitter=0.1), (2, 2), boxes), np.float64)
    for axis, low, high in ((0, 16, 24), (1, 10, 30)):
        first, last = out[:, 0, 0, axis], out[:, 1, 1, axis]  # centers of the two halves of the visible part
        side = 2 * (last - first)
        assert_uniform(first + 0.5 - side / 4, low - 0.1 * (high - low), low + 0.1 * (high - low))
        assert_uniform(last + 0.5 + side / 4, high - 0.1 * (high - low), high + 0.1 * (high - low))


def test_box_as_crop_and_resize():
    image = noise(60, 80)
    boxes = jnp.asarray([[10 / 80, 12 / 60, 70 / 80, 48 / 60]])
    cropped = run(image[None, :, :, None], places(1), KEY, AugmentConfig(), (36, 60), boxes)
    np.testing.assert_allclose(cropped[0, :, :, 0], image[12:48, 10:70], atol=0.05)
    enlarged = run(image[None, :, :, None], places(1), KEY, AugmentConfig(), (90, 150))
    expected = Image.fromarray(image.astype(np.float32)).resize((150, 90), Image.Resampling.BILINEAR)
    np.testing.assert_allclose(enlarged[0, :, :, 0], np.asarray(expected), atol=0.1)


def test_ranges_of_intensities():
    def level(config):
        return many(config, np.full((2, 2, 1), 100.0))[:, 0, 0, 0]

    assert_uniform(level(AugmentConfig(brightness=(0.2, 1.5))) / 100, 0.2, 1.5)
    exponent = np.log(level(AugmentConfig(gamma=(0.5, 2.0))) / 255) / np.log(100 / 255)
    assert_uniform(np.log(exponent), np.log(0.5), np.log(2.0))
    assert_uniform(level(AugmentConfig(intensity_shift=15)) - 100, -15, 15)
    assert_uniform(level(AugmentConfig(intensity_scale=0.2)) / 100, 0.8, 1.2)
    assert np.isclose((level(AugmentConfig(invert=0.3)) == 155).mean(), 0.3, atol=0.05)
    out = many(AugmentConfig(contrast=(0.5, 1.5)), np.asarray([[60.0, 100.0]])[..., None])
    np.testing.assert_allclose(out.mean((1, 2, 3)), 80, atol=1e-3)  # contrast changes about the mean
    assert_uniform((out[:, 0, 1, 0] - out[:, 0, 0, 0]) / 40, 0.5, 1.5)
    grain = many(AugmentConfig(noise=10), np.full((16, 16, 1), 128.0)) - 128
    deviation = grain.std((1, 2, 3))
    assert abs(grain.mean()) < 0.1 and 9.5 < deviation.max() < 11.5 and np.isclose(deviation.mean(), 5, atol=0.4)


def test_order_and_clip_of_intensities():
    image = np.asarray([[10.0, 200.0]], np.float32)[..., None]
    config = AugmentConfig(brightness=(1.5, 1.5), contrast=(0.5, 0.5), gamma=(2.0, 2.0), invert=1.0)
    x = image * 1.5
    x = x.mean() + 0.5 * (x - x.mean())
    x = 255 - 255 * (x / 255) ** 2
    np.testing.assert_allclose(augment(image[None], places(1), KEY, config, (1, 2))[0], x, rtol=1e-4)
    out = augment(image[None], places(1), KEY, AugmentConfig(contrast=(9.0, 9.0)), (1, 2))
    np.testing.assert_array_equal(out[0], [[[0], [255]]])


def test_coarse_dropout():
    config = AugmentConfig(dropout=(0.1, 0.3), dropout_grid=(4, 4))
    out = many(config, np.full((16, 24, 1), 90.0))[..., 0]
    cells = out.reshape(MANY, 4, 4, 4, 6).transpose(0, 1, 3, 2, 4).reshape(MANY, 16, 24)
    assert (cells == cells[:, :, :1]).all()  # each patch is either black or unchanged
    assert np.isclose((out == 0).mean(), 0.2, atol=0.015)
    black = many(replace(config, dropout=(0.5, 0.5), dropout_grid=(1, 3)), np.full((6, 6, 1), 90.0))[..., 0] == 0
    edges = (black[:, 1:] != black[:, :-1]).any(2)  # a patch may end after 2, 3 or 4 of 6 rows
    assert not edges[:, [0, 4]].any() and edges[:, [1, 2, 3]].any(0).all()


def test_exterior_exclusion():
    image = np.asarray([[0, 10, 21, 250], [0, 12, 120, 180]], np.uint8)  # 0 is black, 250 is a table
    body = np.asarray([[0, 0, 0, 0], [0, 0, 255, 255]], np.uint8)
    expected = np.asarray([[0, 14, 14, 14], [0, 14, 120, 180]])  # 14.33 is the mean of 10, 12 and 21
    arguments = (image[None, :, :, None], places(1), KEY)
    for probability, result in ((1.0, expected), (1e-9, image)):
        out = augment(*arguments, AugmentConfig(exterior=probability), (2, 4), None, body[None])
        np.testing.assert_array_equal(out[0, :, :, 0], result)
    for config, word in ((AugmentConfig(exterior=0.5), "body masks"), (AugmentConfig(box_jitter=0.1), "boxes")):
        with pytest.raises(ValueError, match=word):
            augment(*arguments, config, (2, 4))


def test_probability_per_operation():
    m = matrices(AugmentConfig(probability=0.3, zoom=(0.5, 0.5), shear=0.2))
    zoomed, sheared = m[:, 0, 0] > 1.2, np.abs(m[:, 0, 1] + m[:, 1, 0]) > 1e-3
    assert np.isclose(zoomed.mean(), 0.3, atol=0.05) and np.isclose(sheared.mean(), 0.3, atol=0.05)
    assert np.isclose((zoomed & sheared).mean(), 0.09, atol=0.04)
    out = many(AugmentConfig(probability=0.3, brightness=(0.5, 0.5), intensity_shift=9), np.full((1, 1, 1), 100.0))
    assert np.isclose((out < 70).mean(), 0.3, atol=0.05)
    assert np.isclose(np.isin(out.round(4), (50, 100)).mean(), 0.7, atol=0.05)


ALL = AugmentConfig(flip_horizontal=0.5, rotation=0.1, zoom=(-0.2, 0.2), shear=0.1, shift=(0.1, 0.1), noise=5,
                    brightness=(0.8, 1.2), dropout=(0.0, 0.1))  # fmt: skip


def test_dependence_on_key_and_place():
    images = np.tile(noise(1, 20, 20, 1), (6, 1, 1, 1))
    out = np.asarray(run(images, places(6), KEY, ALL, (20, 20)))
    np.testing.assert_allclose(run(images, places(6)[::-1], KEY, ALL, (20, 20)), out[::-1], atol=1e-3)
    assert min(np.abs(out[i] - out[j]).mean() for i in range(6) for j in range(i)) > 1
    other = run(images, places(6), jax.random.key(4), ALL, (20, 20))
    assert (np.abs(other - out).mean((1, 2, 3)) > 1).all()


def test_mixup_and_cutmix():
    n = 256
    images = jnp.asarray(np.tile([[0.0], [200.0]], (n // 2, 1)).reshape(n, 1, 1, 1)) * jnp.ones((1, 10, 14, 1))
    labels = jnp.arange(n, dtype=jnp.int32) % 7
    blend = jax.jit(mix, static_argnames="config")
    mixups = 0
    for start in range(0, 24 * n, n):  # one of the two is drawn per batch
        out, partners, share = blend(images, labels, places(n, start), KEY, AugmentConfig(mixup=1.0, cutmix=1.0))
        np.testing.assert_array_equal(partners, np.roll(labels, 1))
        own = np.abs(np.asarray(out) - np.roll(images, 1, 0)) / 200
        np.testing.assert_allclose(own.mean((1, 2, 3)), share, atol=1e-5)
        if len(np.unique(own.round(3))) > 2:
            mixups += 1
            assert stats.kstest(np.asarray(share), "uniform").pvalue > 1e-4  # beta(1, 1)
            np.testing.assert_allclose(own.min((1, 2, 3)), own.max((1, 2, 3)), atol=1e-5)
        else:
            assert 0.5 < share.mean() < 0.75
            foreign = own[..., 0] < 0.5
            np.testing.assert_array_equal(foreign.sum((1, 2)), foreign.any(2).sum(1) * foreign.any(1).sum(1))  # a box
    assert 4 <= mixups <= 20
    out, partners, share = mix(images, labels, places(n), KEY, AugmentConfig())
    assert out is images and partners is labels and (share == 1).all()


def test_presets():
    for name in PRESETS:
        config = preset(name)
        spec = InputSpec(crop="box", box_margin=0.1) if config.box_jitter else InputSpec()
        check(Config(augment=config, input=spec))
    assert preset("ictcf").rotation * 360 == pytest.approx(15) and preset("ct_cov19_lungs").zoom == (-0.1, 0.1)
    config = overrides.override(overrides.override(Config(), "augment=covidnet_ct"), "augment.rotation=0.1")
    assert config.augment == replace(PRESETS["covidnet_ct"], rotation=0.1)
    assert overrides.override(config, "augment=none").augment == AugmentConfig()
    with pytest.raises(ValueError, match="did you mean ct_cov19_lungs"):
        overrides.override(config, "augment=ct_cov19_lung")


def test_invalid_ranges():
    for field, value in (
        ("rotation", 15.0), ("zoom", (-1.0, 0.0)), ("shear", 2.0), ("shift", (0.1, 3.0)), ("flip_vertical", 1.5),
        ("probability", -0.1), ("fill_value", 256.0), ("gamma", (0.0, 1.0)), ("contrast", (1.2, 0.8)),
        ("brightness", (-1.0, 1.0)), ("dropout", (0.0, 2.0)), ("dropout_grid", (0, 3)), ("intensity_shift", -1.0),
        ("intensity_scale", 1.5), ("noise", float("nan")),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"augment.{field}="):
            check(Config(augment=AugmentConfig(**{field: value})))
