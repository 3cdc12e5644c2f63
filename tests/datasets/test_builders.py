"""The CT data sets' listings on small made folders in the true layout, and COVID-CT's on real images."""

import csv
import os
import pickle
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn import model_selection, utils

from lungjax import datasets
from lungjax.data.imaging import images
from lungjax.datasets import coronahack, covid_chestxray, covid_ct, covid_xray_5k, covidx_ct, ct_cov19, ictcf
from lungjax.datasets import nccid_whole_lung as nccid
from lungjax.datasets.listing import parse_study

OPTIONS = datasets.PrepareOptions()


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 4), 90, np.uint8)).save(path)


def tree(root, *paths):
    for path in paths:
        picture(root / path)
    return root


def by_file(listing):
    return {example.file: example for example in listing.examples}


def counts(listing):
    total = Counter()
    for example in listing.examples:
        for split, times in parse_study(example.study).items():
            total[split, listing.classes[example.label]] += times
    return total


# What all have in common


@pytest.mark.parametrize(
    "module", [coronahack, covid_chestxray, covid_ct, covid_xray_5k, covidx_ct, ct_cov19, ictcf, nccid]
)
def test_flags_of_folders_are_refused_and_an_empty_folder_tells_what_is_sought(module, tmp_path):
    config = next(iter(module.ABOUT.expected))
    with pytest.raises(ValueError, match="--group_pattern is for folders"):
        module.listing(tmp_path, config, datasets.PrepareOptions(group_pattern="(x)"))
    with pytest.raises(ValueError, match=r"no .*; looked for "):
        module.listing(tmp_path, config, OPTIONS)


@pytest.mark.parametrize(
    "module", [coronahack, covid_chestxray, covid_ct, covid_xray_5k, covidx_ct, ct_cov19, ictcf, nccid]
)
def test_expected_counts_have_one_number_a_class(module):
    for config, table in module.ABOUT.expected.items():
        classes = module.CLASSES[config] if isinstance(module.CLASSES, dict) else module.CLASSES
        assert table and all(len(row) == len(classes) for row in table.values())


# CT-COV19


def cov19(root):
    return tree(
        root,
        *(f"Train/COV/01/FILE001{k}.jpg" for k in (1, 2, 70)),
        *(f"Train/COV/malek_2/pos_{k}.png" for k in (0, 39, 40)),
        *(f"Train/Normal/1/neg_{k}.png" for k in (0, 2170, 2173)),
        *(f"Train/OtherPneumonia/pneu_1/pneu_{k}.png" for k in range(120, 720, 20)),
        "Val/COV/30/FILE0011.jpg",
        "Val/Normal/1/neg_2600.png",
        *(f"Val/OtherPneumonia/pneu_{k}.png" for k in (133, 316)),
        "Test/COV/30/pos_1.png",
        "Test/Normal/1/neg_2174.png",
        "Test/OtherPneumonia/2/pneu_133.png",
    )


def test_ct_cov19(tmp_path):
    listing = ct_cov19.listing(cov19(tmp_path), "original", OPTIONS)
    found = by_file(listing)
    assert listing.classes == ("COV", "Normal", "OtherPneumonia") and listing.body and listing.study
    group = {file: example.group for file, example in found.items()}
    assert {group[f"Train/COV/01/FILE001{k}.jpg"] for k in (1, 2, 70)} == {"COV/01"}  # one patient, however numbered
    assert group["Train/COV/malek_2/pos_0.png"] == group["Train/COV/malek_2/pos_39.png"]
    assert group["Train/COV/malek_2/pos_0.png"] != group["Train/COV/malek_2/pos_40.png"]
    assert group["Train/Normal/1/neg_2173.png"] == group["Test/Normal/1/neg_2174.png"]  # torn by the shipped border
    assert group["Val/COV/30/FILE0011.jpg"] == group["Test/COV/30/pos_1.png"]
    # Strays of the flat folder are with their neighbours, and the test's own series is apart.
    assert group["Val/OtherPneumonia/pneu_133.png"] == group["Train/OtherPneumonia/pneu_1/pneu_140.png"]
    assert group["Val/OtherPneumonia/pneu_133.png"] != group["Test/OtherPneumonia/2/pneu_133.png"]
    cut = defaultdict(set)
    for example in listing.examples:
        assert example.study == example.file.split("/")[0].lower()
        if example.label == 2 and example.study != "test":
            cut[example.group].add(example.split)
        else:
            assert example.split == example.study
    assert all(len(splits) == 1 for splits in cut.values())
    assert {split for splits in cut.values() for split in splits} == {"train", "val"}
    assert any("val has 1 / 1 / 2" in note for note in listing.notes)
    assert any("4,404" in note for note in listing.notes)
    assert os.path.isfile(listing.examples[0].image)


def test_ct_cov19_mistakes(tmp_path):
    picture(tmp_path / "Val/Covid/x.png")
    for split in ("Train", "Test"):
        for name in ct_cov19.CLASSES:
            picture(tmp_path / split / name / "1" / "a1.png")
    with pytest.raises(ValueError, match="folder Covid is no class; .*COV"):
        ct_cov19.listing(tmp_path, "original", OPTIONS)
    (tmp_path / "Val/Covid").rename(tmp_path / "Val/cov")
    with pytest.raises(ValueError, match="no folder of class Normal; looked for Normal/"):
        ct_cov19.listing(tmp_path, "original", OPTIONS)
    (tmp_path / "Val/Normal").mkdir()
    with pytest.raises(ValueError, match="Normal has no image"):
        ct_cov19.listing(tmp_path, "original", OPTIONS)


# NCCID


def write_nccid(root, count=41):
    names = [f"1.2.826.0.1.3680043.9.3218.1.1.{i // 3}.1069.161.{i}.0.jpg" for i in range(count)]
    for name in names:
        picture(root / name)
    rows = [f"{name},{int(i // 3 % 4 == 0)}" for i, name in enumerate(names)]
    (root / "whole_lung_label.csv").write_text("\n".join(["image_name,whole_lung", *rows]) + "\n")
    return names


def test_nccid(tmp_path):
    names = write_nccid(tmp_path)
    (tmp_path / names[5]).unlink()  # the study drops it before it draws; `prepare` asks what to do
    listing = nccid.listing(tmp_path, "default", OPTIONS)
    found = by_file(listing)
    assert not listing.body and listing.classes == ("Others", "WholeLung")
    assert [example.file for example in listing.examples] == names
    assert found[names[0]].group == found[names[2]].group != found[names[3]].group
    assert found[names[0]].label == 1 and found[names[3]].label == 0
    per_group = defaultdict(set)
    for example in listing.examples:
        per_group[example.group].add(example.split)
    assert all(len(splits) == 1 for splits in per_group.values())
    there = [name for name in names if name != names[5]]
    train, rest = model_selection.train_test_split(there, test_size=1.0 - 0.70, random_state=42)
    val, test = model_selection.train_test_split(rest, test_size=0.15 / (0.15 + 0.15), random_state=42)
    for split, wanted in (("train", train), ("val", val), ("test", test), ("", [names[5]])):
        assert {example.file for example in listing.examples if example.study == split} == set(wanted)


def test_nccid_study_sizes_are_the_published_ones():
    cells = Counter(nccid._study(4773, np.arange(4773)))
    assert (cells["train"], cells["val"], cells["test"]) == (3341, 716, 716)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("whole_lung\n", "wholelung\n", "no column whole_lung; the nearest: wholelung"),
        (".0.0.jpg,1", ".0.0.jpg,2", "line 2: unknown whole_lung '2'; allowed are 0, 1"),
        (".1.0.jpg", ".0.0.jpg", "line 3: .* is already in whole_lung_label.csv line 2"),
    ],
)
def test_nccid_mistakes(tmp_path, old, new, message):
    write_nccid(tmp_path, 6)
    table = tmp_path / "whole_lung_label.csv"
    table.write_text(table.read_text().replace(old, new, 1))
    with pytest.raises(ValueError, match=message):
        nccid.listing(tmp_path, "default", OPTIONS)


# iCTCF


def write_ictcf(root, third="NiCT"):
    sizes = {"nCT": 110, "pCT": 30, third: 55}
    return tree(root, *(f"Original CT Scans/{n}/{n}{k}.jpg" for n, count in sizes.items() for k in range(1, count + 1)))


@pytest.mark.parametrize("third", ["NiCT", "niCT"])
def test_ictcf(tmp_path, monkeypatch, third):
    monkeypatch.setattr(ictcf, "TARGET", 100)
    write_ictcf(tmp_path, third)
    whole = ictcf.listing(tmp_path, "oversampled", OPTIONS)
    plain = ictcf.listing(tmp_path, "default", OPTIONS)
    assert plain.body and plain.classes == ("nCT", "pCT", "niCT")
    assert Counter(example.label for example in plain.examples) == {0: 110, 1: 30, 2: 55}
    assert Counter(example.label for example in whole.examples) == {0: 110, 1: 100, 2: 100}
    # The originals are the same in both.
    assert [e for e in whole.examples if not callable(e.image)] == list(plain.examples)
    for example in whole.examples:
        assert (example.split == "") == callable(example.image)
    group = {example.file: example.group for example in plain.examples}
    name = f"Original CT Scans/{third}/{third}"
    assert group[f"{name}1.jpg"] == group[f"{name}39.jpg"] != group[f"{name}40.jpg"]
    per_group = defaultdict(set)
    for example in plain.examples:
        per_group[example.group].add(example.split)
    assert all(len(splits) == 1 for splits in per_group.values())


def test_ictcf_study_is_drawn_after_oversampling(tmp_path, monkeypatch):
    monkeypatch.setattr(ictcf, "TARGET", 100)
    listing = ictcf.listing(write_ictcf(tmp_path), "oversampled", OPTIONS)
    ordered = sorted(listing.examples, key=lambda example: example.label)  # stable: originals before copies
    labels = [example.label for example in ordered]
    rest, test = model_selection.train_test_split(range(310), test_size=0.1, random_state=25, stratify=labels)
    kept = [labels[i] for i in rest]
    train, val = model_selection.train_test_split(rest, test_size=0.2 / 0.9, random_state=25, stratify=kept)
    for split, rows in (("train", train), ("val", val), ("test", test)):
        assert {i for i, example in enumerate(ordered) if example.study == split} == set(rows)


def test_ictcf_sizes_are_the_published_ones():
    listing = Counter(zip(ictcf._study(labels := [0] * 9979 + [1] * 9000 + [2] * 9000), labels, strict=True))
    assert [listing["test", label] for label in range(3)] == [998, 900, 900]
    assert sum(listing["train", label] for label in range(3)) == 19585
    assert sum(listing["val", label] for label in range(3)) == 5596


def test_ictcf_generated_images_are_drawn_by_the_seed_and_can_go_to_another_process(tmp_path, monkeypatch):
    monkeypatch.setattr(ictcf, "TARGET", 60)
    write_ictcf(tmp_path)
    made = [
        ictcf.listing(tmp_path, "oversampled", datasets.PrepareOptions(seed=seed)).examples[-1] for seed in (0, 0, 1)
    ]
    assert made[0].image.args == made[1].image.args != made[2].image.args
    drawn = pickle.loads(pickle.dumps(made[0].image))()
    assert images.decode(drawn, None).shape == (4, 4)
    angles, downs, rights = np.array(
        [e.image.args[1:] for e in ictcf.listing(tmp_path, "oversampled", OPTIONS).examples if callable(e.image)]
    ).T
    assert 10 < np.abs(angles).max() <= 15 and 0.07 < np.abs(downs).max() <= 0.1 and np.abs(rights).max() <= 0.1


def test_ictcf_generates_by_turning_and_shifting(tmp_path):
    gray = np.random.default_rng(0).integers(0, 256, (20, 30), dtype=np.uint8)
    Image.fromarray(gray).save(tmp_path / "a.png")

    def generate(*move):
        return images.decode(ictcf.generate(str(tmp_path / "a.png"), *move), None)

    np.testing.assert_array_equal(generate(0.0, 0.0, 0.0), gray)
    # As in Keras a positive shift looks further down and right; the edge is repeated.
    wanted = np.pad(gray, ((0, 2), (0, 3)), mode="edge")[2:, 3:]
    np.testing.assert_array_equal(generate(0.0, 0.1, 0.1), wanted)
    square = gray[:, :20]
    Image.fromarray(square).save(tmp_path / "a.png")
    assert np.abs(generate(90.0, 0.0, 0.0).astype(int) - np.rot90(square)).max() <= 1


# COVIDx CT as the study resampled it


def test_covidx_ct_resampling_is_the_studys(tmp_path):
    folder = tmp_path / "3A_images"
    folder.mkdir()
    sizes = {"train": (30, 12, 50), "val": (9, 20, 14), "test": (3, 4, 5)}
    names = defaultdict(list)
    for split, classes in sizes.items():
        lines = [(label, i) for label, count in enumerate(classes) for i in range(count)]
        lines = [lines[i] for i in np.random.default_rng(1).permutation(len(lines))]
        for label, i in lines:
            names[split, label].append(f"CP_{label}{i}{len(split)}_1_{i:04}.png")
        order = {label: iter(names[split, label]) for label in range(3)}
        text = "".join(f"{next(order[label])} {label} 0 0 4 4\n" for label, _ in lines)
        (tmp_path / f"{split}_COVIDx_CT-3A.txt").write_text(text)
    listing = covidx_ct.listing(tmp_path, "3a", OPTIONS)
    assert listing.body
    times = {example.file: parse_study(example.study) for example in listing.examples}
    for split, label, draws in (("train", 0, 12), ("train", 2, 12), ("val", 0, 14), ("val", 1, 14)):
        taken = Counter(utils.resample(names[split, label], replace=True, n_samples=draws, random_state=0))
        assert {n: times[n].get(split, 0) for n in names[split, label]} == {n: taken[n] for n in names[split, label]}
    total = counts(listing)
    assert {split: [total[split, name] for name in listing.classes] for split in sizes} == {
        "train": [12, 12, 12],
        "val": [14, 14, 14],
        "test": [3, 4, 5],
    }
    assert all(example.split for example in listing.examples)


# COVID-CT


def write_covid_ct(root, table=True):
    names = {
        "COVID": {
            "train": ["2020.01.24.919183-p27-132.png", "2020.02.10.20021584-p6-52%0.png"],
            "val": ["2020.02.10.20021584-p6-52%10.png"],
            "test": ["bmj.m606.full-p4-22%0.png"],
        },
        "NonCOVID": {
            "train": ["14.png", "15.png", "63%0.jpg", "63%7.jpg", "64.jpg"],
            "val": ["40.png"],
            "test": ["41.png"],
        },
    }
    for name, lists in names.items():
        for split, listed in lists.items():
            tree(root / f"Images-processed/CT_{name}", *listed)
            path = root / f"Data-split/{name}/{split}CT_{name}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(listed) + "\n\n")
    if table:
        rows = "0,14.png,medpix_patient_3,14\n1,15.png,medpix_patient_4,14\n2,40.png,medpix_patient_3,14\n"
        (root / covid_ct.TABLE).write_text(",image name,patient id,\n" + rows)


def test_covid_ct(tmp_path):
    write_covid_ct(tmp_path)
    picture(tmp_path / "Images-processed/CT_COVID/spare.png")
    listing = covid_ct.listing(tmp_path, "default", OPTIONS)
    found = by_file(listing)
    assert listing.classes == ("NonCOVID", "COVID") and listing.body and len(found) == 11
    assert all(example.split == example.study for example in listing.examples)
    assert found["CT_COVID/2020.02.10.20021584-p6-52%0.png"].group == "paper 2020.02.10.20021584"
    assert found["CT_COVID/2020.02.10.20021584-p6-52%10.png"].group == "paper 2020.02.10.20021584"
    assert found["CT_COVID/bmj.m606.full-p4-22%0.png"].group == "paper bmj.m606.full"
    assert found["CT_NonCOVID/14.png"].group == found["CT_NonCOVID/40.png"].group == "medpix_patient_3"
    assert found["CT_NonCOVID/15.png"].group == "medpix_patient_4"
    assert (
        found["CT_NonCOVID/63%7.jpg"].group == "crawled_patient_63"
        and found["CT_NonCOVID/41.png"].group == "medpix_run_40"
    )
    assert found["CT_NonCOVID/64.jpg"].source == "web" and found["CT_NonCOVID/41.png"].source == "MedPix"
    assert "images of CT_COVID that no split list names were left out: 1" in listing.notes
    assert any("lacks 4 of them" in note for note in listing.notes)


def test_covid_ct_without_a_table_keeps_runs_of_numbers_together(tmp_path):
    write_covid_ct(tmp_path, table=False)
    found = by_file(covid_ct.listing(tmp_path, "default", OPTIONS))
    assert found["CT_NonCOVID/14.png"].group == found["CT_NonCOVID/15.png"].group == "medpix_run_14"
    assert found["CT_NonCOVID/40.png"].group == found["CT_NonCOVID/41.png"].group != "medpix_run_14"


def test_covid_ct_mistakes(tmp_path):
    write_covid_ct(tmp_path)
    listed = tmp_path / "Data-split/COVID/valCT_COVID.txt"
    listed.write_text("bmj.m606.full-p4-22%0.png\n")
    with pytest.raises(ValueError, match=r"testCT_COVID.txt line 1: .* is already in valCT_COVID.txt line 1"):
        covid_ct.listing(tmp_path, "default", OPTIONS)
    listed.write_text("\n")
    with pytest.raises(ValueError, match="valCT_COVID.txt is empty"):
        covid_ct.listing(tmp_path, "default", OPTIONS)
    listed.unlink()
    with pytest.raises(ValueError, match="no val list of COVID; looked for Data-split/COVID/valCT_COVID.txt"):
        covid_ct.listing(tmp_path, "default", OPTIONS)


def test_covid_ct_on_real_images(shared, tmp_path):
    """The UCSD images among the shared ones, under the names of the repository, with the patients of its table."""
    known = {}
    lists = defaultdict(list)
    with (shared / "data/ct/labels.csv").open() as file:
        for row in csv.DictReader(file):
            match = re.fullmatch(r"(COVID|NonCOVID)/ucsd_(.+)\.jpg", row["path"])
            if not match:
                continue
            name, stem = match.groups()
            web = row["group"].startswith("ucsd-crawled")
            file_name = re.sub(r"-(\d+)$", r"%\1", stem) + ".jpg" if web else stem + ".png"
            folder = tmp_path / "Images-processed" / f"CT_{name}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / file_name).symlink_to(shared / "data/ct" / row["path"])
            lists[name, row["split"]].append(file_name)
            known[f"CT_{name}/{file_name}"] = row["group"]
    for (name, split), listed in lists.items():
        path = tmp_path / f"Data-split/{name}/{split}CT_{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(listed))
    found = by_file(covid_ct.listing(tmp_path, "default", OPTIONS))
    assert found.keys() == known.keys() and len(found) > 600
    together = defaultdict(set)
    for file, example in found.items():
        together[known[file]].add(example.group)
        assert images.decode(Path(example.image).read_bytes(), None).ndim == 2
    # No patient or paper is torn apart by what the names alone tell, but for MedPix's patient 3, who has two runs.
    assert [group for group, made in together.items() if len(made) > 1] in ([], ["ucsd-medpix_patient_3"])
