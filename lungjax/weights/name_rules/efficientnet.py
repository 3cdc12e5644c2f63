"""EfficientNet and its Lite versions: files from Keras, timm, torchvision and EfficientNet-PyTorch (lukemelas)."""

import re

from lungjax.weights.convert import Rules, blocks, numbered_blocks


def _keras_block(match: re.Match[str]) -> str:
    """Returns our layer, such as stage3_block2/expand_conv for "block3b_expand_conv"."""
    stage, letter, layer = match.groups()
    block = ord(letter) - ord("a") + 1
    return f"stage{stage}_block{block}/{layer.replace('se_', 'se/').replace('dwconv2', 'dwconv')}"


KERAS = Rules(
    (
        (r"(stem|top)_(conv|bn)", r"\1_\2"),
        (r"block(\d)([a-z])_(.+)", _keras_block),
        (r"probs|predictions", "head/dense"),
    ),
    ignore=(r"normalization(_\d+)?/.*",),  # mean and variance of ImageNet, which our InputSpec has
)
TIMM_TOP = (
    ("conv_stem", "stem_conv"), ("bn1", "stem_bn"), ("conv_head", "top_conv"), ("bn2", "top_bn"),
    ("classifier", "head/dense"),
)  # fmt: skip
TIMM_LAYERS = {
    "conv_pw": "expand_conv", "bn1": "expand_bn", "conv_dw": "dwconv", "bn2": "bn", "se.conv_reduce": "se/reduce",
    "se.conv_expand": "se/expand", "conv_pwl": "project_conv", "bn3": "project_bn",
}  # fmt: skip
# The first stage of V1 has no expansion, so bn1 follows its depthwise convolution.
TIMM_FIRST_LAYERS = {"bn1": "bn", "conv_pw": "project_conv", "bn2": "project_bn"}
TIMM_FIRST = blocks(r"blocks\.(0)\.(\d+)\.", TIMM_FIRST_LAYERS, stage=1, block=1)
TIMM_BLOCK = blocks(r"blocks\.(\d+)\.(\d+)\.", TIMM_LAYERS, stage=1, block=1)
TORCHVISION_TOP = (
    (r"features\.0\.0", "stem_conv"), (r"features\.0\.1", "stem_bn"), (r"features\.[78]\.0", "top_conv"),
    (r"features\.[78]\.1", "top_bn"), (r"classifier\.1", "head/dense"),
)  # fmt: skip
TORCHVISION_LAYERS = {
    "0.0": "expand_conv", "0.1": "expand_bn", "1.0": "dwconv", "1.1": "bn", "2.fc1": "se/reduce", "2.fc2": "se/expand",
    "3.0": "project_conv", "3.1": "project_bn",
}  # fmt: skip
TORCHVISION_FIRST = {
    "0.0": "dwconv", "0.1": "bn", "1.fc1": "se/reduce", "1.fc2": "se/expand", "2.0": "project_conv", "2.1": "project_bn"
}  # fmt: skip
TORCHVISION_BLOCK = blocks(r"features\.(\d)\.(\d+)\.block\.", TORCHVISION_LAYERS, block=1)
TORCHVISION = (
    *TORCHVISION_TOP, blocks(r"features\.(1)\.(\d+)\.block\.", TORCHVISION_FIRST, block=1), TORCHVISION_BLOCK
)  # fmt: skip
LUKEMELAS_TOP = (
    ("_conv_stem", "stem_conv"), ("_bn0", "stem_bn"), ("_conv_head", "top_conv"), ("_bn1", "top_bn"),
    ("_fc", "head/dense"),
)  # fmt: skip
LUKEMELAS_LAYERS = {
    "_expand_conv": "expand_conv", "_bn0": "expand_bn", "_depthwise_conv": "dwconv", "_bn1": "bn",
    "_project_conv": "project_conv", "_bn2": "project_bn",
}  # fmt: skip
RULES = {
    "keras": KERAS,
    "timm": Rules((*TIMM_TOP, TIMM_FIRST, TIMM_BLOCK), torch=True),
    "torchvision": Rules(TORCHVISION, torch=True),
}
LITE_REPEATS = {"lite0": (1, 2, 2, 3, 3, 4, 1), "lite1": (1, 3, 3, 4, 4, 5, 1), "lite2": (1, 3, 3, 4, 4, 5, 1)}
for _lite, _repeats in LITE_REPEATS.items():
    _blocks = numbered_blocks(r"_blocks\.(\d+)\.", LUKEMELAS_LAYERS, _repeats)
    RULES[f"lukemelas_{_lite}"] = Rules((*LUKEMELAS_TOP, _blocks), torch=True)
