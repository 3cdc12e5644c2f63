"""The configurable head compared with numpy."""

import jax
import jax.numpy as jnp
import numpy as np

from lungjax.config import HeadConfig
from lungjax.models.head import Head


def test_head_order_and_arithmetic():
    """Norm, ReLU, 2x2 mean, flatten in (h, w, c) order, norm, hidden layer with ReLU, and dense equal plain numpy."""
    config = HeadConfig(
        pool="avg2x2_flatten", norm_before_pool="group", norm_after_pool="batch", hidden=(5,), dropout=0.5
    )
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 4, 64)).astype(np.float32)  # the fifth row is dropped by the 2x2 means
    head = Head(config, 3)
    shape = jax.eval_shape(lambda: head.init(jax.random.key(0), x, train=False))
    variables = jax.tree.map(lambda s: rng.uniform(0.5, 1.5, s.shape).astype(np.float32), shape)
    params, stats = variables["params"], variables["batch_stats"]["norm_after_pool"]

    groups = x.reshape(2, 20, 32, 2)
    normed = groups - groups.mean((1, 3), keepdims=True)
    normed = (normed / np.sqrt(groups.var((1, 3), keepdims=True) + 1e-5)).reshape(x.shape)
    y = np.maximum(normed * params["norm_before_pool"]["scale"] + params["norm_before_pool"]["bias"], 0)
    y = y[:, :4].reshape(2, 2, 2, 2, 2, 64).mean((2, 4)).reshape(2, -1)
    y = (y - stats["mean"]) / np.sqrt(stats["var"] + 1e-3)
    y = y * params["norm_after_pool"]["scale"] + params["norm_after_pool"]["bias"]
    y = np.maximum(y @ params["hidden1"]["kernel"] + params["hidden1"]["bias"], 0)
    y = y @ params["dense"]["kernel"] + params["dense"]["bias"]
    np.testing.assert_allclose(head.apply(variables, x, train=False), y, rtol=1e-5)


def test_layer_norm_before_and_after_the_pool():
    """There is no ReLU, as in Keras's headless ConvNeXt; with one, the mean of normalized channels is not 0."""
    x = np.random.default_rng(0).normal(size=(2, 3, 3, 8)).astype(np.float32)
    params = {"dense": {"kernel": np.eye(8), "bias": np.zeros(8)}}

    def norm(x):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)

    for config, expected in (
        (HeadConfig(pool="avg", norm_after_pool="layer"), norm(x.mean((1, 2)))),
        (HeadConfig(pool="max", norm_after_pool="layer"), norm(x.max((1, 2)))),
        (HeadConfig(norm_before_pool="layer"), norm(x).mean((1, 2))),
    ):
        name = "norm_before_pool" if config.norm_before_pool else "norm_after_pool"
        variables = {"params": params | {name: {"scale": np.ones(8), "bias": np.zeros(8)}}}
        np.testing.assert_allclose(Head(config, 8).apply(variables, x, train=False), expected, atol=1e-5)


def test_dropout_of_pooled_and_hidden_features():
    ones = jnp.ones((4, 2, 2, 64))
    config = HeadConfig(dropout=0.5)
    head = Head(config, 64)
    variables = {"params": {"dense": {"kernel": jnp.eye(64), "bias": jnp.zeros(64)}}}
    np.testing.assert_array_equal(head.apply(variables, ones, train=False), 1)
    dropped = head.apply(variables, ones, train=True, rngs={"dropout": jax.random.key(0)})
    assert set(np.unique(dropped)) == {0, 2} and 0.35 < (dropped == 0).mean() < 0.65

    config = HeadConfig(hidden=(64,), hidden_dropout=0.75)
    variables["params"]["hidden1"] = variables["params"]["dense"]
    dropped = Head(config, 64).apply(variables, ones, train=True, rngs={"dropout": jax.random.key(0)})
    assert set(np.unique(dropped)) == {0, 4} and 0.6 < (dropped == 0).mean() < 0.9


def test_zero_init():
    config = HeadConfig(zero_init=True)
    params = Head(config, 3).init(jax.random.key(0), jnp.ones((1, 2, 2, 8)), train=False)["params"]
    assert not np.any(params["dense"]["kernel"])


def test_float32_pooling_of_bfloat16_maps():
    features = jnp.asarray([1, 1, 1, 1 + 2**-7], jnp.bfloat16).reshape(1, 2, 2, 1)
    variables = {"params": {"dense": {"kernel": jnp.ones((1, 1)), "bias": jnp.zeros(1)}}}
    logits = Head(HeadConfig(), 1).apply(variables, features, train=False)
    assert logits.item() == 1 + 2**-9  # bfloat16 has no number between 1 and 1 + 2**-7
