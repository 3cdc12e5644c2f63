"""ConvNeXt and ConvNeXt V2: files from Facebook, timm, torchvision and Keras."""

import re

from lungjax.weights.convert import Rules, blocks

UNITS = {
    "conv_dw": "dwconv", "dwconv": "dwconv", "depthwise_conv": "dwconv", "norm": "norm", "layernorm": "norm",
    "mlp.fc1": "dense1", "pwconv1": "dense1", "pointwise_conv_1": "dense1", "mlp.grn": "grn", "grn": "grn",
    "mlp.fc2": "dense2", "pwconv2": "dense2", "pointwise_conv_2": "dense2",
}  # fmt: skip
SCALE = {"gamma": "layer_scale", "layer_scale": "layer_scale"}
TORCHVISION_UNITS = SCALE | {"block.0": "dwconv", "block.2": "norm", "block.3": "dense1", "block.5": "dense2"}
DOWN = {"0": "norm", "1": "conv"}
STEM, BLOCK = r"(?:stem|downsample_layers\.0)\.", r"stages\.(\d)\.(?:blocks\.)?(\d+)\."
KERAS_BLOCK = r"\w+_stage_(\d)_block_(\d+)_"
KERAS_LEAF = r"/(?:.*/)?(kernel|bias|gamma|beta)"  # a norm and a convolution share a group, with different leaves
KERAS_LEAVES = {"kernel": "conv/kernel", "bias": "conv/bias", "gamma": "norm/scale", "beta": "norm/bias"}
# torchvision's layer scale is [C, 1, 1], Facebook's response norm [1, 1, 1, C].
FLAT = ((r"/layer_scale$|/grn/(scale|bias)$", lambda array, shape: array.reshape(-1)),)


def _torchvision(match: re.Match[str]) -> str:
    """Returns our layer for torchvision's blocks in features.1, 3, 5 and 7 and the downsampling layers between them."""
    unit = f"block{int(match[2]) + 1}/{TORCHVISION_UNITS[match[3]]}" if match[3] else f"downsample/{DOWN[match[2]]}"
    return f"stage{int(match[1]) // 2 + 1}_{unit}"


FACEBOOK_LAYERS = (  # and those of timm
    (STEM + "0", "stem_conv"), (STEM + "1", "stem_norm"), blocks(BLOCK, UNITS, stage=1, block=1),
    (r"(?:downsample_layers|stages)\.([123])\.(?:downsample\.)?([01])",
     lambda match: f"stage{int(match[1]) + 1}_downsample/{DOWN[match[2]]}"),
    (r"(?:head\.)?norm", "head/norm_after_pool"), (r"head(?:\.fc)?", "head/dense"),
)  # fmt: skip
TORCHVISION_LAYERS = (
    (r"features\.0\.0", "stem_conv"), (r"features\.0\.1", "stem_norm"),
    (r"features\.([1357])\.(\d+)\.(block\.[0235])", _torchvision), (r"features\.([246])\.([01])()", _torchvision),
    (r"classifier\.0", "head/norm_after_pool"), (r"classifier\.2", "head/dense"),
)  # fmt: skip
KERAS_LAYERS = (
    blocks(KERAS_BLOCK, UNITS, stage=1, block=1),
    (r"\w+_head_layernorm", "head/norm_after_pool"), (r"\w+_head_dense", "head/dense"),
)  # fmt: skip
KERAS_TENSORS = (
    (r"\w+_stem" + KERAS_LEAF, lambda match: f"stem_{KERAS_LEAVES[match[1]]}"),
    (r"\w+_downsampling_block_(\d)" + KERAS_LEAF,
     lambda match: f"stage{int(match[1]) + 2}_downsample/{KERAS_LEAVES[match[2]]}"),
    # The leaf is "Variable" in released files, "variable" in new ones.
    blocks(KERAS_BLOCK, SCALE, stage=1, block=1, suffix="/.*"),
)  # fmt: skip
FACEBOOK = Rules(FACEBOOK_LAYERS, (blocks(BLOCK, SCALE, stage=1, block=1),), special=FLAT, torch=True)
TORCHVISION_TENSORS = ((r"features\.([1357])\.(\d+)\.(layer_scale)", _torchvision),)
RULES = {
    "timm": FACEBOOK,
    "facebook": FACEBOOK,
    "torchvision": Rules(TORCHVISION_LAYERS, TORCHVISION_TENSORS, special=FLAT, torch=True),
    "keras": Rules(KERAS_LAYERS, KERAS_TENSORS),
}
