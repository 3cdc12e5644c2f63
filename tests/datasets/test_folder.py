"""A user's folder: three layouts, 8 and 16 bits, splits, groups and errors."""

import os
import re
from pathlib import Path

import commands
import numpy as np
import pytest
from PIL import Image

from lungjax import datasets
from lungjax import prepare as command
from lungjax.data import pipeline, prepared
from lungjax.datasets import PrepareOptions


def save(path, seed=0, deep=False, add=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    dtype = np.uint16 if deep else np.uint8
    pixels = np.random.default_rng(seed).integers(0, 4000 if deep else 256, (12, 10), dtype=dtype)
    Image.fromarray(pixels + dtype(add)).save(path)
    return pixels


def prepare(root, name="folder", options=None, **settings):
    result = datasets.write(name, root / "in", root / "data", options or PrepareOptions(), quiet=True, **settings)
    return result, datasets.open_dataset(name, root / "data")


def write_table(root, text):
    (root / "in").mkdir(exist_ok=True)
    (root / "in/labels.csv").write_text(text, encoding="utf-8")


def test_csv(tmp_path):
    names = ["a b.png", "Tür/ü.JPG", "c.tiff", "d.PNG"]
    for i, name in enumerate(names):
        save(tmp_path / "in" / name, i)
    write_table(
        tmp_path,
        "\ufefflabel,path,split,group,source,age,xmin,ymin,xmax,ymax\n"
        'sick,a b.png,train,p1,x,"61, about",1,2,9,12\n'
        "well,Tür/ü.JPG,Train,p2,y,,,,,\n\n"
        "sick,c.tiff,valid,p3,x,7,,,,\n"
        "well,d.PNG,TEST,p4,y,8,0,0,10,12\n",
    )
    _, data = prepare(tmp_path, "folder/my_hospital")
    assert data.name == "folder/my_hospital" and data.classes == ("sick", "well") and data.window is None
    columns = {k: v.tolist() for k, v in data.columns.items()}
    assert columns["file"] == names
    assert set(columns) == {*prepared.COLUMNS, "age"}
    assert columns["label"] == [0, 1, 0, 1]
    assert columns["split"] == ["train", "train", "val", "test"]
    assert columns["group"] == ["p1", "p2", "p3", "p4"] and columns["source"] == ["x", "y", "x", "y"]
    assert columns["age"] == ["61, about", "", "7", "8"]
    assert columns["box"] == [[1, 2, 9, 12], [0, 0, 10, 12], [0, 0, 10, 12], [0, 0, 10, 12]]
    assert columns["width"] == [10] * 4 and columns["height"] == [12] * 4


def test_split_folders(tmp_path):
    for split, count in (("train", 4), ("Validation", 2), ("test", 2)):
        for i in range(count):
            save(tmp_path / f"in/{split}/{'ab'[i % 2]}/deeper/{split}{i}.png", len(split) * 10 + i)
    save(tmp_path / "in/.hidden/a/x.png")
    (tmp_path / "in/train/notes.txt").write_text("not an image")
    (tmp_path / "in/train/a/IMG_1.HEIC").write_bytes(b"a photo")
    with pytest.raises(ValueError, match="the folders deeper in .*--group_pattern=none"):
        prepare(tmp_path)
    result, data = prepare(tmp_path, options=PrepareOptions(group_pattern="none"))
    assert data.name == "folder/default" and data.classes == ("a", "b") and len(data.records) == 8
    row = data.columns["file"].tolist().index("Validation/a/deeper/Validation0.png")
    assert data.columns["split"][row] == "val"
    assert any(note.startswith("1 files that are not images") for note in result["notes"])
    for word in ("1 with .heic, such as IMG_1.HEIC", "8 of 8 images have no group"):
        assert sum(word in line for line in result["warnings"]) == 1


def test_patient_folders(tmp_path):
    for i in range(24):
        save(tmp_path / f"in/{'ab'[i % 2]}/P{i // 4}/series/{i}.png", i)
    save(tmp_path / "in/a/single.png", 99)
    result, data = prepare(tmp_path)
    groups = dict(zip(data.columns["file"].tolist(), data.columns["group"].tolist(), strict=True))
    assert groups["a/P2/series/8.png"] == groups["b/P2/series/9.png"] == "P2"
    assert groups["a/single.png"] == "a/single.png"
    pairs = set(zip(data.columns["group"].tolist(), data.columns["split"].tolist(), strict=True))
    assert len(pairs) == 7, "no patient in two splits"
    assert any(note.startswith("6 patients, according to the folders") for note in result["notes"])
    pattern = "([^/]+/[^/]+)/"
    for word in ("1 of 25 images have no group", f"6 patient folders .* P0. .*--group_pattern='{re.escape(pattern)}'"):
        assert any(re.search(word, line) for line in result["warnings"])
    (tmp_path / "in/a/single.png").unlink()
    _, data = prepare(tmp_path, options=PrepareOptions(group_pattern=pattern), overwrite=True)
    assert set(data.columns["group"]) == {f"{label}/P{i}" for label in "ab" for i in range(6)}
    result, data = prepare(tmp_path, options=PrepareOptions(group_pattern="none"), overwrite=True)
    assert len(set(data.columns["group"])) == 24 and "24 of 24 images have no group" in result["warnings"][0]


def test_questionable_images(tmp_path, monkeypatch):
    """A European Excel table with two spellings of a class, a rare class, one test image, and unlisted images."""
    rows = ['"path";"label";"split";"note, in words"']
    for i in range(106):
        label = "sick" if i < 2 else "Sick" if i < 4 else "well"
        split = "val" if i % 5 == 4 and i > 3 else "test" if i in (1, 3, 10, 11) else "train"
        save(tmp_path / f"in/{i}.png", i)
        rows.append(f'"{i}.png";"{label}";"{split}";"a; b"')
    for name in ("extra.png", "more.tif"):
        save(tmp_path / "in" / name, 500)
    write_table(tmp_path, "sep=;\r\n" + "\r\n".join(rows))
    monkeypatch.chdir(tmp_path)
    result, data = prepare(Path("in/.."))
    assert len(data.records) == 106 and set(data.columns["note, in words"]) == {"a; b"}
    for word in ("2 images that are not in labels.csv, such as extra.png", "case: Sick, sick",
                 "test split has a single image labeled Sick, sick", "imbalanced: 1 images of Sick, 79 of well",
                 "median of 10 x 12 pixels"):  # fmt: skip
        assert sum(word in line for line in result["warnings"]) == 1, word


def test_class_folders_with_patterns(tmp_path):
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


def test_class_order(tmp_path):
    for label in ("10", "9", "1"):
        for i, split in enumerate(("train", "val", "test")):
            save(tmp_path / f"in/{split}/{label}/x.png", 20 * i + int(label))
    assert prepare(tmp_path)[1].classes == ("1", "9", "10")
    options = PrepareOptions(classes=("9", "1", "10"))
    assert prepare(tmp_path, "folder/b", options)[1].classes == ("9", "1", "10")
    with pytest.raises(ValueError, match="--classes=9,1: .*1, 10, 9"):
        prepare(tmp_path, "folder/c", PrepareOptions(classes=("9", "1")))


def test_16_bit_images(tmp_path):
    train = [save(tmp_path / f"in/train/{'ab'[i % 2]}/{i}.png", i, deep=True) for i in range(6)]
    for i, split in enumerate(("val", "test")):
        save(tmp_path / f"in/{split}/a/x.tif", 50 + i, deep=True, add=30_000)  # must not count
        save(tmp_path / f"in/{split}/b/y.png", 60 + i)  # 8 bits among 16
    result, data = prepare(tmp_path)
    low, high = map(float, np.percentile(train, [0.5, 99.5], method="inverted_cdf"))
    assert data.window == (low, high)
    (note,) = (note for note in result["notes"] if note.startswith("8 of 10 images have 16 bits"))
    assert f"{low:g} to {high:g}" in note
    result, data = prepare(tmp_path, window=(-100.0, 900.0), overwrite=True)
    assert data.window == (-100, 900) and any("-100 to 900" in note for note in result["notes"])
    for number, path in enumerate(sorted(tmp_path.glob("in/*/*/*"))):
        flat = np.full((20, 20), 700, np.uint16)
        flat[0, 0] = number  # so that no two are copies
        Image.fromarray(flat).save(path)
    with pytest.raises(ValueError, match="nearly all their training pixels are 700: give --window"):
        prepare(tmp_path, overwrite=True)


def test_duplicates_and_divided_groups(tmp_path):
    rows = ["path,label,split,group,source"]
    for i in range(12):
        save(tmp_path / f"in/{i:02}.png", 5 if i in (0, 7) else 100 + i)
        split = "train" if i < 6 else ("val", "test")[i % 2]
        rows.append(f"{i:02}.png,{'ab'[i % 2]},{split},p{max(i - 1, 0) % 10},{'xy'[i > 3]}{'' if i > 3 else i % 2}")
    write_table(tmp_path, "\n".join(rows))
    result, data = prepare(tmp_path)
    assert result["duplicates"]["sets"] == 1 and result["duplicates"]["sets_with_several_labels"] == 1
    assert result["groups_with_several_labels"] == 1  # p0: images 0, 1 and 11
    assert result["twins"]["leaks"]["study"]["test"] == {
        "images": 3, "exact_twin_in_train": 1, "near_twin_in_train": 0, "group_in_train": 1, "any": 2,
        "exact_twin_in_val": 0,
    }  # fmt: skip
    assert result["twins"]["leaks"]["clean"]["test"]["any"] == 0
    # Left out: two images of a patient in test, and a copy with another label.
    assert data.columns["file"][data.columns["split"] == ""].tolist() == ["00.png", "01.png", "07.png"]
    text = (tmp_path / f"data/folder/default/{prepared.VERSION}/summary.md").read_text()
    assert "00.png (train, a) = 07.png (test, b)" in text and "images of a only (1), see scores per source: x0" in text
    study = datasets.open_dataset("folder", tmp_path / "data", "study")
    assert study.rows("train").tolist() == [0, 1, 2, 3, 4, 5] and data.rows("train").tolist() == [2, 3, 4, 5]


def test_undecodable_file_name(tmp_path):
    for name in ("a/y.png", os.fsdecode(b"b/x\xff.png")):
        save(tmp_path / "in" / name)
    with pytest.raises(ValueError, match=r"b/x\\udcff.png.*UTF-8"):
        prepare(tmp_path)


def test_table_errors(tmp_path):
    save(tmp_path / "in/x.png", 1)
    save(tmp_path / "in/y.png", 2)
    for text, word in (
        ("path,lable\nx.png,a\n", "line 1: column label is missing; did you mean lable"),
        ("path,label,age,age\nx.png,a,1,2\n", "line 1: column age appears twice"),
        ("path,label,\nx.png,a,1\n", "line 1: .* no name"),
        ("path,label,width\nx.png,a,3\n", "line 1: .*width"),
        ("path,label,xmin\nx.png,a,3\n", "line 1: .* xmin, ymin, xmax, ymax"),
        ("path,label,split\nx.png,a,train\ny.png,b\n", "labels.csv line 3: 2 values"),
        ("path,label\nx.png,\n", "line 2: label is empty"),
        ("path,label,split\nx.png,a,trian\n", "line 2: unknown split 'trian'; expected train, val, test"),
        ("path,label,split\nx.png,a,train\ny.png,b,\n", "line 3: no split"),
        ("path,label\nx.png,a\ny.png,b\nx.png,b\n", "line 4: x.png is already in labels.csv line 2"),
        ("path,label\nx.png,a\nnone.png,b\n", "labels.csv line 3: .*none.png"),
        ("path,label,xmin,ymin,xmax,ymax\nx.png,a,1,2,3,q\n", "line 2: .*'1 2 3 q'"),
        ("path,label,xmin,ymin,xmax,ymax\nx.png,a,3,2,1,4\n", "line 2: .* empty"),
        ("path,label,xmin,ymin,xmax,ymax\nx.png,a,1,2,11,5\ny.png,b,,,,\n", "line 2: x.png: box .* exceeds"),
        ("path,label\nx.png,a\ny.png,a\n", "only one class, 'a'"),
        ("path,label\n", "no rows"),
        ("path,label\nx.png,a\n/dev/zero,b\n", "line 3: /dev/zero is a device"),
        ("path,label\nx.png,a\ny.png,b\x1b[2Jc\n", r"class: .*b\\x1b\[2Jc"),
        ("path,label,group\nx.png,a,p\ny.png,b,q\u202eq\n", r"line 3: .*q\\u202eq"),
    ):
        write_table(tmp_path, text)
        with pytest.raises(ValueError, match=word):
            prepare(tmp_path)
        assert not list((tmp_path / "data").rglob(prepared.INDEX))
        assert not list((tmp_path / "data").rglob("*.array_record*")), "nothing incomplete is left"


@pytest.mark.parametrize("given", [("test",), ("val",), ("val", "test")])
def test_data_set_without_train_split(tmp_path, capsys, given):
    rows = [f"{i}.png,{'ab'[i % 2]},{given[i // 2 % len(given)]}" for i in range(4)]
    for i in range(4):
        save(tmp_path / f"in/{i}.png", i)
    write_table(tmp_path, "\n".join(["path,label,split", *rows]))
    arguments = ["--dataset=folder/x", f"--source={tmp_path / 'in'}", f"--data_dir={tmp_path / 'data'}"]
    assert commands.run(command, *arguments) == 0
    output = capsys.readouterr().out
    assert "no train split: an external test set" in output and "To test a run on it: python -m lungjax.main" in output
    assert ("--split=val" in output) == ("test" not in given)
    assert not re.search("WARNING: the (train|val|test) split has no", output)
    data = datasets.open_dataset("folder/x", tmp_path / "data")
    assert data.columns["split"].tolist() == [row.split(",")[2] for row in rows]
    with pytest.raises(ValueError, match="folder/x has no train split.*--mode=evaluate"):
        pipeline.train_rows(data)


def test_paths_outside_of_the_folder(tmp_path):
    rows = ["path,label,split"]
    for i, split in enumerate(("train", "train", "val", "val", "test", "test")):
        save(tmp_path / f"other/{i}.png", i)
        rows.append(f"{'../other' if i else tmp_path / 'other'}/{i}.png,{'ab'[i % 2]},{split}")
    write_table(tmp_path, "\n".join(rows))
    result, _ = prepare(tmp_path)
    assert any("6 paths" in text and "absolute" in text for text in result["warnings"])


def test_folder_errors(tmp_path):
    (tmp_path / "in").mkdir()
    with pytest.raises(ValueError, match=r"no image found; expected a file labels.csv"):
        prepare(tmp_path)
    save(tmp_path / "in/a/x.png")
    for options, word in (
        (PrepareOptions(source_pattern="("), "not a regular expression"),
        (PrepareOptions(source_pattern="x"), "group in parentheses"),
        (PrepareOptions(group_pattern="(z+)"), "matches nothing .* a/x.png"),
    ):
        with pytest.raises(ValueError, match=word):
            prepare(tmp_path, options=options)
    save(tmp_path / "in/y.png")
    with pytest.raises(ValueError, match=r"y.png is not in a class folder"):
        prepare(tmp_path)
    (tmp_path / "in/y.png").unlink()
    save(tmp_path / "in/train/b/x.png")
    with pytest.raises(ValueError, match="next to train"):
        prepare(tmp_path)
