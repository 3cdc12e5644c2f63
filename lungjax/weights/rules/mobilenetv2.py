"""MobileNetV2: files of Keras (the released one's names and today's), timm and torchvision."""

from lungjax.weights.convert import Rules
from lungjax.weights.rules.efficientnet import TIMM_BLOCK, TIMM_FIRST, TIMM_TOP
from lungjax.weights.rules.mobilenet import depthwise, unit

REPEATS = (1, 2, 3, 4, 3, 3, 1)
KINDS = "(expand|depthwise|project)"
CONVS = {"expand": "expand_conv", "depthwise": "dwconv", "project": "project_conv"}
NORMS = {"expand": "expand_bn", "depthwise": "bn", "project": "project_bn"}
# torchvision's sequence within a block; nothing expands in the first.
FIRST = {"0.0": "dwconv", "0.1": "bn", "1": "project_conv", "2": "project_bn"}
BLOCK = {
    "0.0": "expand_conv", "0.1": "expand_bn", "1.0": "dwconv", "1.1": "bn", "2": "project_conv", "3": "project_bn"
}  # fmt: skip
TODAY = rf"(?:expanded_conv|block_(\d+))_{KINDS}"  # the first block has no number

RULES = {
    "keras": Rules(
        layers=(
            ("Conv1", "stem_conv"),
            ("bn_Conv1", "stem_bn"),
            (rf"mobl(\d+)_conv_\1_{KINDS}", lambda match: f"{unit(int(match[1]), REPEATS)}/{CONVS[match[2]]}"),
            (rf"bn(\d+)_conv_\1_bn_{KINDS}", lambda match: f"{unit(int(match[1]), REPEATS)}/{NORMS[match[2]]}"),
            (TODAY, lambda match: f"{unit(int(match[1] or 0), REPEATS)}/{CONVS[match[2]]}"),
            (TODAY + "_BN", lambda match: f"{unit(int(match[1] or 0), REPEATS)}/{NORMS[match[2]]}"),
            ("Conv_1", "top_conv"),
            ("Conv_1_bn", "top_bn"),
            ("Logits|predictions", "head/dense"),
        ),
        special=((r"/dwconv/kernel$", depthwise),),
    ),
    "timm": Rules((*TIMM_TOP, *TIMM_FIRST, *TIMM_BLOCK), torch=True),
    "torchvision": Rules(
        layers=(
            (r"features\.0\.0", "stem_conv"),
            (r"features\.0\.1", "stem_bn"),
            (r"features\.1\.conv\.([\d.]+)", lambda match: f"stage1_block1/{FIRST.get(match[1])}"),
            (
                r"features\.(\d+)\.conv\.([\d.]+)",
                lambda match: f"{unit(int(match[1]) - 1, REPEATS)}/{BLOCK.get(match[2])}",
            ),
            (r"features\.18\.0", "top_conv"),
            (r"features\.18\.1", "top_bn"),
            (r"classifier\.1", "head/dense"),
        ),
        torch=True,
    ),
}
