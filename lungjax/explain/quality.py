"""What a saliency map is worth, measured: does it point at the lesion, do the pixels it names matter, does it depend
on what was learned?

Three checks, each beside what a map without any knowledge gets:

- the pointing game (Zhang et al., IJCV 2018, arXiv 1608.00507): is the map's maximum on the lesion? Only drawn slices
  have true lesion masks. Chance is the share of the image that is lesion; `chance_in_lungs` the share of the lungs,
  what a map gets that knows lungs and nothing of the finding;
- the deletion curve (Petsiuk et al., RISE, BMVC 2018, arXiv 1806.07421): the class's probability as the pixels that
  the map names first are replaced by the image's mean; the lower the area under it, the better;
- the sanity check (Adebayo et al., NeurIPS 2018, arXiv 1810.03292): the map's rank correlation with itself after the
  weights were shuffled, first the head's, then more and more from the top down. A map that stays shows the image and
  not the network.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from scipy import ndimage, stats

from lungjax.config import InputSpec
from lungjax.data import preprocess
from lungjax.data.imaging import images as image_files
from lungjax.datasets import DatasetName
from lungjax.datasets.phantom import slices
from lungjax.evaluation import bootstrap
from lungjax.explain.saliency import Explainer
from lungjax.models import trees

FIRST_SEED = 2**40  # of patients that no data set has: those of phantom_ct are --seed * 100,000 and what follows
LEVELS = 5  # slices of a patient among which one with a lesion is looked for
TOLERANCE = 0.05  # of the shorter side, how far beside the lesion a maximum still counts in the lenient game
DELETIONS = 20  # steps of the deletion curve
DRAWS = 3  # of shuffled weights
# Mean rank correlation with the trained network's map above which a map counts as unchanged. Our choice: the paper
# gives no number. At 0.5 a quarter of the ranks' variance is still the same.
UNCHANGED = 0.5
PARTS = (0.25, 0.5, 0.75, 1.0)  # of the modules below the head that are shuffled too, from the top down


@dataclass(frozen=True, eq=False)
class Slices:
    """N drawn slices with a visible lesion, as a network sees them; each of another patient."""

    images: np.ndarray  # uint8 [N, H, W, C]
    lesions: np.ndarray  # bool [N, H, W]
    lungs: np.ndarray  # bool [N, H, W]
    labels: np.ndarray  # int64 [N], of the finding


def draw_slices(
    classes: Sequence[str], spec: InputSpec, name: DatasetName, count: int, first_seed: int = FIRST_SEED
) -> Slices:
    """Draws `count` slices of new patients, the findings in turns, and puts their masks through the same cut and size.

    Args:
      classes: of the network, phantom_ct's in any order.
      spec: the network's input.
      name: the data set it was trained on, whose stage and size the slices get.
      count: of slices; a patient without a visible lesion in any of LEVELS slices is passed over.
      first_seed: of the patients.
    """
    findings = [finding for finding in slices.CLASSES if finding != "Normal"]
    made: list[tuple[np.ndarray, np.ndarray, np.ndarray, int]] = []
    seed = first_seed
    while len(made) < count:
        finding = findings[len(made) % len(findings)]
        patient = slices.new_patient(seed, finding)
        levels = slices.levels(patient, LEVELS)
        for i in np.random.default_rng([seed, 30]).permutation(LEVELS):
            image, lesion, lung = _as_input(slices.draw_slice(patient, levels[i]), patient.window, spec, name)
            if lesion.any():
                made.append((image, lesion, lung, list(classes).index(finding)))
                break
        seed += 1
    images, lesions, lungs, labels = zip(*made, strict=True)
    return Slices(np.stack(images), np.stack(lesions), np.stack(lungs), np.asarray(labels))


def _as_input(
    drawn: slices.Phantom, window: tuple[float, float], spec: InputSpec, name: DatasetName
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    left, top, right, bottom = (float(side) for side in drawn.box)
    shown = slices.gray(drawn.hu, window)
    stored, box, region, _ = preprocess.apply_stage(shown, (left, top, right, bottom), name.stage, name.size)
    one = InputSpec(spec.size, 1, spec.crop, spec.crop_size, spec.box_margin, spec.interpolation, spec.antialias)

    def mask(of: np.ndarray) -> np.ndarray:
        kept = image_files.resize(of.astype(np.uint8) * 255, region, stored.shape[:2], "bilinear", True)
        return image_files.to_input(kept, np.asarray(box, np.float32), one, 0.0)[..., 0] > 127

    return (
        image_files.to_input(stored, np.asarray(box, np.float32), spec, 0.0),
        mask(drawn.lesion),
        mask(drawn.lung),
    )


def near(masks: np.ndarray, pixels: float) -> np.ndarray:
    """Returns masks bool [N, H, W] with all that lies within `pixels` of them."""
    return np.stack([ndimage.distance_transform_edt(~mask) <= pixels if mask.any() else mask for mask in masks])


def hits(maps: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Returns, float64 [N], whether the highest value of each map [N, H, W] lies in its mask.

    Of several equal ones the share that does. A map of zeros points nowhere: a miss.
    """
    top = maps.max((1, 2), keepdims=True)
    tied = (maps == top) & (top > 0)
    return (tied & masks).sum((1, 2)) / np.maximum(tied.sum((1, 2)), 1)


def random_maps(count: int, grain: tuple[int, int], size: tuple[int, int], seed: int) -> np.ndarray:
    """Returns float32 [count, height, width] of noise as coarse as a method's maps, resized as they are."""
    noise = np.random.default_rng([seed, 31]).random((count, *grain), np.float32)
    return np.array(jax.image.resize(noise, (count, *size), "linear"))


def deletion(
    explainer: Explainer, images: np.ndarray, maps: np.ndarray, targets: np.ndarray, steps: int = DELETIONS
) -> np.ndarray:
    """Returns the probability of each image's class as its first pixels are replaced, float64 [N, steps + 1].

    Column i has i / steps of the pixels replaced by the image's mean, those with the highest value in the map first;
    equal ones in random order. Its mean by the trapezoidal rule (`area`) is the number to compare.
    """
    count, pixels = len(images), maps.shape[1] * maps.shape[2]
    rng = np.random.default_rng(32)
    order = np.stack([np.lexsort((rng.random(pixels), -one.ravel())) for one in maps])
    fill = np.rint(images.mean((1, 2), keepdims=True)).astype(np.uint8).reshape(count, 1, -1)
    now = images.reshape(count, pixels, -1).copy()
    curve, done = [], 0
    for step in range(steps + 1):
        until = round(step / steps * pixels)
        np.put_along_axis(now, order[:, done:until, None], fill, axis=1)
        done = until
        curve.append(explainer.probabilities(now.reshape(images.shape))[np.arange(count), targets])
    return np.stack(curve, axis=1).astype(np.float64)


def area(curves: np.ndarray) -> np.ndarray:
    """Returns the area under each curve [N, steps + 1] over 0..1."""
    return np.asarray(np.trapezoid(curves, axis=-1) / (curves.shape[-1] - 1))


def module_order(module: nn.Module, image_shape: tuple[int, ...]) -> list[str]:
    """Returns the names of a network's own submodules that have parameters, in the order in which they are called."""
    called: dict[str, None] = {}

    def note(method: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        if len(context.module.path) == 1 and context.method_name == "__call__":
            called[context.module.path[0]] = None
        return method(*args, **kwargs)

    def init() -> Any:
        with nn.intercept_methods(note):
            return module.init(jax.random.key(0), jnp.zeros((1, *image_shape)), train=False)

    params = jax.eval_shape(init)["params"]
    return [name for name in called if name in params]


def shuffled(variables: dict[str, Any], modules: Sequence[str], seed: int) -> dict[str, Any]:
    """Returns variables in which every tensor of `modules` has its own values in another order.

    Unlike fresh random numbers, that keeps the scale of what flows through the network, and running variances positive.
    """
    rng = np.random.default_rng([seed, 33])

    def change(path: str, leaf: Any) -> Any:
        return rng.permutation(np.ravel(leaf)).reshape(np.shape(leaf)) if path.split("/")[0] in modules else leaf

    return {
        kind: trees.unflatten({path: change(path, leaf) for path, leaf in trees.flatten(tree or {}).items()})
        for kind, tree in variables.items()
    }


def rank_correlation(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Returns Spearman's correlation of each pair of maps [N, H, W], float64 [N]; 0 where one of them is constant."""
    ranks = [stats.rankdata(maps.reshape(len(maps), -1), axis=1) for maps in (one, other)]
    a, b = (r - r.mean(1, keepdims=True) for r in ranks)
    spread = np.sqrt((a * a).sum(1) * (b * b).sum(1))
    return np.asarray(np.divide((a * b).sum(1), spread, out=np.zeros(len(a)), where=spread > 0))


def sanity(explainer: Explainer, images: np.ndarray, method: str, draws: int = DRAWS) -> dict[str, Any]:
    """Returns what is left of the maps once weights are shuffled; the classes explained stay the same.

    `stages` has a row for the head alone and for the head with each of PARTS of what is below it: `shuffled` (in
    words), `modules`, `correlation` (mean of images and draws) and `empty` (share of maps without evidence after it,
    whose correlation counts as 0). `passed` is False if the maps stay (above UNCHANGED) when the head is shuffled or
    when everything is, or if all of the trained network's own maps are empty.
    """
    targets = explainer.probabilities(images).argmax(-1)
    before, _ = explainer.maps(images, targets, method)
    shape = (*explainer.spec.size, explainer.spec.network_channels)
    below = [name for name in module_order(explainer.module, shape) if name != "head"][::-1]
    cuts = dict.fromkeys(math.ceil(part * len(below)) for part in PARTS)
    stages: list[dict[str, Any]] = []
    for count in (0, *(cut for cut in cuts if cut)):
        changed = ["head", *below[:count]]
        found, empty = [], []
        for seed in range(draws):
            other = explainer.with_variables(shuffled(explainer.variables, changed, seed))
            after, _ = other.maps(images, targets, method)
            found.append(rank_correlation(before, after))
            empty.append(~after.any((1, 2)))
        whole = "the whole network" if count == len(below) else f"the head and {count} of {len(below)} modules below"
        stages.append(
            {
                "shuffled": whole if count else "the head",
                "modules": len(changed),
                "correlation": float(np.mean(found)),
                "empty": float(np.mean(empty)),
            }
        )
    stays = [stage["correlation"] > UNCHANGED for stage in (stages[0], stages[-1])]
    blank = float((~before.any((1, 2))).mean())
    return {"n": len(images), "draws": draws, "stages": stages, "empty": blank, "passed": not any(stays) and blank < 1}


def pointing(maps: np.ndarray, slices: Slices, random: np.ndarray, right: np.ndarray) -> dict[str, Any]:
    """Returns the pointing game of `maps` on `slices`, strictly and with TOLERANCE, beside chance and random maps.

    `right` bool [N]: which slices the network names rightly; they are also counted alone.
    """
    pixels = TOLERANCE * min(maps.shape[1:])
    wide = near(slices.lesions, pixels)
    found = hits(maps, slices.lesions)
    lungs = (slices.lesions & slices.lungs).sum((1, 2)) / np.maximum(slices.lungs.sum((1, 2)), 1)
    return {
        "n": len(maps),
        "hit_rate": float(found.mean()),
        "interval": bootstrap.wilson(int(found.sum()), len(found)),
        "chance": float(slices.lesions.mean()),
        "chance_in_lungs": float(lungs.mean()),
        "random": float(hits(random, slices.lesions).mean()),
        "tolerance_pixels": pixels,
        "hit_rate_tolerant": float(hits(maps, wide).mean()),
        "chance_tolerant": float(wide.mean()),
        "random_tolerant": float(hits(random, wide).mean()),
        "named_rightly": {"n": int(right.sum()), "hit_rate": float(found[right].mean()) if right.any() else None},
        "empty": float((~maps.any((1, 2))).mean()),
    }


def measure(
    explainer: Explainer,
    images: np.ndarray,
    targets: np.ndarray | None,
    methods: Sequence[str],
    slices: Slices | None = None,
    sane: int = 16,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Returns {method: {"pointing", "deletion", "sanity"}} of a network.

    Args:
      explainer: of the network.
      images: uint8 [N, H, W, C] for the deletion curve; ignored where `slices` are given.
      targets: int [N], the classes explained; None takes the predicted ones.
      methods: of saliency.METHODS.
      slices: with lesion masks; the pointing game explains the true finding, and the rest uses their images too.
      sane: images of the sanity check.
      say: told what is being measured.

    Raises ValueError if there is no image.
    """
    if slices is not None:
        images, targets = slices.images, slices.labels
    if not len(images):
        raise ValueError("no image to measure the maps on")
    predicted = explainer.probabilities(images).argmax(-1)
    targets = predicted if targets is None else np.asarray(targets)
    result: dict[str, Any] = {}
    for method in methods:
        say(f"{method}: maps of {len(images)} images")
        maps, _ = explainer.maps(images, targets, method)
        random = random_maps(len(images), explainer.grain(method), maps.shape[1:], 0)
        row: dict[str, Any] = {}
        if slices is not None:
            row["pointing"] = pointing(maps, slices, random, predicted == slices.labels)
        say(f"{method}: deletion curves")
        curves = [deletion(explainer, images, each, targets) for each in (maps, random)]
        areas = [area(curve) for curve in curves]
        row["deletion"] = {
            "n": len(images),
            "area": float(areas[0].mean()),
            "random_area": float(areas[1].mean()),
            "better_than_random": float((areas[0] < areas[1]).mean()),
            "curve": curves[0].mean(0).round(5).tolist(),
            "random_curve": curves[1].mean(0).round(5).tolist(),
        }
        say(f"{method}: sanity check")
        row["sanity"] = sanity(explainer, images[:sane], method)
        result[method] = row
    return result


def markdown(name: str, what: str, rows: dict[str, Any]) -> str:
    """Returns what `measure` found as a page. `what` says, in words, which images were used."""
    lines = [f"# How far the maps of {name} can be trusted", "", f"Measured on {what}.", ""]
    if any("pointing" in row for row in rows.values()):
        lines += ["## Does the map's maximum lie on the lesion?", ""]
        lines += ["| method | hits (95 %) | rightly named | chance | in the lungs | random map |"]
        lines[-1] += " with tolerance | chance | random map |"
        lines += ["| --- |" + " --- |" * 8]
        for method, row in rows.items():
            p = row["pointing"]
            low, high = p["interval"]
            right = p["named_rightly"]["hit_rate"]
            cells = [f"{p['hit_rate']:.2f} ({low:.2f} to {high:.2f})", "-" if right is None else f"{right:.2f}"]
            keys = ("chance", "chance_in_lungs", "random", "hit_rate_tolerant", "chance_tolerant", "random_tolerant")
            lines += [f"| {method} | " + " | ".join([*cells, *(f"{p[key]:.2f}" for key in keys)]) + " |"]
        pixels = next(iter(rows.values()))["pointing"]["tolerance_pixels"]
        lines += ["", "Chance is the share of the image that is lesion; in the lungs, of the lungs: what a map gets"]
        lines += [f"that finds lungs and nothing more. With tolerance a maximum up to {pixels:.1f} pixels away counts."]
        lines += ["The map explains the true finding; rightly named: only slices whose finding is predicted.", ""]
    lines += ["## Do the pixels matter that it names?", ""]
    lines += [
        "| method | area under the deletion curve | random map | better than random |",
        "| --- | --- | --- | --- |",
    ]
    for method, row in rows.items():
        d = row["deletion"]
        lines += [f"| {method} | {d['area']:.3f} | {d['random_area']:.3f} | {100 * d['better_than_random']:.0f} % |"]
    lines += [
        "",
        "The class's probability as the pixels named first are replaced by the image's mean; lower is better.",
    ]
    lines += ["The random map is as coarse as the method's own.", "", "## Does the map depend on what was learned?", ""]
    first = next(iter(rows.values()))["sanity"]
    lines += ["| method | verdict | " + " | ".join(stage["shuffled"] for stage in first["stages"]) + " |"]
    lines += ["| --- | --- |" + " --- |" * len(first["stages"])]
    for method, row in rows.items():
        s = row["sanity"]
        found = " | ".join(f"{stage['correlation']:.2f}" for stage in s["stages"])
        lines += [f"| {method} | {'passed' if s['passed'] else '**FAILED**'} | {found} |"]
    lines += ["", "Rank correlation of the maps with those after these weights were shuffled, mean of"]
    lines += [f"{first['n']} images and {first['draws']} draws. Above {UNCHANGED} in the first or the last column the"]
    lines += ["map does not change enough: it shows the image rather than the network, and the method fails.", ""]
    return "\n".join(lines)
