"""Damaged files and small files that promise gigabytes, in every path that opens files of users.

A child process opens the files, since its memory is limited and measured: `python tests/fuzz/test_files.py FOLDER`
opens the files of a folder, `python tests/fuzz/test_files.py FOLDER SEED COUNT` writes damaged ones there and opens
them. It prints one JSON object.
"""

import gzip
import io
import json
import random
import resource
import struct
import subprocess
import sys
import time
import traceback
import zlib
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import nibabel
import numpy as np
import pytest
import scans
from folders import encoded
from pydicom.encaps import encapsulate
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEGBaseline8Bit, RLELossless

from lungjax.config import InputSpec
from lungjax.config.metadata import Metadata
from lungjax.data import preprocess
from lungjax.data.imaging import images, nifti
from lungjax.datasets import PrepareOptions, folder_volumes
from lungjax.datasets.build.process_image import ImageOptions, process_image
from lungjax.datasets.listing import Example
from lungjax.inference import inputs
from lungjax.serve import uploads

MEMORY = 2 * 2**30
SECONDS = 10
FEW = 3  # slices to open per volume
METADATA = Metadata("mine", ("a", "b"), InputSpec(size=(8, 8)), "folder/mine", window=(0, 4000))
GRAY = np.random.default_rng(0).integers(0, 256, (20, 24)).astype(np.uint8)
COLOR = np.random.default_rng(0).integers(0, 256, (20, 24, 3)).astype(np.uint8)
WINDOWS = ((-600.0, 1500.0),)


def predicted(path):
    """Opens a file as `lungjax.predict` does; returns the reasons of failures."""
    sources = inputs.gather([str(path)], METADATA)
    reasons = [reason for _, reason in sources.failures]
    for item in sources.items[:FEW]:
        try:
            preprocess.picture(item.read(), METADATA)
        except (ValueError, OSError) as error:
            reasons.append(str(error))
    return reasons


def prepared(path):
    """Opens a file as `lungjax.prepare` does; returns the reasons of failures."""
    if not folder_volumes.kind(str(path)):
        return []
    rows, _, _ = folder_volumes.expand([folder_volumes.Row(path.name, str(path), "a", "train")], PrepareOptions())
    examples = [Example(row.file, row.image, 0, "train", "g") for row in rows[:FEW]]
    results = [process_image(example, ImageOptions(size=(16, 16))) for example in examples]
    return [result for result in results if isinstance(result, str)]


def uploaded(path):
    """Opens a file as the service does; returns the reason of a failure."""
    try:
        uploads.read(path.read_bytes(), uploads.Limits())
    except uploads.UploadError as error:
        return [str(error)]
    return []


def in_child(*arguments):
    """Opens files in a new process; returns the printed object."""
    command = [sys.executable, __file__, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def open_files(paths):
    """Prints the failures by file and path of lungjax, unexpected errors, the longest time and the most memory."""
    resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30, 4 * 2**30))
    uploads.quiet()
    reasons, unexpected, slowest, count, failures = {}, [], 0.0, 0, 0
    for path in paths:
        count += 1
        for read in (predicted, prepared, uploaded):
            started = time.monotonic()
            try:
                failed = read(path)
            except Exception:
                failed = []
                unexpected.append(f"{path.name} {count} {read.__name__}: {traceback.format_exc(limit=-3)}")
            slowest, failures = max(slowest, time.monotonic() - started), failures + len(failed)
            if len(sys.argv) == 2:
                reasons.setdefault(path.name, {})[read.__name__] = " ".join(failed)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result = {"files": count, "failures": failures, "slowest": slowest, "memory": memory}
    print(json.dumps(result | {"unexpected": unexpected, "reasons": reasons}))


def written(data):
    buffer = io.BytesIO()
    data.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def dicom_file(syntax=None, modality="CT", pixels=None, **tags):
    rescale = {"RescaleSlope": 1, "RescaleIntercept": -1024} if modality == "CT" else {}
    stored = np.arange(20 * 24, dtype=np.uint16).reshape(20, 24)
    data = scans.dataset(stored, modality, **(rescale | tags))
    if syntax == RLELossless and pixels is None:
        data.compress(RLELossless, generate_instance_uid=False)
    elif syntax:
        data.file_meta.TransferSyntaxUID = syntax
    if pixels is not None:
        data.PixelData = encapsulate([pixels])
    return written(data)


def originals(folder):
    """Returns (suffix, content, function that compresses the content) of intact files of every format."""
    eight = {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7}
    hu, jpeg, plain = scans.body(), encoded(GRAY, "JPEG"), bytes
    nifti_file = Path(scans.nifti(folder / "a.nii", hu)).read_bytes()
    enhanced = Path(scans.enhanced(folder / "e.dcm", hu)).read_bytes()
    deep = np.arange(480, dtype=np.uint16).reshape(20, 24)
    content = dicom_file()[_end(dicom_file()) :]
    meta = dicom_file(DeflatedExplicitVRLittleEndian)
    meta = meta[: _end(meta)]
    return [
        ("png", encoded(GRAY), plain), ("png", encoded(COLOR), plain), ("png", encoded(deep), plain),
        ("jpg", jpeg, plain), ("jpg", encoded(COLOR, "JPEG", progressive=True, comment=b"words"), plain),
        ("tif", encoded(GRAY, "TIFF"), plain), ("tif", encoded(COLOR, "TIFF", compression="tiff_lzw"), plain),
        ("tif", encoded(deep, "TIFF", compression="tiff_adobe_deflate"), plain), ("bmp", encoded(COLOR, "BMP"), plain),
        ("gif", encoded(GRAY, "GIF"), plain), ("webp", encoded(COLOR, "WEBP"), plain),
        ("webp", encoded(GRAY, "WEBP", lossless=True), plain), ("jp2", encoded(COLOR, "JPEG2000"), plain),
        ("j2k", encoded(GRAY, "JPEG2000", no_jp2=True), plain), ("dcm", dicom_file(), plain),
        ("dcm", dicom_file(modality="DX"), plain), ("dcm", dicom_file(RLELossless), plain),
        ("dcm", dicom_file(JPEGBaseline8Bit, "DX", jpeg, **eight), plain), ("dcm", enhanced, plain),
        ("dcm", content, lambda data: meta + zlib.compress(data)[2:-4]),
        ("nii", nifti_file, plain), ("nii.gz", nifti_file, lambda data: gzip.compress(data, 1)),
        ("csv", b"path,group\nfile.png,p1\nscan.dcm,p2\n", plain),
    ]  # fmt: skip


def damage(data, rng):
    """Returns a file with changed, missing or repeated bytes, most of them in its header."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 3, 20))):
        at = rng.randrange(min(len(data), rng.choice((64, 400, 10**6))))
        kind = rng.randrange(6)
        if kind < 2:
            data[at] = rng.randrange(256)
        elif kind == 2:  # a number becomes zero, one or very large
            number = rng.choice((b"\0", b"\1\0", b"\xff", b"\x7f\xff", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f"))
            data[at : at + len(number)] = number
        elif kind == 3 and len(data) > 2:
            del data[at : at + rng.randrange(1, 40)]
        elif kind == 4:
            data[at:at] = data[at : at + rng.randrange(1, 200)] * rng.choice((1, 1, 50))
        elif len(data) > 100:
            del data[rng.randrange(100, len(data)) :]
        data = data or bytearray(b"\0")
    return bytes(data)


def damaged(folder, seed, count):
    """Yields the paths of `count` files with random damage, each of which replaces the one before."""
    rng, files = random.Random(seed), originals(folder)
    (folder / "file.png").write_bytes(files[0][1])
    for _ in range(count):
        suffix, data, compress = rng.choice(files)
        inside = rng.random() < 0.5
        content = compress(damage(data, rng)) if inside else damage(compress(data), rng)
        path = folder / f"scan.{suffix}"
        path.write_bytes(content)
        yield path
        path.unlink()


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_damaged_files(tmp_path, count):
    result = in_child(tmp_path, count, count)
    assert result["unexpected"] == []
    assert result["files"] == count and result["failures"] > count
    assert result["slowest"] < SECONDS and result["memory"] < MEMORY


def zeros(mebibytes):
    """Returns deflated zeros without their end, made of copies of one block."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    return (packer.compress(bytes(2**20)) + packer.flush(zlib.Z_FULL_FLUSH)) * mebibytes


def chunk(name, body):
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def volume_header(shape, dtype=np.uint8, kind=nibabel.Nifti1Header):
    header = kind()
    header.set_data_shape(shape)
    header.set_data_dtype(dtype)
    header.set_xyzt_units("mm")
    header.set_sform(np.eye(4), 1)
    header["magic"], header["vox_offset"] = kind.single_magic, kind.single_vox_offset
    return header.binaryblock + bytes(kind.single_vox_offset - len(header.binaryblock))


def bombs():
    """Yields suffix, content and a word of the reason of small files that promise much."""
    packed = b"\x1f\x8b\x08\0\0\0\0\0\0\3"
    yield "slices.nii", volume_header((4, 4, 2**40), kind=nibabel.Nifti2Header) + bytes(1000), "max_megavoxels"
    yield "voxels.nii.gz", packed + _deflated(volume_header((1000, 1000, 1500))) + zeros(1431), "max_megavoxels"
    yield "empty.nii.gz", packed + _deflated(volume_header((512, 512, 1500))) + zeros(1), "too few"
    yield "short.nii", volume_header((512, 512, 1500)) + bytes(1000), "too few"
    thin = volume_header((2, 2, 32_768), kind=nibabel.Nifti2Header)
    yield "planes.nii.gz", packed + _deflated(thin) + zeros(1), "axis"
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 13_300, 13_300, 8, 6, 0, 0, 0))
    pixels = chunk(b"IDAT", b"\x78\xda" + zeros(675))
    yield "rgba.png", images.SIGNATURE + header + pixels + chunk(b"IEND", b""), "max_megapixels"
    tags = {256: 40, 257: 50, 258: 8, 259: 1, 262: 1, 277: 1, 322: 60_000, 323: 60_000, 324: 8, 325: 9}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    yield "tiles.tif", struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(200), "max_megapixels"
    jpeg = encoded(GRAY, "JPEG")
    at = jpeg.index(b"\xff\xda")
    yield "scans.jpg", jpeg[:at] + jpeg[at:-2] * 21 + jpeg[-2:], "scans"
    deflated = dicom_file(DeflatedExplicitVRLittleEndian)
    yield "deflated.dcm", deflated[: _end(deflated)] + zeros(3300), "inflates"
    rle = struct.pack("<16I", 2, 64, 64 + 400_000, *[0] * 13) + b"\x81\0" * 400_000  # 51 MB
    yield "rle.dcm", dicom_file(RLELossless, pixels=rle), "exceed"
    eight = {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7}
    large = encoded(np.zeros((3000, 3000), np.uint8), "JPEG")
    yield "jpeg.dcm", dicom_file(JPEGBaseline8Bit, "DX", large, **eight), "differs"
    yield "stretched.dcm", dicom_file(PixelSpacing=[1e-4, 10]), "max_megapixels"


def _deflated(data):
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush(zlib.Z_FULL_FLUSH)


def _end(data):
    """Returns the end of the file meta information of a DICOM file."""
    return 144 + int.from_bytes(data[140:144], "little")


def test_bombs(tmp_path):
    words = {}
    for name, data, words[name] in bombs():
        assert len(data) < 4 * 2**20
        (tmp_path / name).write_bytes(data)
    result = in_child(tmp_path)
    assert result["unexpected"] == [] and result["slowest"] < SECONDS and result["memory"] < MEMORY
    for name, word in words.items():
        for read, reason in result["reasons"][name].items():
            # The service reads no NIfTI, and does not quote errors of decoders.
            assert word in reason or (read == "uploaded" and reason), (name, read, reason)


def test_broken_volume_is_read_once(tmp_path, monkeypatch):
    path = scans.nifti(tmp_path / "a.nii.gz", scans.body())
    intact = Path(path).read_bytes()
    Path(path).write_bytes(intact[:-400])
    calls, real = [], np.empty
    monkeypatch.setattr(np, "empty", lambda *args, **options: calls.append(args) or real(*args, **options))
    for index in range(5):
        with pytest.raises(ValueError, match="damaged"):
            nifti.picture(path, "axial", index, WINDOWS)
    assert len(calls) == 1
    Path(path).write_bytes(intact)
    assert nifti.picture(path, "axial", 0, WINDOWS)


if __name__ == "__main__":
    place = Path(sys.argv[1])
    open_files(sorted(place.iterdir()) if len(sys.argv) == 2 else damaged(place, *map(int, sys.argv[2:])))
