"""COVIDx CT: official label files, patients in file names, both layouts, and errors in a file."""

import csv
import gzip
from collections import defaultdict

import numpy as np
import pytest
from PIL import Image

from lungjax import datasets
from lungjax.data import prepared
from lungjax.datasets import covidx_ct
from lungjax.datasets.covidx_ct import patient

METADATA = "data/covidx_ct_splits/metadata.csv.gz"
LINES = {
    "train": [
        "NCP_96_1328_0032.png 2 9 4 60 45",
        "CP_7_3200_0010.png 1 0 0 64 48",
        "Normal_1_1_0001.png 0 1 2 30 40",
        "137covid_patient1_SR_3_IM00021.png 2 5 5 50 40",
    ],
    "val": ["LIDC-IDRI-0003-1.3.6.1.4.1-017.png 0 3 3 40 40", "COVIDCTMD-cap004-IM0063.png 1 3 3 40 40"],
    "test": ["volume-covid19-A-0003_ct-12.png 2 3 3 40 40"],
}


LAYOUTS = {  # folder of the images and prefix and suffix of the label files
    "kaggle": ("3A_images", "", "_COVIDx_CT-3A"),
    "nested": ("2A_images/2A_images", "", "_COVIDx_CT-2A"),
    "readme": ("images", "", "_COVIDx-CT"),
    "official": ("data/COVIDx_CT-3A", "splits/v3/", "_COVIDx_CT-3A"),
}


def write(root, layout="kaggle"):
    folder, prefix, suffix = LAYOUTS[layout]
    folder, rng = root / folder, np.random.default_rng(0)
    folder.mkdir(parents=True)
    for split, lines in LINES.items():
        table = root / f"{prefix}{split}{suffix}.txt"
        table.parent.mkdir(parents=True, exist_ok=True)
        table.write_text("\n".join(lines) + "\n")
        for line in lines:
            mode = "RGBA" if split == "test" else "L"
            image = Image.fromarray(rng.integers(0, 256, (48, 64), dtype=np.uint8)).convert(mode)
            image.save(folder / line.split()[0])
    return folder


def prepare(root, config="3a", **settings):
    options = datasets.PrepareOptions()
    return datasets.write(f"covidx_ct/{config}", root, root / "data", options, quiet=True, **settings)


def test_patient_and_source():
    for file, group, source in (
        ("NCP_96_1328_0032.png", "NCP_96", "CNCB"),
        ("137covid_patient12_SR_3_IM00021.png", "patient12", "COVID-CTset"),
        ("normalcd1_patient3_SR_2_IM00004.png", "patient3", "COVID-CTset"),
        ("LIDC-IDRI-0003-1.3.6.1.4.1-017.png", "LIDC-IDRI-0003", "LIDC-IDRI"),
        ("volume-covid19-A-0694-12.png", "volume-covid19-A-0694", "TCIA"),
        ("volume-covid19-A-0011_1_ct-12.png", "volume-covid19-A-0011", "TCIA"),
        ("coronacases_004-112.png", "coronacases_004", "COVID-19-CT-Seg"),
        ("radiopaedia_14_85914_0-10.png", "radiopaedia_14_85914", "COVID-19-CT-Seg"),
        ("COVIDCTMD-P137-IM0063.png", "COVIDCTMD-P137", "COVID-CT-MD"),
        ("HUST-Patient1223-55.png", "HUST-Patient1223", "iCTCF"),
        ("STOIC-10011-101.png", "STOIC-10011", "STOIC"),
        ("A820804-1-2-031.png", "A820804", "Stony Brook"),
        ("radiopaedia-46018-1-0-17.png", "radiopaedia-46018", "radiopaedia.org"),
        ("study_0406-12.png", "study_0406", "MosMedData"),
        ("somebody_else-3.png", "somebody_else", ""),
    ):
        assert patient(file) == (group, source)


def test_layouts(tmp_path):
    for config, layout in (("1", "readme"), ("2a", "nested"), ("3a", "kaggle"), ("3a", "official")):
        root = tmp_path / layout
        write(root, layout)
        notes = prepare(root, config)["notes"]
        data = datasets.open_dataset(f"covidx_ct/{config}", root / "data")
        rows = [line.split() for split in ("train", "val", "test") for line in LINES[split]]
        assert data.classes == ("Normal", "Pneumonia", "COVID-19")
        assert data.columns["file"].tolist() == [row[0] for row in rows]
        assert data.columns["label"].tolist() == [int(row[1]) for row in rows]
        np.testing.assert_array_equal(data.columns["box"], np.array([row[2:] for row in rows], np.float32))
        assert [len(data.rows(split)) for split in ("train", "val", "test")] == [4, 2, 1]
        assert any("differs from the publication" in note for note in notes), "an incomplete copy is accepted"
        assert any("without transparency" in note and "RGBA (1)" in note for note in notes)


def test_bad_lines(tmp_path):
    folder = write(tmp_path)
    table = tmp_path / "train_COVIDx_CT-3A.txt"
    original = table.read_text()
    for line, word in (
        ("NCP_1_2_3.png 2 0 0 10", "train_COVIDx_CT-3A.txt line 5: .* fields"),
        ("NCP_1_2_3.png COVID 0 0 10 10", "line 5: .* integers"),
        ("NCP_1_2_3.png 3 0 0 10 10", "line 5: unknown class 3"),
        ("NCP_1_2_3.png 2 10 0 10 10", "line 5: box 10 0 10 10"),
        ("NCP_1_2_3.png 2 -1 0 10 10", "line 5: box -1 0 10 10"),
        ("NCP_1_2_3.png 2 0 0 65 10", "line 5: .*NCP_1_2_3.png: box 0 0 65 10 .* 64 x 48"),
        ("NCP_96_1328_0032.png 2 0 0 10 10", "line 5: .* line 1"),
    ):
        Image.fromarray(np.zeros((48, 64), np.uint8)).save(folder / "NCP_1_2_3.png")
        table.write_text(original + line)
        with pytest.raises(ValueError, match=word):
            prepare(tmp_path, on_bad_image="skip")
        assert not list((tmp_path / "data").rglob(prepared.INDEX))


def test_missing_files(tmp_path):
    folder = write(tmp_path)
    (folder / "COVIDCTMD-cap004-IM0063.png").unlink()
    with pytest.raises(ValueError, match=r"val_COVIDx_CT-3A.txt line 2: .*COVIDCTMD-cap004-IM0063.png"):
        prepare(tmp_path)
    folder.rename(tmp_path / "pictures")
    with pytest.raises(ValueError, match="no image folder; looked for 3A_images.*, images"):
        prepare(tmp_path)
    (tmp_path / "val_COVIDx_CT-3A.txt").unlink()
    with pytest.raises(ValueError, match=r"no val label file; looked for val_COVIDx_CT-3A.txt, .*val_COVIDx-CT.txt"):
        prepare(tmp_path)


def test_metadata(shared, tmp_path):
    write(tmp_path)
    (tmp_path / "metadata.csv").write_bytes(gzip.decompress((shared / METADATA).read_bytes()))
    examples = covidx_ct.listing(tmp_path, "3a", datasets.PrepareOptions()).examples
    extra = {example.group: example.extra for example in examples}
    assert extra["NCP_96"][2] == "China" and extra["COVIDCTMD-cap004"] == ("71", "M", "Iran")
    assert extra["volume-covid19-A-0003"] == ("", "", ""), "unknown"
    prepare(tmp_path)
    columns = datasets.open_dataset("covidx_ct/3a", tmp_path / "data").columns
    assert columns["sex"].tolist() == [e.extra[1] for e in examples] and set(columns) >= {"age", "country"}


def test_official_label_files(shared, tmp_path):
    with gzip.open(shared / METADATA, "rt", newline="") as file:
        origin = {row["patient id"]: row["source"] for row in csv.DictReader(file)}
    listed = defaultdict(list)
    for path in sorted((shared / "data/covidx_ct_splits").glob("v*/*.txt.gz")):
        split, _, version = path.name.removesuffix(".txt.gz").partition("_COVIDx_CT-")
        table = tmp_path / path.name.removesuffix(".gz")
        table.write_bytes(gzip.decompress(path.read_bytes()))
        listed[version.lower()] += covidx_ct.read_labels(table, split, tmp_path)
    assert sorted(listed) == ["1", "2a", "3a"]
    for version, examples in listed.items():
        splits = defaultdict(set)
        for example in examples:
            splits[example.group].add(example.split)
            assert example.source and example.source == origin.get(example.group, example.source)
            # The table keeps a scan number in some TCIA ids, such as "..-0383_1"; CT-1 has 5 more patients.
            assert example.group in origin or example.source == "TCIA" or version == "1"
        assert all(len(names) == 1 for names in splits.values())
        # The train files of 2A and 3A are missing here: only they may differ.
        notes = [note for note in covidx_ct.compare_patients(examples, version) if " train has " not in note]
        assert len(notes) == 2 * (version == "1") and all("as published" in note for note in notes)
    fewer = [example for example in listed["3a"] if example.split != "test" or example.group != "NCP_341"]
    lost = len(listed["3a"]) - len(fewer)
    slices, patients = (note for note in covidx_ct.compare_patients(fewer, "3a") if " test has " in note)
    assert f"17,922 / 7,965 / {7894 - lost:,} slices" in slices and slices.endswith("17,922 / 7,965 / 7,894")
    assert "164 / 138 / 200 patients" in patients and patients.endswith("164 / 138 / 201")
