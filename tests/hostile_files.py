"""Intact images of every format, random damage to files, and small files that promise gigabytes."""

import struct
import zlib

import nibabel
import numpy as np
import scans
from folders import encoded
from pydicom.encaps import encapsulate
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEGBaseline8Bit, RLELossless

from lungjax.data.imaging import images

EIGHT_BITS = {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7}
GRAY = np.random.default_rng(3).integers(0, 256, (40, 50), np.uint8)
COLOR = np.random.default_rng(3).integers(0, 256, (40, 50, 3), np.uint8)
DEEP = np.arange(40 * 50, dtype=np.uint16).reshape(40, 50) * 30
# Pixels, Pillow's name of the format, and options.
IMAGES = (
    (GRAY, "PNG", {}), (COLOR, "PNG", {}), (DEEP, "PNG", {}), (GRAY, "JPEG", {}),
    (COLOR, "JPEG", {"exif": b"Exif\0\0II*\0" + b"\0" * 20, "icc_profile": b"x" * 300}),
    (COLOR, "JPEG", {"progressive": True, "comment": b"words"}), (GRAY, "TIFF", {}),
    (COLOR, "TIFF", {"compression": "tiff_lzw"}), (DEEP, "TIFF", {"compression": "tiff_adobe_deflate"}),
    (COLOR, "BMP", {}), (GRAY, "GIF", {}), (COLOR, "WEBP", {}), (GRAY, "WEBP", {"lossless": True}),
    (COLOR, "JPEG2000", {}), (GRAY, "JPEG2000", {"no_jp2": True}),
)  # fmt: skip


def damage(data, rng):
    """Returns a file with changed, missing or repeated bytes, most of them near its start or end."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 3, 20))):
        at = rng.randrange(min(len(data), rng.choice((64, 400, 10**6))))
        at = len(data) - 1 - at if rng.random() < 0.2 else at
        kind = rng.randrange(7)
        if kind < 2:
            data[at] = rng.randrange(256)
        elif kind == 2:  # a number becomes zero, one or very large
            number = rng.choice((b"\0", b"\1\0", b"\xff", b"\x7f\xff", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f"))
            data[at : at + len(number)] = number
        elif kind == 3:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 4 and len(data) > 2:
            del data[at : at + rng.randrange(1, 40)]
        elif kind == 5:
            data[at:at] = data[at : at + rng.randrange(1, 200)] * rng.choice((1, 1, 50))
        elif kind == 6 and len(data) > 100 and rng.random() < 0.5:
            del data[rng.randrange(100, len(data)) :]
        data = data or bytearray(b"\0")
    return bytes(data)


def deflated(data, mebibytes=0):
    """Returns deflated data, and zeros made of copies of one block, without their end."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    start = packer.compress(data) + packer.flush(zlib.Z_FULL_FLUSH)
    return start + (packer.compress(bytes(2**20)) + packer.flush(zlib.Z_FULL_FLUSH)) * mebibytes


def chunk(name, body):
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width, height, *more, pixels=b"", mebibytes=0, kind=0):
    """Returns a PNG with deflated pixels, followed by zeros."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0))
    data = chunk(b"IDAT", b"\x78\xda" + deflated(pixels, mebibytes))
    return images.SIGNATURE + header + b"".join(more) + data + chunk(b"IEND", b"")


def tiff(*entries, size=200):
    """Returns the header and one directory of a TIFF file, with entries (tag, type, count, value)."""
    body = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return struct.pack("<2sHIH", b"II", 42, 8, len(entries)) + body + bytes(size)


def volume(shape, kind=nibabel.Nifti1Image):
    """Returns the header of a NIfTI file of bytes."""
    header = kind(np.broadcast_to(np.uint8(0), shape), np.eye(4)).header
    header.set_xyzt_units("mm")
    header["vox_offset"] = header.single_vox_offset
    return header.binaryblock + bytes(header.single_vox_offset - len(header.binaryblock))


def split_dicom(data):
    """Returns the file meta information and the data set of a DICOM file."""
    end = 144 + int.from_bytes(data[140:144], "little")
    return data[:end], data[end:]


def bombs():
    """Yields name, content and a word of the error message; the file with excess pixels is an intact image."""
    gzip = b"\x1f\x8b\x08\0\0\0\0\0\0\3"
    yield "slices.nii", volume((4, 4, 2**40), nibabel.Nifti2Image) + bytes(1000), "max_megavoxels"
    yield "voxels.nii.gz", gzip + deflated(volume((1000, 1000, 1500)), 1431), "max_megavoxels"
    yield "empty.nii.gz", gzip + deflated(volume((512, 512, 1500)), 1), "too few"
    yield "short.nii", volume((512, 512, 1500)) + bytes(1000), "too few"
    yield "planes.nii.gz", gzip + deflated(volume((2, 2, 32_768), nibabel.Nifti2Image), 1), "axis"
    yield "rgba.png", png(13_300, 13_300, mebibytes=675, kind=6), "max_megapixels"
    rows, zeros = b"".join(b"\0" + row.tobytes() for row in GRAY), b"\x78\xda" + deflated(b"", 3000)
    yield "zTXt.png", png(50, 40, chunk(b"zTXt", b"Title\0\0" + zeros), pixels=rows), "too large"
    yield "iCCP.png", png(50, 40, chunk(b"iCCP", b"name\0\0" + zeros), pixels=rows), "too large"
    yield "pixels.png", png(50, 40, pixels=rows, mebibytes=3000), ""
    gray = [(256, 4, 1, 40), (257, 4, 1, 50)]
    many = [(40_000 + i, 7, 3_000_000, 8) for i in range(1000)]  # in the same place
    yield "tags.tif", tiff(*gray, *many, size=3_000_000), "format"
    tags = {258: 8, 259: 1, 262: 1, 277: 1, 322: 60_000, 323: 60_000, 324: 8, 325: 9}
    yield "tiles.tif", tiff(*gray, *((tag, 4, 1, value) for tag, value in tags.items())), "max_megapixels"
    jpeg = encoded(GRAY, "JPEG")
    at = jpeg.index(b"\xff\xda")
    yield "scans.jpg", jpeg[:at] + jpeg[at:-2] * 21 + jpeg[-2:], "scans"
    yield "segments.jpg", jpeg[:2] + b"\xff\xe5\x00\x02" * 5000 + jpeg[2:], "segments"
    meta, _ = split_dicom(scans.file_bytes(scans.scan(syntax=DeflatedExplicitVRLittleEndian)))
    yield "deflated.dcm", meta + deflated(b"", 3300), "inflates"
    rle = struct.pack("<16I", 2, 64, 64 + 400_000, *[0] * 13) + b"\x81\0" * 400_000  # 51 MB
    yield "rle.dcm", scans.file_bytes(scans.scan(syntax=RLELossless, PixelData=encapsulate([rle]))), "exceed"
    large = encapsulate([encoded(np.zeros((3000, 3000), np.uint8), "JPEG")])
    data = scans.scan("DX", syntax=JPEGBaseline8Bit, PixelData=large, **EIGHT_BITS)
    yield "jpeg.dcm", scans.file_bytes(data), "differs"
    yield "stretched.dcm", scans.file_bytes(scans.scan(PixelSpacing=[1e-4, 10])), "max_megapixels"
