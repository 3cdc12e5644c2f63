"""Uploads are decoded as Pillow and pydicom decode them, or are rejected early with a reason."""

import cProfile
import io
import pstats
import random
import struct
import subprocess
import sys
import zlib
from unittest import mock

import numpy as np
import pydicom
import pytest
import scans
from folders import encoded
from hostile_files import EIGHT_BITS, GRAY, IMAGES, damage, split_dicom
from PIL import Image, ImageFile
from pydicom.encaps import encapsulate
from pydicom.uid import DeflatedExplicitVRLittleEndian as DEFLATED
from pydicom.uid import JPEGBaseline8Bit, RLELossless
from scans import file_bytes as written
from scans import scan

from lungjax.data.imaging import dicom, images
from lungjax.serve import uploads
from lungjax.serve.uploads import Limits, UploadError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")
LIMITS = Limits(bytes=2**20, pixels=100_000)
SECRETS = ("Zentinel", "Otto", "SECRET-4711", "19110203", "1.2.826.0.1.3680043.77", "Klinik Sonnenstein")


def picture(shape=(40, 50)):
    return np.random.default_rng(3).integers(0, 256, shape).astype(np.uint8)


def secret(data):
    """Adds patient data that must not appear anywhere."""
    data.PatientName, data.PatientID, data.PatientBirthDate = "Zentinel^Otto", "SECRET-4711", "19110203"
    data.InstitutionName = "Klinik Sonnenstein"
    for name in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"):
        setattr(data, name, SECRETS[4] + ".1")
    data.file_meta.MediaStorageSOPInstanceUID = SECRETS[4] + ".1"
    return data


def read(data, **limits):
    return uploads.read(data, Limits(**(vars(LIMITS) | limits)))


def refused(data, **limits):
    with pytest.raises(UploadError) as caught:
        read(data, **limits)
    return caught.value.status, caught.value.reason, str(caught.value)


def test_images_as_from_disk():
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "words" * 100
    turned = [(GRAY, form, {"exif": exif}) for form in ("JPEG", "PNG", "WEBP")]
    for array, form, options in (*IMAGES, *turned):
        data = encoded(array, form, **options)
        upload, (expected, _) = read(data), images.read(data)
        np.testing.assert_array_equal(upload.images[0], expected)
        assert upload.images[0].dtype == expected.dtype and upload.series == ""


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
    plain, deflated, compressed = read(written(scan())).images[0], scan(syntax=DEFLATED), scan()
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


def test_only_the_decoder_of_the_format():
    with mock.patch.object(Image, "open", wraps=Image.open) as decoder:
        refused(encoded(picture(), "PNG")[:60] + b"\0" * 100)
    assert {call.kwargs["formats"] for call in decoder.call_args_list} == {("PNG",)}


def test_size_limits(monkeypatch):
    for form in dict.fromkeys(form for _, form, _ in IMAGES):
        assert refused(encoded(np.zeros((1, 1), np.uint8), form))[:2] == (422, "small")
    monkeypatch.setattr(ImageFile.ImageFile, "load", None)  # never decoded
    for form in dict.fromkeys(form for _, form, _ in IMAGES):
        *reason, message = refused(encoded(np.zeros((300, 400), np.uint8), form))
        assert reason == [413, "pixels"] and "400 x 300 pixels" in message, form
    assert refused(written(scan(Rows=300, Columns=400)))[:2] == (413, "pixels")
    data = bytearray(encoded(picture(), "JPEG2000"))  # decoders use the size in the codestream, not in the boxes
    at = data.index(b"\xff\x4f\xff\x51") + 8
    data[at : at + 8] = struct.pack(">II", 60_000, 40)
    assert refused(bytes(data))[:2] == (413, "pixels")
    assert refused(encoded(picture(), "BMP"), bytes=2000)[:2] == (413, "bytes")
    assert refused(b"")[:2] == (422, "empty")


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
    command = [sys.executable, "-c", QUIET, tmp_path / "scan.dcm"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "(24, 32)\n" and done.stderr == "" and uid not in done.stdout


def test_dicom_codestream_size(monkeypatch):
    data = scan("DX", syntax=JPEGBaseline8Bit, **EIGHT_BITS)
    data.PixelData = encapsulate([encoded(picture((24, 32)), "JPEG")])
    assert read(written(data)).images[0].shape == (24, 32)
    data.PixelData = encapsulate([encoded(picture((30, 70)), "JPEG")])
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("decoded"))
    assert refused(written(data))[:2] == (422, "damaged")


def test_unsuitable_dicom():
    assert "several frames" in refused(written(scan(NumberOfFrames=3)))[2]
    assert "modality MR" in refused(written(scan("MR")))[2]
    assert refused(written(scan(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])))[:2] == (422, "aside")
    assert refused(written(scan("SR", Rows=None)))[:2] == (422, "aside")


def test_million_frames_or_elements():
    file, items = written(scan(NumberOfFrames=10**6)), b"\xfe\xff\x00\xe0\0\0\0\0" * 10**6
    at = file.index(b"\xe0\x7f\x10\x00OW")
    groups = b"\x00\x52\x30\x92SQ\0\0" + len(items).to_bytes(4, "little") + items
    elements = written(scan()) + b"\xf1\x7f\x10\x00SQ\0\0\xff\xff\xff\xff" + items
    meta, _ = split_dicom(written(scan(syntax=DEFLATED)))
    packed = meta + zlib.compress(split_dicom(elements)[1])[2:-4]
    for data, calls in ((file[:at] + groups + file[at:], 10**4), (elements, 10**7), (packed, 10**7)):
        with cProfile.Profile() as profile:
            assert refused(data, bytes=2**24)[:2] == (422, "damaged")
        assert pstats.Stats(profile).total_calls < calls  # 10**8 with all elements


def test_frames(tmp_path):
    path = scans.enhanced(tmp_path / "e.dcm", scans.body((5, 24, 32)))
    data = (tmp_path / "e.dcm").read_bytes()
    with mock.patch.object(pydicom, "dcmread", wraps=pydicom.dcmread) as dcmread:
        decoded = read(data).images
    assert dcmread.call_count == 2  # the header and the pixels
    for image, header in zip(decoded, dicom.headers(path), strict=True):
        np.testing.assert_array_equal(image, scans.pixels_of(dicom.picture(header, ((-600.0, 1500.0),))))
    for limits in ({"frames": 4}, {"pixels": 4 * 24 * 32}):
        assert refused(data, **limits)[:2] == (413, "frames")


def test_damaged_dicom_without_leaks(monkeypatch, recwarn, capfd, caplog):
    """Any damage results in an UploadError or an image, never in another exception or in text from the file."""
    uploads.quiet()
    complete = written(secret(scan()))
    deflated, swapped = secret(scan(syntax=DEFLATED)), secret(scan())
    swapped.Modality = "Zentinel"
    damaged = [written(swapped), written(deflated)[:-40], written(secret(scan(PixelSpacing=[0, 1])))]
    damaged.append(written(scan()).replace(b"MONOCHROME2", b"Zentinel   "))
    for tag in (b"\x28\x00\x53\x10DS", b"\x28\x00\x52\x10DS", b"\x08\x00\x60\x00CS", b"\x28\x00\x10\x00US"):
        at, size = complete.index(tag) + 8, complete[complete.index(tag) + 6]
        damaged.append(complete[:at] + b"Zentinel"[:size] + complete[at + min(8, size) :])
    damaged += [damage(complete, random.Random(seed)) for seed in range(250)]
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


def test_missing_pydicom(monkeypatch):
    data = written(scan())
    monkeypatch.setitem(sys.modules, "pydicom", None)
    status, reason, message = refused(data)
    assert (status, reason) == (415, "type") and "pip install -e '.[dicom]'" in message
