"""Saliency maps checked against NumPy, on small networks with known maps."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import small_bn
from flax import linen as nn
from PIL import Image
from random_weights import random_variables
from scipy import special

from lungjax import models
from lungjax.config import HeadConfig, InputSpec
from lungjax.explain import saliency
from lungjax.explain.saliency import Explainer
from lungjax.models import receptive_field
from lungjax.models.network import Network

SIDE, CELL, CHANNELS = 32, 4, 5
SPEC = InputSpec(size=(SIDE, SIDE), channels=3, mean=(0.2, 0.3, 0.4), std=(0.5, 0.4, 0.3))
IMAGES = np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE, 3), dtype=np.uint8)


class Toy(Network):
    """A network of one layer over the colors, a mean over cells of 4 x 4 pixels, and a head."""

    relu: bool = True

    def feature_map(self, x, *, train):
        x = nn.Dense(CHANNELS, name="colors")(x)
        return nn.avg_pool(nn.relu(x) if self.relu else x, (CELL, CELL), (CELL, CELL))

    def _stride(self):
        return CELL


FLAT = HeadConfig(pool="flatten", hidden=(6,))


@functools.cache  # caches the compiled programs as well
def toy(head=FLAT, outputs=3, positive=None, relu=True, **options):
    module = Toy(relu, head=head, outputs=outputs)
    return Explainer(module, random_variables(module, (SIDE, SIDE, 3)), SPEC, positive, **options)


def by_hand(explainer, target):
    """Returns the last map of `Toy`, the gradient of the target's logit, and all logits, in float64 with NumPy."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), explainer.variables["params"])
    x = (IMAGES / 255.0 - np.asarray(SPEC.mean)) / np.asarray(SPEC.std)
    x = x @ p["colors"]["kernel"] + p["colors"]["bias"]
    x = np.maximum(x, 0) if explainer.module.relu else x
    last = x.reshape(len(x), SIDE // CELL, CELL, SIDE // CELL, CELL, CHANNELS).mean((2, 4))
    flat = last.reshape(len(x), -1)
    hidden = flat @ p["head"]["hidden1"]["kernel"] + p["head"]["hidden1"]["bias"]
    logits = np.maximum(hidden, 0) @ p["head"]["dense"]["kernel"] + p["head"]["dense"]["bias"]
    back = (hidden > 0) * p["head"]["dense"]["kernel"][:, target]
    return last, (back @ p["head"]["hidden1"]["kernel"].T).reshape(last.shape), logits


class Block(nn.Module):
    """Like the layers of `Toy`."""

    @nn.compact
    def __call__(self, x):
        return nn.avg_pool(nn.relu(nn.Dense(CHANNELS)(x)), (CELL, CELL), (CELL, CELL))


class Deep(Toy):
    """Two blocks; only the map of the first one, 8 x 8, is large enough."""

    def feature_map(self, x, *, train):
        for number in (1, 2):
            x = self.run(Block(name=f"stage{number}"), x)
        return x


def enlarged(raw):
    return np.stack([np.asarray(Image.fromarray(m.astype(np.float32)).resize((SIDE, SIDE), 2)) for m in raw])


@pytest.mark.parametrize("relu", [True, False])
def test_cams_by_the_formulas_of_the_papers(relu):
    explainer, evidence = toy(relu=relu), dict.fromkeys(saliency.CAMS, 0)
    for target in range(3):
        last, gradient, logits = by_hand(explainer, target)
        raw = {name: np.zeros(last.shape[:3]) for name in saliency.CAMS}
        for b, k in np.ndindex(len(IMAGES), CHANNELS):
            a, g = last[b, :, :, k], gradient[b, :, :, k]
            raw["gradcam"][b] += g.sum() / g.size * a
            raw["gradcam_positive"][b] += (g * (g > 0) * (a > 0)).sum() / g.size * a
            alpha = g**2 / (2 * g**2 + a.sum() * g**3)
            raw["gradcam++"][b] += (alpha * np.maximum(g, 0)).sum() * a
        if not relu:
            del raw["gradcam++"]  # the paper assumes positive activations
        for name, map_ in raw.items():
            expected = enlarged(map_ if name == "gradcam_positive" else np.maximum(map_, 0))
            if name == "gradcam_positive":
                expected = expected - expected.min((1, 2), keepdims=True)
            evidence[name] += expected.any()
            top = expected.max((1, 2), keepdims=True) + 1e-8 * (name == "gradcam_positive")  # as in the study
            expected = expected / np.maximum(top, 1e-9)
            maps, probabilities = explainer.maps(IMAGES, target, name)
            np.testing.assert_allclose(maps, expected, atol=2e-5, err_msg=f"{name} {target}")
            np.testing.assert_allclose(probabilities, special.softmax(logits, axis=1), rtol=1e-4)
    assert all(evidence[name] for name in raw), evidence


@pytest.mark.parametrize("remat", [False, True])
def test_gradcam_of_an_earlier_block(remat):
    module = Deep(head=FLAT, outputs=3, remat=remat)
    explainer = Explainer(module, random_variables(module, (SIDE, SIDE, 3)), SPEC)
    assert explainer.describe() == "Grad-CAM of stage1, 8 x 8 cells"
    p, x = explainer.variables["params"], (IMAGES / 255.0 - np.asarray(SPEC.mean)) / np.asarray(SPEC.std)
    first = Block().apply({"params": p["stage1"]}, x)

    def score(at, target):
        flat = Block().apply({"params": p["stage2"]}, at).reshape(len(at), -1)
        hidden = nn.relu(flat @ p["head"]["hidden1"]["kernel"] + p["head"]["hidden1"]["bias"])
        return (hidden @ p["head"]["dense"]["kernel"])[:, target].sum()

    for target in range(3):
        weights = jax.grad(score)(first, target).mean((1, 2), keepdims=True)
        expected = enlarged(np.maximum((weights * first).sum(-1), 0))
        expected /= np.maximum(expected.max((1, 2), keepdims=True), 1e-9)
        maps, _ = explainer.maps(IMAGES, target)
        assert expected.any()
        np.testing.assert_allclose(maps, expected, atol=2e-5, err_msg=f"{target}")


@pytest.mark.parametrize(
    ("name", "side", "layer"),
    [
        ("cbr_small", 128, ("stage3", (9, 9))),
        ("xray_cnn", 128, ("stem", (21, 21))),
        ("xray_cnn", 41, None),
        ("mobilenet", 224, (saliency.LAST, (7, 7))),
        ("densenet121", 128, ("stage2_transition", (8, 8))),  # its layers are only parts of a map
        ("vgg16", 128, ("stage5_block3", (8, 8))),  # before the last pool
    ],
)
def test_feature_map_of_cams(name, side, layer):
    module = models.MODELS[name](outputs=2)
    images = np.zeros((1, side, side, 1), np.uint8)
    variables = jax.eval_shape(lambda: module.init(jax.random.key(0), images / 255, train=False))
    explainer = Explainer(module, variables, InputSpec(size=(side, side), channels=1))
    assert explainer.layer == layer
    assert explainer.methods == (saliency.METHODS if layer else ("integrated_gradients", "occlusion"))
    if layer is None:
        with pytest.raises(ValueError, match=r"gradcam.*7 x 7.*occlusion"):
            explainer.maps(images, 0, "gradcam")


def test_predicted_class_and_batches():
    explainer = toy(batch_size=2)
    probabilities = explainer.probabilities(IMAGES)
    ones = [explainer.maps(IMAGES, targets)[0] for targets in (1, np.ones(3, int))]
    np.testing.assert_array_equal(*ones)
    for method in ("gradcam", "integrated_gradients", "occlusion"):
        maps, p = explainer.maps(IMAGES, None, method)  # batches of two and one
        assert maps.dtype == np.float32 and maps.min() >= 0 and maps.max() <= 1.0001
        np.testing.assert_allclose(p, probabilities, atol=1e-6)
        last, _ = explainer.maps(IMAGES[[2, 0]], probabilities[[2, 0]].argmax(1), method)
        np.testing.assert_allclose(maps[[2, 0]], last, atol=1e-4, err_msg=method)
    maps, probabilities = explainer.maps(IMAGES[:0], None, "gradcam")
    assert maps.shape == (0, SIDE, SIDE) and probabilities.shape == (0, 3)


def test_sigmoid_maps_of_both_classes():
    """The map of the negative class is that of a network with the sign of the last layer flipped."""
    one = toy(outputs=1, positive=0)
    flipped = dict(one.variables["params"], head=dict(one.variables["params"]["head"]))
    flipped["head"]["dense"] = jax.tree.map(lambda x: -x, flipped["head"]["dense"])
    other = one.with_variables({**one.variables, "params": flipped})
    for method in ("gradcam", "integrated_gradients"):
        against, p = one.maps(IMAGES, 1, method)
        expected, flipped_p = other.maps(IMAGES, 0, method)
        np.testing.assert_allclose(against, expected, atol=1e-5)
        np.testing.assert_allclose(p, flipped_p[:, ::-1], atol=1e-6)
        assert np.abs(against - one.maps(IMAGES, 0, method)[0]).max() > 0.1


def test_sum_of_integrated_gradients(monkeypatch):
    monkeypatch.setattr(saliency, "STEPS", 256)
    explainer = toy()
    scores = []
    for x in (IMAGES, 0 * IMAGES):
        normal = (x / 255.0 - np.asarray(SPEC.mean)) / np.asarray(SPEC.std)
        logits = explainer.module.apply(explainer.variables, jnp.asarray(normal, jnp.float32), train=False)[0]
        scores.append(np.asarray(logits)[np.arange(3), np.arange(3)])
    attributions = explainer.attributions(IMAGES, np.arange(3))
    np.testing.assert_allclose(attributions.sum((1, 2, 3)), scores[0] - scores[1], rtol=0.01)
    evidence = np.maximum(attributions.sum(-1), 0)
    maps, _ = explainer.maps(IMAGES, np.arange(3), "integrated_gradients")
    np.testing.assert_allclose(maps, evidence / evidence.max((1, 2), keepdims=True), atol=1e-5)


def corner_explainer():
    """A network whose first class depends only on the brightness of the first cell."""
    explainer = toy(HeadConfig(pool="flatten"), outputs=2)
    p = jax.tree.map(np.zeros_like, explainer.variables["params"])
    p["colors"]["kernel"][:, 0] = 1
    p["colors"]["bias"][:] = 2  # above the ReLU's edge
    p["head"]["dense"]["kernel"][0, 0] = 1
    return explainer.with_variables({"params": p, "batch_stats": {}})


def test_occlusion_by_hand():
    images = np.full((1, SIDE, SIDE, 3), 50, np.uint8)
    images[:, :CELL, :CELL] = 250
    heat = corner_explainer().maps(images, 0, "occlusion")[0][0]
    fall, times = np.zeros((2, SIDE, SIDE))
    for top, left in itertools.product(range(0, SIDE - 3, 2), repeat=2):
        hidden = max(0, 4 - top) * max(0, 4 - left) / 16
        fall[top : top + 4, left : left + 4] += hidden * (250 - images.mean())
        times[top : top + 4, left : left + 4] += 1
    np.testing.assert_allclose(heat, (fall / times) / (fall / times).max(), atol=1e-4)
    assert heat[:2, :2].min() == heat.max() and not heat[6:].any() and not heat[:, 6:].any()


def test_places_of_cells_by_hand():
    """Each position pair is the center of the first cell and the distance between cells, both in pixels."""
    for name, side, cells, expected in (
        ("simple", 64, 6, (10.5, 8)),  # valid: 3x3 and a pool of 2, three times: 1 + .5 + 2 + 1 + 4 + 2
        ("xray_cnn", 80, 2, (17.5, 36)),  # strides as wide as the windows, and a remainder
        ("convnext_tiny", 100, 3, (15.5, 32)),
        ("mobilenetv2", 64, 2, (15.5, 32)),  # with padding, cells are spread evenly
        ("mobilenetv2", 100, 4, (12, 25)),
    ):
        axes = receptive_field.cell_positions(models.MODELS[name](), (side, side), (cells, cells))
        assert axes == (expected, expected), name
    third = models.MODELS["cbr_small"]().up_to("stage3")  # center of 57: (1 + 2 + 4) * (6 + 2) + 1
    assert receptive_field.cell_positions(third, (128, 128), (9, 9)) == ((28, 8), (28, 8))


def test_map_position_by_receptive_field():
    """With valid padding, a map that is only stretched to the image would miss the bright spot."""
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
    for method in ("gradcam", "gradcam_positive"):
        maps, _ = Explainer(module, variables, spec).maps(images, 0, method)
        grid = np.arange(48)
        middle = [((m.sum(1) * grid).sum() / m.sum(), (m.sum(0) * grid).sum() / m.sum()) for m in maps]
        away[method] = np.abs(np.asarray(middle) - [(11, 31), (37, 9)]).max()
    assert away["gradcam"] < 2.5 and away["gradcam_positive"] > away["gradcam"] + 1, away  # a cell is 4 pixels


def test_zero_maps_without_evidence():
    """Maps are zeros if the score does not depend on the map, or if all cells are equal."""
    explainer = corner_explainer()
    for method in saliency.METHODS:
        assert not explainer.maps(IMAGES, 1, method)[0].any(), method
    even = np.full((1, SIDE, SIDE, 3), 77, np.uint8)
    explainer = toy(HeadConfig(pool="avg", hidden=(6,)))
    for method in saliency.CAMS:
        assert not explainer.maps(even, None, method)[0].any(), method
    with np.errstate(all="raise"):
        assert not saliency.overlay(even[0], np.zeros((SIDE, SIDE)))[..., 0].std()


def test_overlay_as_mean_of_image_and_colors():
    image, heat = np.full((2, 3, 1), 100, np.uint8), np.asarray([[0, 0, 0], [1, 1, 1]])
    ends = np.asarray([[(68, 1, 84)] * 3, [(253, 231, 37)] * 3])  # of viridis
    np.testing.assert_allclose(saliency.heat_colors(heat), ends, atol=1)
    np.testing.assert_allclose(saliency.overlay(image, heat), (100 + ends) / 2, atol=1)
