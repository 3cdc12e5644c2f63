"""ConvNeXt against numpy written from the papers; parameter counts; rules on names as the files have them."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from random_weights import random_images, random_variables

from lungjax.models import layers
from lungjax.models.convnext import CONVNEXT, ConvNeXt, GlobalResponseNorm
from lungjax.models.layers import DropPath
from lungjax.models.ops.conv import plain_depthwise
from lungjax.models.trees import flatten, unflatten
from lungjax.weights.convert import convert, target
from lungjax.weights.rules.convnext import RULES

# With 1000 classes: Keras and torchvision (V1), timm (V2).
PARAMETERS = {
    "convnext_tiny": 28589128,
    "convnext_small": 50223688,
    "convnext_base": 88591464,
    "convnext_large": 197767336,
    "convnext_xlarge": 350196968,
    "convnextv2_atto": 3708400,
    "convnextv2_femto": 5233240,
    "convnextv2_pico": 9066280,
    "convnextv2_nano": 15623800,
    "convnextv2_tiny": 28635496,
    "convnextv2_base": 88717800,
    "convnextv2_large": 197956840,
    "convnextv2_huge": 660289640,
}
DEPTHS, WIDTHS = (2, 1), (4, 6)


@pytest.fixture
def plain_forms(monkeypatch):
    """Depthwise convolutions in the compiler's own form: the same function, traced and compiled far sooner."""
    monkeypatch.setattr(layers, "depthwise_conv", plain_depthwise)


def tiny(grn):
    return ConvNeXt(DEPTHS, WIDTHS, drop_path=0.5, grn=grn, outputs=5)


def four_stages(grn):
    return ConvNeXt((1, 2, 1, 1), (4, 6, 8, 10), drop_path=0.5, grn=grn, outputs=5)


def variables(module, height=32, width=32):
    """Random values, with layer scales near 1: from their start, 1e-6, no branch would be seen."""
    leaves = flatten(random_variables(module, (height, width, 3)))
    return unflatten({path: 1 + v if path.endswith("layer_scale") else v for path, v in leaves.items()})


def apply(module, values, images):
    return jax.jit(lambda v, x: module.apply(v, x, train=False))(values, images)


def exact_gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / np.sqrt(2)))


def tanh_gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def layer_norm(x, p):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def patches(x, p):
    """Convolution whose stride is its kernel's side: what doesn't fill a patch is cut off."""
    k = p["kernel"].shape[0]
    b, h, w, c = x.shape
    x = x[:, : h // k * k, : w // k * k].reshape(b, h // k, k, w // k, k, c)
    return np.einsum("bhiwjc,ijcd->bhwd", x, p["kernel"]) + p["bias"]


def depthwise(x, p):
    h, w = x.shape[1:3]
    padded = np.pad(x, ((0, 0), (3, 3), (3, 3), (0, 0)))
    return sum(padded[:, i : i + h, j : j + w] * p["kernel"][i, j, 0] for i in range(7) for j in range(7)) + p["bias"]


def block(x, p, gelu):
    y = layer_norm(depthwise(x, p["dwconv"]), p["norm"])
    y = gelu(y @ p["dense1"]["kernel"] + p["dense1"]["bias"])
    if "grn" in p:
        norms = np.sqrt((y**2).sum((1, 2), keepdims=True))
        y = y + p["grn"]["scale"] * (y * norms / (norms.mean(-1, keepdims=True) + 1e-6)) + p["grn"]["bias"]
    y = y @ p["dense2"]["kernel"] + p["dense2"]["bias"]
    return x + y * p.get("layer_scale", 1)


def reference(p, images, gelu=exact_gelu):
    x = layer_norm(patches(images, p["stem_conv"]), p["stem_norm"])
    for s, depth in enumerate(DEPTHS, 1):
        if s > 1:
            x = patches(layer_norm(x, p[f"stage{s}_downsample"]["norm"]), p[f"stage{s}_downsample"]["conv"])
        for i in range(1, depth + 1):
            x = block(x, p[f"stage{s}_block{i}"], gelu)
    pooled = layer_norm(x.mean((1, 2)), p["head"]["norm_after_pool"])
    return pooled @ p["head"]["dense"]["kernel"] + p["head"]["dense"]["bias"], x


@pytest.mark.parametrize("size", [(16, 24), (19, 13)])
@pytest.mark.parametrize("grn", [False, True])
def test_equals_numpy_at_even_and_odd_sizes(grn, size):
    module, images = tiny(grn), random_images((*size, 3))
    values = variables(module)
    logits, features = apply(module, values, images)
    wide = jax.tree.map(np.float64, values["params"])
    expected, last = reference(wide, np.float64(images))
    assert features["last"].shape == last.shape == (2, size[0] // 8, size[1] // 8, WIDTHS[-1])
    bound = 1e-5 * np.ptp(expected[0] - expected[1])
    assert np.abs(logits - expected).max() <= bound
    assert np.abs(logits - reference(wide, np.float64(images), tanh_gelu)[0]).max() > 5 * bound


@pytest.mark.parametrize("name", CONVNEXT)
def test_parameter_counts(name, plain_forms):
    module = CONVNEXT[name]()
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False))
    assert set(shapes) == {"params"}
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == PARAMETERS[name]


def test_the_counts_name_every_variant():
    assert set(PARAMETERS) == set(CONVNEXT)


def test_initial_values_are_the_authors(plain_forms):
    module = ConvNeXt((1,), (16,), drop_path=0.0, outputs=5)
    block = jax.jit(lambda key: module.init(key, jnp.zeros((1, 4, 4, 3)), train=False)["params"]["stage1_block1"])
    values = block(jax.random.key(0))
    assert np.std(values["dense1"]["kernel"]) == pytest.approx(0.02, rel=0.1)
    np.testing.assert_array_equal(values["layer_scale"], np.full(16, 1e-6, np.float32))
    x = jnp.ones((1, 2, 2, 3))
    y, grn = GlobalResponseNorm(jnp.float32).init_with_output(jax.random.key(0), x)
    assert {path: value.tolist() for path, value in grn["params"].items()} == {"scale": [0] * 3, "bias": [0] * 3}
    np.testing.assert_array_equal(y, x)


def test_drop_path_rises_evenly_to_its_rate(plain_forms):
    rates = []

    def record(call, args, kwargs, context):
        if isinstance(context.module, DropPath) and context.method_name == "__call__":
            rates.append(context.module.rate)
        return call(*args, **kwargs)

    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    with nn.intercept_methods(record):
        jax.eval_shape(lambda: four_stages(True).init(keys, jnp.zeros((1, 32, 32, 3)), train=True))
    np.testing.assert_allclose(rates, np.linspace(0, 0.5, 5))


def test_recomputing_blocks_changes_no_gradient(plain_forms):
    module, images = ConvNeXt((2,), (4,), drop_path=0.5, grn=True, outputs=5), random_images((16, 16, 3))
    values = variables(module)

    def gradient(module):
        def loss(params):
            logits, _ = module.apply({"params": params}, images, train=True, rngs={"dropout": jax.random.key(0)})
            return (logits**2).sum()

        return flatten(jax.jit(jax.grad(loss))(values["params"]))

    plain, recomputed = gradient(module), gradient(module.clone(remat=True))
    assert plain["stem_conv/kernel"].any()
    for path, value in plain.items():
        np.testing.assert_allclose(recomputed[path], value, rtol=1e-3, atol=1e-4 * np.abs(value).max())


def test_a_channel_of_zeros_has_a_finite_gradient():
    x = jnp.ones((1, 2, 2, 3)).at[..., 1].set(0)
    module = GlobalResponseNorm(jnp.float32)
    values = {"params": {"scale": jnp.ones(3), "bias": jnp.zeros(3)}}
    gradient = jax.grad(lambda x: (module.apply(values, x) ** 2).sum())(x)
    assert np.isfinite(gradient).all() and np.any(gradient[..., 0])


def test_half_precision_stays_close(plain_forms):
    module, images = ConvNeXt((2,), (4,), drop_path=0.5, grn=True, outputs=5), random_images((16, 16, 3))
    values = variables(module)
    logits, features = apply(module.clone(dtype=jnp.bfloat16), values, images)
    expected, _ = apply(module, values, images)
    assert features["last"].dtype == jnp.bfloat16 and logits.dtype == jnp.float32
    assert np.abs(logits - expected).max() < 0.05 * np.ptp(expected)


def test_least_size():
    module = CONVNEXT["convnext_tiny"]()
    assert module.minimum_size() == (32, 32)
    with pytest.raises(ValueError, match="at least 32 x 32"):
        module.init(jax.random.key(0), jnp.zeros((1, 31, 64, 3)), train=False)


# Layer names by our unit; s and i count from 0, f is a stage's place in torchvision's `features`.
TIMM = {
    "stem_conv": "stem.0",
    "stem_norm": "stem.1",
    "downsample/norm": "stages.{s}.downsample.0",
    "downsample/conv": "stages.{s}.downsample.1",
    "dwconv": "stages.{s}.blocks.{i}.conv_dw",
    "norm": "stages.{s}.blocks.{i}.norm",
    "dense1": "stages.{s}.blocks.{i}.mlp.fc1",
    "dense2": "stages.{s}.blocks.{i}.mlp.fc2",
    "grn": "stages.{s}.blocks.{i}.mlp.grn",
    "layer_scale": "stages.{s}.blocks.{i}.gamma",
    "head/norm_after_pool": "head.norm",
    "head/dense": "head.fc",
}
FACEBOOK = {
    "stem_conv": "downsample_layers.0.0",
    "stem_norm": "downsample_layers.0.1",
    "downsample/norm": "downsample_layers.{s}.0",
    "downsample/conv": "downsample_layers.{s}.1",
    "dwconv": "stages.{s}.{i}.dwconv",
    "norm": "stages.{s}.{i}.norm",
    "dense1": "stages.{s}.{i}.pwconv1",
    "dense2": "stages.{s}.{i}.pwconv2",
    "grn": "stages.{s}.{i}.grn",
    "layer_scale": "stages.{s}.{i}.gamma",
    "head/norm_after_pool": "norm",
    "head/dense": "head",
}
TORCHVISION = {
    "stem_conv": "features.0.0",
    "stem_norm": "features.0.1",
    "downsample/norm": "features.{d}.0",
    "downsample/conv": "features.{d}.1",
    "dwconv": "features.{f}.{i}.block.0",
    "norm": "features.{f}.{i}.block.2",
    "dense1": "features.{f}.{i}.block.3",
    "dense2": "features.{f}.{i}.block.5",
    "layer_scale": "features.{f}.{i}.layer_scale",
    "head/norm_after_pool": "classifier.0",
    "head/dense": "classifier.2",
}
KERAS = {
    "stem_conv": "net_stem",
    "stem_norm": "net_stem",
    "downsample/norm": "net_downsampling_block_{k}",
    "downsample/conv": "net_downsampling_block_{k}",
    "dwconv": "net_stage_{s}_block_{i}_depthwise_conv",
    "norm": "net_stage_{s}_block_{i}_layernorm",
    "dense1": "net_stage_{s}_block_{i}_pointwise_conv_1",
    "dense2": "net_stage_{s}_block_{i}_pointwise_conv_2",
    "layer_scale": "net_stage_{s}_block_{i}_layer_scale/Variable",
    "head/norm_after_pool": "net_head_layernorm",
    "head/dense": "net_head_dense",
}


def in_file(path, value, names, layout, convolutions):
    """Returns name and array of our leaf as a file of `layout` has them."""
    unit, _, leaf = path.rpartition("/")
    where = re.fullmatch(r"stage(\d)_(?:block(\d)/?|(?=downsample))(.*)", unit)
    stage, i, unit = (int(where[1]) - 1, int(where[2] or 1) - 1, where[3]) if where else (0, 0, unit)
    unit = unit if unit else leaf  # the layer scale is a leaf of its block
    name = names[unit].format(s=stage, i=i, f=2 * stage + 1, d=2 * stage, k=stage - 1)
    if unit == "layer_scale":
        return name, value[:, None, None] if layout == "torchvision" else value
    if layout == "keras":
        return f"{name}/{ {'scale': 'gamma', 'bias': 'beta'}[leaf] if 'norm' in unit else leaf }", value
    if layout == "facebook" and unit == "grn":
        return f"{name}.{ {'scale': 'gamma', 'bias': 'beta'}[leaf] }", value[None, None, None]
    name = f"{name}.{'bias' if leaf == 'bias' else 'weight'}"
    if value.ndim == 4:
        return name, value.transpose(3, 2, 0, 1)
    value = value.T
    return name, value[..., None, None] if convolutions and re.search(r"dense[12]/kernel", path) else value


@pytest.mark.parametrize(
    ("layout", "names", "grn", "convolutions"),
    [
        ("timm", TIMM, False, False),
        ("timm", TIMM, True, False),
        ("timm", TIMM, True, True),  # the four smallest V2 hold their dense layers as 1x1 convolutions
        ("facebook", FACEBOOK, False, False),
        ("facebook", FACEBOOK, True, False),
        ("torchvision", TORCHVISION, False, False),
        ("keras", KERAS, False, False),
    ],
)
def test_rules_fill_every_leaf(layout, names, grn, convolutions):
    leaves = flatten(variables(four_stages(grn))["params"])
    file = dict(in_file(path, value, names, layout, convolutions) for path, value in leaves.items())
    assert len(file) == len(leaves)
    found = convert(file, RULES[layout], {path: value.shape for path, value in leaves.items()})
    for path, value in leaves.items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)


def test_keras_names_of_today():
    name = "convnext_tiny_stem/convnext_tiny_stem_layernorm/gamma"
    assert target(name, RULES["keras"], 1) == "stem_norm/scale"
    assert (
        target("convnext_tiny_stage_2_block_8_layer_scale/variable", RULES["keras"], 1) == "stage3_block9/layer_scale"
    )


@pytest.mark.parametrize(
    ("layout", "name"), [("timm", "stages.0.blocks.0.mlp.fc3.weight"), ("keras", "net_stage_0_block_0_extra/kernel")]
)
def test_unknown_names_are_left_to_the_caller(layout, name):
    assert target(name, RULES[layout], 2) is None
