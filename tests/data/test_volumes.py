"""DICOM series and NIfTI volumes: the same body, however it was stored, gives the same pictures; mistakes in words."""

import gzip
import io

import numpy as np
import pytest
from PIL import Image

pydicom = pytest.importorskip("pydicom")
nibabel = pytest.importorskip("nibabel")

import scans  # noqa: E402
from pydicom.pixels import apply_voi_lut  # noqa: E402
from skimage import transform  # noqa: E402

from lungjax.data.imaging import dicom, nifti, volumes  # noqa: E402

WIDE = ((-350.0, 1300.0),)  # all of the body


def pixels(data):
    return np.asarray(Image.open(io.BytesIO(data)))


def shown(hu, window=WIDE[0]):
    centre, width = window
    return np.rint(np.interp(hu, [centre - width / 2, centre + width / 2], [0, 255])).astype(np.uint8)


def views(hu):
    """What a radiologist sees of a body: the middle axial, coronal and sagittal plane."""
    z, y, x = (n // 2 for n in hu.shape)
    return {"axial": hu[z], "coronal": hu[::-1, y, :], "sagittal": hu[::-1, :, x]}


def from_series(paths, plane):
    series = dicom.series([dicom.header(path) for path in paths])
    index = volumes.middle_slice(series.shape[volumes.PLANES[plane]])
    ordered = tuple(header.path for header in series.headers)
    if plane == series.plane:
        return pixels(dicom.picture(ordered[index], WIDE))
    return pixels(dicom.cut(ordered, series.step, plane, index, WIDE))


@pytest.mark.parametrize("stored", scans.STORED)
def test_a_series_shows_the_same_however_it_was_stored(tmp_path, stored):
    hu = scans.body()
    paths = scans.series(tmp_path, hu, stored=stored)
    for plane, want in views(hu).items():
        np.testing.assert_array_equal(from_series(paths, plane), shown(want), err_msg=plane)
    native = "coronal" if stored == "coronal" else "sagittal" if stored == "sagittal" else "axial"
    assert dicom.series([dicom.header(path) for path in paths]).plane == native


@pytest.mark.parametrize("axes", ["RAS", "LPS", "LAS", "PIR", "SAL"])
def test_a_nifti_volume_shows_the_same_however_it_was_stored(tmp_path, axes):
    hu = scans.body()
    path = scans.nifti(tmp_path / "a.nii.gz", hu, axes=axes)
    assert nifti.header(path).shape == hu.shape
    for plane, want in views(hu).items():
        index = hu.shape[volumes.PLANES[plane]] // 2
        np.testing.assert_array_equal(pixels(nifti.picture(path, plane, index, WIDE)), shown(want), err_msg=plane)


def test_pixels_become_square(tmp_path):
    hu, spacing = scans.body((12, 20, 16)), (2.5, 0.8, 0.5)
    paths = scans.series(tmp_path / "s", hu, spacing)
    path = scans.nifti(tmp_path / "n.nii", hu, spacing, axes="LPS")
    want = {"axial": (32, 16), "coronal": (60, 16), "sagittal": (38, 20)}  # 20*.8/.5, 12*2.5/.5, 12*2.5/.8
    for plane, flat in views(hu).items():
        got = from_series(paths, plane)
        assert got.shape == want[plane], plane
        resized = transform.resize(flat.astype(float), want[plane], order=1, mode="edge", anti_aliasing=False)
        np.testing.assert_allclose(got, shown(resized), atol=1)
        index = hu.shape[volumes.PLANES[plane]] // 2
        np.testing.assert_array_equal(pixels(nifti.picture(path, plane, index, WIDE)), got)


@pytest.mark.parametrize(("unit", "scale"), [("meter", 1e-3), ("micron", 1e3), ("unknown", 1.0)])
def test_units_of_nifti_are_converted(tmp_path, unit, scale):
    path = scans.nifti(tmp_path / "a.nii", scans.body(), tuple(v * scale for v in (2.5, 0.8, 0.7)), unit=unit)
    header = nifti.header(path)
    np.testing.assert_allclose(header.spacing, (2.5, 0.8, 0.7), rtol=1e-5)
    assert bool(header.notes) == (unit == "unknown")
    np.testing.assert_allclose(nifti.volume(path).spacing, header.spacing)


def test_rescale_padding_and_signed_values(tmp_path):
    hu = scans.body()
    raw = (hu[3].astype(np.int32) * 2 - 200).astype(np.int16)  # hu = raw * 0.5 + 100
    raw[:2, :2] = -3000
    data = scans.dataset(raw, "CT", RescaleSlope="0.5", RescaleIntercept="100", PixelPaddingValue=-3000)
    path = scans.save(data, tmp_path / "a.dcm")
    want = hu[3].copy()
    want[:2, :2] = -1000
    np.testing.assert_array_equal(pixels(dicom.picture(str(path), WIDE)), shown(want))
    three = ((-600.0, 1500.0), (40.0, 400.0), (-700.0, 500.0))
    got = pixels(dicom.picture(str(path), three))
    for channel, window in enumerate(three):
        np.testing.assert_array_equal(got[..., channel], shown(want, window))


XRAY = np.random.default_rng(0).integers(100, 4000, (9, 7), dtype=np.uint16)


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_an_xray_is_shown_in_its_own_window(tmp_path, function):
    data = scans.dataset(XRAY, "DX", WindowCenter=["1800", "40"], WindowWidth=["900", "400"], VOILUTFunction=function)
    data.BitsStored, data.HighBit = 12, 11
    got = pixels(dicom.xray(str(scans.save(data, tmp_path / "a.dcm"))))
    np.testing.assert_allclose(got, apply_voi_lut(XRAY, data) / 4095 * 255, atol=0.51)
    data.PhotometricInterpretation = "MONOCHROME1"
    inverted = pixels(dicom.xray(str(scans.save(data, tmp_path / "b.dcm"))))
    np.testing.assert_allclose(inverted, 255 - apply_voi_lut(XRAY, data) / 4095 * 255, atol=0.51)


def test_an_xray_without_a_window_takes_its_range_without_padding(tmp_path):
    raw = XRAY.copy()
    raw[0] = 65535
    data = scans.dataset(raw, "CR", PixelPaddingValue=65535)
    low, high = int(raw[1:].min()), int(raw[1:].max())
    for kind, ends in (("MONOCHROME1", [255, 0]), ("MONOCHROME2", [0, 255])):
        data.PhotometricInterpretation = kind
        got = pixels(dicom.xray(str(scans.save(data, tmp_path / f"{kind}.dcm"))))
        np.testing.assert_allclose(got[1:], np.interp(raw[1:], [low, high], ends), atol=0.51)
        assert (got[0] == 0).all()


def test_an_xray_with_a_lookup_table_uses_it(tmp_path):
    data = scans.dataset(XRAY, "DX")
    table = pydicom.Dataset()
    table.LUTDescriptor = [4096, 0, 10]
    table.LUTData = np.rint(1023 * (np.arange(4096) / 4095) ** 2).astype(np.uint16).tobytes()
    data.VOILUTSequence = [table]
    got = pixels(dicom.xray(str(scans.save(data, tmp_path / "a.dcm"))))
    np.testing.assert_allclose(got, 255 * (XRAY / 4095.0) ** 2, atol=0.7)


def test_run_length_coding_is_read(tmp_path):
    hu = scans.body()
    plain = scans.series(tmp_path / "plain", hu)
    packed = [pydicom.dcmread(path) for path in plain]
    for i, data in enumerate(packed):
        data.compress(pydicom.uid.RLELossless)
        packed[i] = str(scans.save(data, tmp_path / f"rle/{i}.dcm"))
    np.testing.assert_array_equal(from_series(packed, "coronal"), from_series(plain, "coronal"))


def test_one_slice_without_a_position_is_shown_as_stored(tmp_path):
    hu = scans.body()
    (path, *_) = scans.series(tmp_path, hu, ImageOrientationPatient=None, ImagePositionPatient=None)
    np.testing.assert_array_equal(pixels(dicom.picture(path, WIDE)), shown(hu[0]))
    assert "single slice" in dicom.series([dicom.header(path)]).flaw


def test_a_volume_is_read_once_for_all_its_planes(tmp_path, monkeypatch):
    paths = scans.series(tmp_path, scans.body())
    read = []
    original = dicom._hu
    monkeypatch.setattr(dicom, "_hu", lambda path: read.append(path) or original(path))
    series = dicom.series([dicom.header(path) for path in paths])
    assert not read, "a header is read without its pixels"
    dicom.picture(paths[2], WIDE)
    assert read == [paths[2]], "an axial slice reads its own file alone"
    read.clear()
    ordered = tuple(header.path for header in series.headers)
    for index in range(series.shape[1]):
        dicom.cut(ordered, series.step, "coronal", index, WIDE)
    assert read == list(ordered)


MIXED = {
    "orientation": (
        {2: {"ImageOrientationPatient": [1, 0, 0, 0, 0, -1]}},
        r"IM0\d+.dcm and .*IM0\d+.dcm .*different orientations",
    ),
    "spacing": (
        {2: {"PixelSpacing": [1.0, 0.9]}},
        r"IM0\d+.dcm and .*IM0\d+.dcm .*pixel spacings, 1 x 1 and 1 x 0.9 mm",
    ),
    "size": ({2: {"Rows": 5, "PixelData": bytes(80)}}, "different sizes, 10 x 8 and 5 x 8"),
    "position": ({2: {"ImagePositionPatient": [-100, 50, 7]}}, "the same series and position"),
    "no position": ({2: {"ImagePositionPatient": None}}, "no ImagePositionPatient"),
}


@pytest.mark.parametrize("what", MIXED)
def test_a_series_that_is_no_stack_is_refused(tmp_path, what):
    change, words = MIXED[what]
    headers = [dicom.header(path) for path in scans.series(tmp_path, scans.body(), change=change)]
    with pytest.raises(ValueError, match=words):
        dicom.series(headers)


def test_gaps_uneven_steps_and_a_tilt_forbid_other_planes(tmp_path):
    gap = dicom.series([dicom.header(p) for p in scans.series(tmp_path / "gap", scans.body((9, 4, 4)), skip=(3, 4))])
    assert "about 2 missing slices" in gap.flaw and gap.notes == ("with missing slices",) and gap.step == 1
    change = {5: {"ImagePositionPatient": [-100, 50, 11.7]}}
    uneven = dicom.series([dicom.header(p) for p in scans.series(tmp_path / "uneven", scans.body(), change=change)])
    assert "uneven distances" in uneven.flaw
    change = {i: {"ImagePositionPatient": [-100, 50 + 0.3 * i, 7 + i]} for i in range(6)}
    tilted = dicom.series([dicom.header(p) for p in scans.series(tmp_path / "tilt", scans.body(), change=change)])
    assert "tilted gantry" in tilted.flaw and tilted.plane == "axial"


def ct(**tags):
    return scans.dataset(np.zeros((4, 4), np.uint16), "CT", **({"RescaleSlope": 1, "RescaleIntercept": 0} | tags))


def squeezed(syntax):
    data = ct(PixelData=pydicom.encaps.encapsulate([b"\xff\xd8\xff\xe0 no picture"]))
    data.file_meta.TransferSyntaxUID = syntax
    data["PixelData"].VR, data["PixelData"].is_undefined_length = "OB", True
    return data


BAD_FILES = {
    "no pixels": (lambda: ct(PixelData=None), "a DICOM file without pixels"),
    "no rows": (lambda: ct(PixelData=None, Rows=None), "a DICOM file without pixels"),
    "short": (lambda: ct(PixelData=bytes(20)), "can't be decoded .*may be truncated"),
    "magnet": (lambda: ct(Modality="MR"), "modality MR; allowed are CT and the X-rays CR, DX, RG"),
    "frames": (lambda: ct(NumberOfFrames=3), "several frames in one file"),
    "no rescale": (lambda: ct(RescaleIntercept=None), "without RescaleSlope and RescaleIntercept"),
    "lossless": (lambda: squeezed(pydicom.uid.JPEGLSLossless), "JPEG-LS.* pip install pylibjpeg pylibjpeg-libjpeg"),
    "damaged": (lambda: squeezed(pydicom.uid.JPEG2000Lossless), "can't be decoded .*pylibjpeg pylibjpeg-openjpeg"),
    "flat spacing": (lambda: ct(PixelSpacing=[0, 1]), "a PixelSpacing of 0 x 1 mm"),
    "short position": (lambda: ct(ImagePositionPatient=[1, 2]), r"ImagePositionPatient has the values \(1.0, 2.0\)"),
    "oblique": (lambda: ct(ImageOrientationPatient=[1, 0, 0, 1, 0, 0]), "not two unit vectors at a right angle"),
    "film": (lambda: squeezed(pydicom.uid.MPEG2MPML), "no package decodes that"),
}


@pytest.mark.parametrize("what", BAD_FILES)
def test_a_dicom_file_that_cannot_be_used_is_named(tmp_path, what):
    make, words = BAD_FILES[what]
    path = str(scans.save(make(), tmp_path / "bad.dcm"))
    seen_in_the_header = what not in ("no pixels", "short", "damaged")
    with pytest.raises(ValueError, match=f"bad.dcm: .*{words}"):
        dicom.header(path) if seen_in_the_header else dicom.picture(path, WIDE)


def test_files_that_are_no_dicom_or_nifti_are_named(tmp_path):
    (tmp_path / "a.dcm").write_bytes(b"plain text" * 50)
    with pytest.raises(ValueError, match=r"a.dcm: no DICOM file"):
        dicom.header(str(tmp_path / "a.dcm"))
    with pytest.raises(ValueError, match=r"none.dcm: no such file"):
        dicom.header(str(tmp_path / "none.dcm"))
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(b"plain text" * 50))
    for name, words in (("a.nii.gz", "no NIfTI file that can be read"), ("none.nii", "no such file")):
        with pytest.raises(ValueError, match=words):
            nifti.header(str(tmp_path / name))
    whole = scans.nifti(tmp_path / "b.nii.gz", scans.body())
    data = (tmp_path / "b.nii.gz").read_bytes()
    (tmp_path / "b.nii.gz").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"b.nii.gz: (a damaged|no NIfTI)"):
        nifti.picture(whole, "axial", 0, WIDE)


def test_nifti_with_wrong_units_dimensions_or_values_is_refused(tmp_path):
    hu = scans.body()
    with pytest.raises(ValueError, match=r"a.nii: voxels of 0.001 x 0.001 x 0.001 mm"):
        nifti.header(scans.nifti(tmp_path / "a.nii", hu, (1e-3, 1e-3, 1e-3)))
    with pytest.raises(ValueError, match="unit in the file: unknown"):
        nifti.header(scans.nifti(tmp_path / "b.nii", hu, (40.0, 1, 1), unit="unknown"))
    image = nibabel.Nifti1Image(np.zeros((4, 4, 4, 3), np.int16), np.eye(4))
    nibabel.save(image, tmp_path / "c.nii")
    with pytest.raises(ValueError, match="4 x 4 x 4 x 3 voxels, wanted one volume with three dimensions"):
        nifti.header(str(tmp_path / "c.nii"))
    raw = bytearray((tmp_path / "a.nii").read_bytes())
    raw[123] = 8 + 5  # seconds, and a code of length that does not exist
    (tmp_path / "d.nii").write_bytes(raw)
    with pytest.raises(ValueError, match=r"d.nii: (the unit of length is code|no NIfTI file)"):
        nifti.header(str(tmp_path / "d.nii"))
    gray = np.linspace(0, 255, hu.size).reshape(hu.shape)
    with pytest.raises(ValueError, match=r"e.nii: its values are 0 to 255, .*windowed already"):
        nifti.volume(scans.nifti(tmp_path / "e.nii", gray, dtype=np.uint8))
    with pytest.raises(ValueError, match=r"values are 24 to 1\d+, .*air at -1000"):
        nifti.volume(scans.nifti(tmp_path / "f.nii", hu + 1024))


def test_nan_in_nifti_is_air_and_a_lacking_orientation_is_told(tmp_path):
    hu = scans.body().astype(np.float32)
    hu[2, 3, 4] = np.nan
    path = scans.nifti(tmp_path / "a.nii", hu, dtype=np.float32, code=0)
    assert nifti.volume(path).hu.min() == -1000 and (nifti.volume(path).hu == -1000).sum() == 2
    assert any("without an orientation" in note for note in nifti.header(path).notes)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("axail", "all", WIDE), "--plane=axail: the nearest: axial"),
        (("axial", "middle", WIDE), "--position=middle: the nearest: mid"),
        (("axial", "all", WIDE * 2), "one .* or three"),
        (("axial", "all", ((40.0, 0.0),)), "width above 0"),
    ],
)
def test_options_that_cannot_be_followed_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        volumes.check_options(*options)


def test_pseudonyms_need_the_salt():
    known = volumes.pseudonym("ID-4711", "secret")
    assert (
        len(known) == 12 and set(known) <= set("0123456789abcdef") and known == volumes.pseudonym("ID-4711", "secret")
    )
    names = {volumes.pseudonym("ID-4711", salt) for salt in ("", "secret", "x" * 100, "x" * 101)}
    assert len(names | {volumes.pseudonym("ID-4712", "secret")}) == 5


def test_a_package_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pydicom", None)
    with pytest.raises(ValueError, match=r"DICOM files need the package pydicom.*pip install 'lungjax\[dicom\]'"):
        dicom.header(str(tmp_path / "a.dcm"))
