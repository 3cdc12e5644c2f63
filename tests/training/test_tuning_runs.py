"""Whole runs that fine-tune another run's network."""

import dataclasses
import json
from functools import partial

import jax
import numpy as np
import pytest
from conftest import without_pictures
from orbax.checkpoint import v1 as ocp

from lungjax import models
from lungjax.config import Config, EvalConfig, HeadConfig, InputSpec, ModelConfig, OptimConfig, TrainConfig, overrides
from lungjax.models import trees
from lungjax.models.transfusion import Transfusion
from lungjax.runtime.checkpoint import newest, restore_best
from lungjax.training import train
from lungjax.training.early_stopping import Progress

TINY = partial(Transfusion, 3, (4, 8, 8), pool=2)


@pytest.fixture(autouse=True)
def opened(monkeypatch, small_data):
    monkeypatch.setitem(models.MODELS, "tiny_cbr", TINY)
    monkeypatch.setattr(train, "open_dataset", lambda name, *_, **__: small_data)
    without_pictures(monkeypatch)


def changed(config, *assignments):
    for assignment in assignments:
        config = overrides.override(config, assignment)
    return config


def moved(before, after):
    """Paths of the leaves that are not bit for bit the same."""
    before, after = trees.flatten(before), trees.flatten(after)
    assert before.keys() == after.keys()
    return {path for path in before if not np.array_equal(before[path], after[path])}


SMALL = Config(
    name="small",
    input=InputSpec(size=(24, 24)),
    model=ModelConfig(name="tiny_cbr", head=HeadConfig(dropout=0.2)),
    optim=OptimConfig(lr=3e-3),
    train=TrainConfig(batch_size=8, steps=6, eval_steps=2, log_steps=2, monitor="slice.accuracy"),
    eval=EvalConfig(batch_size=8, examples=1, draws=0),
)


@pytest.fixture(scope="module")
def source(tmp_path_factory, small_data):
    """A run on gray images that its network sees as three channels, each normalised in its own way."""
    folder = tmp_path_factory.mktemp("source") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, "tiny_cbr", TINY)
        patch.setattr(train, "open_dataset", lambda name, *_, **__: small_data)
        without_pictures(patch)
        train.run(changed(SMALL, "input.mean=0.4,0.5,0.6", "input.std=0.2,0.3,0.4"), folder, folder.parent)
    return folder


def test_a_head_on_another_run_s_network(tmp_path, source):
    config = changed(SMALL, f"model.weights=run:{source}", "optim.tune=head", "optim.lr_factors=bias$=2")
    report = train.run(config, tmp_path / "run", tmp_path)
    assert (
        report.is_file() and 0 <= json.loads(report.with_suffix(".json").read_text())["test"]["slice"]["accuracy"] <= 1
    )
    saved = overrides.from_json((tmp_path / "run/config.json").read_text())
    assert (saved.input.mean, saved.input.std) == ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    assert saved == dataclasses.replace(config, input=saved.input)
    theirs, ours = (trees.flatten(restore_best(folder)[0]) for folder in (source, tmp_path / "run"))
    assert ours["params/stem_conv/kernel"].shape == (3, 3, 3, 4)
    assert moved(theirs, ours) == {"params/head/dense/kernel", "params/head/dense/bias"}
    train.run(config, tmp_path / "run", tmp_path, mode="evaluate")


def test_statistics_of_a_frozen_network_follow_the_new_data_if_told_to(tmp_path, source):
    config = changed(SMALL, f"model.weights=run:{source}", "optim.tune=head", "optim.frozen_batch_norm=update")
    train.run(config, tmp_path / "run", tmp_path)
    theirs, ours = (restore_best(folder)[0] for folder in (source, tmp_path / "run"))
    assert moved(theirs["params"], ours["params"]) == {"head/dense/kernel", "head/dense/bias"}
    assert moved(theirs["batch_stats"], ours["batch_stats"]) == set(trees.flatten(ours["batch_stats"]))


def test_three_unlike_channels_cannot_be_folded_into_one(tmp_path, source):
    config = changed(SMALL, f"model.weights=run:{source}", "optim.tune=head", "model.gray=fold")
    with pytest.raises(ValueError, match="model.gray=fold.*differ by channel"):
        train.run(config, tmp_path / "run", tmp_path)
    assert not (tmp_path / "run").exists()


def test_a_tuning_run_stopped_and_resumed_ends_with_the_same_bits(tmp_path, monkeypatch, source):
    config = changed(SMALL, f"model.weights=run:{source}", "optim.tune=head", "optim.schedule=cosine")
    train.run(config, tmp_path / "whole", tmp_path)
    judge = Progress.update

    def die_at_4(progress, scores, config, done):
        if done == 4:
            raise KeyboardInterrupt
        return judge(progress, scores, config, done)

    monkeypatch.setattr(Progress, "judge", die_at_4)
    with pytest.raises(KeyboardInterrupt):
        train.run(config, tmp_path / "cut", tmp_path)
    assert newest(tmp_path / "cut", "last") == 2
    monkeypatch.setattr(Progress, "judge", judge)
    train.run(config, tmp_path / "cut", tmp_path)
    whole, cut = (restore_whole(tmp_path / name) for name in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    for path, leaf in whole.items():
        np.testing.assert_array_equal(cut[path], leaf, err_msg=path)
    frozen = {path for path in whole if "stem_conv" in path}
    assert len(frozen) == 2  # kernel and bias, and none of the optimiser's
    assert newest(tmp_path / "whole", "best") == newest(tmp_path / "cut", "best")


def restore_whole(workdir):
    """Every array of the last state by path, optimiser included, read without lungjax."""
    found = ocp.load_checkpointables(workdir.absolute() / "checkpoints" / "last" / "6")["state"]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(found)}
