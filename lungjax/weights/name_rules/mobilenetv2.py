"""MobileNetV2: files from Keras (released and new names), timm and torchvision."""

from lungjax.weights.convert import Rules, numbered_blocks
from lungjax.weights.name_rules.efficientnet import TIMM_BLOCK, TIMM_FIRST, TIMM_TOP

REPEATS = (1, 2, 3, 4, 3, 3, 1)
CONVS = {"expand": "expand_conv", "depthwise": "dwconv", "project": "project_conv"}
NORMS = {"expand": "expand_bn", "depthwise": "bn", "project": "project_bn"}
# Positions in the sequence of a block of torchvision; the first block has no expansion.
FIRST = {"0.0": "dwconv", "0.1": "bn", "1": "project_conv", "2": "project_bn"}
BLOCK = {"0.0": "expand_conv", "0.1": "expand_bn", "1.0": "dwconv", "1.1": "bn", "2": "project_conv", "3": "project_bn"}
KERAS = (
    ("Conv1", "stem_conv"), ("bn_Conv1", "stem_bn"), ("Conv_1", "top_conv"), ("Conv_1_bn", "top_bn"),
    ("Logits|predictions", "head/dense"),
    numbered_blocks(r"mobl(\d+)_conv_\1_", CONVS, REPEATS),
    numbered_blocks(r"bn(\d+)_conv_\1_bn_", NORMS, REPEATS),
    # New names, where block 0 has no number.
    numbered_blocks(r"(?:expanded_conv|block_(\d+))_", CONVS | {f"{k}_BN": path for k, path in NORMS.items()}, REPEATS),
)  # fmt: skip
TORCHVISION = (
    (r"features\.0\.0", "stem_conv"), (r"features\.0\.1", "stem_bn"), (r"features\.18\.0", "top_conv"),
    (r"features\.18\.1", "top_bn"), (r"classifier\.1", "head/dense"),
    numbered_blocks(r"features\.(1)\.conv\.", FIRST, REPEATS, first=1),
    numbered_blocks(r"features\.(\d+)\.conv\.", BLOCK, REPEATS, first=1),
)  # fmt: skip
RULES = {
    "keras": Rules(KERAS),
    "timm": Rules((*TIMM_TOP, TIMM_FIRST, TIMM_BLOCK), torch=True),
    "torchvision": Rules(TORCHVISION, torch=True),
}
