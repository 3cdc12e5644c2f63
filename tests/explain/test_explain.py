"""The command that explains: pictures of files and splits, what can't be read, and the page of quality."""

import csv
import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from conftest import png, small_bn
from PIL import Image
from random_weights import random_variables

from lungjax.config import Config, DataConfig, EvalConfig, InputSpec, overrides
from lungjax.config.metadata import Metadata
from lungjax.data import preprocess
from lungjax.explain import __main__ as command
from lungjax.explain import panels, sheets
from lungjax.explain.saliency import Explainer
from lungjax.inference import inputs
from lungjax.inference.model import Network
from lungjax.models.ops import conv

CLASSES = ("left", "middle", "right")
SPEC = InputSpec(size=(24, 32), channels=1)
PICTURE = np.random.default_rng(0).integers(0, 256, (60, 80), dtype=np.uint8)


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Each program runs a few times: compiled quickly, not well."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conv, "compiler_options", lambda *_, **__: {"xla_backend_optimization_level": 0})
        yield


@pytest.fixture(scope="module")
def run():
    module = small_bn()(outputs=3, padding="same")
    config = Config(input=SPEC, data=DataConfig(dataset="folder/small"), eval=EvalConfig(batch_size=8))
    return Network(config, CLASSES, module, random_variables(module, (24, 32, 1)), 7)


@pytest.fixture(scope="module")
def explainer(run):
    return Explainer(run.module, run.variables, SPEC, None, run.config.eval.batch_size)


def explain(run, explainer, out, *given, target=None, save_maps=False, **windows):
    """Explains files as the command does; returns what could not be read."""
    told = Metadata(run.config.name, run.classes, run.config.input, run.config.data.dataset, **windows)
    found = inputs.gather(given, told)
    bad = [f"{name}: {why}" for name, why in found.failures]
    pictures = command.read(found.items, told, bad)
    sheets.explain_images(explainer, pictures, run.classes, ["gradcam"], target, out, save_maps)
    return bad


def test_files_and_folders_are_drawn_and_the_bad_ones_named(run, explainer, tmp_path):
    for name, data in {
        "in/a.png": png(PICTURE),
        "in/deep/a.png": png(PICTURE[:, ::-1]),
        "in/cut.png": png(PICTURE)[:200],
        "in/notes.txt": b"nothing to see",
        "b.jpg": b"",
        "deep.png": png((PICTURE * np.uint16(200)).astype(np.uint16)),
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    Image.fromarray(PICTURE).save(tmp_path / "b.jpg")
    Image.fromarray(PICTURE).save(tmp_path / "in/a.tiff")
    out = tmp_path / "out"
    out.mkdir()
    given = [str(tmp_path / name) for name in ("in", "b.jpg", "gone.png", "deep.png", "in/notes.txt")]
    bad = explain(run, explainer, out, *given, save_maps=True)
    drawn = sorted(path.name for path in out.glob("*.png"))
    assert drawn == ["a_2_gradcam.png", "a_gradcam.png", "b_gradcam.png", "deep_a_gradcam.png"]
    assert len(bad) == 4
    for name, why in {
        "cut.png": "truncated",
        "gone.png": "no such",
        "deep.png": "16-bit",
        "notes.txt": "not one of",
    }.items():
        assert any(str(tmp_path) in line and name in line and why in line for line in bad), (name, bad)
    # The map is that of the network's input, as prediction reads it.
    metadata = Metadata("small", CLASSES, SPEC, "folder/small")
    wanted, _ = explainer.maps(preprocess.picture(PICTURE, metadata)[0][None])
    np.testing.assert_allclose(np.load(out / "a_gradcam.npy"), wanted[0], atol=1e-5)
    with Image.open(out / "a_gradcam.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    assert (pixels.max(-1) - pixels.min(-1) > 60).any()  # colours of a heat map
    windowed = explain(run, explainer, out, given[3], target=0, window=(0.0, 51000.0))
    assert not windowed and (out / "deep_gradcam.png").exists()


def test_no_picture_takes_the_place_of_another():
    used = set()
    names = [panels.file_name(name, used) for name in ("a.png", "a.jpg", "a_2.png", "sub/a.png", "../weird name?.png")]
    assert names == ["a", "a_2", "a_2_2", "sub_a", "weird_name_"]


def test_an_unknown_class_gets_the_nearest(run):
    assert command.class_number(CLASSES, "middle") == 1 and command.class_number(CLASSES, None) is None
    with pytest.raises(ValueError, match="--class=midle: the nearest: middle"):
        command.class_number(CLASSES, "midle")


def test_a_split_is_drawn_in_order_of_confidence_and_the_rest_where_one_is_broken(
    run, explainer, small_data, tmp_path, monkeypatch
):
    monkeypatch.setattr(sheets, "TILES", (2, 3))
    broken = [dict(record) for record in small_data.records]
    row = int(small_data.rows("test")[4])
    broken[row]["image"] = broken[row]["image"][:100]
    data = replace(small_data, records=broken)
    bad = sheets.explain_split(explainer, data, "test", "gradcam", None, tmp_path / "sheets")
    assert len(bad) == 1 and data.columns["file"][row] in bad[0]
    with (tmp_path / "sheets/index.csv").open() as file:
        rows = list(csv.DictReader(file))
    reader = sheets.pipeline.Reader(data, SPEC)
    kept = [r for r in data.rows("test") if r != row]
    p = explainer.probabilities(np.stack([reader(r) for r in kept]))
    said = {str(data.columns["file"][r]): (CLASSES[one.argmax()], one.max()) for r, one in zip(kept, p, strict=True)}
    assert [line["file"] for line in rows] == sorted(said, key=lambda name: -said[name][1])
    for line in rows:
        assert line["predicted"] == said[line["file"]][0]
        assert (line["wrong"] == "yes") == (line["predicted"] != line["label"])
        np.testing.assert_allclose(float(line[f"p_{line['predicted']}"]), said[line["file"]][1], rtol=1e-4)
    assert [line["page"] for line in rows[5:7]] == ["page_001.png", "page_002.png"]
    assert sorted(path.name for path in (tmp_path / "sheets").glob("*.png")) == ["page_001.png", "page_002.png"]
    few = tmp_path / "few"
    sheets.explain_split(explainer, small_data, "test", "gradcam", 2, few, count=3)
    with (few / "index.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 3


def test_quality_of_drawn_and_of_other_data(run, explainer, small_data, tmp_path, monkeypatch):
    monkeypatch.setattr(sheets.quality, "DELETIONS", 3)
    said = []
    sheets.measure_quality(explainer, run.config, CLASSES, 7, small_data, ["gradcam"], None, tmp_path, 5, said.append)
    found = json.loads((tmp_path / "quality.json").read_text())
    assert "5 images of the test split of folder/small" in found["images"] and found["step"] == 7
    assert found["methods"].keys() == {"gradcam"} and found["methods"]["gradcam"].keys() == {"deletion", "sanity"}
    assert "lesion?" not in (tmp_path / "quality.md").read_text() and "sanity" in " ".join(said)
    drawn, classes = overrides.override(run.config, "data.dataset=phantom_ct/tiny"), ("COVID-19", "Normal", "Pneumonia")
    sheets.measure_quality(explainer, drawn, classes, 7, None, ["gradcam"], None, tmp_path, 4, said.append)
    game = json.loads((tmp_path / "quality.json").read_text())["methods"]["gradcam"]["pointing"]
    assert game["n"] == 4 and 0 < game["chance"] < game["chance_in_lungs"] < 1
    assert game["chance"] < game["chance_tolerant"] and "| gradcam |" in (tmp_path / "quality.md").read_text()


COMMAND = """
import sys
sys.path[:0] = [{tests!r}, {tests!r} + "/explain"]
import test_explain
from lungjax.inference import model
from lungjax import cli
from lungjax.data import preprocess
from lungjax.explain import __main__ as command
model.load_network = lambda workdir: test_explain.run.__wrapped__()
cli.run(command.main, command.define_flags)
"""


def test_the_command_says_what_it_left_out(tmp_path):
    (tmp_path / "good.png").write_bytes(png(PICTURE))
    (tmp_path / "bad.png").write_bytes(b"no picture")
    code = COMMAND.format(tests=str(sheets.Path(__file__).parents[1]))
    given = (f"--workdir={tmp_path}", f"--out={tmp_path / 'out'}", f"--images={tmp_path}/good.png,{tmp_path}/bad.png")
    done = subprocess.run([sys.executable, "-c", code, *given], capture_output=True, text=True)
    assert done.returncode == 1 and "left out" in done.stderr and "bad.png" in done.stderr, done.stderr
    assert "good.png" not in done.stderr and (tmp_path / "out/good_gradcam.png").exists()
    given = (*given[:2], f"--images={tmp_path}/bad.png")
    done = subprocess.run([sys.executable, "-c", code, *given], capture_output=True, text=True)
    assert done.returncode == 2 and "no image could be read" in done.stderr and "bad.png" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
