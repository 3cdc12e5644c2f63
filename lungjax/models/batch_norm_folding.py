"""Folds batch norms into the convolutions before them, for prediction.

With fixed statistics a batch norm is a scale and a shift per channel, so norm(conv(x, kernel)) equals
conv(x, kernel * factor) + shift with factor = scale / sqrt(var + epsilon). The norms that can be folded are found in a
trace of the network, so the networks need no code for folding.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import ClosedJaxpr, Jaxpr

from lungjax.models import trees
from lungjax.models.layers import BatchNorm, Conv

Variables = dict[str, Any]


class ConvNorm(NamedTuple):
    """A convolution (or dense layer) and the batch norm that is the only reader of its output."""

    layer: str  # path of the module, such as "stage1_block1/conv1"
    norm: str
    epsilon: float  # of the norm
    biased: bool  # whether the layer has a bias


def _path(module: nn.Module) -> str:
    return "/".join(module.path)


def find_pairs(module: nn.Module, shapes: Variables, image_shape: tuple[int, ...]) -> tuple[ConvNorm, ...]:
    """Finds the norms of a network that can be folded, by tracing it once with abstract arrays.

    A norm cannot be folded if its input is not the output of a layer (but a sum, an activation or a concatenation), if
    that output is read elsewhere or returned, if the norm or the layer is called more than once, or if the layer is a
    weight-standardized convolution, whose kernel cannot be scaled. The arguments are the fields of `FoldedModel`.
    """
    if not shapes.get("batch_stats"):
        return ()
    layers: dict[str, Any] = {}

    # `checkpoint_name` marks the output of each layer and stands in for each norm. A pair is then a mark of a norm
    # whose operand is the mark of a layer and has no other reader.
    def name_outputs(method: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        layer = context.module
        foldable = isinstance(layer, nn.Dense) or (isinstance(layer, Conv) and layer.standardize is None)
        if context.method_name != "__call__" or not (foldable or isinstance(layer, BatchNorm)):
            return method(*args, **kwargs)
        layers[_path(layer)] = layer
        if foldable:
            return checkpoint_name(method(*args, **kwargs), _path(layer))
        return checkpoint_name(args[0], _path(layer)).astype(layer.dtype)

    def forward(variables: Variables, images: jax.Array) -> Any:
        with nn.intercept_methods(name_outputs):
            return module.apply(variables, images, train=False)

    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    calls: Counter[str] = Counter()
    edges: list[tuple[str, str]] = []  # a marked output and its only reader, another mark
    for jaxpr in _all_jaxprs(jax.make_jaxpr(forward)(shapes, images).jaxpr):
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
        ConvNorm(layer, norm, layers[norm].epsilon, layers[layer].use_bias)
        for layer, norm in edges
        if isinstance(layers[norm], BatchNorm)
        and not isinstance(layers[layer], BatchNorm)
        and calls[layer] == calls[norm] == 1
    )


def _all_jaxprs(jaxpr: Jaxpr) -> Iterator[Jaxpr]:
    """Yields the jaxpr and all jaxprs nested in it, such as those of jit, remat and cond."""
    yield jaxpr
    for equation in jaxpr.eqns:
        for leaf in jax.tree.leaves(equation.params, is_leaf=lambda x: isinstance(x, Jaxpr | ClosedJaxpr)):
            if isinstance(leaf, Jaxpr | ClosedJaxpr):
                yield from _all_jaxprs(leaf.jaxpr if isinstance(leaf, ClosedJaxpr) else leaf)


def fold(variables: Variables, pairs: tuple[ConvNorm, ...]) -> Variables:
    """Returns float32 variables with the norms of `pairs` folded.

    Each pair keeps only the scaled `kernel` of the layer and the `bias` of the norm, which becomes the total shift. A
    bfloat16 network casts the folded kernel, so its values are rounded only once.
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


def unfold(leaves: Mapping[str, np.ndarray], pairs: tuple[ConvNorm, ...]) -> dict[str, np.ndarray]:
    """Returns leaves by "params/PATH" and "batch_stats/PATH" that `fold` maps to `leaves`; norms add only a bias."""
    leaves = dict(leaves)
    for pair in pairs:
        shape = leaves[f"params/{pair.norm}/bias"].shape
        leaves[f"params/{pair.norm}/scale"] = np.ones(shape, np.float32)
        leaves[f"batch_stats/{pair.norm}/mean"] = np.zeros(shape, np.float32)
        leaves[f"batch_stats/{pair.norm}/var"] = np.full(shape, 1 - pair.epsilon, np.float32)
        if pair.biased:
            leaves[f"params/{pair.layer}/bias"] = np.zeros(shape, np.float32)
    return leaves


@cache
def _compiled_fold(pairs: tuple[ConvNorm, ...], structure: Any, shardings: tuple[Any, ...]) -> Any:
    return jax.jit(partial(fold, pairs=pairs), out_shardings=jax.tree.unflatten(structure, shardings))


@dataclass(frozen=True, eq=False)
class FoldedModel:
    """A network with folded norms; `model(model.fold(variables), images)` returns logits and features."""

    module: nn.Module
    shapes: Variables  # variables, or their shapes
    image_shape: tuple[int, ...]  # [height, width, channels] of the network's input

    @cached_property
    def pairs(self) -> tuple[ConvNorm, ...]:
        """The folded norms."""
        return find_pairs(self.module, self.shapes, self.image_shape)

    def fold(self, variables: Variables) -> Variables:
        """Returns folded variables with the shardings of `variables`; call it once per pass over a split."""
        if not self.pairs:
            return variables
        layout = self.layout(jax.tree.map(lambda x: x.sharding if isinstance(x, jax.Array) else None, variables))
        shardings, structure = jax.tree.flatten(layout)
        return _compiled_fold(self.pairs, structure, tuple(shardings))(variables)

    def layout(self, tree: Variables) -> Variables:
        """Returns `tree`, structured like the variables (such as their shardings), without the folded leaves."""
        folded = {f"{pair.norm}/{name}" for pair in self.pairs for name in ("scale", "mean", "var")}
        folded |= {f"{pair.layer}/bias" for pair in self.pairs if pair.biased}
        return {name: trees.split(tree.get(name) or {}, folded)[0] for name in ("params", "batch_stats")}

    def __call__(self, folded: Variables, images: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Maps normalized images [B, H, W, C] to (logits, features), like `module.apply(..., train=False)`."""
        params = trees.flatten(folded["params"])
        shifts = {pair.norm: params[f"{pair.norm}/bias"] for pair in self.pairs}
        # The compiler removes these zeros; the shift is added in place of the norm, after the last rounding.
        params |= {f"{p.layer}/bias": jnp.zeros_like(shifts[p.norm]) for p in self.pairs if p.biased}

        def add_shift(method: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
            norm = context.module
            if isinstance(norm, BatchNorm) and context.method_name == "__call__" and _path(norm) in shifts:
                y = (args[0] + shifts[_path(norm)]).astype(norm.dtype)
                activation = kwargs.get("activation")
                return y if activation is None else activation(y)
            return method(*args, **kwargs)

        with nn.intercept_methods(add_shift):
            return self.module.apply({**folded, "params": trees.unflatten(params)}, images, train=False)
