"""`lungjax.predict`: calibrated predictions for every kind of file, inputs that fail, and resumption."""

import csv
import itertools
import json
import os
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import commands
import numpy as np
import pytest
import scans
from brightness import brightness
from folders import encoded
from scipy import special
from services import running

from lungjax import datasets, predict
from lungjax.config import InputSpec, metadata
from lungjax.config.metadata import Metadata
from lungjax.data import pipeline, preprocess
from lungjax.data.imaging import images
from lungjax.evaluation import predictions
from lungjax.explain import __main__ as explain
from lungjax.explain import saliency
from lungjax.export import __main__ as export
from lungjax.inference import inputs, model, records
from lungjax.runtime import files

CLASSES = ("left", "middle", "right")
WINDOW = ((-500.0, 1000.0),)
METADATA = brightness(hu_windows=WINDOW).metadata


def table(path):
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return {row.get("file", row["series"]).rpartition("/")[2]: row for row in csv.DictReader(file)}


def lines(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


class Models(dict):
    """Models by name, in place of `model.load`."""

    def load(self, path):
        return self["".join(path)]  # a name, or a list with one name


@pytest.fixture
def command(trained_run, tmp_path):
    """Runs the command with the trained model; returns its exit code."""

    def run(*paths, **flags):
        flags = {"model": trained_run.workdir, "out": tmp_path / "out"} | flags
        return commands.run(predict, *paths, *(f"--{k}={v}" for k, v in flags.items()), positional=("PATH...",))

    return run


@pytest.fixture
def by_brightness(monkeypatch, command):
    """Runs the command with a model whose probability of "bright" is the mean gray level."""
    models = {"model": brightness(hu_windows=WINDOW), "gate": brightness(plane="coronal", position="mid")}
    monkeypatch.setattr(model, "load", Models(models).load)
    return partial(command, model="model")


def test_equal_numbers_everywhere(trained_run, command, tmp_path, capsys):
    """Report, predictions_test.csv, model.json, predict, explain, service and exports agree for every test image."""
    workdir, out = trained_run.workdir, tmp_path / "out"
    saved, description = predictions.read(workdir / "predictions_test.csv"), metadata.read(workdir / "model.json")
    report = json.loads((workdir / "report.json").read_text())
    assert description.points == report["operating_points"] and description.points.keys() == {"slice", "patient"}
    temperature = report["calibration"]["temperature"]
    assert description.temperature == temperature != 1
    np.testing.assert_allclose(saved.probabilities, special.softmax(saved.logits / temperature, axis=1), atol=1e-6)
    right = saved.probabilities[np.arange(len(saved)), saved.labels].astype(np.float64)
    assert report["test"]["slice"]["loss"] == pytest.approx(-np.log(right).mean())
    called = {}
    for i, name in enumerate(CLASSES):
        point, positive = description.points["slice"][name]["youden"], saved.labels == i
        assert np.abs(saved.probabilities[:, i] - point["threshold"]).min() > 1e-6
        called[name] = saved.probabilities[:, i] >= point["threshold"]
        assert point["sensitivity"] == called[name][positive].mean()
        assert point["specificity"] == (~called[name])[~positive].mean()

    paths = [trained_run.images / name for name in saved.ids.tolist()]
    formats = ["jax", *["onnx"] * all(map(find_spec, ("jax2onnx", "onnxruntime")))]
    assert commands.run(export, f"--model={workdir}", f"--out={tmp_path}", f"--format={','.join(formats)}") == 0
    models = [workdir, *(tmp_path / f"model.{name.replace('jax', 'pyz')}" for name in formats)]
    for i, path in enumerate(models):
        assert command(*paths, model=path, out=out / str(i)) == 0 and "6 images" in capsys.readouterr().out
        assert model.load(path).metadata == description
    results = [lines(out / str(i) / "predictions.jsonl") for i in range(len(models))]
    np.testing.assert_allclose(model.load(workdir).predict(paths), saved.probabilities, atol=2e-6)
    with running(model.load(workdir)) as service:
        results.append(service.post("/predict", *((file.name, file.read_bytes()) for file in paths))[1]["results"])
    for record in results:
        p = [[each["probabilities"][name] for name in CLASSES] for each in record]
        np.testing.assert_allclose(p, saved.probabilities, atol=2e-6)
        assert [each["predicted"] for each in record] == [CLASSES[k] for k in saved.predicted]
        for name in CLASSES:
            decisions = [each["decisions"][name] for each in record]
            assert [decision["called"] for decision in decisions] == called[name].tolist()
            point = description.points["slice"][name]["youden"]
            assert all(decision[key] == point[key] for decision in decisions for key in ("threshold", "sensitivity"))
    rows = table(out / "0/predictions.csv")
    assert [rows[name]["called_left"] for name in saved.ids] == ["yes" if call else "no" for call in called["left"]]

    data = f"--data_dir={trained_run.data_dir}"
    assert commands.run(explain, f"--model={workdir}", "--split=test", data, f"--out={out}") == 0
    rows = {row["file"]: row for row in csv.DictReader((out / "test_gradcam/index.csv").open())}
    p = [[float(rows[name][f"p_{c}"]) for c in CLASSES] for name in saved.ids]
    np.testing.assert_allclose(p, saved.probabilities, atol=1e-4)


def test_overwrite(trained_run, command, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "predictions.csv").write_text("mine")
    image = trained_run.images / "p000.png"
    assert command(image) == 2 and "--overwrite" in capsys.readouterr().err
    assert (out / "predictions.csv").read_text() == "mine"
    with (out / "lock").open("a") as file:
        files.lock(file, "")
        assert command(image, overwrite=True) == 2 and "another process" in capsys.readouterr().err
    assert command(image, overwrite=True) == 0 and list(table(out / "predictions.csv")) == ["p000.png"]


def test_patients_of_a_list_and_saliency_maps(trained_run, command, tmp_path):
    groups = {"p000.png": "anna", "p001.png": "anna", "p002.png": ""}
    rows = [f"{trained_run.images / name},{group}" for name, group in groups.items()]
    (tmp_path / "list.csv").write_text("\n".join(["path,group", *rows]))
    assert command(tmp_path / "list.csv", explain=True) == 0
    slices, series = table(tmp_path / "out/predictions.csv"), table(tmp_path / "out/series.csv")
    assert {name: row["series"] for name, row in slices.items()} == groups and list(series) == ["anna"]
    for name in CLASSES:
        p = np.float32([slices[image][f"p_{name}"] for image in ("p000.png", "p001.png")])
        assert series["anna"][f"p_{name}"] == str(float(f"{p.mean(dtype=np.float64):.9g}"))
    points = metadata.read(trained_run.workdir / "model.json").points["patient"]
    decision = lines(tmp_path / "out/series.jsonl")[0]["decisions"]["left"]
    assert decision == decision | {"rule": "youden", "threshold": points["left"]["youden"]["threshold"]}
    assert len(list((tmp_path / "out/explain").glob("*_gradcam.png"))) == 3


def test_saliency_without_a_large_feature_map(trained_run, command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(saliency, "MIN_CELLS", 16)  # the largest map has 15 cells
    image = trained_run.images / "p000.png"
    assert command(image, explain=True, method="gradcam") == 2
    assert "16 x 16 cells" in capsys.readouterr().err
    assert command(image, explain=True) == 0
    assert (tmp_path / "out/explain/p000_integrated_gradients.png").exists()
    assert commands.run(export, f"--model={trained_run.workdir}", f"--out={tmp_path}") == 0
    exported = model.load(tmp_path / "model.pyz")
    assert exported.methods == () and len(exported.predict([image])) == 1


def test_list_of_failed_inputs(trained_run, command, tmp_path, capsys):
    good = trained_run.images / "p000.png"
    (tmp_path / "cut.png").write_bytes((trained_run.images / "p001.png").read_bytes()[:200])
    (tmp_path / "deep.png").write_bytes(encoded(np.full((40, 40), 900, np.uint16)))
    assert command(good, *(tmp_path / name for name in ("cut.png", "deep.png", "gone.png"))) == 1
    rows = table(tmp_path / "out/predictions.csv")
    assert rows["p000.png"]["error"] == "" and rows["p000.png"]["predicted"] in CLASSES
    for name, word in {"cut.png": "truncated", "deep.png": "--window=low,high", "gone.png": "no such"}.items():
        assert word in rows[name]["error"] and not rows[name]["predicted"]
    assert "3 inputs failed" in capsys.readouterr().err
    assert command(tmp_path / "deep.png", out=tmp_path / "two", window="0,1000") == 0
    assert table(tmp_path / "two/predictions.csv")["deep.png"]["predicted"] in CLASSES


def test_unread_files_and_small_images(by_brightness, tmp_path, capsys):
    for i, name in enumerate(("P1/a.png", "P1/b.png", "P2/c.png", "P2/d.png")):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(encoded(np.full((3, 4) if i == 3 else (9, 9), 50 * i, np.uint8)))
    (tmp_path / "in/P2/photo.HEIC").write_bytes(b"a photo")
    (tmp_path / "in/notes.txt").write_text("words")
    assert by_brightness(tmp_path / "in", group_pattern="^([^/]+)/") == 1  # below the folder, as in prepare
    output = capsys.readouterr()
    assert "photo.HEIC: unsupported" in output.err and "1 files that are not images" in output.out
    rows, series = table(tmp_path / "out/predictions.csv"), table(tmp_path / "out/series.csv")
    assert "HEIC" not in series and {name: row["files"] for name, row in series.items()} == {"P1": "2", "P2": "2"}
    assert "unsupported" in rows["photo.HEIC"]["error"]
    assert "4 x 3 pixels" in rows["d.png"]["warnings"] and not rows["c.png"]["warnings"]
    assert "1 of 2 images" in series["P2"]["warnings"]


def test_limit_flags(by_brightness, tmp_path):
    large, small = tmp_path / "large.png", tmp_path / "small.png"
    large.write_bytes(encoded(np.eye(40, dtype=np.uint8)))
    small.write_bytes(encoded(np.eye(9, dtype=np.uint8)))
    volume = scans.nifti(tmp_path / "a.nii.gz", scans.body((9, 9, 9)))
    limits = {"max_megapixels": 0.001, "max_megavoxels": 0.0005}
    assert by_brightness(large, small, volume, **limits) == 1
    rows = table(tmp_path / "out/predictions.csv")
    assert "--max_megapixels" in rows["large.png"]["error"] and "--max_megavoxels" in rows["a.nii.gz"]["error"]
    assert rows["small.png"]["predicted"]
    assert by_brightness(large, small, volume, out=tmp_path / "all") == 0


def test_resume_after_interruptions(trained_run, command, by_brightness, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(predict, "CHUNK", 4)
    bright = model.load("model")

    def forward(pixels):
        outputs = bright.forward(pixels)
        return outputs | {"probabilities": outputs["probabilities"] - np.float32(1e-7 * pixels.mean())}  # of the batch

    def interrupt(name, count):
        function, calls = getattr(records, name), itertools.count(1)

        def call(*args):
            if next(calls) < count:
                return function(*args)
            monkeypatch.setattr(records, name, function)
            raise KeyboardInterrupt

        monkeypatch.setattr(records, name, call)

    monkeypatch.setitem(model.load.__self__, "model", replace(bright, forward=forward))
    run = partial(by_brightness, trained_run.images, tmp_path / "gone.png", group_pattern=r"p0*(\d+)")
    assert run(out=tmp_path / "whole") == 1
    interrupt("record", 7)
    assert run() == 130
    (lines_file,) = (tmp_path / "out").glob("predictions.jsonl.*.partial")
    with lines_file.open("a") as file:
        file.write('{"file": "a line that is cut o')
    assert not (tmp_path / "out/predictions.csv").exists()
    assert run(rule="another") == 1
    assert "Resumed" not in capsys.readouterr().out
    interrupt("summary", 3)
    assert run(overwrite=True) == 130
    assert "Resumed after 6 of 36 images" in capsys.readouterr().out
    assert run() == 1
    assert "Resumed after 36 of 36 images" in capsys.readouterr().out
    for name in predict.FILES:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert not list((tmp_path / "out").glob("*.partial"))


def test_records_keep_float32():
    for p in np.random.default_rng(0).dirichlet([1, 1], 20).astype(np.float32):
        record = json.loads(json.dumps(records.record(METADATA, "a.png", p)))
        assert [np.float32(str(records.cell(record, f"p_{name}"))) for name in METADATA.classes] == p.tolist()


def test_usage_errors(trained_run, tmp_path, capsys):
    image, run, out = trained_run.images / "p000.png", f"--model={trained_run.workdir}", f"--out={tmp_path / 'out'}"
    cases = (
        (["--model="], 1, "--model=RUN is missing"), ([f"--model={tmp_path / 'none'}"], 2, "no such file or folder"),
        ([f"--model={tmp_path}"], 2, "no trained run"), ([f"--model={image}"], 2, "not a model"),
        ([run, "--rule=yuden"], 2, "did you mean youden"), ([run, "--hu_window=40"], 2, "--hu_window=40"),
        ([run, "--explain", "--method=gradcam+"], 2, "did you mean gradcam"),
        ([run, f"--gate={trained_run.workdir}", "--gate_class=lefty"], 2, "did you mean left"),
        ([run, "--group_pattern=("], 2, "regular expression"), ([run, "--group_pattern=p"], 2, "parentheses"),
    )  # fmt: skip
    commands.assert_errors(capsys, predict, [([image, out, *flags], *end) for flags, *end in cases], ("PATH...",))
    assert not (tmp_path / "out").exists()


def test_volumes_in_the_planes_of_training(tmp_path):
    hu = scans.body((6, 10, 8))
    scans.series(tmp_path / "scan", hu)
    scans.nifti(tmp_path / "volume.nii.gz", hu)
    level = np.clip((hu.astype(float) + 1000) * 255 / 1000, 0, 255).round()  # window -500/1000
    axial = inputs.gather([str(tmp_path)], METADATA)
    assert not axial.failures and len(axial.items) == 12
    assert set(axial.series) == {str(tmp_path / "scan"), str(tmp_path / "volume.nii.gz")}
    by_series = {}
    for item in axial.items:
        by_series.setdefault(item.series, []).append(item.read())
    for slices in by_series.values():  # from foot to head, however the files are numbered
        np.testing.assert_array_equal(np.stack(slices), level)
    for fields, expected in (
        ({"plane": "coronal", "position": "mid"}, level[::-1, 5]),
        ({"plane": "sagittal", "position": "mid"}, level[::-1, :, 4]),
        ({"position": "mid"}, level[3]),
    ):
        sources = inputs.gather([str(tmp_path / "scan"), str(tmp_path / "volume.nii.gz")], replace(METADATA, **fields))
        assert len(sources.items) == 2 and not sources.failures
        for item in sources.items:
            np.testing.assert_array_equal(item.read(), expected)


def test_enhanced_ct(by_brightness, tmp_path):
    hu = scans.body((6, 10, 8))
    path = scans.enhanced(tmp_path / "scan/e.dcm", hu)
    scans.series(tmp_path / "plain", hu, SeriesInstanceUID="1.2.3.9")
    assert by_brightness(tmp_path / "scan", tmp_path / "plain") == 0
    rows, series = table(tmp_path / "out/predictions.csv"), table(tmp_path / "out/series.csv")
    assert {name for name in rows if "#" in name} == {f"e.dcm#frame-{i:04d}" for i in range(1, 7)} and len(rows) == 12
    assert series["e.dcm"]["files"] == "6" and series["e.dcm"]["p_bright"] == series["plain"]["p_bright"]
    sources = inputs.gather([path], replace(METADATA, plane="coronal"))
    assert len(sources.items) == 10 and not sources.failures and list(sources.series) == [path]


def test_series_names_without_identity(by_brightness, tmp_path):
    hu = scans.body((4, 10, 8))
    scans.series(tmp_path / "all", hu, SeriesInstanceUID="1.2.3.5")
    for path in scans.series(tmp_path / "two", hu, SeriesInstanceUID="1.2.3.6"):
        name = path.rpartition("/")[2]
        (tmp_path / "two" / name).rename(tmp_path / "all" / f"other_{name}")
    assert by_brightness(tmp_path / "all") == 0
    assert sorted(table(tmp_path / "out/series.csv")) == ["all", "all (series 2)"]
    written = "".join(path.read_text() for path in (tmp_path / "out").iterdir())
    for identity in ("Doe", "Jane", "4711", "1970", "1.2.3"):
        assert identity not in written


def test_gate(by_brightness, tmp_path, capsys):
    whole = np.full((6, 8, 8), -100, np.int16)
    for name, hu in (("bright", whole), ("dark", whole - 850)):
        volume = np.concatenate([hu, np.full((1, 8, 8), 40), np.full((1, 8, 8), -1000)])
        scans.nifti(tmp_path / f"{name}.nii", volume)
    (tmp_path / "plain.png").write_bytes(encoded(np.full((8, 8), 200, np.uint8)))
    given = [tmp_path / name for name in ("bright.nii", "dark.nii", "plain.png")]
    assert by_brightness(*given, gate="gate", gate_class="bright") == 1
    output = capsys.readouterr()
    assert "1 inputs failed" in output.err and "dark.nii" in output.err and "1 of 17 images" in output.out
    series = table(tmp_path / "out/series.csv")
    assert series["bright.nii"]["gate"] == "passed" and series["dark.nii"]["gate"] == "rejected"
    assert series["dark.nii"]["predicted"] == "" and "gate" in series["dark.nii"]["error"]
    sources = {row["series"].rpartition("/")[2] for row in table(tmp_path / "out/predictions.csv").values()}
    assert sources == {"bright.nii", ""}


def test_modality_of_scans(by_brightness, monkeypatch, tmp_path):
    volume = np.repeat(np.int16([-100, -100, -100, -100, -1000, 40]), 64).reshape(6, 8, 8)
    scans.series(tmp_path / "ct", volume)
    scans.nifti(tmp_path / "v.nii", volume)
    (tmp_path / "plain.png").write_bytes(encoded(np.full((8, 8), 200, np.uint8)))
    scans.save(scans.dataset(np.arange(64, dtype=np.uint16).reshape(8, 8), "DX"), tmp_path / "x.dcm")
    names = [tmp_path / name for name in ("ct", "v.nii", "plain.png", "x.dcm")]
    for modality, expected in (("ct", {"x.dcm"}), ("xray", {"IM", "v.nii"}), ("", set())):
        models = {"model": brightness(modality=modality), "gate": brightness(plane="coronal", modality=modality)}
        monkeypatch.setattr(model, "load", Models(models).load)
        assert by_brightness(*names, gate="gate", gate_class="bright", overwrite=True) == 0
        rows, series = table(tmp_path / "out/predictions.csv"), table(tmp_path / "out/series.csv")
        warnings = {name.partition("#")[0]: row["warnings"] for name, row in rows.items() if row["warnings"]}
        assert {name[:2] if name.startswith("IM") else name for name in warnings} == expected
        words = {"ct": "modality DX; the model was trained on CT", "xray": "CT; the model was trained on X-rays"}
        assert all(words[modality] in text for text in warnings.values())
        assert all(("gate: modality CT" in row["warnings"]) == (modality == "xray") for row in series.values())


def test_orientation_of_the_training_images(tmp_path, monkeypatch, by_brightness):
    array, box = np.random.default_rng(0).integers(0, 256, (40, 60), dtype=np.uint8), (3.0, 5.0, 43.0, 35.0)
    for spec in (InputSpec(size=(8, 12)), InputSpec(size=(8, 12), crop="box")):
        up = replace(METADATA, input=spec, box="given")
        expected = preprocess.picture(array, up, box)[0][::-1, ::-1]
        down = preprocess.picture(array, replace(up, orientation="rotated"), box)[0]
        np.testing.assert_allclose(down, expected, atol=1)  # rounding
    gate, seen = brightness(plane="coronal", position="mid", orientation="rotated"), []
    gate = replace(gate, forward=lambda pixels, forward=gate.forward: seen.append(pixels[0]) or forward(pixels))
    monkeypatch.setattr(model, "load", Models({"gate": gate, "model": brightness()}).load)
    scans.nifti(tmp_path / "v.nii", scans.body((6, 6, 8)))
    by_brightness(tmp_path / "v.nii", gate="gate", gate_class="bright")
    # The body is brighter at the head than at the foot, and brighter on the left than on the right.
    assert seen[0][-1].mean() > seen[0][0].mean() + 50 and seen[0][:, 0].mean() > seen[0][:, -1].mean()


def test_patients_of_volumes_in_lists(tmp_path):
    hu = scans.body((4, 10, 8))
    paths = scans.series(tmp_path / "scan", hu)
    scans.nifti(tmp_path / "v.nii", hu)
    for name in ("one", "two"):
        (tmp_path / f"{name}.png").write_bytes(encoded(np.full((9, 9), 50, np.uint8)))
    rows = [f"{path},anna" for path in paths] + [f"{tmp_path / 'v.nii'},bert", f"{tmp_path / 'one.png'},1"]
    (tmp_path / "a.csv").write_text("\n".join(["path,group", *rows]))
    sources = inputs.gather([str(tmp_path / "a.csv")], METADATA)
    assert {item.series for item in sources.items} == {"anna", "bert", "1"} and len(sources.items) == 9
    (tmp_path / "b.csv").write_text("path,group\none.png,2\ntwo.png,1\n")
    both = inputs.gather([str(tmp_path / "a.csv"), str(tmp_path / "b.csv")], METADATA)
    assert len([series for series in both.series if series.endswith(": 1")]) == 2  # two patients with that name
    assert len(both.failures) == 1 and "with the patient '" in both.failures[0][1]  # one.png


def test_count_of_unreadable_slices(by_brightness, tmp_path):
    hu = scans.body((5, 10, 8))
    for name, broken in (("some", 2), ("all", 5)):
        for path in scans.series(tmp_path / name, hu, SeriesInstanceUID=f"1.2.{broken}")[:broken]:
            with open(path, "r+b") as file:
                file.truncate(os.path.getsize(path) - 30)
    assert by_brightness(tmp_path / "some", tmp_path / "all") == 1
    assert sum(bool(row["error"]) for row in table(tmp_path / "out/predictions.csv").values()) >= 5
    series = table(tmp_path / "out/series.csv")
    assert "2 images" in series["some"]["warnings"] and series["some"]["files"] == "3"
    assert "none of its images" in series["all"]["error"]


def test_damaged_dicom_headers(by_brightness, tmp_path):
    """Elements are converted on access, so a wrong value representation fails late, with any exception."""
    paths = [Path(path) for path in scans.series(tmp_path / "in", scans.body((4, 10, 8)), SeriesInstanceUID="1.2.3")]
    for path, old, new in (
        (paths[0], b"\x08\x00\x60\x00CS", b"\x08\x00\x60\x00CQ"),
        (paths[1], b"\x28\x00\x10\x00US", b"\x28\x00\x10\x00FD"),
    ):
        assert path.read_bytes().count(old) == 1
        path.write_bytes(path.read_bytes().replace(old, new))
    assert by_brightness(tmp_path / "in") == 1
    rows = table(tmp_path / "out/predictions.csv")
    assert {name for name, row in rows.items() if "damaged" in row["error"]} == {path.name for path in paths[:2]}
    assert sum(bool(row["predicted"]) for row in rows.values()) == 2


def test_odd_paths(trained_run, by_brightness, tmp_path):
    odd = tmp_path / "in" / os.fsdecode(b"caf\xe9.png")
    odd.parent.mkdir()
    odd.write_bytes((trained_run.images / "p000.png").read_bytes())
    (tmp_path / "in/dangling.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "in/again").symlink_to(tmp_path / "in")
    (tmp_path / "list.csv").write_text('path\n"' + "x" * 200_000)
    assert by_brightness(tmp_path / "in", odd, "~nobodyatall/x.png", "x" * 300, tmp_path / "list.csv") == 1
    rows = table(tmp_path / "out/predictions.csv")
    assert rows[odd.name]["predicted"] in ("dark", "bright") and not rows[odd.name]["error"]
    assert {name[:12] for name, row in rows.items() if row["error"]} == {
        "dangling.png", "again", "x.png", "x" * 12, "list.csv"
    }  # fmt: skip
    assert lines(tmp_path / "out/predictions.jsonl")  # each line is JSON


def test_special_files(trained_run, by_brightness, tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "list.csv").write_text(f"path\n/dev/zero\n{trained_run.images / 'p000.png'}\n")
    os.mkfifo(tmp_path / "pipe.csv")
    assert by_brightness(tmp_path / "pipe.png", tmp_path / "list.csv", tmp_path / "pipe.csv") == 1
    errors = {name: row["error"] for name, row in table(tmp_path / "out/predictions.csv").items()}
    assert errors.pop("p000.png") == "" and set(errors) == {"pipe.png", "zero", "pipe.csv"}
    assert all("device" in error for error in errors.values())


def test_hostile_file_names(trained_run, command, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ("=1+1.png", "a\x1b[2J\rb.png", f"{'n' * 246}.png")
    for name in names:
        (tmp_path / name).write_bytes((trained_run.images / "p000.png").read_bytes())
    (tmp_path / "bad\x1b.png").touch()
    (tmp_path / "out/explain/_1_1_gradcam.png").mkdir(parents=True)  # can't be replaced by a file
    assert command(*names, "bad\x1b.png", explain=True) == 1
    output = capsys.readouterr()
    assert "\x1b" not in output.out + output.err and r"a\x1b[2J\rb.png" in output.out and r"bad\x1b" in output.err
    rows = table(tmp_path / "out/predictions.csv")
    assert set(rows) == {"'=1+1.png", r"a\x1b[2J\rb.png", names[2], r"bad\x1b.png"}
    assert {record["file"] for record in lines(tmp_path / "out/predictions.jsonl")} == {*names, "bad\x1b.png"}
    assert {name for name, row in rows.items() if "no saliency map" in row["warnings"]} == {"'=1+1.png"}
    maps = {path.name for path in (tmp_path / "out/explain").iterdir()}
    assert maps == {"_1_1_gradcam.png", "a__2J_b_gradcam.png", f"{'n' * 200}_gradcam.png"}


def test_sixteen_bits_as_in_the_prepared_copy(tmp_path):
    for i, (split, label) in enumerate(itertools.product(("train", "val", "test"), "ab")):
        path = tmp_path / "in" / split / label / f"{i}.png"
        path.parent.mkdir(parents=True)
        path.write_bytes(encoded(np.random.default_rng(i).integers(0, 4000, (40, 40), dtype=np.uint16)))
    window, spec = (500.0, 1500.0), InputSpec(size=(16, 16))
    options = datasets.PrepareOptions()
    datasets.write("folder/deep-16", tmp_path / "in", tmp_path / "data", options, quiet=True, window=window)
    data = datasets.open_dataset("folder/deep-16", tmp_path / "data")
    description = Metadata("deep", ("a", "b"), spec, data.name, stored=(16, 16), window=window)
    reader = pipeline.Reader(data, spec)
    for number, name in enumerate(data.columns["file"].tolist()):
        pixels, *_ = preprocess.picture(images.read((tmp_path / "in" / name).read_bytes())[0], description)
        np.testing.assert_array_equal(pixels, reader(number))
    with pytest.raises(ValueError, match="--window=low,high"):
        preprocess.picture(np.zeros((20, 20), np.uint16), replace(description, window=None))
