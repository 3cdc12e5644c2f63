"""COVIDx CT: official label lines, names of patients, both layouts, and what is wrong with a file."""

import csv
import gzip

import numpy as np
import pytest
from PIL import Image

from lungjax import datasets
from lungjax.data.imaging import images
from lungjax.datasets import covidx_ct
from lungjax.datasets.covidx_ct import patient

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


def write(root, config="3a", layout="kaggle", lines=LINES):
    version = config.upper()
    folder = root / (f"{version}_images" if layout == "kaggle" else "images")
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split, rows in lines.items():
        name = f"{split}_COVIDx_CT-{version}.txt" if layout == "kaggle" else f"{split}_COVIDx-CT.txt"
        (root / name).write_text("\n".join(rows) + "\n")
        for row in rows:
            pixels = rng.integers(0, 256, (48, 64), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / row.split()[0])
    return folder


def prepare(root, config="3a", **how):
    return datasets.write(f"covidx_ct/{config}", root, root / "data", datasets.PrepareOptions(), quiet=True, **how)


@pytest.mark.parametrize(
    ("file", "group", "source"),
    [
        ("NCP_96_1328_0032.png", "NCP_96", "CNCB"),
        ("CP_1068_3114_0007.png", "CP_1068", "CNCB"),
        ("Normal_1678_45_0101.png", "Normal_1678", "CNCB"),
        ("137covid_patient12_SR_3_IM00021.png", "patient12", "COVID-CTset"),
        ("normal2_patient225_SR_4_IM00009.png", "patient225", "COVID-CTset"),
        ("cdnormal4_patient12_SR_2_IM00004.png", "patient12", "COVID-CTset"),
        ("normalcd1_patient3_SR_2_IM00004.png", "patient3", "COVID-CTset"),
        ("LIDC-IDRI-0003-1.3.6.1.4.1-017.png", "LIDC-IDRI-0003", "LIDC-IDRI"),
        ("volume-covid19-A-0003_ct-12.png", "volume-covid19-A-0003", "TCIA"),
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
    ],
)
def test_patient_and_source_follow_from_the_file_name(file, group, source):
    assert patient(file) == (group, source)


@pytest.mark.parametrize("layout", ["kaggle", "readme"])
@pytest.mark.parametrize("config", ["1", "2a", "3b"])
def test_both_layouts_become_the_same_data_set(tmp_path, layout, config):
    folder = write(tmp_path, config, layout)
    result = prepare(tmp_path, config)
    data = datasets.open_dataset(f"covidx_ct/{config}", tmp_path / "data")
    rows = [line.split() for split in ("train", "val", "test") for line in LINES[split]]
    assert data.classes == ("Normal", "Pneumonia", "COVID-19")
    assert data.columns["file"].tolist() == [row[0] for row in rows]
    assert data.columns["label"].tolist() == [int(row[1]) for row in rows]
    np.testing.assert_array_equal(data.columns["box"], np.array([row[2:] for row in rows], np.float32))
    assert [len(data.rows(split)) for split in ("train", "val", "test")] == [4, 2, 1]
    for i, row in enumerate(rows):
        want = np.asarray(Image.open(folder / row[0]))
        np.testing.assert_array_equal(images.decode(data.records[i]["image"], data.window), want)
    assert any("differs from the publication" in note for note in result["notes"]), (
        "a partial copy is said, not refused"
    )


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("NCP_1_2_3.png 2 0 0 10", "train_COVIDx_CT-3A.txt line 5: .* has 5 fields, wanted 6"),
        ("NCP_1_2_3.png COVID 0 0 10 10", "line 5: class and box must be whole numbers"),
        ("NCP_1_2_3.png 3 0 0 10 10", "line 5: unknown class 3; known: 0 Normal"),
        ("NCP_1_2_3.png 2 10 0 10 10", "line 5: box 10 0 10 10 is empty or negative"),
        ("NCP_1_2_3.png 2 -1 0 10 10", "line 5: box -1 0 10 10 is empty or negative"),
        (
            "NCP_1_2_3.png 2 0 0 65 10",
            r"line 5: .*NCP_1_2_3.png: box 0 0 65 10 lies outside the image, which is 64 x 48",
        ),
        ("NCP_1_2_3.png 2 0 0 10 49", r"line 5: .*outside"),
        ("NCP_96_1328_0032.png 2 0 0 10 10", "line 5: .* already in train_COVIDx_CT-3A.txt line 1"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path, line, words):
    write(tmp_path, lines=LINES | {"train": [*LINES["train"], line]})
    with pytest.raises(ValueError, match=words):
        prepare(tmp_path, on_bad_image="skip")
    assert not list((tmp_path / "data").rglob("index.csv"))


def test_a_missing_image_is_named_with_its_line_or_skipped(tmp_path):
    folder = write(tmp_path)
    (folder / "COVIDCTMD-cap004-IM0063.png").unlink()
    with pytest.raises(ValueError, match=r"val_COVIDx_CT-3A.txt line 2: .*COVIDCTMD-cap004-IM0063.png: no such file"):
        prepare(tmp_path)
    result = prepare(tmp_path, on_bad_image="skip")
    assert result["images"] == 6 and "COVIDCTMD-cap004-IM0063.png" in result["skipped"][0]
    assert len(datasets.open_dataset("covidx_ct/3a", tmp_path / "data").rows("val")) == 1


def test_missing_label_file_or_folder_names_what_was_looked_for(tmp_path):
    folder = write(tmp_path)
    (tmp_path / "val_COVIDx_CT-3A.txt").rename(tmp_path / "aside")
    with pytest.raises(ValueError, match=r"no val label file; looked for val_COVIDx_CT-3A.txt, .*val_COVIDx-CT.txt"):
        prepare(tmp_path)
    (tmp_path / "aside").rename(tmp_path / "val_COVIDx_CT-3A.txt")
    folder.rename(tmp_path / "pictures")
    with pytest.raises(ValueError, match="no image folder; looked for 3A_images, images"):
        prepare(tmp_path)


def official(shared):
    for path in sorted((shared / "data/covidx_ct_splits").glob("v*/*.txt.gz")):
        split, _, version = path.name.removesuffix(".txt.gz").partition("_COVIDx_CT-")
        yield path, split, version.lower()


def test_official_lists_have_the_published_counts_and_known_patients(shared, tmp_path):
    metadata = shared / "data/covidx_ct_splits/metadata.csv.gz"
    with gzip.open(metadata, "rt", newline="") as file:
        origin = {row["patient id"]: row["source"] for row in csv.DictReader(file)}
    found: dict[str, list] = {}
    for path, split, version in official(shared):
        table = tmp_path / path.name.removesuffix(".gz")
        table.write_bytes(gzip.decompress(path.read_bytes()))
        found.setdefault(version, []).extend(covidx_ct.read_labels(table, split, tmp_path))
    assert sorted(found) == ["1", "2a", "3a"]
    for version, examples in found.items():
        splits: dict[str, set] = {}
        for example in examples:
            splits.setdefault(example.group, set()).add(example.split)
            assert example.source == origin.get(example.group, example.source)
            assert example.source
            # The table keeps a scan number in some TCIA ids, such as "..-0383_1"; CT-1 has 5 patients more.
            assert example.group in origin or example.source == "TCIA" or version == "1"
        assert not [group for group, where in splits.items() if len(where) > 1]
        # The train lists of 2A and 3A are not at hand: only they may differ.
        wrong = [line for line in covidx_ct.differences(examples, version) if " train has " not in line]
        assert wrong == (
            ["all slices and patients per class are as published for COVIDx CT-1"] if version == "1" else []
        )


def test_a_difference_to_the_published_counts_is_reported(shared, tmp_path):
    path = shared / "data/covidx_ct_splits/v3/test_COVIDx_CT-3A.txt.gz"
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    table = tmp_path / "test.txt"
    table.write_text("\n".join(line for line in lines if not line.startswith("NCP_341_")))
    said = covidx_ct.differences(covidx_ct.read_labels(table, "test", tmp_path), "3a")
    lost = sum(line.startswith("NCP_341_") for line in lines)
    test = [line for line in said if " test has " in line]
    assert len(test) == 2 and len(said) == 6
    assert f"17,922 / 7,965 / {7894 - lost:,} slices" in test[0] and test[0].endswith("17,922 / 7,965 / 7,894")
    assert "164 / 138 / 200 patients" in test[1] and test[1].endswith("164 / 138 / 201")
