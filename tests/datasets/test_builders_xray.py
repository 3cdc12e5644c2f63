"""The X-ray data sets' listings on small made folders in the true layout, and on real X-rays."""

import csv
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lungjax import datasets
from lungjax.data.imaging import images
from lungjax.datasets import coronahack, covid_chestxray, covid_xray_5k

OPTIONS = datasets.PrepareOptions()


def tree(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 4), 90, np.uint8)).save(root / path)
    return root


def by_file(listing):
    return {example.file: example for example in listing.examples}


def splits_of_groups(listing):
    found = defaultdict(set)
    for example in listing.examples:
        if example.split:
            found[example.group].add(example.split)
    return found


# COVID-XRay-5K


def write_5k(root):
    return tree(
        root,
        "train/covid/auntminnie-a-2020_01_28.jpeg",  # an original, though it begins with the prefix of generated ones
        "train/covid/a_0_4235.jpg",
        "train/covid/covid_original_nejm1_f1.jpg_0a1b2c3d-0a1b-0a1b-0a1b-0a1b2c3d4e5f.jpg",
        *(f"train/covid/paper{k}_f{f}-PA.jpg" for k in range(100, 110) for f in (1, 3)),
        *(f"train/non/Lung Opacity-patient0000{p}-study1-view{v}_frontal.jpg" for p in range(9) for v in (1, 2)),
        "train/non/Edema/patient00010-study1-view1_frontal.jpg",
        "test/covid/paper100_f2-PA.jpg",
        "test/non/patient00011-study2-view1_frontal.jpg",
    )


@pytest.mark.parametrize("root", ["", "data_upload_v3"])
def test_covid_xray_5k(tmp_path, root):
    write_5k(tmp_path / root)
    listing = covid_xray_5k.listing(tmp_path, "default", OPTIONS)
    found = {file.removeprefix(f"{root}/"): example for file, example in by_file(listing).items()}
    assert listing.classes == ("covid", "non") and not listing.body and listing.extra == ("finding",)
    assert {example.label for file, example in found.items() if "/covid/" in file} == {0}
    generated = [file for file, example in found.items() if not example.split]
    assert len(generated) == 2 and all(re.search("/(a_0|covid_original)", file) for file in generated)
    for file, example in found.items():
        assert example.study == ("train" if file.startswith("train") else "val+test")
        assert example.split in (("test",) if file.startswith("test") else ("train", "val", ""))
    assert Counter(example.split for example in found.values())["val"] >= 4
    assert found["train/covid/paper100_f1-PA.jpg"].group == found["test/covid/paper100_f2-PA.jpg"].group == "paper100"
    opacity = found["train/non/Lung Opacity-patient00003-study1-view2_frontal.jpg"]
    assert (opacity.group, opacity.extra, opacity.source) == ("patient00003", ("Lung Opacity",), "CheXpert")
    assert found["train/non/Edema/patient00010-study1-view1_frontal.jpg"].extra == ("Edema",)
    assert found["test/non/patient00011-study2-view1_frontal.jpg"].extra == ("",)
    train = {group: made - {"test"} for group, made in splits_of_groups(listing).items()}
    assert all(len(made) <= 1 for made in train.values())
    assert any("train has 23 / 19" in note for note in listing.notes)
    assert any(note.startswith("2 generated images") for note in listing.notes)


def test_covid_xray_5k_of_the_studys_repository_is_known_by_its_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(covid_xray_5k, "REPOSITORY", {"train": (23, 19), "test": (1, 1)})
    notes = covid_xray_5k.listing(write_5k(tmp_path), "default", OPTIONS).notes
    assert "all images per class are as in the study's repository" in notes
    assert not any("differs" in note for note in notes)


def test_covid_xray_5k_mistakes(tmp_path):
    write_5k(tmp_path)
    (tmp_path / "test/non").rename(tmp_path / "test/none")
    with pytest.raises(ValueError, match="no folder of class non; looked for non/"):
        covid_xray_5k.listing(tmp_path, "default", OPTIONS)
    (tmp_path / "test/non").mkdir()
    with pytest.raises(ValueError, match="non has no image"):
        covid_xray_5k.listing(tmp_path, "default", OPTIONS)


# COVID-19 image data collection

HEADER = (
    "patientid,offset,sex,age,finding,RT_PCR_positive,view,modality,folder,filename,url,license,"  # ends so in truth
)
ROWS = [
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


def write_collection(root, rows=ROWS, header=HEADER):
    (root / "metadata.csv").write_text("\n".join([header, *rows]) + "\n")
    return root


@pytest.mark.parametrize(
    ("config", "labels"),
    [
        ("covid", {"a": 1, "b": 1, "e": 0, "f": 0, "g": 0, "h": 0, "i": 0, "j": 0, "m": 0}),
        ("findings", {"a": 1, "b": 1, "e": 2, "g": 3, "h": 4, "i": 0}),
    ],
)
def test_covid_chestxray(tmp_path, config, labels):
    listing = covid_chestxray.listing(write_collection(tmp_path), config, OPTIONS)
    found = by_file(listing)
    assert {file: example.label for file, example in found.items()} == {f"images/{k}.png": v for k, v in labels.items()}
    assert listing.study == "" and not listing.body and {example.study for example in listing.examples} == {""}
    assert all(len(made) == 1 for made in splits_of_groups(listing).values())
    first = found["images/a.png"]
    assert first.group == found["images/b.png"].group == "patient 2"
    assert first.source == "nejm.org" and first.image == str(tmp_path / "images/a.png")
    assert dict(zip(listing.extra, first.extra, strict=True)) == {
        "view": "PA",
        "finding": "Pneumonia/Viral/COVID-19",
        "sex": "M",
        "age": "65",
        "RT_PCR_positive": "Y",
        "license": "CC BY",
    }
    assert any(note.startswith(f"{len(ROWS) - len(labels)} rows left out: ") for note in listing.notes)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("patientid", "Patientid", "no column patientid; the nearest: Patientid"),
        ("No Finding", "No finding", "line 10: unknown finding 'No finding'; the nearest: No Finding"),
        ("b.png", "a.png", "metadata.csv line 3: images/a.png is already in metadata.csv line 2"),
        ("\n2,0", "\n,0", "line 2: patientid is empty"),
        ("X-ray", "CT", "no frontal X-ray"),
    ],
)
def test_covid_chestxray_mistakes(tmp_path, old, new, message):
    table = write_collection(tmp_path) / "metadata.csv"
    table.write_text(table.read_text().replace(old, new))
    with pytest.raises(ValueError, match=message):
        covid_chestxray.listing(tmp_path, "covid", OPTIONS)


# CoronaHack

HACK = [
    "0,IM-0128-0001.jpeg,Normal,TRAIN,,",
    "1,IM-0439-0001.jpeg,Normal,TRAIN,,",
    "2,IM-0439-0001-0002.jpeg,Normal,TRAIN,,",
    "3,person940_virus_1602.jpeg,Pnemonia,TRAIN,,Virus",
    "4,person940_bacteria_2865.jpeg,Pnemonia,TRAIN,,bacteria",
    "5,person7_virus_9.jpeg,Pnemonia,TRAIN,,Virus",
    "6,kjr-21-e24-g003-l-a.jpg,Pnemonia,TRAIN,COVID-19,Virus",
    "7,kjr-21-e24-g002-l-a.jpg,Pnemonia,TRAIN,COVID-19,Virus",
    *(f"{i},NORMAL2-IM-{i:04}-0001.jpeg,Normal,TRAIN,," for i in range(8, 40)),
    *(f"{i},person{i}_virus_{i}.jpeg,Pnemonia,TRAIN,,Virus" for i in range(40, 80)),
    "80,person7_virus_6.jpeg,Pnemonia,TEST,,Virus",
    "81,IM-0001-0001.jpeg,Normal,TEST,,",
]


def write_hack(root, inner="Coronahack-Chest-XRay-Dataset/Coronahack-Chest-XRay-Dataset"):
    header = ",X_ray_image_name,Label,Dataset_type,Label_2_Virus_category,Label_1_Virus_category"
    (root / "Chest_xray_Corona_Metadata.csv").write_text("\n".join([header, *HACK]) + "\n")
    return tree(root, *(f"{inner}/{r.split(',')[3].lower()}/{r.split(',')[1]}" for r in HACK))


def test_coronahack(tmp_path):
    listing = coronahack.listing(write_hack(tmp_path), "default", OPTIONS)
    found = by_file(listing)
    assert listing.classes == ("Normal", "Pneumonia") and len(found) == len(HACK) and not listing.body
    assert all(Path(example.image).is_file() for example in listing.examples)
    group = {file.removeprefix("train/"): example.group for file, example in found.items()}
    assert group["IM-0439-0001.jpeg"] == group["IM-0439-0001-0002.jpeg"] == "IM-0439"
    assert group["NORMAL2-IM-0008-0001.jpeg"] == "NORMAL2-IM-0008"
    assert group["person940_virus_1602.jpeg"] == group["person940_bacteria_2865.jpeg"] == "person940"
    assert group["person7_virus_9.jpeg"] == group["test/person7_virus_6.jpeg"]
    assert group["kjr-21-e24-g003-l-a.jpg"] == group["kjr-21-e24-g002-l-a.jpg"] == "kjr-21-e24"
    assert found["train/kjr-21-e24-g003-l-a.jpg"].extra == ("Virus", "COVID-19")
    assert found["train/person7_virus_9.jpeg"].source == "Kermany"
    for file, example in found.items():
        assert (example.split == "test") == file.startswith("test/") == (example.study == "val+test")
    assert {example.split for example in listing.examples} == {"train", "val", "test"}
    assert all(len(made - {"test"}) <= 1 for made in splits_of_groups(listing).values())
    assert any("test has 1 / 1" in note for note in listing.notes)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "0,IM-0128-0001.jpeg,Normal",
            "0,IM-0128-0001.jpeg,normal",
            "line 2: unknown Label 'normal'; allowed are Normal",
        ),
        (
            "Virus\n6",
            "Virus\n5,person7_virus_9.jpeg,Pnemonia,TRAIN,,Virus\n6",
            "line 8: train/person7_virus_9.jpeg is already",
        ),
        ("TEST", "VALID", "unknown Dataset_type 'VALID'; allowed are TRAIN, TEST"),
        ("Dataset_type", "Dataset", "no column Dataset_type; the nearest: Dataset"),
    ],
)
def test_coronahack_mistakes(tmp_path, old, new, message):
    table = write_hack(tmp_path) / "Chest_xray_Corona_Metadata.csv"
    table.write_text(table.read_text().replace(old, new, 1))
    with pytest.raises(ValueError, match=message):
        coronahack.listing(tmp_path, "default", OPTIONS)


# Real X-rays


def real(shared):
    with (shared / "data/xray/labels.csv").open() as file:
        return [(shared / "data/xray" / row["path"], row) for row in csv.DictReader(file)]


def test_covid_xray_5k_on_real_images(shared, tmp_path):
    known = {}
    for path, row in real(shared):
        if row["source"] == "talo-cohen" or (row["source"], row["label"]) == ("talo-nih", "Normal"):
            split = "test" if row["split"] == "test" else "train"
            patient = re.search(r"(\d{8})_", path.name)
            name = (
                path.name.removeprefix("cohen_")
                if row["label"] == "COVID"
                else f"patient{patient.group(1)}-{path.name}"
            )
            made = tmp_path / split / ("covid" if row["label"] == "COVID" else "non") / name
            made.parent.mkdir(parents=True, exist_ok=True)
            made.symlink_to(path)
            known[made.relative_to(tmp_path).as_posix()] = row
    listing = covid_xray_5k.listing(tmp_path, "default", OPTIONS)
    found = by_file(listing)
    assert found.keys() == known.keys() and len(known) > 400
    together = defaultdict(set)
    for file, example in found.items():
        if known[file]["group"] != "cohen-unknown":  # bare ids, of which the names tell nothing
            together[known[file]["group"]].add(example.group)
    assert not {group: made for group, made in together.items() if len(made) > 1}
    assert all(images.decode(Path(e.image).read_bytes(), None).ndim == 2 for e in listing.examples[::20])
    assert all(len(made) == 1 for made in splits_of_groups(listing).values())


def test_covid_chestxray_on_real_images(shared, tmp_path):
    (tmp_path / "images").mkdir()
    rows, known = [], {}
    for path, row in real(shared):
        if row["source"] in ("hannover", "talo-nih"):
            (tmp_path / "images" / path.name).symlink_to(path)
            finding = {"COVID": "Pneumonia/Viral/COVID-19", "Normal": "No Finding", "Pneumonia": "Pneumonia"}[
                row["label"]
            ]
            rows.append(f"{row['group']},,,,{finding},,PA,X-ray,images,{path.name},https://{row['source']},,")
            known[f"images/{path.name}"] = row
    listing = covid_chestxray.listing(write_collection(tmp_path, rows), "covid", OPTIONS)
    assert by_file(listing).keys() == known.keys()
    assert all(e.label == (known[e.file]["label"] == "COVID") for e in listing.examples)
    assert all(len(made) == 1 for made in splits_of_groups(listing).values())
    share = Counter((e.split, e.label) for e in listing.examples)
    assert all(
        0.1 < share[split, label] / sum(share[s, label] for s in ("train", "val", "test")) < 0.2
        for split in ("val", "test")
        for label in (0, 1)
    )
    assert all(Path(e.image).is_file() for e in listing.examples)
