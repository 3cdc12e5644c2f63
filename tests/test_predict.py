"""The command that predicts: the run's own numbers again, calibrated, for every kind of file; what can't be read."""

import csv
import json
import os
from dataclasses import replace

import numpy as np
import pytest
import scans
from absl import app
from absl.testing import flagsaver
from conftest import png, small_bn, without_pictures
from folders import CONFIG, prepare, rows
from scipy import special

import lungjax
from lungjax import datasets, models, predict
from lungjax.config import InputSpec, metadata, overrides
from lungjax.config.metadata import Metadata
from lungjax.data import pipeline, preprocess
from lungjax.data.imaging import images
from lungjax.evaluation import predictions
from lungjax.inference import inputs, predictor, records
from lungjax.report import model_json
from lungjax.runtime import environment
from lungjax.training import train  # fmt: skip

CLASSES = ("left", "middle", "right")
TOLD = Metadata("mine", ("dark", "bright"), InputSpec(size=(8, 8)), "folder/mine", hu_windows=((-500.0, 1000.0),))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A run on the folder root/in_mine, three steps long."""
    root = tmp_path_factory.mktemp("predict")
    prepare(root, "mine", rows(CLASSES, 6, splits=("train", "train", "train", "val", "val", "test")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, "small_bn", small_bn())
        without_pictures(patch)
        train.run(overrides.override(CONFIG, "data.dataset=folder/mine"), root / "run", root / "data")
    return root


@pytest.fixture(autouse=True)
def network(monkeypatch):
    monkeypatch.setitem(models.MODELS, "small_bn", small_bn())
    monkeypatch.setattr(environment, "prepare_jax", lambda: None)


def command(*paths, **given):
    with flagsaver.flagsaver(**{name: str(value) for name, value in given.items()}):
        predict.main(["predict", *map(str, paths)])


def table(path):
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def lines(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def brightness(dark=0.0, **fields):
    """A model by hand: the probability of "bright" is the mean gray level."""

    def run(pixels):
        p = pixels.mean((1, 2, 3), dtype=np.float64) / 255
        return np.stack([1 - p, p], axis=1).astype(np.float32)

    return predictor.Predictor(replace(TOLD, **fields), "run", "cpu", 4, (), run)


def test_files_get_the_runs_own_answers_calibrated(root, tmp_path, capsys):
    command(root / "in_mine", model=root / "run", out=tmp_path / "out")
    found = {row["file"].rpartition("/")[2]: row for row in table(tmp_path / "out/predictions.csv")}
    told = metadata.read(root / "run/model.json")
    own = predictions.read(root / "run/predictions_test.csv")
    val = predictions.read(root / "run/predictions_val.csv")
    for p in (own, val):
        wanted = special.softmax(p.logits / told.temperature, axis=1)
        for name, row in zip(p.ids.tolist(), wanted, strict=True):
            said = [float(found[name][f"p_{c}"]) for c in CLASSES]
            np.testing.assert_allclose(said, row, atol=2e-6)
            assert found[name]["predicted"] == CLASSES[int(row.argmax())]
            for c, value in zip(CLASSES, row, strict=True):
                threshold = told.points["slice"][c]["youden"]["threshold"]
                assert abs(value - threshold) < 1e-6 or found[name][f"called_{c}"] == (
                    "yes" if value > threshold else "no"
                )
    # The temperature is the one at which val's cross-entropy is least.
    scales = told.temperature * np.asarray([0.97, 1.0, 1.03])
    losses = [-special.log_softmax(val.logits / t, axis=1)[np.arange(len(val)), val.labels].mean() for t in scales]
    assert losses[1] <= min(losses) or told.temperature in (0.05, 20.0)
    assert "36 images" in capsys.readouterr().out
    assert [record["file"] for record in lines(tmp_path / "out/predictions.jsonl")] == [
        row["file"] for row in table(tmp_path / "out/predictions.csv")
    ]


def test_python_gets_what_the_command_gets(root, tmp_path):
    names = [root / "in_mine/p000.png", root / "in_mine/p033.png"]
    command(*names, model=root / "run", out=tmp_path / "out")
    wanted = [[float(row[f"p_{name}"]) for name in CLASSES] for row in table(tmp_path / "out/predictions.csv")]
    np.testing.assert_allclose(lungjax.open_model(root / "run").predict(names), wanted, atol=2e-6)
    with pytest.raises(ValueError, match="gone.png"):
        lungjax.open_model(root / "run").predict(["gone.png"])


def test_what_is_there_is_not_lost(root, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "predictions.csv").write_text("mine")
    with pytest.raises(ValueError, match="holds predictions already.*--overwrite"):
        command(root / "in_mine/p000.png", model=root / "run", out=out)
    assert (out / "predictions.csv").read_text() == "mine"
    command(root / "in_mine/p000.png", model=root / "run", out=out, overwrite=True)
    assert len(table(out / "predictions.csv")) == 1


def test_patients_of_a_list_are_summed_up_and_heat_maps_drawn(root, tmp_path):
    (tmp_path / "list.csv").write_text(
        f"path,group\n{root}/in_mine/p000.png,anna\n{root}/in_mine/p001.png,anna\n{root}/in_mine/p002.png,\n"
    )
    command(tmp_path / "list.csv", model=root / "run", out=tmp_path / "out", explain=True)
    images, series = table(tmp_path / "out/predictions.csv"), table(tmp_path / "out/series.csv")
    assert [row["series"] for row in images] == ["anna", "anna", ""] and [row["series"] for row in series] == ["anna"]
    for name in CLASSES:
        mean = np.mean([float(row[f"p_{name}"]) for row in images[:2]])
        assert float(series[0][f"p_{name}"]) == pytest.approx(mean, abs=1e-6)
    told = metadata.read(root / "run/model.json")
    record = lines(tmp_path / "out/series.jsonl")[0]
    assert record["decisions"]["left"]["threshold"] == told.points["patient"]["left"]["youden"]["threshold"]
    assert len(list((tmp_path / "out/explain").glob("*_gradcam.png"))) == 3


def test_what_can_not_be_read_is_named_and_the_rest_done(root, tmp_path, capsys):
    (tmp_path / "cut.png").write_bytes((root / "in_mine/p001.png").read_bytes()[:200])
    (tmp_path / "deep.png").write_bytes(png(np.full((40, 40), 900, np.uint16)))
    given = [root / "in_mine/p000.png", tmp_path / "cut.png", tmp_path / "deep.png", tmp_path / "gone.png"]
    with pytest.raises(SystemExit) as stopped:
        command(*given, model=root / "run", out=tmp_path / "out")
    assert stopped.value.code == 1
    rows = {row["file"].rpartition("/")[2]: row for row in table(tmp_path / "out/predictions.csv")}
    assert rows["p000.png"]["error"] == "" and rows["p000.png"]["predicted"] in CLASSES
    for name, why in {"cut.png": "truncated", "deep.png": "--window=low,high", "gone.png": "no such"}.items():
        assert why in rows[name]["error"] and not rows[name]["predicted"]
    assert "3 could not be predicted" in capsys.readouterr().err
    command(tmp_path / "deep.png", model=root / "run", out=tmp_path / "two", window="0,1000")
    assert table(tmp_path / "two/predictions.csv")[0]["predicted"] in CLASSES


def test_mistakes_are_answered(root, tmp_path):
    with pytest.raises(app.UsageError, match="--model=RUN is missing"):
        command("a.png", out=tmp_path / "out")
    for given, words in (
        ({"model": tmp_path / "none"}, "no such file or folder"),
        ({"model": tmp_path}, "no trained run there"),
        ({"model": root / "in_mine/p000.png"}, "wanted a run's folder, or a model.pyz"),
        ({"model": root / "run", "rule": "yuden"}, "--rule=yuden: the nearest: youden"),
        ({"model": root / "run", "explain": True, "method": "gradcam+"}, "the nearest: gradcam"),
        ({"model": root / "run", "gate": root / "run", "gate_class": "lefty"}, "the nearest: left"),
        ({"model": root / "run", "group_pattern": "("}, "not a regular expression"),
        ({"model": root / "run", "hu_window": "40"}, "wanted centre/width"),
    ):
        with pytest.raises(ValueError, match=words):
            command(root / "in_mine/p000.png", out=tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()
    (root / "run/model.json").rename(root / "run/moved")
    try:
        with pytest.raises(ValueError, match="--mode=evaluate --workdir="):
            command(root / "in_mine/p000.png", model=root / "run", out=tmp_path / "out")
    finally:
        (root / "run/moved").rename(root / "run/model.json")


def test_a_series_is_cut_as_the_training_images_were(tmp_path):
    hu = scans.body((6, 10, 8))
    scans.series(tmp_path / "scan", hu)
    scans.nifti(tmp_path / "volume.nii.gz", hu)
    level = np.clip((hu.astype(float) + 1000) * 255 / 1000, 0, 255).round()  # window -500/1000
    axial = inputs.gather([str(tmp_path)], TOLD)
    assert not axial.bad and len(axial.items) == 12 and set(axial.middle) == {
        str(tmp_path / "scan"), str(tmp_path / "volume.nii.gz")
    }  # fmt: skip
    by_series = {}
    for item in axial.items:
        by_series.setdefault(item.series, []).append(item.read())
    for slices in by_series.values():  # from foot to head, however the files are numbered
        np.testing.assert_array_equal(np.stack(slices), level)
    for told, wanted in (
        (replace(TOLD, plane="coronal", position="mid"), level[::-1, 5]),
        (replace(TOLD, plane="sagittal", position="mid"), level[::-1, :, 4]),
        (replace(TOLD, position="mid"), level[3]),
    ):
        found = inputs.gather([str(tmp_path / "scan"), str(tmp_path / "volume.nii.gz")], told)
        assert len(found.items) == 2 and not found.bad
        for item in found.items:
            np.testing.assert_array_equal(item.read(), wanted)


def test_series_of_one_folder_have_names_of_their_own_and_no_identity(tmp_path):
    hu = scans.body((4, 10, 8))
    scans.series(tmp_path / "all", hu, SeriesInstanceUID="1.2.3.5")
    for path in scans.series(tmp_path / "two", hu, SeriesInstanceUID="1.2.3.6"):
        name = path.rpartition("/")[2]
        (tmp_path / "two" / name).rename(tmp_path / "all" / f"other_{name}")
    found = inputs.gather([str(tmp_path / "all")], TOLD)
    assert sorted(found.middle) == [str(tmp_path / "all"), f"{tmp_path / 'all'} (series 2)"]
    out = tmp_path / "out"
    out.mkdir()
    assert not predict.predict(brightness(), found, out)
    assert len(table(out / "series.csv")) == 2
    written = "".join(path.read_text() for path in out.iterdir())
    for identity in ("Doe", "Jane", "4711", "1970", "1.2.3"):
        assert identity not in written


def test_the_gate_holds_series_back(tmp_path, capsys):
    whole = np.full((6, 8, 8), -100, np.int16)
    for name, hu in (("bright", whole), ("dark", whole - 850)):
        scans.nifti(tmp_path / f"{name}.nii", np.concatenate([hu, np.full((1, 8, 8), 40), np.full((1, 8, 8), -1000)]))
    (tmp_path / "plain.png").write_bytes(png(np.full((8, 8), 200, np.uint8)))
    found = inputs.gather([str(tmp_path)], TOLD)
    gate = brightness(plane="coronal", position="mid")
    with flagsaver.flagsaver(gate_class="bright"):
        failures = predict.predict(brightness(), found, tmp_path, gate)
    assert [name for name, _ in failures] == [str(tmp_path / "dark.nii")]
    series = {row["series"].rpartition("/")[2]: row for row in table(tmp_path / "series.csv")}
    assert series["bright.nii"]["gate"] == "passed" and series["dark.nii"]["gate"] == "held back"
    assert series["dark.nii"]["predicted"] == "" and "left out by the gate" in series["dark.nii"]["error"]
    assert {row["series"].rpartition("/")[2] for row in table(tmp_path / "predictions.csv")} == {"bright.nii", ""}


def test_a_list_names_the_patient_of_volumes_too_and_lists_are_apart(tmp_path):
    hu = scans.body((4, 10, 8))
    paths = scans.series(tmp_path / "scan", hu)
    scans.nifti(tmp_path / "v.nii", hu)
    for name in ("one", "two"):
        (tmp_path / f"{name}.png").write_bytes(png(np.full((9, 9), 50, np.uint8)))
    rows = [f"{path},anna" for path in paths] + [f"{tmp_path / 'v.nii'},bert", f"{tmp_path / 'one.png'},1"]
    (tmp_path / "a.csv").write_text("\n".join(["path,group", *rows]))
    found = inputs.gather([str(tmp_path / "a.csv")], TOLD)
    assert {item.series for item in found.items} == {"anna", "bert", "1"} and len(found.items) == 9
    (tmp_path / "b.csv").write_text("path,group\none.png,2\ntwo.png,1\n")
    both = inputs.gather([str(tmp_path / "a.csv"), str(tmp_path / "b.csv")], TOLD)
    ones = [series for series in both.middle if series.endswith(": 1")]
    assert len(ones) == 2  # two patients of that name
    assert len(both.bad) == 1 and "given before" in both.bad[0][1]  # one.png, then of somebody else


def test_slices_that_can_not_be_read_are_told_of_their_series(tmp_path, capsys):
    hu = scans.body((5, 10, 8))
    for name, broken in (("some", 2), ("all", 5)):
        for path in scans.series(tmp_path / name, hu, SeriesInstanceUID=f"1.2.{broken}")[:broken]:
            with open(path, "r+b") as file:
                file.truncate(os.path.getsize(path) - 30)
    out = tmp_path / "out"
    out.mkdir()
    failures = predict.predict(brightness(), inputs.gather([str(tmp_path)], TOLD), out)
    assert len(failures) == 7
    series = {row["series"].rpartition("/")[2]: row for row in table(out / "series.csv")}
    assert "2 slices could not be read" in series["some"]["warnings"] and series["some"]["files"] == "3"
    assert "none of its slices" in series["all"]["error"]


def test_damaged_dicom_header_is_one_named_failure(tmp_path):
    """Elements are converted when they are used: a changed value representation fails late, and with any type."""
    paths = scans.series(tmp_path / "in", scans.body((4, 10, 8)), SeriesInstanceUID="1.2.3")
    for path, old, new in (
        (paths[0], b"\x08\x00\x60\x00CS", b"\x08\x00\x60\x00CQ"),
        (paths[1], b"\x28\x00\x10\x00US", b"\x28\x00\x10\x00FD"),
    ):
        with open(path, "rb") as file:
            data = file.read()
        assert data.count(old) == 1
        with open(path, "wb") as file:
            file.write(data.replace(old, new))
    out = tmp_path / "out"
    out.mkdir()
    failures = predict.predict(brightness(), inputs.gather([str(tmp_path / "in")], TOLD), out)
    assert {os.path.basename(name) for name, _ in failures} == {os.path.basename(path) for path in paths[:2]}
    assert all("damaged" in why for _, why in failures)
    assert sum(bool(row["predicted"]) for row in table(out / "predictions.csv")) == 2


def test_one_odd_path_costs_nothing_else(root, tmp_path, capsys):
    odd = tmp_path / os.fsdecode(b"caf\xe9.png")
    odd.write_bytes((root / "in_mine/p000.png").read_bytes())
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "again").symlink_to(root / "in_mine")
    (tmp_path / "list.csv").write_text('path\n"' + "x" * 200_000)
    given = [tmp_path, odd, "~nobodyatall/x.png", "x" * 300, tmp_path / "list.csv"]
    with pytest.raises(SystemExit):
        command(*given, model=root / "run", out=tmp_path / "out", explain=True)
    rows = table(tmp_path / "out/predictions.csv")
    assert sum(bool(row["predicted"]) for row in rows) == 1  # odd, given twice
    assert {row["file"].rpartition("/")[2][:12] for row in rows if row["error"]} == {
        "dangling.png", "again", "x.png", "x" * 12, "list.csv"
    }  # fmt: skip
    lines(tmp_path / "out/predictions.jsonl")  # each is JSON
    assert len(list((tmp_path / "out/explain").iterdir())) == 1


def test_sixteen_bits_become_what_the_prepared_copy_has(tmp_path):
    made = rows(("a", "b"), 3, splits=("train", "val", "test"))
    for i, row in enumerate(made):
        rng = np.random.default_rng(i)
        row["image"] = png(rng.integers(0, 4000, (40, 40), dtype=np.uint16))
    folder = tmp_path / "in"
    folder.mkdir()
    for row in made:
        (folder / row["path"]).write_bytes(row["image"])
    lines_ = ["path,label,split,group", *(f"{r['path']},{r['label']},{r['split']},{r['group']}" for r in made)]
    (folder / "labels.csv").write_text("\n".join(lines_))
    options = datasets.PrepareOptions()
    datasets.write("folder/deep-16", folder, tmp_path / "data", options, quiet=True, window=(500.0, 1500.0))
    data = datasets.open_dataset("folder/deep-16", tmp_path / "data")
    spec = InputSpec(size=(16, 16))
    told = Metadata("deep", ("a", "b"), spec, data.name, stored=(16, 16), window=(500.0, 1500.0))
    reader = pipeline.Reader(data, spec)
    for number, name in enumerate(data.columns["file"].tolist()):
        pixels, *_ = preprocess.picture(images.read((folder / name).read_bytes())[0], told)
        np.testing.assert_array_equal(pixels, reader(number))
    with pytest.raises(ValueError, match="16-bit image.*--window=low,high"):
        preprocess.picture(np.zeros((20, 20), np.uint16), replace(told, window=None))


def test_where_boxes_come_from(small_data):
    config = replace(CONFIG, input=InputSpec(size=(32, 32), crop="box"))
    assert model_json._box(config, small_data) == ""  # all boxes are whole images
    boxed = replace(small_data, columns=small_data.columns | {"box": small_data.columns["box"] * 0.5})
    assert model_json._box(config, boxed) == "given"  # a user's, of anything
    assert model_json._box(CONFIG, boxed) == ""
    assert model_json._box(config, replace(boxed, name="covidx_ct/3a")) == "body"


def test_images_are_cut_to_the_body_where_the_training_images_were():
    spec = InputSpec(size=(40, 30), crop="box")
    y, x = np.mgrid[:200, :260]
    inside = ((y - 100) / 60) ** 2 + ((x - 130) / 90) ** 2 < 1
    image = np.where(inside, 150, 5).astype(np.uint8)
    seen = brightness(input=spec, box="body").picture(image)
    assert (seen.pixels[20] > 100).all() and (seen.pixels[:, 15] > 100).all() and not seen.warnings
    blank = brightness(input=spec, box="body").picture(np.zeros((200, 260), np.uint8))
    given = brightness(input=spec, box="given").picture(image)
    for picture in (blank, given):
        assert "body's box" in picture.warnings[0]
    assert (given.pixels[:2] < 100).all()


def test_batches_of_every_size_give_the_same():
    model, pixels = brightness(), np.random.default_rng(0).integers(0, 256, (11, 8, 8, 1), dtype=np.uint8)
    assert model.sizes == (1, 2, 4)
    whole = model(pixels)
    np.testing.assert_array_equal(np.concatenate([model(pixels[i : i + 3]) for i in range(0, 11, 3)]), whole)
    np.testing.assert_allclose(whole[:, 1], pixels.mean((1, 2, 3)) / 255, atol=1e-6)
    assert model(pixels[:0]).shape == (0, 2)
    with pytest.raises(ValueError, match="float64.*wanted uint8"):
        model(pixels / 255)
    with pytest.raises(ValueError, match="no heat maps"):
        model.explain(pixels)


def test_records_decide_by_the_operating_point():
    point = {"threshold": 0.3, "sensitivity": 0.9, "specificity": 0.8}
    told = replace(TOLD, points={"slice": {"bright": {"youden": point}, "dark": {}}})
    record = records.record(told, "a.png", np.asarray([0.6, 0.4]), 1.25, ["strange"])
    assert record["predicted"] == "dark" and record["decisions"] == {
        "bright": {"called": True, "rule": "youden", "level": "slice", **point}
    }
    assert record["unlike"] == 1.25 and record["warnings"] == ["strange"]
    series = records.summary(told, "s", np.asarray([[0.6, 0.4], [0.9, 0.1]]), warned=1)
    assert series["probabilities"] == {"dark": 0.75, "bright": 0.25} and not series["decisions"]["bright"]["called"]
    assert series["files"] == 2 and "1 of 2 slices" in series["warnings"][0]
    json.dumps([record, series], allow_nan=False)


def test_metadata_reads_back_and_refuses_what_it_is_not():
    told = replace(TOLD, stored=(64, 128), window=(0.0, 900.0), positive=1, points={"slice": {}}, box="body")
    assert metadata.from_json(told.to_json()) == told
    tree = json.loads(told.to_json())
    for change, words in (
        ({"format": 2}, "newer lungjax"),
        ({"format": None}, "no number `format`"),
        ({"classes": ["one"]}, "two or more names"),
        ({"temperature": 0}, "`temperature` 0"),
        ({"classes": ["a", "a"]}, "a name comes twice"),
        ({"window": [5, 5]}, "`window`"),
        ({"hu_windows": [[0, 0]]}, "`hu_windows`"),
        ({"box": "foo"}, "`box` 'foo'"),
        ({"stage": "lung"}, "`stage` 'lung'"),
        ({"points": {"slice": {"bright": {"youden": {"threshold": "a"}}}}}, "`points`"),
        ({"familiarity": "x"}, "`familiarity`"),
        ({"positive": 2}, "there are 2 classes"),
        ({"input": {"size": [8, 8], "colours": 3}}, "missing or unknown"),
        ({"input": {"size": [8, 100000]}}, "`input.size`"),
    ):
        with pytest.raises(ValueError, match=f"there.json: .*{words}"):
            metadata.from_json(json.dumps(tree | change), "there.json")
    with pytest.raises(ValueError, match="not JSON"):
        metadata.from_json("{")
