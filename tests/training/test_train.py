"""A run from configuration to report, and the training step."""

import dataclasses
import json
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_runs as runs
from sklearn.metrics import log_loss
from small_runs import PLAIN, changed

from lungjax.config import metadata, overrides
from lungjax.evaluation import metrics, outliers, predictions
from lungjax.inference.artifacts import Preprocessor
from lungjax.models import outputs
from lungjax.runtime import signals
from lungjax.runtime.checkpoint import newest
from lungjax.training import metrics_log, progress, setup, step, train
from lungjax.training import workdir as workdirs
from lungjax.weights import load

pytestmark = pytest.mark.usefixtures("small_network")
CONFIG = changed(
    PLAIN, "optim.freeze=", "optim.schedule=constant", "input.mean=0.4,0.5,0.6", "input.std=0.2,0.3,0.4",
    "train.log_steps=2", "train.save_steps=0",
)  # fmt: skip
SGD = changed(CONFIG, "model.head.dropout=0", "optim.name=sgd")


@pytest.fixture(scope="module")
def complete(tmp_path_factory, small_data):
    """The workdir of a complete run; copy it before changing it."""
    folder = tmp_path_factory.mktemp("complete")
    with pytest.MonkeyPatch.context() as patch:
        runs.patched(patch, small_data)
        assert train.run(CONFIG, folder / "run", folder) == folder / "run/report.md"
    return folder / "run"


def test_files_of_a_run(tmp_path, complete):
    workdir = shutil.copytree(complete, tmp_path / "run")
    report = json.loads((workdir / "report.json").read_text())
    test = predictions.read(workdir / "predictions_test.csv")
    assert len(test.ids) == 13 and (workdir / "report.md").is_file() and (workdir / "model.json").is_file()
    temperature = report["calibration"]["temperature"]
    np.testing.assert_allclose(jax.nn.softmax(test.logits / temperature), test.probabilities, atol=1e-6)
    assert report["test"]["slice"]["accuracy"] == pytest.approx((test.probabilities.argmax(1) == test.labels).mean())
    assert overrides.from_json((workdir / "config.json").read_text()) == CONFIG
    rows = metrics_log.read(workdir / "metrics.jsonl")
    assert [r["step"] for r in rows if "train.loss" in r] == [2, 4, 6, 8, 10, 12]
    assert [r["step"] for r in rows if "val.slice.loss" in r] == [4, 8, 12]
    assert progress.is_complete(workdir, CONFIG, 12) and not progress.is_complete(workdir, CONFIG, 13)

    # The report, the service and prediction agree on how many of the built-in images have a warning.
    description, rates = metadata.read(workdir / "model.json"), report["facts"]["novelty"]
    assert description.public()["novelty"] == rates
    for kind, pictures in outliers.builtin("").items():
        warned = sum("unlike" in str(Preprocessor(description)(picture).warnings) for picture in pictures)
        assert rates["detection"][kind] == rates["detection"][kind] | {"n": len(pictures), "warnings": warned}
    shown = {"test images (false alarms)": rates["false_alarms"]["test"], **rates["detection"]}
    for kind, r in shown.items():
        cells = f"| {kind} | {r['n']} | {r['rate']:.3f} ({r['interval'][0]:.3f} to "
        assert cells in (workdir / "report.md").read_text()

    # The best step is the first with the best validation score, and its weights are tested.
    scores = {r["step"]: r["val.slice.accuracy"] for r in rows if "val.slice.loss" in r}
    assert newest(workdir, "best") == max(scores, key=lambda s: (scores[s], -s))
    val = predictions.read(workdir / "predictions_val.csv")
    assert metrics.report_levels(val)["slice"]["accuracy"] == scores[newest(workdir, "best")]

    before = (workdir / "predictions_test.csv").read_bytes()
    train.run(CONFIG, workdir, tmp_path, mode="evaluate")
    assert (workdir / "predictions_test.csv").read_bytes() == before


def test_final_progress(tmp_path):
    settings = ("train.patience=1", "optim.lr=1e-12", "train.eval_steps=2", "train.steps=40", "train.keep=last")
    config = changed(CONFIG, *settings)
    train.run(config, tmp_path / "run", tmp_path)
    rows = metrics_log.read(tmp_path / "run/metrics.jsonl")
    assert rows[-1]["step"] == 4  # step 2 is the best so far, step 4 no better
    assert progress.is_complete(tmp_path / "run", config, 40)
    assert newest(tmp_path / "run", "best") == 4  # train.keep=last tests the last weights
    assert json.loads((tmp_path / "run/report.json").read_text())["best"]["step"] == 4
    train.run(config, tmp_path / "run", tmp_path)
    assert metrics_log.read(tmp_path / "run/metrics.jsonl") == rows
    train.run(changed(config, "train.patience=3"), tmp_path / "run", tmp_path)
    assert metrics_log.read(tmp_path / "run/metrics.jsonl")[-1]["step"] == 8  # after two more validations
    with pytest.raises(ValueError, match="train.patience: 3 -> 2"):
        train.run(changed(config, "train.patience=2"), tmp_path / "run", tmp_path)


def test_conflict_with_the_workdir(tmp_path, monkeypatch, small_data, complete):
    workdir = shutil.copytree(complete, tmp_path / "run")
    with pytest.raises(ValueError, match="optim.lr: 0.003 -> 0.1"):
        train.run(changed(CONFIG, "optim.lr=0.1"), workdir, tmp_path)
    train.run(changed(CONFIG, "eval.batch_size=5", "data.threads=1"), workdir, tmp_path)  # changes no weights
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="not empty"):
        train.run(CONFIG, tmp_path / "foreign", tmp_path)
    other = dataclasses.replace(small_data, fingerprint="1" * 64)
    monkeypatch.setattr(setup, "open_dataset", lambda *_, **__: other)
    with pytest.raises(ValueError, match="images, labels or splits"):
        train.run(CONFIG, workdir, tmp_path)


def test_lengthened_run(tmp_path, monkeypatch, complete):
    """8 steps and then 12 give the weights of 12, also if the extension is killed."""
    config, workdir = changed(CONFIG, "train.save_steps=1"), tmp_path / "run"
    train.run(changed(config, "train.steps=8"), workdir, tmp_path)
    with monkeypatch.context() as patch, pytest.raises(signals.Interrupted):
        runs.interrupt(patch, signal.SIGTERM, 10)
        train.run(config, workdir, tmp_path)
    assert not (workdir / "report.md").exists()
    with pytest.raises(ValueError, match=r"step 10.*step 8.*train.steps=10"):
        train.run(changed(config, "train.steps=8"), workdir, tmp_path)
    shutil.rmtree(workdir / "checkpoints/last/10")  # as if killed before this checkpoint
    train.run(config, workdir, tmp_path)
    rows = metrics_log.read(workdir / "metrics.jsonl")
    assert [(row["step"], row["steps"]) for row in rows if "steps" in row] == [(0, 8), (8, 12)]
    states = [runs.last_state(folder) for folder in (complete, workdir)]
    for name, array in states[0].items():
        np.testing.assert_array_equal(states[1][name], array, err_msg=name)
    assert overrides.from_json((workdir / "config.json").read_text()) == config
    report = json.loads((workdir / "report.json").read_text())
    assert report["facts"]["steps"] == 12 and "from 8 to 12 steps at step 8" in report["warnings"][0]


def test_mistakes_before_training(tmp_path):
    for assignment, hint in (
        ("train.monitor=slice.auc", "slice.auc_macro"),
        ("input.size=2", "too small"),
        ("eval.prevalence=lefd:0.02", "left"),
        ("optim.class_weights=1,2", "left, middle, right"),
        ("model.name=simpel", "simple"),
        ("optim.freeze=nothing", "matches no parameter"),
        ("optim.lr_factors=nothing=2", "matches no trained parameter"),
        ("model.weights=run:nowhere", "no trained run"),
    ):
        with pytest.raises(ValueError, match=hint):
            train.run(changed(CONFIG, assignment), tmp_path / "run", tmp_path)
        assert not (tmp_path / "run").exists(), assignment
    for assignment, hint in (("model.weights=imagenet", "no ImageNet weights"), ("model.padding=symmetric", "allows")):
        with pytest.raises(ValueError, match=hint):
            train.run(changed(CONFIG, "model.name=simple", assignment), tmp_path / "run", tmp_path)


@pytest.mark.parametrize("variant", ["train.accumulate=4", pytest.param("train.remat=true", marks=pytest.mark.slow)])
def test_variants_against_the_plain_step(variant):
    """Augmentation is included; it depends only on the position of an example in the sequence."""
    config = changed(SGD, "optim.frozen_batch_norm=frozen", "augment=ct_cov19_original", "augment.contrast=0.5,1.5")
    before, plain, metrics_of_plain = runs.one_step(config)
    _, other, metrics_of_other = runs.one_step(changed(config, variant))
    assert runs.different(before.params, plain.params)
    runs.assert_close(other.params, plain.params, atol=2e-6)
    np.testing.assert_allclose(metrics_of_other["loss"], metrics_of_plain["loss"], rtol=1e-5)


def test_dropout_by_seed_and_step():
    """Runs with other seeds use the same compiled program."""
    losses, programs = [], set()
    for seed, number in ((0, 0), (0, 0), (0, 1), (1, 0)):
        config = changed(CONFIG, "model.head.dropout=0.5", f"train.seed={seed}")
        first, batch = runs.first_state(config), runs.batch_of(config)
        first = first.replace(step=jnp.full_like(first.step, number))
        programs.add(runs.build(config).train_step.lower(first, batch).as_text())
        losses.append(float(runs.build(config).train_step(first, batch)[1]["loss"]))
    assert losses[0] == losses[1]
    assert len(set(losses)) == 3
    assert len(programs) == 1


def test_tuning_a_head_on_another_run(tmp_path, complete):
    """Normalization and weights are those of the source run; only the head is trained."""
    tuning = ("train.steps=2", "train.eval_steps=2", "optim.tune=head", "optim.lr_factors=bias$=2")
    config = changed(PLAIN, "optim.freeze=", f"model.weights=run:{complete}", *tuning)
    train.run(config, tmp_path / "run", tmp_path)
    saved = overrides.from_json((tmp_path / "run/config.json").read_text())
    assert saved == dataclasses.replace(config, input=saved.input)
    assert (saved.input.mean, saved.input.std) == ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    before, after = (runs.best_variables(workdir) for workdir in (complete, tmp_path / "run"))
    assert after["params"]["stem_conv"]["kernel"].shape == (3, 3, 3, 4)
    assert runs.different(before, after) == {"params/head/dense/kernel", "params/head/dense/bias"}
    workdirs.check(tmp_path / "run", load.resolve(config), "train")  # the same command would resume
    with pytest.raises(ValueError, match="differ by channel"):
        train.run(changed(config, "model.gray=fold"), tmp_path / "folded", tmp_path)
    assert not (tmp_path / "folded").exists()


def loss(logits, labels, weights=None, smoothing=0.0, positive=None, classes=3):
    settings = {"label_smoothing": smoothing, "positive": positive}
    weights = jnp.ones(classes) if weights is None else jnp.asarray(weights)
    logits, labels = jnp.asarray(logits), jnp.asarray(labels)
    return np.asarray(step.cross_entropy(logits, labels, class_weights=weights, **settings))


def test_softmax_loss_against_scikit_learn():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(20, 3)).astype(np.float32), rng.integers(0, 3, 20)
    p = np.asarray(outputs.probabilities(jnp.asarray(logits), None), np.float64)
    p /= p.sum(-1, keepdims=True)
    np.testing.assert_allclose(loss(logits, labels).mean(), log_loss(labels, p, labels=[0, 1, 2]), rtol=1e-5)


def test_class_weights_and_label_smoothing_by_hand():
    uniform, labels = np.zeros((2, 3), np.float32), np.asarray([0, 2])
    np.testing.assert_allclose(loss(uniform, labels, [1.0, 1.0, 4.0]), np.log(3) * np.asarray([1, 4]), rtol=1e-6)
    logits = np.asarray([[2.0, 0.0, 0.0]], np.float32)
    log_p = logits[0] - np.log(np.exp(logits[0]).sum())
    expected = -(0.8 * log_p[0] + 0.1 * log_p[1] + 0.1 * log_p[2])
    np.testing.assert_allclose(loss(logits, [0], smoothing=0.3), [expected], rtol=1e-6)


def test_sigmoid_of_the_positive_class():
    logits = np.asarray([[3.0], [-1.0]], np.float32)
    p = 1 / (1 + np.exp(-logits[:, 0]))
    np.testing.assert_allclose(outputs.probabilities(jnp.asarray(logits), 1), np.stack([1 - p, p], 1), rtol=1e-5)
    np.testing.assert_allclose(outputs.probabilities(jnp.asarray(logits), 0), np.stack([p, 1 - p], 1), rtol=1e-5)
    for positive in (0, 1):
        actual = loss(logits, [positive, 1 - positive], positive=positive, classes=2)
        np.testing.assert_allclose(actual, -np.log([p[0], 1 - p[1]]), rtol=1e-5)
    assert np.isfinite(loss([[500.0], [-500.0]], [0, 1], positive=1, classes=2)).all()
    assert outputs.class_logits(jnp.asarray(logits), 0).tolist() == [[3.0, 0.0], [-1.0, 0.0]]
