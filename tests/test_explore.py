"""The page of a data set shows the correct numbers, and its figures are not empty."""

import re
from dataclasses import replace
from html import unescape

import commands
import folders
import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import recall_score
from sklearn.utils import compute_class_weight

from lungjax import datasets, explore
from lungjax.data import statistics
from lungjax.data.imaging import study_masks
from lungjax.datasets.phantom import slices as phantom
from lungjax.report import dataset_page, style

SECTIONS = [
    "Caveats", "Classes and patients", "Sources", "Image sizes", "Gray levels", "Samples", "Stages and masks",
    "Augmentation", "Duplicates",
]  # fmt: skip
# Label, split, group, source and slice; "=3" is a copy of slice 3, "~3" a resized copy.
ROWS = [
    ("covid", "train", "p0", "north", 0), ("covid", "train", "p0", "north", 1), ("covid", "train", "p1", "north", 2),
    ("covid", "val", "p2", "north", 3), ("covid", "test", "p3", "north", 4), ("covid", "test", "p4", "south", "=2"),
    ("normal", "train", "p5", "east", 5), ("normal", "train", "p6", "south", 6), ("normal", "val", "p7", "east", 7),
    ("normal", "test", "p8", "east", 8), ("normal", "test", "p9", "east", "~5"), ("covid", "train", "p10", "north", 9),
]  # fmt: skip


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Twelve images prepared as folder/mine; two test images are also in train."""
    root, patient, made = tmp_path_factory.mktemp("explore"), phantom.new_patient(3, "COVID-19"), []
    images = [phantom.gray(phantom.draw_slice(patient, z).hu, patient.window) for z in phantom.levels(patient, 10)]
    for i, (*values, which) in enumerate(ROWS):
        image = Image.fromarray(images[int(str(which).strip("=~"))])
        if str(which).startswith("~"):
            image = image.resize((image.width * 4 // 5, image.height * 4 // 5))
        if i == 7:  # with a red line
            image = image.convert("RGB")
            image.paste((255, 0, 0), (0, 0, image.width, 1))
        columns = dict(zip(("label", "split", "group", "source"), values, strict=True))
        made.append(columns | {"path": f"{i:02}.png", "image": np.asarray(image)})
    folders.prepare(root, "mine", made)
    return root / "data"


@pytest.fixture(scope="module")
def page(prepared):
    """The folder and text of the page for protocol `study`, without the slow snake stages."""
    data = datasets.open_dataset("folder/mine", prepared, "study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study_masks, "STAGES", ("study_crop", "features"))
        patch.setattr(style, "DPI", 40)
        index = dataset_page.write(data, prepared, prepared.parent / "page", {}, stages=True, samples=5)
    return index.parent, index.read_text("utf-8")


def tables(text):
    """Returns the tables of a page as lists of rows of cells."""
    blocks = re.findall(r"<table>(.*?)</table>", text, re.S)
    rows = [re.findall(r"<tr>(.*?)</tr>", table, re.S) for table in blocks]
    return [[[unescape(c) for c in re.findall(r"<t[hd]>(.*?)</t[hd]>", row)] for row in table] for table in rows]


def test_sections_and_figures(page):
    folder, text = page
    assert [unescape(t) for t in re.findall(r"<h2>(.*?)</h2>", text)] == SECTIONS
    figures = re.findall(r'<img src="([^"]*)"', text)
    assert sorted(figures) == sorted(path.name for path in folder.glob("*.png"))
    assert {"stages.png", "stages_study.png", "augment_ct_cov19_original.png", "exact_copies.png"} <= set(figures)
    for name in figures:
        pixels = np.asarray(Image.open(folder / name).convert("L"))
        assert pixels.std() > 15 and len(np.unique(pixels)) > 50, name
    assert "://" not in text  # loads nothing from elsewhere
    assert not list(folder.parent.glob("*.partial"))


def test_counts(page):
    by_first = {table[0][0]: table[1:] for table in reversed(tables(page[1]))}
    clean, study = (table for table in tables(page[1]) if table[0][0] == "split")
    head = ["split", "covid", "normal", "images", "covid, patients", "normal, patients", "patients"]
    rows = [text.split() for text in ("train 4 2 6 3 2 5", "val 1 1 2 1 1 2", "test 2 2 4 2 2 4")]
    assert study == [head, *rows]
    assert clean == [head, ["train", "3", "1", "4", "2", "1", "3"], *rows[1:]]  # without the copies of test images
    assert "2 of 12 images are in no split of this protocol" in page[1]
    assert by_first["source"] == [["north", "6", "0"], ["east", "0", "4"], ["south", "1", "1"]]
    assert "Every image of source north is covid (6 images)" in page[1]
    assert "Every image of source south" not in page[1]
    weights = next(table for table in tables(page[1]) if table[-1][0] == "class weight")
    expected = compute_class_weight("balanced", classes=np.arange(2), y=[0, 0, 0, 0, 1, 1])
    assert weights[1:] == [["train images", "4", "2"], ["class weight", *(f"{w:.3f}" for w in expected)]]
    height = Image.open(page[0].parent / "in_mine/07.png").height  # one of its rows is red
    assert by_first["class"] == [["covid", "0 of 7", "0.00"], ["normal", "1 of 5", f"{255 / height / 5:.2f}"]]
    leaks = {row[0]: row[1:] for row in by_first["protocol, split"]}
    assert leaks["study, test"] == ["4", "1", "1", "0", "2"] and leaks["clean, test"] == ["4", "0", "0", "0", "0"]


def test_duplicates(page):
    text = page[1][page[1].index("<h3>Exact copies") :]
    assert re.findall(r"<code>(.*?)</code>", text) == ["02.png<br>05.png", "06.png<br>10.png"]
    numbers = re.findall(r": (\d). Of these, (\d) are in different splits of\s+protocol=study, and (\d) have", text)
    assert numbers == [("1", "1", "0")] * 2


def test_command_without_stages(prepared, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dataset_page, "MAX_HISTOGRAMS", 4)
    monkeypatch.setattr(style, "DPI", 40)
    flags = ["--dataset=folder/mine", "--augment=none", "--nostages", "--samples=1", f"--out={tmp_path / 'out'}"]
    assert commands.run(explore, f"--data_dir={prepared}", *flags) == 0
    text = (tmp_path / "out/index.html").read_text("utf-8")
    assert str(tmp_path / "out/index.html") in capsys.readouterr().out
    assert "Skipped: body and lung masks are for CT slices" in text and "a random 4 of 12 images" in text
    assert not (tmp_path / "out/stages.png").exists()


def test_page_without_a_train_split(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(style, "DPI", 40)
    data = datasets.open_dataset("folder/mine", prepared)
    splits = np.where(data.columns["split"] == "train", "", data.columns["split"])
    view = replace(data, columns=data.columns | {"split": splits})
    text = dataset_page.write(view, prepared, tmp_path / "out", {}, stages=False, samples=1).read_text("utf-8")
    assert "Samples" in text and "Imbalance" not in text and "infinitely" not in text


def test_command_errors(prepared, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    data, mine = f"--data_dir={prepared}", "--dataset=folder/mine"
    cases = (
        ([data, "--dataset=foldr"], 2, "did you mean folder"),
        ([data, "--dataset=folder/other"], 2, "not prepared"),
        ([data, mine, "--augment=none,nccd"], 2, "did you mean nccid"),
        ([data, mine, "--augment=covidnet_ct"], 2, "masks"),
        ([data, mine, "--out=full"], 2, "not empty"),
    )
    commands.assert_errors(capsys, explore, cases)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["full", "mine.txt"]


def test_shortcut_baseline():
    keys = np.array([0, 0, 0, 1, 1, 1, 0, 0, 1, 1, 2])
    labels = np.array([0, 0, 1, 1, 0, 0, 0, 1, 1, 0, 0])
    train, test = np.arange(6), np.arange(6, 10)
    # Keys 0 and 1 each have half of the zeros and half of the ones, so the result is chance.
    assert statistics.guess(keys, labels, train, test, 2) == 0.5
    keys[4] = 0  # key 0: 3/4 of the zeros and 1/2 of the ones, key 1: 1/4 and 1/2
    assert statistics.guess(keys, labels, train, test, 2) == recall_score(labels[test], keys[test], average="macro")
    alone = np.array([6, 8, 10])  # a key that train lacks is at chance
    assert statistics.guess(keys, labels, train, alone, 2) == pytest.approx(((1 + 0.5) / 2 + 1) / 2)
    assert statistics.guess(keys, labels, train, np.array([6]), 2) is None
