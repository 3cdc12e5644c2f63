"""Duplicates are counted in the study's splits and removed from the clean ones; two data sets are compared."""

import shutil
from collections import Counter
from dataclasses import replace

import commands
import numpy as np
import pytest
from folders import chest
from PIL import Image

from lungjax import datasets, prepare
from lungjax.config import Config
from lungjax.data import pipeline
from lungjax.datasets import PrepareOptions


def test_study_repetitions(small_data):
    cells = np.where(np.arange(60) < 40, "train", "val+test")
    cells[0], cells[1] = "train*3", ""
    study = replace(small_data, columns=small_data.columns | {"split_study": cells}, protocol="study")
    assert study.rows("train").tolist() == [0, 0, 0, *range(2, 40)]
    assert study.rows("val").tolist() == study.rows("test").tolist() == list(range(40, 60))
    config = Config()
    epoch = [int(row) for _, row in zip(range(41), pipeline.order(study, config), strict=False)]
    assert Counter(epoch) == Counter(study.rows("train").tolist())
    batch = next(iter(pipeline.eval_batches(study, study.rows("train"), config, 64)))
    assert np.bincount(batch["row"][batch["row"] >= 0])[:3].tolist() == [3, 0, 1]


def write_slices(root, names, seed):
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(chest(seed + i, 200, 60)).save(root / name)


@pytest.fixture(scope="module")
def xray_5k(tmp_path_factory):
    """COVID-XRay-5K, with an exact copy and a smaller, recompressed copy of test images in its train split."""
    root = tmp_path_factory.mktemp("twins")
    names = [f"{split}/{label}/{split}{label}{i}.png" for split in ("train", "test") for label in ("covid", "non")
             for i in range(4)]  # fmt: skip
    write_slices(root / "in", names, 500)
    shutil.copy(root / "in/test/covid/testcovid0.png", root / "in/train/covid/copied.png")
    smaller = Image.open(root / "in/test/non/testnon1.png")
    smaller = smaller.resize((smaller.width * 3 // 4, smaller.height * 3 // 4), Image.Resampling.BICUBIC)
    smaller.save(root / "in/train/non/smaller.jpg", quality=70)
    result = datasets.write("covid_xray_5k", root / "in", root / "data", PrepareOptions(), quiet=True)
    return root, result


def test_duplicates_across_splits(xray_5k):
    root, result = xray_5k
    leaks = result["twins"]["leaks"]
    assert leaks["study"]["test"] == leaks["study"]["val"] | {"exact_twin_in_val": 8}, "it validates on test"
    assert leaks["study"]["test"]["exact_twin_in_train"] == leaks["study"]["test"]["near_twin_in_train"] == 1
    assert leaks["study"]["test"]["any"] == 2 and leaks["clean"]["test"]["any"] == 0
    assert any("2 of 8 test images" in line for line in result["warnings"])
    clean, study = (datasets.open_dataset("covid_xray_5k", root / "data", p) for p in ("clean", "study"))
    files = clean.columns["file"]
    assert sorted(files[clean.columns["split"] == ""]) == ["train/covid/copied.png", "train/non/smaller.jpg"]
    assert set(files[study.rows("train")]) > {"train/covid/copied.png", "train/non/smaller.jpg"}
    assert set(study.rows("val")) == set(study.rows("test")) and not set(clean.rows("val")) & set(clean.rows("test"))
    (pair,) = files[clean.near].tolist()
    assert sorted(pair) == ["test/non/testnon1.png", "train/non/smaller.jpg"]
    assert result["twins"]["pairs"] == [
        "train/covid/copied.png (train, covid) = test/covid/testcovid0.png (val+test, covid)",
        "train/non/smaller.jpg (train, non) ~ test/non/testnon1.png (val+test, non)",
    ]


def test_cross(xray_5k, capsys):
    root, _ = xray_5k
    write_slices(root / "other", [f"{label}/{i}.png" for label in "ab" for i in range(5)], 900)
    shutil.copy(root / "in/test/non/testnon3.png", root / "other/a/shared.png")
    for name in ("folder/other", "folder/other-lungs"):
        datasets.write(name, root / "other", root / "data", PrepareOptions(), quiet=True)
    flags = ["--dataset=folder/other", "--cross=covid_xray_5k", f"--data_dir={root / 'data'}"]
    assert commands.run(prepare, *flags) == 0
    output = capsys.readouterr().out
    assert "in folder/other, 1 have an exact copy and 0 a near duplicate in covid_xray_5k/default" in output
    assert "a/shared.png = test/non/testnon3.png" in output
    assert commands.run(prepare, "--dataset=folder/other-lungs", *flags[1:]) == 2
    assert "folder/other-lungs is a stage" in capsys.readouterr().err
