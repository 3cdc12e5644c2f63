"""Quality of saliency maps: pointing game, deletion curve and sanity check; see `lungjax/evaluation/README.md`."""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from scipy import stats

from lungjax import datasets
from lungjax.config import InputSpec
from lungjax.data import preprocess
from lungjax.data.imaging import images as image_files
from lungjax.data.pipeline import Reader
from lungjax.datasets import DatasetName
from lungjax.datasets.phantom import slices as phantom
from lungjax.evaluation import bootstrap
from lungjax.explain import figures
from lungjax.explain.saliency import Explainer
from lungjax.report import templating
from lungjax.runtime import files

FIRST_SEED = 2**40  # of new patients: the seeds of phantom_ct start at --seed * 100,000
LEVELS = 5  # slices per patient that are searched for a lesion
DELETIONS = 20  # steps of the deletion curve
SANITY_IMAGES = 16
DRAWS = 3  # of shuffled weights
# Mean rank correlation with the original map above which a map counts as unchanged. The paper gives no limit; at our
# choice of 0.5 the original map explains a quarter of the variance of the ranks.
UNCHANGED = 0.5


@dataclass(frozen=True, eq=False)
class Slices:
    """N synthetic slices with a visible lesion as network inputs, one per patient."""

    images: np.ndarray  # uint8 [N, H, W, C]
    lesions: np.ndarray  # bool [N, H, W]
    lungs: np.ndarray  # bool [N, H, W]
    labels: np.ndarray  # int64 [N], of the finding


def draw_slices(classes: Sequence[str], spec: InputSpec, name: DatasetName, count: int) -> Slices:
    """Returns `count` slices from new patients with visible lesions of alternating findings, preprocessed, with masks.

    `classes` are those of phantom_ct in any order; `name` is the training data set, whose stage and size apply.
    """
    findings = [finding for finding in phantom.CLASSES if finding != "Normal"]
    rows: list[tuple[np.ndarray, np.ndarray, np.ndarray, int]] = []
    seeds = itertools.count(FIRST_SEED)
    while len(rows) < count:
        patient = phantom.new_patient(next(seeds), findings[len(rows) % len(findings)])
        levels = phantom.levels(patient, LEVELS)
        for i in np.random.default_rng([patient.seed, 30]).permutation(LEVELS):
            image, lesion, lung = _as_input(phantom.draw_slice(patient, levels[i]), patient.window, spec, name)
            if lesion.any():
                rows.append((image, lesion, lung, list(classes).index(patient.finding)))
                break
    images, lesions, lungs, labels = zip(*rows, strict=True)
    return Slices(np.stack(images), np.stack(lesions), np.stack(lungs), np.asarray(labels))


def _as_input(
    drawn: phantom.Phantom, window: tuple[float, float], spec: InputSpec, name: DatasetName
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    left, top, right, bottom = (float(side) for side in drawn.box)
    gray = phantom.gray(drawn.hu, window)
    stored, box, region, _ = preprocess.apply_stage(gray, (left, top, right, bottom), name.stage, name.size)
    place, one_channel = np.asarray(box, np.float32), replace(spec, channels=1)

    def resized(mask: np.ndarray) -> np.ndarray:
        pixels = image_files.resize(mask.astype(np.uint8) * 255, region, stored.shape[:2], "bilinear", True)
        return image_files.to_input(pixels, place, one_channel, 0.0)[..., 0] > 127

    return image_files.to_input(stored, place, spec, 0.0), resized(drawn.lesion), resized(drawn.lung)


def hits(maps: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Returns the share of each map's [N, H, W] maxima that lie in its mask, float64 [N]; 0 for a map of zeros."""
    top = maps.max((1, 2), keepdims=True)
    tied = (maps == top) & (top > 0)
    return (tied & masks).sum((1, 2)) / np.maximum(tied.sum((1, 2)), 1)


def random_maps(count: int, grain: tuple[int, int], size: tuple[int, int], seed: int) -> np.ndarray:
    """Returns noise of the resolution `grain`, resized like the maps of a method, float32 [count, *size]."""
    noise = np.random.default_rng([seed, 31]).random((count, *grain), np.float32)
    return np.array(jax.image.resize(noise, (count, *size), "linear"))


def deletion(explainer: Explainer, images: np.ndarray, maps: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Returns the deletion curve of each image (the probability of its class), float64 [N, DELETIONS + 1].

    In column i, the mean replaces the share i / DELETIONS of the pixels, highest first, ties broken at random.
    """
    count, pixels = len(images), maps.shape[1] * maps.shape[2]
    rng = np.random.default_rng(32)
    order = np.stack([np.lexsort((rng.random(pixels), -one.ravel())) for one in maps])
    fill = np.rint(images.mean((1, 2), keepdims=True)).astype(np.uint8).reshape(count, 1, -1)
    current = images.reshape(count, pixels, -1).copy()
    curve, done = [], 0
    for step in range(DELETIONS + 1):
        until = round(step / DELETIONS * pixels)
        np.put_along_axis(current, order[:, done:until, None], fill, axis=1)
        done = until
        curve.append(explainer.probabilities(current.reshape(images.shape))[np.arange(count), targets])
    return np.stack(curve, axis=1).astype(np.float64)


def shuffled(variables: dict[str, Any], modules: Sequence[str], seed: int) -> dict[str, Any]:
    """Returns variables with the values of each tensor of `modules` permuted, which preserves scale and sign."""
    rng = np.random.default_rng([seed, 33])

    def permute(leaf: Any) -> Any:
        return rng.permutation(np.ravel(leaf)).reshape(np.shape(leaf))

    return {
        kind: {name: jax.tree.map(permute, part) if name in modules else part for name, part in (tree or {}).items()}
        for kind, tree in variables.items()
    }


def rank_correlation(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Returns Spearman's correlation of each pair of maps [N, H, W], float64 [N]; 0 if a map is constant."""
    ranks = [stats.rankdata(maps.reshape(len(maps), -1), axis=1) for maps in (one, other)]
    a, b = (r - r.mean(1, keepdims=True) for r in ranks)
    norms = np.sqrt((a * a).sum(1) * (b * b).sum(1))
    return np.asarray(np.divide((a * b).sum(1), norms, out=np.zeros(len(a)), where=norms > 0))


def sanity(explainer: Explainer, images: np.ndarray, method: str) -> dict[str, Any]:
    """Returns the similarity of the maps before and after shuffling weights, for the same classes.

    `stages` has one row for the weights of the head and one for all weights: `shuffled` (a description), `correlation`
    (mean over images and draws) and `empty` (share of maps without evidence afterwards, whose correlation counts as 0).
    `passed` is False if a correlation is above UNCHANGED, or if all maps of the trained network are empty.
    """
    targets = explainer.probabilities(images).argmax(-1)
    before, _ = explainer.maps(images, targets, method)
    stages: list[dict[str, Any]] = []
    for name, modules in {"the head": ["head"], "all weights": list(explainer.variables["params"])}.items():
        others = [explainer.with_variables(shuffled(explainer.variables, modules, seed)) for seed in range(DRAWS)]
        after = [other.maps(images, targets, method)[0] for other in others]
        correlation = np.mean([rank_correlation(before, maps) for maps in after])
        empty = np.mean([~maps.any((1, 2)) for maps in after])
        stages.append({"shuffled": name, "correlation": float(correlation), "empty": float(empty)})
    blank = float((~before.any((1, 2))).mean())
    passed = blank < 1 and all(stage["correlation"] <= UNCHANGED for stage in stages)
    return {"n": len(images), "draws": DRAWS, "stages": stages, "empty": blank, "passed": passed}


def pointing(maps: np.ndarray, slices: Slices, random: np.ndarray) -> dict[str, Any]:
    """Returns the pointing game's results for `maps`, next to chance and random maps."""
    hit = hits(maps, slices.lesions)
    lungs = (slices.lesions & slices.lungs).sum((1, 2)) / np.maximum(slices.lungs.sum((1, 2)), 1)
    return {
        "n": len(maps),
        "hit_rate": float(hit.mean()),
        "interval": bootstrap.wilson(int(hit.sum()), len(hit)),
        "chance": float(slices.lesions.mean()),
        "chance_in_lungs": float(lungs.mean()),
        "random": float(hits(random, slices.lesions).mean()),
        "empty": float((~maps.any((1, 2))).mean()),
    }


def measure(
    explainer: Explainer, method: str, images: np.ndarray, targets: np.ndarray, slices: Slices | None = None
) -> dict[str, Any]:
    """Returns "pointing" (if there are `slices`), "deletion" and "sanity" for the classes `targets` of `images`."""
    print(f"{method}: maps of {len(images)} images")
    maps, _ = explainer.maps(images, targets, method)
    random = random_maps(len(images), explainer.grain(method), maps.shape[1:], 0)
    result: dict[str, Any] = {}
    if slices is not None:
        result["pointing"] = pointing(maps, slices, random)
    print(f"{method}: deletion curves")
    curves = [deletion(explainer, images, each, targets) for each in (maps, random)]
    areas = [np.trapezoid(curve, dx=1 / DELETIONS, axis=-1) for curve in curves]
    result["deletion"] = {
        "n": len(images),
        "area": float(areas[0].mean()),
        "random_area": float(areas[1].mean()),
        "better_than_random": float((areas[0] < areas[1]).mean()),
        "curve": curves[0].mean(0).round(5).tolist(),
        "random_curve": curves[1].mean(0).round(5).tolist(),
    }
    print(f"{method}: sanity check")
    return result | {"sanity": sanity(explainer, images[:SANITY_IMAGES], method)}


def write(
    explainer: Explainer,
    run: Any,
    reader: Reader | None,
    methods: Sequence[str],
    target: int | None,
    out: Path,
    count: int,
) -> list[str]:
    """Writes quality.json and quality.md into `out`; returns the errors of unreadable images.

    Uses `count` evenly spaced test images of the reader and explains the class `target` or the predicted ones. Without
    a reader (phantom_ct networks), it uses synthetic slices of `count` new patients and explains the true finding.
    """
    bad: list[str] = []
    slices = None
    if reader is None:
        slices = draw_slices(run.classes, explainer.spec, datasets.resolve(run.config.data.dataset)[0], count)
        images, targets = slices.images, slices.labels
        description = f"{count} synthetic slices with a lesion, each of a new patient"
    else:
        name = reader.data.name
        rows = figures.evenly_spaced(np.unique(reader.data.rows("test")).tolist(), count)
        pixels, _ = figures.read_rows(reader, rows, bad)
        if not pixels:
            raise ValueError("\n  ".join([f"{name}: no image of the test split could be read", *bad]))
        images = np.stack(pixels)
        predicted = explainer.probabilities(images).argmax(-1)
        targets = predicted if target is None else np.full(len(images), target)
        description = f"{len(pixels)} images of the test split of {name}, without lesion masks"
    results = {method: measure(explainer, method, images, targets, slices) for method in methods}
    content = {"name": run.config.name, "step": run.step, "images": description, "methods": results}
    files.atomic_write(out / "quality.json", json.dumps(content, indent=2, allow_nan=False) + "\n")
    page = templating.render("quality.md.j2", **content, unchanged=UNCHANGED)
    files.atomic_write(out / "quality.md", page)
    print(page)
    return bad
