"""External validation: mapped probabilities computed by hand, overlapping patients and images, an unchanged run."""

import hashlib
import json
import shutil
from dataclasses import replace

import commands
import numpy as np
import pytest
from folders import encoded, prepare, rows
from PIL import Image

from lungjax import datasets, main
from lungjax.config import overrides
from lungjax.data import prepared
from lungjax.datasets import overlap
from lungjax.evaluation import predictions
from lungjax.evaluation.predictions import Predictions
from lungjax.inference.model import load
from lungjax.runtime import environment
from lungjax.training import external_test, setup

pytestmark = pytest.mark.usefixtures("no_pictures")
OURS, THEIRS = ("left", "middle", "right"), ("L", "M", "R", "junk")
MAP = "L=left,M=middle+right,R=middle+right,junk=-"
SPLITS = ("train", "train", "val", "test")


@pytest.fixture(scope="module")
def root(trained_run, tmp_path_factory):
    """A run on folder/mine; folder/other is new; folder/again has a copy and a near duplicate of images from mine."""
    root = tmp_path_factory.mktemp("external")
    for source, name in ((trained_run.workdir, "run"), (trained_run.data_dir, "data"), (trained_run.images, "in_mine")):
        shutil.copytree(source, root / name)
    mine = rows(OURS, 6, splits=("train", "train", "train", "val", "val", "test"))  # those of `trained_run`
    other = rows(THEIRS, 4, splits=SPLITS, prefix="q", seed=1)
    learned = [row["image"] for row in mine if row["split"] in ("train", "val")]
    again = [{**row, "path": f"z{row['path']}"} for row in other]
    test = [row for row in again if row["split"] == "test"]
    larger = Image.fromarray(learned[7]).resize((64, 64), Image.Resampling.BICUBIC)
    test[0]["image"], test[3]["image"] = learned[0], encoded(larger, "JPEG", quality=80)
    test[1]["image"] = next(row["image"] for row in mine if row["split"] == "test")  # the run has not seen it
    for name, images in (("other", other), ("again", again)):
        prepare(root, name, images)
    return root


def digests(folder):
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and "external" not in p.parts]
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_command(root, monkeypatch, capsys):
    before = digests(root / "run")
    monkeypatch.setattr(environment, "prepare_jax", lambda: None)
    arguments = ["--mode=evaluate", "--dataset=folder/other", f"--label_map={MAP}", f"--data_dir={root / 'data'}"]
    assert commands.run(main, f"--workdir={root / 'run'}", *arguments) == 0
    folder = root / "run/external/folder_other"
    assert capsys.readouterr().out.splitlines()[-1] == f"Report: {folder / 'report.html'}"
    assert digests(root / "run") == before

    result = predictions.read(folder / "predictions_test.csv")
    other = datasets.open_dataset("folder/other", root / "data")
    rows = other.rows("test")[other.columns["label"][other.rows("test")] != THEIRS.index("junk")]
    assert result.ids.tolist() == other.columns["file"][rows].tolist()
    assert result.classes == ("left", "middle+right")
    assert result.labels.tolist() == (other.columns["label"][rows] > 0).astype(int).tolist()
    # The same network through the Python API.
    p = load(root / "run").predict([root / "in_other" / name for name in result.ids])
    np.testing.assert_allclose(result.probabilities, np.column_stack([p[:, 0], p[:, 1] + p[:, 2]]), rtol=1e-4)
    report = json.loads((folder / "report.json").read_text())
    assert report["facts"]["external"]["label_map"] == {
        "L": "left", "M": "middle+right", "R": "middle+right", "junk": "-"
    }  # fmt: skip
    assert report["facts"]["counts"]["test"] == {"left": 2, "middle+right": 4}
    assert report["warnings"][0].startswith("Tested on the test split of folder/other; the model was trained")
    val = predictions.read(folder / "predictions_val.csv")
    own = predictions.read(root / "run/predictions_val.csv")
    assert val.ids.tolist() == own.ids.tolist() and val.labels.tolist() == (own.labels > 0).astype(int).tolist()
    np.testing.assert_allclose(val.probabilities[:, 0], own.probabilities[:, 0], rtol=1e-5)
    assert not any("share" in text for text in report["warnings"])


def test_orientation_of_another_data_set(root, monkeypatch):
    config = overrides.from_json((root / "run/config.json").read_text())
    opened, rotated = datasets.open_dataset, {"orientation": "rotated"}
    monkeypatch.setattr(
        datasets, "open_dataset", lambda *a: replace(opened(*a), volumes=rotated if "other" in a[0] else None)
    )
    external_test.evaluate(config, root / "run", root / "data", "folder/other", "L=left,M=middle,R=right,junk=-")
    result = predictions.read(root / "run/external/folder_other/predictions_test.csv")
    images = [np.asarray(Image.open(root / "in_other" / name))[::-1, ::-1] for name in result.ids]
    np.testing.assert_allclose(result.probabilities, load(root / "run").predict(images), rtol=1e-4)
    report = json.loads((root / "run/external/folder_other/report.json").read_text())
    assert any("duplicates" in text and "rotated by 180" in text for text in report["warnings"])


def test_own_test_split(root):
    config = overrides.from_json((root / "run/config.json").read_text())
    external_test.evaluate(config, root / "run", root / "data", "folder/mine")
    again = predictions.read(root / "run/external/folder_mine/predictions_test.csv")
    own = predictions.read(root / "run/predictions_test.csv")
    assert again.ids.tolist() == own.ids.tolist() and again.classes == own.classes
    np.testing.assert_allclose(again.probabilities, own.probabilities, rtol=1e-5)
    np.testing.assert_array_equal(again.labels, own.labels)
    reports = [json.loads((root / f"run/{name}report.json").read_text()) for name in ("", "external/folder_mine/")]
    first, second = ({key: each[key] for key in ("operating_points", "calibration")} for each in reports)
    assert second["calibration"]["temperature"] == first["calibration"]["temperature"]
    assert second["operating_points"] == first["operating_points"]
    for split, patients in (("train", "9 patients"), ("val", "6 patients")):
        with pytest.raises(ValueError, match=patients):
            external_test.evaluate(config, root / "run", root / "data", "folder/mine", split=split)


def test_images_from_training(root):
    config = overrides.from_json((root / "run/config.json").read_text())
    with pytest.raises(ValueError, match="1 are exact copies and 1 near"):
        external_test.evaluate(config, root / "run", root / "data", "folder/again", MAP.replace("-", "left"))
    assert not (root / "run/external/folder_again").exists()
    mine, again = (datasets.open_dataset(f"folder/{name}", root / "data") for name in ("mine", "again"))
    without = named(again, "test")
    without.columns["split"][np.isin(again.columns["pixels"], mine.columns["pixels"])] = ""
    with pytest.raises(ValueError, match="0 are exact copies and 1 near"):
        overlap.check(mine, without, root / "data", "it")
    # Its val and train splits are new to the run.
    assert overlap.check(mine, named(again, "train", "val"), root / "data", "it")[1] == []
    with pytest.raises(ValueError, match="folder/none is not prepared"):
        external_test.evaluate(config, root / "run", root / "data", "folder/none")


def test_overlap_drop(root, monkeypatch, capsys):
    monkeypatch.setattr(environment, "prepare_jax", lambda: None)
    again = datasets.open_dataset("folder/again", root / "data")
    test = again.rows("test")
    copies = [f"z{row['path']}" for row in rows(THEIRS, 4, splits=SPLITS, prefix="q") if row["split"] == "test"]
    shared = np.isin(again.columns["file"], [copies[0], copies[3]])  # images of two patients with two images each
    rest = [i for i in test if again.columns["group"][i] not in again.columns["group"][shared]]
    assert len(rest) == len(test) - 4
    arguments = ["--mode=evaluate", "--dataset=folder/again", f"--label_map={MAP.replace('-', 'left')}"]
    arguments += [f"--data_dir={root / 'data'}", f"--workdir={root / 'run'}"]
    assert commands.run(main, *arguments) == 2 and "--overlap=drop" in capsys.readouterr().err
    assert commands.run(main, *arguments, "--overlap=drop") == 0
    folder = root / "run/external/folder_again"
    assert predictions.read(folder / "predictions_test.csv").ids.tolist() == again.columns["file"][rest].tolist()
    warnings = json.loads((folder / "report.json").read_text())["warnings"]
    assert any("left out 4 of 8 images of 2 patients" in text for text in warnings)
    with pytest.raises(ValueError, match="no image is left"):
        overlap.check(again, named(again, "train"), root / "data", "it", drop=True)


def test_data_set_with_test_images_only(root):
    images = [row | {"split": "test"} for row in rows(OURS, 2, prefix="t", seed=7)]
    prepare(root, "external", images)
    data = datasets.open_dataset("folder/external", root / "data")
    assert set(data.columns["split"]) == {"test"}
    summary = json.loads((prepared.directory(root / "data", "folder/external") / "summary.json").read_text())
    assert not any("train" in text or "val" in text for text in summary["warnings"])
    assert any("external test set" in note for note in summary["notes"])
    config = overrides.from_json((root / "run/config.json").read_text())
    external_test.evaluate(config, root / "run", root / "data", "folder/external")
    assert len(predictions.read(root / "run/external/folder_external/predictions_test.csv").ids) == 12
    config = overrides.override(config, "data.dataset=folder/external")
    with pytest.raises(ValueError, match="no train split"):
        setup.set_up(config, root / "new", root / "data", "train", 0)


def named(data, *splits):
    """The data set with the images of `splits` as its test split."""
    return replace(data, columns=data.columns | {"split": np.where(np.isin(data.columns["split"], splits), "test", "")})


def test_shared_patients_and_sources(root):
    mine, other = (datasets.open_dataset(f"folder/{name}", root / "data") for name in ("mine", "other"))
    own, rows = np.arange(4), np.arange(6)

    def known(a, b, groups=("p1", "p2"), sources=("x", "y")):
        one, two = (
            replace(d, name=name, columns=d.columns | {"group": np.full(len(d.columns["file"]), group),
                                                       "source": np.full(len(d.columns["file"]), source)})
            for d, name, group, source in zip((mine, other), (a, b), groups, sources, strict=True)
        )  # fmt: skip
        return overlap.shared_groups(one, own, two, rows), overlap.shared_sources(one, own, two, rows)

    same, hashed = ("patient 1",) * 2, ("0123456789ab",) * 2
    assert known("covidx_ct/3a", "covidx_ct/3b-224", same) == (["patient 1"], [])
    assert known("covidx_ct/3a", "ct_cov19/original", same) == ([], []), "a name means another person elsewhere"
    assert known("folder/a", "folder/b", same, ("x", "x")) == ([], [])
    assert known("folder/a", "folder/a-lungs", same) == (["patient 1"], [])
    assert known("folder/a", "folder/b", hashed) == (["0123456789ab"], [])
    assert known("covidx_ct/3a", "ictcf/default", sources=("iCTCF", "iCTCF")) == ([], ["iCTCF"])
    collection = "COVID-19 image data collection"
    assert known("coronahack/default", "covid_xray_5k/default", sources=(collection,) * 2)[1] == [collection]
    assert known("coronahack/default", "covid_chestxray/covid", sources=(collection, "sirm.org"))[1] == [collection]
    assert known("covid_chestxray/covid", "covid_chestxray/findings", sources=("a", "a"))[1] == []


def test_overlap_of_stages(root):
    data_dir = root / "data"
    for name in ("mine", "again"):
        datasets.write(f"folder/{name}-20", root / f"in_{name}", data_dir, datasets.PrepareOptions(), quiet=True)
    mine, again = (datasets.open_dataset(f"folder/{name}-20", data_dir) for name in ("mine", "again"))
    # Without records, so that only the images before the stage can be compared.
    staged = [replace(data, name=data.name.replace("-20", "-nobackg-20"), records=None) for data in (mine, again)]
    with pytest.raises(ValueError, match="1 are exact copies and 1 near"):
        overlap.check(staged[0], staged[1], data_dir, "it")
    lone = replace(mine, name="folder/lone-nobackg")
    other = datasets.open_dataset("folder/other", data_dir)
    _, doubts = overlap.check(lone, other, data_dir, "it")
    assert len(doubts) == 1 and "prepare folder/lone-nobackg" in doubts[0]


def test_label_map_errors():
    for text, hint in (
        ("", "classes of the data set are L, M, R, junk"),
        ("L=left,M", "'M' is not CLASS=CLASS"),
        ("L=left,M=middle,R=right", "junk needs exactly one entry"),
        ("L=left,M=middle,R=right,jnk=-", "did you mean junk"),
        ("L=left,M=middle,R=rigt,junk=-", "did you mean right"),
        ("L=left,L=middle,R=right,M=-,junk=-", "L needs exactly one entry"),
        ("L=left+middle,M=middle,R=right,junk=-", "middle is on two"),
        ("L=left,M=left,R=-,junk=-", "at least two"),
    ):
        with pytest.raises(ValueError, match=hint):
            external_test.read_map(text, THEIRS, OURS)


def test_mapped_probabilities():
    classes = ("left", "middle", "right", "other")
    mapping = external_test.read_map("R=right, M=left+middle ,L=-", ("L", "M", "R"), classes)
    assert mapping.classes == ("left+middle", "right") and mapping.labels == (-1, 0, 1)
    p = np.array([[0.1, 0.2, 0.3, 0.4], [0.5, 0.25, 0.25, 0.0], [0.0, 0.0, 0.0, 1.0]])
    text = np.asarray(["x", "y", "z"])
    predicted = Predictions(text, text, text, np.zeros(3, int), p, classes)
    labels = np.array([1, 2, 2])
    result = external_test.map_predictions(predicted, mapping, labels)
    assert result.labels.tolist() == [0, 1, 1]
    np.testing.assert_allclose(result.probabilities[:2], [[0.5, 0.5], [0.75, 0.25]], rtol=1e-6)
    np.testing.assert_allclose(result.probabilities[2], [2 / 3, 1 / 3], rtol=1e-6)
    sure = replace(predicted, logits=np.array([[0.0, 0, 0, 900]] * 3))
    confident = external_test.map_predictions(sure, mapping, labels)
    np.testing.assert_allclose(confident.probabilities, [[2 / 3, 1 / 3]] * 3, rtol=1e-6)
    warm = external_test.map_predictions(predicted, mapping, labels, temperature=2.0)
    roots = np.sqrt(p[:2])  # the probabilities at twice the temperature, before normalization
    expected = np.stack([roots[:, 0] + roots[:, 1], roots[:, 2]], axis=1)
    np.testing.assert_allclose(warm.probabilities[:2], expected / expected.sum(1, keepdims=True), rtol=1e-6)
    np.testing.assert_array_equal(warm.logits, result.logits)
    powers = np.exp(confident.logits)
    np.testing.assert_allclose(powers / powers.sum(1, keepdims=True), confident.probabilities, rtol=1e-6)
    order = external_test.read_map("", ("b", "a"), ("a", "b"))
    assert order.classes == ("a", "b") and order.labels == (1, 0)
    # The run's own val split: images of "other", which has no entry, are omitted.
    own = replace(predicted, groups=np.asarray(["p", "p", ""]), labels=np.array([1, 3, 2]))
    val = external_test.map_val(own, mapping, "own")
    assert val.ids.tolist() == ["x", "z"] and val.labels.tolist() == [0, 1] and val.groups.tolist() == ["own: p", ""]
    np.testing.assert_array_equal(val.probabilities, result.probabilities[[0, 2]])


def test_incompatible_flags(tmp_path, capsys):
    cases = (
        (["--dataset=x"], 1, "--mode=evaluate"),
        (["--dataset=x", "--mode=evaluate", "--folds=3"], 1, "--folds"),
        (["--label_map=a=b"], 1, "--label_map"),
        (["--split=all", "--experiment=phantom_demo"], 1, "--split"),
        (["--dataset=x", "--mode=evaluate", f"--workdir={tmp_path / 'nowhere'}"], 2, "no config.json"),
        (["--dataset=x", "--mode=evaluate"], 1, "--experiment=NAME"),
    )
    commands.assert_errors(capsys, main, cases)
