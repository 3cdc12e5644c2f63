"""The explain command: figures for files and splits, unreadable images, and tests of the quality of saliency maps."""

import csv
import json
from dataclasses import replace

import commands
import numpy as np
import pytest
from conftest import small_bn
from folders import encoded
from PIL import Image
from random_weights import random_variables
from scipy import stats

from lungjax import datasets
from lungjax.config import Config, DataConfig, InputSpec
from lungjax.data import pipeline, preprocess
from lungjax.datasets.phantom import slices
from lungjax.explain import __main__ as command
from lungjax.explain import figures, quality
from lungjax.explain.saliency import Explainer
from lungjax.inference import model
from lungjax.inference.model import Network

CLASSES = ("left", "middle", "right")
SPEC = InputSpec(size=(24, 32), channels=1)
PICTURE = np.random.default_rng(0).integers(0, 256, (60, 80), dtype=np.uint8)


@pytest.fixture(scope="module")
def explainer():
    module = small_bn()(outputs=3, padding="same")
    return Explainer(module, random_variables(module, (24, 32, 1)), SPEC, None, 8)


def test_command_with_good_and_bad_files(trained_run, tmp_path, monkeypatch, capsys):
    heats, draw = {}, figures.draw
    monkeypatch.setattr(figures, "draw", lambda *given: heats.update({given[0].name: given[3]}) or draw(*given))
    (tmp_path / "in/deep").mkdir(parents=True)
    for name in ("in/a.png", "in/a.tiff", "in/deep/a.png", "odd name?.jpg"):
        Image.fromarray(PICTURE).save(tmp_path / name)
    (tmp_path / "in/cut.png").write_bytes(encoded(PICTURE)[:200])
    (tmp_path / "deep.png").write_bytes(encoded((PICTURE * np.uint16(200)).astype(np.uint16)))
    flags = [f"--model={trained_run.workdir}", f"--out={tmp_path / 'out'}"]
    (tmp_path / "out/deep_a_gradcam.png").mkdir(parents=True)  # can't be replaced by a file
    files = ",".join(str(tmp_path / name) for name in ("in", "odd name?.jpg", "gone.png", "deep.png"))
    assert commands.run(command, *flags, f"--images={files}") == 1
    errors = capsys.readouterr().err
    assert (
        all(name in errors for name in ("cut.png", "gone.png", "deep.png", "deep_a_gradcam"))
        and "odd name?.jpg" not in errors
    )
    names = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    assert names == ["a_2_gradcam.png", "a_gradcam.png", "deep_a_gradcam.png", "odd_name__gradcam.png"]
    # The map of the network's input, preprocessed as for prediction.
    network, description = model.load_finished(trained_run.workdir)
    own = Explainer(network.module, network.variables, network.config.input)
    expected, _ = own.maps(preprocess.picture(PICTURE, description)[0][None])
    np.testing.assert_allclose(heats["a"], expected[0], atol=1e-5)
    with Image.open(tmp_path / "out/a_gradcam.png") as figure:
        assert (np.ptp(np.asarray(figure.convert("RGB")).astype(int), axis=-1) > 60).any()  # colors of the map
    assert commands.run(command, *flags, f"--images={tmp_path / 'deep.png'}", "--window=0,51000", "--class=middle") == 0
    assert (tmp_path / "out/deep_gradcam.png").exists()


def test_usage_errors(trained_run, tmp_path, capsys):
    run = f"--model={trained_run.workdir}"
    (tmp_path / "bad.png").write_bytes(b"not an image")
    cases = (
        ((), 1, "--model"),
        ((run,), 1, "--images"),
        ((run, "--split=test", "--method=gradcm"), 2, "did you mean gradcam"),
        ((run, "--split=test", "--class=midle"), 2, "did you mean middle"),
    )
    commands.assert_errors(capsys, command, cases)
    assert commands.run(command, run, f"--out={tmp_path}", f"--images={tmp_path / 'bad.png'}") == 2
    assert "bad.png" in capsys.readouterr().err


def test_split_by_confidence_without_a_broken_image(explainer, small_data, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "TILES", (2, 3))
    records, bad_row = list(small_data.records), int(small_data.rows("test")[4])
    records[bad_row] = records[bad_row] | {"image": records[bad_row]["image"][:100]}
    data = replace(small_data, records=records)
    (problem,) = figures.draw_split(explainer, pipeline.Reader(data, SPEC), "test", "gradcam", None, tmp_path)
    assert data.columns["file"][bad_row] in problem
    with (tmp_path / "index.csv").open() as file:
        lines = list(csv.DictReader(file))
    rows, reader = [row for row in data.rows("test") if row != bad_row], pipeline.Reader(data, SPEC)
    p = explainer.probabilities(np.stack([reader(row) for row in rows]))
    top = {str(data.columns["file"][row]): (CLASSES[q.argmax()], q.max()) for row, q in zip(rows, p, strict=True)}
    assert [line["file"] for line in lines] == sorted(top, key=lambda name: -top[name][1])
    for line in lines:
        assert line["predicted"] == top[line["file"]][0]
        assert (line["wrong"] == "yes") == (line["predicted"] != line["label"])
        assert float(line[f"p_{line['predicted']}"]) == pytest.approx(top[line["file"]][1], rel=1e-4)
    assert [line["page"] for line in lines[5:7]] == ["page_001.png", "page_002.png"]
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["page_001.png", "page_002.png"]
    figures.draw_split(explainer, pipeline.Reader(small_data, SPEC), "test", "gradcam", 2, tmp_path / "few", count=3)
    assert len((tmp_path / "few/index.csv").read_text().splitlines()) == 4


def test_quality_with_and_without_lesion_masks(explainer, small_data, tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "DELETIONS", 3)

    def measure(dataset, classes, reader, count):
        config = Config(name="small", input=SPEC, data=DataConfig(dataset=dataset))
        run = Network(config, classes, explainer.module, explainer.variables, 7)
        assert quality.write(explainer, run, reader, ["gradcam"], None, tmp_path, count) == []
        return json.loads((tmp_path / "quality.json").read_text()), (tmp_path / "quality.md").read_text()

    content, page = measure("folder/small", CLASSES, pipeline.Reader(small_data, SPEC), 5)
    assert "5 images of the test split of folder/small" in content["images"] and content["step"] == 7
    assert content["methods"]["gradcam"].keys() == {"deletion", "sanity"} and "lesion?" not in page
    content, page = measure("phantom_ct/tiny", ("COVID-19", "Normal", "Pneumonia"), None, 4)
    game = content["methods"]["gradcam"]["pointing"]
    assert game["n"] == 4 and 0 < game["chance"] < game["chance_in_lungs"] < 1
    assert "lesion?" in page and "| gradcam |" in page


def test_pointing_game_by_hand():
    masks = np.zeros((4, 10, 10), bool)
    masks[:, 2:4, 2:4] = True
    maps = np.zeros((4, 10, 10))
    maps[0, 3, 3] = 1  # on the lesion
    maps[1, 3, 6] = 1  # three pixels away
    maps[2, 2, 2] = maps[2, 9, 9] = 1  # a tie; the last map is empty
    np.testing.assert_array_equal(quality.hits(maps, masks), [1, 0, 0.5, 0])
    left = np.broadcast_to(np.arange(20) < 8, (400, 20, 20))
    random = quality.hits(quality.random_maps(400, (20, 20), (20, 20), 0), left)
    assert abs(random.mean() - 0.4) < 0.08


class FirstCell:
    """A fake `Explainer`: the probability of class 0 is the mean of the first 4 x 4 pixels."""

    def probabilities(self, images):
        p = images[:, :4, :4].mean((1, 2, 3)) / 255
        return np.stack([p, 1 - p], axis=1)


def test_deletion_curve_by_hand(monkeypatch):
    monkeypatch.setattr(quality, "DELETIONS", 16)  # a sixteenth at a time
    images = np.zeros((1, 16, 16, 3), np.uint8)
    images[:, :4, :4] = 255
    right = np.zeros((1, 16, 16))
    right[:, :4, :4] = 1
    fill = round(255 / 16) / 255
    curve = quality.deletion(FirstCell(), images, right, np.zeros(1, int))
    np.testing.assert_allclose(curve[0, :3], [1, fill, fill])
    wrong = quality.deletion(FirstCell(), images, 1 - right, np.zeros(1, int))
    np.testing.assert_allclose(wrong[0, [0, 15, 16]], [1, 1, fill])
    assert curve.mean() < wrong.mean()


def test_rank_correlation_against_scipy():
    a, b = np.random.default_rng(1).integers(0, 5, (2, 3, 6, 6)).astype(float)
    expected = [stats.spearmanr(x.ravel(), y.ravel()).statistic for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(quality.rank_correlation(a, b), expected)
    assert quality.rank_correlation(a, 0 * b).tolist() == [0, 0, 0]


class Brightness(Explainer):
    """A fake `Explainer` whose maps are the brightness of the image, for any weights."""

    def maps(self, images, targets=None, method="gradcam"):
        return images.mean(-1).astype(np.float32) / 255, None

    def with_variables(self, variables):
        return self


def test_sanity_check_of_gradcam_and_of_brightness(explainer):
    images = np.random.default_rng(2).integers(0, 256, (8, *SPEC.size, 1), dtype=np.uint8)
    good = quality.sanity(explainer, images, "gradcam")
    bad = quality.sanity(Brightness(explainer.module, explainer.variables, SPEC), images, "gradcam")
    assert good["passed"] and not bad["passed"]
    assert [stage["correlation"] for stage in bad["stages"]] == [1.0] * len(bad["stages"])
    assert [stage["shuffled"] for stage in good["stages"]] == ["the head", "all weights"]


def test_masks_of_synthetic_slices_against_images():
    classes, name = slices.CLASSES[::-1], datasets.resolve("phantom_ct")[0]
    plain, boxed = InputSpec(size=(96, 96), channels=1), InputSpec(size=(64, 48), channels=1, crop="box")
    full, cropped = (quality.draw_slices(classes, spec, name, 2) for spec in (plain, boxed))
    assert [classes[i] for i in full.labels] == [c for c in slices.CLASSES if c != "Normal"]
    assert full.images.shape == (2, 96, 96, 1) and cropped.lesions.shape == (2, 64, 48)

    def center(mask):
        return np.asarray([axis.mean() + 0.5 for axis in np.nonzero(mask)])

    for i in range(2):
        patient = slices.new_patient(quality.FIRST_SEED + i, classes[full.labels[i]])
        level = np.random.default_rng([patient.seed, 30]).permutation(quality.LEVELS)[0]
        phantom = slices.draw_slice(patient, slices.levels(patient, quality.LEVELS)[level])
        left, top, right, bottom = phantom.box
        box = (cropped, (top, left), (bottom - top, right - left))
        for drawn, start, extent in ((full, (0, 0), phantom.lesion.shape), box):
            place = center(drawn.lesions[i]) / drawn.lesions[i].shape
            np.testing.assert_allclose(place, (center(phantom.lesion) - start) / np.asarray(extent), atol=0.01)
        assert (cropped.lesions[i] & ~cropped.lungs[i]).mean() < 0.005
