"""Cross-validation: pooled predictions, finished folds, and metrics over folds computed by hand."""

import json
from dataclasses import replace

import numpy as np
import pytest
import small_runs as runs
from folders import CONFIG, prepare, rows
from sklearn.metrics import accuracy_score

from lungjax import datasets
from lungjax.config import overrides
from lungjax.evaluation import baselines, predictions
from lungjax.evaluation.predictions import Predictions
from lungjax.tables import pooled as pooled_scores
from lungjax.training import cross_validation, setup, train
from lungjax.training import workdir as workdirs

pytestmark = pytest.mark.usefixtures("no_pictures")
CLASSES = ("left", "middle", "right")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("crossval")
    prepare(root, "few", rows(CLASSES, 5))
    return root


def changed(*assignments):
    return runs.changed(CONFIG, "data.dataset=folder/few", "auto=model.momentum", *assignments)


def predict(data, at, offset):
    probabilities = np.full((len(at), 3), 0.2)
    probabilities[np.arange(len(at)), (data.columns["label"][at] + offset) % 3] = 0.6
    names = {"ids": "file", "groups": "group", "sources": "source", "labels": "label"}
    columns = {key: data.columns[name][at] for key, name in names.items()}
    return Predictions(**columns, probabilities=probabilities, classes=CLASSES)


def quick(config, workdir, data_dir, *_):
    """Writes the files of `train.run` for a network that predicts two of three images correctly."""
    data = setup.open_data(config, data_dir)
    (workdir / "checkpoints/last/2").mkdir(parents=True, exist_ok=True)
    (workdir / "config.json").write_text(overrides.to_json(config))
    (workdir / "data.json").write_text(json.dumps(workdirs.data_facts(data)))
    for split in ("val", "test"):
        predicted = predict(data, data.rows(split), (np.arange(len(data.rows(split))) % 3 == 0).astype(int))
        predicted = replace(predicted, logits=np.log(predicted.probabilities))
        predictions.write(predicted, workdir / f"predictions_{split}.csv")
    if not config.data.test_source:
        predictions.write(baselines.source_only(data), workdir / "predictions_source_only.csv")
    counts = {"train": dict(zip(CLASSES, np.bincount(data.columns["label"][data.rows("train")]).tolist(), strict=True))}
    (workdir / "report.json").write_text(json.dumps({"facts": {"parameters": 7, "steps": 2, "counts": counts}}))
    (workdir / "metrics.jsonl").write_text(json.dumps({"step": 2, f"val.{config.train.monitor}": 0.5}) + "\n")
    (workdir / "report.md").write_text("")


def test_training_and_pooling_of_folds(root, monkeypatch, capsys):
    workdir, real, trained = root / "cv", train.run, []

    def counted(config, folder, *others):
        trained.append(config.data.fold)
        if trained == [0, 1]:
            raise ValueError("the disk is full")
        return (real if trained == [0, 1, 1] else quick)(config, folder, *others)

    monkeypatch.setattr(train, "run", counted)
    with pytest.raises(ValueError, match="the disk is full"):
        cross_validation.run(changed(), 3, workdir, root / "data")
    assert "fold1, of 3 runs" in capsys.readouterr().out
    assert (workdir / "fold0/report.md").exists() and not (workdir / "report.md").exists()
    assert cross_validation.run(changed(), 3, workdir, root / "data") == workdir / "report.md"
    assert trained == [0, 1, 1, 2], "the finished fold was trained again"

    pooled = predictions.read(workdir / "predictions_test.csv")
    each = [predictions.read(workdir / f"fold{i}/predictions_test.csv") for i in range(3)]
    data = datasets.open_dataset("folder/few", root / "data")
    assert pooled.ids.tolist() == data.columns["file"].tolist(), "each image once, in the order of the data set"
    assert not (workdir / "predictions_val.csv").exists()
    for i, part in enumerate(each):
        mine = pooled.extra["fold"] == str(i)
        order = [pooled.ids[mine].tolist().index(name) for name in part.ids]
        np.testing.assert_array_equal(pooled.probabilities[mine][order], part.probabilities)
        np.testing.assert_array_equal(pooled.logits[mine][order], part.logits)
        assert not set(part.groups) & set(predictions.read(workdir / f"fold{i}/predictions_val.csv").groups)
        saved = json.loads((workdir / f"fold{i}/config.json").read_text())
        assert (saved["data"]["fold"], saved["model"]["momentum"], saved["auto"]) == (i, 0.5, [])

    report = json.loads((workdir / "report.json").read_text())
    assert report["test"]["slice"]["n"] == 30 and report["facts"]["counts"]["test"] == dict.fromkeys(CLASSES, 10)
    scores = [accuracy_score(p.labels, p.probabilities.argmax(1)) for p in each]
    over = report["facts"]["folds"]["over"]["slice.accuracy"]
    assert over["values"] == pytest.approx(scores)
    assert (over["mean"], over["low"], over["high"]) == pytest.approx((np.mean(scores), min(scores), max(scores)))
    text = (workdir / "report.md").read_text()
    assert "tested once, by one of 3 networks" in text and f"{np.mean(scores):.3f}" in text
    assert report["controls"]["source_only"]["n"] == 30

    with pytest.raises(ValueError, match="optim.lr: 0.03 -> 0.5"):
        cross_validation.run(changed("optim.lr=0.5"), 3, workdir, root / "data")
    with pytest.raises(ValueError, match="does not belong to 4 folds|data.folds: 3 -> 4"):
        cross_validation.run(changed(), 4, workdir, root / "data")
    cross_validation.run(changed(), 3, workdir, root / "data", mode="evaluate")
    assert trained == [0, 1, 1, 2, 0, 1, 2]
    (workdir / "fold2/metrics.jsonl").write_text('{"step": 1}\n')  # interrupted, and then evaluated: it has a report
    cross_validation.run(changed(), 3, workdir, root / "data")
    assert trained[7:] == [2]
    cross_validation.run(changed("train.steps=4"), 3, workdir, root / "data")
    assert trained[8:] == [0, 1, 2]


def test_each_source_left_out_once(root, monkeypatch, tmp_path):
    trained = []

    def counted(config, folder, *others):
        trained.append(folder.name)
        if trained == ["ordinary", "fold0"]:
            raise ValueError("the disk is full")
        quick(config, folder, *others)

    monkeypatch.setattr(train, "run", counted)
    workdir = tmp_path / "sources"
    with pytest.raises(ValueError, match="the disk is full"):
        cross_validation.run(changed(), "source", workdir, root / "data")
    cross_validation.run(changed(), "source", workdir, root / "data")
    assert trained == ["ordinary", "fold0", "fold0", "fold1"], "the finished run was trained again"
    pooled = predictions.read(workdir / "predictions_test.csv")
    assert len(pooled) == 30 and set(zip(pooled.sources, pooled.extra["fold"], strict=True)) == {
        ("north", "0"), ("south", "1"),
    }  # fmt: skip
    report = json.loads((workdir / "report.json").read_text())
    facts = report["facts"]["folds"]
    assert facts["sources"] == ["north", "south"] and "source_only" not in report["controls"]
    # The ordinary test split has one patient per class, with two images each.
    ordinary = predictions.read(workdir / "ordinary/predictions_test.csv")
    for i, source in enumerate(facts["sources"]):
        own = predictions.read(workdir / f"fold{i}/predictions_test.csv")
        assert facts["patients"][source]["n"] == len(set(own.groups))
        both = np.flatnonzero(ordinary.sources == source)
        if not len(both):
            assert source not in facts["drop"]
            continue
        after = [own.predicted[own.ids == name].item() for name in ordinary.ids[both]]
        labels, before = ordinary.labels[both], ordinary.predicted[both]
        recalls = [[np.mean(np.asarray(p)[labels == c] == c) for c in np.unique(labels)] for p in (before, after)]
        drop = facts["drop"][source]["slice.balanced_accuracy"]
        assert facts["drop"][source]["n"] == len(both)
        assert drop["difference"] == pytest.approx(np.mean(recalls[0]) - np.mean(recalls[1]))
    text = (workdir / "report.md").read_text()
    assert "Drop from the ordinary split, per image" in text and "Subgroups by source, per patient (test)" in text
    assert "2 sources, each left out once" in text and "may recognize the source" not in text
    with pytest.raises(ValueError, match="fold1 does not belong|ordinary does not belong"):
        cross_validation.run(changed(), 3, workdir, root / "data")

    # The folds count as one run in a table of pooled scores.
    table = pooled_scores.markdown(tmp_path, 20)
    assert (
        "| sources | simple | none | 1 |" in table
        and "sources/ordinary" in table
        and "sources/fold0" not in table
        and "north, 18 images" in table
    )


def test_source_with_the_only_images_of_a_class(tmp_path, monkeypatch):
    made = [row | {"source": "north" if row["label"] == "left" else row["source"]} for row in rows(CLASSES, 5)]
    prepare(tmp_path, "one", made)
    monkeypatch.setattr(train, "run", lambda *_: pytest.fail("trained before the check"))
    with pytest.raises(ValueError, match="test_source=north.*images of left"):
        config = runs.changed(changed(), "data.dataset=folder/one")
        cross_validation.run(config, "source", tmp_path / "w", tmp_path / "data")


def test_impossible_folds_and_foreign_workdir(root, tmp_path):
    for count, hint in ((2, "3 or more"), (0, "3 or more"), (6, "left has 5 patients")):
        with pytest.raises(ValueError, match=hint):
            cross_validation.run(changed(), count, root / "none", root / "data")
    assert not (root / "none").exists()
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="thesis.tex"):
        cross_validation.run(changed(), 3, tmp_path, root / "data")


def test_impossible_pooling(root):
    data = datasets.open_dataset("folder/few", root / "data")
    parts = [predict(data, np.arange(i, 30, 3)[::-1], i) for i in range(3)]
    assert cross_validation.pool(parts, data).logits is None
    for wrong, word in (
        (parts[0], "tested in two folds"),
        (replace(parts[1], classes=("a", "b", "c")), "different classes"),
        (replace(parts[1], ids=np.asarray(["x.png", *parts[1].ids[1:]])), "x.png is not an image"),
    ):
        with pytest.raises(ValueError, match=word):
            cross_validation.pool([parts[0], wrong], data)


def test_spread_ignores_undefined_metrics(root):
    data = datasets.open_dataset("folder/few", root / "data")
    first = np.flatnonzero(data.columns["label"] == 0)
    over = cross_validation.spread([predict(data, first, 0), predict(data, np.arange(30), 1)])
    assert over["slice.accuracy"] == {"mean": 0.5, "low": 0.0, "high": 1.0, "values": [1.0, 0.0]}
    assert over["slice.auc_macro"]["values"][0] is None and over["slice.auc_macro"]["mean"] == pytest.approx(0.25)
