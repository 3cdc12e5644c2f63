import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.utils.class_weight import compute_class_weight

from lungjax.config import OptimConfig
from lungjax.models import trees
from lungjax.training import optim

PARAMS = {
    "stem_conv": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)},
    "head": {"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}},
}


def updated(config: OptimConfig, grads=None, steps=1, params=PARAMS):
    optimizer = optim.make_optimizer(config, optim.make_schedule(config, 10), params)
    opt_state = optimizer.init(params)
    for _ in range(steps):
        updates, opt_state = optimizer.update(grads or jax.tree.map(jnp.ones_like, params), opt_state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_schedules_by_hand():
    warm = optim.make_schedule(OptimConfig(lr=1.0, schedule="cosine", warmup_steps=4, end_factor=0.1), 104)
    np.testing.assert_allclose([warm(i) for i in range(5)], [0.25, 0.5, 0.75, 1.0, 1.0])
    np.testing.assert_allclose(warm(54), 0.55, rtol=1e-6)  # half-way down from 1 to 0.1
    np.testing.assert_allclose(warm(104), 0.1, rtol=1e-6)
    one = optim.make_schedule(OptimConfig(lr=1.0, warmup_steps=1), 10)
    np.testing.assert_allclose([one(0), one(5)], [1.0, 1.0])
    falls = optim.make_schedule(OptimConfig(lr=1.0, schedule="step", decay_at=(0.5, 0.8)), 10)
    np.testing.assert_allclose([falls(4), falls(5), falls(9)], [1.0, 0.1, 0.01], rtol=1e-6)
    line = optim.make_schedule(OptimConfig(lr=1.0, schedule="linear"), 10)
    np.testing.assert_allclose([line(0), line(5), line(10)], [1.0, 0.5, 0.0])


def test_momentum_weight_decay_and_clip_norm_by_hand():
    config = OptimConfig(name="sgd", lr=0.1, momentum=0.9)
    np.testing.assert_allclose(updated(config, steps=2)["head"]["dense"]["bias"], 1 - 0.1 - 0.19, rtol=1e-6)
    config = OptimConfig(name="sgd", lr=0.1, momentum=0.0, weight_decay=0.5)
    params = updated(config, grads=jax.tree.map(jnp.zeros_like, PARAMS))
    np.testing.assert_allclose(params["stem_conv"]["kernel"], 0.95)
    np.testing.assert_allclose(params["stem_conv"]["bias"], 1.0)  # only kernels decay
    params = updated(OptimConfig(name="sgd", lr=1.0, momentum=0.0, clip_norm=0.5))
    moved = jax.tree.map(lambda a, b: a - b, params, PARAMS)
    np.testing.assert_allclose(optax.tree.norm(moved), 0.5, rtol=1e-5)


def test_no_optimizer_state_for_frozen_parameters():
    config = OptimConfig(freeze=r"^(?!head/)", weight_decay=0.1)
    frozen = optim.frozen_paths(config, PARAMS)
    assert frozen == {"stem_conv/kernel", "stem_conv/bias"}
    optimizer = optim.make_optimizer(config, lambda step: 0.1, trees.split(PARAMS, frozen)[0])
    opt_state = optimizer.init(trees.split(PARAMS, frozen)[0])
    assert sum(leaf.size for leaf in jax.tree.leaves(opt_state) if leaf.ndim) == 2 * (6 + 3)  # Adam's two of each


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_lr_factors_scale_updates(name):
    config = OptimConfig(name=name, lr=0.1, weight_decay=0.5)
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), PARAMS)
    factors = ("^head/dense/bias=0", "^head/=8", "kernel$=0.5")
    plain, scaled = {}, {}
    for result, setting in ((plain, ()), (scaled, factors)):
        changed = dataclasses.replace(config, lr_factors=setting)
        optimizer = optim.make_optimizer(changed, optim.make_schedule(changed, 10), PARAMS)
        opt_state = optimizer.init(PARAMS)
        for _ in range(2):  # with optimizer state
            updates, opt_state = optimizer.update(grads, opt_state, PARAMS)
        result |= trees.flatten(updates)
    expected = {"stem_conv/kernel": 0.5, "stem_conv/bias": 1, "head/dense/kernel": 8, "head/dense/bias": 0}
    for path, factor in expected.items():
        assert np.all(plain[path] != 0)
        np.testing.assert_array_equal(scaled[path], plain[path] * np.float32(factor), err_msg=path)


def test_invalid_lr_factors():
    malformed = ("^head/", "^head/=fast", "^head/=-1", "^head/=nan", "^head/=inf", "=2")
    hints = {"block9=2": "matches no trained parameter", "(head=2": "not a regular expression"}
    for setting, hint in (hints | dict.fromkeys(malformed, "expected REGEX=FACTOR")).items():
        with pytest.raises(ValueError, match=f"optim.lr_factors.*{hint}"):
            optim.make_optimizer(OptimConfig(lr_factors=("^stem=1", setting)), lambda step: 0.1, PARAMS)


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "rmsprop"])
def test_every_optimizer_descends(name):
    assert (np.asarray(updated(OptimConfig(name=name))["head"]["dense"]["kernel"]) < 1).all()


def test_class_weights():
    labels, classes = np.asarray([0, 0, 0, 1, 2, 2]), ("a", "b", "c")
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    np.testing.assert_allclose(optim.class_weights("balanced", labels, classes), expected, rtol=1e-6)
    np.testing.assert_allclose(optim.class_weights("1,2.5,0", labels, classes), [1, 2.5, 0])
    np.testing.assert_allclose(optim.class_weights("none", labels, classes), 1)
    for bad in ("1,2", "heavy", "1,2,-1"):
        with pytest.raises(ValueError, match=r"optim.class_weights.*a, b, c"):
            optim.class_weights(bad, labels, classes)
