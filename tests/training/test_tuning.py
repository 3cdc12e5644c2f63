"""Fine-tuning: which parameters are trained, what the frozen ones cost, and what their norms do."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_weights import random_variables

from lungjax import models
from lungjax.config import Config, HeadConfig, InputSpec, ModelConfig, OptimConfig, TrainConfig, overrides
from lungjax.models import trees
from lungjax.models.convnext import ConvNeXt
from lungjax.models.densenet import DenseNet
from lungjax.models.efficientnet import EfficientNet, Stage
from lungjax.models.inputs import normalize
from lungjax.models.resnet import ResNet
from lungjax.models.transfusion import Transfusion
from lungjax.training import optim, state, step

# One of each order of units, in few layers: (network, image side).
NETWORKS = {
    "tiny_efficientnet": (
        partial(
            EfficientNet,
            (Stage(True, 1, 4, 1, 1), Stage(True, 1, 8, 2, 2), Stage(False, 2, 8, 2, 2, squeeze=0.25)),
            stem=4,
            top=16,
        ),
        16,
    ),
    "tiny_resnet": (partial(ResNet, (2, 1), bottleneck=False, stride_conv=1, width=4), 16),
    "tiny_resnetv2": (partial(ResNet, (1, 1), preact=True, width=4), 16),
    "tiny_convnext": (partial(ConvNeXt, (1, 2), (8, 16), drop_path=0.0), 16),
    "tiny_densenet": (partial(DenseNet, (2, 1), growth=4, momentum=0.9), 16),
    "tiny_cbr": (partial(Transfusion, 3, (4, 8, 8), pool=2), 24),
}
# What is trained, by hand: names of the first level. "head" is always trained.
TOP = {"top_conv", "top_bn"}
TRAINED = {
    ("tiny_efficientnet", "blocks:1"): {"stage3_block2"} | TOP,
    ("tiny_efficientnet", "blocks:3"): {"stage2_block1", "stage3_block1", "stage3_block2"} | TOP,
    ("tiny_efficientnet", "stages:1"): {"stage3_block1", "stage3_block2"} | TOP,
    ("tiny_efficientnet", "stages:2"): {"stage2_block1", "stage3_block1", "stage3_block2"} | TOP,
    ("tiny_resnet", "blocks:1"): {"stage2_block1"},
    ("tiny_resnet", "blocks:2"): {"stage1_block2", "stage2_block1"},
    ("tiny_resnet", "stages:1"): {"stage2_block1"},
    ("tiny_resnet", "stages:2"): {"stage1_block1", "stage1_block2", "stage2_block1"},
    ("tiny_resnetv2", "blocks:1"): {"stage2_block1", "top_bn"},
    ("tiny_convnext", "blocks:1"): {"stage2_block2"},
    ("tiny_convnext", "blocks:2"): {"stage2_block1", "stage2_block2"},  # the downsampling before them is not theirs
    ("tiny_convnext", "blocks:3"): {"stage1_block1", "stage2_downsample", "stage2_block1", "stage2_block2"},
    ("tiny_convnext", "stages:1"): {"stage2_downsample", "stage2_block1", "stage2_block2"},
    ("tiny_convnext", "stages:2"): {"stage1_block1", "stage2_downsample", "stage2_block1", "stage2_block2"},
    ("tiny_densenet", "blocks:1"): {"stage2_block1", "top_bn"},
    ("tiny_densenet", "blocks:2"): {"stage1_block2", "stage1_transition", "stage2_block1", "top_bn"},
    ("tiny_densenet", "stages:1"): {"stage2_block1", "top_bn"},
    ("tiny_densenet", "stages:2"): {"stage1_block1", "stage1_block2", "stage1_transition", "stage2_block1", "top_bn"},
    ("tiny_cbr", "blocks:1"): {"stage3_conv", "stage3_bn"},
    ("tiny_cbr", "blocks:2"): {"stage2_conv", "stage2_bn", "stage3_conv", "stage3_bn"},
    ("tiny_cbr", "stages:1"): {"stage3_conv", "stage3_bn"},
    ("tiny_cbr", "stages:2"): {"stage2_conv", "stage2_bn", "stage3_conv", "stage3_bn"},
    **{(name, "head"): set() for name in NETWORKS},
}


@pytest.fixture(autouse=True)
def named(monkeypatch):
    for name, (network, _) in NETWORKS.items():
        monkeypatch.setitem(models.MODELS, name, network)


def changed(config, *assignments):
    for assignment in assignments:
        config = overrides.override(config, assignment)
    return config


def config_of(name, *assignments):
    side = NETWORKS[name][1]
    config = Config(
        input=InputSpec(size=(side, side)),
        model=ModelConfig(name=name, drop_path=0.0 if name == "tiny_convnext" else None, head=HeadConfig(dropout=0.0)),
        optim=OptimConfig(name="sgd", lr=0.125, momentum=0.0),
        train=TrainConfig(batch_size=8),
    )
    if name == "tiny_efficientnet":
        config = changed(config, "model.drop_path=0")
    return changed(config, *assignments)


@cache
def shapes(name):
    network, side = NETWORKS[name]
    images = jnp.zeros((1, side, side, 1))
    return jax.eval_shape(lambda: network(outputs=3).init(jax.random.key(0), images, train=False))["params"]


def set_up(config):
    """The state with random weights and statistics, the step not yet compiled, and the frozen paths: as a run has."""
    module = models.build(config.model, 3, remat=config.train.remat)
    frozen = optim.frozen_paths(config.optim, shapes(config.model.name))
    trained = trees.split(shapes(config.model.name), frozen)[0]
    optimizer = optim.make_optimizer(config.optim, optim.make_schedule(config.optim, 10), trained)
    shape = (*config.input.size, 1)
    start = {
        path: leaf for tree in random_variables(module, shape).values() for path, leaf in trees.flatten(tree).items()
    }
    first = jax.jit(partial(state.create, module, optimizer, shape, 0, frozen))(start)
    return first, jax.jit(step.make_train_step(module, optimizer, config, jnp.ones(3), None, frozen)), frozen


def batch_of(config, n=8):
    rng = np.random.default_rng(1)
    images = rng.integers(0, 255, (n, *config.input.size, 1), dtype=np.uint8)
    return {"image": jnp.asarray(images), "label": jnp.asarray(rng.integers(0, 3, n), jnp.int32)}


@cache
def one_step(name, *assignments):
    """The state before, the state after, the step's metrics and the frozen paths, compiled once for all tests."""
    config = config_of(name, *assignments)
    first, train_step, frozen = set_up(config)
    return first, *train_step(first, batch_of(config)), frozen


def moved(before, after):
    """Paths of the leaves that are not bit for bit the same."""
    before, after = trees.flatten(before), trees.flatten(after)
    assert before.keys() == after.keys()
    return {path for path in before if not np.array_equal(before[path], after[path])}


# Which


@pytest.mark.parametrize(("name", "tune"), TRAINED)
def test_tune_trains_the_last_units_and_all_that_follows(name, tune):
    params = shapes(name)
    paths = set(trees.flatten(params))
    trained = TRAINED[name, tune] | {"head"}
    assert trained <= set(params)
    assert paths - optim.frozen_paths(OptimConfig(tune=tune), params) == {
        path for path in paths if path.partition("/")[0] in trained
    }


def test_all_freezes_nothing_and_freeze_adds_to_tune():
    params = shapes("tiny_efficientnet")
    assert optim.frozen_paths(OptimConfig(), params) == frozenset()
    blocks = optim.frozen_paths(OptimConfig(tune="blocks:2"), params)
    both = optim.frozen_paths(OptimConfig(tune="blocks:2", freeze=r"bn\d?/|^top_conv"), params)
    more = {path for path in trees.flatten(params) if "bn" in path} | {"top_conv/kernel"}
    assert both == blocks | more and blocks < both
    # What the regular expressions of the studies' code say without `tune`.
    assert optim.frozen_paths(OptimConfig(freeze=r"^(?!head/)"), params) == optim.frozen_paths(
        OptimConfig(tune="head"), params
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tune": "blocks:5"}, "optim.tune='blocks:5': the network has 4 blocks"),
        ({"tune": "stages:4"}, "optim.tune='stages:4': the network has 3 stages"),
        *(
            ({"tune": tune}, f"optim.tune='{tune}': allowed are all, head, blocks:K and stages:K")
            for tune in (
                "blocks:0",
                "stages:0",
                "blocks",
                "blocks:",
                "blocks:-1",
                "blocks:two",
                "blocks:²",
                "layers:2",
                "",
            )
        ),
        ({"freeze": "^stage9"}, "optim.freeze='\\^stage9' matches no parameter, such as '"),
        ({"freeze": "."}, "optim.tune='all', optim.freeze='.' match every parameter: nothing is left to train"),
        ({"tune": "head", "freeze": "^head/"}, "match every parameter: nothing is left to train"),
        ({"freeze": "(stem"}, "optim.freeze='\\(stem': not a regular expression"),
    ],
)
def test_settings_that_mean_nothing_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        optim.frozen_paths(OptimConfig(**settings), shapes("tiny_efficientnet"))


# What frozen parameters do and cost


@pytest.mark.parametrize(
    ("tune", "variant"), [("head", ()), ("blocks:1", ("train.remat=true",)), ("blocks:1", ("train.accumulate=2",))]
)
def test_frozen_parameters_stay_bit_for_bit_and_the_others_move(tune, variant):
    decay = ("optim.name=adamw", "optim.weight_decay=0.1", "optim.lr=0.01")
    config = config_of("tiny_efficientnet", f"optim.tune={tune}", *decay, *variant)
    first, train_step, frozen = set_up(config)
    after = first
    for _ in range(3):
        after, _ = train_step(after, batch_of(config))
    # A drop path is closed and dropout off, so every trained parameter has a gradient.
    assert moved(first.params, after.params) == set(trees.flatten(first.params)) - frozen
    assert jax.tree.structure(first) == jax.tree.structure(after)


@pytest.mark.parametrize(("optimizer", "copies"), [("adamw", 2), ("sgd", 1), ("rmsprop", 2)])
def test_the_optimizer_keeps_nothing_for_frozen_parameters(optimizer, copies):
    settings = (f"optim.name={optimizer}", "optim.momentum=0.9", "optim.clip_norm=1", "optim.weight_decay=0.1")
    for tune in ("head", "blocks:1", "all"):
        first, _, frozen = set_up(config_of("tiny_resnet", f"optim.tune={tune}", *settings))
        trained = [leaf for path, leaf in trees.flatten(first.params).items() if path not in frozen]
        kept = [leaf for leaf in jax.tree.leaves(first.opt_state) if leaf.ndim]
        assert len(kept) == copies * len(trained)
        assert sum(leaf.size for leaf in kept) == copies * sum(leaf.size for leaf in trained)


def flops(function, *args):
    return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]


@pytest.mark.parametrize("name", ["tiny_resnet", "tiny_densenet"])
def test_nothing_runs_backwards_below_the_lowest_trained_layer(name):
    costs = {}
    for tune in ("head", "blocks:1", "all"):
        config = config_of(name, f"optim.tune={tune}")
        first, train_step, _ = set_up(config)
        costs[tune] = flops(train_step, first, batch_of(config))
    module = models.build(config.model, 3)
    images = jnp.zeros((8, *config.input.size, 1))
    forward = flops(lambda v, x: module.apply(v, x, train=False)[0], first.variables, images)
    assert costs["head"] < 1.15 * forward
    assert costs["head"] < 0.5 * costs["all"]
    assert costs["head"] < costs["blocks:1"] < 0.85 * costs["all"]


@pytest.mark.parametrize(
    ("name", "norms"), [("tiny_resnet", "frozen"), ("tiny_convnext", "update"), ("tiny_densenet", "update")]
)
def test_trained_parameters_get_the_gradients_of_full_training(name, norms):
    """With plain gradient descent the step is the gradient."""
    setting = f"optim.frozen_batch_norm={norms}"
    first, full, metrics, _ = one_step(name, setting)
    _, tuned, tuned_metrics, frozen = one_step(name, setting, "optim.tune=blocks:1")
    assert frozen
    np.testing.assert_allclose(tuned_metrics["loss"], metrics["loss"], rtol=1e-6)
    before, full, tuned = (trees.flatten(each.params) for each in (first, full, tuned))
    for path in before.keys() - frozen:
        np.testing.assert_allclose(tuned[path], full[path], rtol=1e-5, atol=1e-6, err_msg=path)


def test_lr_factors_are_factors_of_the_step():
    first, plain, *_ = one_step("tiny_resnet", "optim.tune=blocks:1", "optim.frozen_batch_norm=frozen")
    factors = "optim.lr_factors=^head/dense/bias=0,^head/=4,kernel$=0.5"
    _, scaled, _, frozen = one_step("tiny_resnet", "optim.tune=blocks:1", "optim.frozen_batch_norm=frozen", factors)
    before, plain, scaled = (trees.flatten(each.params) for each in (first, plain, scaled))
    for path in before.keys() - frozen:
        factor = 0 if path == "head/dense/bias" else 4 if path.startswith("head/") else 0.5 if "kernel" in path else 1
        wanted = factor * (np.asarray(plain[path], np.float64) - before[path])
        # The step is exact; its sum with a parameter near 1 is rounded.
        np.testing.assert_allclose(scaled[path] - np.float64(before[path]), wanted, atol=4e-7, err_msg=path)
        assert factor == 0 or np.any(wanted)
    with pytest.raises(ValueError, match="'\\^stem=0.1' matches no trained parameter, such as '(head|stage2)"):
        set_up(config_of("tiny_resnet", "optim.tune=blocks:1", "optim.lr_factors=^stem=0.1"))


# What norms do


FREEZE = "optim.freeze=^stem|^stage1"
STATISTICS = ["tiny_efficientnet", "tiny_resnet", "tiny_densenet", "tiny_cbr"]


def kept_statistics(name, *assignments):
    first, after, _, _ = one_step(name, *assignments)
    paths = set(trees.flatten(first.batch_stats))
    return paths - moved(first.batch_stats, after.batch_stats), paths


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        *((name, variant) for name in STATISTICS for variant in [(), ("train.remat=true",)]),
        ("tiny_cbr", ("train.accumulate=2",)),
    ],
)
def test_with_layer_keeps_the_statistics_of_frozen_layers_alone(name, variant):
    kept, paths = kept_statistics(name, FREEZE, "optim.frozen_batch_norm=with_layer", *variant)
    assert kept == {path for path in paths if path.startswith(("stem", "stage1"))}
    assert kept and paths - kept


@pytest.mark.parametrize("variant", [(), ("train.remat=true",)])
@pytest.mark.parametrize(("choice", "all_kept"), [("update", False), ("frozen", True)])
@pytest.mark.parametrize("name", ["tiny_densenet", "tiny_cbr"])
def test_update_moves_all_statistics_and_frozen_none(name, choice, all_kept, variant):
    kept, paths = kept_statistics(name, FREEZE, f"optim.frozen_batch_norm={choice}", *variant)
    assert kept == (paths if all_kept else set())


def test_a_norm_whose_scale_is_trained_goes_on_updating():
    kept, _ = kept_statistics("tiny_cbr", "optim.freeze=stem_conv|stage2_bn/bias", "optim.frozen_batch_norm=with_layer")
    assert kept == set()


@pytest.mark.parametrize("remat", ["false", "true"])
@pytest.mark.parametrize("name", ["tiny_efficientnet", "tiny_cbr"])
def test_norms_that_keep_their_statistics_normalise_with_them(name, remat):
    """The loss of a step whose every norm is in a frozen layer is that of evaluation; else that of the batch."""
    config = config_of(name, "optim.tune=head")
    batch = batch_of(config)
    first = set_up(config)[0]
    module = models.build(config.model, 3)

    @partial(jax.jit, static_argnums=0)
    def loss(by_batch):
        images = normalize(batch["image"], config.input)
        (logits, _), _ = module.apply(first.variables, images, train=by_batch, mutable=["batch_stats"])
        return -jax.nn.log_softmax(logits)[jnp.arange(8), batch["label"]].mean()

    wanted = {"with_layer": loss(False), "frozen": loss(False), "update": loss(True)}
    assert abs(wanted["update"] - wanted["frozen"]) > 1e-2
    for choice, value in wanted.items():
        metrics = one_step(name, "optim.tune=head", f"optim.frozen_batch_norm={choice}", f"train.remat={remat}")[2]
        np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5, err_msg=choice)


@pytest.mark.parametrize("name", STATISTICS)
def test_remat_makes_the_same_tuning_step(name):
    _, plain, _, _ = one_step(name, FREEZE, "optim.frozen_batch_norm=with_layer")
    _, remat, _, _ = one_step(name, FREEZE, "optim.frozen_batch_norm=with_layer", "train.remat=true")
    for collection in ("params", "batch_stats"):
        other = trees.flatten(getattr(remat, collection))
        for path, leaf in trees.flatten(getattr(plain, collection)).items():
            np.testing.assert_allclose(other[path], leaf, rtol=1e-5, atol=2e-6, err_msg=path)


def test_a_norm_in_the_head_is_trained_with_it():
    name = "tiny_cbr"
    config = config_of(name, "optim.tune=head", "model.head.norm_after_pool=batch")
    module = models.build(config.model, 3)
    shape = (*config.input.size, 1)
    params = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, *shape)), train=False))["params"]
    frozen = optim.frozen_paths(config.optim, params)
    optimizer = optim.make_optimizer(config.optim, lambda s: 0.1, trees.split(params, frozen)[0])
    first = jax.jit(partial(state.create, module, optimizer, shape, 0, frozen))()
    train_step = jax.jit(step.make_train_step(module, optimizer, config, jnp.ones(3), None, frozen))
    after, _ = train_step(first, batch_of(config))
    assert moved(first.batch_stats, after.batch_stats) == {"head/norm_after_pool/mean", "head/norm_after_pool/var"}
    assert "head/norm_after_pool/scale" in moved(first.params, after.params)
