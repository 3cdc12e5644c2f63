"""The page of a data set: the numbers are the data's own, the pictures show something, mistakes end in a line."""

import csv
import re
import subprocess
import sys
from dataclasses import replace
from html import unescape

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import recall_score
from sklearn.utils import compute_class_weight

from lungjax import datasets
from lungjax.config import presets
from lungjax.data import statistics
from lungjax.data.imaging import study_masks
from lungjax.datasets import PrepareOptions
from lungjax.datasets.phantom import slices as phantom
from lungjax.report import dataset_charts, dataset_page
from lungjax.report.dataset_charts import Tile

SECTIONS = [
    "Before you train on it", "Classes and patients", "Sources", "Image sizes", "Gray levels", "Samples",
    "Stages and masks", "Augmentation", "Images that are there twice",
]  # fmt: skip
# label, split, group, source, and which slice: a number draws one, "=3" copies it, "~3" is it at another size.
ROWS = [
    ("covid", "train", "p0", "north", 0), ("covid", "train", "p0", "north", 1), ("covid", "train", "p1", "north", 2),
    ("covid", "val", "p2", "north", 3), ("covid", "test", "p3", "north", 4), ("covid", "test", "p4", "south", "=2"),
    ("normal", "train", "p5", "east", 5), ("normal", "train", "p6", "south", 6), ("normal", "val", "p7", "east", 7),
    ("normal", "test", "p8", "east", 8), ("normal", "test", "p9", "east", "~5"), ("covid", "train", "p10", "north", 9),
]  # fmt: skip


def slices(count):
    patient = phantom.new_patient(3, "COVID-19")
    return [phantom.gray(phantom.draw_slice(patient, z).hu, patient.window) for z in phantom.levels(patient, count)]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Twelve images whose numbers are known, prepared as folder/mine; two test images are in train too."""
    root = tmp_path_factory.mktemp("explore")
    drawn = slices(10)
    with (root / "labels.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["path", "label", "split", "group", "source"])
        for i, (label, split, group, source, which) in enumerate(ROWS):
            image = Image.fromarray(drawn[int(str(which).strip("=~"))])
            if str(which).startswith("~"):
                image = image.resize((image.width * 4 // 5, image.height * 4 // 5))
            image.save(root / f"{i:02}.png")
            table.writerow([f"{i:02}.png", label, split, group, source])
    datasets.write("folder/mine", root, root / "data", PrepareOptions(), quiet=True)
    return root / "data"


@pytest.fixture(scope="module")
def page(prepared):
    """The page's folder and text, of protocol study; the snake, which takes seconds, is left out."""
    data = datasets.open_dataset("folder/mine", prepared, "study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study_masks, "STAGES", ("study_crop", "features"))
        index = dataset_page.write(data, prepared, prepared.parent / "page", {}, stages=True, samples=5)
    return index.parent, index.read_text("utf-8")


def tables(text):
    """All tables of a page, each a list of rows of cells."""
    found = re.findall(r"<table>(.*?)</table>", text, re.S)
    rows = [re.findall(r"<tr>(.*?)</tr>", table, re.S) for table in found]
    return [[[unescape(c) for c in re.findall(r"<t[hd]>(.*?)</t[hd]>", row)] for row in table] for table in rows]


def test_every_section_is_there_and_every_picture_shows_something(page):
    folder, text = page
    assert [unescape(t) for t in re.findall(r"<h2>(.*?)</h2>", text)] == SECTIONS
    named = re.findall(r'<img src="([^"]*)"', text)
    assert sorted(named) == sorted(path.name for path in folder.glob("*.png"))
    assert {"stages.png", "stages_study.png", "augment_ct_cov19_original.png", "exact_copies.png"} <= set(named)
    for name in named:
        picture = np.asarray(Image.open(folder / name).convert("L"))
        assert picture.std() > 15 and len(np.unique(picture)) > 50, name
    assert "://" not in text  # nothing is fetched from elsewhere
    assert not list(folder.parent.glob("*.partial"))


def test_the_counts_are_the_datas_own(page):
    by_first = {table[0][0]: table for table in reversed(tables(page[1]))}
    clean, study = (table for table in tables(page[1]) if table[0][0] == "split")
    head = ["split", "covid", "normal", "images", "covid, patients", "normal, patients", "patients"]
    assert study == [
        head,
        ["train", "4", "2", "6", "3", "2", "5"],
        ["val", "1", "1", "2", "1", "1", "2"],
        ["test", "2", "2", "4", "2", "2", "4"],
    ]
    assert clean == [head, ["train", "3", "1", "4", "2", "1", "3"], *study[2:]]  # without the copies of test images
    assert "2 of 12 images are in no split of this protocol" in page[1]
    assert by_first["source"] == [
        ["source", "covid", "normal"], ["north", "6", "0"], ["east", "0", "4"], ["south", "1", "1"],
    ]  # fmt: skip
    assert "Every image of source north is covid (6 images)" in page[1]
    assert "Every image of source south" not in page[1]
    weights = next(table for table in tables(page[1]) if table[-1][0] == "class weight")
    expected = compute_class_weight("balanced", classes=np.arange(2), y=[0, 0, 0, 0, 1, 1])
    assert weights[1:] == [["train images", "4", "2"], ["class weight", *(f"{w:.3f}" for w in expected)]]
    leaks = {row[0]: row[1:] for row in by_first["protocol, split"][1:]}
    assert leaks["study, test"] == ["4", "1", "1", "0", "2"] and leaks["clean, test"] == ["4", "0", "0", "0", "0"]


def test_twins_are_named(page):
    text = page[1][page[1].index("<h3>Exact copies") :]
    assert re.findall(r"<code>(.*?)</code>", text) == ["02.png<br>05.png", "06.png<br>10.png"]
    assert text.count(": 1; in two splits of protocol=study: 1; with two labels: 0.") == 2


def test_what_is_left_out_is_said(prepared, tmp_path, monkeypatch):
    data = datasets.open_dataset("folder/mine", prepared)
    view = dataset_page.View(data, prepared, tmp_path, 0, masks=False)
    assert "Left out" in dataset_page.dataset_sheets.stages(view)
    view = dataset_page.View(replace(data, name="folder/mine-lungs"), prepared, tmp_path, 0, masks=True)
    assert "in the stage lungs already" in dataset_page.dataset_sheets.stages(view)
    monkeypatch.setattr(dataset_page, "MOST", 4)
    view = dataset_page.View(data, prepared, tmp_path, 0, masks=False)
    assert "From 4 of 12 images, drawn by seed" in dataset_page._gray_levels(view)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gray_levels.png"]


def test_mistakes_are_told_before_work_begins(prepared, tmp_path):
    data = datasets.open_dataset("folder/mine", prepared)
    with pytest.raises(ValueError, match="covidnet_ct needs masks of the body"):
        dataset_page.write(data, prepared, tmp_path / "out", {"covidnet_ct": presets.preset("covidnet_ct")})
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="full is not empty"):
        dataset_page.write(data, prepared, tmp_path / "full", {})
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["full", "mine.txt"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--dataset=foldr"], "unknown data set 'foldr'; the nearest: folder"),
        (["--dataset=folder/other"], "data set folder/other is not prepared in {data}"),
        (["--dataset=folder/mine", "--augment=none,nccd"], "augment='nccd': no such preset; the nearest: nccid"),
        (["--dataset=folder/unsplit", "--protocol=study"], "folder/unsplit came with no splits"),
        (["--dataset=folder/mine", "--out=data"], "--out=data is not empty"),
    ],
)
def test_the_command_ends_mistakes_in_one_line(prepared, arguments, words):
    if "unsplit" in arguments[0]:
        rng = np.random.default_rng(0)
        for i in range(12):
            path = prepared.parent / "unsplit" / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (16, 16), dtype=np.uint8)).save(path)
        datasets.write("folder/unsplit", prepared.parent / "unsplit", prepared, PrepareOptions(), quiet=True)
    command = [sys.executable, "-m", "lungjax.explore", f"--data_dir={prepared}", *arguments]
    result = subprocess.run(command, cwd=prepared.parent, capture_output=True, text=True)
    assert result.returncode == 2, result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("lungjax: ") and words.format(data=prepared) in result.stderr
    assert not (prepared.parent / "explore").exists()


def test_guess_is_the_mean_recall_of_the_most_typical_class():
    keys = np.array([0, 0, 0, 1, 1, 1, 0, 0, 1, 1, 2])
    labels = np.array([0, 0, 1, 1, 0, 0, 0, 1, 1, 0, 0])
    train, test = np.arange(6), np.arange(6, 10)
    # Key 0: half of the zeros, half of the ones: a tie. Key 1 alike. So everything is chance.
    assert statistics.guess(keys, labels, train, test, 2) == 0.5
    keys[4] = 0  # now key 0 has 3/4 of the zeros and 1/2 of the ones, key 1 has 1/4 and 1/2
    assert statistics.guess(keys, labels, train, test, 2) == recall_score(labels[test], keys[test], average="macro")
    alone = np.array([6, 8, 10])  # a key that train hasn't is a guess by chance
    assert statistics.guess(keys, labels, train, alone, 2) == pytest.approx(((1 + 0.5) / 2 + 1) / 2)
    assert statistics.guess(keys, labels, train, np.array([6]), 2) is None


def test_spread_lets_sources_and_groups_take_turns(small_data):
    sources = np.asarray(["big"] * 50 + ["small"] * 4 + ["tiny"] * 6)
    data = replace(small_data, columns=small_data.columns | {"source": sources})
    rows = statistics.spread(np.arange(60), data, 12, np.random.default_rng(1))
    assert len(set(rows)) == 12
    assert sorted(sources[rows[:3]]) == ["big", "small", "tiny"]
    assert [int((sources[rows] == s).sum()) for s in ("big", "small", "tiny")] == [4, 4, 4]
    assert len(set(data.columns["group"][[r for r in rows if sources[r] == "big"]])) == 4
    assert rows == statistics.spread(np.arange(60), data, 12, np.random.default_rng(1))
    assert sorted(statistics.spread(np.arange(5), data, 12, np.random.default_rng(1))) == [0, 1, 2, 3, 4]


def test_copies_start_from_an_image_that_is_in_a_split(small_data):
    n = len(small_data.columns["label"])
    pixels = np.asarray([f"{i}" for i in range(n)])
    pixels[[3, 20, 50]] = "same"
    split = small_data.columns["split"].copy()
    split[3] = ""
    columns = small_data.columns | {"pixels": pixels, "split": split, "split_study": np.full(n, "")}
    data = replace(small_data, columns=columns)
    pairs = statistics.copies(data)
    assert pairs.tolist() == [[20, 50], [20, 3]]
    worst, across, labels = statistics.worst_first(pairs[::-1], data)
    assert across == 1 and labels == 1  # rows 3, 20 and 50 have the labels 0, 2 and 2
    assert worst.tolist() == [[20, 3], [20, 50]]
    assert statistics.copies(replace(data, columns=columns | {"pixels": np.arange(n).astype(str)})).shape == (0, 2)


def test_names_stay_within_their_tile_and_contours_are_seen(tmp_path):
    image = np.full((40, 50), 90, np.uint8)
    mask = np.zeros((40, 50), bool)
    mask[10:30] = True  # reaches both sides
    tile = Tile(image, ("short",), "head", {"body": mask})
    dataset_charts.sheet([tile] * 2, tmp_path / "short.png", 2)
    long = replace(tile, lines=("WWWW_$100_a very long name of a file " * 3, "x" * 90), head="M" * 60)
    dataset_charts.sheet([long] * 2, tmp_path / "long.png", 2)
    short, other = (Image.open(tmp_path / f"{name}.png") for name in ("short", "long"))
    assert abs(short.width - other.width) <= 2
    orange = np.asarray([int(dataset_charts.CONTOURS[0][0][i : i + 2], 16) for i in (1, 3, 5)])
    seen = (np.abs(np.asarray(short.convert("RGB")).astype(int) - orange).sum(axis=-1) < 30).sum(axis=0)
    left, right = np.array_split(seen, 2)
    assert left.sum() > 300 and right.sum() > 300
    assert dataset_charts.fit("name.png", 2.0, 8.0) == "name.png"
