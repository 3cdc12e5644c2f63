"""Maps of what a network looked at, [H, W] in 0..1 over its input: five methods, for every network.

Every network returns its last map and has one submodule `head` that turns it into logits. So the three CAM methods
need one forward pass and the gradient of the head alone; nothing in them knows a family. The score of a class is its
logit; of a sigmoid head z for the positive class and -z for the other.

Under valid padding a map shows the inner part of the image, and is laid there (`models.receptive_field`). The papers
and the study stretch it over the whole image instead, and so does gradcam_positive. A map says where the score came
from, not whether it is right to look there: `quality` measures the worth of a method on a trained run. A map with no
evidence (constant but for rounding, also where the last map is a single cell) is all zeros, never noise stretched to
0..1.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from lungjax.config import EXPLANATIONS, Config, InputSpec, nearest
from lungjax.models import folding, outputs, receptive_field
from lungjax.models.head import Head
from lungjax.models.inputs import normalize
from lungjax.models.ops import conv

METHODS = EXPLANATIONS
BASELINES = ("black", "gray", "both")
EVEN = 1e-5  # of what is added up in a map: its highest and lowest value are no further apart through rounding alone
EPSILON = 1e-8  # of the CT-COV19 study's min-max

Maps = tuple[jax.Array, jax.Array]  # a raw map [B, h, w], and [B] the size of what was added up in it


def gradcam(last: jax.Array, gradient: jax.Array) -> Maps:
    """Grad-CAM (Selvaraju et al., ICCV 2017, arXiv 1610.02391, equations 1 and 2).

    A channel's weight is the mean of its gradient; the map is the ReLU of the weighted sum. `last` and `gradient` of
    the score by it are [B, h, w, c].
    """
    raw, size = _weighted(last, gradient.mean((1, 2)))
    return nn.relu(raw), size


def gradcam_positive(last: jax.Array, gradient: jax.Array) -> Maps:
    """The CT-COV19 study's form (github.com/marta-0/covid-ct, covid/gradcam.py, after a PyImageSearch tutorial).

    A channel's weight is the mean of its gradient where both activation and gradient are positive, 0 elsewhere; there
    is no ReLU over the sum. Since no weight is negative, what speaks against the class is not taken off.
    """
    both = (last > 0) & (gradient > 0)
    return _weighted(last, jnp.where(both, gradient, 0.0).mean((1, 2)))


def gradcam_plus_plus(last: jax.Array, gradient: jax.Array) -> Maps:
    """Grad-CAM++ (Chattopadhay et al., WACV 2018, arXiv 1710.11063, equation 19), for the exponential of the score.

    With g the gradient of the score at a cell and S the sum of the channel's activations, the paper's coefficient
    g^2 / (2 g^2 + S g^3) times ReLU(g) is ReLU(g) / (2 + S ReLU(g)); a channel's weight is the sum of that. The factor
    exp(score), the same for all cells, is left out. The paper takes activations to be positive: where they are not
    (no ReLU at the end of BiT and ConvNeXt), S is the sum of the positive ones, which keeps the coefficient in 0..1/2.
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


def class_scores(logits: jax.Array, targets: jax.Array, positive: int | None) -> jax.Array:
    """Returns the score [B] of each example's class in `targets` [B] from its logits [B, outputs]."""
    if positive is None:
        return jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return jnp.where(targets == positive, logits[:, 0], -logits[:, 0])


@dataclass(frozen=True, eq=False)
class Explainer:
    """Makes maps for one network. Build it once: what it compiles is kept.

    Raises ValueError for an unknown baseline, or a patch or stride that does not fit into the image.
    """

    module: nn.Module  # of `models.build`
    variables: dict[str, Any]  # params and batch_stats
    spec: InputSpec  # of the images, with the weights' mean and std
    positive: int | None = None  # class that a sigmoid head speaks for; None for softmax
    batch_size: int = 0  # images (and occluded copies) at once; 0 chooses by image size and machine, as prediction does
    steps: int = 32  # of integrated_gradients
    baseline: str = "black"  # one of BASELINES: where its path begins; "gray" is the image's own mean, "both" averages
    patch: int = 0  # side of occlusion's square in pixels; 0 is a seventh of the shorter side
    stride: int = 0  # pixels it moves by; 0 is half a patch
    align: bool = True  # gradcam and gradcam++ lie where their cells look; False stretches them evenly, as published

    def __post_init__(self) -> None:
        """Checks what the compiler would not."""
        if self.baseline not in BASELINES:
            raise ValueError(f"baseline={self.baseline!r}: allowed are {', '.join(BASELINES)}")
        if self.steps < 1 or not 1 <= self._patch <= min(self.spec.size) or not 1 <= self._stride <= self._patch:
            raise ValueError(
                f"steps={self.steps}, patch={self.patch}, stride={self.stride}: at least 1, a patch no larger than the "
                f"image ({self.spec.size[0]} x {self.spec.size[1]}) and a stride no larger than the patch"
            )

    def maps(
        self, images: np.ndarray, targets: np.ndarray | None = None, method: str = "gradcam"
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns maps float32 [B, H, W] in 0..1 and class probabilities float32 [B, C].

        Args:
          images: uint8 [B, H, W, C] as the pipeline and `api.read` give them.
          targets: int [B], the class each map is about; None takes each image's most probable one.
          method: one of METHODS.

        Maps of the last layer are interpolated linearly to the input's size. The highest value is 1: maps are divided
        by their maximum, so that 0 stays "nothing for this class"; gradcam_positive is min-max scaled, as in the study.

        Raises ValueError for an unknown method, images of another shape or dtype, and targets that are no classes.
        """
        if method not in METHODS:
            raise ValueError(f"method={method!r}: {nearest(method, METHODS)}")
        images, wanted = self._checked(images, targets)
        if method in CAMS:
            program = self._program(method, lambda: self.cam(method))
            return self._over(images, wanted, lambda x, t: program(self._folded, self._head, x, t), 2)
        probabilities = self.probabilities(images)
        wanted = np.where(wanted < 0, probabilities.argmax(-1) if len(images) else wanted, wanted)
        if method == "occlusion":
            made = [self._occluded(image, target) for image, target in zip(images, wanted, strict=True)]
            return np.reshape(np.asarray(made, np.float32), (-1, *self.spec.size)), probabilities
        attributions, _ = self.attributions(images, wanted)
        # What speaks for the class; the ReLU of the other methods.
        raw, size = np.maximum(attributions.sum(-1), 0), np.abs(attributions).sum(-1).max((1, 2), initial=0)
        return np.asarray(_scaled(jnp.asarray(raw), jnp.asarray(size), False)), probabilities

    def probabilities(self, images: np.ndarray) -> np.ndarray:
        """Returns class probabilities float32 [B, C] of uint8 images [B, H, W, C]."""
        images, wanted = self._checked(images, None)

        def make() -> Any:
            def predict(folded: Any, pixels: jax.Array) -> jax.Array:
                return outputs.probabilities(self._logits(folded, pixels), self.positive)

            return predict

        program = self._program("predict", make)
        return self._over(images, wanted, lambda x, _: (program(self._folded, x),), 1)[0]

    def attributions(self, images: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Integrated gradients (Sundararajan et al., ICML 2017, arXiv 1703.01365) of whole images.

        Returns float32 [B, H, W, C], (x - x0) times the mean gradient of the score on the way from the baseline x0 to
        the image x (the midpoints of `steps` equal parts), and [B], score(x) - score(x0). By the completeness axiom an
        image's attributions add up to that difference, as nearly as `steps` allow. With baseline "both" each is the
        mean over the black and the gray one. Arguments as in `maps`.
        """
        images, wanted = self._checked(images, targets)

        def make() -> Any:
            def slope(folded: Any, x: jax.Array, start: jax.Array, part: jax.Array, chosen: jax.Array) -> Any:
                def score(at: jax.Array) -> tuple[jax.Array, jax.Array]:
                    each = class_scores(self._logits(folded, at), chosen, self.positive)
                    return each.sum(), each

                gradient, each = jax.grad(score, has_aux=True)(start + part * (x - start))
                return (x - start) * gradient, each

            return slope

        program = self._program("integrated_gradients", make)

        def one(pixels: np.ndarray, chosen: np.ndarray) -> tuple[Any, Any]:
            x = jnp.asarray(pixels, jnp.float32)
            starts = {"black": jnp.zeros_like(x), "gray": jnp.broadcast_to(x.mean((1, 2), keepdims=True), x.shape)}
            used = [start for name, start in starts.items() if self.baseline in (name, "both")]
            total, difference = jnp.zeros_like(x), jnp.zeros(len(x))
            for start in used:
                for i in range(self.steps):
                    total += program(self._folded, x, start, np.float32((i + 0.5) / self.steps), chosen)[0]
                ends = [program(self._folded, x, start, np.float32(part), chosen)[1] for part in (1.0, 0.0)]
                difference += ends[0] - ends[1]
            return total / (self.steps * len(used)), difference / len(used)

        return self._over(images, wanted, one, 2)

    def with_variables(self, variables: dict[str, Any]) -> "Explainer":
        """Returns an explainer of the same network with other variables; nothing is compiled again."""
        other = replace(self, variables=variables)
        other.__dict__.update(_network=self._network, _compiled=self._compiled)
        return other

    @cached_property
    def map_size(self) -> tuple[int, int]:
        """Height and width of the last map in cells: the finest that a CAM method can tell apart."""
        shape = jax.eval_shape(self._last, self.variables, self._image).shape
        return int(shape[1]), int(shape[2])

    def _last(self, variables: dict[str, Any], image: jax.Array) -> jax.Array:
        last: jax.Array = self.module.apply(variables, image, train=False)[1]["last"]
        return last

    @property
    def _image(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, *self.spec.size, self.spec.network_channels), jnp.float32)

    def grain(self, method: str) -> tuple[int, int]:
        """Returns how many rows and columns of cells a method's maps have before they are resized."""
        if method in CAMS:
            return self.map_size
        height, width = self.spec.size
        return (-(-height // self._stride), -(-width // self._stride)) if method == "occlusion" else (height, width)

    @property
    def classes(self) -> int:
        """How many classes there are."""
        return 2 if self.positive is not None else int(self.module.outputs)

    @property
    def _patch(self) -> int:
        return self.patch or max(min(self.spec.size) // 7, 1)

    @property
    def _stride(self) -> int:
        return self.stride or max(self._patch // 2, 1)

    @cached_property
    def _network(self) -> folding.FoldedModel:
        return folding.FoldedModel(self.module, self.variables, (*self.spec.size, self.spec.network_channels))

    @cached_property
    def _folded(self) -> dict[str, Any]:
        return self._network.fold(self.variables)

    @cached_property
    def _compiled(self) -> dict[str, Any]:
        return {}

    @property
    def _head(self) -> dict[str, Any]:  # unfolded: no norm of the head follows a convolution
        return {name: (self.variables.get(name) or {}).get("head", {}) for name in ("params", "batch_stats")}

    def _program(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self._compiled:
            self._compiled[name] = jax.jit(make(), compiler_options=conv.compiler_options())
        return self._compiled[name]

    def _run(self, folded: dict[str, Any], pixels: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        return self._network(folded, normalize(pixels, self.spec))

    def _logits(self, folded: dict[str, Any], pixels: jax.Array) -> jax.Array:
        return self._run(folded, pixels)[0].astype(jnp.float32)

    def cam(self, method: str, probabilities_of: Callable[[jax.Array], jax.Array] | None = None) -> Any:
        """Returns one of CAMS as a function of folded and head variables, pixels, targets (-1: the most probable)."""
        told = probabilities_of or partial(outputs.probabilities, positive=self.positive)
        head, guided = Head(self.module.head, self.module.outputs), method == "gradcam_positive"
        places = receptive_field.places(self._last, self.variables, self._image) if self.align and not guided else None
        places = receptive_field.over(places, self.spec.size, self.map_size)
        down, across = map(receptive_field.taps, places, self.spec.size, self.map_size)

        def run(folded: Any, own: Any, pixels: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
            logits, features = self._run(folded, pixels)
            probabilities = told(logits)
            chosen = jnp.where(targets < 0, probabilities.argmax(-1), targets)
            last = features["last"].astype(jnp.float32)

            def score(at: jax.Array) -> jax.Array:
                return class_scores(head.apply(own, at, train=False), chosen, self.positive).sum()

            raw, size = CAMS[method](last, jax.grad(score)(last))
            full = jnp.einsum("yi,bij,xj->byx", down, raw, across, precision="highest")
            return _scaled(full, size, guided), probabilities

        return run

    def _occluded(self, image: np.ndarray, target: int) -> np.ndarray:
        """Occlusion (Zeiler and Fergus, ECCV 2014, arXiv 1311.2901): how far the score falls where a patch is hidden.

        A square of the image's mean slides over it, also along the far edges. A pixel's value is the mean fall of the
        score over the patches that hide it; where it rises, 0. Returns float32 [H, W].
        """

        def make() -> Any:
            def run(folded: Any, image: jax.Array, fill: jax.Array, corners: jax.Array, target: jax.Array) -> jax.Array:
                rows, columns = jnp.arange(image.shape[0]), jnp.arange(image.shape[1])
                down = (rows >= corners[:, :1]) & (rows < corners[:, :1] + self._patch)
                across = (columns >= corners[:, 1:]) & (columns < corners[:, 1:] + self._patch)
                hidden = (down[:, :, None] & across[:, None, :])[..., None]
                logits = self._logits(folded, jnp.where(hidden, fill, image.astype(jnp.float32)))
                return class_scores(logits, jnp.broadcast_to(target, (len(corners),)), self.positive)

            return run

        program = self._program("occlusion", make)
        (height, width), side = self.spec.size, self._patch
        tops, lefts = (sorted({*range(0, end - side, self._stride), end - side}) for end in (height, width))
        # The first one hides nothing: its score is the whole image's, from the same program.
        corners = np.asarray([(height, width), *((top, left) for top in tops for left in lefts)], np.int32)
        size = min(self._batch, len(corners))
        padded = np.concatenate([corners, np.repeat(corners[:1], -len(corners) % size, axis=0)])
        fill = image.reshape(-1, image.shape[-1]).mean(0).astype(np.float32)
        parts = [
            np.asarray(program(self._folded, image, fill, padded[at : at + size], np.int32(target)))
            for at in range(0, len(padded), size)
        ]
        scores = np.concatenate(parts)[: len(corners)]
        fall, times = np.zeros((2, height, width), np.float32)
        for (top, left), score in zip(corners[1:], scores[1:], strict=True):
            fall[top : top + side, left : left + side] += scores[0] - score
            times[top : top + side, left : left + side] += 1
        raw = np.maximum(fall / times, 0)
        return np.asarray(_scaled(jnp.asarray(raw[None]), jnp.asarray(np.abs(scores).max()[None]), False))[0]

    @property
    def _batch(self) -> int:
        return self.batch_size or folding.batch_size(Config(input=self.spec), 1, jax.default_backend())

    def _checked(self, images: np.ndarray, targets: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        images, shape = np.asarray(images), (*self.spec.size, self.spec.channels)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != shape:
            wanted = ", ".join(map(str, shape))
            raise ValueError(f"images are {images.dtype} {list(images.shape)}, wanted uint8 [B, {wanted}]")
        if targets is None:
            return images, np.full(len(images), -1, np.int32)
        found = np.asarray(targets)
        if found.shape != (len(images),) or (len(found) and not (found.min() >= 0 and found.max() < self.classes)):
            raise ValueError(f"targets={found.tolist()}: wanted {len(images)} numbers from 0 to {self.classes - 1}")
        return images, found.astype(np.int32)

    def _over(self, images: np.ndarray, targets: np.ndarray, run: Callable[..., Any], outputs: int) -> Any:
        """Returns what `run(images, targets)` gives, on batches of one size, the last one filled up with black."""
        parts = [
            [np.asarray(found)[:count] for found in run(pixels, chosen)]
            for pixels, chosen, count in self._batches(images, targets)
        ]
        if not parts:
            return (np.zeros((0, *self.spec.size), np.float32), np.zeros((0, self.classes), np.float32))[-outputs:]
        return tuple(np.concatenate(found) for found in zip(*parts, strict=True))

    def _batches(self, images: np.ndarray, targets: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
        size = min(self._batch, len(images))
        for at in range(0, len(images), max(size, 1)):
            pixels, chosen = images[at : at + size], targets[at : at + size]
            short = size - len(pixels)
            filled = np.concatenate([pixels, np.zeros((short, *pixels.shape[1:]), np.uint8)])
            yield filled, np.concatenate([chosen, np.zeros(short, np.int32)]), len(pixels)


def _scaled(full: jax.Array, size: jax.Array, low_is_zero: bool) -> jax.Array:
    """Returns maps [B, H, W] in 0..1, those that are even as far as rounding tells as zeros.

    `size` [B] is how large the terms are that a map is the sum of, by which rounding is judged.
    """
    low, high = full.min((1, 2), keepdims=True), full.max((1, 2), keepdims=True)
    even = high - low <= EVEN * size[:, None, None]
    low, top = (low, high - low + EPSILON) if low_is_zero else (jnp.zeros_like(low), high)
    return jnp.where(even, 0.0, (full - low) / jnp.where(even, 1.0, top))


def heat_colors(heat: np.ndarray, colors: str = "viridis") -> np.ndarray:
    """Returns a map [H, W] in 0..1 as uint8 [H, W, 3], by one of matplotlib's colour maps.

    viridis, the CT-COV19 study's, is even to the eye and in gray; the COVID-Net CT code has "jet", whose bright bands
    show edges that are not there.
    """
    from matplotlib import colormaps  # here: most callers draw nothing

    shown = np.rint(np.clip(heat, 0, 1) * 255).astype(np.uint8)
    return np.asarray(colormaps[colors](shown, bytes=True))[..., :3]


def overlay(image: np.ndarray, heat: np.ndarray, colors: str = "viridis", alpha: float = 0.5) -> np.ndarray:
    """Returns the heat map laid over the image, uint8 [H, W, 3].

    Args:
      image: uint8 [H, W, 1 or 3].
      heat: [H, W] in 0..1.
      colors: as in `heat_colors`. The CT-COV19 study: viridis at 0.5; COVID-Net CT: jet at 0.4.
      alpha: weight of the heat map.

    Raises ValueError if the two differ in height or width.
    """
    if image.ndim != 3 or image.shape[-1] not in (1, 3) or image.shape[:2] != np.shape(heat):
        raise ValueError(f"image {list(image.shape)} and map {list(np.shape(heat))}: wanted [H, W, 1 or 3] and [H, W]")
    mixed = (1 - alpha) * image.astype(np.float32) + alpha * heat_colors(heat, colors)
    return np.rint(mixed).astype(np.uint8)
