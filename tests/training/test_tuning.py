"""Fine-tuning: which parameters are trained, the cost of frozen ones, and their BatchNorm."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_runs as runs
from small_runs import changed

from lungjax import models
from lungjax.config import OptimConfig
from lungjax.models import trees
from lungjax.models.convnext import ConvNeXt
from lungjax.models.densenet import DenseNet
from lungjax.models.efficientnet import EfficientNet, Stage, expand
from lungjax.models.inputs import normalize
from lungjax.models.resnet import ResNet
from lungjax.models.transfusion import Transfusion
from lungjax.training import optim

# One network of few layers per order of blocks.
STAGES = expand((Stage(True, 1, 4, 1, 1), Stage(True, 1, 8, 2, 2), Stage(False, 2, 8, 2, 2, squeeze=0.25)), 4)
NETWORKS = {
    "tiny_efficientnet": partial(EfficientNet, STAGES, stem=4, top=16),
    "tiny_resnet": partial(ResNet, (2, 1), bottleneck=False, stride_conv=1, width=4),
    "tiny_resnetv2": partial(ResNet, (1, 1), preact=True, width=4),
    "tiny_convnext": partial(ConvNeXt, (1, 2), (8, 16), drop_path=0.0),
    "tiny_densenet": partial(DenseNet, (2, 1), growth=4, momentum=0.9),
    "tiny_cbr": partial(Transfusion, 3, (4, 8, 8), pool=2),
}
# Trained modules besides the head, by hand.
TRAINED_MODULES = {
    ("tiny_efficientnet", "blocks:1"): "stage3_block2 top_conv top_bn",
    ("tiny_efficientnet", "blocks:3"): "stage2_block1 stage3_block1 stage3_block2 top_conv top_bn",
    ("tiny_efficientnet", "stages:1"): "stage3_block1 stage3_block2 top_conv top_bn",
    ("tiny_resnet", "blocks:1"): "stage2_block1",
    ("tiny_resnet", "blocks:2"): "stage1_block2 stage2_block1",
    ("tiny_resnet", "stages:2"): "stage1_block1 stage1_block2 stage2_block1",
    ("tiny_resnetv2", "blocks:1"): "stage2_block1 top_bn",
    ("tiny_convnext", "blocks:2"): "stage2_block1 stage2_block2",  # the blocks without the downsampling before them
    ("tiny_convnext", "blocks:3"): "stage1_block1 stage2_downsample stage2_block1 stage2_block2",
    ("tiny_convnext", "stages:1"): "stage2_downsample stage2_block1 stage2_block2",
    ("tiny_densenet", "blocks:2"): "stage1_block2 stage1_transition stage2_block1 top_bn",
    ("tiny_densenet", "stages:2"): "stage1_block1 stage1_block2 stage1_transition stage2_block1 top_bn",
    ("tiny_cbr", "blocks:1"): "stage3_conv stage3_bn",
    ("tiny_cbr", "stages:2"): "stage2_conv stage2_bn stage3_conv stage3_bn",
    **{(name, "head"): "" for name in NETWORKS},
}
FREEZE = "optim.freeze=^stem|^stage1"
slow = partial(pytest.param, marks=pytest.mark.slow)
FAMILIES = ["tiny_cbr", slow("tiny_efficientnet"), slow("tiny_resnet"), slow("tiny_densenet")]
REMAT = ["false", slow("true")]


@pytest.fixture(autouse=True)
def networks(monkeypatch):
    for name, network in NETWORKS.items():
        monkeypatch.setitem(models.MODELS, name, network)


def side(name):
    return 24 if name == "tiny_cbr" else 16


def config_of(name, *assignments):
    """Returns a configuration of plain gradient descent without dropout, whose updates are scaled gradients."""
    plain = changed(
        runs.PLAIN, f"model.name={name}", f"input.size={side(name)}", "model.head.dropout=0", "optim.name=sgd",
        "optim.lr=0.125", "optim.momentum=0", "optim.schedule=constant", "optim.freeze=",
    )  # fmt: skip
    if name in ("tiny_efficientnet", "tiny_convnext"):
        plain = changed(plain, "model.drop_path=0")
    return changed(plain, *assignments)


def shapes(name):
    images = jnp.zeros((1, side(name), side(name), 1))
    return jax.eval_shape(lambda: NETWORKS[name](outputs=3).init(jax.random.key(0), images, train=False))["params"]


def test_tune_trains_last_units_and_what_follows():
    params = {name: shapes(name) for name in NETWORKS}
    for (name, tune), modules in TRAINED_MODULES.items():
        paths = set(trees.flatten(params[name]))
        trained = {*modules.split(), "head"}
        assert trained <= set(params[name])
        expected = {path for path in paths if path.partition("/")[0] in trained}
        assert paths - optim.frozen_paths(OptimConfig(tune=tune), params[name]) == expected, (name, tune)


def test_freeze_adds_to_tune():
    params = shapes("tiny_efficientnet")
    assert optim.frozen_paths(OptimConfig(), params) == frozenset()
    blocks = optim.frozen_paths(OptimConfig(tune="blocks:2"), params)
    both = optim.frozen_paths(OptimConfig(tune="blocks:2", freeze=r"bn\d?/|^top_conv"), params)
    assert blocks < both == blocks | {path for path in trees.flatten(params) if "bn" in path} | {"top_conv/kernel"}
    # The regular expression in the experiments of the studies.
    head = optim.frozen_paths(OptimConfig(tune="head"), params)
    assert optim.frozen_paths(OptimConfig(freeze=r"^(?!head/)"), params) == head


def test_invalid_tune_and_freeze():
    params = shapes("tiny_efficientnet")
    counts = {"blocks:5": "has 4 blocks", "stages:4": "has 3 stages"}
    names = ("blocks:0", "stages:0", "blocks", "blocks:", "blocks:-1", "blocks:two", "blocks:²", "layers:2", "")
    for tune, hint in (counts | dict.fromkeys(names, "expected all, head")).items():
        with pytest.raises(ValueError, match=hint):
            optim.frozen_paths(OptimConfig(tune=tune), params)
    for tune, freeze, hint in (
        ("all", "^stage9", "matches no parameter"),
        ("all", ".", "every parameter"),
        ("head", "^head/", "every parameter"),
        ("all", "(stem", "regular expression"),
    ):
        with pytest.raises(ValueError, match=hint):
            optim.frozen_paths(OptimConfig(tune=tune, freeze=freeze), params)


@pytest.mark.parametrize(
    ("name", "variant"), [("tiny_cbr", "train.accumulate=2"), slow("tiny_efficientnet", "train.remat=true")]
)
def test_frozen_parameters_stay_bit_exact(name, variant):
    config = config_of(name, "optim.name=adamw", "optim.weight_decay=0.1", "optim.lr=0.01", "optim.tune=head", variant)
    first = runs.first_state(config)
    before, current = jax.device_get(first), first
    for _ in range(3):
        current, _ = runs.build(config).train_step(current, runs.batch_of(config))
    trained = set(trees.flatten(before.params)) - runs.frozen_paths(config)
    assert runs.different(before.params, jax.device_get(current.params)) == trained


@pytest.mark.parametrize("name", ["tiny_cbr", slow("tiny_resnet"), slow("tiny_densenet")])
def test_no_backward_pass_below_trained_layers(name):
    flops = {}
    for tune in ("head", "blocks:1", "all"):
        config = config_of(name, f"optim.tune={tune}")
        built = runs.build(config)
        flops[tune] = built.train_step.lower(built.abstract_state, runs.batch_of(config)).cost_analysis()["flops"]
    assert flops["head"] < 0.5 * flops["all"]
    assert flops["head"] < flops["blocks:1"] < 0.85 * flops["all"]


@pytest.mark.parametrize(
    ("name", "norms"), [("tiny_cbr", "frozen"), slow("tiny_convnext", "update"), slow("tiny_densenet", "update")]
)
def test_tuned_gradients_equal_full_training(name, norms):
    config = config_of(name, f"optim.frozen_batch_norm={norms}")
    _, full, metrics = runs.one_step(config)
    tuning = changed(config, "optim.tune=blocks:1")
    _, tuned, tuned_metrics = runs.one_step(tuning)
    np.testing.assert_allclose(tuned_metrics["loss"], metrics["loss"], rtol=1e-6)
    full, tuned, frozen = trees.flatten(full.params), trees.flatten(tuned.params), runs.frozen_paths(tuning)
    assert frozen
    for path in full.keys() - frozen:
        np.testing.assert_allclose(tuned[path], full[path], rtol=1e-5, atol=1e-6, err_msg=path)


@pytest.mark.parametrize("remat", REMAT)
@pytest.mark.parametrize("name", FAMILIES)
def test_statistics_of_frozen_layers(name, remat):
    """With all norms frozen, the training loss is that of evaluation; with none, it is that of batch statistics."""
    result = {
        choice: runs.one_step(config_of(name, FREEZE, f"optim.frozen_batch_norm={choice}", f"train.remat={remat}"))
        for choice in ("with_layer", "update", "frozen")
    }
    config = config_of(name, FREEZE)
    batch, module, before = runs.batch_of(config), runs.build(config).module, result["update"][0]
    paths = set(trees.flatten(before.batch_stats))
    frozen = {path for path in paths if path.startswith(("stem", "stage1"))}
    for choice, constant in (("with_layer", frozen), ("update", set()), ("frozen", paths)):
        assert paths - runs.different(before.batch_stats, result[choice][1].batch_stats) == constant, choice

    @partial(jax.jit, static_argnums=0)
    def loss(train):
        images = normalize(batch["image"], config.input)
        (logits, _), _ = module.apply(before.variables, images, train=train, mutable=["batch_stats"])
        return -jax.nn.log_softmax(logits)[jnp.arange(8), batch["label"]].mean()

    running, batchwise, partly = loss(False), loss(True), result["with_layer"][2]["loss"]
    assert min(abs(running - batchwise), abs(partly - running), abs(partly - batchwise)) > 1e-3
    np.testing.assert_allclose(result["frozen"][2]["loss"], running, rtol=1e-5)
    np.testing.assert_allclose(result["update"][2]["loss"], batchwise, rtol=1e-5)


def test_norm_with_a_trained_scale_updates():
    config = config_of("tiny_cbr", "optim.freeze=stem_conv|stage2_bn/bias", "optim.frozen_batch_norm=with_layer")
    before, after, _ = runs.one_step(config)
    assert runs.different(before.batch_stats, after.batch_stats) == set(trees.flatten(before.batch_stats))


def test_norm_in_the_head_is_trained():
    config = config_of("tiny_cbr", "optim.tune=head", "model.head.norm_after_pool=batch")
    before, after, _ = runs.one_step(config)
    statistics = {"head/norm_after_pool/mean", "head/norm_after_pool/var"}
    assert runs.different(before.batch_stats, after.batch_stats) == statistics
    assert "head/norm_after_pool/scale" in runs.different(before.params, after.params)
