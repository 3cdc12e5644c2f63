"""Saliency maps of a network's input, [H, W] in 0..1, by five methods.

The three CAM methods explain the last feature map with at least MIN_CELLS cells per side: that of the network, for
which they need one forward pass and the gradient of the head, or that of an earlier block (`Network.run`), with the
gradient through the rest of the network. The score of a class is its logit; with a sigmoid head, z for the positive
class and -z for the other one.

With valid padding a feature map covers only the center of the image, and its map is placed there
(`models.receptive_field`). The papers and gradcam_positive stretch it over the entire image. A map shows which pixels
the score depends on; `quality` measures how far to trust it. A map without evidence (constant up to rounding) is all
zeros rather than amplified noise.
"""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from lungjax.config import EXPLANATIONS, Config, InputSpec, nearest
from lungjax.data.batching import pad_batch
from lungjax.models import outputs, receptive_field
from lungjax.models.batch_norm_folding import FoldedModel
from lungjax.models.head import Head
from lungjax.models.inputs import normalize, prediction_batch_size
from lungjax.models.network import Network
from lungjax.models.ops import conv

METHODS = EXPLANATIONS
NAMES = ("Grad-CAM", "Grad-CAM, positive gradients", "Grad-CAM++", "Integrated gradients", "Occlusion")
TITLES = dict(zip(METHODS, NAMES, strict=True))
MIN_CELLS = 7  # as ImageNet networks have at 224 pixels; coarser maps are nearly uniform squares
LAST = "last"  # name of the network's last feature map
ROUNDING = 1e-5  # range of values, relative to the size of the summands, below which a map is constant
STEPS = 32  # of integrated gradients
EPSILON = 1e-8  # in the min-max scaling of the CT-COV19 study

Maps = tuple[jax.Array, jax.Array]  # a raw map [B, h, w], and the size of its summands [B]


def gradcam(last: jax.Array, gradient: jax.Array) -> Maps:
    """Grad-CAM (Selvaraju et al., ICCV 2017, arXiv 1610.02391, equations 1 and 2).

    A channel's weight is the mean of its gradient; the map is the ReLU of the weighted sum. `last` and the `gradient`
    of the score with respect to it are [B, h, w, c].
    """
    raw, size = _weighted(last, gradient.mean((1, 2)))
    return nn.relu(raw), size


def gradcam_positive(last: jax.Array, gradient: jax.Array) -> Maps:
    """Grad-CAM of the CT-COV19 study (github.com/marta-0/covid-ct, covid/gradcam.py, after a PyImageSearch tutorial).

    A channel's weight is the mean of its gradient where activation and gradient are positive, and 0 elsewhere; there is
    no ReLU of the sum. No weight is negative, so evidence against the class is not subtracted.
    """
    both = (last > 0) & (gradient > 0)
    return _weighted(last, jnp.where(both, gradient, 0.0).mean((1, 2)))


def gradcam_plus_plus(last: jax.Array, gradient: jax.Array) -> Maps:
    """Grad-CAM++ (Chattopadhay et al., WACV 2018, arXiv 1710.11063, equation 19), for the exponential of the score.

    With g the gradient of the score at a cell and S the sum of the channel's activations, the paper's coefficient g^2 /
    (2 g^2 + S g^3) times ReLU(g) is ReLU(g) / (2 + S ReLU(g)); a channel's weight sums this over its cells. The factor
    exp(score), the same for all cells, is omitted. The paper assumes positive activations; without a final ReLU (BiT,
    ConvNeXt) S sums only positive ones, which keeps the coefficient in 0..1/2.
    """
    rise = nn.relu(gradient)
    total = nn.relu(last).sum((1, 2), keepdims=True)
    raw, size = _weighted(last, (rise / (2.0 + total * rise)).sum((1, 2)))
    return nn.relu(raw), size


def _weighted(last: jax.Array, weights: jax.Array) -> Maps:
    terms = weights[:, None, None, :] * last
    return terms.sum(-1), jnp.abs(terms).sum(-1).max((1, 2))


CAMS: dict[str, Callable[[jax.Array, jax.Array], Maps]] = {
    "gradcam": gradcam,
    "gradcam_positive": gradcam_positive,
    "gradcam++": gradcam_plus_plus,
}


def check_method(method: str, methods: Sequence[str]) -> None:
    """Raises ValueError unless `method` is one of the `methods` that are possible for a network."""
    if method not in METHODS:
        raise ValueError(f"method={method!r}: unknown; {nearest(method, METHODS)}")
    if method not in methods:
        no_map = method in CAMS and not CAMS.keys() & set(methods)
        reason = f"no feature map has {MIN_CELLS} x {MIN_CELLS} cells" if no_map else "the exported file lacks it"
        raise ValueError(f"method={method!r} is impossible for this model ({reason}); possible: {', '.join(methods)}")


def class_scores(logits: jax.Array, targets: jax.Array, positive: int | None) -> jax.Array:
    """Returns the score [B] of one class per example, `targets` [B], from the logits [B, outputs]."""
    if positive in (None, outputs.EACH):
        return jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return jnp.where(targets == positive, logits[:, 0], -logits[:, 0])


@dataclass(eq=False)
class Explainer:
    """Computes the maps of a network and caches its compiled programs."""

    module: Network  # of `models.build`
    variables: dict[str, Any]  # params and batch_stats
    spec: InputSpec  # with the mean and std of the weights
    positive: int | None = None  # see `outputs.positive_class`
    batch_size: int = 0  # images or occluded copies; 0 means the batch size of prediction
    temperature: outputs.Temperature = 1.0  # of the probabilities, for calibration
    tta: str = "none"  # `eval.tta`; maps are then means over the image and its mirror

    def __post_init__(self) -> None:
        """Fills in the batch size and the size of the occluded square."""
        self.batch_size = self.batch_size or prediction_batch_size(Config(input=self.spec), 1, jax.default_backend())
        self.patch = max(min(self.spec.size) // 7, 1)  # side of the occluded square in pixels
        self.stride = max(self.patch // 2, 1)
        self._programs: dict[str, Any] = {}

    def maps(
        self, images: np.ndarray, targets: np.ndarray | int | None = None, method: str | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns maps float32 [B, H, W] in 0..1 and class probabilities float32 [B, C].

        `images` are uint8 [B, H, W, C], network inputs before normalization. `targets` are the classes to explain, int
        [B], one class for all images, or None for the most probable class. `method` is one of `methods`, by default the
        first. CAMs are interpolated linearly to the input size. Maps are divided by their maximum (0: no evidence);
        gradcam_positive is min-max scaled, as in the study. Raises ValueError for a method not in `methods`.
        """
        method = method or self.methods[0]
        check_method(method, self.methods)
        targets = np.full(len(images), -1 if targets is None else targets, np.int32)
        if method in CAMS:
            program = self._program(method)
            return self._batched(images, targets, lambda x, target: program(self._folded, self._head, x, target))
        probabilities = self.probabilities(images)
        targets = np.where(targets < 0, probabilities.argmax(-1), targets)
        maps = self._pixel_maps(images, targets, method)
        if self.tta == "flip":
            maps = (maps + self._pixel_maps(images[:, :, ::-1], targets, method)[:, :, ::-1]) / 2
        return maps, probabilities

    def probabilities(self, images: np.ndarray) -> np.ndarray:
        """Returns class probabilities float32 [B, C] of uint8 images [B, H, W, C]."""
        program, targets = self._program("predict"), np.zeros(len(images), np.int32)
        (result,) = self._batched(images, targets, lambda x, _: (program(self._folded, x),))
        return result

    def attributions(self, images: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Integrated gradients (Sundararajan et al., ICML 2017, arXiv 1703.01365) from a black image.

        Returns float32 [B, H, W, C]: the pixel values times the mean gradient of the score along the path from black to
        the image (midpoints of STEPS equal parts). They add up to the score of the image minus that of black, up to the
        discretization error.
        """
        program = self._program("slope")

        def integrate(pixels: np.ndarray, target: np.ndarray) -> tuple[Any]:
            x = jnp.asarray(pixels, jnp.float32)
            parts = ((np.arange(STEPS) + 0.5) / STEPS).astype(np.float32)
            return (sum(program(self._folded, x, part, target) for part in parts) / STEPS,)

        (result,) = self._batched(images, targets, integrate)
        return result

    def with_variables(self, variables: dict[str, Any]) -> "Explainer":
        """Returns an explainer of the same network with other variables; it shares the compiled programs."""
        other = copy(self)
        other.variables = variables
        vars(other).pop("_folded", None)
        return other

    @cached_property
    def layer(self) -> tuple[str, tuple[int, int]] | None:
        """Name, height and width of the feature map of the CAM methods; None if no map has MIN_CELLS per side."""
        names: list[str] = []

        def forward(variables: dict[str, Any], image: jax.Array) -> list[jax.Array]:
            _, maps = _forward(partial(self.module.apply, variables, train=False), image)
            names[:] = maps
            return list(maps.values())

        image = jax.ShapeDtypeStruct((1, *self.spec.size, self.spec.network_channels), jnp.float32)
        shapes = [each.shape[1:3] for each in jax.eval_shape(forward, self.variables, image)]
        large = [layer for layer in zip(names, shapes, strict=True) if min(layer[1]) >= MIN_CELLS]
        return large[-1] if large else None

    @cached_property
    def methods(self) -> tuple[str, ...]:
        """The methods that this network allows, the default first."""
        return tuple(method for method in METHODS if self.layer or method not in CAMS)

    def describe(self, method: str | None = None) -> str:
        """Returns the title of a method, by default the first one, and the feature map that it explains."""
        method = method or self.methods[0]
        if method not in CAMS or not self.layer:
            return TITLES[method]
        name, (height, width) = self.layer
        return f"{TITLES[method]} of {'the last feature map' if name == LAST else name}, {height} x {width} cells"

    def grain(self, method: str) -> tuple[int, int]:
        """Returns the height and width of a method's maps before resizing."""
        if method in CAMS and self.layer:
            return self.layer[1]
        height, width = self.spec.size
        return (-(-height // self.stride), -(-width // self.stride)) if method == "occlusion" else (height, width)

    def cam(self, method: str) -> Any:
        """Returns a CAM method: a function of folded variables, head variables, pixels and targets (-1: predicted).

        Raises ValueError if no feature map is large enough.
        """
        check_method(method, self.methods)
        assert self.layer
        (layer, cells), head = self.layer, Head(self.module.head, self.module.outputs)
        network = self.module if layer == LAST else self.module.up_to(layer)
        placed = None if method == "gradcam_positive" else network
        axes = receptive_field.cell_positions(placed, self.spec.size, cells)
        rows, columns = map(receptive_field.interpolation_weights, axes, self.spec.size, cells)

        def run(folded: Any, own: Any, pixels: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
            forward, x = partial(self._network, folded), normalize(pixels, self.spec)
            logits, maps = _forward(forward, x)
            probabilities = outputs.probabilities(logits, self.positive, self.temperature)
            targets = jnp.where(targets < 0, probabilities.argmax(-1), targets)
            last = maps[layer].astype(jnp.float32)

            def score(at: jax.Array) -> jax.Array:
                if layer == LAST:
                    logits = head.apply(own, at, train=False)
                else:  # the compiler removes the blocks before the map
                    logits = _forward(forward, x, layer, at)[0].astype(jnp.float32)
                return class_scores(logits, targets, self.positive).sum()

            raw, size = CAMS[method](last, jax.grad(score)(last))
            full = jnp.einsum("yi,bij,xj->byx", rows, raw, columns, precision="highest")
            return _scaled(full, size, method == "gradcam_positive"), probabilities

        def averaged(folded: Any, own: Any, pixels: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
            probabilities = self._predict(folded, pixels)
            targets = jnp.where(targets < 0, probabilities.argmax(-1), targets)
            maps, mirrored = (run(folded, own, view, targets)[0] for view in (pixels, pixels[:, :, ::-1]))
            return (maps + mirrored[:, :, ::-1]) / 2, probabilities

        return run if self.tta == "none" else averaged

    def _pixel_maps(self, images: np.ndarray, targets: np.ndarray, method: str) -> np.ndarray:
        """Returns the maps of a method that is not a CAM, without test-time augmentation."""
        if method == "occlusion":
            maps = [self._occlusion(image, target) for image, target in zip(images, targets, strict=True)]
            return np.reshape(np.asarray(maps, np.float32), (-1, *self.spec.size))
        attributions = self.attributions(images, targets)
        # Only evidence for the class, like the ReLU of the other methods.
        raw, size = np.maximum(attributions.sum(-1), 0), np.abs(attributions).sum(-1).max((1, 2))
        return np.asarray(_scaled(raw, size))

    def _occlusion(self, image: np.ndarray, target: int) -> np.ndarray:
        """Occlusion (Zeiler and Fergus, ECCV 2014, arXiv 1311.2901): the drop in the score when a patch is hidden.

        A square of the image's mean color slides over the image, including its far edges. A pixel's value is the mean
        drop in the score over the patches that cover it, 0 if the score rises. Returns float32 [H, W].
        """
        program, (height, width), side = self._program("occlude"), self.spec.size, self.patch
        tops, lefts = (sorted({*range(0, end - side, self.stride), end - side}) for end in (height, width))
        # The patch of the first corner is outside the image: the same program computes the score of the full image.
        corners = np.asarray([(height, width), *((top, left) for top in tops for left in lefts)], np.int32)
        fill = image.reshape(-1, image.shape[-1]).mean(0).astype(np.float32)
        targets = np.full(len(corners), target, np.int32)
        (scores,) = self._batched(corners, targets, lambda at, t: (program(self._folded, image, fill, at, t),))
        fall, count = np.zeros((2, height, width), np.float32)
        for (top, left), score in zip(corners[1:], scores[1:], strict=True):
            fall[top : top + side, left : left + side] += scores[0] - score
            count[top : top + side, left : left + side] += 1
        return np.asarray(_scaled(np.maximum(fall / count, 0)[None], np.abs(scores).max(keepdims=True)))[0]

    @cached_property
    def _network(self) -> FoldedModel:
        return FoldedModel(self.module, self.variables, (*self.spec.size, self.spec.network_channels))

    @cached_property
    def _folded(self) -> dict[str, Any]:
        return self._network.fold(self.variables)

    @property
    def _head(self) -> dict[str, Any]:  # not folded: the head has no norm after a convolution
        return {name: (self.variables.get(name) or {}).get("head", {}) for name in ("params", "batch_stats")}

    def _program(self, name: str) -> Any:
        if name not in self._programs:
            own: dict[str, Any] = {"predict": self._predict, "slope": self._slope, "occlude": self._occlude}
            function = self.cam(name) if name in CAMS else own[name]
            self._programs[name] = conv.jit(function)
        return self._programs[name]

    def _predict(self, folded: dict[str, Any], pixels: jax.Array) -> jax.Array:
        logits, _ = outputs.with_tta(self._network, self.tta)(folded, normalize(pixels, self.spec))
        return outputs.probabilities(logits, self.positive, self.temperature)

    def _slope(self, folded: dict[str, Any], x: jax.Array, part: jax.Array, target: jax.Array) -> jax.Array:
        def score(at: jax.Array) -> jax.Array:
            return class_scores(self._logits(folded, at), target, self.positive).sum()

        return x * jax.grad(score)(part * x)

    def _occlude(
        self, folded: dict[str, Any], image: jax.Array, fill: jax.Array, corners: jax.Array, targets: jax.Array
    ) -> jax.Array:
        rows, columns = jnp.arange(image.shape[0]), jnp.arange(image.shape[1])
        down = (rows >= corners[:, :1]) & (rows < corners[:, :1] + self.patch)
        across = (columns >= corners[:, 1:]) & (columns < corners[:, 1:] + self.patch)
        hidden = (down[:, :, None] & across[:, None, :])[..., None]
        logits = self._logits(folded, jnp.where(hidden, fill, image.astype(jnp.float32)))
        return class_scores(logits, targets, self.positive)

    def _logits(self, folded: dict[str, Any], pixels: jax.Array) -> jax.Array:
        return self._network(folded, normalize(pixels, self.spec))[0].astype(jnp.float32)

    def _batched(self, rows: np.ndarray, targets: np.ndarray, run: Callable[..., Any]) -> Any:
        """Returns the outputs of `run(rows, targets)`, computed in batches of a fixed size."""
        size, parts = max(min(self.batch_size, len(rows)), 1), []
        for at in range(0, max(len(rows), 1), size):  # without rows, a batch of padding gives the shapes
            batch = rows[at : at + size]
            results = run(pad_batch(batch, size), pad_batch(targets[at : at + size], size))
            parts.append([np.asarray(result)[: len(batch)] for result in results])
        return tuple(np.concatenate(results) for results in zip(*parts, strict=True))


def _forward(
    network: Callable[[jax.Array], Any], images: jax.Array, layer: str = "", at: Any = None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the logits and the maps of all blocks by name, with LAST at the end; `at` replaces the map of `layer`."""
    maps: dict[str, jax.Array] = {}

    def visit(method: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        result = method(*args, **kwargs)
        if context.method_name != "run":
            return result
        name = kwargs.get("name", args[0].name)
        maps[name] = at.astype(result.dtype) if name == layer else result
        return maps[name]

    with nn.intercept_methods(visit):
        logits, features = network(images)
    return logits, maps | {LAST: features["last"]}


def _scaled(full: jax.Array | np.ndarray, size: jax.Array | np.ndarray, min_max: bool = False) -> jax.Array:
    """Returns maps [B, H, W] scaled to 0..1; zeros if constant up to rounding relative to the summands' `size` [B]."""
    low, high = full.min((1, 2), keepdims=True), full.max((1, 2), keepdims=True)
    constant = high - low <= ROUNDING * size[:, None, None]
    low, top = (low, high - low + EPSILON) if min_max else (0.0, high)
    return jnp.where(constant, 0.0, (full - low) / jnp.where(constant, 1.0, top))


def heat_colors(heat: np.ndarray) -> np.ndarray:
    """Returns a map [H, W] in 0..1 in the perceptually uniform colors of viridis, uint8 [H, W, 3]."""
    from matplotlib import colormaps  # here: most callers draw nothing

    levels = np.rint(np.clip(heat, 0, 1) * 255).astype(np.uint8)
    return np.asarray(colormaps["viridis"](levels, bytes=True))[..., :3]


def overlay(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Returns the mean of an image uint8 [H, W, 1 or 3] and the colors of its map [H, W] in 0..1, uint8 [H, W, 3]."""
    return np.rint((image.astype(np.float32) + heat_colors(heat)) / 2).astype(np.uint8)
