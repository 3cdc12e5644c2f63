"""Ensembles and test-time augmentation: means computed by hand, and equal numbers in every command and format."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import commands
import folders
import jax
import numpy as np
import pytest
from brightness import brightness
from conftest import without_pictures
from PIL import Image
from scipy import special
from services import running

import lungjax
from lungjax import main, predict
from lungjax.config import InputSpec, metadata, overrides
from lungjax.evaluation import novelty, operating_points, predictions
from lungjax.explain import __main__ as explain
from lungjax.explain import figures
from lungjax.export import __main__ as export
from lungjax.export import functions
from lungjax.inference import artifacts, ensembles
from lungjax.inference.artifacts import Preprocessor, picture
from lungjax.runtime import environment
from lungjax.training import external_test, train

PLACES = [Path("a"), Path("b"), Path("c")]  # of models without predictions
CLASSES = ("left", "middle", "right")
PICTURES = [folders.picture(i % 3, 50 + i) for i in range(5)]


@pytest.fixture(scope="module")
def pair(trained_run, tmp_path_factory):
    """Two runs with the same val and test images; the second one has another size and test-time augmentation."""
    root = tmp_path_factory.mktemp("pair")
    config = folders.CONFIG
    for assignment in ("data.dataset=folder/mine", "input.size=40,36", "train.seed=1", "eval.tta=flip"):
        config = overrides.override(config, assignment)
    shutil.copytree(trained_run.workdir, root / "a")
    with pytest.MonkeyPatch.context() as patch:
        without_pictures(patch)
        train.run(config, root / "b", trained_run.data_dir)
    return root / "a", root / "b"


@pytest.fixture(scope="module")
def members(pair):
    return [lungjax.load(run) for run in pair]


@pytest.fixture(autouse=True)
def configured(monkeypatch):
    monkeypatch.setattr(environment, "prepare_jax", lambda: None)


def mirrored_logits(model, pictures):
    """Mean logits of plain forward passes over images and their mirrors."""
    pixels, network = np.stack([model.prepare(each).pixels for each in pictures]), model.network
    forward = jax.jit(lambda v, x: network.module.apply(v, x, train=False)[0])
    views = [(x.astype(np.float32) / 255 - 0.3) / 0.2 for x in (pixels, np.flip(pixels, axis=2))]
    return np.mean([forward(network.variables, x) for x in views], axis=0)


def test_tta_is_the_mean_over_the_mirror_image(pair, members, trained_run, tmp_path):
    run, model = pair[1], members[1]
    expected = mirrored_logits(model, PICTURES)
    np.testing.assert_allclose(model.logits(PICTURES), expected, atol=1e-5)
    p = special.softmax(expected / model.metadata.temperature, axis=1)
    np.testing.assert_allclose(model.predict(PICTURES), p, atol=2e-6)
    saved = predictions.read(run / "predictions_test.csv")
    images = [np.asarray(Image.open(trained_run.images / name)) for name in saved.ids]
    np.testing.assert_allclose(saved.logits, mirrored_logits(model, images), atol=1e-5)
    pixels, targets = np.stack([model.prepare(each).pixels for each in PICTURES]), np.arange(5) % 3
    shutil.copytree(run, tmp_path / "plain")
    (tmp_path / "plain/model.json").write_text(replace(model.metadata, tta="none").to_json())
    plain = lungjax.load(tmp_path / "plain")
    for method in ("gradcam", "integrated_gradients"):
        flipped = plain.maps(np.ascontiguousarray(pixels[:, :, ::-1]), targets, method)[:, :, ::-1]
        maps = (plain.maps(pixels, targets, method) + flipped) / 2
        np.testing.assert_allclose(model.maps(pixels, targets, method), maps, atol=1e-5)


def test_tta_of_a_finished_run(pair, trained_run, tmp_path, no_pictures):
    run, data = tmp_path / "run", f"--data_dir={trained_run.data_dir}"
    shutil.copytree(pair[0], run)
    config = overrides.override(overrides.read(run / "config.json"), "eval.tta=flip")
    with pytest.raises(ValueError, match="first test the run itself"):
        external_test.evaluate(config, run, trained_run.data_dir, "folder/mine")
    assert commands.run(main, "--mode=evaluate", f"--workdir={run}", data, "--set=eval.tta=flip") == 0
    saved = predictions.read(run / "predictions_test.csv")
    images = [np.asarray(Image.open(trained_run.images / name)) for name in saved.ids]
    model = lungjax.load(run)
    np.testing.assert_allclose(saved.logits, mirrored_logits(model, images), atol=1e-5)
    np.testing.assert_allclose(model.predict(images), saved.probabilities, atol=2e-6)
    assert commands.run(main, "--mode=evaluate", f"--workdir={run}", data, "--dataset=folder/mine") == 0
    external = predictions.read(run / "external/folder_mine/predictions_test.csv")
    np.testing.assert_allclose(external.probabilities, saved.probabilities, atol=2e-6)


def test_equal_numbers_of_an_ensemble(pair, members, tmp_path, monkeypatch, capsys):
    model = replace(lungjax.load(pair), batch_size=2)
    expected = np.mean([each.predict(PICTURES) for each in members], axis=0)
    np.testing.assert_allclose(model.predict(PICTURES), expected, atol=2e-6)
    plain = np.mean([special.softmax(each.logits(PICTURES), axis=1) for each in members], axis=0)
    np.testing.assert_allclose(special.softmax(model.logits(PICTURES), axis=1), plain, atol=2e-6)
    files, given = [tmp_path / f"{i}.png" for i in range(5)], f"--model={pair[0]},{pair[1]}"
    for file, image in zip(files, PICTURES, strict=True):
        Image.fromarray(image).save(file)
    assert commands.run(export, given, f"--out={tmp_path}") == 0
    restored, (_, weights, _) = (read(tmp_path / "model.pyz") for read in (functions.from_pyz, artifacts.read_parts))
    assert restored.metadata == model.metadata and restored.configs == functions.load(pair).configs
    jax.tree.map(np.testing.assert_array_equal, restored.weights, weights)
    exported = lungjax.load(tmp_path / "model.pyz")
    assert exported.metadata == model.metadata
    np.testing.assert_allclose(exported.predict(files), expected, atol=2e-6)
    assert commands.run(predict, given, *files, f"--out={tmp_path / 'out'}", positional=("PATH...",)) == 0
    assert "ensemble of 2. The operating points were chosen on" in capsys.readouterr().out
    results = [json.loads(line) for line in (tmp_path / "out/predictions.jsonl").read_text().splitlines()]
    with running(model) as service:
        results += service.post("/predict", *((file.name, file.read_bytes()) for file in files))[1]["results"]
        assert service.post("/explain", ("0", files[0].read_bytes()))[0] == 200
        assert [each["name"] for each in service.ask("GET", "/model")[1]["members"]] == ["small", "small"]
    p = np.reshape([[each["probabilities"][name] for name in CLASSES] for each in results], (2, 5, 3))
    np.testing.assert_allclose(p, [expected, expected], atol=2e-6)

    heats, targets = [], expected.argmax(1)
    monkeypatch.setattr(figures, "draw", lambda *given: heats.append(given[2:4]))
    images = f"--images={','.join(map(str, files))}"
    assert commands.run(explain, given, images, f"--out={tmp_path / 'maps'}") == 0
    first, second = (each.explain(PICTURES, targets) for each in members)
    small = [Image.fromarray(heat).resize((32, 32), Image.Resampling.BILINEAR) for heat in second]
    mean = (first + np.stack(list(map(np.asarray, small)))) / 2
    np.testing.assert_allclose([heat for _, heat in heats], mean, atol=1e-4)
    np.testing.assert_allclose(exported.explain(PICTURES), mean, atol=1e-4)
    assert [shown.shape for shown, _ in heats] == [(32, 32, 1)] * 5


def test_operating_points_and_test_of_an_ensemble(pair, trained_run, tmp_path, no_pictures):
    own = {split: [predictions.read(run / f"predictions_{split}.csv") for run in pair] for split in ("val", "test")}
    mean = {split: np.mean([p.probabilities for p in both], axis=0) for split, both in own.items()}
    val = replace(own["val"][0], probabilities=mean["val"], logits=None)
    points = lungjax.load(pair).metadata.points["slice"]
    for i, name in enumerate(CLASSES):
        threshold = operating_points.choose(val, i, "youden")
        called, positive = mean["test"][:, i] >= threshold, own["test"][0].labels == i
        assert points[name]["youden"]["threshold"] == threshold
        assert points[name]["youden"]["sensitivity"] == called[positive].mean()
    given = ("--mode=evaluate", f"--model={pair[0]},{pair[1]}", f"--data_dir={trained_run.data_dir}")
    assert commands.run(main, *given, f"--workdir={tmp_path / 'both'}") == 0
    assert commands.run(main, *given, f"--workdir={tmp_path / 'both'}", "--dataset=folder/mine") == 0
    for folder in ("both", "both/external/folder_mine"):
        result = predictions.read(tmp_path / folder / "predictions_test.csv")
        np.testing.assert_allclose(result.probabilities, mean["test"], atol=2e-6)
        report = json.loads((tmp_path / folder / "report.json").read_text())
        assert report["operating_points"]["slice"]["left"]["youden"]["threshold"] == pytest.approx(
            points["left"]["youden"]["threshold"], abs=2e-6
        )


def test_folder_of_runs_and_different_val(pair, tmp_path):
    for name, run in zip(("fold0", "fold1"), pair, strict=True):
        shutil.copytree(run, tmp_path / name)
    lines = (tmp_path / "fold1/predictions_val.csv").read_text().splitlines()
    (tmp_path / "fold1/predictions_val.csv").write_text("\n".join(lines[:-1]) + "\n")
    model = lungjax.load(tmp_path)
    np.testing.assert_allclose(model.predict(PICTURES), lungjax.load(pair).predict(PICTURES), atol=1e-7)
    assert model.metadata.points == {} and "No operating points" in model.metadata.about["warnings"][0]


def test_ensemble_errors(pair, tmp_path, capsys, monkeypatch):
    data = brightness().metadata
    both = ensembles.describe(PLACES[:2], [data, data])
    for other, word in ((replace(data, classes=("bright", "dark")), "another order"), (both, "is an ensemble"),
                        (replace(data, window=(0.0, 9.0)), "window")):  # fmt: skip
        with pytest.raises(ValueError, match=word):
            ensembles.describe(PLACES[:2], [data, other])
    given, out = f"--model={pair[0]},{pair[1]}", f"--out={tmp_path}"
    monkeypatch.setattr(export, "PACKAGES", {})
    cases = (
        ([given], 1, "--out"),
        ([given, out, "--format=triton"], 2, "only be exported as jax"),
        ([f"--model={pair[0]},{pair[0]}"], 2, "given twice"),
    )
    commands.assert_errors(capsys, export, cases)
    commands.assert_errors(capsys, explain, [([given, out, "--split=test"], 1, "single run")])
    evaluate = (given, "--mode=evaluate")
    cases = (
        ([given], 1, "--mode=evaluate"),
        ([*evaluate, f"--workdir={tmp_path / 'x'}", "--set=eval.tta=flip"], 1, "members"),
        ([*evaluate, f"--workdir={pair[0].parent}"], 2, "new folder"),
    )
    commands.assert_errors(capsys, main, cases)


def test_novelty_of_an_ensemble_is_the_median():
    rng = np.random.default_rng(0)
    fits = [
        novelty.fit(*(rng.integers(0, top, (n, 9, 9)).astype(np.uint8) for n in (20, 5, 1))) for top in (30, 99, 250)
    ]
    members = [
        replace(brightness(novelty=fit.to_dict()).metadata, input=InputSpec(size=(8 + i, 8)))
        for i, fit in enumerate(fits)
    ]
    both = ensembles.describe(PLACES, members)
    image = rng.integers(0, 99, (9, 9)).astype(np.uint8)
    scores = [Preprocessor(member)(image).novelty for member in members]
    result = Preprocessor(metadata.from_json(both.to_json()))(image)
    assert result.novelty == sorted(scores)[1] and result.pixels.shape == (8 * (8 + 9 + 10),)
    np.testing.assert_array_equal(picture(both, result.pixels), Preprocessor(members[0])(image).pixels)
