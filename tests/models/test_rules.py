"""Rules for weight files: a one-to-one mapping between the tensors of a layout and the leaves of a network.

`tests/goldens/tensor_names.json.gz`, written by `python -m tests.parity.goldens`, has the tensor names and
shapes of timm, torchvision and Keras. Layouts named "today" are those of Keras 3, the others those of released files.
"""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from lungjax import models
from lungjax.config import ModelConfig
from lungjax.models.ops import conv
from lungjax.weights.convert import convert
from lungjax.weights.name_rules import layouts

NAMES = json.loads(gzip.decompress((Path(__file__).parents[1] / "goldens/tensor_names.json.gz").read_bytes()))
DEFAULT = ("convnextv2_atto", "mobilenetv2", "mobilenetv3_small", "resnet18", "vgg16")
MODELS = sorted({key.split()[0] for key in NAMES})


def rules(model, layout):
    table = layouts(model)
    return table.get(layout) or table[f"{layout}_{model}"]


@pytest.mark.parametrize("model", [m if m in DEFAULT else pytest.param(m, marks=pytest.mark.slow) for m in MODELS])
def test_one_tensor_per_leaf_by_the_rules(model):
    with conv.plain_forms():
        shapes = models.leaf_shapes(models.build(ModelConfig(name=model), 1000), (224, 224, 3))
    for key, tensors in NAMES.items():
        name, layout, *_ = key.split()
        if name == model:
            zeros = {tensor: np.broadcast_to(np.float32(0), shape) for tensor, shape in tensors.items()}
            leaves = convert(zeros, rules(model, layout), shapes)
            assert {path: leaf.shape for path, leaf in leaves.items()} == shapes, key


def test_names_of_other_publishers():
    """Files that no current library writes: Facebook's ConvNeXt, torch's first DenseNet, numbered scopes of BiT."""
    for model, layout, tensors in (
        ("convnext_tiny", "facebook", {
            "downsample_layers.0.0.weight": ("stem_conv/kernel", (4, 4, 3, 1)),
            "downsample_layers.0.1.weight": ("stem_norm/scale", (4,)),
            "downsample_layers.2.0.bias": ("stage3_downsample/norm/bias", (4,)),
            "downsample_layers.2.1.weight": ("stage3_downsample/conv/kernel", (2, 2, 3, 4)),
            "stages.1.2.dwconv.weight": ("stage2_block3/dwconv/kernel", (7, 7, 1, 4)),
            "stages.1.2.norm.weight": ("stage2_block3/norm/scale", (4,)),
            "stages.1.2.pwconv1.weight": ("stage2_block3/dense1/kernel", (4, 16)),
            "stages.1.2.pwconv2.weight": ("stage2_block3/dense2/kernel", (16, 4)),
            "stages.1.2.gamma": ("stage2_block3/layer_scale", (4,)),
            "norm.weight": ("head/norm_after_pool/scale", (4,)),
            "head.weight": ("head/dense/kernel", (4, 5)),
        }),
        ("convnextv2_atto", "facebook", {"stages.1.2.grn.gamma": ("stage2_block3/grn/scale", (4,))}),
        ("convnext_tiny", "keras", {"x_stage_2_block_8_layer_scale/Variable": ("stage3_block9/layer_scale", (4,))}),
        ("densenet121", "torchvision", {
            "features.denseblock4.denselayer16.norm.2.running_var": ("stage4_block16/bn2/var", (4,)),
            "features.denseblock4.denselayer16.conv.1.weight": ("stage4_block16/conv1/kernel", (1, 1, 3, 4)),
        }),
        ("densenet121", "radimagenet", {
            "backbone.0.conv0.weight": ("stem_conv/kernel", (7, 7, 3, 4)),
            "backbone.0.denseblock2.denselayer12.norm2.weight": ("stage2_block12/bn2/scale", (4,)),
            "backbone.0.transition3.conv.weight": ("stage3_transition/conv/kernel", (1, 1, 3, 4)),
            "backbone.0.norm5.bias": ("top_bn/bias", (4,)),
        }),
        ("resnet50_v15", "radimagenet", {
            "backbone.0.weight": ("stem_conv/kernel", (7, 7, 3, 4)),
            "backbone.1.running_mean": ("stem_bn/mean", (4,)),
            "backbone.4.0.downsample.1.weight": ("stage1_block1/shortcut_bn/scale", (4,)),
            "backbone.7.2.conv3.weight": ("stage4_block3/conv3/kernel", (1, 1, 3, 4)),
        }),
        ("bit_r50x1", "bit", {
            "resnet/block2/unit03/b/standardized_conv2d_17/kernel": ("stage2_block3/conv2/kernel", (3, 3, 4, 4)),
            "resnet/block2/unit03/c/group_norm_1/gamma": ("stage2_block3/norm2/scale", (4,)),
        }),
    ):  # fmt: skip
        table = rules(model, layout)
        arrays = {}
        for name, (path, shape) in tensors.items():
            zeros = np.zeros(shape, np.float32)
            transposed = zeros.transpose(3, 2, 0, 1) if zeros.ndim == 4 else zeros.T
            arrays[name] = transposed if table.torch else zeros
            if path.endswith("grn/scale"):
                arrays[name] = zeros[None, None, None]  # Facebook's shape
        leaves = convert(arrays, table, dict(tensors.values()))
        assert set(leaves) == {path for path, _ in tensors.values()}, (model, layout)


def test_rearranged_arrays():
    """Kernels for BGR images, the dense kernel after a flattened map, and Keras's depthwise kernels."""
    random = np.random.default_rng(0).normal(size=(7, 7, 3, 4)).astype(np.float32)
    for model, layout, name, path in (
        ("resnet50", "keras", "conv1_conv/kernel", "stem_conv/kernel"),
        ("vgg16", "keras", "block1_conv1/kernel", "stage1_block1/conv/kernel"),
        ("resnet50v2", "keras_v2", "conv1_conv/kernel", "stem_conv/kernel"),
    ):
        leaf = convert({name: random}, rules(model, layout), {path: random.shape})[path]
        np.testing.assert_array_equal(leaf, random if layout == "keras_v2" else random[:, :, ::-1])
    # Row (h * 7 + w) * 512 + c of ours is multiplied with channel c of cell (h, w) in torch.
    shape, array = (7 * 7 * 512, 2), np.arange(2 * 512 * 49, dtype=np.float32).reshape(2, 512, 7, 7)
    expected = array.transpose(2, 3, 1, 0).reshape(shape)
    for layout, name, form in (
        ("torchvision", "classifier.0.weight", array.reshape(2, -1)),
        ("timm", "pre_logits.fc1.weight", array),
    ):
        leaf = convert({name: form}, rules("vgg16", layout), {"head/hidden1/kernel": shape})["head/hidden1/kernel"]
        np.testing.assert_array_equal(leaf, expected)
    depthwise, path = random[:, :, :, :1], "stage1_block1/dwconv/kernel"
    for name in ("conv_dw_1/kernel", "conv_dw_1/depthwise_kernel"):
        leaf = convert({name: depthwise}, rules("mobilenet", "keras"), {path: (7, 7, 1, 3)})[path]
        np.testing.assert_array_equal(leaf[:, :, 0], depthwise[..., 0])
