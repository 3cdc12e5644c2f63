"""DICOM and NIfTI in the layouts of `folder`: what is listed, what is kept of the person, what is refused."""

import io
import os
import pickle

import numpy as np
import pytest
from PIL import Image

pydicom = pytest.importorskip("pydicom")
pytest.importorskip("nibabel")

import scans  # noqa: E402

from lungjax import datasets  # noqa: E402
from lungjax.data.imaging import volumes  # noqa: E402
from lungjax.datasets import PrepareOptions, folder  # noqa: E402

WIDE = ((-350.0, 1300.0),)


def listing(root, **options):
    return folder.listing(root, "default", PrepareOptions(**({"salt": "secret", "hu_windows": WIDE} | options)))


def pixels(example):
    """Through a pickle, as a process that prepares images gets it."""
    return np.asarray(Image.open(io.BytesIO(pickle.loads(pickle.dumps(example.image))())))


def shown(hu):
    return np.rint(np.interp(hu, [-1000, 300], [0, 255])).astype(np.uint8)


def uids(i, patient):
    return {"SeriesInstanceUID": f"1.2.{i}", "StudyInstanceUID": f"1.3.{i}", "PatientID": patient}


def class_folders(root, count=4, hu=None):
    """`count` series in each of two classes, in folders that carry the patient's name; two series a patient."""
    hu = scans.body() if hu is None else hu
    for i in range(2 * count):
        where = root / "ab"[i % 2] / f"Doe^Jane {i}" / "CT"
        scans.series(where, hu + i, suffix="" if i == 3 else ".dcm", **uids(i, f"ID-{i // 4}"))
    return hu


def test_series_in_class_folders_become_slices_in_the_order_of_the_body(tmp_path):
    hu = class_folders(tmp_path)
    (tmp_path / "a/notes.txt").write_text("left out")
    (tmp_path / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    found = listing(tmp_path)
    assert found.classes == ("a", "b") and len(found.examples) == 8 * 6 and found.body and found.study == ""
    for i in range(8):
        name = f"series-{volumes.pseudonym(f'1.2.{i}', 'secret')}"
        slices = [e for e in found.examples if e.file.startswith(name)]
        assert [e.file for e in slices] == [f"{name}/{k:04d}" for k in range(6)]
        assert {e.label for e in slices} == {i % 2}
        assert {e.group for e in slices} == {volumes.pseudonym(f"ID-{i // 4}", "secret")}
        for example, want in zip(slices, hu + i, strict=True):
            np.testing.assert_array_equal(pixels(example), shown(want))
    assert len({(e.group, e.split) for e in found.examples}) == len({e.group for e in found.examples}) == 2
    assert "8 CT series from DICOM files" in found.notes and "2 files that are no images were left out" in found.notes
    assert "48 axial pictures of CT volumes, window -350 +/- 650 Hounsfield units" in found.notes


def test_planes_and_positions(tmp_path):
    hu = class_folders(tmp_path, count=1)
    middle = listing(tmp_path, plane="coronal", position="mid")
    assert len(middle.examples) == 2 and not middle.body
    assert [e.file.rpartition("/")[2] for e in middle.examples] == ["coronal-0005"] * 2
    np.testing.assert_array_equal(pixels(middle.examples[0]), shown(hu[::-1, 5]))
    assert len(listing(tmp_path, plane="sagittal").examples) == 2 * 8
    (first, _) = listing(tmp_path, position="mid").examples
    assert first.file.endswith("/0003")
    np.testing.assert_array_equal(pixels(first), shown(hu[3]))
    with pytest.raises(ValueError, match="--plane=coronel: the nearest: coronal"):
        listing(tmp_path, plane="coronel")


def test_a_table_names_folders_volumes_and_single_slices(tmp_path):
    hu = scans.body()
    scans.series(tmp_path / "one", hu, **uids(1, "P1"))
    scans.series(tmp_path / "two/x", hu, **uids(2, "P2"))
    scans.nifti(tmp_path / "two/y.nii.gz", hu)
    scans.nifti(tmp_path / "n.nii", hu, axes="LPS")
    slices = scans.series(tmp_path / "slices", hu, **uids(3, "P3"))
    scans.save(scans.dataset(np.arange(12, dtype=np.uint16).reshape(3, 4), "DX", PatientID="P4"), tmp_path / "x.dcm")
    Image.fromarray(np.zeros((3, 3), np.uint8)).save(tmp_path / "i.png")
    lines = ["one,a,train,,s", "two,b,val,g2,s", "n.nii,a,test,,s", "x.dcm,b,train,,t", "i.png,a,train,,t"]
    lines += [f"slices/{path.rpartition('/')[2]},{'ab'[i % 2]},train,,s" for i, path in enumerate(slices)]
    (tmp_path / "labels.csv").write_text("path,label,split,group,source\n" + "\n".join(lines))
    found = listing(tmp_path)
    assert found.study == "the splits as they were given" and not found.body
    files = [e.file for e in found.examples]
    assert len(files) == len(set(files)) == 6 + 2 * 6 + 6 + 1 + 1 + 6
    by_where = {}
    for example in found.examples:
        by_where.setdefault(example.where, []).append(example)
        assert example.study == example.split
    one, two, n, xray, image, *single = (by_where[f"labels.csv line {i}"] for i in range(2, 13))
    assert {e.group for e in one} == {volumes.pseudonym("P1", "secret")} and {e.source for e in one} == {"s"}
    assert {e.group for e in two} == {"g2"} and {e.split for e in two} == {"val"}
    assert {e.file.rpartition("/")[0] for e in two} >= {"two/y.nii.gz"}
    assert {e.group for e in n} == {"n.nii"} and n[2].file == "n.nii/0002"
    np.testing.assert_array_equal(pixels(n[2]), shown(hu[2]))
    np.testing.assert_array_equal(pixels(xray[0]), np.rint(np.arange(12).reshape(3, 4) / 11 * 255))
    assert xray[0].file.startswith("image-") and image[0].file == "i.png"
    for i, (example,) in enumerate(single):  # each slice has its own label, and is numbered in its series
        assert example.label == i % 2 and example.file.endswith(f"/{i:04d}")
        np.testing.assert_array_equal(pixels(example), shown(hu[i]))
    with pytest.raises(ValueError, match="several labels"):
        listing(tmp_path, plane="coronal").examples[0].image()


def test_nothing_of_the_person_is_kept(tmp_path):
    class_folders(tmp_path / "in")
    for i in range(2):
        data = scans.dataset(np.arange(12, dtype=np.uint16).reshape(3, 4) + i, "CR", PatientID=f"ID-{i}")
        scans.save(data, tmp_path / "in" / "ab"[i] / f"Doe^Jane ID-{i}.dcm")
    found = listing(tmp_path / "in")
    kept = [(e.file, e.group, e.source, e.extra, e.where) for e in found.examples]
    text = f"{kept} {found.notes} {found.classes}"
    for secret in ("Doe", "Jane", "ID-", "1970", "1.2.", "IM0"):
        assert secret not in text, secret
    other = listing(tmp_path / "in", salt="other")
    assert {e.group for e in other.examples}.isdisjoint(e.group for e in found.examples)


def test_listing_reads_headers_alone(tmp_path, monkeypatch):
    class_folders(tmp_path, count=1)
    original = pydicom.dcmread

    def header_only(path, **how):
        assert how.get("stop_before_pixels") and how.get("specific_tags")
        return original(path, **how)

    monkeypatch.setattr(pydicom, "dcmread", header_only)
    assert len(listing(tmp_path).examples) == len(listing(tmp_path, plane="coronal", position="mid").examples) * 6


def test_what_is_no_picture_of_the_patient_is_left_out(tmp_path):
    class_folders(tmp_path, count=1)
    blank = np.zeros((4, 4), np.uint16)
    for i, tags in enumerate(
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, {"Modality": "SR"}, {"Modality": "PR"})
    ):
        scans.save(scans.dataset(blank, "CT", SeriesInstanceUID=f"9.{i}", **tags), tmp_path / f"a/{i}.dcm")
    found = listing(tmp_path)
    assert len(found.examples) == 12
    assert {"1 DICOM files left out: localizers", "1 DICOM files left out: SR objects"} <= set(found.notes)


def test_bad_files_and_series_come_first_and_say_why(tmp_path):
    class_folders(tmp_path, count=1)
    hu = scans.body()
    scans.series(
        tmp_path / "a/turned", hu, change={2: {"ImageOrientationPatient": [1, 0, 0, 0, 0, -1]}}, **uids(8, "Q")
    )
    scans.save(scans.dataset(hu[0].astype(np.uint16), "MR"), tmp_path / "b/mr.dcm")
    scans.nifti(tmp_path / "b/units.nii", hu, (1e-3, 1, 1))
    for name in "cd":
        data = scans.dataset(hu[0].astype(np.uint16), "DX", SOPInstanceUID="7.7")
        scans.save(data, tmp_path / f"a/copy_{name}.dcm")
    found = listing(tmp_path)
    wants = ["modality MR", "different orientations", "voxels of", "has the SOPInstanceUID of .*copy_c.dcm"]
    bad, good = found.examples[:4], found.examples[4:]
    said = []
    for example in bad:
        with pytest.raises(ValueError) as error:
            example.image()
        said.append(str(error.value))
    for words in wants:
        assert sum(bool(__import__("re").search(words, text)) for text in said) == 1, words
    assert len(good) == 13 and all(pixels(e).ndim == 2 for e in good)


def test_a_gap_is_noted_and_refused_where_it_would_show(tmp_path):
    class_folders(tmp_path, count=1)
    scans.series(tmp_path / "a/gap", scans.body((9, 10, 8)), skip=(4,), **uids(8, "Q"))
    name = f"series-{volumes.pseudonym('1.2.8', 'secret')}"
    assert f"1 CT series with missing slices, such as {name}" in listing(tmp_path).notes
    first = listing(tmp_path, plane="coronal").examples[0]
    assert first.file == name
    with pytest.raises(ValueError, match="no coronal plane can be cut, about 1 missing slices"):
        first.image()


TABLES = {
    "empty folder": ("path,label\nempty,a\na,b\n", {}, "line 2: the folder empty holds no DICOM file"),
    "volume twice": ("path,label\na,a\na/n.nii,b\n", {}, "a/n.nii is named by another line too"),
    "pattern and column": ("path,label,group\na,a,g\n", {"group_pattern": "(a)"}, "already has a column group"),
}


@pytest.mark.parametrize("what", TABLES)
def test_a_table_that_cannot_be_followed_is_named(tmp_path, what):
    text, options, words = TABLES[what]
    scans.nifti(tmp_path / "a/n.nii", scans.body())
    (tmp_path / "empty").mkdir()
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(ValueError, match=words):
        listing(tmp_path, **options)


def test_a_volume_takes_no_box(tmp_path):
    scans.nifti(tmp_path / "n.nii", scans.body())
    scans.series(tmp_path / "s", scans.body())
    (tmp_path / "labels.csv").write_text("path,label,xmin,ymin,xmax,ymax\nn.nii,a,0,0,2,2\ns,b,0,0,2,2\n")
    for example in listing(tmp_path).examples:
        with pytest.raises(ValueError, match="no box can be given for it"):
            example.image()


def test_damaged_dicom_header_can_be_skipped(tmp_path):
    rng, paths = np.random.default_rng(0), []
    for i in range(8):
        place = tmp_path / "in" / ("train", "train", "val", "test")[i // 2] / "ab"[i % 2] / str(i)
        paths += scans.series(place, rng.integers(-1000, 300, (2, 10, 8), np.int16), **uids(i, f"ID-{i}"))
    with open(paths[0], "rb") as file:
        data = file.read()
    with open(paths[0], "wb") as file:
        file.write(data.replace(b"\x08\x00\x60\x00CS", b"\x08\x00\x60\x00CQ"))
    how = {"source": tmp_path / "in", "data_dir": tmp_path / "data", "options": PrepareOptions(salt="s"), "quiet": True}
    with pytest.raises(ValueError, match=os.path.basename(paths[0])):
        datasets.write("folder/x-12x16", **how)
    skipped = datasets.write("folder/x-12x16", on_bad_image="skip", **how)["skipped"]
    assert len(skipped) == 1 and os.path.basename(paths[0]) in skipped[0]
    assert len(datasets.open_dataset("folder/x-12x16", tmp_path / "data").records) == 15


def test_prepared_volumes_open_and_bad_ones_can_be_skipped(tmp_path):
    rng = np.random.default_rng(0)
    scans_of = {}
    for i in range(12):
        split = ("train", "train", "val", "test")[i // 2 % 4]
        hu = rng.integers(-1000, 300, (6, 10, 8), dtype=np.int16)
        scans.series(tmp_path / "in" / split / "ab"[i % 2] / f"Doe^Jane {i}", hu, **uids(i, f"ID-{i}"))
        scans_of[f"series-{volumes.pseudonym(f'1.2.{i}', 'secret')}/coronal-0005"] = hu[::-1, 5]
    scans.save(scans.dataset(np.zeros((4, 4), np.uint16), "MR"), tmp_path / "in/train/b/mr.dcm")
    options = PrepareOptions(
        salt="secret", hu_windows=(*WIDE, (40.0, 400.0), (-600.0, 1500.0)), plane="coronal", position="mid"
    )
    how = {"source": tmp_path / "in", "data_dir": tmp_path / "data", "options": options, "quiet": True}
    with pytest.raises(ValueError, match=r"mr.dcm: modality MR.*--on_bad_image=skip"):
        datasets.write("folder/x-12x16", **how)
    result = datasets.write("folder/x-12x16", on_bad_image="skip", **how)
    assert len(result["skipped"]) == 1 and "mr.dcm" in result["skipped"][0]
    data = datasets.open_dataset("folder/x-12x16", tmp_path / "data")
    assert set(data.columns["file"].tolist()) == set(scans_of)
    for file, record in zip(data.columns["file"].tolist(), data.records, strict=True):
        image = np.asarray(Image.open(io.BytesIO(record["image"])))
        assert image.shape == (12, 16, 3)
        want = Image.fromarray(shown(scans_of[file])).resize((16, 12), Image.Resampling.BILINEAR)
        np.testing.assert_allclose(image[..., 0].astype(int), np.asarray(want).astype(int), atol=1)
    kept = [path for path in (tmp_path / "data/folder").rglob("*") if path.is_file()]
    assert kept and not [path for path in kept if b"Doe" in path.read_bytes() or b"ID-" in path.read_bytes()]


def test_real_volume(shared, tmp_path):
    """50 real slices as DICOM and as NIfTI: axial slices come back as they were, coronal cuts agree."""
    files = sorted((shared / "data/covidx_ct_volume").glob("*.jpg"))
    gray = np.stack([np.asarray(Image.open(file).convert("L").resize((256, 256))) for file in files])[::-1]
    hu = np.rint(gray / 255 * 1500 - 1350).astype(np.int16)  # the lung window, undone
    scans.series(tmp_path / "a/dicom", hu, (6.0, 1.4, 1.4))
    scans.nifti(tmp_path / "b/scan.nii", hu, (6.0, 1.4, 1.4), axes="LPS")
    lung = {"hu_windows": ((-600.0, 1500.0),)}
    slices = [e for e in listing(tmp_path, **lung).examples if e.label == 0]
    assert len(slices) == len(files)
    np.testing.assert_allclose(pixels(slices[20]).astype(int), gray[20], atol=1)
    one, other = listing(tmp_path, plane="coronal", position="mid", **lung).examples
    picture = pixels(one)
    assert picture.shape == (round(50 * 6.0 / 1.4), 256)
    np.testing.assert_array_equal(picture, pixels(other))
    # Head up: lungs and windpipe are above, the liver below.
    dark = picture[:, 70:186] < 100
    assert dark[:50].mean() > 3 * dark[-50:].mean()
    # The patient's right on the left: the liver, below on the left, leaves lung on the right.
    assert dark[-60:, :58].mean() < dark[-60:, 58:].mean()
