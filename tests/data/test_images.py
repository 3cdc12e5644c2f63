"""Decoding and resizing compared with known pixels, scipy's sampling and jax.image.resize."""

import io
import os
import struct
import zlib

import jax
import numpy as np
import pytest
from folders import encoded
from PIL import EpsImagePlugin, Image, ImageOps
from scipy import ndimage

import lungjax
from lungjax.config import InputSpec
from lungjax.data.imaging import images

GRAY = np.random.default_rng(0).integers(0, 256, (37, 53), dtype=np.uint8)
COLOR = np.random.default_rng(1).integers(0, 256, (20, 30, 3), dtype=np.uint8)
DEEP = np.random.default_rng(2).integers(0, 65536, (9, 7), dtype=np.uint16)
FULL = np.array([0, 0, 53, 37], np.float32)


def test_png_round_trip():
    for image in (GRAY, COLOR, DEEP, GRAY[:1, :1], np.zeros((40, 300), np.uint8)):
        data = images.encode(image)
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), image)
        array, form = images.read(data)
        np.testing.assert_array_equal(array, image)
        assert array.dtype == image.dtype and form == "PNG"


def test_damaged_files():
    data = images.encode(GRAY[:9, :11])
    damaged = [data[:i] + bytes([data[i] ^ 85]) + data[i + 1 :] for i in range(len(data))]
    damaged += [data[:length] for length in range(len(data))]
    for i, changed in enumerate(damaged):
        try:
            array, _ = images.read(changed)
        except ValueError:
            continue
        np.testing.assert_array_equal(array, GRAY[:9, :11], err_msg=str(i))
    big = np.random.default_rng(3).integers(0, 256, (64, 64), dtype=np.uint8)
    for form in ("PNG", "JPEG", "TIFF", "BMP"):
        data = encoded(big, form)
        for part in (0.5, 0.9):
            with pytest.raises(ValueError, match="damaged"):
                images.read(data[: int(part * len(data))])


def test_longest_side():
    assert images.read(encoded(Image.new("L", (30_000, 20))))[0].shape == (20, 30_000)
    with pytest.raises(ValueError, match="axis"):
        images.read(encoded(Image.new("L", (60_000, 20))))


def test_digest_of_pixels_and_shape():
    changed = GRAY.copy()
    changed[3, 4] ^= 1
    digests = {images.digest(x) for x in (GRAY, changed, GRAY.reshape(53, 37))}
    assert len(digests) == 3
    files = [encoded(GRAY, form) for form in ("PNG", "TIFF", "BMP")] + [encoded(GRAY, "WEBP", lossless=True)]
    assert {images.digest(images.read(data)[0]) for data in files} == {images.digest(GRAY)}
    assert images.digest(np.stack([GRAY] * 3, -1)) in digests  # gray saved as RGB is the same image


def test_16_bit_window():
    image = np.array([[0, 999, 1000], [1500, 3000, 65535]], np.uint16)
    big_endian = Image.frombytes("I;16B", (3, 2), image.astype(">u2").tobytes())
    in_32_bits = [encoded(image.astype(kind), "TIFF") for kind in (np.int32, np.float32)]
    for data in (encoded(image), encoded(image, "TIFF"), encoded(big_endian, "TIFF"), *in_32_bits):
        array, _ = images.read(data)
        np.testing.assert_array_equal(array, image)
        assert array.dtype == np.uint16
        expected = [[0, 0, 0], [63.75, 255, 255]]
        np.testing.assert_allclose(images.decode(data, (1000, 3000)), expected, rtol=1e-6)
        with pytest.raises(ValueError, match="--window"):
            images.decode(data, None)


def test_16_bit_rounding_after_resizing():
    # 4 values per gray level: their mean is a full level, which rounding each value first would miss.
    image = np.tile(np.array([[101, 103]], np.uint16), (2, 1))
    decoded = images.decode(encoded(image), (0.0, 1020.0))
    assert images.to_input(decoded, np.array([0, 0, 2, 2]), InputSpec(size=(1, 1)), 0.0).item() == round(102 / 4)


def sampled_png(samples, kind):
    """A 16-bit PNG file of uint16 samples [H, W, channels]; `kind` is the color type in its header."""
    height, width, channels = samples.shape
    data = images.encode(samples.reshape(height, width * channels))
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


def test_every_mode_against_pillow():
    base = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 9, 4), np.uint8), "RGBA")
    every = "PNG JPEG TIFF BMP GIF WEBP JPEG2000"
    files = {
        (mode, form): encoded(base.convert(mode), form)
        for mode, forms in {
            "1": "PNG TIFF BMP GIF", "L": every, "LA": "PNG TIFF GIF WEBP JPEG2000", "P": "PNG TIFF BMP GIF",
            "PA": "TIFF", "RGB": every, "RGBA": "PNG TIFF BMP GIF WEBP JPEG2000", "RGBX": "TIFF JPEG",
            "CMYK": "TIFF JPEG JPEG2000", "YCbCr": "TIFF JPEG JPEG2000",
        }.items()
        for form in forms.split()
    }  # fmt: skip
    deep = np.random.default_rng(1).integers(0, 65536, (8, 9, 4), np.uint16)
    files |= {(f"{n} x 16", "PNG"): sampled_png(deep[..., :n], kind) for kind, n in ((2, 3), (4, 2), (6, 4))}
    for key, data in files.items():
        array, form = images.read(data)
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        np.testing.assert_array_equal(array if array.ndim == 3 else array[..., None] + np.zeros(3, np.uint8), expected)
        assert form == key[1] and array.dtype == np.uint8
    assert {form for _, form in files} == set(images.FORMATS.values())
    modes = {mode: images.conversion(files[mode, form]) for mode, form in files}
    assert {modes[mode] for mode in ("1", "P", "RGBX")} == {""} and modes["4 x 16"] == "RGBA, 16 bits"
    assert [modes[mode] for mode in ("RGBA", "CMYK", "2 x 16")] == ["RGBA", "CMYK", "RGBA, 16 bits"]


def test_exif_orientation():
    exif = Image.Exif()
    deep = GRAY.astype(np.uint16) * 200
    for orientation in range(10):
        exif[0x0112] = orientation
        for array, form in ((GRAY, "PNG"), (deep, "PNG"), (GRAY, "JPEG"), (np.stack([GRAY] * 3, -1), "WEBP")):
            data = encoded(array, form, exif=exif)
            decoded, name = images.read(data)
            expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
            np.testing.assert_array_equal(decoded, np.asarray(expected), err_msg=f"{form} {orientation}")
            assert name == (form if orientation in (0, 1, 9) else "")
    np.testing.assert_array_equal(images.decode(encoded(GRAY, "PNG", exif=b"Exif\0\0damaged"), None), GRAY)


def test_unsupported_files():
    for data, word in (
        (b"", "image format"),
        (b"hello" * 99, "image format"),
        (encoded(GRAY, "TIFF", save_all=True, append_images=[Image.fromarray(GRAY)]), "several pages"),
        (encoded(GRAY.astype(np.int32) - 1000, "TIFF"), "Hounsfield"),
        (encoded(GRAY.astype(np.float32) / 255, "TIFF"), "fractions"),
        (encoded(Image.new("LAB", (4, 4)), "TIFF"), "mode LAB"),
    ):
        with pytest.raises(ValueError, match=word):
            images.read(data)


def test_box_against_crop():
    for kernel in ("nearest", "bilinear", "bicubic", "lanczos"):
        for antialias in (True, False):
            full = InputSpec(size=(16, 24), interpolation=kernel, antialias=antialias)
            spec = InputSpec(size=(16, 24), crop="box", interpolation=kernel, antialias=antialias)
            for box in ((0, 0, 53, 37), (5, 3, 40, 30), (0, 30, 9, 37), (52, 36, 53, 37), (20, 0, 21, 37)):
                result = images.to_input(GRAY, np.array(box, np.float32), spec, 0.0)
                cropped = GRAY[box[1] : box[3], box[0] : box[2]]
                np.testing.assert_array_equal(result, images.to_input(cropped, FULL, full, 0.0))
                assert result.shape == (16, 24, 1) and result.dtype == np.uint8


def test_box_margin():
    crop = InputSpec(crop="box")
    assert images.view(np.array([10, 20, 30, 30]), crop, 0.1, 100, 100) == (8, 19, 32, 31)
    assert images.view(np.array([0, 5, 100, 98]), crop, 0.5, 100, 100) == (0, 0, 100, 100)
    result = images.to_input(GRAY, np.array([10, 10, 30, 20]), InputSpec(size=(12, 24), crop="box"), 0.1)
    np.testing.assert_array_equal(result[..., 0], GRAY[9:21, 8:32])
    for box in ([60, 0, 70, 10], [5, 5, 5, 9], [9, 9, 5, 12]):
        with pytest.raises(ValueError, match="no pixel"):
            images.to_input(GRAY, np.array(box), InputSpec(size=(8, 8), crop="box"), 0.0)


def test_center_crop():
    for image, window, (top, left) in (
        ((512, 512), (340, 380), (86, 66)),
        # An odd remainder: int(round(x)) of torchvision's CenterCrop rounds to even.
        ((37, 53), (10, 12), (14, 20)),  # 13.5 and 20.5
        ((37, 53), (8, 10), (14, 22)),  # 14.5 and 21.5
        ((37, 53), (37, 53), (0, 0)),
    ):
        region = (left, top, left + window[1], top + window[0])
        spec = InputSpec(size=(16, 24), crop="center", crop_size=window)
        assert images.view(np.zeros(4), spec, 0.0, image[1], image[0]) == region
        if image == GRAY.shape:
            cropped = GRAY[top : top + window[0], left : left + window[1]]
            expected = images.to_input(cropped, FULL, InputSpec(size=(16, 24)), 0.0)
            np.testing.assert_array_equal(images.to_input(GRAY, np.zeros(4), spec, 0.0), expected)
    large = InputSpec(crop="center", crop_size=(40, 20))
    assert images.view(np.zeros(4), large, 0.0, 53, 37) == (16, 0, 36, 37)  # larger than the image


def test_plain_kernels_at_pixel_centers():
    for size in ((16, 24), (80, 100), (37, 53)):
        result = images.resize(GRAY, (0, 0, 53, 37), size, "bilinear", antialias=False)
        centers = [(np.arange(count) + 0.5) * side / count - 0.5 for count, side in zip(size, GRAY.shape, strict=True)]
        grid = np.meshgrid(*centers, indexing="ij")
        expected = ndimage.map_coordinates(GRAY.astype(float), grid, order=1, mode="nearest")
        np.testing.assert_allclose(result, expected, atol=0.5 + 1e-4)
    row = np.arange(10, dtype=np.uint8)[None]
    result = images.resize(row, (0, 0, 10, 1), (1, 4), "nearest", antialias=True)
    np.testing.assert_array_equal(result, [[1, 3, 6, 8]])  # centers 1.25, 3.75, 6.25, 8.75


def test_kernels_against_jax():
    smooth = ndimage.gaussian_filter(GRAY.astype(np.float32), 1.5)
    for kernel, name in (("bilinear", "linear"), ("bicubic", "cubic"), ("lanczos", "lanczos3")):
        for antialias, size in ((True, (18, 23)), (False, (61, 77))):
            result = images.resize(smooth, (0, 0, 53, 37), size, kernel, antialias)
            expected = np.asarray(jax.image.resize(smooth, size, name, antialias=antialias))
            # At the edge, jax drops taps while plain sampling repeats the pixel.
            inner = np.s_[:] if antialias else np.s_[7:-7, 7:-7]
            np.testing.assert_allclose(result[inner], expected[inner], atol=0.02)


def test_channels():
    box = np.array([0, 0, 30, 20])
    gray = images.to_input(COLOR, box, InputSpec(size=(20, 30), channels=1), 0.0)
    np.testing.assert_allclose(gray[..., 0], COLOR @ [0.299, 0.587, 0.114], atol=1)
    np.testing.assert_array_equal(images.to_input(COLOR, box, InputSpec(size=(20, 30), channels=3), 0.0), COLOR)
    repeated = images.to_input(GRAY, FULL, InputSpec(size=(10, 10), channels=3), 0.0)
    np.testing.assert_array_equal(repeated, np.repeat(repeated[..., :1], 3, -1))
    for antialias in (True, False):
        small = images.to_input(COLOR, box, InputSpec(size=(8, 9), channels=3, antialias=antialias), 0.0)
        for c in range(3):
            single = images.to_input(COLOR[..., c], box, InputSpec(size=(8, 9), antialias=antialias), 0.0)
            np.testing.assert_array_equal(small[..., c], single[..., 0])


def test_invalid_crop_and_kernel():
    for fields, word in (({"interpolation": "bilinar"}, "bilinear"), ({"crop": "lung"}, "box"),
                         ({"crop": "center"}, "crop_size")):  # fmt: skip
        with pytest.raises(ValueError, match=word):
            images.to_input(GRAY, FULL, InputSpec(**fields), 0.0)


def test_no_program_for_postscript(tmp_path, monkeypatch):
    """Pillow's EPS plugin runs Ghostscript from PATH on any file with a PostScript header."""
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\nshowpage\n%%EOF\n"
    gs, trace = tmp_path / "gs", tmp_path / "started"
    gs.write_text(f"#!/bin/sh\ntouch {trace}\n")
    gs.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    (tmp_path / "a.png").write_bytes(postscript)
    with pytest.raises(ValueError, match="image format"):
        images.read(postscript)
    with pytest.raises(ValueError, match="image format"):
        lungjax.preprocess([tmp_path / "a.png"], InputSpec(size=(8, 8)))
    assert not trace.exists()
