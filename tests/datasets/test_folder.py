"""Anyone's folder: three layouts, 8 and 16 bits, splits and groups, and every mistake in words."""

import csv
import os

import numpy as np
import pytest
from PIL import Image

from lungjax import datasets
from lungjax.data import prepared
from lungjax.data.imaging import images
from lungjax.datasets import PrepareOptions


def save(path, seed=0, size=(12, 10), deep=False, add=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    dtype = np.uint16 if deep else np.uint8
    pixels = np.random.default_rng(seed).integers(0, 4000 if deep else 256, size, dtype=dtype)
    Image.fromarray(pixels + dtype(add)).save(path)
    return pixels


def prepare(root, name="folder", options=None, **how):
    result = datasets.write(name, root / "in", root / "data", options or PrepareOptions(), quiet=True, **how)
    return result, datasets.open_dataset(name, root / "data")


def csv_file(root, text):
    (root / "in").mkdir(exist_ok=True)
    (root / "in/labels.csv").write_text(text, encoding="utf-8")


def by_file(data, column):
    return dict(zip(data.columns["file"].tolist(), data.columns[column].tolist(), strict=True))


def test_csv_with_everything(tmp_path):
    names = ["a b.png", "Tür/ü.JPG", "c.tiff", "d.PNG"]
    pixels = {name: save(tmp_path / "in" / name, i) for i, name in enumerate(names)}
    csv_file(
        tmp_path,
        "﻿label,path,split,group,source,age,xmin,ymin,xmax,ymax\n"
        'sick,a b.png,train,p1,x,"61, about",1,2,9,12\n'
        "well,Tür/ü.JPG,Train,p2,y,,,,,\n\n"
        "sick,c.tiff,valid,p3,x,7,,,,\n"
        "well,d.PNG,TEST,p4,y,8,0,0,10,12\n",
    )
    _, data = prepare(tmp_path, "folder/my_hospital")
    assert data.name == "folder/my_hospital" and data.classes == ("sick", "well") and data.window is None
    columns = {k: v.tolist() for k, v in data.columns.items()}
    assert columns["file"] == names
    assert set(columns) == {*prepared.COLUMNS, "box", "age"} - {*prepared.BOX}
    assert columns["label"] == [0, 1, 0, 1]
    assert columns["split"] == ["train", "train", "val", "test"]
    assert columns["group"] == ["p1", "p2", "p3", "p4"] and columns["source"] == ["x", "y", "x", "y"]
    assert columns["age"] == ["61, about", "", "7", "8"]
    assert columns["box"] == [[1, 2, 9, 12], [0, 0, 10, 12], [0, 0, 10, 12], [0, 0, 10, 12]]
    assert columns["width"] == [10] * 4 and columns["height"] == [12] * 4
    for i in (0, 2, 3):
        np.testing.assert_array_equal(images.decode(data.records[i]["image"], None), pixels[names[i]])


def test_split_folders(tmp_path):
    for split, count in (("train", 4), ("Validation", 2), ("test", 2)):
        for i in range(count):
            save(tmp_path / f"in/{split}/{'ab'[i % 2]}/deeper/{split}{i}.png", hash((split, i)) % 999)
    save(tmp_path / "in/.hidden/a/x.png")
    (tmp_path / "in/train/notes.txt").write_text("no image")
    result, data = prepare(tmp_path)
    assert data.name == "folder/default" and data.classes == ("a", "b")
    split = by_file(data, "split")
    assert split["Validation/a/deeper/Validation0.png"] == "val" and len(split) == 8
    assert "1 files that are no images were left out" in result["notes"]
    assert any("each of them counts as its own patient" in note for note in result["notes"])


def test_class_folders_get_splits_by_group_and_sources_from_the_name(tmp_path):
    for label in "01":
        for i in range(40):
            save(tmp_path / f"in/{label}/site{i % 2}_pat{i // 4}{label}_{i}.png", i + 100 * int(label))
    options = PrepareOptions(seed=3, source_pattern="^(site.)_", group_pattern=r"_(pat\d+)_")
    _, data = prepare(tmp_path, options=options)
    assert set(data.columns["source"]) == {"site0", "site1"}
    pairs = set(zip(data.columns["group"].tolist(), data.columns["split"].tolist(), strict=True))
    assert len(pairs) == len(set(data.columns["group"])) == 20
    assert [len(data.rows(s)) for s in ("train", "val", "test")] == [56, 12, 12]
    again, same = prepare(tmp_path, options=options, overwrite=True)
    assert same.fingerprint == data.fingerprint and again["images"] == 80
    _, other = prepare(tmp_path, options=PrepareOptions(4, "^(site.)_", r"_(pat\d+)_"), overwrite=True)
    assert other.fingerprint != data.fingerprint


def test_classes_sort_as_numbers_or_as_asked(tmp_path):
    for label in ("10", "9", "1"):
        save(tmp_path / f"in/train/{label}/x.png", int(label))
        save(tmp_path / f"in/val/{label}/y.png", 20 + int(label))
        save(tmp_path / f"in/test/{label}/z.png", 40 + int(label))
    assert prepare(tmp_path)[1].classes == ("1", "9", "10")
    options = PrepareOptions(classes=("9", "1", "10"))
    assert prepare(tmp_path, "folder/b", options)[1].classes == ("9", "1", "10")
    with pytest.raises(ValueError, match="--classes=9,1: the data has 1, 10, 9"):
        prepare(tmp_path, "folder/c", PrepareOptions(classes=("9", "1")))


def deep_folder(tmp_path):
    train = [save(tmp_path / f"in/train/{'ab'[i % 2]}/{i}.png", i, deep=True) for i in range(6)]
    for i, split in enumerate(("val", "test")):
        save(tmp_path / f"in/{split}/a/x.tif", 50 + i, deep=True, add=30_000)  # must not count
        save(tmp_path / f"in/{split}/b/y.png", 60 + i)  # 8 bits among 16
    return np.stack(train)


def test_16_bit_takes_percentiles_of_the_train_split_and_says_so(tmp_path):
    train = deep_folder(tmp_path)
    result, data = prepare(tmp_path)
    want = np.percentile(train, [0.5, 99.5], method="inverted_cdf")
    np.testing.assert_array_equal(data.window, want)
    assert any(f"window: {want[0]:g} to {want[1]:g} become 0 to 255" in note for note in result["notes"])
    assert any("8 of 10 images have 16 bits" in note for note in result["notes"])
    row = data.columns["file"].tolist().index("train/a/0.png")
    got = images.decode(data.records[row]["image"], data.window)
    np.testing.assert_allclose(got, np.clip((train[0] - float(want[0])) / (want[1] - want[0]), 0, 1) * 255, rtol=1e-4)
    row = data.columns["file"].tolist().index("val/b/y.png")
    assert images.decode(data.records[row]["image"], data.window).dtype == np.uint8


def test_a_given_window_is_recorded(tmp_path):
    deep_folder(tmp_path)
    result, data = prepare(tmp_path, window=(-100.0, 900.0))
    assert data.window == (-100, 900)
    assert any("as asked, their values -100 to 900 become 0 to 255" in note for note in result["notes"])


def test_flat_16_bit_images_need_a_window(tmp_path):
    for split in ("train", "val", "test"):
        for label in "ab":
            (tmp_path / f"in/{split}/{label}").mkdir(parents=True)
            flat = np.full((20, 20), 700, np.uint16)
            flat[0, 0] = len(split) + 10 * "ab".index(label)  # so that no two are copies
            Image.fromarray(flat).save(tmp_path / f"in/{split}/{label}/x.png")
    with pytest.raises(ValueError, match="nearly all their training pixels are 700: give --window"):
        prepare(tmp_path)


def test_copies_torn_groups_and_one_class_sources_are_reported(tmp_path):
    rows = []
    for i in range(12):
        save(tmp_path / f"in/{i:02}.png", 5 if i in (0, 7) else 100 + i)
        split = "train" if i < 6 else ("val", "test")[i % 2]
        rows.append(f"{i:02}.png,{'ab'[i % 2]},{split},p{max(i - 1, 0) % 10},{'xy'[i > 3]}{'' if i > 3 else i % 2}")
    csv_file(tmp_path, "path,label,split,group,source\n" + "\n".join(rows))
    result, data = prepare(tmp_path)
    assert result["duplicates"]["sets"] == 1 and result["duplicates"]["sets_with_several_labels"] == 1
    assert result["groups_with_several_labels"] == 1  # p0: images 0, 1 and 11
    assert result["twins"]["leaks"]["study"]["test"] == {
        "images": 3, "exact_twin_in_train": 1, "near_twin_in_train": 0, "group_in_train": 1, "any": 2,
        "exact_twin_in_val": 0,
    }  # fmt: skip
    assert result["twins"]["leaks"]["clean"]["test"]["any"] == 0
    left = data.columns["file"][data.columns["split"] == ""].tolist()
    assert left == ["00.png", "01.png", "07.png"], "of the patient in test too; then a copy with another label"
    text = (tmp_path / "data/folder/default/2.0.0/summary.md").read_text()
    for words in (
        "protocol=study: 2 of 3 test images are known from train",
        "00.png (train, a) = 07.png (test, b)",
        "source x0 has one class",
    ):
        assert words in text
    study = datasets.open_dataset("folder", tmp_path / "data", "study")
    assert study.rows("train").tolist() == [0, 1, 2, 3, 4, 5] and data.rows("train").tolist() == [2, 3, 4, 5]


def test_a_file_name_that_is_no_text_is_named(tmp_path):
    for name in (b"x\xff.png", b"y.png"):
        path = os.path.join(os.fsencode(tmp_path), b"in", b"ab"[:1] if name == b"y.png" else b"b", name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        Image.fromarray(np.zeros((5, 5), np.uint8)).save(os.fsdecode(path), "PNG")
    with pytest.raises(ValueError, match=r"the file name 'b/x\\udcff.png' is not plain UTF-8 text"):
        prepare(tmp_path)


CSV_MISTAKES = {
    "no label column": (
        "path,lable\nx.png,a\n",
        "line 1: no column label, found path, lable; the nearest: lable",
    ),
    "semicolons": ("path;label\nx.png;a\n", "separated by commas"),
    "column twice": ("path,label,label\nx.png,a,a\n", "line 1: column label is there twice"),
    "reserved": ("path,label,width\nx.png,a,3\n", "width is lungjax's own"),
    "half a box": ("path,label,xmin\nx.png,a,3\n", "a box needs all of xmin, ymin, xmax, ymax"),
    "too few": (
        "path,label,split\nx.png,a,train\ny.png,b\n",
        "labels.csv line 3: 2 values, but the header has 3",
    ),
    "no label": ("path,label\nx.png,\n", "line 2: label is empty"),
    "unknown split": (
        "path,label,split\nx.png,a,trian\n",
        "line 2: unknown split 'trian'; allowed are train, val, test",
    ),
    "some splits": (
        "path,label,split\nx.png,a,train\ny.png,b,\n",
        "line 3: no split, but other lines have one",
    ),
    "twice": ("path,label\nx.png,a\ny.png,b\nx.png,b\n", "line 4: x.png is already in labels.csv line 2"),
    "missing": ("path,label\nx.png,a\nnone.png,b\n", "labels.csv line 3: .*none.png: no such file"),
    "box text": (
        "path,label,xmin,ymin,xmax,ymax\nx.png,a,1,2,3,q\n",
        "line 2: the box '1 2 3 q' is not four numbers",
    ),
    "box outside": (
        "path,label,xmin,ymin,xmax,ymax\nx.png,a,1,2,11,5\ny.png,b,,,,\n",
        "line 2: x.png: box .* lies outside",
    ),
    "one class": ("path,label\nx.png,a\ny.png,a\n", "only one class, 'a'"),
    "no train": ("path,label,split\nx.png,a,val\ny.png,b,test\n", "no train split, only test, val"),
    "class not in train": ("path,label,split\nx.png,a,train\ny.png,b,test\n", "no training example of b"),
    "empty": ("path,label\n", "no image found"),
}


@pytest.mark.parametrize("case", CSV_MISTAKES)
def test_a_mistake_in_labels_csv_is_named(tmp_path, case):
    text, words = CSV_MISTAKES[case]
    save(tmp_path / "in/x.png", 1)
    save(tmp_path / "in/y.png", 2)
    csv_file(tmp_path, text)
    with pytest.raises(ValueError, match=words):
        prepare(tmp_path)
    assert not list((tmp_path / "data").rglob("index.csv"))
    assert not list((tmp_path / "data").rglob("*.array_record*")), "nothing half done is left"


def test_csv_that_is_no_text_is_named(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/labels.csv").write_bytes("path,label\nTür.png,a\n".encode("latin-1"))
    with pytest.raises(ValueError, match="not UTF-8"):
        prepare(tmp_path)


def test_folders_in_no_layout_are_named(tmp_path):
    (tmp_path / "in").mkdir()
    with pytest.raises(ValueError, match=r"no image found; allowed is a file labels.csv"):
        prepare(tmp_path)
    save(tmp_path / "in/a/x.png")
    save(tmp_path / "in/y.png")
    with pytest.raises(ValueError, match=r"y.png lies in no class folder"):
        prepare(tmp_path)
    (tmp_path / "in/y.png").unlink()
    save(tmp_path / "in/train/b/x.png")
    with pytest.raises(ValueError, match="beside train there are the folders a"):
        prepare(tmp_path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (PrepareOptions(source_pattern="("), "no regular expression"),
        (PrepareOptions(source_pattern="x"), "needs a group in brackets"),
        (PrepareOptions(group_pattern="(z+)"), "finds nothing in the file name of a/x.png"),
    ],
)
def test_patterns_that_cannot_work_are_named(tmp_path, options, words):
    save(tmp_path / "in/a/x.png")
    with pytest.raises(ValueError, match=words):
        prepare(tmp_path, options=options)


def test_real_folder(shared, tmp_path):
    """A slice of the real CT set: prefixes as sources, all images of the listing, no torn patient."""
    with (shared / "data/ct/labels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))[::40]
    (tmp_path / "in").mkdir()
    with (tmp_path / "in/labels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(row | {"path": str((shared / "data/ct" / row["path"]).resolve())} for row in rows)
    result, data = prepare(tmp_path, options=PrepareOptions(source_pattern="^([a-z0-9]+)_"))
    assert result["images"] == len(rows) == len(data.records)
    assert result["twins"]["leaks"]["clean"]["test"]["group_in_train"] == 0
    assert {"mosmed", "sarscov2", "ucsd"} <= set(result["sources"])
    assert data.records[7]["image"] == (shared / "data/ct" / rows[7]["path"]).read_bytes()
