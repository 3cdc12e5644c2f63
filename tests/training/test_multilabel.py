"""Several findings per image, from labels.csv to the service: equal numbers everywhere, unknown labels without loss."""

import csv
import json
from dataclasses import replace

import commands
import folders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import without_pictures
from PIL import Image
from scipy import special
from services import running
from sklearn import metrics as sk

import lungjax
from lungjax import compare, datasets, main, predict, prepare
from lungjax.config import overrides
from lungjax.data import folds
from lungjax.evaluation import predictions
from lungjax.explain import __main__ as explain
from lungjax.export import __main__ as export
from lungjax.runtime import environment
from lungjax.training import optim, step, train

FINDINGS = ("left", "right")
COLUMNS = ("path", "left", "right", "split", "group", "source", "sex")
SPLITS = ("train", "train", "val", "test")
CELLS = {1: "1", 0: "0.0", -1: ""}


def rows(known=lambda split, number: True):
    """Images with a square at the left, at the right, at both or at neither; labels are unknown unless `known`."""
    made = []
    for number in range(64):  # two images of each patient
        left, right = divmod(number // 2 % 4, 2)
        split = SPLITS[number // 8 % 4]
        image = np.maximum(folders.picture(0, number) * left, folders.picture(2, number) * right)
        image = np.maximum(image, folders.picture(1, number) // 3)
        labels = [value if known(split, number + i) else -1 for i, value in enumerate((left, right))]
        made.append(
            (
                f"{number:02}.png",
                *labels,
                split,
                f"p{number // 2}",
                ("a", "b")[number % 3 // 2],
                "FM"[number % 2],
                image,
            )
        )
    return made


def write(folder, made, columns=COLUMNS):
    folder.mkdir(parents=True)
    with (folder / "labels.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(columns)
        for name, left, right, *rest, image in made:
            Image.fromarray(image).save(folder / name)
            table.writerow([name, CELLS.get(left, left), CELLS.get(right, right), *rest])
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two runs, one of them interrupted and resumed, on images of which a fifth of the train labels is unknown."""
    root = tmp_path_factory.mktemp("findings")
    write(root / "in", rows(lambda split, number: split != "train" or number % 5))
    data = f"--data_dir={root / 'data'}"
    with pytest.MonkeyPatch.context() as patch:
        without_pictures(patch)
        patch.setattr(environment, "prepare_jax", lambda: None)
        assert commands.run(prepare, "--dataset=folder/f", f"--source={root / 'in'}", data) == 0
        for name, *settings in (
            ("a", "train.steps=20"),
            ("a", "train.steps=60"),
            ("b", "train.steps=60", "input.size=36"),
        ):
            config = overrides.override(folders.CONFIG, "data.dataset=folder/f")
            for setting in (
                "train.eval_steps=20",
                "train.monitor=slice.auc_macro",
                "optim.class_weights=balanced",
                *settings,
            ):
                config = overrides.override(config, setting)
            train.run(config, root / name, root / "data")
    return root


def test_numbers_are_equal_everywhere(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(environment, "prepare_jax", lambda: None)
    saved = predictions.read(trained / "a/predictions_test.csv")
    model, files = lungjax.load(trained / "a"), [trained / "in" / name for name in saved.ids]
    assert saved.classes == model.metadata.classes == FINDINGS and model.metadata.multilabel
    assert len(model.metadata.temperature) == 2 and not np.allclose(saved.probabilities.sum(axis=1), 1)
    expected = special.expit(model.logits(files) / np.array(model.metadata.temperature))
    np.testing.assert_allclose(saved.probabilities, expected, atol=2e-6)
    masked = [sk.roc_auc_score(saved.labels[:, i], saved.probabilities[:, i]) for i in range(2)]
    report = json.loads((trained / "a/report.json").read_text())
    assert report["test"]["slice"]["auc_macro"] == pytest.approx(np.mean(masked)) and np.mean(masked) > 0.8
    assert set(report["test"]["subgroups"]) == {"source", "sex"}

    runs = f"--model={trained / 'a'},{trained / 'b'}"
    for given, paths in ((f"--model={trained / 'a'}", [trained / "a"]), (runs, [trained / "a", trained / "b"])):
        out = tmp_path / f"out{len(paths)}"
        mean = np.mean([lungjax.load(path).predict(files) for path in paths], axis=0)
        assert commands.run(predict, given, *files, f"--out={out}", positional=("PATH...",)) == 0
        assert commands.run(export, given, f"--out={out}") == 0
        np.testing.assert_allclose(lungjax.load(out / "model.pyz").predict(files), mean, atol=2e-6)
        plain = np.mean([special.expit(lungjax.load(path).logits(files)) for path in paths], axis=0)
        np.testing.assert_allclose(special.expit(lungjax.load(paths).logits(files)), plain, atol=2e-6)
        lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
        with running(replace(lungjax.load(paths), batch_size=4)) as service:
            lines += service.post("/predict", *((file.name, file.read_bytes()) for file in files))[1]["results"]
            answer = service.post("/explain?class=right", ("0", files[0].read_bytes()))[1]["results"][0]
            assert answer["explained"] == "right"
        p = np.reshape([[line["probabilities"][name] for name in FINDINGS] for line in lines], (2, -1, 2))
        np.testing.assert_allclose(p, [mean, mean], atol=2e-6)
        for line in lines:
            called = [name for name, point in line["decisions"].items() if point["called"]]
            assert line["predicted"] == (" + ".join(called) or "no finding")
        assert any(" + " in line["predicted"] for line in lines)


def test_maps_of_each_finding(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(environment, "prepare_jax", lambda: None)
    run, out = f"--model={trained / 'a'}", f"--out={tmp_path}"
    assert commands.run(explain, run, f"--images={trained / 'in/15.png'}", out) == 0
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["15_left_gradcam.png", "15_right_gradcam.png"]
    model = lungjax.load(trained / "a")
    maps = model.explain([trained / "in/15.png"] * 2, [0, 1], "integrated_gradients")
    assert maps[0, :, :16].sum() > maps[0, :, 16:].sum() and maps[1, :, 16:].sum() > maps[1, :, :16].sum()
    data = f"--data_dir={trained / 'data'}"
    commands.assert_errors(capsys, explain, [((run, out, data, "--split=test"), 2, "choose a finding with --class")])
    assert commands.run(explain, run, out, data, "--split=test", "--class=right") == 0
    with (tmp_path / "test_gradcam/index.csv").open() as file:
        table = list(csv.DictReader(file))
    assert {row["label"] for row in table} == {"right", "no right"} and len(table) == 16


def test_other_hospital_knows_fewer_findings(trained, tmp_path, monkeypatch, no_pictures):
    monkeypatch.setattr(environment, "prepare_jax", lambda: None)
    made = [(f"x{name}", -1, right, "test", *rest) for name, _, right, _, *rest in rows()]
    write(tmp_path / "in", made, ("path", "edema", "right", *COLUMNS[3:]))
    options = datasets.PrepareOptions(classes=("edema", "right"))
    datasets.write("folder/other", tmp_path / "in", trained / "data", options, quiet=True, overwrite=True)
    args = ("--mode=evaluate", f"--workdir={trained / 'a'}", f"--data_dir={trained / 'data'}")
    assert commands.run(main, *args, "--dataset=folder/other", "--overlap=drop", "--split=all") == 0
    report = json.loads((trained / "a/external/folder_other_all/report.json").read_text())["test"]["slice"]["per_class"]
    assert report["left"]["known"] == 0 and report["left"]["auc"] is None and report["right"]["auc"] > 0.8
    assert commands.run(main, *args, "--dataset=folder/f") == 0
    own, again = (predictions.read(trained / "a" / name / "predictions_test.csv") for name in ("", "external/folder_f"))
    np.testing.assert_allclose(again.probabilities, own.probabilities, atol=2e-6)
    assert commands.run(compare, trained / "a", trained / "b", positional=("RUN...",)) == 0


def test_loss_is_masked_and_weighted():
    labels = np.array([[1, 0, -1], [0, -1, 1], [-1, -1, -1]])
    logits = np.random.default_rng(0).normal(size=(3, 3)).astype(np.float32)
    weights = np.asarray(optim.class_weights("balanced", np.array([[1, 0, 0], [0, 0, 1], [1, -1, 1]]), tuple("abc")))
    np.testing.assert_allclose(weights, [[1.5, 0.5, 1.5], [0.75, 1.0, 0.75]])  # b has no positive label
    np.testing.assert_allclose(optim.class_weights("2,3", np.zeros((1, 2), int), ("a", "b")), [[1, 1], [2, 3]])
    given = {"class_weights": jnp.asarray(weights), "label_smoothing": 0.0}
    losses = step.binary_cross_entropy(jnp.asarray(logits), jnp.asarray(labels), **given)
    p = special.expit(logits.astype(float))
    expected = np.where(labels == 1, -weights[1] * np.log(p), -weights[0] * np.log(1 - p)) * (labels >= 0)
    np.testing.assert_allclose(losses, expected.sum(axis=1) / 3, rtol=1e-5)
    gradient = jax.grad(lambda z: step.binary_cross_entropy(z, jnp.asarray(labels), **given).sum())(jnp.asarray(logits))
    assert (np.asarray(gradient)[labels < 0] == 0).all() and (np.asarray(gradient)[labels >= 0] != 0).all()


def test_uncertain_labels_and_settings(trained, tmp_path):
    data = datasets.open_dataset("folder/f", trained / "data")
    labels, rows_of_train = data.columns["label"], data.rows("train")
    unknown = (labels[rows_of_train] == -1).sum()
    assert 0 < unknown < labels[rows_of_train].size and (np.delete(labels, rows_of_train, axis=0) >= 0).all()
    config = overrides.override(folders.CONFIG, "data.dataset=folder/f")
    for policy, value in (("ignore", -1), ("zero", 0), ("one", 1)):
        own = folds.apply(data, overrides.override(config, f"data.uncertain={policy}")).columns["label"]
        assert (own[labels == -1] == value).all() and (own[labels != -1] == labels[labels != -1]).all()
    part = folds.deal(data, 3)
    assert all(len(set(part[data.columns["group"] == group])) == 1 for group in data.columns["group"])
    assert all((labels[part == i] == 1).any(axis=0).all() for i in range(3))
    for setting, words in (
        ("model.head.output=softmax", "use multilabel"),
        ("data.sampling=balanced", "several findings per image; use natural"),
    ):
        with pytest.raises(ValueError, match=words):
            train.run(overrides.override(config, setting), tmp_path / "run", trained / "data")


def test_errors_in_labels_csv(tmp_path, capsys):
    made = rows()
    for i, (columns, cell, flags, words) in enumerate((
        (COLUMNS, "yes", ["--classes=left,right"], "left is 'yes'; expected 1, 0, or -1 or nothing"),
        (COLUMNS, "1", ["--classes=left,rigth"], "no column of the finding rigth (--classes); did you mean right?"),
        (COLUMNS, "yes", [], "only one finding, right"),
        (("path", "age", "side", *COLUMNS[3:]), 7, [], "column label is missing"),
    )):  # fmt: skip
        changed = [(name, cell, 7 if cell == 7 else right, *rest) for name, _, right, *rest in made]
        folder = write(tmp_path / str(i), changed, columns)
        args = ("--dataset=folder/bad", f"--source={folder}", f"--data_dir={tmp_path / 'data'}", *flags)
        commands.assert_errors(capsys, prepare, [(args, 2, words)])
