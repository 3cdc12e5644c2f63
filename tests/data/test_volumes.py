"""DICOM series and NIfTI volumes: equal images in every storage order, and errors that name the file."""

import gzip

import numpy as np
import pytest

pydicom = pytest.importorskip("pydicom")
nibabel = pytest.importorskip("nibabel")

import scans  # noqa: E402
from pydicom.pixels import apply_voi_lut  # noqa: E402
from scans import pixels_of, scan, windowed  # noqa: E402
from skimage import transform  # noqa: E402

from lungjax.data.imaging import dicom, nifti, volumes  # noqa: E402

WIDE = ((-350.0, 1300.0),)  # the full range of the body
XRAY = np.random.default_rng(0).integers(100, 4000, (9, 7), dtype=np.uint16)


def views(hu):
    """The middle axial, coronal and sagittal planes in radiological orientation."""
    z, y, x = (n // 2 for n in hu.shape)
    return {"axial": hu[z], "coronal": hu[::-1, y, :], "sagittal": hu[::-1, :, x]}


def sort(paths):
    return dicom.series([header for path in paths for header in dicom.headers(path)])


def picture(path, windows=WIDE):
    """The pixels of a single slice."""
    (header,) = dicom.headers(path)
    return pixels_of(dicom.picture(header, windows))


def middle_of_series(paths, plane):
    series = sort(paths)
    index = series.shape[volumes.PLANES[plane]] // 2
    if plane == series.plane:
        return pixels_of(dicom.picture(series.headers[index], WIDE))
    return pixels_of(dicom.cut(series.headers, series.step, plane, index, WIDE))


def middle_of_nifti(path, plane):
    return pixels_of(nifti.picture(path, plane, nifti.header(path).shape[volumes.PLANES[plane]] // 2, WIDE))


def test_series_in_any_storage_order(tmp_path):
    hu = scans.body()
    for stored in scans.STORED:
        paths = scans.series(tmp_path / stored, hu, stored=stored)
        for plane, expected in views(hu).items():
            np.testing.assert_array_equal(middle_of_series(paths, plane), windowed(expected), err_msg=stored + plane)
        assert sort(paths).plane == (stored if stored in volumes.PLANES else "axial")


def test_frames_of_an_enhanced_ct(tmp_path):
    hu = scans.body((7, 10, 8)) // 2 * 2
    for i, stored in enumerate(scans.STORED):
        path = scans.enhanced(tmp_path / f"{i}.dcm", hu, (2.0, 1.0, 1.0), stored, shared=i % 2 == 0, slope=1 + i % 2)
        headers = dicom.headers(path)
        assert [header.frame for header in headers] == list(range(len(headers)))
        assert headers[2].name == f"{path}#frame-0003" and sort([path]).plane in volumes.PLANES
        for plane, flat in views(hu).items():
            shape = (flat.shape[0] * (1 if plane == "axial" else 2), flat.shape[1])
            expected = transform.resize(flat.astype(float), shape, order=1, mode="edge", anti_aliasing=False)
            np.testing.assert_allclose(middle_of_series([path], plane), windowed(expected), atol=1, err_msg=stored)
    data = pydicom.dcmread(path)
    data.compress(pydicom.uid.RLELossless)
    for frame, header in zip(headers, dicom.headers(str(scans.save(data, tmp_path / "rle.dcm"))), strict=True):
        assert dicom.picture(frame, WIDE) == dicom.picture(header, WIDE)
    data.PerFrameFunctionalGroupsSequence = data.PerFrameFunctionalGroupsSequence[:-1]
    with pytest.raises(ValueError, match="NumberOfFrames"):
        dicom.headers(str(scans.save(data, tmp_path / "short.dcm")))


def test_nifti_in_any_axes(tmp_path):
    hu = scans.body()
    for axes in ("RAS", "LPS", "LAS", "PIR", "SAL"):
        path = scans.nifti(tmp_path / f"{axes}.nii.gz", hu, axes=axes)
        assert nifti.header(path).shape == hu.shape
        for plane, expected in views(hu).items():
            np.testing.assert_array_equal(middle_of_nifti(path, plane), windowed(expected), err_msg=axes + plane)


def test_square_pixels(tmp_path):
    hu, spacing = scans.body((12, 20, 16)), (2.5, 0.8, 0.5)
    paths = scans.series(tmp_path / "s", hu, spacing)
    path = scans.nifti(tmp_path / "n.nii", hu, spacing, axes="LPS")
    shapes = {"axial": (32, 16), "coronal": (60, 16), "sagittal": (38, 20)}  # 20*.8/.5, 12*2.5/.5, 12*2.5/.8
    for plane, flat in views(hu).items():
        result = middle_of_series(paths, plane)
        expected = transform.resize(flat.astype(float), shapes[plane], order=1, mode="edge", anti_aliasing=False)
        np.testing.assert_allclose(result, windowed(expected), atol=1)
        np.testing.assert_array_equal(middle_of_nifti(path, plane), result)


def test_nifti_units(tmp_path):
    for unit, factor in (("meter", 1e-3), ("micron", 1e3), ("unknown", 1.0)):
        spacing = tuple(v * factor for v in (2.5, 0.8, 0.7))
        path = scans.nifti(tmp_path / f"{unit}.nii", scans.body(), spacing, unit=unit)
        header = nifti.header(path)
        np.testing.assert_allclose(header.spacing, (2.5, 0.8, 0.7), rtol=1e-5)
        assert bool(header.notes) == (unit == "unknown")
        np.testing.assert_allclose(nifti.volume(path).spacing, header.spacing)


def test_rescale_padding_and_windows(tmp_path):
    hu = scans.body()[3]
    raw = (hu.astype(np.int32) * 2 - 200).astype(np.int16)  # hu = raw * 0.5 + 100
    raw[:2, :2] = -3000
    data = scans.dataset(raw, "CT", RescaleSlope="0.5", RescaleIntercept="100", PixelPaddingValue=-3000)
    path = str(scans.save(data, tmp_path / "a.dcm"))
    expected = hu.copy()
    expected[:2, :2] = -1000
    np.testing.assert_array_equal(picture(path), windowed(expected))
    three = ((-600.0, 1500.0), (40.0, 400.0), (-700.0, 500.0))
    result = picture(path, three)
    for channel, window in enumerate(three):
        np.testing.assert_array_equal(result[..., channel], windowed(expected, window))


def test_xray_window(tmp_path):
    for function in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        data = scans.dataset(XRAY, "DX", WindowCenter=["1800", "40"], WindowWidth=["900", "9"], VOILUTFunction=function)
        data.BitsStored, data.HighBit = 12, 11
        expected = apply_voi_lut(XRAY, data) / 4095 * 255
        for kind in ("MONOCHROME2", "MONOCHROME1"):
            data.PhotometricInterpretation = kind
            result = pixels_of(dicom.xray(str(scans.save(data, tmp_path / "a.dcm"))))
            np.testing.assert_allclose(result, expected if kind[-1] == "2" else 255 - expected, atol=0.51)


def test_xray_without_a_window(tmp_path):
    raw = XRAY.copy()
    raw[0] = 65535
    data = scans.dataset(raw, "CR", PixelPaddingValue=65535, PhotometricInterpretation="MONOCHROME1")
    result = pixels_of(dicom.xray(str(scans.save(data, tmp_path / "a.dcm"))))
    ends = [int(raw[1:].min()), int(raw[1:].max())]
    np.testing.assert_allclose(result[1:], np.interp(raw[1:], ends, [255, 0]), atol=0.51)
    assert (result[0] == 0).all()
    data = scans.dataset(XRAY, "DX")
    table = pydicom.Dataset()
    table.LUTDescriptor = [4096, 0, 10]
    table.LUTData = np.rint(1023 * (np.arange(4096) / 4095) ** 2).astype(np.uint16).tobytes()
    data.VOILUTSequence = [table]
    result = pixels_of(dicom.xray(str(scans.save(data, tmp_path / "a.dcm"))))
    np.testing.assert_allclose(result, 255 * (XRAY / 4095.0) ** 2, atol=0.7)


def test_single_compressed_slice_without_position(tmp_path):
    hu = scans.body()
    (path, *_) = scans.series(tmp_path, hu, ImageOrientationPatient=None, ImagePositionPatient=None)
    data = pydicom.dcmread(path)
    data.compress(pydicom.uid.RLELossless)
    scans.save(data, tmp_path / path)
    np.testing.assert_array_equal(picture(path), windowed(hu[0]))
    assert "single slice" in sort([path]).flaw


def test_inconsistent_series(tmp_path):
    for change, word in (
        ({"ImageOrientationPatient": [1, 0, 0, 0, 0, -1]}, r"IM0\d+.dcm and .*IM0\d+.dcm .*orientations"),
        ({"PixelSpacing": [1.0, 0.9]}, r"spacings, \(1.0, 1.0\) and \(1.0, 0.9\)"),
        ({"Rows": 5, "PixelData": bytes(80)}, "sizes"),
        ({"ImagePositionPatient": [-100, 50, 7]}, "position"),
        ({"ImagePositionPatient": None}, "no ImagePositionPatient"),
    ):
        with pytest.raises(ValueError, match=word):
            sort(scans.series(tmp_path, scans.body(), change={2: change}))


def test_flaws_of_series(tmp_path):
    gap = sort(scans.series(tmp_path / "gap", scans.body((9, 4, 4)), skip=(3, 4)))
    assert "about 2 missing slices" in gap.flaw and "missing" in gap.notes[0] and gap.step == 1
    change = {5: {"ImagePositionPatient": [-100, 50, 11.7]}}
    assert "uneven" in sort(scans.series(tmp_path / "uneven", scans.body(), change=change)).flaw
    change = {i: {"ImagePositionPatient": [-100, 50 + 0.3 * i, 7 + i]} for i in range(6)}
    tilted = sort(scans.series(tmp_path / "tilt", scans.body(), change=change))
    assert "tilted" in tilted.flaw and tilted.plane == "axial"


def compressed(syntax):
    data = scan(syntax=syntax, PixelData=pydicom.encaps.encapsulate([b"\xff\xd8\xff\xe0 no image"]))
    data["PixelData"].VR, data["PixelData"].is_undefined_length = "OB", True
    return data


def test_bad_dicom_files(tmp_path):
    pixel_errors = (
        (scan(PixelData=None), "pixels"),
        (scan(PixelData=bytes(20)), "truncated"),
        (compressed(pydicom.uid.JPEG2000Lossless), "pylibjpeg-openjpeg"),
    )
    header_errors = (
        (scan(PixelData=None, Rows=None), "pixels"),
        (scan(Modality="MR"), "MR"),
        (scan(NumberOfFrames=3), "functional groups"),
        (scan(RescaleIntercept=None), "RescaleIntercept"),
        (compressed(pydicom.uid.JPEGLSLossless), "pylibjpeg-libjpeg"),
        (scan(PixelSpacing=[0, 1]), "0 x 1"),
        (scan(ImagePositionPatient=[1, 2]), "ImagePositionPatient"),
        (scan(ImageOrientationPatient=[1, 0, 0, 1, 0, 0]), "unit vectors"),
        (compressed(pydicom.uid.MPEG2MPML), "uncompressed"),
    )
    for read, cases in ((picture, pixel_errors), (dicom.headers, header_errors)):
        for data, word in cases:
            path = str(scans.save(data, tmp_path / "bad.dcm"))
            with pytest.raises(ValueError, match=f"bad.dcm: .*{word}"):
                read(path)


def test_other_files(tmp_path):
    (tmp_path / "a.dcm").write_bytes(b"plain text" * 50)
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(b"plain text" * 50))
    for read, name, word in (
        (dicom.headers, "a.dcm", "not a DICOM"),
        (dicom.headers, "none.dcm", "no such file"),
        (nifti.header, "a.nii.gz", "not a readable NIfTI"),
        (nifti.header, "none.nii", "no such file"),
    ):
        with pytest.raises(ValueError, match=f"{name}: {word}"):
            read(str(tmp_path / name))


def test_bad_nifti_files(tmp_path):
    hu = scans.body()
    tiny = scans.nifti(tmp_path / "a.nii", hu, (1e-3, 1e-3, 1e-3))
    raw = bytearray((tmp_path / "a.nii").read_bytes())
    raw[123] = 8 + 5  # seconds, and an undefined code for the unit of length
    (tmp_path / "d.nii").write_bytes(raw)
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 4, 3), np.int16), np.eye(4)), tmp_path / "c.nii")
    gray = np.linspace(0, 255, hu.size).reshape(hu.shape)
    for read, path, word in (
        (nifti.header, tiny, "0.001 mm"),
        (nifti.header, scans.nifti(tmp_path / "b.nii", hu, (40.0, 1, 1), unit="unknown"), "unknown"),
        (nifti.header, str(tmp_path / "c.nii"), "4 x 4 x 4 x 3"),
        (nifti.header, str(tmp_path / "d.nii"), "unit|not a readable"),
        (nifti.volume, scans.nifti(tmp_path / "e.nii", gray, dtype=np.uint8), "windowed"),
        (nifti.volume, scans.nifti(tmp_path / "f.nii", hu + 1024), "air at -1000"),
    ):
        with pytest.raises(ValueError, match=word):
            read(path)


def test_nifti_nan_and_missing_orientation(tmp_path):
    hu = scans.body().astype(np.float32)
    hu[2, 3, 4] = np.nan
    path = scans.nifti(tmp_path / "a.nii", hu, dtype=np.float32, code=0)
    values = nifti.volume(path).hu
    assert values.min() == -1000 and (values == -1000).sum() == 2
    assert any("orientation" in note for note in nifti.header(path).notes)


def test_missing_package(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pydicom", None)
    with pytest.raises(ValueError, match=r"pip install -e '.\[dicom\]'"):
        dicom.headers(str(tmp_path / "a.dcm"))
