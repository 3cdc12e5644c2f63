import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import small_bn, without_pictures
from orbax.checkpoint import v1 as ocp

from lungjax import models
from lungjax.config import Config, EvalConfig, HeadConfig, InputSpec, ModelConfig, OptimConfig, TrainConfig, overrides
from lungjax.evaluation import metrics, predictions
from lungjax.models import trees
from lungjax.report import write
from lungjax.runtime.checkpoint import newest, restore_best
from lungjax.training import metrics_log, optim, state, step, train
from lungjax.training import workdir as workdirs
from lungjax.training.early_stopping import Progress, ended
from lungjax.weights import load

CONFIG = Config(
    name="small",
    input=InputSpec(size=(32, 32)),
    model=ModelConfig(name="simple", head=HeadConfig(dropout=0.2)),
    optim=OptimConfig(lr=3e-3),
    train=TrainConfig(batch_size=8, steps=12, eval_steps=4, log_steps=2, monitor="slice.accuracy"),
    eval=EvalConfig(batch_size=8, examples=2, draws=0),
)


@pytest.fixture(autouse=True)
def opened(monkeypatch, small_data):
    monkeypatch.setitem(models.MODELS, "small_bn", small_bn())
    monkeypatch.setattr(train, "open_dataset", lambda name, *_, **__: small_data)
    without_pictures(monkeypatch)


draw = write.draw


@pytest.fixture(scope="module")
def whole(tmp_path_factory, small_data):
    """The folder of a whole run, with every picture; copy it to go on in it."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "open_dataset", lambda name, *_, **__: small_data)
        patch.setattr(write, "draw", draw)
        report_path = train.run(CONFIG, folder / "run", folder)
    assert report_path == folder / "run/report.md" and report_path.is_file()
    return folder / "run"


def changed(config, *assignments):
    for assignment in assignments:
        config = overrides.override(config, assignment)
    return config


def last_weights(workdir: Path, step_number: int) -> dict[str, np.ndarray]:
    """Every array of a saved state by path, optimiser included, read without lungjax."""
    found = ocp.load_checkpointables(workdir.absolute() / "checkpoints" / "last" / str(step_number))
    leaves = jax.tree_util.tree_leaves_with_path(found["state"])
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def test_a_run_leaves_everything_it_promises(tmp_path, whole):
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    report = json.loads((workdir / "report.json").read_text())
    saved = predictions.read(workdir / "predictions_test.csv")
    assert len(saved.ids) == 13
    np.testing.assert_allclose(jax.nn.softmax(saved.logits), saved.probabilities, atol=1e-6)
    assert report["test"]["slice"]["accuracy"] == pytest.approx((saved.probabilities.argmax(1) == saved.labels).mean())
    assert overrides.from_json((workdir / "config.json").read_text()) == CONFIG
    rows = metrics_log.read(workdir / "metrics.jsonl")
    assert [r["step"] for r in rows if "train.loss" in r] == [2, 4, 6, 8, 10, 12]
    assert [r["step"] for r in rows if "val.slice.loss" in r] == [4, 8, 12]
    assert len(list((workdir / "plots").glob("*.png"))) >= 5

    # The best step is the first with the best validation score, and its weights are those tested.
    scores = {r["step"]: r["val.slice.accuracy"] for r in rows if "val.slice.loss" in r}
    assert newest(workdir, "best") == max(scores, key=lambda s: (scores[s], -s))
    val = predictions.read(workdir / "predictions_val.csv")
    assert metrics.report_levels(val)["slice"]["accuracy"] == scores[newest(workdir, "best")]

    # Evaluating again changes nothing.
    before = (workdir / "predictions_test.csv").read_bytes()
    train.run(CONFIG, workdir, tmp_path, mode="evaluate")
    assert (workdir / "predictions_test.csv").read_bytes() == before


def test_a_run_stopped_and_resumed_ends_with_the_same_bits(tmp_path, monkeypatch):
    config = changed(CONFIG, "train.save_steps=3", "optim.schedule=cosine")
    train.run(config, tmp_path / "whole", tmp_path)

    judge = Progress.update

    def die_at_8(progress, scores, config, done):
        if done == 8:
            raise KeyboardInterrupt
        return judge(progress, scores, config, done)

    monkeypatch.setattr(Progress, "update", die_at_8)
    with pytest.raises(KeyboardInterrupt):
        train.run(config, tmp_path / "cut", tmp_path)
    assert not ended(tmp_path / "cut", config, 12)
    (tmp_path / "cut/report.json").write_text("of an evaluation in between")

    def judge_again(progress, *rest):
        assert not (tmp_path / "cut/report.json").exists(), "it would pass for the report of the end"
        return judge(progress, *rest)

    monkeypatch.setattr(Progress, "update", judge_again)
    train.run(config, tmp_path / "cut", tmp_path)
    assert ended(tmp_path / "cut", config, 12)

    whole, cut = (last_weights(tmp_path / name, 12) for name in ("whole", "cut"))
    assert whole.keys() == cut.keys() and len(whole) > 20
    for name, array in whole.items():
        np.testing.assert_array_equal(cut[name], array, err_msg=name)
    assert newest(tmp_path / "whole", "best") == newest(tmp_path / "cut", "best")
    a, b = (metrics_log.read(tmp_path / name / "metrics.jsonl") for name in ("whole", "cut"))
    assert [r["step"] for r in a] == [r["step"] for r in b]
    assert [r.get("val.slice.loss") for r in a] == [r.get("val.slice.loss") for r in b]


def test_patience_stops_and_stays_stopped(tmp_path):
    settings = ("train.patience=1", "optim.lr=1e-12", "train.eval_steps=2", "train.steps=40", "train.keep=last")
    config = changed(CONFIG, *settings)
    train.run(config, tmp_path / "run", tmp_path)
    steps = [r["step"] for r in metrics_log.read(tmp_path / "run" / "metrics.jsonl")]
    assert max(steps) == 4  # 2 is the best so far, 4 is no better
    assert ended(tmp_path / "run", config, 40), "patience ended it"
    assert restore_best(tmp_path / "run")[1] == 4, "keep=last tests the last weights, not the best"
    assert json.loads((tmp_path / "run" / "report.json").read_text())["best"]["step"] == 4
    train.run(config, tmp_path / "run", tmp_path)
    assert [r["step"] for r in metrics_log.read(tmp_path / "run" / "metrics.jsonl")] == steps


def test_another_configuration_is_refused_but_for_free_fields(tmp_path, whole):
    shutil.copytree(whole, tmp_path / "run")
    with pytest.raises(ValueError, match=r"optim.lr: 0.003 -> 0.1(.|\n)*--workdir"):
        train.run(changed(CONFIG, "optim.lr=0.1"), tmp_path / "run", tmp_path)
    train.run(changed(CONFIG, "eval.batch_size=5", "data.threads=1"), tmp_path / "run", tmp_path)


def test_other_data_or_a_foreign_folder_is_refused(tmp_path, monkeypatch, small_data, whole):
    shutil.copytree(whole, tmp_path / "run")
    other = dataclasses.replace(small_data, fingerprint="1" * 64)
    monkeypatch.setattr(train, "open_dataset", lambda name, *_, **__: other)
    with pytest.raises(ValueError, match="prepared|other images"):
        train.run(CONFIG, tmp_path / "run", tmp_path)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="not empty"):
        train.run(CONFIG, tmp_path / "foreign", tmp_path)


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("train.monitor=slice.auc", "slice.auc_macro"),
        ("input.size=8", r"input.size.*too small for simple"),
        ("optim.class_weights=1,2", "left, middle, right"),
        ("model.name=simpel", "simple"),
        ("optim.freeze=nothing", "matches no parameter"),
        ("optim.freeze=.", "nothing is left to train"),
        ("optim.tune=blocks:3", "the network has 2 blocks"),
        ("optim.tune=stages:0", "allowed are all, head, blocks:K and stages:K"),
        ("optim.lr_factors=nothing=2", "matches no trained parameter"),
        ("model.weights=run:nowhere", "no trained run"),
        ("model.weights=imagenet", "no ImageNet weights of simple are public"),
        ("model.weights=imagenett", "allowed are none, imagenet"),
        ("model.weights=file:nowhere.h5", "no such file"),
        ("model.padding=symmetric", "simple allows valid, same"),
    ],
)
def test_mistakes_end_before_training_and_leave_the_workdir_free(tmp_path, assignment, words):
    with pytest.raises(ValueError, match=words):
        train.run(changed(CONFIG, assignment), tmp_path / "run", tmp_path)
    assert not (tmp_path / "run").exists()


def make(config, classes=3):
    module = models.build(config.model, classes, remat=config.train.remat)
    shape = (*config.input.size, config.input.network_channels)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, *shape)), train=False))
    optimizer = optim.make_optimizer(config.optim, optim.make_schedule(config.optim, 10), shapes["params"])
    first = state.create(module, optimizer, shape, config.train.seed)
    return first, jax.jit(step.make_train_step(module, optimizer, config, jnp.ones(classes), None))


def batch_of(n, size=40):
    rng = np.random.default_rng(1)
    images = rng.integers(0, 255, (n, size, size, 1), dtype=np.uint8)
    return {"image": jnp.asarray(images), "label": jnp.asarray(rng.integers(0, 3, n), jnp.int32)}


def assert_same_step(a, b, tolerance):
    for name, value in trees.flatten(a.params).items():
        np.testing.assert_allclose(trees.flatten(b.params)[name], value, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("settings", [["model.name=simple"], ["model.name=small_bn", "optim.frozen_batch_norm=frozen"]])
@pytest.mark.parametrize("variant", ["train.accumulate=4", "train.remat=true"])
def test_accumulation_and_remat_make_the_plain_step(settings, variant):
    config = changed(CONFIG, "model.head.dropout=0", "optim.name=sgd", *settings)
    batch = batch_of(8, config.input.size[0])
    first, plain = make(config)
    want, metrics_plain = plain(first, batch)
    got, metrics_other = make(changed(config, variant))[1](first, batch)
    assert any(
        (np.asarray(a) != np.asarray(b)).any()
        for a, b in zip(*map(jax.tree.leaves, (first.params, want.params)), strict=True)
    )
    assert_same_step(want, got, 2e-6)
    np.testing.assert_allclose(metrics_other["loss"], metrics_plain["loss"], rtol=1e-5)


def test_frozen_norm_keeps_its_statistics_and_training_ones_move():
    config = changed(CONFIG, "model.name=small_bn")
    batch = batch_of(8, 32)
    for choice, frozen in (("frozen", True), ("with_layer", False)):  # no layer is frozen here
        first, train_step = make(changed(config, f"optim.frozen_batch_norm={choice}"))
        after, _ = train_step(first, batch)
        same = [
            np.array_equal(a, b)
            for a, b in zip(*map(jax.tree.leaves, (first.batch_stats, after.batch_stats)), strict=True)
        ]
        assert all(same) if frozen else not any(same)


def test_dropout_keys_follow_seed_and_step():
    first, train_step = make(changed(CONFIG, "model.head.dropout=0.5"))
    batch = batch_of(8)
    batch["image"] = batch["image"][:, :32, :32]
    at_0, again = train_step(first, batch)[1]["loss"], train_step(first, batch)[1]["loss"]
    at_1 = train_step(first.replace(step=jnp.ones((), jnp.int32)), batch)[1]["loss"]
    assert at_0 == again and at_0 != at_1


def test_warm_start_takes_all_but_the_head_and_accounts_for_every_name(tmp_path, whole):
    module = models.build(CONFIG.model, 5)
    optimizer = optim.make_optimizer(OptimConfig(), lambda s: 0.1, {})
    fresh = trees.flatten(state.create(module, optimizer, (32, 32, 1), 9).params)
    source = trees.flatten(restore_best(whole)[0]["params"])
    config = load.resolve(changed(CONFIG, f"model.weights=run:{whole}"))
    start = load.leaves(config, module)
    ours = trees.flatten(state.create(module, optimizer, (32, 32, 1), 9, start=start).params)
    assert ours.keys() == fresh.keys() and set(fresh) - set(start) == {"head/dense/kernel", "head/dense/bias"}
    for name, value in fresh.items():
        np.testing.assert_array_equal(ours[name], value if name.startswith("head/dense") else source[name])
        assert name.startswith("head/dense") or np.any(value != source[name])

    # Another network: each name without a counterpart and each unlike shape, and nothing is loaded or written.
    other = changed(config, "model.name=small_bn", "model.head.hidden=")
    problems = (
        r"only in the file: stage3_conv/kernel",
        r"only in the network: stem_bn/scale",
        r"only in the network: stem_bn/mean",
        r"stem_conv/kernel: stem_conv/kernel \(3, 3, 1, 16\) gives \(3, 3, 1, 16\), wanted \(3, 3, 1, 4\)",
    )
    with pytest.raises(ValueError) as error:
        train.run(other, tmp_path / "other", tmp_path)
    for problem in (*problems, rf"model.weights=run:{whole}.* does not fit"):
        assert re.search(problem, str(error.value)), error.value
    assert not (tmp_path / "other").exists()


def test_a_run_from_another_run_ends_like_the_same_steps_in_one(tmp_path):
    """Step 0 has the other run's best weights and statistics, a new classifier, and an optimiser that starts anew."""
    config = changed(CONFIG, "model.name=small_bn", "train.steps=4", "input.mean=0.3", "input.std=0.2")
    train.run(config, tmp_path / "one", tmp_path)
    # Rate (almost) zero: what is saved is what it started from.
    again = changed(
        config, f"model.weights=run:{tmp_path / 'one'}", "optim.lr=1e-30", "input.mean=None", "input.std=None"
    )
    train.run(changed(again, "optim.frozen_batch_norm=frozen"), tmp_path / "two", tmp_path)
    saved = overrides.from_json((tmp_path / "two/config.json").read_text())
    assert (saved.input.mean, saved.input.std) == ((0.3,), (0.2,))
    one, two = (trees.flatten(restore_best(tmp_path / name)[0]) for name in ("one", "two"))
    assert one.keys() == two.keys() and any("batch_stats" in name for name in one)
    for name in one:
        assert np.array_equal(one[name], two[name]) != ("head/dense" in name), name
    # The same command would go on, though its mean and std are still None.
    workdirs.check(tmp_path / "two", load.resolve(changed(again, "optim.frozen_batch_norm=frozen")), "train")


@pytest.mark.parametrize("devices", [8])
def test_eight_devices_make_the_step_and_the_predictions_of_one(tmp_path, devices):
    """13 test examples in batches of 8 on 8 CPU devices; BatchNorm sees the global batch."""
    script = Path(__file__).parents[1] / "run_small.py"
    runs = []
    for n in (1, devices):
        env = {**os.environ, "JAX_NUM_CPU_DEVICES": str(n), "JAX_PLATFORMS": "cpu"}
        runs.append(subprocess.Popen([sys.executable, str(script), str(tmp_path / str(n)), "--tune"], env=env))
    assert [run.wait(300) for run in runs] == [0, 0]
    one, many = (np.load(tmp_path / f"{n}.npz") for n in (1, devices))
    assert many["devices"] == devices and one["ids"].tolist() == many["ids"].tolist() and len(one["ids"]) == 13
    np.testing.assert_allclose(many["probabilities"], one["probabilities"], atol=1e-4)
    np.testing.assert_allclose(many["mean"], one["mean"], atol=1e-5)
    # The best weights of eight devices are read on this one, and start a run on it.
    assert jax.device_count() < devices
    config = overrides.from_json((tmp_path / str(devices) / "config.json").read_text())
    config = changed(config, f"model.weights=run:{tmp_path / str(devices)}")
    start = load.leaves(config, models.build(config.model, 3))
    assert all(isinstance(leaf, np.ndarray) for leaf in start.values())
    np.testing.assert_array_equal(start["stage2_bn/mean"], many["mean"])
    np.testing.assert_allclose(many["tuned"], one["tuned"], atol=1e-4)
    assert np.abs(one["tuned"] - one["probabilities"]).max() > 1e-3
