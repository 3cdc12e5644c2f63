"""Decoding and resizing against hand-made pixels, scipy's sampling and jax.image.resize."""

import io
import os

import jax
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

import lungjax
from lungjax.config import InputSpec
from lungjax.data.imaging import images

GRAY = np.random.default_rng(0).integers(0, 256, (37, 53), dtype=np.uint8)
COLOUR = np.random.default_rng(1).integers(0, 256, (20, 30, 3), dtype=np.uint8)
DEEP = np.random.default_rng(2).integers(0, 65536, (9, 7), dtype=np.uint16)
WHOLE = np.array([0, 0, 53, 37], np.float32)


def encoded(image, form="PNG", **kwargs):
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    out = io.BytesIO()
    picture.save(out, form, **kwargs)
    return out.getvalue()


@pytest.mark.parametrize("form", ["PNG", "TIFF", "BMP"])
@pytest.mark.parametrize("image", [GRAY, COLOUR], ids=["gray", "colour"])
def test_lossless_formats_decode_to_the_same_pixels_and_are_equal_images(form, image):
    array, found = images.read(encoded(image, form))
    np.testing.assert_array_equal(array, image)
    assert found == form and images.digest(array) == images.digest(image)
    np.testing.assert_array_equal(images.decode(images.encode(array), None), image)


STORED = [GRAY, COLOUR, DEEP, GRAY[:1, :1], np.zeros((40, 300), np.uint8)]


@pytest.mark.parametrize("image", STORED, ids=["gray", "colour", "deep", "one pixel", "flat"])
def test_what_is_stored_is_a_png_for_everyone_and_read_here_without_pillow(image):
    data = images.encode(image)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), image)
    np.testing.assert_array_equal(images._unpacked(data), image)
    array, form = images.read(data)
    np.testing.assert_array_equal(array, image)
    assert array.dtype == image.dtype and form == "PNG"
    assert images._unpacked(encoded(image)) is None, "Pillow's own files are left to it"


def test_no_changed_byte_of_a_stored_image_goes_unnoticed():
    data = images.encode(GRAY[:9, :11])
    for i in range(len(data)):
        changed = bytearray(data)
        changed[i] ^= 85
        try:
            array, _ = images.read(bytes(changed))
        except ValueError:
            continue
        np.testing.assert_array_equal(array, GRAY[:9, :11], err_msg=f"byte {i}")
    for length in range(len(data)):
        try:
            array, _ = images.read(data[:length])
        except ValueError:
            continue
        np.testing.assert_array_equal(array, GRAY[:9, :11], err_msg=f"{length} bytes")


def test_one_changed_pixel_or_another_shape_is_no_equal_image():
    changed = GRAY.copy()
    changed[3, 4] ^= 1
    digests = {images.digest(x) for x in (GRAY, changed, GRAY.reshape(53, 37))}
    assert len(digests) == 3
    assert images.digest(np.stack([GRAY] * 3, -1)) in digests, "gray saved as RGB is the same image"


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_16_bit_goes_through_the_window_and_is_stored_without_loss(form):
    image = np.array([[0, 999, 1000], [1500, 3000, 65535]], np.uint16)
    array, _ = images.read(encoded(image, form))
    np.testing.assert_array_equal(array, image)
    shown = images.decode(images.encode(array), (1000, 3000))
    np.testing.assert_allclose(shown, [[0, 0, 0], [63.75, 255, 255]], rtol=1e-6)


def test_big_endian_16_bit_tiff_has_the_same_values():
    swapped = Image.frombytes("I;16B", (7, 9), DEEP.astype(">u2").tobytes())
    data = encoded(swapped, "TIFF")
    np.testing.assert_allclose(images.decode(data, (0, 255)), np.minimum(DEEP, 255))


def test_16_bit_without_a_window_is_refused():
    with pytest.raises(ValueError, match="--window=low,high"):
        images.decode(encoded(DEEP), None)


def test_16_bit_keeps_fractions_until_after_the_resize():
    # 4 values a gray step: their mean is a whole step, which rounding each one first would miss.
    image = np.tile(np.array([[101, 103]], np.uint16), (2, 1))
    spec = InputSpec(size=(1, 1))
    window = (0.0, 1020.0)
    got = images.to_input(images.decode(encoded(image), window), np.array([0, 0, 2, 2]), spec, 0.0)
    assert got.item() == round(102 / 4)
    image = np.full((2, 2), 102, np.uint16)  # 25.5
    assert images.decode(encoded(image), window)[0, 0] == 25.5


def test_palette_and_transparency():
    palette = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8), "P")
    palette.putpalette([255, 0, 0, 0, 255, 0, 9, 8, 7])
    want = [[[255, 0, 0], [0, 255, 0]], [[9, 8, 7], [0, 255, 0]]]
    np.testing.assert_array_equal(images.decode(encoded(palette), None), want)
    clear = np.array([[[200, 100, 50, 255], [200, 100, 50, 0], [200, 100, 50, 51]]], np.uint8)
    np.testing.assert_array_equal(images.decode(encoded(clear), None), [[[200, 100, 50], [0, 0, 0], [40, 20, 10]]])
    gray = np.array([[[200, 255], [200, 0]]], np.uint8)
    np.testing.assert_array_equal(images.decode(encoded(gray), None), [[200, 0]])
    np.testing.assert_array_equal(
        images.decode(encoded(Image.fromarray(GRAY > 127)), None), np.where(GRAY > 127, 255, 0)
    )


def test_cmyk_jpeg_becomes_rgb():
    cmyk = Image.fromarray(np.full((16, 16, 3), (200, 60, 20), np.uint8)).convert("CMYK")
    got = images.decode(encoded(cmyk, "JPEG", quality=95), None)
    assert got.shape == (16, 16, 3)
    np.testing.assert_allclose(got, np.broadcast_to([200, 60, 20], got.shape), atol=4)


def test_exif_orientation_is_ignored():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.fromarray(GRAY), "JPEG", exif=exif)
    assert images.decode(data, None).shape == GRAY.shape


@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF", "BMP"])
@pytest.mark.parametrize("part", [0.5, 0.9])
def test_a_truncated_file_is_an_error(form, part):
    data = encoded(np.random.default_rng(3).integers(0, 256, (64, 64), dtype=np.uint8), form)
    with pytest.raises(ValueError, match="damaged or truncated"):
        images.read(data[: int(part * len(data))])


def test_a_flipped_byte_in_a_png_is_an_error():
    data = bytearray(encoded(GRAY))
    data[len(data) // 2] ^= 255
    with pytest.raises(ValueError, match="damaged"):
        images.read(bytes(data))


def sixteen_bit_colour_png():
    import struct
    import zlib

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" + struct.pack(">HHH", 1000, 2000, 3000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not an image"),
        (b"hello" * 99, "not an image"),
        (encoded(GRAY, "TIFF", save_all=True, append_images=[Image.fromarray(GRAY)]), "2 pages"),
        (encoded(GRAY.astype(np.int32) - 1000, "TIFF"), "signed pixel values"),
        (encoded(GRAY.astype(np.float32), "TIFF"), "32-bit"),
        (sixteen_bit_colour_png(), "16-bit pixels of mode RGB"),
    ],
    ids=["empty", "text", "pages", "signed", "float", "deep colour"],
)
def test_what_cannot_be_used_is_refused_in_words(data, words):
    with pytest.raises(ValueError, match=words):
        images.read(data)


@pytest.mark.parametrize("box", [(0, 0, 53, 37), (5, 3, 40, 30), (0, 30, 9, 37), (52, 36, 53, 37), (20, 0, 21, 37)])
@pytest.mark.parametrize("kernel", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_a_box_gives_the_same_as_cutting_it_out_first(box, kernel):
    for antialias in (True, False):
        spec = InputSpec(size=(16, 24), crop="box", interpolation=kernel, antialias=antialias)
        got = images.to_input(GRAY, np.array(box, np.float32), spec, 0.0)
        cut = GRAY[box[1] : box[3], box[0] : box[2]]
        whole = InputSpec(size=(16, 24), interpolation=kernel, antialias=antialias)
        np.testing.assert_array_equal(got, images.to_input(cut, WHOLE, whole, 0.0))
        assert got.shape == (16, 24, 1) and got.dtype == np.uint8


def test_the_margin_is_part_of_the_side_and_stops_at_the_image():
    assert images.grow(np.array([10, 20, 30, 30]), 0.1, 100, 100) == (8, 19, 32, 31)
    assert images.grow(np.array([0, 5, 100, 98]), 0.5, 100, 100) == (0, 0, 100, 100)
    spec = InputSpec(size=(12, 24), crop="box")
    got = images.to_input(GRAY, np.array([10, 10, 30, 20]), spec, 0.1)
    np.testing.assert_array_equal(got[..., 0], GRAY[9:21, 8:32])


def test_a_box_without_a_pixel_is_an_error():
    for box in ([60, 0, 70, 10], [5, 5, 5, 9], [9, 9, 5, 12]):
        with pytest.raises(ValueError, match="holds no pixel"):
            images.to_input(GRAY, np.array(box), InputSpec(size=(8, 8), crop="box"), 0.0)


@pytest.mark.parametrize(
    ("image", "window", "corner"),
    [
        ((512, 512), (340, 380), (86, 66)),
        ((768, 1024), (340, 380), (214, 322)),
        # Half a pixel over: int(round(x)) of torchvision's CenterCrop goes to the even side.
        ((37, 53), (10, 12), (14, 20)),  # 13.5 and 20.5
        ((37, 53), (8, 10), (14, 22)),  # 14.5 and 21.5
        ((37, 53), (37, 53), (0, 0)),
    ],
)
def test_the_center_crop_begins_where_torchvision_begins_it(image, window, corner):
    (top, left), (height, width) = corner, window
    assert images.center(window, image[1], image[0]) == (left, top, left + width, top + height)
    if image == (37, 53):
        spec = InputSpec(size=(16, 24), crop="center", crop_size=window)
        cut = GRAY[top : top + height, left : left + width]
        want = images.to_input(cut, WHOLE, InputSpec(size=(16, 24)), 0.0)
        np.testing.assert_array_equal(images.to_input(GRAY, np.zeros(4), spec, 0.0), want)


def test_a_center_crop_stays_inside_the_image_and_has_a_size():
    assert images.center((40, 20), 53, 37) == (16, 0, 36, 37)
    whole = images.to_input(GRAY, WHOLE, InputSpec(size=(37, 53), crop="center", crop_size=(99, 99)), 0.0)
    np.testing.assert_array_equal(whole[..., 0], GRAY)
    with pytest.raises(ValueError, match=r"input.crop_size=\(0, 0\)"):
        images.to_input(GRAY, WHOLE, InputSpec(size=(8, 8), crop="center"), 0.0)


@pytest.mark.parametrize("size", [(16, 24), (80, 100), (37, 53)])
def test_plain_bilinear_samples_at_pixel_centres(size):
    got = images.resize(GRAY, (0, 0, 53, 37), size, "bilinear", antialias=False)
    down = (np.arange(size[0]) + 0.5) * 37 / size[0] - 0.5
    across = (np.arange(size[1]) + 0.5) * 53 / size[1] - 0.5
    want = ndimage.map_coordinates(
        GRAY.astype(float), np.meshgrid(down, across, indexing="ij"), order=1, mode="nearest"
    )
    np.testing.assert_allclose(got, want, atol=0.5 + 1e-4)


def test_nearest_takes_the_pixel_under_the_centre():
    row = np.arange(10, dtype=np.uint8)[None]
    got = images.resize(row, (0, 0, 10, 1), (1, 4), "nearest", antialias=True)
    np.testing.assert_array_equal(got, [[1, 3, 6, 8]])  # centres 1.25, 3.75, 6.25, 8.75


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize(("kernel", "theirs"), [("bilinear", "linear"), ("bicubic", "cubic"), ("lanczos", "lanczos3")])
def test_kernels_equal_those_of_jax(kernel, theirs, antialias):
    smooth = ndimage.gaussian_filter(GRAY.astype(np.float32), 1.5)
    for size in ((18, 23), (61, 77)):
        got = images.resize(smooth, (0, 0, 53, 37), size, kernel, antialias)
        want = jax.image.resize(smooth, size, theirs, antialias=antialias)
        inner = (
            slice(7, -7),
            slice(7, -7),
        )  # at the edge jax leaves taps out, plain sampling repeats the pixel
        edge = (slice(None), slice(None)) if antialias else inner
        np.testing.assert_allclose(got[edge], np.asarray(want)[edge], atol=0.02)


def test_antialias_makes_a_difference_when_shrinking_only():
    checks = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    region = (0.0, 0.0, 64.0, 64.0)
    shrunk = images.resize(checks, region, (16, 16), "bilinear", True)
    assert abs(shrunk.astype(int) - 127).max() <= 1
    assert images.resize(checks, region, (13, 13), "nearest", True).max() == 255
    grown = [images.resize(checks, region, (96, 96), "bilinear", a).astype(int) for a in (True, False)]
    assert abs(grown[0] - grown[1])[1:-1, 1:-1].max() <= 1


def test_gray_and_rgb_become_what_the_network_wants():
    box = np.array([0, 0, 30, 20])
    gray = images.to_input(COLOUR, box, InputSpec(size=(20, 30), channels=1), 0.0)
    np.testing.assert_allclose(gray[..., 0], COLOUR @ [0.299, 0.587, 0.114], atol=1)
    colour = images.to_input(COLOUR, box, InputSpec(size=(20, 30), channels=3), 0.0)
    np.testing.assert_array_equal(colour, COLOUR)
    for channels in (1, 3):
        got = images.to_input(GRAY, WHOLE, InputSpec(size=(10, 10), channels=channels), 0.0)
        assert got.shape == (10, 10, channels)
        np.testing.assert_array_equal(got, np.repeat(got[..., :1], channels, -1))
    for antialias in (True, False):
        spec = InputSpec(size=(8, 9), channels=3, antialias=antialias)
        got = images.to_input(COLOUR, box, spec, 0.0)
        for c in range(3):
            one = images.to_input(COLOUR[..., c], box, InputSpec(size=(8, 9), antialias=antialias), 0.0)
            np.testing.assert_array_equal(got[..., c], one[..., 0])


def test_unknown_crop_and_kernel_are_errors():
    with pytest.raises(ValueError, match="bilinear"):
        images.to_input(GRAY, WHOLE, InputSpec(size=(8, 8), interpolation="bilinar"), 0.0)
    with pytest.raises(ValueError, match="crop"):
        images.to_input(GRAY, WHOLE, InputSpec(size=(8, 8), crop="lung"), 0.0)


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\nshowpage\n%%EOF\n"


def test_postscript_named_png_starts_no_program(tmp_path, monkeypatch):
    """Pillow's EPS plugin runs Ghostscript, found on PATH, on any file that begins like PostScript."""
    from PIL import EpsImagePlugin

    gs, trace = tmp_path / "gs", tmp_path / "started"
    gs.write_text(f"#!/bin/sh\ntouch {trace}\n")
    gs.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    (tmp_path / "a.png").write_bytes(POSTSCRIPT)
    with pytest.raises(ValueError, match="not an image"):
        images.read(POSTSCRIPT)
    with pytest.raises(ValueError, match="not an image"):
        lungjax.preprocess([tmp_path / "a.png"], InputSpec(size=(8, 8)))
    assert not trace.exists()


@pytest.mark.parametrize("form", sorted(set(images.FORMATS.values())))
def test_every_format_is_read_as_pillow_reads_it(form):
    data = encoded(GRAY, form, **({"lossless": True} if form == "WEBP" else {}))
    array, name = images.read(data)
    assert name == form
    np.testing.assert_array_equal(array, Image.open(io.BytesIO(data)).convert("L" if array.ndim == 2 else "RGB"))
