"""Uploads: what is read equals Pillow's and pydicom's reading; all else is refused for a reason, and cheaply."""

import io
import random
import struct
import subprocess
import sys
import time
import tracemalloc
import zlib

import numpy as np
import pydicom
import pytest
import scans
from PIL import Image, PngImagePlugin
from pydicom.encaps import encapsulate
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEGBaseline8Bit, RLELossless

from lungjax.data.imaging import dicom, dicom_frames, images, memory_file
from lungjax.serve import uploads
from lungjax.serve.uploads import Limits, UploadError

LIMITS = Limits(bytes=2**20, pixels=100_000, side=5_000, least=8)
SECRETS = ("Zentinel", "Otto", "SECRET-4711", "19110203", "1.2.826.0.1.3680043.77", "Klinik Sonnenstein")


def picture(shape=(40, 50)):
    return np.random.default_rng(3).integers(0, 256, shape).astype(np.uint8)


def saved(array, form, **options):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, form, **options)
    return buffer.getvalue()


def scan(modality="CT", shape=(24, 32), **tags):
    pixels = np.random.default_rng(4).integers(0, 2000, shape).astype(np.uint16)
    rescale = {"RescaleSlope": 1, "RescaleIntercept": -1024} if modality == "CT" else {}
    return scans.dataset(pixels, modality, **(rescale | tags))


def secret(data):
    """Puts words into a scan that must never come out of it."""
    data.PatientName, data.PatientID, data.PatientBirthDate = "Zentinel^Otto", "SECRET-4711", "19110203"
    data.InstitutionName = "Klinik Sonnenstein"
    for name in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"):
        setattr(data, name, SECRETS[4] + ".1")
    data.file_meta.MediaStorageSOPInstanceUID = SECRETS[4] + ".1"
    return data


def written(data):
    buffer = io.BytesIO()
    data.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def read(data, **limits):
    return uploads.read(data, Limits(**(vars(LIMITS) | limits)))


def refused(data, **limits):
    with pytest.raises(UploadError) as caught:
        read(data, **limits)
    return caught.value.status, caught.value.reason, str(caught.value)


def chunk(name, body):
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width, height, *more, pixels=b"", kind=0):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0))
    return images.SIGNATURE + header + b"".join(more) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


GOOD = {
    "gray PNG": (picture(), "PNG", {}),
    "colour PNG": (picture((40, 50, 3)), "PNG", {}),
    "JPEG": (picture(), "JPEG", {}),
    "colour JPEG": (picture((40, 50, 3)), "JPEG", {"exif": b"Exif\0\0II*\0" + b"\0" * 20, "icc_profile": b"x" * 300}),
    "progressive JPEG": (picture((40, 50, 3)), "JPEG", {"progressive": True, "comment": b"words"}),
    "TIFF": (picture(), "TIFF", {}),
    "deflated TIFF": (picture((40, 50, 3)), "TIFF", {"compression": "tiff_adobe_deflate"}),
    "BMP": (picture((40, 50, 3)), "BMP", {}),
    "GIF": (picture(), "GIF", {}),
    "WebP": (picture((40, 50, 3)), "WEBP", {"lossless": True}),
    "JPEG 2000": (picture((40, 50, 3)), "JPEG2000", {}),
    "JPEG 2000 codestream": (picture(), "JPEG2000", {"no_jp2": True}),
}


@pytest.mark.parametrize("name", GOOD)
def test_images_are_read_as_pillow_reads_them(name):
    array, form, options = GOOD[name]
    data = saved(array, form, **options)
    found = read(data)
    decoded = Image.open(io.BytesIO(data))
    np.testing.assert_array_equal(found.pixels, np.asarray(decoded.convert("L") if form == "GIF" else decoded))
    assert found.kind == form and found.series == ""


def test_sixteen_bits_stay_what_they_are():
    array = np.arange(40 * 50, dtype=np.uint16).reshape(40, 50) * 30
    found = uploads.read(saved(array, "PNG"), LIMITS)
    assert found.pixels.dtype == np.uint16
    np.testing.assert_array_equal(found.pixels, array)


def test_series_are_of_one_patient_and_files_without_one_stand_alone():
    def series(**tags):
        return read(written(scan("CT", **tags))).series

    one = series(SeriesInstanceUID="1.2.3.77", PatientID="a")
    assert one and one == series(SeriesInstanceUID="1.2.3.77", PatientID="a")
    assert one != series(SeriesInstanceUID="1.2.3.77", PatientID="b")
    assert series(SeriesInstanceUID=None) == ""


@pytest.mark.parametrize("modality", ["CT", "DX"])
def test_dicom_in_memory_is_read_as_from_disk(modality, tmp_path):
    data = scan(modality, SeriesInstanceUID="1.2.3.77")
    path = str(scans.save(data, tmp_path / "scan.dcm"))
    wanted = dicom.picture(path, ((-600.0, 1500.0),)) if modality == "CT" else dicom.xray(path)
    found = read(written(data))
    np.testing.assert_array_equal(found.pixels, images.decode(wanted, None))
    assert found.kind == "DICOM" and found.series == ("1.2.3.77 ID-4711" if modality == "CT" else "")
    assert dicom.header(memory_file.MemoryFile("in memory", written(data))).series == dicom.header(path).series


def test_deflated_and_encapsulated_dicom_is_read():
    plain = read(written(scan())).pixels
    data = scan()
    data.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    np.testing.assert_array_equal(read(written(data)).pixels, plain)
    data = scan()
    data.compress(RLELossless, generate_instance_uid=False)
    np.testing.assert_array_equal(read(written(data)).pixels, plain)


def test_a_slice_of_another_plane_is_refused():
    data = scan(ImageOrientationPatient=[1, 0, 0, 0, 0, -1], ImagePositionPatient=[0, 0, 0])
    assert refused(written(data))[:2] == (422, "plane")
    assert uploads.read(written(data), LIMITS, plane="coronal").kind == "DICOM"


STRANGERS = {
    "ZIP": b"PK\x03\x04" + b"\0" * 200,
    "gzip": b"\x1f\x8b\x08" + b"\0" * 200,
    "PDF": b"%PDF-1.7\n",
    "HTML": b"\n  <!DOCTYPE html><html></html>",
    "text file": b"path,label\na.png,Normal\n",
    "RIFF": b"RIFF\x10\0\0\0WAVEfmt ",
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n",
    "NIfTI": b"\x5c\x01\0\0" + b"\0" * 344,
    "no image": bytes(range(256)),
}


@pytest.mark.parametrize("name", STRANGERS)
def test_other_files_are_named_and_never_decoded(name, monkeypatch):
    monkeypatch.setattr(uploads.Image, "open", None)
    status, reason, message = refused(STRANGERS[name])
    assert (status, reason) == (415, "type") and name in message and images.FORMAT_NAMES in message


def test_a_file_goes_to_the_decoder_of_its_kind_alone(monkeypatch):
    tried = []
    real = Image.open
    monkeypatch.setattr(Image, "open", lambda file, formats=None: tried.append(formats) or real(file, formats=formats))
    refused(saved(picture(), "PNG")[:60] + b"\0" * 100)
    assert tried and set(tried) == {("PNG",)}


def resized(form, width, height):
    """A small file whose header claims other sides."""
    if form == "PNG":
        return png(width, height, pixels=b"\0" * 100)
    data = bytearray(saved(picture(), form))
    if form == "JPEG":
        at = data.index(b"\xff\xc0") + 5
        data[at : at + 4] = struct.pack(">HH", height, width)
    if form == "GIF":
        at = data.index(b"\x2c", 13 + 768) + 5  # of the image descriptor, behind header and palette
        data[6:10] = data[at : at + 4] = struct.pack("<HH", width, height)
    if form == "JPEG2000":
        at = data.index(b"\xff\x4f\xff\x51") + 8
        data[at : at + 8] = struct.pack(">II", width, height)
    if form == "BMP":
        data[18:26] = struct.pack("<ii", width, height)
    if form == "TIFF":
        at = struct.unpack("<I", data[4:8])[0]
        for entry in range(at + 2, at + 2 + 12 * data[at], 12):
            (tag,) = struct.unpack("<H", data[entry : entry + 2])
            if tag in (256, 257):
                data[entry + 2 : entry + 12] = struct.pack("<HII", 4, 1, width if tag == 256 else height)
    return bytes(data)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "BMP", "TIFF", "GIF", "JPEG2000", "DICOM"])
def test_sizes_are_refused_by_the_header_alone(form, monkeypatch):
    monkeypatch.setattr(images, "decode", None)  # would be called by whoever decodes
    monkeypatch.setattr(dicom, "_pixels", None)

    def make(width, height):
        return written(scan(Rows=height, Columns=width)) if form == "DICOM" else resized(form, width, height)

    assert refused(make(60_000, 40)) == (413, "side", "60000 x 40 pixels; at most 5000 are taken along a side")
    assert refused(make(400, 300)) == (413, "pixels", "400 x 300 pixels; at most 100000 in all are taken")
    assert refused(make(1, 1)) == (422, "small", "1 x 1 pixels; at least 8 along each side are needed")


def test_too_many_bytes_and_none():
    assert refused(saved(picture(), "BMP"), bytes=2000)[:2] == (413, "bytes")
    assert refused(b"") == (422, "empty", "an empty file")


def bombs():
    zeros = zlib.compress(bytes(30 * 2**20), 9)
    pixels = b"".join(b"\0" + row.tobytes() for row in picture())
    yield "zTXt", png(50, 40, chunk(b"zTXt", b"Title\0\0" + zeros), pixels=pixels), 413
    yield "iTXt", png(50, 40, chunk(b"iTXt", b"Title\0\1\0en\0Titel\0" + zeros), pixels=pixels), 413
    yield "iCCP", png(50, 40, chunk(b"iCCP", b"name\0\0" + zeros), pixels=pixels), 413
    sixty = chunk(b"zTXt", b"Title\0\0" + zlib.compress(bytes(900_000)))
    yield "many zTXt", png(50, 40, *[sixty] * 60, pixels=pixels), 413
    data = scan()
    data.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    data.add_new((0x0009, 0x0010), "LO", "X")
    data.add_new((0x0009, 0x1001), "OB", bytes(30 * 2**20))
    yield "deflated DICOM", written(data), 413


@pytest.mark.parametrize(("name", "data", "status"), list(bombs()), ids=[name for name, *_ in bombs()])
def test_bombs_are_inflated_up_to_a_limit_alone(name, data, status):
    tracemalloc.start()
    try:
        found = refused(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found[:2] == (status, "bomb"), found
    assert peak < 8 * 2**20, peak  # of 30 MiB and more


def test_a_png_with_more_data_than_pixels():
    noise = np.random.default_rng(0).bytes(2 * 2**20)
    assert refused(png(50, 40, pixels=noise), bytes=2**24)[:2] == (422, "bomb")


def test_a_text_chunk_of_usual_size_is_no_bomb():
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "words " * 2000, zip=True)
    info.add_itxt("Comment", "words " * 2000, zip=True)
    assert read(saved(picture(), "PNG", pnginfo=info)).kind == "PNG"


def tiff(*entries, following=0, order="<"):
    """A TIFF's header and one directory of entries (tag, type, count, value)."""
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8)
    body = b"".join(struct.pack(f"{order}HHII", *entry) for entry in entries)
    return head + struct.pack(f"{order}H", len(entries)) + body + struct.pack(f"{order}I", following) + bytes(200)


def test_directories_of_a_tiff():
    size = ((256, 4, 1, 40), (257, 4, 1, 50))
    overlapping = [(40_000 + i, 7, 150, 8) for i in range(100)]
    assert refused(tiff(*size, *overlapping))[1:] == ("bomb", "a TIFF whose tags are larger than the file")
    assert refused(tiff(*size, following=8))[:2] == (422, "frames")
    assert refused(tiff(*size, (322, 4, 1, 60_000), (323, 4, 1, 60_000)))[:2] == (413, "side")
    assert refused(tiff(*size, order=">")[:20])[:2] == (422, "damaged")
    buffer = io.BytesIO()
    first, second = Image.fromarray(picture()), Image.fromarray(picture())
    first.save(buffer, "TIFF", save_all=True, append_images=[second])
    assert refused(buffer.getvalue())[:2] == (422, "frames")


def test_animations_and_several_pictures_in_a_file():
    buffer = io.BytesIO()
    first, second = Image.fromarray(picture()), Image.fromarray(255 - picture())
    first.save(buffer, "PNG", save_all=True, append_images=[second])
    assert refused(buffer.getvalue())[:2] == (422, "frames")
    buffer = io.BytesIO()
    first.save(buffer, "WEBP", save_all=True, append_images=[second], lossless=True)
    assert refused(buffer.getvalue())[:2] == (422, "damaged")


@pytest.mark.parametrize("form", ["GIF", "MPO"])
def test_first_frame_of_gif_and_mpo(form):
    buffer = io.BytesIO()
    first, second = Image.fromarray(picture()), Image.fromarray(255 - picture())
    first.save(buffer, form, save_all=True, append_images=[second])
    frame = Image.open(io.BytesIO(buffer.getvalue())).convert("L")
    np.testing.assert_array_equal(read(buffer.getvalue()).pixels, frame)
    np.testing.assert_array_equal(images.read(buffer.getvalue())[0], frame)


QUIET = """
import logging, sys
from lungjax.serve import uploads
logging.basicConfig()  # a handler, as a server has one
uploads.quiet()
assert "pydicom" not in sys.modules
print(uploads.read(open(sys.argv[1], "rb").read(), uploads.Limits()).kind)
"""


def test_first_dicom_of_a_process_logs_no_value(tmp_path):
    """In a fresh process, since importing pydicom resets the level of its logger."""
    uid = "1.2.826.01.3680043.77"  # a part with a leading zero, which pydicom warns of
    data = scan(SeriesInstanceUID="1.2.826.91.3680043.77")
    (tmp_path / "scan.dcm").write_bytes(written(data).replace(b"1.2.826.91.", b"1.2.826.01."))
    done = subprocess.run(
        [sys.executable, "-c", QUIET, tmp_path / "scan.dcm"], capture_output=True, text=True, check=True
    )
    assert done.stdout == "DICOM\n" and done.stderr == "" and uid not in done.stdout


def test_jpegs_that_keep_a_decoder_busy():
    data = saved(picture(), "JPEG")
    many = data[:2] + b"\xff\xe5\x00\x02" * 5000 + data[2:]
    assert "segments" in refused(many)[2]
    at = data.index(b"\xff\xda")
    assert "scans" in refused(data[:at] + data[at:-2] * 101 + data[-2:])[2]
    bmp = bytearray(saved(picture(), "BMP"))
    bmp[30] = 1
    assert "run lengths" in refused(bytes(bmp))[2]


@pytest.mark.parametrize("form", ["JPEG", "JPEG2000"])
def test_the_size_of_a_compressed_stream(form):
    data = saved(picture((30, 70)), form, **({"no_jp2": True} if form == "JPEG2000" else {}))
    assert dicom_frames.codestream_size(data) == (30, 70)


def test_compressed_pixels_larger_than_a_dicom_file_says(monkeypatch):
    data = scan("DX", shape=(24, 32), BitsAllocated=8, BitsStored=8, HighBit=7)
    data.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    data.PixelData = encapsulate([saved(picture((24, 32)), "JPEG")])
    np.testing.assert_array_equal(read(written(data)).pixels.shape, (24, 32))
    data.PixelData = encapsulate([saved(picture((30, 70)), "JPEG")])
    with monkeypatch.context() as patch:
        tried = []
        patch.setattr(Image, "open", lambda *_, **__: tried.append(1))
        assert refused(written(data))[:2] == (422, "damaged") and not tried
    data = scan(shape=(24, 32))
    data.compress(RLELossless, generate_instance_uid=False)
    head = struct.pack("<16I", 2, 64, 64 + 400_000, *[0] * 13)
    data.PixelData = encapsulate([head + b"\x81\0" * 400_000])  # 51 MB
    tracemalloc.start()
    assert refused(written(data))[:2] == (422, "damaged")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 * 2**20, peak


def test_several_frames_and_other_modalities():
    assert "several frames" in refused(written(scan(NumberOfFrames=3)))[2]
    assert "modality MR" in refused(written(scan("MR")))[2]
    assert refused(written(scan(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])))[:2] == (422, "aside")


def test_a_million_elements_end_soon():
    file = written(scan())
    many = file + b"\xf1\x7f\x10\x00SQ\0\0\xff\xff\xff\xff" + b"\xfe\xff\x00\xe0\0\0\0\0" * 900_000
    started = time.process_time()
    refused(many, bytes=2**24)
    assert time.process_time() - started < 5


def test_nothing_of_a_person_is_in_what_is_said_of_damaged_files(monkeypatch, recwarn, capfd, caplog):
    """Damage of all kinds: a refusal or an image, never another error, and never a word of the file."""
    uploads.quiet()
    whole = written(secret(scan()))
    deflated = secret(scan())
    deflated.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    swapped = secret(scan())
    swapped.Modality = "Zentinel"
    wrong = secret(scan(PixelSpacing=[0, 1]))
    unknown = secret(scan())
    unknown.file_meta.TransferSyntaxUID = SECRETS[4] + ".9"
    texts = [written(swapped), written(deflated)[:-40], written(wrong)]
    texts.append(written(scan()).replace(b"MONOCHROME2", b"Zentinel   "))
    for tag in (b"\x28\x00\x53\x10DS", b"\x28\x00\x52\x10DS", b"\x08\x00\x60\x00CS", b"\x28\x00\x10\x00US"):
        at = whole.index(tag)
        texts.append(whole[: at + 8] + b"Zentinel"[: whole[at + 6]] + whole[at + 8 + min(8, whole[at + 6]) :])
    rng = random.Random(5)
    for _ in range(250):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 3, 30))):
            data[rng.randrange(132, 132 + 900)] = rng.randrange(256)
        texts.append(bytes(data))
    texts += [whole[:end] for end in range(140, len(whole), 97)]
    messages = []
    for data in texts:
        try:
            read(data)
        except UploadError as error:
            messages.append(str(error))
            assert error.__cause__ is None
    assert len(messages) > 60
    said = "\n".join([*messages, *capfd.readouterr(), caplog.text, *(str(one.message) for one in recwarn)])
    assert not [word for word in SECRETS if word in said]


@pytest.mark.parametrize("name", GOOD)
def test_damaged_images_are_refused_or_read(name):
    array, form, options = GOOD[name]
    data, rng, bad = saved(array, form, **options), random.Random(6), 0
    for _ in range(60):
        damaged = bytearray(data[: rng.randrange(len(data))] if rng.random() < 0.5 else data)
        for _ in range(rng.choice((0, 1, 5))):
            if damaged:
                damaged[rng.randrange(min(len(damaged), 300))] = rng.randrange(256)
        try:
            read(bytes(damaged))
        except UploadError as error:
            bad += 1
            assert error.status in (413, 415, 422) and str(error)
    assert bad > 20


def test_pydicom_missing_is_said(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pydicom", None)
    status, reason, message = refused(written_before)
    assert (status, reason) == (415, "type") and "pip install 'lungjax[dicom]'" in message


written_before = written(scan())
assert pydicom  # imported here, so that the last test takes it away from `lungjax` alone
