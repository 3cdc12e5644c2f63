"""Uploads are decoded as Pillow and pydicom decode them, or are rejected early with a reason."""

import io
import random
import struct
import subprocess
import sys
import time
import tracemalloc
import zlib
from contextlib import contextmanager
from unittest import mock

import numpy as np
import pydicom
import pytest
import scans
from folders import encoded
from PIL import Image, ImageFile
from pydicom.encaps import encapsulate
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEGBaseline8Bit, RLELossless

from lungjax.data.imaging import dicom, images
from lungjax.serve import uploads
from lungjax.serve.uploads import Limits, UploadError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")
LIMITS = Limits(bytes=2**20, pixels=100_000)
SECRETS = ("Zentinel", "Otto", "SECRET-4711", "19110203", "1.2.826.0.1.3680043.77", "Klinik Sonnenstein")


def picture(shape=(40, 50)):
    return np.random.default_rng(3).integers(0, 256, shape).astype(np.uint8)


def scan(modality="CT", shape=(24, 32), **tags):
    pixels = np.random.default_rng(4).integers(0, 2000, shape).astype(np.uint16)
    rescale = {"RescaleSlope": 1, "RescaleIntercept": -1024} if modality == "CT" else {}
    return scans.dataset(pixels, modality, **(rescale | tags))


def secret(data):
    """Adds patient data that must not appear anywhere."""
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


GRAY, COLOR = picture(), picture((40, 50, 3))
GOOD = (
    (GRAY, "PNG", {}), (COLOR, "PNG", {}), (GRAY, "JPEG", {}),
    (COLOR, "JPEG", {"exif": b"Exif\0\0II*\0" + b"\0" * 20, "icc_profile": b"x" * 300}),
    (COLOR, "JPEG", {"progressive": True, "comment": b"words"}), (GRAY, "TIFF", {}),
    (COLOR, "TIFF", {"compression": "tiff_adobe_deflate"}), (COLOR, "BMP", {}), (GRAY, "GIF", {}),
    (COLOR, "WEBP", {"lossless": True}), (COLOR, "JPEG2000", {}), (GRAY, "JPEG2000", {"no_jp2": True}),
)  # fmt: skip


def test_images_as_pillow_decodes_them():
    deep = np.arange(40 * 50, dtype=np.uint16).reshape(40, 50) * 30
    for array, form, options in [(deep, "PNG", {}), *GOOD]:
        data = encoded(array, form, **options)
        upload, decoded = read(data), Image.open(io.BytesIO(data))
        expected = np.asarray(decoded.convert("L") if form == "GIF" else decoded)
        np.testing.assert_array_equal(upload.images[0], expected)
        assert upload.images[0].dtype == expected.dtype and upload.series == ""


def test_exif_orientation():
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "words" * 100
    for form in ("JPEG", "PNG", "WEBP"):
        data = encoded(GRAY, form, exif=exif)
        np.testing.assert_array_equal(read(data).images[0], images.read(data)[0])
        assert read(data).images[0].shape == GRAY.shape[::-1] + (3,) * (form == "WEBP")


def test_series_and_patients():
    one, same, other, none = (
        read(written(scan("CT", SeriesInstanceUID=uid, PatientID=patient))).series
        for uid, patient in (("1.2.3.77", "a"), ("1.2.3.77", "a"), ("1.2.3.77", "b"), (None, "a"))
    )
    assert one == same != other and one and none == ""


def test_dicom_as_from_disk(tmp_path):
    for modality in ("CT", "DX"):
        data = scan(modality)
        path = str(scans.save(data, tmp_path / f"{modality}.dcm"))
        (header,) = dicom.headers(path)
        expected = dicom.picture(header, ((-600.0, 1500.0),)) if modality == "CT" else dicom.xray(path)
        upload = read(written(data))
        np.testing.assert_array_equal(upload.images[0], images.decode(expected, None))
        assert bool(upload.series) == (modality == "CT")
    plain, deflated, compressed = read(written(scan())).images[0], scan(), scan()
    deflated.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    compressed.compress(RLELossless, generate_instance_uid=False)
    for data in (deflated, compressed):
        np.testing.assert_array_equal(read(written(data)).images[0], plain)


def test_slice_of_another_plane():
    data = written(scan(ImageOrientationPatient=[1, 0, 0, 0, 0, -1], ImagePositionPatient=[0, 0, 0]))
    assert refused(data)[:2] == (422, "plane") and uploads.read(data, LIMITS, plane="coronal").series


def test_other_formats(monkeypatch):
    monkeypatch.setattr(uploads.Image, "open", None)  # never decoded
    for data in (b"PK\x03\x04" + bytes(200), b"\n <!DOCTYPE html>", b"RIFF\x10\0\0\0WAVEfmt ", bytes(range(256))):
        status, reason, message = refused(data)
        assert (status, reason) == (415, "type") and images.FORMAT_NAMES in message


def test_only_the_decoder_of_the_format(monkeypatch):
    formats, real = [], Image.open
    monkeypatch.setattr(Image, "open", lambda file, formats=None: tried(formats) or real(file, formats=formats))
    tried = formats.append
    refused(encoded(picture(), "PNG")[:60] + b"\0" * 100)
    assert formats and set(formats) == {("PNG",)}


def test_size_limits(monkeypatch):
    for form in dict.fromkeys(form for _, form, _ in GOOD):
        assert refused(encoded(np.zeros((1, 1), np.uint8), form))[:2] == (422, "small")
    monkeypatch.setattr(ImageFile.ImageFile, "load", None)  # never decoded
    for form in dict.fromkeys(form for _, form, _ in GOOD):
        *reason, message = refused(encoded(np.zeros((300, 400), np.uint8), form))
        assert reason == [413, "pixels"] and "400 x 300 pixels" in message, form
    assert refused(written(scan(Rows=300, Columns=400)))[:2] == (413, "pixels")
    data = bytearray(encoded(picture(), "JPEG2000"))  # decoders use the size in the codestream, not in the boxes
    at = data.index(b"\xff\x4f\xff\x51") + 8
    data[at : at + 8] = struct.pack(">II", 60_000, 40)
    tags = {256: 40, 257: 50, 258: 8, 259: 1, 262: 1, 277: 1, 322: 60_000, 323: 60_000, 324: 8, 325: 9}
    tiles = tiff(*((tag, 4, 1, value) for tag, value in tags.items()))
    assert refused(bytes(data))[:2] == refused(tiles)[:2] == (413, "pixels")
    assert refused(encoded(picture(), "BMP"), bytes=2000)[:2] == (413, "bytes")
    assert refused(b"")[:2] == (422, "empty")


def tiff(*entries, size=200):
    """Returns the header and one directory of a TIFF file, with entries (tag, type, count, value)."""
    body = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return struct.pack("<2sHIH", b"II", 42, 8, len(entries)) + body + bytes(size)


def bombs():
    zeros = zlib.compress(bytes(30 * 2**20), 9)
    rows = b"".join(b"\0" + row.tobytes() for row in picture())
    yield "zTXt", png(50, 40, chunk(b"zTXt", b"Title\0\0" + zeros), pixels=rows)
    yield "iCCP", png(50, 40, chunk(b"iCCP", b"name\0\0" + zeros), pixels=rows)
    yield "pixels", png(50, 40, pixels=bytes(30 * 2**20))  # more than the header says
    tags = [(40_000 + i, 7, 400_000, 8) for i in range(100)]  # in the same place
    yield "tags", tiff((256, 4, 1, 40), (257, 4, 1, 50), *tags, size=500_000)
    data = scan()
    data.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    data.add_new((0x0009, 0x0010), "LO", "X")
    data.add_new((0x0009, 0x1001), "OB", bytes(30 * 2**20))
    yield "deflated DICOM", written(data)


@contextmanager
def memory_limit(mebibytes):
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < mebibytes * 2**20
    finally:
        tracemalloc.stop()


def test_decompression_bombs():
    """Small files that inflate to 30 MiB or more are rejected with little memory; excess pixels are not inflated."""
    for name, data in bombs():
        with memory_limit(8):
            if name == "pixels":
                assert read(data).images[0].shape == (40, 50)
            else:
                assert refused(data)[0] in (413, 422), name
        assert len(data) < 2**20


def test_several_frames():
    def frames(form):
        return encoded(picture(), form, save_all=True, append_images=[Image.fromarray(255 - picture())])

    for form in ("TIFF", "PNG", "WEBP"):
        assert "several" in refused(frames(form))[2]
    for form in ("GIF", "MPO"):
        frame = Image.open(io.BytesIO(frames(form))).convert("L")
        np.testing.assert_array_equal(read(frames(form)).images[0], frame)
        np.testing.assert_array_equal(images.read(frames(form))[0], frame)


QUIET = """
import logging, sys
from lungjax.serve import uploads
logging.basicConfig()  # a handler, as a server has one
uploads.quiet()
assert "pydicom" not in sys.modules
print(uploads.read(open(sys.argv[1], "rb").read(), uploads.Limits()).images[0].shape)
"""


def test_silence_of_the_first_dicom_in_a_process(tmp_path):
    """This runs in a new process, since importing pydicom resets the level of its logger."""
    uid = "1.2.826.01.3680043.77"  # pydicom warns of the leading zero in a part
    data = scan(SeriesInstanceUID="1.2.826.91.3680043.77")
    (tmp_path / "scan.dcm").write_bytes(written(data).replace(b"1.2.826.91.", b"1.2.826.01."))
    done = subprocess.run(
        [sys.executable, "-c", QUIET, tmp_path / "scan.dcm"], capture_output=True, text=True, check=True
    )
    assert done.stdout == "(24, 32)\n" and done.stderr == "" and uid not in done.stdout


def test_slow_jpeg():
    data = encoded(picture(), "JPEG")
    many = data[:2] + b"\xff\xe5\x00\x02" * 5000 + data[2:]
    assert "segments" in refused(many)[2]
    at = data.index(b"\xff\xda")
    assert "scans" in refused(data[:at] + data[at:-2] * 21 + data[-2:])[2]


def test_dicom_codestream_size(monkeypatch):
    data = scan("DX", shape=(24, 32), BitsAllocated=8, BitsStored=8, HighBit=7)
    data.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    data.PixelData = encapsulate([encoded(picture((24, 32)), "JPEG")])
    assert read(written(data)).images[0].shape == (24, 32)
    data.PixelData = encapsulate([encoded(picture((30, 70)), "JPEG")])
    with monkeypatch.context() as patch:
        calls = []
        patch.setattr(Image, "open", lambda *_, **__: calls.append(1))
        assert refused(written(data))[:2] == (422, "damaged") and not calls
    data = scan(shape=(24, 32))
    data.compress(RLELossless, generate_instance_uid=False)
    head = struct.pack("<16I", 2, 64, 64 + 400_000, *[0] * 13)
    data.PixelData = encapsulate([head + b"\x81\0" * 400_000])  # 51 MB
    with memory_limit(16):
        assert refused(written(data))[:2] == (422, "damaged")


def test_unsuitable_dicom():
    assert "several frames" in refused(written(scan(NumberOfFrames=3)))[2]
    assert "modality MR" in refused(written(scan("MR")))[2]
    assert refused(written(scan(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])))[:2] == (422, "aside")


def test_million_frames():
    file = written(scan(NumberOfFrames=10**6))
    at = file.index(b"\xe0\x7f\x10\x00OW")
    items = b"\xfe\xff\x00\xe0\0\0\0\0" * 10**6
    groups = b"\x00\x52\x30\x92SQ\0\0" + len(items).to_bytes(4, "little") + items
    started = time.process_time()
    assert refused(file[:at] + groups + file[at:], bytes=2**24)[:2] == (422, "damaged")
    assert time.process_time() - started < 2


def test_frames(tmp_path, monkeypatch):
    path = scans.enhanced(tmp_path / "e.dcm", scans.body((5, 24, 32)))
    data = (tmp_path / "e.dcm").read_bytes()
    with monkeypatch.context() as patch:
        dcmread = mock.Mock(wraps=pydicom.dcmread)
        patch.setattr(pydicom, "dcmread", dcmread)
        decoded = read(data).images
    assert dcmread.call_count == 2  # the header and the pixels
    for image, header in zip(decoded, dicom.headers(path), strict=True):
        np.testing.assert_array_equal(image, scans.pixels_of(dicom.picture(header, ((-600.0, 1500.0),))))
    for limits in ({"frames": 4}, {"pixels": 4 * 24 * 32}):
        assert refused(data, **limits)[:2] == (413, "frames")
    sr = scan()
    sr.Modality = "SR"
    del sr.Rows
    assert refused(written(sr))[:2] == (422, "aside")


def test_million_dicom_elements():
    file = written(scan())
    many = file + b"\xf1\x7f\x10\x00SQ\0\0\xff\xff\xff\xff" + b"\xfe\xff\x00\xe0\0\0\0\0" * 900_000
    syntax = b"\x02\0\x10\0UI\x16\x001.2.840.10008.1.2.1.99"
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    body = packer.compress(many[144 + int.from_bytes(many[140:144], "little") :]) + packer.flush()
    for data in (many, many[:140] + len(syntax).to_bytes(4, "little") + syntax + body):
        started = time.process_time()
        assert refused(data, bytes=2**24)[:2] == (422, "damaged")
        assert time.process_time() - started < 5


def test_damaged_dicom_without_leaks(monkeypatch, recwarn, capfd, caplog):
    """Any damage results in an UploadError or an image, never in another exception or in text from the file."""
    uploads.quiet()
    complete = written(secret(scan()))
    deflated, swapped = secret(scan()), secret(scan())
    deflated.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    swapped.Modality = "Zentinel"
    damaged = [written(swapped), written(deflated)[:-40], written(secret(scan(PixelSpacing=[0, 1])))]
    damaged.append(written(scan()).replace(b"MONOCHROME2", b"Zentinel   "))
    for tag in (b"\x28\x00\x53\x10DS", b"\x28\x00\x52\x10DS", b"\x08\x00\x60\x00CS", b"\x28\x00\x10\x00US"):
        at, size = complete.index(tag) + 8, complete[complete.index(tag) + 6]
        damaged.append(complete[:at] + b"Zentinel"[:size] + complete[at + min(8, size) :])
    rng = random.Random(5)
    for _ in range(250):
        data = bytearray(complete)
        for _ in range(rng.choice((1, 3, 30))):
            data[rng.randrange(132, 132 + 900)] = rng.randrange(256)
        damaged.append(bytes(data))
    damaged += [complete[:end] for end in range(140, len(complete), 97)]
    messages = []
    for data in damaged:
        try:
            read(data)
        except UploadError as error:
            messages.append(str(error))
            assert error.__cause__ is None
    assert len(messages) > 60
    output = "\n".join([*messages, *capfd.readouterr(), caplog.text, *(str(one.message) for one in recwarn)])
    assert not [word for word in SECRETS if word in output]


def test_damaged_images():
    for array, form, options in GOOD:
        data, rng, bad = encoded(array, form, **options), random.Random(6), 0
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


def test_missing_pydicom(monkeypatch):
    data = written(scan())
    monkeypatch.setitem(sys.modules, "pydicom", None)
    status, reason, message = refused(data)
    assert (status, reason) == (415, "type") and "pip install -e '.[dicom]'" in message
