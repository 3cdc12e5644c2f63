"""Saliency maps against numpy by hand, on networks of which it is known what they see; and the checks of quality."""

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import small_bn
from flax import linen as nn
from PIL import Image
from random_weights import random_variables

from lungjax import datasets, models
from lungjax.config import HeadConfig, InputSpec
from lungjax.evaluation import bootstrap
from lungjax.explain import quality, saliency
from lungjax.explain.saliency import Explainer
from lungjax.models import receptive_field
from lungjax.models.head import Head
from lungjax.models.ops import conv

SIDE, CELL, CHANNELS = 16, 4, 5
SPEC = InputSpec(size=(SIDE, SIDE), channels=3, mean=(0.2, 0.3, 0.4), std=(0.5, 0.4, 0.3))
IMAGES = np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE, 3), dtype=np.uint8)


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Each program runs a few times: compiled quickly, not well."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conv, "compiler_options", lambda *_, **__: {"xla_backend_optimization_level": 0})
        yield


class Toy(nn.Module):
    """One layer over the colours, mean over cells of 4 x 4, and a head."""

    head: HeadConfig
    outputs: int = 3
    relu: bool = True

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> tuple[jax.Array, dict[str, Any]]:
        x = nn.Dense(CHANNELS, name="colours")(images)
        x = nn.avg_pool(nn.relu(x) if self.relu else x, (CELL, CELL), (CELL, CELL))
        return Head(self.head, self.outputs, name="head")(x, train=train), {"last": x}


FLAT = HeadConfig(pool="flatten", hidden=(6,))


@functools.cache  # what it compiled is shared
def toy(head=FLAT, outputs=3, positive=None, relu=True, **options):
    module = Toy(head, outputs, relu)
    return Explainer(module, random_variables(module, (SIDE, SIDE, 3)), SPEC, positive, **options)


def by_hand(explainer, target):
    """The toy's last map, the gradient of a class's logit by it and the logits, in float64 and without jax."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), explainer.variables["params"])
    x = (IMAGES / 255.0 - np.asarray(SPEC.mean)) / np.asarray(SPEC.std)
    x = x @ p["colours"]["kernel"] + p["colours"]["bias"]
    x = np.maximum(x, 0) if explainer.module.relu else x
    last = x.reshape(len(x), SIDE // CELL, CELL, SIDE // CELL, CELL, CHANNELS).mean((2, 4))
    flat = last.reshape(len(x), -1)
    hidden = flat @ p["head"]["hidden1"]["kernel"] + p["head"]["hidden1"]["bias"]
    logits = np.maximum(hidden, 0) @ p["head"]["dense"]["kernel"] + p["head"]["dense"]["bias"]
    back = (hidden > 0) * p["head"]["dense"]["kernel"][:, target]
    return last, (back @ p["head"]["hidden1"]["kernel"].T).reshape(last.shape), logits


def enlarged(raw):
    return np.stack([np.asarray(Image.fromarray(m.astype(np.float32)).resize((SIDE, SIDE), 2)) for m in raw])


@pytest.mark.parametrize("relu", [True, False])
def test_cams_are_those_of_their_papers(relu):
    explainer, seen = toy(relu=relu), dict.fromkeys(saliency.CAMS, 0)
    for target in range(3):
        last, gradient, logits = by_hand(explainer, target)
        raw = {name: np.zeros(last.shape[:3]) for name in saliency.CAMS}
        for b in range(len(IMAGES)):
            for k in range(CHANNELS):
                a, g = last[b, :, :, k], gradient[b, :, :, k]
                raw["gradcam"][b] += g.sum() / g.size * a
                raw["gradcam_positive"][b] += (g * (g > 0) * (a > 0)).sum() / g.size * a
                alpha = g**2 / (2 * g**2 + a.sum() * g**3)
                raw["gradcam++"][b] += (alpha * np.maximum(g, 0)).sum() * a
        for name, map_ in raw.items():
            if name == "gradcam++" and not relu:  # the paper's maps have no negative values
                continue
            wanted = enlarged(map_ if name == "gradcam_positive" else np.maximum(map_, 0))
            if name == "gradcam_positive":
                wanted = wanted - wanted.min((1, 2), keepdims=True)
            seen[name] += wanted.any()
            wanted = wanted / np.maximum(wanted.max((1, 2), keepdims=True), 1e-9)
            maps, probabilities = explainer.maps(IMAGES, np.full(3, target), name)
            np.testing.assert_allclose(maps, wanted, atol=2e-5, err_msg=f"{name} {target}")
            shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
            np.testing.assert_allclose(probabilities, shares, rtol=1e-4)
    assert all(seen[name] for name in saliency.CAMS if relu or name != "gradcam++"), seen


def test_the_predicted_class_is_explained_and_a_batch_changes_nothing():
    explainer = toy()
    _, probabilities = explainer.maps(IMAGES)
    for method in ("gradcam", "integrated_gradients", "occlusion"):
        whole, _ = explainer.maps(IMAGES, None, method)
        named, _ = toy(batch_size=2).maps(IMAGES, probabilities.argmax(1), method)
        np.testing.assert_allclose(whole, named, atol=1e-4, err_msg=method)
        assert whole.dtype == np.float32 and whole.min() >= 0 and whole.max() <= 1.0001
    maps, probabilities = explainer.maps(IMAGES[:0], None, "gradcam")
    assert maps.shape == (0, SIDE, SIDE) and probabilities.shape == (0, 3)


@pytest.mark.parametrize("method", ["gradcam", "integrated_gradients"])
def test_a_sigmoid_speaks_for_one_class_and_against_the_other(method):
    """The other class's map is that of a network with the last layer's sign turned."""
    one = toy(outputs=1, positive=0)
    turned = dict(one.variables["params"], head=dict(one.variables["params"]["head"]))
    turned["head"]["dense"] = jax.tree.map(lambda x: -x, turned["head"]["dense"])
    other = one.with_variables({**one.variables, "params": turned})
    against, p = one.maps(IMAGES, np.ones(3, int), method)
    wanted, turned_p = other.maps(IMAGES, np.zeros(3, int), method)
    np.testing.assert_allclose(against, wanted, atol=1e-5)
    np.testing.assert_allclose(p, turned_p[:, ::-1], atol=1e-6)
    assert np.abs(against - one.maps(IMAGES, np.zeros(3, int), method)[0]).max() > 0.1


def test_integrated_gradients_add_up_to_the_difference_of_scores():
    module = small_bn()(outputs=3, padding="same")
    first = Explainer(module, random_variables(module, (SIDE, SIDE, 3)), SPEC, None, steps=64)
    targets = np.asarray([0, 1, 2])
    logits = []
    for x in (IMAGES, 0 * IMAGES, np.broadcast_to(IMAGES.mean((1, 2), keepdims=True), IMAGES.shape)):
        normal = (x / 255.0 - np.asarray(SPEC.mean)) / np.asarray(SPEC.std)
        out = module.apply(first.variables, jnp.asarray(normal, jnp.float32), train=False)[0]
        logits.append(np.asarray(out)[np.arange(3), targets])
    starts = {"black": logits[1], "gray": logits[2], "both": (logits[1] + logits[2]) / 2}
    assert starts.keys() == set(saliency.BASELINES)
    for baseline, start in starts.items():
        explainer = replace(first, baseline=baseline)
        explainer.__dict__.update(_network=first._network, _compiled=first._compiled)
        found, difference = explainer.attributions(IMAGES, targets)
        np.testing.assert_allclose(difference, logits[0] - start, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found.sum((1, 2, 3)), difference, rtol=0.01, err_msg=baseline)


def corner_explainer(**options):
    """A network whose first class is the brightness of the first cell, and that sees nothing else."""
    explainer = toy(HeadConfig(pool="flatten"), outputs=2, **options)
    p = jax.tree.map(np.zeros_like, explainer.variables["params"])
    p["colours"]["kernel"][:, 0] = 1
    p["colours"]["bias"][:] = 2  # above the ReLU's edge
    p["head"]["dense"]["kernel"][0, 0] = 1
    return explainer.with_variables({"params": p, "batch_stats": {}})


def test_occlusion_finds_the_corner_that_counts():
    images = np.full((1, SIDE, SIDE, 3), 50, np.uint8)
    images[:, :CELL, :CELL] = 250
    heat = corner_explainer(patch=4, stride=2).maps(images, np.asarray([0]), "occlusion")[0][0]
    mean = images[0].mean((0, 1))[0]
    fall = np.zeros((SIDE, SIDE))
    times = np.zeros((SIDE, SIDE))
    for top in range(0, 13, 2):
        for left in range(0, 13, 2):
            hidden = max(0, 4 - top) * max(0, 4 - left) / 16
            fall[top : top + 4, left : left + 4] += hidden * (250 - mean)
            times[top : top + 4, left : left + 4] += 1
    np.testing.assert_allclose(heat, (fall / times) / (fall / times).max(), atol=1e-4)
    assert heat[:2, :2].min() == heat.max() and not heat[6:].any() and not heat[:, 6:].any()


def test_cells_lie_where_they_look():
    """By hand: pixel of the first cell's middle, and pixels between cells."""
    for name, wanted in (
        ("simple", (10.5, 8)),  # valid: 3x3 and a pool of 2, three times: 1 + .5 + 2 + 1 + 4 + 2
        ("mobilenetv2", (31, 32)),  # Keras's SAME pads 0 above and 1 below at stride 2: 1 + 2 + 4 + 8 + 16
    ):
        module = models.MODELS[name]()
        image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
        variables = jax.eval_shape(lambda m=module, x=image: m.init(jax.random.key(0), jnp.zeros(x.shape), train=False))
        rows, columns = receptive_field.places(
            lambda v, x, m=module: m.apply(v, x, train=False)[1]["last"], variables, image
        )
        assert rows == columns == wanted, (name, rows)


def test_a_map_is_where_the_image_is_bright():
    """A network of brightness under valid padding: stretched evenly, its map would lie beside the spot."""
    module = small_bn()(outputs=2, padding="valid", head=HeadConfig(pool="avg"))
    spec = InputSpec(size=(48, 48), channels=1)
    variables = random_variables(module, (48, 48, 1))
    values = {"kernel": 0.1, "scale": 0.1, "var": 1.0}
    variables = jax.tree_util.tree_map_with_path(
        lambda path, x: np.full_like(x, values.get(path[-1].key, 0.0)), variables
    )
    variables["params"]["head"]["dense"]["kernel"][:, 1] = 0
    images = np.zeros((2, 48, 48, 1), np.uint8)
    images[0, 10:13, 30:33] = images[1, 36:39, 8:11] = 255
    away = {}
    for align in (True, False):
        maps, _ = Explainer(module, variables, spec, align=align).maps(images, np.zeros(2, int))
        grid = np.arange(48)
        middle = [((m.sum(1) * grid).sum() / m.sum(), (m.sum(0) * grid).sum() / m.sum()) for m in maps]
        away[align] = np.abs(np.asarray(middle) - [(11, 31), (37, 9)]).max()
    assert away[True] < 2.5 and away[False] > away[True] + 1, away  # a cell is 4 pixels


def test_no_evidence_is_zeros():
    """Where nothing depends on the map, where all cells are alike, where there is one cell; never stretched noise."""
    explainer = corner_explainer()
    for method in saliency.METHODS:
        assert not explainer.maps(IMAGES, np.ones(3, int), method)[0].any(), method
    even = np.full((1, SIDE, SIDE, 3), 77, np.uint8)
    explainer = toy(HeadConfig(pool="avg", hidden=(6,)))
    for method in saliency.CAMS:
        assert not explainer.maps(even, None, method)[0].any(), method
    with np.errstate(all="raise"):
        assert not saliency.overlay(even[0], np.zeros((SIDE, SIDE)))[..., 0].std()


def test_what_can_not_be_explained_is_said():
    explainer = toy()
    with pytest.raises(ValueError, match=r"method='gradcm'.*gradcam"):
        explainer.maps(IMAGES, None, "gradcm")
    for images in (IMAGES[0], IMAGES.astype(np.float32), IMAGES[:, :8], IMAGES[..., :1]):
        with pytest.raises(ValueError, match="wanted uint8 .B, 16, 16, 3."):
            explainer.maps(images)
    for targets in ([0, 1], [0, 1, 3], [-1, 0, 0]):
        with pytest.raises(ValueError, match="3 numbers from 0 to 2"):
            explainer.maps(IMAGES, np.asarray(targets))
    with pytest.raises(ValueError, match="baseline='white'"):
        toy(baseline="white")
    with pytest.raises(ValueError, match="no larger than the image"):
        toy(patch=SIDE + 1)


def test_an_overlay_is_half_image_half_colour_map():
    image = np.full((2, 3, 1), 100, np.uint8)
    heat = np.asarray([[0, 0, 0], [1, 1, 1]])
    found = np.concatenate([saliency.heat_colors(heat), saliency.overlay(image, heat)], axis=1)
    assert found.shape == (2, 6, 3) and found.dtype == np.uint8
    low, high = (68, 1, 84), (253, 231, 37)  # viridis's ends, from its table
    for row, color in ((0, low), (1, high)):
        np.testing.assert_allclose(found[row, 1], color, atol=1)
        np.testing.assert_allclose(found[row, 4], (100 + np.asarray(color)) / 2, atol=1)
    with pytest.raises(ValueError, match="map"):
        saliency.overlay(image, heat.T)


# What maps are worth


def test_the_pointing_game():
    masks = np.zeros((4, 10, 10), bool)
    masks[:, 2:4, 2:4] = True
    maps = np.zeros((4, 10, 10))
    maps[0, 3, 3] = 1  # on it
    maps[1, 3, 6] = 1  # three pixels beside it
    maps[2, 2, 2] = maps[2, 9, 9] = 1  # a draw; the last one points nowhere
    np.testing.assert_array_equal(quality.hits(maps, masks), [1, 0, 0.5, 0])
    np.testing.assert_array_equal(quality.hits(maps, quality.near(masks, 3)), [1, 1, 0.5, 0])
    np.testing.assert_array_equal(quality.hits(maps, quality.near(masks, 2.9)), [1, 0, 0.5, 0])
    # Of 10 of 100: Wilson's interval as published in tables.
    np.testing.assert_allclose(bootstrap.wilson(10, 100), (0.0552, 0.1744), atol=1e-4)


def test_a_random_map_hits_by_area():
    mask = np.zeros((400, 20, 20), bool)
    mask[:, :, :8] = True
    found = quality.hits(quality.random_maps(400, (20, 20), (20, 20), 0), mask)
    assert abs(found.mean() - 0.4) < 0.08


def test_deleting_what_counts_first_costs_most():
    images = np.zeros((1, SIDE, SIDE, 3), np.uint8)
    images[:, :CELL, :CELL] = 255
    explainer = corner_explainer()
    right = np.zeros((1, SIDE, SIDE))
    right[:, :CELL, :CELL] = 1
    curve = quality.deletion(explainer, images, right, np.zeros(1, int), steps=16)[0]

    def chance(bright):  # of the first class by hand: the mean over the cell of three normalised colours, plus the bias
        return 1 / (1 + np.exp(-(sum((bright / 255 - m) / s for m, s in zip(SPEC.mean, SPEC.std, strict=True)) + 2)))

    fill = round(255 / 16)
    np.testing.assert_allclose(curve[:3], [chance(255), chance(fill), chance(fill)], rtol=1e-5)  # a 16th at a time
    wrong = quality.deletion(explainer, images, 1 - right, np.zeros(1, int), steps=16)
    np.testing.assert_allclose(wrong[0, 15], chance(255), rtol=1e-5)
    np.testing.assert_allclose(quality.area(np.asarray([[1.0, 0.5, 0.0], [1, 1, 1]])), [0.5, 1])
    assert quality.area(curve[None])[0] < quality.area(wrong)[0]


def test_rank_correlation_is_scipys():
    from scipy import stats

    a, b = np.random.default_rng(1).integers(0, 5, (2, 3, 6, 6)).astype(float)
    wanted = [stats.spearmanr(x.ravel(), y.ravel()).statistic for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(quality.rank_correlation(a, b), wanted)
    assert quality.rank_correlation(a, 0 * b).tolist() == [0, 0, 0]


class Edges(Explainer):
    """Shows the image's own brightness, whatever the network."""

    def maps(self, images, targets=None, method="gradcam"):
        heat = images.mean(-1).astype(np.float32) / 255
        return heat, super().maps(images, targets, method)[1]

    def with_variables(self, variables):
        return self


def test_a_map_that_ignores_the_weights_fails_and_gradcam_does_not():
    module = small_bn()(outputs=3, padding="same")
    variables = random_variables(module, (SIDE, SIDE, 3))
    images = np.random.default_rng(2).integers(0, 256, (8, SIDE, SIDE, 3), dtype=np.uint8)
    good = quality.sanity(Explainer(module, variables, SPEC), images, "gradcam")
    bad = quality.sanity(Edges(module, variables, SPEC), images, "gradcam", draws=1)
    assert good["passed"] and not bad["passed"]
    assert [stage["correlation"] for stage in bad["stages"]] == [1.0] * len(bad["stages"])
    assert good["stages"][0]["shuffled"] == "the head" and good["stages"][-1]["shuffled"] == "the whole network"
    assert good["stages"][-1]["modules"] == len(quality.module_order(module, (SIDE, SIDE, 3)))
    order = quality.module_order(module, (SIDE, SIDE, 3))
    assert order[-1] == "head" and order == ["stem_conv", "stem_bn", "stage2_conv", "stage2_bn", "head"]
    page = quality.markdown("x", "y", {"edges": {"sanity": bad, "deletion": dict.fromkeys(
        ("area", "random_area", "better_than_random"), 0.5)}})  # fmt: skip
    assert "| edges | **FAILED** | 1.00" in page


def test_shuffling_keeps_each_tensors_values_and_other_modules():
    module = small_bn()(outputs=3)
    variables = random_variables(module, (SIDE, SIDE, 3))
    changed = quality.shuffled(variables, ["head"], 0)
    for kind, tree in variables.items():
        for name, part in tree.items():
            for old, new in zip(jax.tree.leaves(part), jax.tree.leaves(changed[kind][name]), strict=True):
                np.testing.assert_array_equal(np.sort(np.ravel(old)), np.sort(np.ravel(new)))
                assert (np.asarray(old) != new).any() == (name == "head")


def test_drawn_slices_have_their_lesions_where_the_image_has_them():
    from lungjax.datasets.phantom import slices

    classes = slices.CLASSES[::-1]
    plain, boxed = InputSpec(size=(96, 96), channels=1), InputSpec(size=(64, 48), channels=1, crop="box")
    name = datasets.resolve("phantom_ct")[0]
    whole = quality.draw_slices(classes, plain, name, 2)
    cut = quality.draw_slices(classes, boxed, name, 2)
    assert [classes[i] for i in whole.labels] == [c for c in slices.CLASSES if c != "Normal"]
    assert whole.images.shape == (2, 96, 96, 1) and cut.lesions.shape == (2, 64, 48)
    for i in range(2):
        finding = classes[whole.labels[i]]
        patient = slices.new_patient(quality.FIRST_SEED + i, finding)
        level = np.random.default_rng([patient.seed, 30]).permutation(quality.LEVELS)[0]
        drawn = slices.draw_slice(patient, slices.levels(patient, quality.LEVELS)[level])
        # The lesion's centre, as a part of the image and of the box.
        rows, columns = np.nonzero(drawn.lesion)
        at = np.asarray([rows.mean() + 0.5, columns.mean() + 0.5])
        left, top, right, bottom = drawn.box
        for made, start, extent in (
            (whole, (0, 0), drawn.lesion.shape),
            (cut, (top, left), (bottom - top, right - left)),
        ):
            found = np.asarray([axis.mean() + 0.5 for axis in np.nonzero(made.lesions[i])]) / made.lesions[i].shape
            np.testing.assert_allclose(found, (at - start) / np.asarray(extent), atol=0.01)
        assert (cut.lesions[i] & ~cut.lungs[i]).mean() < 0.005
