"""Folding of batch norms: equal outputs, and which norms are folded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import small_bn
from flax import linen as nn
from random_weights import random_images, random_variables
from shallow import SHALLOW

from lungjax.models import batch_norm_folding, trees
from lungjax.models.layers import BatchNorm, Conv
from lungjax.models.ops import conv

SHAPE = (36, 36, 3)


def both(module, variables, shape=SHAPE):
    """Returns the folded network, its variables, and the outputs of the plain and of the folded network."""
    network = batch_norm_folding.FoldedModel(module, variables, shape)
    with conv.plain_forms():
        folded = network.fold(variables)
        run = jax.jit(lambda v, f, x: (module.apply(v, x, train=False), network(f, x)))
        return network, folded, *run(variables, folded, random_images(shape))


def error(result, expected):
    result, expected = np.asarray(result, np.float64), np.asarray(expected, np.float64)
    return np.abs(result - expected).max() / np.ptp(expected)


def rms(x):
    return np.sqrt(np.square(np.asarray(x, np.float64)).mean())


FOLDED = [name for name, network in SHALLOW.items() if network.folded]
DEFAULT = ("cbr", "efficientnet", "resnet50v2")


@pytest.mark.parametrize("name", [n if n in DEFAULT else pytest.param(n, marks=pytest.mark.slow) for n in FOLDED])
def test_folded_network_against_the_plain_one(name):
    module = SHALLOW[name].make(outputs=3)
    variables = random_variables(module, SHAPE)
    network, folded, plain, result = both(module, variables)
    assert error(result[0], plain[0]) < 1e-5 and error(result[1]["last"], plain[1]["last"]) < 1e-5
    before, after = ([p for p in trees.flatten(v["batch_stats"]) if p.endswith("/var")] for v in (variables, folded))
    assert len(before) - len(after) == len(network.pairs) == SHALLOW[name].folded


class Odd(nn.Module):
    """A convolution and a norm in combinations where folding may be wrong."""

    kind: str
    dtype: object = jnp.float32

    @nn.compact
    def __call__(self, images, *, train):
        conv = Conv(4, 3, standardize=1e-5 if self.kind == "standardized" else None, parent=None)
        conv = (nn.Dense(4, parent=None) if self.kind == "dense" else conv).clone(parent=self, name="conv")
        norm = BatchNorm(momentum=0.9, epsilon=1e-2, name="norm")
        x = conv(images)
        if self.kind == "after an activation":
            x = nn.relu(x)
        y = norm(x, train=train)
        if self.kind == "read twice":
            y = y + x
        if self.kind == "read inside":
            y = y + jax.jit(jnp.square)(x)
        if self.kind == "convolution called twice":
            y = y + conv(images[:, ::-1] ** 2)
        if self.kind == "norm called twice":
            y = y + norm(y, train=train)
        if self.kind == "two norms":
            y = BatchNorm(momentum=0.9, epsilon=1e-2, name="second")(y, train=train)
        return y.mean((1, 2)), {"last": x if self.kind == "returned" else y}


def test_combinations_of_layer_and_norm():
    kinds = {"plain": 1, "dense": 1, "two norms": 1}
    kinds |= dict.fromkeys(("standardized", "after an activation", "read twice", "read inside", "returned"), 0)
    kinds |= dict.fromkeys(("convolution called twice", "norm called twice"), 0)
    for kind, count in kinds.items():
        module, shape = Odd(kind), (6, 6, 2)
        variables = random_variables(module, shape)
        assert len(batch_norm_folding.FoldedModel(module, variables, shape).pairs) == count, kind
        if count:
            _, _, plain, folded = both(module, variables, shape)
            assert error(folded[0], plain[0]) < 1e-5 and error(folded[1]["last"], plain[1]["last"]) < 1e-5, kind


def test_float32_folding_of_bfloat16_networks():
    exact, half = (small_bn()(outputs=3, dtype=dtype) for dtype in (jnp.float32, jnp.bfloat16))
    variables = random_variables(exact, SHAPE)
    _, folded_exact, expected, _ = both(exact, variables)
    _, folded_half, plain, folded = both(half, variables)
    for path, leaf in trees.flatten(folded_half).items():
        assert leaf.dtype == jnp.float32
        np.testing.assert_array_equal(leaf, trees.flatten(folded_exact)[path], err_msg=path)
    assert (folded[0].dtype, folded[1]["last"].dtype) == (jnp.float32, jnp.bfloat16)
    # As close to the float32 network as the plain one is.
    errors = [rms(np.float32(result[1]["last"]) - expected[1]["last"]) for result in (plain, folded)]
    assert errors[0] > 1e-3 * rms(expected[1]["last"]) and errors[1] < 1.1 * errors[0]
