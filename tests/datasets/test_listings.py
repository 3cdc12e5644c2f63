"""Listings of the public data sets, on small folders in their layouts and on real file names."""

import csv
import importlib
import io
import pickle
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn import model_selection, utils

from lungjax import datasets
from lungjax.data.splits import parse_study
from lungjax.datasets import (
    chexpert,
    coronahack,
    covid_chestxray,
    covid_ct,
    covid_xray_5k,
    covidx_ct,
    ct_cov19,
    ictcf,
    medmnist,
    nih_chestxray14,
    source_files,
)
from lungjax.datasets import nccid_whole_lung as nccid

OPTIONS = datasets.PrepareOptions()
PUBLIC = [name for name in datasets.DATASETS if name not in ("folder", "phantom_ct")]


def tree(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 4), 90, np.uint8)).save(root / path)
    return root


def write_text(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def listed(module, root, config="default", options=OPTIONS):
    """Returns the listing and its examples by file."""
    listing = module.listing(root, config, options)
    return listing, {example.file: example for example in listing.examples}


def splits_of_groups(examples):
    splits = defaultdict(set)
    for example in examples:
        if example.split:
            splits[example.group].add(example.split)
    return splits


def assert_errors(module, root, file, config, errors):
    """Asserts that each (old, new, word), replacing old by new once in the file, causes an error with the word."""
    original = file.read_text()
    for old, new, word in errors:
        file.write_text(original.replace(old, new, 1))
        with pytest.raises(ValueError, match=word):
            module.listing(root, config, OPTIONS)


def test_every_data_set(tmp_path):
    for name in PUBLIC:
        module = importlib.import_module(f"lungjax.datasets.{name}")
        for config, table in module.ABOUT.expected.items():
            assert table and all(len(row) == len(datasets.classes(f"{name}/{config}")) for row in table.values())
        with pytest.raises(ValueError, match="no .*; looked for "):
            module.listing(tmp_path, config, OPTIONS)
        with pytest.raises(ValueError, match="--group_pattern"):
            datasets.write(name, tmp_path, tmp_path / "data", datasets.PrepareOptions(group_pattern="(x)"))


RUNS = (range(266, 270), range(289, 322), range(344, 373), range(404, 422))  # in the names of Test/COV/30


def test_ct_cov19(tmp_path):
    tree(
        tmp_path,
        *(f"Train/COV/01/FILE001{k}.jpg" for k in (1, 70, 170, "2 (2)")),
        "Val/COV/01/FILE0015.jpg",
        *(f"Train/COV/malek_2/pos_{k}.png" for k in range(40) if k % 11),  # some slice numbers are missing in a scan
        "Train/COV/malek_2/pos_0.png",
        *(f"Train/Normal/1/neg_{k}.png" for k in (*range(0, 200, 5), 2173)),
        *(f"Train/OtherPneumonia/pneu_1/pneu_{k}.png" for k in range(120, 720, 5)),
        *(f"Val/COV/30/FILE001{k}.jpg" for k in range(6, 27)),
        *(f"Test/COV/30/pos_{k}.png" for run in RUNS for k in run),
        "Val/Normal/1/neg_2600.png",
        *("Val/OtherPneumonia/pneu_133.png", "Val/OtherPneumonia/pneu_316.png"),
        *("Test/Normal/1/neg_2174.png", "Test/OtherPneumonia/2/pneu_133.png"),
    )
    listing, by_file = listed(ct_cov19, tmp_path, "original")
    assert listing.classes == ("COV", "Normal", "OtherPneumonia") and listing.body and listing.study
    group = {file: example.group for file, example in by_file.items()}
    (scan,) = {name for file, name in group.items() if file.startswith("Train/COV/01/")}
    assert group["Val/COV/01/FILE0015.jpg"] != scan
    assert group["Train/COV/malek_2/pos_0.png"] == group["Train/COV/malek_2/pos_39.png"]
    assert group["Train/Normal/1/neg_2173.png"] == group["Test/Normal/1/neg_2174.png"]  # divided by the original split
    # The real files of Test/COV/30 are four runs of numbers, and none is the patient of Val/COV/30.
    scans = [{group[f"Test/COV/30/pos_{k}.png"] for k in run} for run in RUNS]
    assert all(len(names) == 1 for names in scans) and len(set.union(*scans)) == 4
    assert group["Val/COV/30/FILE0016.jpg"] == group["Val/COV/30/FILE00126.jpg"] not in set.union(*scans)
    assert len({group[f"Train/Normal/1/neg_{k}.png"] for k in range(0, 200, 5)}) == 4, "runs of at most 60 numbers"
    # Images in the flat folder are grouped with their neighbors in train; the separate series of test is not.
    assert group["Val/OtherPneumonia/pneu_133.png"] == group["Train/OtherPneumonia/pneu_1/pneu_140.png"]
    assert group["Val/OtherPneumonia/pneu_133.png"] != group["Test/OtherPneumonia/2/pneu_133.png"]
    new = [e for e in listing.examples if e.label == 2 and e.study != "test"]
    assert all(len(splits) == 1 for splits in splits_of_groups(new).values())
    assert {e.split for e in new} == {"train", "val"}
    assert all(e.split == e.study == e.file.split("/")[0].lower() for e in listing.examples if e not in new)
    assert any("val has 22 / 1 / 2" in note for note in listing.notes)
    assert Path(listing.examples[0].image).is_file()
    (tmp_path / "Val/Normal/1/neg_2600.png").unlink()
    with pytest.raises(ValueError, match="Normal has no image"):
        ct_cov19.listing(tmp_path, "original", OPTIONS)
    (tmp_path / "Val/COV").rename(tmp_path / "Val/Covid")
    with pytest.raises(ValueError, match="folder Covid; .*COV"):
        ct_cov19.listing(tmp_path, "original", OPTIONS)


def test_nccid(tmp_path):
    names = [f"1.2.826.0.1.3680043.9.3218.1.1.{i // 3}.1069.161.{i}.0.jpg" for i in range(41)]
    tree(tmp_path, *names)
    rows = [f"{name},{int(i // 3 % 4 == 0)}" for i, name in enumerate(names)]
    write_text(tmp_path / "whole_lung_label.csv", "image_name,whole_lung", *rows)
    (tmp_path / names[5]).unlink()  # the study drops it before drawing the splits; `prepare` asks what to do
    listing, by_file = listed(nccid, tmp_path)
    assert not listing.body and listing.classes == ("Others", "WholeLung") and list(by_file) == names
    assert listing.volumes["orientation"] == "rotated"
    assert by_file[names[0]].group == by_file[names[2]].group != by_file[names[3]].group
    assert by_file[names[0]].label == 1 and by_file[names[3]].label == 0
    assert all(len(splits) == 1 for splits in splits_of_groups(listing.examples).values())
    existing = [name for name in names if name != names[5]]
    train, _ = model_selection.train_test_split(existing, test_size=1.0 - 0.70, random_state=42)
    assert {example.file for example in listing.examples if example.study == "train"} == set(train)
    assert by_file[names[5]].study == ""
    errors = [(".0.0.jpg,1", ".0.0.jpg,2", "line 2: .*'2'"), (".1.0.jpg", ".0.0.jpg", "line 3: .* line 2")]
    assert_errors(nccid, tmp_path, tmp_path / "whole_lung_label.csv", "default", errors)


def write_ictcf(root, third="NiCT"):
    sizes = {"nCT": 110, "pCT": 30, third: 55}
    return tree(root, *(f"Original CT Scans/{n}/{n}{k}.jpg" for n, count in sizes.items() for k in range(1, count + 1)))


def test_ictcf(tmp_path, monkeypatch):
    monkeypatch.setattr(ictcf, "TARGET", 100)
    for third in ("NiCT", "niCT"):
        root = write_ictcf(tmp_path / third, third)
        plain, by_file = listed(ictcf, root)
        full, _ = listed(ictcf, root, "oversampled")
        assert plain.body and plain.classes == ("nCT", "pCT", "niCT")
        assert Counter(example.label for example in full.examples) == {0: 110, 1: 100, 2: 100}
        assert [e for e in full.examples if not e.transform] == list(plain.examples)
        assert all((example.split == "") == bool(example.transform) for example in full.examples)
        name = f"Original CT Scans/{third}/{third}"
        assert by_file[f"{name}1.jpg"].group == by_file[f"{name}39.jpg"].group != by_file[f"{name}40.jpg"].group
        assert all(len(splits) == 1 for splits in splits_of_groups(plain.examples).values())
    ordered = sorted(full.examples, key=lambda example: example.label)  # stable: originals before copies
    labels = [example.label for example in ordered]
    _, test = model_selection.train_test_split(range(310), test_size=0.1, random_state=25, stratify=labels)
    assert {i for i, example in enumerate(ordered) if example.study == "test"} == set(test)


def test_published_sizes_of_study_splits():
    cells = Counter(nccid._study(4773, np.arange(4773)))
    assert (cells["train"], cells["val"], cells["test"]) == (3341, 716, 716)
    labels = [0] * 9979 + [1] * 9000 + [2] * 9000
    cells = Counter(zip(ictcf._study(labels), labels, strict=True))
    assert [cells["test", label] for label in range(3)] == [998, 900, 900]
    assert [sum(cells[split, label] for label in range(3)) for split in ("train", "val")] == [19585, 5596]


def test_ictcf_generated_images(tmp_path, monkeypatch):
    monkeypatch.setattr(ictcf, "TARGET", 60)
    write_ictcf(tmp_path)
    listings = [
        ictcf.listing(tmp_path, "oversampled", datasets.PrepareOptions(seed=seed)).examples for seed in (0, 0, 1)
    ]
    moves = [
        np.array([[*e.transform.keywords.values()] for e in examples if e.transform], float) for examples in listings
    ]
    assert (moves[0] == moves[1]).all() and (moves[0] != moves[2]).any()
    assert np.all(np.abs(moves[0]).max(0) <= (15, 0.1, 0.1)) and np.all(np.abs(moves[0]).max(0) > (10, 0.07, 0.05))
    gray = np.random.default_rng(0).integers(0, 256, (20, 30), dtype=np.uint8)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(listings[0][-1].transform))(gray * 0), gray * 0)
    np.testing.assert_array_equal(ictcf.generate(gray, 0.0, 0.0, 0.0), gray)
    # As in Keras, a positive shift samples further down and right; the edge is repeated.
    shifted = np.pad(gray, ((0, 2), (0, 3)), mode="edge")[2:, 3:]
    np.testing.assert_array_equal(ictcf.generate(gray, 0.0, 0.1, 0.1), shifted)
    square = gray[:, :20]
    assert np.abs(ictcf.generate(square, 90.0, 0.0, 0.0).astype(int) - np.rot90(square, -1)).max() <= 1


def test_covidx_ct_study_resampling(tmp_path):
    (tmp_path / "3A_images").mkdir()
    sizes = {"train": (30, 12, 50), "val": (9, 20, 14), "test": (3, 4, 5)}
    names = {}
    for split, counts in sizes.items():
        for label, count in enumerate(counts):
            names[split, label] = [f"CP_{label}{i}{len(split)}_1_{i:04}.png" for i in range(count)]
        lines = [f"{name} {label} 0 0 4 4" for label in (1, 0, 2) for name in names[split, label]]
        write_text(tmp_path / f"{split}_COVIDx_CT-3A.txt", *lines)
    listing, by_file = listed(covidx_ct, tmp_path, "3a")
    times = {file: parse_study(example.study) for file, example in by_file.items()}
    for split, label, draws in (("train", 0, 12), ("train", 2, 12), ("val", 0, 14), ("val", 1, 14)):
        drawn = Counter(utils.resample(names[split, label], replace=True, n_samples=draws, random_state=0))
        assert {n: times[n].get(split, 0) for n in names[split, label]} == {n: drawn[n] for n in names[split, label]}
    for split, label in (("train", 1), ("val", 2), ("test", 0), ("test", 1), ("test", 2)):
        assert all(times[name] == {split: 1} for name in names[split, label])
    assert listing.body and all(example.split for example in listing.examples)


def write_covid_ct(root, table=True):
    files = {
        "COVID": {
            "train": ["2020.01.24.919183-p27-132.png", "2020.02.10.20021584-p6-52%0.png"],
            "val": ["2020.02.10.20021584-p6-52%10.png"],
            "test": ["bmj.m606.full-p4-22%0.png"],
        },
        "NonCOVID": {"train": ["14.png", "15.png", "63%7.jpg", "64.jpg"], "val": ["40.png"], "test": ["41.png"]},
    }
    for name, lists in files.items():
        for split, names in lists.items():
            tree(root / f"Images-processed/CT_{name}", *names)
            write_text(root / f"Data-split/{name}/{split}CT_{name}.txt", *names, "")
    if table:
        rows = ("0,14.png,medpix_patient_3,14", "1,15.png,medpix_patient_4,14", "2,40.png,medpix_patient_3,14")
        write_text(root / covid_ct.TABLE, ",image name,patient id,", *rows)
    return root


def test_covid_ct(tmp_path):
    write_covid_ct(tmp_path)
    tree(tmp_path, "Images-processed/CT_COVID/unlisted.png")
    listing, by_file = listed(covid_ct, tmp_path)
    assert listing.classes == ("NonCOVID", "COVID") and listing.body and len(by_file) == 10
    assert all(example.split == example.study for example in listing.examples)
    groups = {
        "COVID/2020.02.10.20021584-p6-52%0.png": "paper 2020.02.10.20021584",
        "COVID/2020.02.10.20021584-p6-52%10.png": "paper 2020.02.10.20021584",
        "NonCOVID/14.png": "medpix_patient_3", "NonCOVID/40.png": "medpix_patient_3",
        "NonCOVID/63%7.jpg": "crawled_patient_63", "NonCOVID/41.png": "medpix_run_40",
    }  # fmt: skip
    assert {name: by_file[f"CT_{name}"].group for name in groups} == groups
    assert by_file["CT_NonCOVID/64.jpg"].source == "web" and by_file["CT_NonCOVID/41.png"].source == "MedPix"
    assert any("CT_COVID" in note and note.endswith("1") for note in listing.notes)
    assert any("lacks 3 of them" in note for note in listing.notes)
    _, by_file = listed(covid_ct, write_covid_ct(tmp_path / "without", table=False))
    runs = [by_file[f"CT_NonCOVID/{number}.png"].group for number in (14, 15, 40, 41)]
    assert runs == ["medpix_run_14"] * 2 + ["medpix_run_40"] * 2
    (tmp_path / "Data-split/COVID/valCT_COVID.txt").unlink()
    with pytest.raises(ValueError, match="no val list of COVID; looked for Data-split/COVID/valCT_COVID.txt"):
        covid_ct.listing(tmp_path, "default", OPTIONS)


def test_covid_xray_5k(tmp_path):
    for inner in ("", "data_upload_v3/", "data_set/"):
        root = tmp_path / f"root{inner}"
        tree(
            root / inner,
            "train/covid/auntminnie-a-2020_01_28.jpeg",  # an original with the prefix of generated images
            "train/covid/a_0_4235.jpg",
            "train/covid/covid_original_nejm1_f1.jpg_0a1b2c3d-0a1b-0a1b-0a1b-0a1b2c3d4e5f.jpg",
            *(f"train/covid/paper{k}_f{f}-PA.jpg" for k in range(100, 110) for f in (1, 3)),
            *(f"train/non/Lung Opacity-patient0000{p}-study1-view{v}_frontal.jpg" for p in range(9) for v in (1, 2)),
            "train/non/Edema/patient00010-study1-view1_frontal.jpg",
            "test/covid/paper100_f2-PA.jpg",
            "test/non/patient00011-study2-view1_frontal.jpg",
        )
        listing, by_file = listed(covid_xray_5k, root)
        by_file = {file.removeprefix(inner): example for file, example in by_file.items()}
        assert listing.classes == ("covid", "non") and not listing.body and listing.extra == ("finding",)
        generated = [file for file, example in by_file.items() if not example.split]
        assert len(generated) == 2 and all(re.search("/(a_0|covid_original)", file) for file in generated)
        for file, example in by_file.items():
            assert example.label == int("/non/" in file)
            assert (example.split == "test") == file.startswith("test")
        assert splits_of_groups(listing.examples)["paper100"] > {"test"}
        opacity = by_file["train/non/Lung Opacity-patient00003-study1-view2_frontal.jpg"]
        assert (opacity.group, opacity.extra, opacity.source) == ("patient00003", ("Lung Opacity",), "CheXpert")
        assert by_file["train/non/Edema/patient00010-study1-view1_frontal.jpg"].extra == ("Edema",)
        assert any(note.startswith("2 generated images") for note in listing.notes)
    (root / inner / "test/non").rename(root / inner / "test/none")
    with pytest.raises(ValueError, match="no folder of class non; looked for non/"):
        covid_xray_5k.listing(root, "default", OPTIONS)


def test_covid_xray_5k_generated_image():
    """Keras stretches the gray levels of a stored copy, so that little of the brightness change remains."""
    noise = np.random.default_rng(0).integers(50, 200, (6, 8), dtype=np.uint8)
    image = Image.fromarray(noise).resize((80, 60))
    half = np.asarray(image.resize((80, 60), Image.Resampling.BILINEAR, box=(20, 15, 60, 45)))
    turned, image = np.asarray(image.rotate(-5, Image.Resampling.BILINEAR)), np.asarray(image)
    still = {"angle": 0.0, "shear": 0.0, "zoom": (1.0, 1.0), "flip": False, "brightness": 1.0}
    for change, expected, levels, error in (
        ({"flip": True}, image[:, ::-1], image, 1),
        ({"zoom": (0.5, 0.5)}, half, half, 2),
        ({"angle": 5.0}, turned, image, 5),
        ({"brightness": 0.2}, image, image, 4),
    ):
        actual = covid_xray_5k.generate(image, **still | change).astype(float)
        stretched = np.interp(expected, (levels.min(), levels.max()), (0, 255))
        assert np.abs(actual - stretched)[10:-10, 10:-10].mean() < error


COLLECTION = [
    "patientid,offset,sex,age,finding,RT_PCR_positive,view,modality,folder,filename,url,license,",  # as published
    "2,0,M,65,Pneumonia/Viral/COVID-19,Y,PA,X-ray,images,a.png,https://www.nejm.org/x,CC BY,",
    "2,3,M,65,Pneumonia/Viral/COVID-19,Y,AP Supine,X-ray,images,b.png,https://www.nejm.org/x,,",
    "13,3,M,35,Pneumonia/Viral/COVID-19,Y,L,X-ray,images,c.png,https://www.nejm.org/x,,",
    "17,3,M,54,Pneumonia/Viral/COVID-19,Y,Axial,CT,volumes,d.nii.gz,https://x.org,,",
    '3,4,M,74,Pneumonia/Viral/SARS,,AP,X-ray,images,e.png,https://pubs.rsna.org/doi,"one, two",',
    "5,,,,Pneumonia,,PA,X-ray,images,f.png,https://en.wikipedia.org/wiki,,",
    "6,,,,Pneumonia/Bacterial/Streptococcus,,AP Erect,X-ray,images,g.png,,,",
    "7,,,,Pneumonia/Fungal/Pneumocystis,,PA,X-ray,images,h.png,,,",
    "8,,,,No Finding,,PA,X-ray,images,i.png,,,",
    "9,,,,Tuberculosis,,PA,X-ray,images,j.png,,,",
    "10,,,,todo,,PA,X-ray,images,k.png,,,",
    "11,,,,Unknown,,PA,X-ray,images,l.png,,,",
    "12,,,,Pneumonia/Lipoid,,PA,X-ray,images,m.png,,,",
]


def test_covid_chestxray(tmp_path):
    write_text(tmp_path / "metadata.csv", *COLLECTION)
    for config, labels in (
        ("covid", {"a": 1, "b": 1, "e": 0, "f": 0, "g": 0, "h": 0, "i": 0, "j": 0, "m": 0}),
        ("findings", {"a": 1, "b": 1, "e": 2, "g": 3, "h": 4, "i": 0}),
    ):
        listing, by_file = listed(covid_chestxray, tmp_path, config)
        assert {file: e.label for file, e in by_file.items()} == {f"images/{k}.png": v for k, v in labels.items()}
        assert listing.study == "" and not listing.body and {e.study for e in listing.examples} == {""}
        assert all(len(splits) == 1 for splits in splits_of_groups(listing.examples).values())
        assert any(note.startswith(f"{13 - len(labels)} rows omitted: ") for note in listing.notes)
    first = by_file["images/a.png"]
    assert first.group == by_file["images/b.png"].group == "patient 2"
    assert first.source == "nejm.org" and first.image == str(tmp_path / "images/a.png")
    assert listing.extra == ("view", "finding", "sex", "age", "RT_PCR_positive", "license")
    assert first.extra == ("PA", "Pneumonia/Viral/COVID-19", "M", "65", "Y", "CC BY")
    errors = [
        ("No Finding", "No finding", "line 10: .*'No finding'; did you mean No Finding"),
        ("\n2,0", "\n,0", "line 2: patientid is empty"),
        ("\n".join(COLLECTION[1:]), COLLECTION[3], "no frontal X-ray"),
    ]
    assert_errors(covid_chestxray, tmp_path, tmp_path / "metadata.csv", "covid", errors)


def test_coronahack(tmp_path):
    rows = [
        "0,IM-0128-0001.jpeg,Normal,TRAIN,,",
        "1,IM-0439-0001.jpeg,Normal,TRAIN,,",
        "2,IM-0439-0001-0002.jpeg,Normal,TRAIN,,",
        "3,person940_virus_1602.jpeg,Pnemonia,TRAIN,,Virus",
        "4,person940_bacteria_2865.jpeg,Pnemonia,TRAIN,,bacteria",
        "5,person7_virus_9.jpeg,Pnemonia,TRAIN,,Virus",
        "6,kjr-21-e24-g003-l-a.jpg,Pnemonia,TRAIN,COVID-19,Virus",
        *(f"{i},NORMAL2-IM-{i:04}-0001.jpeg,Normal,TRAIN,," for i in range(8, 20)),
        *(f"{i},person{i}_virus_{i}.jpeg,Pnemonia,TRAIN,,Virus" for i in range(20, 32)),
        "80,person7_virus_6.jpeg,Pnemonia,TEST,,Virus",
        "81,IM-0001-0001.jpeg,Normal,TEST,,",
    ]
    table = tmp_path / coronahack.TABLE
    write_text(table, ",X_ray_image_name,Label,Dataset_type,Label_2_Virus_category,Label_1_Virus_category", *rows)
    folder = "Coronahack-Chest-XRay-Dataset"
    tree(tmp_path, *(f"{folder}/{folder}/{row.split(',')[3].lower()}/{row.split(',')[1]}" for row in rows))
    listing, by_file = listed(coronahack, tmp_path)
    assert listing.classes == ("Normal", "Pneumonia") and len(by_file) == len(rows) and not listing.body
    assert all(Path(example.image).is_file() for example in listing.examples)
    group = {file.removeprefix("train/"): example.group for file, example in by_file.items()}
    assert group["IM-0439-0001.jpeg"] == group["IM-0439-0001-0002.jpeg"] == "IM-0439"
    assert group["NORMAL2-IM-0008-0001.jpeg"] == "NORMAL2-IM-0008"
    assert group["person940_virus_1602.jpeg"] == group["person940_bacteria_2865.jpeg"] == "person940"
    assert group["person7_virus_9.jpeg"] == group["test/person7_virus_6.jpeg"]
    assert group["kjr-21-e24-g003-l-a.jpg"] == "kjr-21-e24"
    assert by_file["train/kjr-21-e24-g003-l-a.jpg"].extra == ("Virus", "COVID-19")
    assert by_file["train/person7_virus_9.jpeg"].source == "Kermany"
    for file, example in by_file.items():
        assert (example.split == "test") == file.startswith("test/") == (example.study == "val+test")
    assert {example.split for example in listing.examples} == {"train", "val", "test"}
    assert all(len(splits - {"test"}) <= 1 for splits in splits_of_groups(listing.examples).values())
    assert any("test has 1 / 1" in note for note in listing.notes)
    errors = [
        ("0001.jpeg,Normal", "0001.jpeg,normal", "line 2: unknown Label 'normal'; expected Normal"),
        ("TEST", "VALID", "unknown Dataset_type 'VALID'"),
    ]
    assert_errors(coronahack, tmp_path, table, "default", errors)


NIH_COLUMNS = "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient {},View Position,"
NIH_COLUMNS += "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"


def write_nih(root, table, sex, end):
    """Writes 30 patients with two images each: the findings of the first three are given, the others cycle."""
    findings = ["Cardiomegaly|Emphysema", "No Finding", "Hernia", *("Mass", "Pleural_Thickening|Atelectasis") * 14]
    rows, lists = [], {"train_val_list.txt": [], "test_list.txt": []}
    for patient in range(1, 30):
        for visit in range(2):
            name = f"{patient:08}_{visit:03}.png"
            rows.append(f"{name},{findings[patient - 1]},{visit},{patient},058Y,F,PA,2682,2749,0.143,0.143{end}")
            lists["test_list.txt" if patient % 5 == 3 else "train_val_list.txt"].append(name)
    write_text(root / table, NIH_COLUMNS.format(sex) + end, *rows)
    for name, lines in lists.items():
        write_text(root / name, *lines)


def test_nih_chestxray14(tmp_path):
    for table, sex, end in (("Data_Entry_2017.csv", "Gender", ","), ("Data_Entry_2017_v2020.csv", "Sex", "")):
        write_nih(root := tmp_path / sex, table, sex, end)
        tree(root, "images_001/images/00000001_000.png", "images_012/images/00000001_001.png")
        listing, by_file = listed(nih_chestxray14, root)
        assert len(by_file) == 58 and listing.extra == ("view", "sex", "age") and not listing.body
        first = by_file["00000001_000.png"]
        assert first.label == (0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0) and first.extra == ("PA", "F", "058")
        assert by_file["00000002_000.png"].label == (0,) * 14
        assert by_file["00000003_001.png"].label == (0,) * 13 + (1,)
        assert by_file["00000005_000.png"].label == (1,) + (0,) * 11 + (1, 0)
        assert first.image == str(root / "images_001/images/00000001_000.png") and Path(first.image).is_file()
        assert (
            Path(by_file["00000001_001.png"].image).is_file() and not Path(by_file["00000002_000.png"].image).exists()
        )
        test = {e.group for e in listing.examples if e.split == "test"}
        assert test == {f"patient {k}" for k in range(1, 30) if k % 5 == 3}
        assert all(example.study == example.split for example in listing.examples)
        assert {example.split for example in listing.examples} == {"train", "val", "test"}
        assert all(len(splits) == 1 for splits in splits_of_groups(listing.examples).values())
        assert any("train has 46 images of 23 patients; NIH" in note for note in listing.notes)
        assert any(
            "the data set has 26 / 2 / 0" in note and "11,559 / 2,776 / 13,317" in note for note in listing.notes
        )
    errors = [
        ("Hernia", "hernia", "line 6: unknown finding 'hernia'; did you mean Hernia"),
        ("00000002_001.png", "00000099_001.png", "line 5: 00000099_001.png is neither in train_val_list.txt nor in"),
        ("Finding Labels", "Findings", "column Finding Labels is missing"),
    ]
    assert_errors(nih_chestxray14, root, root / table, "default", errors)
    for name in ("images_001", "images_012"):
        (root / name).rename(root / f"old_{name}")
    write_nih(root, table, sex, end)
    with pytest.raises(ValueError, match="no folder of images; looked for images/"):
        nih_chestxray14.listing(root, "default", OPTIONS)


CHEXPERT_COLUMNS = (
    "Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Enlarged Cardiomediastinum,Cardiomegaly,Lung Opacity,Lung Lesion,"
    "Edema,Consolidation,Pneumonia,Atelectasis,Pneumothorax,Pleural Effusion,Pleural Other,Fracture,Support Devices"
)


def write_chexpert(root, prefix):
    train = [
        "patient00001/study1/view1_frontal.jpg,Female,68,Frontal,AP,1.0,,,,,,,,,0.0,,,,1.0",
        "patient00002/study2/view1_frontal.jpg,Female,87,Frontal,AP,,,-1.0,1.0,,-1.0,-1.0,,-1.0,,-1.0,,1.0,",
        "patient00002/study1/view2_lateral.jpg,Female,83,Lateral,,,,,1.0,,,-1.0,,,,,,1.0,",
        *(f"patient1000{k}/study1/view1_frontal.jpg,Male,50,Frontal,PA,,,1.0,,,,,,,,1.0,,," for k in range(9)),
    ]
    valid = ["patient64541/study1/view1_frontal.jpg,Male,73,Frontal,AP,0.0,1.0,1.0,1.0" + ",0.0" * 10]
    write_text(root / "train.csv", CHEXPERT_COLUMNS, *(f"{prefix}train/{line}" for line in train))
    write_text(root / "valid.csv", CHEXPERT_COLUMNS, *(f"{prefix}valid/{line}" for line in valid))
    return tree(root, *(f"train/{line.split(',')[0]}" for line in train), f"valid/{valid[0].split(',')[0]}")


def test_chexpert(tmp_path):
    for name in ("CheXpert-v1.0", "CheXpert-v1.0-small"):
        folder = write_chexpert(tmp_path / f"parent_{name}" / name, f"{name}/")
        for root in (folder, folder.parent):  # the archive's folder, or its parent
            listing, by_file = listed(chexpert, root)
            assert len(by_file) == 13 and all(Path(example.image).is_file() for example in listing.examples)
            assert listing.classes == tuple(CHEXPERT_COLUMNS.split(",")[5:])
            second = by_file["train/patient00002/study2/view1_frontal.jpg"]
            assert second.label == (0, 0, -1, 1, 0, -1, -1, 0, -1, 0, -1, 0, 1, 0)
            lateral = by_file["train/patient00002/study1/view2_lateral.jpg"]
            assert lateral.group == second.group == "patient00002" and lateral.split == second.split
            assert listing.extra == ("view", "sex", "age") and second.extra == ("AP", "Female", "87")
            assert lateral.extra == ("Lateral", "Female", "83")
            assert by_file["valid/patient64541/study1/view1_frontal.jpg"].split == "test"
            assert {e.split for e in listing.examples if e.file.startswith("train/")} == {"train", "val"}
            assert all(example.study == example.split for example in listing.examples)
            assert any("train has 12 images of 11 patients; CheXpert has 223,414" in note for note in listing.notes)
        listing, by_file = listed(chexpert, folder, "competition")
        assert listing.classes == ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")
        assert by_file["train/patient00002/study2/view1_frontal.jpg"].label == (-1,) * 5
        assert any("33,376 / 27,000 / 14,783 / 52,246 / 86,187" in note for note in listing.notes)
    errors = [
        ("-1.0", "2.0", "line 3: unknown Cardiomegaly '2.0'"),
        ("train/patient00001/study1", "train/../study1", "line 2: Path .*; expected train/patient00001"),
    ]
    assert_errors(chexpert, folder, folder / "train.csv", "default", errors)


def write_medmnist(path, side, labels):
    """Writes an archive with a single pixel value per image; `labels` are those of every split."""
    path.parent.mkdir(exist_ok=True)
    arrays = {}
    for number, split in enumerate(("train", "val", "test")):
        pixels = np.arange(len(labels), dtype=np.uint8)[:, None, None] + np.zeros((1, side, side + 1), np.uint8)
        arrays |= {f"{split}_images": pixels + 50 * number, f"{split}_labels": np.array(labels, np.uint8)}
    np.savez_compressed(path, **arrays)


def test_medmnist(tmp_path):
    write_medmnist(tmp_path / "pneumoniamnist.npz", 28, [[1], [0], [1]])
    write_medmnist(tmp_path / "pneumoniamnist_64.npz", 64, [[1], [0], [1]])
    write_medmnist(tmp_path / "organamnist_224.npz", 224, [[10], [0]])
    write_medmnist(tmp_path / "chestmnist.npz", 28, [[0, 1] * 7, [0] * 14])
    for config, side in (("pneumonia", 28), ("pneumonia_64", 64)):
        listing, by_file = listed(medmnist, tmp_path, config)
        assert listing.classes == ("normal", "pneumonia") and listing.modality == "xray"
        example = pickle.loads(pickle.dumps(by_file["val/000002.png"]))
        np.testing.assert_array_equal(Image.open(io.BytesIO(example.image())), np.full((side, side + 1), 52))
        assert example.label == 1 and example.split == example.study == "val" and example.source == "Kermany"
        assert len({example.group for example in listing.examples}) == len(by_file) == 9
        assert any("val has 1 / 2 images of normal, pneumonia; MedMNIST has 135 / 389" in n for n in listing.notes)
    listing, by_file = listed(medmnist, tmp_path, "organa_224")
    assert listing.modality == "ct" and listing.classes[by_file["test/000000.png"].label] == "spleen"
    (note,) = listing.notes
    assert note.endswith(" 2 / 2 / 2 images in train / val / test; MedMNIST has 34,561 / 6,491 / 17,778")
    listing, by_file = listed(medmnist, tmp_path, "chest")
    assert listing.classes == nih_chestxray14.CLASSES and by_file["train/000000.png"].label == (0, 1) * 7
    with pytest.raises(ValueError, match=r"looked for pneumoniamnist_128\.npz"):
        medmnist.listing(tmp_path, "pneumonia_128", OPTIONS)
    write_medmnist(tmp_path / "pneumoniamnist.npz", 28, [[1], [2]])
    (tmp_path / "pneumoniamnist_64.npz").write_bytes((tmp_path / "pneumoniamnist_64.npz").read_bytes()[:700])
    np.savez(tmp_path / "pneumoniamnist_128.npz", train_images=np.array([{}], object), train_labels=np.zeros((1, 1)))
    for config, word in (("pneumonia", "from 0 to 1"), ("pneumonia_64", "damaged"), ("pneumonia_128", "pickle")):
        with pytest.raises(ValueError, match=f"pneumoniamnist.*{word}"):
            medmnist.listing(tmp_path, config, OPTIONS)


def test_covid_xray_5k_real_names(shared, tmp_path):
    """All real file names in the study's repository; another data set gives the true patients of some images."""
    folder = shared / "data/covid_xray_study"
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("data_set/*/*/*")]
    names += (folder / "missing.txt").read_text().split()
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    listing, by_file = listed(covid_xray_5k, tmp_path)
    counts = Counter((example.study, example.label) for example in listing.examples)
    assert counts == {("train", 0): 121, ("train", 1): 994, ("val+test", 0): 100, ("val+test", 1): 1473}
    assert "the images per class are as published for the study's repository" in listing.notes
    oversampled, _ = listed(covid_xray_5k, tmp_path, "oversampled")
    counts = Counter((example.study, example.label) for example in oversampled.examples)
    assert counts["train", 0] == 242 and not any("differs" in note for note in oversampled.notes)
    (copied,) = {example.image for example in oversampled.examples if example.transform}
    assert copied == max(e.image for e in listing.examples if e.study == "train" and not e.label), "the study's bug"
    assert all(re.fullmatch(r"patient\d{5}", example.group) for example in listing.examples if example.label)
    assert all((example.extra == ("",)) == ("test/non" in file) for file, example in by_file.items())  # finding
    with (shared / "data/xray/labels.csv").open() as file:
        cases = {Path(r["path"]).stem: r["group"] for r in csv.DictReader(file) if r["source"] == "talo-cohen"}
    groups = defaultdict(set)
    for file, example in by_file.items():
        groups[cases.get(f"cohen_{Path(file).stem}", "cohen-unknown")].add(example.group)
    del groups["cohen-unknown"]  # their names are ids that do not show the patient
    assert len(groups) == 20 and all(len(by_name) == 1 for by_name in groups.values())
    splits = splits_of_groups(example for example in listing.examples if example.study == "train")
    assert all(len(names) == 1 for names in splits.values())


def test_covid_ct_real_names(shared, tmp_path):
    """The UCSD images under their names in the repository: names alone keep patients and papers together."""
    groups, lists = {}, defaultdict(list)
    with (shared / "data/ct/labels.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        match = re.fullmatch(r"(COVID|NonCOVID)/ucsd_(.+)\.jpg", row["path"])
        if match:
            name, stem = match.groups()
            web = row["group"].startswith("ucsd-crawled")
            file = re.sub(r"-(\d+)$", r"%\1", stem) + ".jpg" if web else stem + ".png"
            link = tmp_path / "Images-processed" / f"CT_{name}" / file
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(shared / "data/ct" / row["path"])
            lists[name, row["split"]].append(file)
            groups[f"CT_{name}/{file}"] = row["group"]
    for (name, split), files in lists.items():
        write_text(tmp_path / f"Data-split/{name}/{split}CT_{name}.txt", *files)
    _, by_file = listed(covid_ct, tmp_path)
    assert by_file.keys() == groups.keys() and len(groups) > 600
    names = defaultdict(set)
    for file, example in by_file.items():
        names[groups[file]].add(example.group)
    # MedPix's patient 3 has two runs of numbers.
    assert {group for group, by_name in names.items() if len(by_name) > 1} <= {"ucsd-medpix_patient_3"}


def test_blocks():
    blocks = {"neg_81": "neg_block2", "neg_119": "neg_block2", "neg_120": "neg_block3", "IM7x": "IMblock0", "x": "x"}
    assert {stem: source_files.block(stem) for stem in blocks} == blocks


def test_web_cases():
    cases = {
        "SARS-10.1148rg.242035193-g04mr34g09c-Fig9c-day27": "SARS-10.1148rg.242035193",
        "1-s2.0-S1684118220300682-main.pdf-003-b2": "1-s2.0-S1684118220300682",
        "kjr-21-e24-g003-l-a": "kjr-21-e24",
        "41591_2020_819_Fig1_HTML.webp-day5": "41591_2020_819",
        "nejmoa2001191_f1-PA": "nejmoa2001191",
        "auntminnie-d-2020_01_28_23_51_6665": "auntminnie-2020_01_28_23_51_6665",
        "covid-19-pneumonia-58-day-9": "covid-19-pneumonia-58",  # 58 is the number of a case, not of a figure
        "covid-19-rapidly-progressive-acute-ards-day-1": "covid-19-rapidly-progressive-acute-ards",
        "covid-19-pneumonia-rapidly-progressive-12-hours": "covid-19-pneumonia-rapidly-progressive",
        "88de9d8c39e946abd495b37cd07d89e5-0666-0": "88de9d8c39e946abd495b37cd07d89e5",
        "01E392EE-69F9-4E33-BFCE-E5C968654078": "01E392EE-69F9-4E33-BFCE-E5C968654078",
    }
    assert {stem: source_files.web_case(stem) for stem in cases} == cases
