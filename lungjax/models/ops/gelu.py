"""The exact GELU, x times the cumulative distribution function of the normal distribution."""

from functools import partial

import jax
from flax import linen as nn

from lungjax.models.ops.conv import cpu_or_default, isolate_fusion

plain_gelu = partial(nn.gelu, approximate=False)


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """Returns the activations of x, of the same shape.

    On a CPU they are computed once. XLA would compute them again within the transposed copy that the kernel gradient of
    the next layer needs, which is slow. As in `conv`, forward-mode derivatives do not work.
    """
    return cpu_or_default(x, cpu=_gelu, default=plain_gelu)


def _plain_dx(x: jax.Array, dy: jax.Array) -> jax.Array:
    return jax.vjp(plain_gelu, x)[1](dy)[0]


_gelu, _dx = partial(isolate_fusion, plain_gelu), partial(isolate_fusion, _plain_dx)


def _gradient(x: jax.Array, dy: jax.Array) -> tuple[jax.Array]:
    return (cpu_or_default(x, dy, cpu=_dx, default=_plain_dx),)


gelu.defvjp(lambda x: (gelu(x), x), _gradient)
