"""ConvNeXt and ConvNeXt V2: Facebook's own files, and those of timm, torchvision and Keras."""

import re

from lungjax.weights.convert import Rules

UNITS = {
    "conv_dw": "dwconv", "dwconv": "dwconv", "depthwise_conv": "dwconv", "block.0": "dwconv",
    "norm": "norm", "layernorm": "norm", "block.2": "norm",
    "mlp.fc1": "dense1", "pwconv1": "dense1", "pointwise_conv_1": "dense1", "block.3": "dense1",
    "mlp.fc2": "dense2", "pwconv2": "dense2", "pointwise_conv_2": "dense2", "block.5": "dense2",
    "mlp.grn": "grn", "grn": "grn", "gamma": "layer_scale", "layer_scale": "layer_scale",
}  # fmt: skip
UNIT = f"({'|'.join(map(re.escape, UNITS))})"
LEAVES = {"kernel": "conv/kernel", "bias": "conv/bias", "gamma": "norm/scale", "beta": "norm/bias"}
DOWN = {"0": "norm", "1": "conv"}
LEAF = r"/(?:.*/)?(kernel|bias|gamma|beta)"


def _unit(match: re.Match[str]) -> str:
    return f"stage{int(match[1]) + 1}_block{int(match[2]) + 1}/{UNITS[match[3]]}"


def _torchvision(match: re.Match[str]) -> str:  # blocks in features.1, 3, 5, 7, downsamplings between them
    unit = f"block{int(match[2]) + 1}/{UNITS[match[3]]}" if match[3] else f"downsample/{DOWN[match[2]]}"
    return f"stage{int(match[1]) // 2 + 1}_{unit}"


# torchvision has the layer scale as (C, 1, 1), Facebook the response norm as (1, 1, 1, C).
FLAT = ((r"/layer_scale$|/grn/(scale|bias)$", lambda array, shape: array.reshape(-1)),)
STEM, BLOCK = r"(?:stem|downsample_layers\.0)\.", r"stages\.(\d)\.(?:blocks\.)?(\d+)\."
# One table for Facebook's names and timm's: no name means one layer in the one and another in the other.
FACEBOOK_LAYERS = (
    (STEM + "0", "stem_conv"), (STEM + "1", "stem_norm"), (BLOCK + UNIT, _unit),
    (r"(?:downsample_layers|stages)\.([123])\.(?:downsample\.)?([01])",
     lambda match: f"stage{int(match[1]) + 1}_downsample/{DOWN[match[2]]}"),
    (r"(?:head\.)?norm", "head/norm_after_pool"), (r"head(?:\.fc)?", "head/dense"),
)  # fmt: skip
TORCHVISION_LAYERS = (
    (r"features\.0\.0", "stem_conv"), (r"features\.0\.1", "stem_norm"),
    (r"features\.([1357])\.(\d+)\." + UNIT, _torchvision), (r"features\.([246])\.([01])()", _torchvision),
    (r"classifier\.0", "head/norm_after_pool"), (r"classifier\.2", "head/dense"),
)  # fmt: skip
KERAS_LAYERS = (
    (r"\w+_stage_(\d)_block_(\d+)_" + UNIT, _unit),
    (r"\w+_head_layernorm", "head/norm_after_pool"), (r"\w+_head_dense", "head/dense"),
)  # fmt: skip
KERAS_LEAVES = (  # a norm and a convolution share a group, in which their leaves have different names
    (r"\w+_stem" + LEAF, lambda match: f"stem_{LEAVES[match[1]]}"),
    (r"\w+_downsampling_block_(\d)" + LEAF, lambda match: f"stage{int(match[1]) + 2}_downsample/{LEAVES[match[2]]}"),
    (r"\w+_stage_(\d)_block_(\d+)_(layer_scale)/.*", _unit),  # "Variable" in released files, "variable" today
)
FACEBOOK = Rules(FACEBOOK_LAYERS, ((BLOCK + "(gamma)", _unit),), special=FLAT, torch=True)
TORCHVISION_LEAVES = ((r"features\.(\d)\.(\d+)\.(layer_scale)", _torchvision),)
RULES = {
    "timm": FACEBOOK,
    "facebook": FACEBOOK,
    "torchvision": Rules(TORCHVISION_LAYERS, TORCHVISION_LEAVES, special=FLAT, torch=True),
    "keras": Rules(KERAS_LAYERS, KERAS_LEAVES),
}
