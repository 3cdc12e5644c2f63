"""DICOM and NIfTI files in a user's folder: examples, pseudonyms and errors."""

import pickle
import re
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("pydicom")
pytest.importorskip("nibabel")

import commands
import pydicom
import scans
from scans import windowed

from lungjax import datasets, prepare
from lungjax.data import duplicates
from lungjax.data.imaging import dicom, volumes
from lungjax.datasets import PrepareOptions, folder
from lungjax.datasets.build import writer

WIDE = ((-350.0, 1300.0),)


def listing(root, **options):
    return folder.listing(root, "default", PrepareOptions(**({"salt": "secret", "hu_windows": WIDE} | options)))


def pixels(example):
    """The pixels of an example after pickling, as in a worker process."""
    return scans.pixels_of(pickle.loads(pickle.dumps(example.image))())


def pseudonym(name):
    return volumes.pseudonym(name, "secret")


def uids(i, patient):
    return {"SeriesInstanceUID": f"1.2.{i}", "StudyInstanceUID": f"1.3.{i}", "PatientID": patient}


def class_folders(root, count=1):
    """Writes `count` series of each of two classes into folders with the patient's name, four series per patient."""
    hu = scans.body()
    for i in range(2 * count):
        where = root / "ab"[i % 2] / f"Doe^Jane {i}" / "CT"
        scans.series(where, hu + i, suffix="" if i == 3 else ".dcm", **uids(i, f"ID-{i // 4}"))
    return hu


def test_series_in_class_folders(tmp_path):
    hu = class_folders(tmp_path, count=4)
    (tmp_path / "a/notes.txt").write_text("left out")
    (tmp_path / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    for i, tags in enumerate(({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, {"Modality": "SR"})):
        data = scans.dataset(np.zeros((4, 4), np.uint16), "CT", SeriesInstanceUID=f"9.{i}", **tags)
        scans.save(data, tmp_path / f"a/{i}.dcm")
    result = listing(tmp_path)
    assert result.classes == ("a", "b") and len(result.examples) == 8 * 6 and result.body and result.study == ""
    for i in range(8):
        name = f"series-{pseudonym(f'1.2.{i}')}"
        slices = [e for e in result.examples if e.file.startswith(name)]
        assert [e.file for e in slices] == [f"{name}/{k:04d}" for k in range(6)]
        assert {(e.label, e.group) for e in slices} == {(i % 2, pseudonym(f"ID-{i // 4}"))}
        for example, expected in zip(slices, hu + i, strict=True):
            np.testing.assert_array_equal(pixels(example), windowed(expected))
    assert len({(e.group, e.split) for e in result.examples}) == len({e.group for e in result.examples}) == 2
    assert {e.group for e in listing(tmp_path, salt="other").examples}.isdisjoint(e.group for e in result.examples)
    index = [(e.file, e.group, e.source, e.extra, e.where) for e in result.examples]
    assert not re.search(r"Doe|Jane|ID-|1970|1\.2\.|IM0", f"{index} {result.notes}")  # no personal data
    for example in (*result.examples, *listing(tmp_path, plane="coronal").examples):
        assert not re.search(rb"ID-|1\.2\.", pickle.dumps(example.image))
    notes = ("8 CT series", "2 files that are not images", "48 axial images from CT volumes, window -350 +/- 650")
    for note in (*notes, "1 DICOM files skipped: localizers", "1 DICOM files skipped: SR objects"):
        assert any(line.startswith(note) for line in result.notes)


def test_planes_and_positions(tmp_path):
    hu = class_folders(tmp_path)
    coronal = listing(tmp_path, plane="coronal")
    assert not coronal.body and coronal.modality == "ct"
    assert len(listing(tmp_path, plane="sagittal").examples) == 2 * 8
    (first, _) = listing(tmp_path, position="mid").examples
    assert first.file.endswith("/0003")
    np.testing.assert_array_equal(pixels(first), windowed(hu[3]))
    scans.series(tmp_path / "a/gap", scans.body((9, 10, 8)), skip=(4,), **uids(8, "Q"))
    assert any("missing slices" in note and pseudonym("1.2.8") in note for note in listing(tmp_path).notes)
    with pytest.raises(ValueError, match="no coronal plane"):
        listing(tmp_path, plane="coronal").examples[0].image()


def test_enhanced_ct(tmp_path):
    """One series in two files, and another in one file."""
    hu = scans.body((6, 10, 8))
    for name, part, at, uid in (("1", hu[:4], 0, "1.2.1"), ("2", hu[4:], 4, "1.2.1"), ("3", hu + 1, 0, "1.2.3")):
        path = tmp_path / f"{'ab'[name == '3']}/{name}.dcm"
        scans.enhanced(path, part, at=at, SeriesInstanceUID=uid, PatientID=f"ID-{uid}")
    for plane, prefix, shown in (("axial", "", hu), ("coronal", "coronal-", hu[::-1].swapaxes(0, 1))):
        examples = listing(tmp_path, plane=plane).examples
        for label, uid in enumerate(("1.2.1", "1.2.3")):
            own = [example for example in examples if example.label == label]
            names = [f"series-{pseudonym(uid)}/{prefix}{i:04d}" for i in range(len(shown))]
            assert [example.file for example in own] == names
            assert {example.group for example in own} == {pseudonym(f"ID-{uid}")}
            for example, expected in zip(own, shown + label, strict=True):
                np.testing.assert_array_equal(pixels(example), windowed(expected))


def test_table_of_folders_volumes_and_slices(tmp_path):
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
    result = listing(tmp_path)
    assert result.study and result.modality == "" and not result.body
    assert len(result.examples) == 6 + 2 * 6 + 6 + 1 + 1 + 6
    by_line = {}
    for example in result.examples:
        by_line.setdefault(example.where, []).append(example)
        assert example.study == example.split
    one, two, n, xray, image, *single = (by_line[f"labels.csv line {i}"] for i in range(2, 13))
    assert {(e.group, e.source) for e in one} == {(pseudonym("P1"), "s")}
    assert {(e.group, e.split) for e in two} == {("g2", "val")}
    assert "two/y.nii.gz" in {e.file.rpartition("/")[0] for e in two}
    assert {e.group for e in n} == {"n.nii"} and n[2].file == "n.nii/0002"
    np.testing.assert_array_equal(pixels(n[2]), windowed(hu[2]))
    np.testing.assert_array_equal(pixels(xray[0]), np.rint(np.arange(12).reshape(3, 4) / 11 * 255))
    assert xray[0].file.startswith("image-") and image[0].file == "i.png"
    for i, (example,) in enumerate(single):  # each slice has its own label and its number in the series
        assert example.label == i % 2 and example.file.endswith(f"/{i:04d}")
        np.testing.assert_array_equal(pixels(example), windowed(hu[i]))
    with pytest.raises(ValueError, match="several labels"):
        listing(tmp_path, plane="coronal").examples[0].image()


def test_bad_files_and_series(tmp_path):
    class_folders(tmp_path)
    hu = scans.body()
    change = {2: {"ImageOrientationPatient": [1, 0, 0, 0, 0, -1]}}
    scans.series(tmp_path / "a/turned", hu, change=change, **uids(8, "Q"))
    scans.save(scans.dataset(hu[0].astype(np.uint16), "MR"), tmp_path / "b/mr.dcm")
    scans.nifti(tmp_path / "b/units.nii", hu, (1e-3, 1, 1))
    for name in "cd":
        data = scans.dataset(hu[0].astype(np.uint16), "DX", SOPInstanceUID="7.7")
        scans.save(data, tmp_path / f"a/copy_{name}.dcm")
    examples = listing(tmp_path).examples
    messages = []
    for example in examples[:4]:
        with pytest.raises(ValueError) as error:
            example.image()
        messages.append(str(error.value))
    for word in ("modality MR", "different orientations", "voxels of", "SOPInstanceUID as .*copy_c.dcm"):
        assert sum(bool(re.search(word, text)) for text in messages) == 1, word
    assert len(examples) == 17 and all(pixels(e).ndim == 2 for e in examples[4:])


def test_lookup(tmp_path, monkeypatch, capsys):
    hu = class_folders(tmp_path / "in", count=2)
    scans.enhanced(tmp_path / "in/a/e.dcm", hu, **uids(9, "ID-9"))
    scans.save(scans.dataset(hu[0].astype(np.uint16), "DX", PatientID="ID-8"), tmp_path / "in/b/x.dcm")
    command = [f"--source={tmp_path / 'in'}", f"--data_dir={tmp_path / 'data'}"]
    assert commands.run(prepare, *command, "--lookup=series-1/0000") == 2 and ".patient_salt" in capsys.readouterr().err
    options = PrepareOptions(position="mid", modality="xray")  # overrides the mixture of CT and X-ray
    datasets.write("folder", tmp_path / "in", tmp_path / "data", options, quiet=True)
    assert (tmp_path / "data/.patient_salt").stat().st_mode & 0o777 == 0o600  # a secret
    data = datasets.open_dataset("folder", tmp_path / "data")
    assert data.modality == "xray"
    for i, name in enumerate(data.columns["file"].tolist()):
        assert commands.run(prepare, *command, f"--lookup={name}") == 0
        path, _, frame = capsys.readouterr().out.strip().partition("#frame-")
        assert Path(path).is_relative_to(tmp_path / "in" / data.classes[data.columns["label"][i]])
        header = dicom.headers(path)[int(frame or 1) - 1]
        stored = dicom.xray(path) if header.modality == "DX" else dicom.picture(header, ((-600.0, 1500.0),))
        assert stored == data.records[i]["image"]
    series = name.rpartition("/")[0]
    for text in (f"{series}/coronal-0003", series, data.columns["group"][i]):
        assert commands.run(prepare, *command, f"--lookup={text}") == 0
        assert len(capsys.readouterr().out.splitlines()) >= 6
    assert commands.run(prepare, *command, "--lookup=none") == 2 and "nothing is named" in capsys.readouterr().err


def test_table_errors(tmp_path):
    scans.nifti(tmp_path / "a/n.nii", scans.body())
    scans.nifti(tmp_path / "b.nii", scans.body())
    scans.series(tmp_path / "s", scans.body())
    (tmp_path / "empty").mkdir()
    table = tmp_path / "labels.csv"
    for text, options, word in (
        ("path,label\nempty,a\na,b\n", {}, "line 2: the folder empty"),
        ("path,label\na,a\na/n.nii,b\n", {}, "line 3: a/n.nii"),
        ("path,label,group\na,a,g\n", {"group_pattern": "(a)"}, "already has a column group"),
    ):
        table.write_text(text)
        with pytest.raises(ValueError, match=word):
            listing(tmp_path, **options)
    table.write_text("path,label,xmin,ymin,xmax,ymax\nb.nii,a,0,0,2,2\ns,b,0,0,2,2\n")
    for example in listing(tmp_path).examples:
        with pytest.raises(ValueError, match="box"):
            example.image()


def test_prepared_volumes(tmp_path):
    rng = np.random.default_rng(0)
    expected = {}
    for i in range(8):
        split = ("train", "train", "val", "test")[i // 2]
        hu = rng.integers(-1000, 300, (6, 10, 8), dtype=np.int16)
        scans.series(tmp_path / "in" / split / "ab"[i % 2] / f"Doe^Jane {i}", hu, **uids(i, f"ID-{i}"))
        expected[f"series-{pseudonym(f'1.2.{i}')}/coronal-0005"] = hu[::-1, 5]
    damaged = Path(scans.series(tmp_path / "in/train/a/damaged", scans.body()[:1], **uids(9, "Q"))[0])
    damaged.write_bytes(damaged.read_bytes().replace(b"\x08\x00\x60\x00CS", b"\x08\x00\x60\x00CQ"))
    scans.save(scans.dataset(np.zeros((4, 4), np.uint16), "MR"), tmp_path / "in/train/b/mr.dcm")
    windows = (*WIDE, (40.0, 400.0), (-600.0, 1500.0))
    options = PrepareOptions(salt="secret", hu_windows=windows, plane="coronal", position="mid")
    settings = {"source": tmp_path / "in", "data_dir": tmp_path / "data", "options": options, "quiet": True}
    with pytest.raises(ValueError, match=r"--on_bad_image=skip"):
        datasets.write("folder/x-12x16", **settings)
    skipped = datasets.write("folder/x-12x16", on_bad_image="skip", **settings)["skipped"]
    assert sorted(bool("mr.dcm" in line) for line in skipped) == [False, True]
    assert any(damaged.name in line for line in skipped)
    data = datasets.open_dataset("folder/x-12x16", tmp_path / "data")
    assert set(data.columns["file"].tolist()) == set(expected)
    for file, record in zip(data.columns["file"].tolist(), data.records, strict=True):
        image = scans.pixels_of(record["image"])
        assert image.shape == (12, 16, 3)
        resized = Image.fromarray(windowed(expected[file])).resize((16, 12), Image.Resampling.BILINEAR)
        np.testing.assert_allclose(image[..., 0].astype(int), np.asarray(resized).astype(int), atol=1)
    files = [path for path in (tmp_path / "data/folder").rglob("*") if path.is_file()]
    assert files and not [path for path in files if re.search(b"Doe|ID-", path.read_bytes())]


def test_changed_scan_after_an_interruption(tmp_path, monkeypatch):
    rng, expected, paths, processed = np.random.default_rng(0), {}, [], []
    for i in range(6):
        hu = rng.integers(-1000, 300, (1, 10, 8), dtype=np.int16)
        where = tmp_path / "in" / ("train", "val", "test")[i // 2] / "ab"[i % 2]
        paths += scans.series(where, hu, change={0: {"SOPInstanceUID": f"1.9.{i}"}}, **uids(i, f"ID-{i}"))
        expected[f"image-{pseudonym(f'1.9.{i}')}"] = windowed(hu[0])
    settings = {"source": tmp_path / "in", "data_dir": tmp_path / "data", "quiet": True}
    settings["options"] = PrepareOptions(salt="secret", hu_windows=WIDE)
    monkeypatch.setattr(writer, "SHARD_BYTES", 1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(duplicates, "near_twins", mock.Mock(side_effect=KeyboardInterrupt))
        datasets.write("folder", **settings)
    data = pydicom.dcmread(paths[0])
    data.PixelData = data.pixel_array[::-1].tobytes()
    data.save_as(paths[0])
    changed = f"image-{pseudonym('1.9.0')}"
    expected[changed] = expected[changed][::-1]
    process = writer.process_image
    monkeypatch.setattr(writer, "process_image", lambda e, options: processed.append(e.file) or process(e, options))
    datasets.write("folder", **settings)
    assert processed == [changed]
    data = datasets.open_dataset("folder", tmp_path / "data")
    for file, record in zip(data.columns["file"].tolist(), data.records, strict=True):
        np.testing.assert_array_equal(scans.pixels_of(record["image"]), expected[file])
