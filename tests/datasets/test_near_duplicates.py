"""Protocols from the folder to the training rows: what a study counted twice, what the clean splits leave out."""

import io
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from lungjax import datasets
from lungjax.config import Config
from lungjax.data import pipeline
from lungjax.datasets import PrepareOptions
from lungjax.datasets.build import near_duplicates
from lungjax.datasets.phantom import slices as phantom


def test_a_studys_repeats_are_rows_that_come_several_times(small_data):
    cells = np.where(np.arange(60) < 40, "train", "val+test")
    cells[0], cells[1] = "train*3", ""
    study = replace(small_data, columns=small_data.columns | {"split_study": cells}, protocol="study")
    assert study.rows("train").tolist() == [0, 0, 0, *range(2, 40)]
    assert study.rows("val").tolist() == study.rows("test").tolist() == list(range(40, 60))
    config = Config()
    drawn = [int(row) for _, row in zip(range(41), pipeline.order(study, config), strict=False)]
    assert Counter(drawn) == Counter(study.rows("train").tolist()), "an epoch has each as often as the study"
    batch = next(iter(pipeline.eval_batches(study, study.rows("train"), config, 64)))
    assert np.bincount(batch["row"][batch["row"] >= 0])[:3].tolist() == [3, 0, 1]


def slices(root, names, seed):
    """Drawn slices, a patient each, as PNG files."""
    for i, name in enumerate(names):
        patient = phantom.new_patient(seed + i, "Normal")
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(phantom.gray(phantom.draw_slice(patient, 0.5).hu, patient.window)).save(path)


@pytest.fixture(scope="module")
def xray_5k(tmp_path_factory):
    """The layout of COVID-XRay-5K with an exact copy and a recompressed smaller one of test images in train."""
    root = tmp_path_factory.mktemp("twins")
    names = [f"{split}/{label}/{split}{label}{i}.png" for split in ("train", "test") for label in ("covid", "non")
             for i in range(4)]  # fmt: skip
    slices(root / "in", names, 500)
    shutil.copy(root / "in/test/covid/testcovid0.png", root / "in/train/covid/copied.png")
    smaller = Image.open(root / "in/test/non/testnon1.png")
    smaller = smaller.resize((smaller.width * 3 // 4, smaller.height * 3 // 4), Image.Resampling.BICUBIC)
    smaller.save(root / "in/train/non/smaller.jpg", quality=70)
    result = datasets.write("covid_xray_5k", root / "in", root / "data", PrepareOptions(), quiet=True)
    return root, result


def test_twins_over_splits_are_counted_for_the_study_and_left_out_of_the_clean_splits(xray_5k):
    root, result = xray_5k
    leaks = result["twins"]["leaks"]
    assert leaks["study"]["test"] == leaks["study"]["val"] | {"exact_twin_in_val": 8}, "it validates on test"
    assert leaks["study"]["test"]["exact_twin_in_train"] == leaks["study"]["test"]["near_twin_in_train"] == 1
    assert leaks["study"]["test"]["any"] == 2 and leaks["clean"]["test"]["any"] == 0
    assert any("2 of 8 test images are known from train" in line for line in result["warnings"])
    clean, study = (datasets.open_dataset("covid_xray_5k", root / "data", p) for p in ("clean", "study"))
    files = clean.columns["file"]
    assert sorted(files[clean.columns["split"] == ""]) == ["train/covid/copied.png", "train/non/smaller.jpg"]
    assert set(files[study.rows("train")]) > {"train/covid/copied.png", "train/non/smaller.jpg"}
    assert set(study.rows("val")) == set(study.rows("test")) and not set(clean.rows("val")) & set(clean.rows("test"))
    near = near_duplicates.read(clean, root / "data")
    assert files[near].tolist() in ([["test/non/testnon1.png", "train/non/smaller.jpg"]], [
        ["train/non/smaller.jpg", "test/non/testnon1.png"]
    ])  # fmt: skip
    assert result["twins"]["pairs"] == [
        "test/covid/testcovid0.png (val+test, covid) = train/covid/copied.png (train, covid)",
        "test/non/testnon1.png (val+test, non) ~ train/non/smaller.jpg (train, non)",
    ]


def test_cross_names_what_two_sets_share(xray_5k):
    root, _ = xray_5k
    slices(root / "other", [f"{label}/{i}.png" for label in "ab" for i in range(5)], 900)
    shutil.copy(root / "in/test/non/testnon3.png", root / "other/a/shared.png")
    datasets.write("folder/other", root / "other", root / "data", PrepareOptions(), quiet=True)
    flags = ["--dataset=folder/other", "--cross=covid_xray_5k", f"--data_dir={root / 'data'}"]
    said = subprocess.run([sys.executable, "-m", "lungjax.prepare", *flags], capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    assert "1 of 11 images of folder/other has an exact copy in covid_xray_5k/default, 0 a near twin" in said.stdout
    assert "a/shared.png = test/non/testnon3.png" in said.stdout
    datasets.write("folder/other-lungs", root / "other", root / "data", PrepareOptions(), quiet=True)
    with pytest.raises(ValueError, match="folder/other-lungs is a stage: give it without"):
        near_duplicates.cross(
            *(datasets.open_dataset(n, root / "data") for n in ("folder/other-lungs", "folder/other"))
        )


def test_slices_of_patients_that_only_look_alike_are_no_twins(tmp_path):
    """Drawn chests at one level are as alike as slices of different patients get; none may be left out."""
    result = datasets.write("phantom_ct/tiny", None, tmp_path, PrepareOptions(seed=3), quiet=True)
    assert result["twins"]["near_pairs"] == result["twins"]["left_out"] == 0


def test_a_real_x_ray_saved_again_is_found(shared, tmp_path):
    files = (
        sorted((shared / "data/xray/COVID").glob("*.jpg"))[:30] + sorted((shared / "data/xray/Normal").glob("*"))[:30]
    )
    for i, path in enumerate(files):
        target = tmp_path / "in" / ("train", "test")[i % 2] / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(path.resolve())
    again = io.BytesIO()
    Image.open(files[1]).save(again, "JPEG", quality=40)
    (tmp_path / "in/train/COVID/again.jpg").write_bytes(again.getvalue())
    result = datasets.write("folder", tmp_path / "in", tmp_path / "data", PrepareOptions(), quiet=True)
    assert result["twins"]["near_pairs"] == 1 and result["twins"]["left_out"] == 1
    assert "again.jpg" in result["twins"]["pairs"][0] and files[1].name in result["twins"]["pairs"][0]
