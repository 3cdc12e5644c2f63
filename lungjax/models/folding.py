"""Networks made ready to predict: each batch norm folded into the convolution before it, and how many images at once.

With fixed statistics a batch norm is a scale and a shift a channel, so that norm(conv(x, kernel)) is
conv(x, kernel * factor) + shift with factor = scale / sqrt(var + epsilon). What may be folded is read off the
network's own trace, so no network says anything about it.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import ClosedJaxpr, Jaxpr

from lungjax.config import Config
from lungjax.models import trees
from lungjax.models.layers import BatchNorm, Conv

Variables = dict[str, Any]

CPU_BATCH = 8  # images, for each device
PIXELS = 64 * 224 * 224  # of a batch on an accelerator, for each device
MOST = 256  # images, however small
EIGHT = 8  # an accelerator's units work on multiples of so many examples


def batch_size(config: Config, devices: int, platform: str) -> int:
    """Returns how many images to predict at once over all devices: `eval.batch_size`, or where that is 0, by rule.

    Image size, platform and number of devices decide, and never a measurement at run time, so that every run of a
    configuration on a kind of machine is cut into the same batches.

    CPU: 8 a device. Measured at 224 px (tests/benchmarks/inference.py), images for each processor second hardly depend
    on it: 3 to 13 % fewer than at best with a single one, at most 4 % fewer with 4 to 16, and up to 7 % fewer with 64,
    which takes eight times the memory and more black images to fill up the last batch of a split.

    GPU and TPU: as many pixels a device as 64 images of 224 x 224 have, in whole eights, at most 256 images. That is
    reasoned, not measured: the largest maps of any network here (VGG's first, the stem of BiT R152x4) are then 0.4 GB
    in bfloat16, and a few of them live at once.

    Args:
      config: of which `eval.batch_size` and `input.size` are read.
      devices: among which each batch is cut.
      platform: "cpu", "gpu" or "tpu".
    """
    if config.eval.batch_size:
        return config.eval.batch_size
    if platform == "cpu":
        return CPU_BATCH * devices
    height, width = config.input.size
    images = min(PIXELS // (height * width), MOST)
    return devices * (images // EIGHT * EIGHT or max(images, 1))


class ConvNorm(NamedTuple):
    """A convolution (or dense layer) and the batch norm that alone reads its output."""

    layer: str  # path of the module, such as "stage1_block1/conv1"
    norm: str
    epsilon: float  # of the norm
    biased: bool  # whether the layer has a bias


def _path(module: nn.Module) -> str:
    return "/".join(module.path)


def find_pairs(module: nn.Module, shapes: Variables, image_shape: tuple[int, ...]) -> tuple[ConvNorm, ...]:
    """Returns the norms of a network that can be folded, from one trace on shapes.

    Args:
      module: of `models.build`.
      shapes: its variables, or their shapes.
      image_shape: [height, width, channels] as the network gets it.

    Kept as they are: norms that read anything but a layer's very output (a sum, an activation, a concatenation); those
    whose layer's output is also read elsewhere or returned; layers that are called more than once; and
    weight-standardised convolutions, whose kernel has no scale to give.
    """
    if not shapes.get("batch_stats"):
        return ()  # no norm has statistics
    found: dict[str, Any] = {}

    # Both outputs are named, and norms are left out: a pair is then a norm's name as the only reader of a layer's.
    def mark(method: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        layer = context.module
        if context.method_name != "__call__":
            return method(*args, **kwargs)
        if isinstance(layer, BatchNorm):
            found[_path(layer)] = layer
            return checkpoint_name(args[0], _path(layer)).astype(layer.dtype)
        if isinstance(layer, nn.Dense) or (isinstance(layer, Conv) and layer.standardize is None):
            found[_path(layer)] = layer
            return checkpoint_name(method(*args, **kwargs), _path(layer))
        return method(*args, **kwargs)

    def forward(variables: Variables, images: jax.Array) -> Any:
        with nn.intercept_methods(mark):
            return module.apply(variables, images, train=False)

    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    calls: Counter[str] = Counter()
    edges: list[tuple[str, str]] = []  # a named output, and the name that alone reads it
    for jaxpr in _jaxprs(jax.make_jaxpr(forward)(shapes, images).jaxpr):
        marks = [equation for equation in jaxpr.eqns if equation.primitive.name == "name"]
        names = {id(mark.outvars[0]): mark.params["name"] for mark in marks}
        reads = Counter(id(x) for reader in (*(e.invars for e in jaxpr.eqns), jaxpr.outvars) for x in reader)
        calls.update(names.values())
        edges += [
            (names[id(mark.invars[0])], mark.params["name"])
            for mark in marks
            if id(mark.invars[0]) in names and reads[id(mark.invars[0])] == 1
        ]
    return tuple(
        ConvNorm(layer, norm, found[norm].epsilon, found[layer].use_bias)
        for layer, norm in edges
        if isinstance(found[norm], BatchNorm)
        and not isinstance(found[layer], BatchNorm)
        and calls[layer] == calls[norm] == 1
    )


def _jaxprs(jaxpr: Jaxpr) -> Iterator[Jaxpr]:
    """Yields a jaxpr and all those inside its equations."""
    yield jaxpr
    for equation in jaxpr.eqns:
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: isinstance(x, Jaxpr | ClosedJaxpr)):
            if isinstance(value, Jaxpr | ClosedJaxpr):
                yield from _jaxprs(value.jaxpr if isinstance(value, ClosedJaxpr) else value)


def fold(variables: Variables, pairs: tuple[ConvNorm, ...]) -> Variables:
    """Returns variables with the norms of `pairs` folded, in the parameters' own dtype, float32.

    Of each pair remain the layer's `kernel`, scaled, and the norm's `bias`, now all that is added. A computation
    in bfloat16 casts the folded kernel, so nothing is rounded twice.
    """
    params, stats = trees.flatten(variables["params"]), trees.flatten(variables.get("batch_stats") or {})
    for pair in pairs:
        factor = params.pop(f"{pair.norm}/scale") / jnp.sqrt(stats.pop(f"{pair.norm}/var") + pair.epsilon)
        shift = params[f"{pair.norm}/bias"] - stats.pop(f"{pair.norm}/mean") * factor
        if pair.biased:
            shift = shift + params.pop(f"{pair.layer}/bias") * factor
        params[f"{pair.layer}/kernel"] = params[f"{pair.layer}/kernel"] * factor  # outputs are the last axis
        params[f"{pair.norm}/bias"] = shift
    return {"params": trees.unflatten(params), "batch_stats": trees.unflatten(stats)}


@dataclass(frozen=True, eq=False)
class FoldedModel:
    """A network whose norms are folded: `network(network.prepare(variables), images)` are its logits and features."""

    module: nn.Module
    shapes: Variables  # variables, or their shapes
    image_shape: tuple[int, ...]  # [height, width, channels] as the network gets it

    @cached_property
    def pairs(self) -> tuple[ConvNorm, ...]:
        """What is folded; traced when first asked for."""
        return find_pairs(self.module, self.shapes, self.image_shape)

    @cached_property
    def _compiled(self) -> dict[Any, Any]:
        return {}  # `fold`, for each layout of the variables that has come by

    def prepare(self, variables: Variables) -> Variables:
        """Returns folded variables, each leaf laid out over the devices as it was. Once for a pass over a split."""
        if not self.pairs:
            return variables  # without a copy
        layout = self.layout(jax.tree.map(lambda x: x.sharding if isinstance(x, jax.Array) else None, variables))
        key = tuple(trees.flatten(layout).values())
        if key not in self._compiled:
            self._compiled[key] = jax.jit(lambda variables: fold(variables, self.pairs), out_shardings=layout)
        return self._compiled[key](variables)

    def layout(self, tree: Variables) -> Variables:
        """Returns of a tree like the variables, such as their shardings, the leaves that folded variables have."""
        gone = {f"{pair.norm}/{name}" for pair in self.pairs for name in ("scale", "mean", "var")}
        gone |= {f"{pair.layer}/bias" for pair in self.pairs if pair.biased}
        return {name: trees.split(tree.get(name) or {}, gone)[0] for name in ("params", "batch_stats")}

    def __call__(self, folded: Variables, images: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Maps normalised images [B, H, W, C] to (logits, features), as `module.apply(..., train=False)`."""
        params = trees.flatten(folded["params"])
        shifts = {pair.norm: params[f"{pair.norm}/bias"] for pair in self.pairs}
        # A constant zero, which the compiler leaves out: the norm's place adds the bias, after the last rounding.
        params |= {f"{p.layer}/bias": jnp.zeros_like(shifts[p.norm]) for p in self.pairs if p.biased}

        def call(method: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
            norm = context.module
            if isinstance(norm, BatchNorm) and context.method_name == "__call__" and _path(norm) in shifts:
                y = (args[0] + shifts[_path(norm)]).astype(norm.dtype)
                activation = kwargs.get("activation")
                return y if activation is None else activation(y)
            return method(*args, **kwargs)

        with nn.intercept_methods(call):
            return self.module.apply({**folded, "params": trees.unflatten(params)}, images, train=False)
