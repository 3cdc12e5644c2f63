"""The CPU forms of pooling and their gradients, compared with flax.linen's."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from kernels import close, draw, with_gradients

from lungjax.models import layers
from lungjax.models.ops import pooling

# height, width, window, strides, padding
WINDOWS = [
    (9, 10, (3, 3), (1, 1), "SAME"),
    (9, 10, (3, 3), (2, 2), "SAME"),
    (10, 9, (5, 5), (2, 2), "SAME"),
    (13, 11, (7, 7), (1, 1), "VALID"),
    (9, 7, (2, 3), (3, 2), ((0, 1), (2, 1))),
]


def test_max_pool_against_linen():
    for height, width, *window in WINDOWS:
        x = draw(0, 2, height, width, 5)
        x = jnp.concatenate([x, jnp.maximum(jnp.round(x), 0)], -1)  # ties: many windows have several equal maxima
        close(*(with_gradients(lambda x, f=f, w=window: f(x, *w), x) for f in (layers.max_pool, nn.max_pool)), 1e-6)


def test_max_pool_of_negative_bfloat16():
    x = draw(0, 2, 9, 9, 3, dtype="bfloat16") - 10
    y, pull = jax.vjp(lambda x: layers.max_pool(x, 3, 2, "SAME"), x)
    np.testing.assert_array_equal(y, nn.max_pool(x, (3, 3), (2, 2), "SAME"))
    assert pull(y)[0].dtype == jnp.bfloat16


def test_avg_pool_against_linen():
    for shape in ((2, 8, 6, 5), (3, 9, 7, 4)):
        x = draw(0, *shape)
        plain = with_gradients(lambda x: nn.avg_pool(x, (2, 2), (2, 2)), x)
        close(with_gradients(pooling.avg_pool_2x2, x), plain, 1e-6)


def test_max_pool_gradient_of_a_recomputed_input():
    """Under jit, the norm before the pool is recomputed for the gradient, with different rounding."""

    class Stem(nn.Module):
        pool: Callable

        @nn.compact
        def __call__(self, x):
            x = layers.Conv(16, 7, 2, "SYMMETRIC", name="conv")(x)
            x = nn.relu(layers.BatchNorm(momentum=0.9, epsilon=1e-5, name="bn")(x, train=True))
            x = self.pool(x)
            return x + layers.Conv(16, 3, padding="SYMMETRIC", name="after")(x)

    images = np.random.default_rng(0).normal(size=(4, 97, 85, 3)).astype(np.float32)
    ours = Stem(lambda x: layers.max_pool(x, 3, 2, "SYMMETRIC"))
    plain = Stem(lambda x: nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1))))
    variables = jax.jit(plain.init)(jax.random.key(0), images)
    weight = np.random.default_rng(1).normal(size=(4, 25, 22, 16)).astype(np.float32)

    def gradients(module):
        def loss(params, x):
            return (module.apply({**variables, "params": params}, x, mutable=["batch_stats"])[0] * weight).sum()

        return jax.jit(jax.grad(loss))(variables["params"], images)

    result, expected = gradients(ours), gradients(plain)
    for layer in ("conv", "bn"):
        for leaf, value in expected[layer].items():
            assert np.abs(result[layer][leaf] - value).max() <= 1e-3 * np.abs(value).max(), (layer, leaf)
