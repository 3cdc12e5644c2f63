"""Small scans for tests: an asymmetric body as a DICOM series and as NIfTI, in many storage orders."""

import io
from pathlib import Path

import nibabel
import numpy as np
import pydicom
from PIL import Image
from pydicom import uid

HU = (-2048, 1)  # intercept and slope
# Storage orders: axis and sign of z, y, x of the body for (slices, rows, columns).
STORED = {
    "head first": "+z+y+x", "foot first": "-z+y+x", "prone": "+z-y-x", "mirrored": "+z+y-x", "turned": "+z+x+y",
    "coronal": "+y-z+x", "sagittal": "-x-z+y",
}  # fmt: skip
VECTOR = {"x": np.array([1.0, 0, 0]), "y": np.array([0, 1.0, 0]), "z": np.array([0, 0, 1.0])}


def body(shape=(6, 10, 8)):
    """Smooth, asymmetric Hounsfield units, int16 [z, y, x]: foot to head, front to back, right to left."""
    z, y, x = np.meshgrid(*(np.linspace(0, 1, n) for n in shape), indexing="ij")
    hu = -1000 + 700 * z + 450 * y * y + 250 * x**3
    hu[0, 0, 0], hu[-1, -1, -1] = -1000, 300
    return np.rint(hu).astype(np.int16)


def pixels_of(data):
    """The pixels of an encoded image."""
    return np.asarray(Image.open(io.BytesIO(data)))


def windowed(hu, window=(-350.0, 1300.0)):
    """Hounsfield units as uint8; the default window (center, width) is the full range of the body."""
    center, width = window
    return np.rint(np.interp(hu, [center - width / 2, center + width / 2], [0, 255])).astype(np.uint8)


def dataset(pixels, modality, **tags):
    """One DICOM file with 16-bit pixels; tags that are None are omitted."""
    meta = pydicom.dataset.FileMetaDataset()
    kind = uid.CTImageStorage if modality == "CT" else uid.DigitalXRayImageStorageForPresentation
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = kind, uid.generate_uid()
    meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    data = pydicom.Dataset()
    data.file_meta = meta
    data.SOPClassUID, data.SOPInstanceUID = kind, meta.MediaStorageSOPInstanceUID
    data.PatientName, data.PatientID, data.PatientBirthDate = "Doe^Jane", "ID-4711", "19700101"
    data.StudyInstanceUID, data.SeriesInstanceUID = "1.2.3", "1.2.3.4"
    data.Modality, data.PhotometricInterpretation, data.SamplesPerPixel = modality, "MONOCHROME2", 1
    data.Rows, data.Columns = pixels.shape[:2]
    data.BitsAllocated, data.BitsStored, data.HighBit = 16, 16, 15
    data.PixelRepresentation = int(pixels.dtype.kind == "i")
    data.PixelData = pixels.tobytes()
    for name, value in tags.items():
        if value is None:
            data.pop(name, None)
        else:
            setattr(data, name, value)
    return data


def save(data, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, enforce_file_format=True)
    return path


def file_bytes(data):
    """Returns a data set as the content of a DICOM file."""
    buffer = io.BytesIO()
    data.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def scan(modality="CT", shape=(24, 32), syntax=None, **tags):
    """A data set with random pixels; with `syntax`, only the name of the transfer syntax changes."""
    pixels = np.random.default_rng(4).integers(0, 2000, shape).astype(np.uint16)
    rescale = {"RescaleSlope": 1, "RescaleIntercept": -1024} if modality == "CT" else {}
    data = dataset(pixels, modality, **(rescale | tags))
    data.file_meta.TransferSyntaxUID = syntax or data.file_meta.TransferSyntaxUID
    return data


def slices(hu, spacing, stored):
    """Yields the stored pixels and the tags of each slice of a body [z, y, x] with voxels of `spacing` mm."""
    signs, letters = STORED[stored][::2], STORED[stored][1::2]
    mm = dict(zip("zyx", spacing, strict=True))
    stack = np.transpose(hu, ["zyx".index(letter) for letter in letters])
    stack = stack[tuple(slice(None, None, -1 if sign == "-" else 1) for sign in signs)]
    steps = [VECTOR[c] * mm[c] * (-1 if s == "-" else 1) for s, c in zip(signs, letters, strict=True)]
    sides = {c: mm[c] * (hu.shape["zyx".index(c)] - 1) for c in letters}
    corner = sum(VECTOR[c] * sides[c] for s, c in zip(signs, letters, strict=True) if s == "-")
    for i, slice_of in enumerate(stack):
        tags = {
            "RescaleIntercept": HU[0],
            "RescaleSlope": HU[1],
            "PixelSpacing": [mm[letters[1]], mm[letters[2]]],
            "ImageOrientationPatient": [*np.sign(steps[2]), *np.sign(steps[1])],
            "ImagePositionPatient": list(np.asarray([-100.0, 50, 7]) + corner + i * steps[0]),
        }
        yield ((slice_of.astype(np.int32) - HU[0]) // HU[1]).astype(np.uint16), tags


def series(folder: Path, hu, spacing=(1.0, 1.0, 1.0), stored="head first", skip=(), change=None, suffix=".dcm", **tags):
    """Writes a body [z, y, x] with voxels of `spacing` mm as a series with random InstanceNumbers. Returns the paths.

    `change` maps the number of a slice to tags for that slice only.
    """
    numbers = np.random.default_rng(1).permutation(max(hu.shape))
    paths = []
    for i, (pixels, own) in enumerate(slices(hu, spacing, stored)):
        if i not in skip:
            own["InstanceNumber"] = int(numbers[i])
            data = dataset(pixels, "CT", **(own | tags | (change or {}).get(i, {})))
            paths.append(str(save(data, folder / f"IM{numbers[i]:04d}{suffix}")))
    return paths


def nested(values):
    """A data set from a dict; a nested dict becomes a sequence with one item."""
    data = pydicom.Dataset()
    for name, value in values.items():
        setattr(data, name, [nested(value)] if isinstance(value, dict) else value)
    return data


def enhanced(path, hu, spacing=(1.0, 1.0, 1.0), stored="head first", shared=True, slope=1, at=0, **tags):
    """Writes a body [z, y, x] as an enhanced CT, one frame per slice, in random order. Returns the path.

    Orientation, spacing and rescale are in the shared functional groups, or, if not `shared`, in those of each frame.
    The first frame is stored with `slope`; the body starts `at` mm above that of `series`.
    """
    frames, per_frame, stack = list(slices(hu, spacing, stored)), [], []
    for number, i in enumerate(np.random.default_rng(1).permutation(len(frames)).tolist(), 1):
        pixels, own = frames[i]
        factor = 1 if number > 1 else slope
        stack.append(pixels // factor)
        rescale = {"RescaleIntercept": HU[0], "RescaleSlope": HU[1] * factor, "RescaleType": "HU"}
        common = {
            "PixelMeasuresSequence": {"PixelSpacing": own["PixelSpacing"], "SliceThickness": 1},
            "PlaneOrientationSequence": {"ImageOrientationPatient": own["ImageOrientationPatient"]},
            "PixelValueTransformationSequence": rescale,
            "CTImageFrameTypeSequence": {"FrameType": ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]},
        }
        place = {
            "FrameContentSequence": {"StackID": "1", "InStackPositionNumber": number},
            "PlanePositionSequence": {"ImagePositionPatient": list(np.add(own["ImagePositionPatient"], (0, 0, at)))},
            "FrameVOILUTSequence": {"WindowCenter": -600, "WindowWidth": 1500},
        }
        per_frame.append(nested(place | ({} if shared else common)))
    data = dataset(np.stack(stack), "CT", NumberOfFrames=len(stack), ImageType=["ORIGINAL", "PRIMARY", "VOLUME"])
    data.Rows, data.Columns = stack[0].shape
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = uid.EnhancedCTImageStorage
    data.SharedFunctionalGroupsSequence = [nested(common if shared else {})]
    data.PerFrameFunctionalGroupsSequence = per_frame
    data.update(nested(tags))
    return str(save(data, path))


def nifti(path: Path, hu, spacing=(1.0, 1.0, 1.0), axes="RAS", unit="mm", dtype=np.int16, code=1):
    """Writes a body [z, y, x] as a NIfTI file whose array axes point towards `axes`, such as RAS or LPS."""
    path.parent.mkdir(parents=True, exist_ok=True)
    array = hu.transpose(2, 1, 0)[::-1, ::-1]  # x to the right, y to the front, z to the head
    affine = np.diag([spacing[2], spacing[1], spacing[0], 1.0])
    image = nibabel.Nifti1Image(array.astype(dtype), affine)
    start, end = (nibabel.orientations.axcodes2ornt(codes) for codes in ("RAS", axes))
    image = image.as_reoriented(nibabel.orientations.ornt_transform(start, end))
    image.header.set_xyzt_units(unit)
    image.set_sform(image.affine, code)
    image.set_qform(image.affine, code)
    nibabel.save(image, path)
    return str(path)
