"""The two exported functions of weights and pixels, in float32.

    predict   (weights, pixels uint8 [b, *`artifacts.image_shape`]) -> {"probabilities", "logits" float32 [b, classes],
              "features" float32 [b, F]}
    gradcam   (weights, pixels, targets int32 [b], -1 for the predicted class) -> {"maps" float32 [b, H, W]}; only for
              networks with a feature map that is large enough for Grad-CAM

Probabilities are calibrated: softmax(logits / temperature), or sigmoid for several findings per image. Features are the
spatial mean of the last map. `weights` is a flat dict of float32 arrays with folded batch norms
(`lungjax.models.batch_norm_folding`). Formats whose converter needs plain operations trace the functions inside
`conv.plain_forms`.
"""

import json
import timeit
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from lungjax import config as configs
from lungjax import models
from lungjax.config import ModelConfig, overrides
from lungjax.config.metadata import Metadata
from lungjax.explain import saliency
from lungjax.inference import artifacts, ensembles, model
from lungjax.models import batch_norm_folding, trees
from lungjax.models.batch_norm_folding import FoldedModel
from lungjax.models.inputs import normalize
from lungjax.models.ops import conv
from lungjax.models.outputs import with_tta

TOLERANCE = 1e-5  # largest difference of an export from the network, as `worst_difference` measures it
ROUNDING_FACTOR = 4  # an export may have this multiple of the network's own rounding error, if that is larger
MAX_TOLERANCE = 1e-4
CHECKED_BATCHES = (1, 3)  # batch sizes of the comparison
TIMED_CALLS = 3  # with one image, after the first call


class Check(NamedTuple):
    """The result of `Functions.check`."""

    difference: float  # result of `worst_difference`
    milliseconds: float  # per image on this machine, in the fastest of TIMED_CALLS calls


@dataclass(frozen=True, eq=False)
class Functions:
    """The two functions of a network and their weights."""

    metadata: Metadata
    config: ModelConfig
    module: nn.Module  # of `config`, in float32
    variables: dict[str, Any]  # params and batch_stats

    @property
    def configs(self) -> list[ModelConfig]:
        """The configuration of each network."""
        return [self.config]

    @property
    def methods(self) -> tuple[str, ...]:
        """The saliency methods that the network allows."""
        return self.explainer.methods

    @cached_property
    def weights(self) -> dict[str, np.ndarray]:
        """The first argument of both functions, by path."""
        with conv.plain_forms():
            folded = self._network.fold(self.variables)
        return {path: np.asarray(leaf, np.float32) for path, leaf in trees.flatten(folded).items()}

    def predict(self, weights: Any, pixels: jax.Array) -> dict[str, jax.Array]:
        """Returns calibrated probabilities, logits and features of uint8 pixels [b, H, W, C]."""
        return self._outputs(self._network, _tree(weights), pixels)

    def _outputs(self, network: Any, variables: Any, pixels: jax.Array) -> dict[str, jax.Array]:
        logits, features = with_tta(network, self.metadata.tta)(variables, normalize(pixels, self.metadata.input))
        return model.named_outputs(logits, features["last"], self.metadata)

    def gradcam(self, weights: Any, pixels: jax.Array, targets: jax.Array) -> dict[str, jax.Array]:
        """Returns the maps of `saliency.Explainer` for target classes int32 [b]."""
        folded = _tree(weights)
        head = {name: folded[name].get("head", {}) for name in folded}  # without folded norms
        return {"maps": self.explainer.cam("gradcam")(folded, head, pixels, targets)[0]}

    def sample(self: "Exportable", batch: int) -> np.ndarray:
        """Returns random images for the comparison, uint8 [batch, *image_shape]: noise over blobs of several sizes."""
        rng, shape = np.random.default_rng(batch), (batch, *artifacts.image_shape(self.metadata))
        total = 0.3 * rng.normal(size=shape)
        for side in (2, 5, 13, 34):
            blobs = rng.normal(size=(batch, *[side] * len(shape[1:3]), *shape[3:]))
            total += jax.image.resize(blobs, shape, "nearest")
        return np.asarray(np.clip(128 + 32 * total, 0, 255), np.uint8)

    def reference(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the outputs of the network itself: not folded, with this platform's operations, image by image."""
        outputs = [self._reference(self.variables, pixels[i : i + 1]) for i in range(len(pixels))]
        return {name: np.concatenate([each[name] for each in outputs]) for name in artifacts.OUTPUTS}

    def check(self: "Exportable", run: Any, name: str) -> Check:
        """Compares an export with the network and times it.

        `run` maps uint8 pixels to a dict with `artifacts.OUTPUTS`; messages start with `name`. Raises ValueError if the
        difference is above MAX_TOLERANCE, or above TOLERANCE and ROUNDING_FACTOR times that of the folded network in
        float32.
        """
        pixels = [self.sample(batch) for batch in CHECKED_BATCHES]
        expected = [self.reference(images) for images in pixels]
        difference = worst_difference([run(images) for images in pixels], expected)
        if not difference <= TOLERANCE:
            folded = jax.jit(self.predict)
            rounding = worst_difference([folded(self.weights, images) for images in pixels], expected)
            allowed = min(max(TOLERANCE, ROUNDING_FACTOR * rounding), MAX_TOLERANCE)
            if not difference <= allowed:
                error = f"outputs differ from the network's by {difference:.1e} of their range, above {allowed:.0e}"
                raise ValueError(f"{name}: {error}; use another --format, and please report the network")
        times = [timeit.timeit(lambda: np.asarray(run(pixels[0])["logits"]), number=1) for _ in range(TIMED_CALLS)]
        return Check(difference, 1e3 * min(times))

    @cached_property
    def _network(self) -> FoldedModel:
        spec = self.metadata.input
        return FoldedModel(self.module, self.variables, (*spec.size, spec.network_channels))

    @cached_property
    def explainer(self) -> saliency.Explainer:
        """The explainer of the network."""
        data = self.metadata
        return saliency.Explainer(self.module, self.variables, data.input, data.positive, tta=data.tta)

    @cached_property
    def _reference(self) -> Any:
        run = partial(self._outputs, partial(self.module.apply, train=False))
        return conv.jit(run, train=False)


@dataclass(frozen=True, eq=False)
class EnsembleFunctions:
    """The same for an ensemble; its weights are named MEMBER/path."""

    metadata: Metadata
    members: tuple[Functions, ...]
    sample, check = Functions.sample, Functions.check

    @property
    def configs(self) -> list[ModelConfig]:
        """The configuration of each network."""
        return [member.config for member in self.members]

    @property
    def methods(self) -> tuple[str, ...]:
        """The saliency methods that all networks allow."""
        region = ensembles.same_region(self.metadata)
        return tuple(m for m in saliency.METHODS if region and all(m in each.methods for each in self.members))

    @cached_property
    def weights(self) -> dict[str, np.ndarray]:
        """The first argument of both functions, by path."""
        return {f"{i}/{path}": leaf for i, each in enumerate(self.members) for path, leaf in each.weights.items()}

    def predict(self, weights: Any, pixels: jax.Array) -> dict[str, jax.Array]:
        """Returns the mean probabilities, logits and features of `model.mean_outputs`."""
        parts = artifacts.member_pixels(self.metadata, pixels)
        each = [member.predict(_of_member(weights, i), parts[i]) for i, member in enumerate(self.members)]
        return model.mean_outputs(each, self.metadata)

    def gradcam(self, weights: Any, pixels: jax.Array, targets: jax.Array) -> dict[str, jax.Array]:
        """Returns the mean of the members' maps for target classes int32 [b]."""
        targets = jnp.where(targets < 0, self.predict(weights, pixels)["probabilities"].argmax(-1), targets)
        parts = artifacts.member_pixels(self.metadata, pixels)
        maps = [each.gradcam(_of_member(weights, i), parts[i], targets) for i, each in enumerate(self.members)]
        return {"maps": model.mean_maps([each["maps"] for each in maps], self.metadata.input.size)}

    def reference(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the mean outputs of the networks themselves."""
        parts = artifacts.member_pixels(self.metadata, pixels)
        each = [member.reference(part) for member, part in zip(self.members, parts, strict=True)]
        means = model.mean_outputs(each, self.metadata)
        return {name: np.asarray(array) for name, array in means.items()}


Exportable = Functions | EnsembleFunctions


def worst_difference(results: list[Any], expected: list[Any]) -> float:
    """Returns the largest difference of the outputs: absolute for probabilities, else relative to the expected range.

    `results` and `expected` have one dict with `artifacts.OUTPUTS` per batch; the range of an output spans all batches.
    The difference is infinite if shapes differ or a result is not finite.
    """
    worst = 0.0
    for name in artifacts.OUTPUTS:
        arrays = [np.asarray(outputs[name], np.float64) for outputs in expected]
        span = 1.0 if name == "probabilities" else max(map(np.max, arrays)) - min(map(np.min, arrays))
        for outputs, array in zip(results, arrays, strict=True):
            values = np.asarray(outputs[name], np.float64)
            if values.shape != array.shape or not np.isfinite(values).all():
                return float("inf")
            worst = max(worst, float(np.abs(values - array).max() / (span or 1.0)))
    return worst


def load(workdirs: Sequence[Path]) -> Exportable:
    """Returns the functions of finished runs in float32. Raises the same errors as `model.load` for runs."""
    members = []
    for workdir in workdirs:
        network, metadata = model.load_finished(workdir)
        # `weights` may name a folder of this machine and is no longer needed.
        config = replace(network.config.model, dtype="float32", weights="none")
        module = models.build(config, len(metadata.classes))
        members.append(Functions(metadata, config, module, network.variables))
    if len(members) == 1:
        return members[0]
    return EnsembleFunctions(ensembles.describe(workdirs, [each.metadata for each in members]), tuple(members))


def from_pyz(path: Path) -> Exportable:
    """Returns the functions of the weights and configuration of a model.pyz. Raises ValueError if they don't match."""
    metadata, weights, about = artifacts.read_parts(path)
    where, networks = f"{path}: {artifacts.ABOUT}", about.get("networks")
    if not isinstance(networks, list) or len(networks) != (len(metadata.members) or 1):
        raise ValueError(f"{where}: the number of networks is not that of {artifacts.MODEL}")
    if not metadata.members:
        return _restored(metadata, networks[0], weights, where)
    members = [
        _restored(member, networks[i], _of_member(weights, i), where) for i, member in enumerate(metadata.members)
    ]
    return EnsembleFunctions(metadata, tuple(members))


def _restored(metadata: Metadata, network: Any, weights: Any, where: str) -> Functions:
    config = overrides.from_json(json.dumps({"model": network}), where)
    configs.check(config)
    module, spec = models.build(config.model, len(metadata.classes)), metadata.input
    shape = (*spec.size, spec.network_channels)
    shapes = models.abstract_variables(module, shape)
    with conv.plain_forms():
        pairs = FoldedModel(module, shapes, shape).pairs
    leaves = batch_norm_folding.unfold(weights, pairs)
    expected = {path: leaf.shape for path, leaf in trees.flatten(shapes).items()}
    if {path: leaf.shape for path, leaf in leaves.items()} != expected:
        raise ValueError(f"{where}: the weights belong to another network or another version of lungjax")
    return Functions(metadata, config.model, module, _tree(leaves))


@contextmanager
def without_source_paths() -> Iterator[None]:
    """Keeps this machine's paths out of exported programs, since jax records the source line of each operation."""
    names = {"jax_include_full_tracebacks_in_locations": False, "jax_hlo_source_file_canonicalization_regex": ".*"}
    before = {name: getattr(jax.config, name) for name in names}
    try:
        for name, value in names.items():
            jax.config.update(name, value)
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def _of_member(weights: Any, index: int) -> dict[str, Any]:
    prefix = f"{index}/"
    return {path.removeprefix(prefix): leaf for path, leaf in weights.items() if path.startswith(prefix)}


def _tree(weights: Any) -> dict[str, Any]:
    tree = trees.unflatten({path: jnp.asarray(leaf) for path, leaf in weights.items()})
    return {"params": tree["params"], "batch_stats": tree.get("batch_stats", {})}
