"""What is exported: two pure functions of weights and pixels, in float32, in the compiler's plain operations.

    predict   (weights, pixels uint8 [b, H, W, C]) -> {"probabilities", "logits"} float32 [b, classes]
    gradcam   (weights, pixels, targets int32 [b], -1 the predicted class) -> {"maps" float32, "probabilities"}

The logits are the network's; the probabilities are calibrated: the softmax of logits / temperature. `weights` is a flat
dict of float32 arrays. Batch norms are folded (`lungjax.models.folding`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from lungjax import models
from lungjax.config.metadata import Metadata
from lungjax.explain import saliency
from lungjax.inference import predictor
from lungjax.models import folding, outputs, trees
from lungjax.models.inputs import normalize
from lungjax.models.ops import conv

TOLERANCE = 1e-5  # of the logits' range: how far an export may be from the network
ROUNDINGS = 4  # times a network's own rounding are allowed where that is more
MOST = 1e-4
CHECKED = (1, 3)  # batch sizes at which each export is compared before it is kept

Weights = dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Programs:
    """A network's two programs and their weights."""

    metadata: Metadata
    module: nn.Module  # of `models.build`, in float32
    variables: dict[str, Any]  # params and batch_stats

    @cached_property
    def weights(self) -> Weights:
        """The arrays that both programs take, by path, norms folded."""
        with conv.plain_forms():
            folded = self._network.fold(self.variables)
        return {path: np.asarray(leaf, np.float32) for path, leaf in trees.flatten(folded).items()}

    def predict(self, weights: Any, pixels: jax.Array) -> dict[str, jax.Array]:
        """The first program; see above."""
        with conv.plain_forms():
            logits, _ = self._network(_tree(weights), normalize(pixels, self.metadata.input))
            logits = outputs.class_logits(logits, self.metadata.positive)
            return {"probabilities": jax.nn.softmax(logits / self._temperature), "logits": logits}

    def gradcam(self, weights: Any, pixels: jax.Array, targets: jax.Array) -> dict[str, jax.Array]:
        """The second program; the maps are those of `saliency.Explainer`."""
        with conv.plain_forms():
            folded = _tree(weights)
            head = {name: folded[name].get("head", {}) for name in folded}  # of which no norm is folded
            maps, probabilities = self._cam(folded, head, pixels, targets)
            return {"maps": maps, "probabilities": probabilities}

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of the pixels."""
        return (*self.metadata.input.size, self.metadata.input.channels)

    def sample(self, batch: int) -> np.ndarray:
        """Returns pixels to compare on, uint8 [batch, H, W, C]: noise over blobs of many sizes, no two images alike."""
        rng, (height, width, channels) = np.random.default_rng(batch), self.image_shape
        total = np.zeros((batch, height, width, channels))
        for side in (2, 5, 13, 34):
            grid = rng.normal(size=(batch, side, side, channels))
            rows, columns = (np.arange(n) * side // n for n in (height, width))
            total += grid[:, rows][:, :, columns]
        total += 0.3 * rng.normal(size=total.shape)
        return np.asarray(np.clip(128 + 32 * total, 0, 255), np.uint8)

    def reference(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        """Returns what the network itself gives, unfolded and in the forms of this platform, each image on its own."""
        each = [self._own(self.variables, pixels[i : i + 1]) for i in range(len(pixels))]  # one size compiles once
        logits = outputs.class_logits(jnp.concatenate(each), self.metadata.positive)
        return {"probabilities": np.asarray(jax.nn.softmax(logits / self._temperature)), "logits": np.asarray(logits)}

    def check(self, run: Any, what: str) -> float:
        """Compares an export with the network; returns the largest difference of logits by their range.

        Args:
          run: from uint8 pixels [b, H, W, C] to a dict with `probabilities` and `logits` [b, classes].
          what: its name, for the message.

        Raises ValueError if it is above TOLERANCE, or probabilities differ by more than that. A network that itself
        rounds to more than that in float32 is allowed ROUNDINGS times the difference between two ways to compute it:
        as it was trained, and folded in plain operations by the compiler's own choice; never above MOST.
        """
        pixels = [self.sample(batch) for batch in CHECKED]
        wanted = [self.reference(some) for some in pixels]
        found = worst_difference([run(some) for some in pixels], wanted)
        if not found <= TOLERANCE:
            compiled = jax.jit(self.predict)
            own = worst_difference([compiled(self.weights, some) for some in pixels], wanted)
            allowed = min(max(TOLERANCE, ROUNDINGS * own), MOST)
            if not found <= allowed:
                raise ValueError(
                    f"{what}: its logits differ from the network's by {found:.1e} of their range, more than the "
                    f"{allowed:.0e} allowed; it was not kept. Choose another --format, and "
                    "please report the network"
                )
        return found

    @property
    def _temperature(self) -> np.float32:
        return np.float32(self.metadata.temperature)

    @cached_property
    def _network(self) -> folding.FoldedModel:
        spec = self.metadata.input
        return folding.FoldedModel(self.module, self.variables, (*spec.size, spec.network_channels))

    @cached_property
    def _cam(self) -> Any:
        spec, positive = self.metadata.input, self.metadata.positive

        def calibrated(logits: jax.Array) -> jax.Array:
            return jax.nn.softmax(outputs.class_logits(logits, positive) / self._temperature)

        return saliency.Explainer(self.module, self.variables, spec, positive).cam("gradcam", calibrated)

    @cached_property
    def _own(self) -> Any:
        def run(variables: Any, pixels: jax.Array) -> jax.Array:
            logits: jax.Array = self.module.apply(variables, normalize(pixels, self.metadata.input), train=False)[0]
            return logits

        return jax.jit(run, compiler_options=conv.compiler_options(train=False))


def worst_difference(found: list[Any], wanted: list[Any]) -> float:
    """Returns the largest difference of logits by the range of all wanted ones, or of probabilities if that is larger.

    Infinite for another shape, and for what is no number.
    """
    worst = 0.0
    for name in ("logits", "probabilities"):
        values = [np.asarray(result[name], np.float64) for result in wanted]
        span = max(v.max() for v in values) - min(v.min() for v in values) if name == "logits" else 1.0
        for result, value in zip(found, values, strict=True):
            given = np.asarray(result[name], np.float64)
            if given.shape != value.shape or not np.isfinite(given).all():
                return float("inf")
            worst = max(worst, float(np.abs(given - value).max() / (span or 1.0)))
    return worst


def of_run(workdir: Path) -> Programs:
    """Returns the programs of a finished run.

    Raises ValueError as `predictor.load_run`.
    """
    trained, told = predictor.load_run(workdir)
    module = models.build(replace(trained.config.model, dtype="float32"), len(told.classes))
    return Programs(told, module, trained.variables)


@contextmanager
def without_places() -> Iterator[None]:
    """Keeps paths of this machine out of a program, in which jax writes where each operation comes from."""
    names = {"jax_include_full_tracebacks_in_locations": False, "jax_hlo_source_file_canonicalization_regex": ".*"}
    before = {name: getattr(jax.config, name) for name in names}
    try:
        for name, value in names.items():
            jax.config.update(name, value)
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def _tree(weights: Any) -> dict[str, Any]:
    tree = trees.unflatten({path: jnp.asarray(leaf) for path, leaf in weights.items()})
    return {"params": tree["params"], "batch_stats": tree.get("batch_stats", {})}
